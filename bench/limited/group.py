"""A memory control group around a process: made, filled, read, removed; version 1 and version 2.

A process in it holds at most `limit` bytes, its pages of files among them, and cannot swap. Needs the right to make
groups: root, or --cgroup with a folder that was delegated to the user.
"""

import os
import time
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
HELP = """a memory control group cannot be made here: {problem}.
What would help:
- run as root, on a system with the memory controller (version 1: a mount of type cgroup with the option memory;
  version 2: a mount of type cgroup2 whose cgroup.controllers has memory);
- or name a folder that may be written with --cgroup; systemd makes one so:
  systemd-run --user --scope -p Delegate=yes bash, then --cgroup /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
  (version 2 wants that no process is left in that folder itself: move the shell into a folder below it first)"""


class NoGroups(Exception):
    """Why no group can be made, and what to do."""

    def __init__(self, problem):
        super().__init__(HELP.format(problem=problem))


def version_of(folder):
    """1 or 2 for a folder of the memory controller, None for another."""
    if (folder / "memory.limit_in_bytes").is_file():
        return 1
    if (folder / "cgroup.controllers").is_file():
        return 2 if "memory" in (folder / "cgroup.controllers").read_text().split() else None
    return None


def find_parent(wanted=None):
    """The folder that groups are made in, and the version of its hierarchy; NoGroups when there is none."""
    if wanted is not None:
        found = version_of(wanted) or fail_at(wanted)
        return wanted, found
    places = []
    for line in MOUNTS.read_text().splitlines():
        _, at, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(at), 1
        if kind == "cgroup2":
            places.append(Path(at))
    for place in places:
        if version_of(place) == 2:
            return place, 2
    seen = ", ".join(map(str, places)) or "none"
    raise NoGroups(f"no mounted hierarchy has the memory controller (version 2 hierarchies seen: {seen})")


def fail_at(folder):
    raise NoGroups(f"{folder} is no folder of the memory controller")


class Group:
    """One group; a context manager that removes it."""

    def __init__(self, name, limit, parent=None):
        """`limit` in bytes; rounded down to whole pages by the system."""
        above, self.version = find_parent(parent)
        self.path = above / f"{name}-{os.getpid()}"
        self.limit = limit
        try:
            if self.version == 2:
                self.enable(above)
            self.path.mkdir()
        except OSError as error:
            raise NoGroups(f"{self.path} cannot be made ({error})") from error
        try:
            self.restrict()
        except OSError as error:
            self.remove()
            raise NoGroups(f"{self.path} takes no limit ({error})") from error

    @staticmethod
    def enable(above):
        """Version 2 gives a folder the controllers that its parent hands down."""
        control = above / "cgroup.subtree_control"
        if "memory" not in control.read_text().split():
            control.write_text("+memory")

    def restrict(self):
        if self.version == 1:
            (self.path / "memory.limit_in_bytes").write_text(str(self.limit))
            both = self.path / "memory.memsw.limit_in_bytes"
            if both.is_file():
                both.write_text(str(self.limit))
            return
        (self.path / "memory.max").write_text(str(self.limit))
        swap = self.path / "memory.swap.max"
        if swap.is_file():
            swap.write_text("0")

    @property
    def door(self):
        """The file into which a process writes its id to enter."""
        return self.path / "cgroup.procs"

    def wrap(self, command):
        """The command that enters the group and becomes `command`."""
        return ["sh", "-c", 'echo $$ > "$1" && shift && exec "$@"', "sh", str(self.door), *command]

    def kills(self):
        """Processes that were killed because the limit was met."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        for line in (self.path / name).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def peak(self):
        """The most bytes that were counted at a time, pages of files among them; None where the system does not say."""
        path = self.path / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(path.read_text()) if path.is_file() else None

    def remove(self):
        """Removes the group; its last process has ended."""
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                # A process that was killed is still being taken apart.
                time.sleep(0.1)
        raise OSError(f"{self.path} cannot be removed; are processes left in it?")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()
