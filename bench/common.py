"""What every benchmark here shares: the machine, the commit, pinning, the spread of samples, and records.

Needs Python 3.9 or newer, nothing else; Linux.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench" / "record"
BUSY = 0.5


def fail(message):
    """Ends the program, with a message that names it."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def say(message):
    """A line of progress on standard error."""
    print(message, file=sys.stderr, flush=True)


def run(program, *args):
    """What a program prints; its message ends this one when it fails."""
    command = [str(program), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def head(source, target, n_chars):
    """Copies the first documents of a file, up to so many characters."""
    taken = 0
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for line in lines:
            if taken >= n_chars:
                break
            taken += len(line)
            out.write(line)


def pin(threads):
    """Pins this process and what it starts to the first `threads` CPUs that it may use; returns them."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    if len(cpus) < threads:
        fail(f"{threads} threads are asked for, but only {len(cpus)} CPUs may be used")
    os.sched_setaffinity(0, cpus)
    return cpus


def machine(threads, cpus):
    """What the numbers depend on; no host name."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": threads,
        "pinned_to": cpus,
        "isa": [flag for flag in wanted if flag in flags],
        "memory_gib": round(memory / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
    }


def warn_if_busy(host):
    """Says that timings of a busy machine are not worth keeping."""
    if host["load_before"] > BUSY:
        say(f"{Path(sys.argv[0]).name}: the machine is busy (load {host['load_before']}): these timings are not worth keeping")


def revision():
    """The commit that was measured, with a mark when the tree differs from it."""

    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if git("status", "--porcelain", "-uno") else "")


def versions(*names):
    """Versions of installed Python packages."""
    from importlib.metadata import version

    return {name: version(name) for name in names}


def now():
    """The moment, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def spread(samples, digits=2):
    """Median and extremes."""
    return {
        "median": round(statistics.median(samples), digits),
        "min": round(min(samples), digits),
        "max": round(max(samples), digits),
    }


def record_path(name):
    """Where the records of a benchmark are."""
    return RECORDS / f"{name}.jsonl"


def append_record(name, record):
    """Adds one line to a benchmark's records."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    with record_path(name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records(name):
    """All records of a benchmark, oldest first."""
    path = record_path(name)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def latest_record(name):
    """The newest record of a benchmark, or the end of the program."""
    records = read_records(name)
    if not records:
        fail(f"{record_path(name).relative_to(ROOT)} does not exist yet; run without --table first")
    return records[-1]
