"""The two sides of the benchmark under a memory limit, each measured once by a process in its own control group.

Every measurement starts with nothing of the model's file in the system's cache: pages that another process brought in would
not count towards the group's limit.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import first_text, parse  # noqa: E402
from common import ROOT, fail, say  # noqa: E402
from disk import drop_cache, window_file, window_of  # noqa: E402
from group import Group  # noqa: E402

GROUP = "cadre-bench"
# What `cadre bench -o json` says of a streamed model, and the records repeat. The first repetition fills the cache and does not count:
# of a key with `samples_` before it, a list with one value a repetition, the last value is taken.
STREAMED = (
    "bytes_read_per_token", "hit_rate", "disk_bytes_per_s", "stall_ns_per_token", "making_ns_per_token", "evictions_per_token",
    "read_ahead_share", "wasted_share", "peak_rss_bytes", "experts_bytes",
)  # fmt: skip
# Loading, flags of llama.py. Those that hold the weights in memory of their own are killed where they do not fit.
LOADING = {
    "default": [],
    "mapped, not repacked": ["--load", "mmap", "--no-repack"],
    "read, not repacked": ["--load", "none", "--no-repack"],
    "direct, not repacked": ["--load", "direct", "--no-repack"],
}
FLASH = ("auto", "off")
LOADING_FAILED = " (while loading)"
# A few MiB more than are allowed would be killed: the cap is on everything, the system's own tables among it.
MARGIN_BYTES = 64 << 20


@dataclass
class Ended:
    """How a process ended."""

    seconds: float
    code: int
    killed: bool
    timed_out: bool
    out: str
    err: str
    facts: dict = field(default_factory=dict)

    @property
    def why(self):
        """Why there is no result."""
        if self.killed:
            return "killed: out of memory"
        if self.timed_out:
            return f"no result after {self.seconds:.0f} s"
        lines = [line for line in self.err.strip().splitlines() if line]
        return f"exit code {self.code}: {' '.join(lines)[-300:]}"


def execute(command, group, most_seconds, wrap=True):
    """Runs a command to its end; in `group` unless that is None, and brought there by the shell if `wrap`."""
    wrapped = group.wrap(command) if group and wrap else command
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen(wrapped, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        late = threading.Event()

        def stop():
            late.set()
            child.send_signal(signal.SIGKILL)

        timer = threading.Timer(most_seconds, stop)
        timer.start()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    facts = {"peak_rss_bytes": usage.ru_maxrss * 1024, "read_bytes": usage.ru_inblock * 512, "major_faults": usage.ru_majflt}
    facts |= {"user_s": round(usage.ru_utime, 3), "system_s": round(usage.ru_stime, 3)}
    killed = False
    if group:
        killed = group.kills() > 0
        facts["peak_group_bytes"] = group.peak()
    return Ended(seconds, child.returncode, killed, late.is_set(), *texts, facts)


def clean(path):
    """Drops the file's pages; the end of the program when another process holds them."""
    left = drop_cache(path)
    if left > path.stat().st_size // 100:
        fail(f"{left / 1e6:.0f} MB of {path.name} stay cached: another process uses them, and they would not count")


class Cadre:
    """`cadre bench` and `cadre run` under a limit, or without one."""

    def __init__(self, program, path, threads, parent=None, margin=MARGIN_BYTES, extra=()):
        self.program, self.path, self.threads = str(program), path, threads
        self.parent, self.margin, self.extra = parent, margin, list(extra)

    def budget(self, limit):
        """What is given as --mem-budget under a limit."""
        return limit - self.margin

    def command(self, test, budget, cold, repetitions):
        command = [self.program, "run" if test.kind == "first" else "bench", "-m", str(self.path), "-t", str(self.threads)]
        if budget is not None:
            command += ["--mem-budget", str(budget), *self.extra]
        if test.kind == "first":
            # As long a context as llama.cpp gets (peers/llama_bench.py).
            context = -(-(test.count + 1) // 1024) * 1024
            return command + ["-p", first_text(test.count), "-n", "1", "-c", str(context), "--temp", "0", "-o", "json"]
        counts = {"tg": ("0", str(test.count)), "pp": (str(test.count), "0")}[test.kind]
        command += ["-p", counts[0], "-n", counts[1], "-r", str(repetitions), "-o", "json"]
        return command + (["--no-warmup"] if cold else [])

    def measure(self, name, limit, most_seconds, budget=None, repetitions=2):
        """One test: a dict with "ts", the median of all repetitions but the first, or "seconds", or with "failed". Without a limit,
        `budget` may still be given."""
        test = parse(name)
        clean(self.path)
        group = Group(GROUP, limit, self.parent) if limit is not None else None
        budget = self.budget(limit) if limit is not None else budget
        try:
            # Without a limit nothing is missing once all has been read, which the warm-up does.
            command = self.command(test, budget, limit is not None, repetitions)
            ended = execute(command, group, most_seconds)
        finally:
            if group:
                group.remove()
        if ended.code != 0:
            return {"failed": ended.why}
        if test.kind == "first":
            return ended.facts | {"seconds": ended.seconds}
        record = json.loads(ended.out)[0]
        own = {key: value for key in STREAMED if (value := own_figure(record, key)) is not None}
        # It also reads the disk to measure it, so that what the process read says nothing of the model.
        ended.facts.pop("read_bytes")
        return ended.facts | own | {"ts": statistics.median(record["samples_ts"][1:])}


class Llama:
    """llama.cpp under a limit; a process for each measurement."""

    def __init__(self, python, path, threads, parent=None, most_seconds=60.0):
        self.python, self.path, self.threads, self.parent = python, path, threads, parent
        self.part_seconds = most_seconds

    def measure(self, name, limit, most_seconds, settings, part_seconds=None):
        """One test: a dict with "ts" or "seconds", or with "failed"."""
        test = parse(name)
        clean(self.path)
        script = Path(__file__).resolve().parent / "llama.py"
        command = [self.python, str(script), str(self.path), "--test", name, "--threads", str(self.threads)]
        command += [*LOADING[settings["loading"]], "--flash", settings["flash"]]
        command += ["--most-seconds", str(part_seconds or self.part_seconds)]
        group = Group(GROUP, limit, self.parent) if limit is not None else None
        try:
            if group:
                command += ["--join", str(group.door)]
            with window_of(self.path, settings.get("window_kib")):
                ended = execute(command, group, most_seconds, wrap=False)
        finally:
            if group:
                group.remove()
        if ended.code != 0:
            parts = [json.loads(line)["part"] for line in ended.out.splitlines() if '"part"' in line]
            return {"failed": ended.why + (f" (after: {', '.join(parts)})" if parts else LOADING_FAILED)}
        found = json.loads(ended.out.splitlines()[-1])
        facts = ended.facts | {"read_bytes": found["read_bytes"], "major_faults": found["major_faults"], "tokens": found["tokens"]}
        facts["bytes_read_per_token"] = found["read_bytes"] / found["tokens"]
        if test.kind == "first":
            return facts | {"seconds": found["ns"] / 1e9}
        return facts | {"ts": found["tokens"] * 1e9 / found["ns"]}


def own_figure(record, key):
    """A figure of the last repetition, or of all where the record has no list."""
    samples = record.get(f"samples_{key}")
    return samples[-1] if samples else record.get(key)


class Tuning:
    """Looks for the fastest settings of llama.cpp under a limit."""

    def __init__(self, llama, limit, most_seconds, part_seconds, windows):
        self.llama, self.limit, self.windows = llama, limit, windows
        self.most_seconds, self.part_seconds = most_seconds, part_seconds
        # Ways of loading that do not get as far as a test, and why.
        self.hopeless = {}
        self.tried = {}

    def one(self, name, settings):
        """Tries one combination."""
        loading = settings["loading"]
        if loading in self.hopeless:
            found = {"failed": self.hopeless[loading]}
        else:
            found = self.llama.measure(name, self.limit, self.most_seconds, settings, self.part_seconds)
            say(f"    llama.cpp {name} {settings}: {shown(found)}")
        if "failed" in found and LOADING_FAILED in found["failed"]:
            self.hopeless[loading] = found["failed"]
        row = settings | {key: found[key] for key in ("ts", "seconds", "failed") if key in found}
        self.tried[name].append(row)
        return row

    def best(self, name):
        """The fastest flags for a test, and the fastest flags with another window of reading ahead; None where nothing works."""
        self.tried[name] = []
        for loading in LOADING:
            for flash in FLASH:
                if "failed" in self.one(name, {"loading": loading, "flash": flash}):
                    # Flash attention does not change what loading takes.
                    break
        flags = self.fastest(name)
        if flags is None or not self.windows or not window_may_change(self.llama.path):
            return flags, None
        for window in self.windows:
            self.one(name, flags | {"window_kib": window})
        return flags, self.fastest(name)

    def fastest(self, name):
        worked = [row for row in self.tried[name] if "failed" not in row]
        if not worked:
            return None
        key = (lambda row: -row["seconds"]) if parse(name).is_time else (lambda row: row["ts"])
        found = max(worked, key=key)
        return {key: found[key] for key in ("loading", "flash", "window_kib") if key in found}


def window_may_change(path):
    """Whether this process may set the window of reading ahead of a file's disk."""
    window = window_file(path)
    return window is not None and os.access(window, os.W_OK)


def shown(found):
    """A result in a few words."""
    if "failed" in found:
        return found["failed"]
    if "seconds" in found:
        return f"{found['seconds']:.2f} s"
    return f"{found['ts']:.2f} tok/s"


def median_of(samples, key):
    """The median of a fact over the samples that have it; None without any."""
    values = [sample[key] for sample in samples if sample.get(key) is not None]
    return statistics.median(values) if values else None


def default_cadre():
    return ROOT / "target" / "release" / "cadre"
