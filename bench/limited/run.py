#!/usr/bin/env python3
"""Cadre and llama.cpp with less memory than the model's file: decoding, prompts, and the first token from a cold start.

    cargo build --release
    python3 bench/limited/run.py                                   # 60 % and 25 % of the file, random weights
    python3 bench/limited/run.py --routing skewed --share 0.6      # routing as of a trained model
    python3 bench/limited/run.py --what sweep --routing skewed     # tokens per second from 10 % to 100 %
    python3 bench/limited/run.py --what overhead                   # streaming with room for everything, against resident
    python3 bench/limited/run.py --table                           # the latest records, measuring nothing

Each measurement is a process of its own in its own memory control group (group.py), limited to a share of the file, pages of
the file among what counts; nothing of the file is cached when it starts. What is measured: cases.py. The sides alternate, and
the order turns by one each round.

llama.cpp is tried in each way of loading and with and without flash attention; the fastest for each test counts as its best (side
llama-best), and what was killed is recorded. How much the system reads around each missing page of a mapped file decides much of
its speed, so the best flags are tried with other windows of reading ahead too (side llama-window: the fastest of all); that setting
belongs to the disk and needs root, is set only while llama.cpp is measured and put back. Cadre is given the limit less
a margin as --mem-budget.

Beside each figure stands what physics allows. The disk is measured in every round with random direct reads (disk.py and
`cadre doctor`, whichever finds more). Decoding: the disk's bandwidth by the bytes that a token had to read, and no more
than the speed without a limit. Prompts and first tokens: the time in which the disk gives the whole file once, or that which
the prompt takes without a limit, whichever is longer.

One line is appended to bench/record/limited.jsonl for each share; bench/table.py makes tables of them, and plot.py a
picture of the sweep. Needs Linux, Python 3.9 or newer and a memory control group: run as root, or see --cgroup.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import parse  # noqa: E402
from common import ROOT, append_record, fail, machine, now, pin, read_records, revision, say, spread, warn_if_busy  # noqa: E402
from disk import NoDirectReads, bandwidth, window_kib  # noqa: E402
from group import Group, NoGroups  # noqa: E402
from sides import FLASH, GROUP, MARGIN_BYTES, STREAMED, Cadre, Llama, Tuning, default_cadre, median_of, shown  # noqa: E402

RECORD = "limited"
PEERS = ("llama-best", "llama-window")
SIDES = ("cadre", *PEERS)
# KiB; 128 is what Linux has where nobody changed it.
WINDOWS = "64,128,1024"
WHAT = ("compare", "sweep", "overhead")
ROUTINGS = ("random", "skewed")
TESTS = "tg64,pp512,first32,first512"
SHARES = "0.6,0.25"
SWEEP = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0"
# Ways of loading that have a chance somewhere in a sweep.
SWEPT = ("default", "mapped, not repacked")
EVERYTHING = 2.0
# Of a process that has everything in memory; the first fills the cache.
REPETITIONS = 8


def disk_bandwidth(args):
    """Bytes per second of direct reads: the better of disk.py's and `cadre doctor`'s, so that the bound is none that can be beaten."""
    found = [bandwidth(args.path)]
    command = [str(args.cadre), "doctor", "-m", str(args.path), "-o", "json"]
    if args.cadre.is_file():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        disk = json.loads(done.stdout).get("disk") if done.returncode == 0 else None
        if disk and disk.get("direct"):
            found.append(disk["bytes_per_second"])
    return max(found)


def unlimited(cadre, tests, rounds):
    """Tokens per second of Cadre with everything in memory, per test; that of the prompt for first tokens."""
    found = {}
    for name in tests:
        test = parse(name)
        plain = f"pp{test.count}" if test.kind == "first" else name
        if plain not in found:
            samples = [cadre.measure(plain, None, 600) for _ in range(rounds)]
            if bad := [sample for sample in samples if "failed" in sample]:
                fail(f"Cadre without a limit, {plain}: {bad[0]['failed']}")
            found[plain] = statistics.median(sample["ts"] for sample in samples)
            say(f"    without a limit: {plain} {found[plain]:.1f} tok/s")
        found[name] = found[plain]
    return {name: round(found[name], 3) for name in tests}


def measure_all(args, cadre, llama, limit, best):
    """All rounds: per side and test a list of results, and the disk's bandwidth of each round."""
    disk, found = [], {side: {name: [] for name in args.tests} for side in args.sides}
    for index in range(args.rounds):
        disk.append(disk_bandwidth(args))
        say(f"  round {index + 1} of {args.rounds}; disk {disk[-1] / 1e6:.0f} MB/s")
        turn = index % len(args.sides)
        for side in args.sides[turn:] + args.sides[:turn]:
            for name in args.tests:
                if side == "cadre":
                    result = cadre.measure(name, limit, args.most_seconds)
                elif best[side][name] is None:
                    result = {"failed": "no setting worked"}
                else:
                    result = llama.measure(name, limit, args.most_seconds, best[side][name])
                found[side][name].append(result)
                say(f"    {side:12} {name:9} {shown(result)}")
    return found, disk


def row_of(name, samples):
    """One side of one test: median and extremes of what counts, and the medians of the facts beside it."""
    good = [sample for sample in samples if "failed" not in sample]
    row = {"failed": sample["failed"] for sample in samples if "failed" in sample}
    if len(good) < len(samples):
        row["n_failed"] = len(samples) - len(good)
    if not good:
        return row
    key = "seconds" if parse(name).is_time else "ts"
    values = [sample[key] for sample in good]
    row |= {"unit": key} | spread(values, 3) | {"samples": [round(value, 3) for value in values]}
    facts = [*STREAMED, "read_bytes", "major_faults", "user_s", "system_s", "peak_group_bytes", "tokens"]
    for fact in dict.fromkeys(facts):
        value = median_of(good, fact)
        if value is not None:
            row[fact] = float(f"{value:.5g}")
    return row


def bounds(name, cadre, disk, compute_ts, file_bytes):
    """What physics allows Cadre in a test, and the share it reached, round by round."""
    test = parse(name)
    # `cadre bench` measures the disk too, around each repetition.
    samples = [(sample, max(rate, sample.get("disk_bytes_per_s", 0))) for sample, rate in zip(cadre, disk) if "failed" not in sample]
    if not samples:
        return {}
    if test.kind == "tg":
        # A token that reads next to nothing is bound by what it costs with everything in memory.
        known = [(sample["ts"], rate / max(sample["bytes_read_per_token"], 1)) for sample, rate in samples if "bytes_read_per_token" in sample]
        if not known:
            return {}
        allowed = [min(by_disk, compute_ts) for _, by_disk in known]
        shares = [reached / bound for (reached, _), bound in zip(known, allowed)]
        by_disk = statistics.median(by_disk for _, by_disk in known)
        return {"disk_bound_ts": round(by_disk, 3), "bound_ts": round(statistics.median(allowed), 3)} | share_facts(shares)
    times = [max(test.count / compute_ts, file_bytes / rate) for _, rate in samples]
    took = [sample["seconds"] if test.is_time else test.count / sample["ts"] for sample, _ in samples]
    shares = [allowed / reached for allowed, reached in zip(times, took)]
    return {"bound_s": round(statistics.median(times), 4)} | share_facts(shares)


def share_facts(shares):
    return {"bound_share": round(statistics.median(shares), 4), "bound_share_by_round": [round(share, 4) for share in shares]}


def ratios(name, ours, theirs):
    """How many times faster Cadre is than a side: of the medians, and of each round in which both have a result."""
    def times(a, b):
        return b / a if parse(name).is_time else a / b

    key = "seconds" if parse(name).is_time else "ts"
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs) if key in a and key in b]
    if not pairs:
        return {}
    medians = [statistics.median(values) for values in zip(*pairs)]
    return {"ratio": round(times(*medians), 3), "ratio_by_round": [round(times(a, b), 3) for a, b in pairs]}


def compare(args, cadre, llama, share):
    """One share of the file; what the record says of it."""
    file_bytes = args.path.stat().st_size
    limit = int(share * file_bytes)
    say(f"{args.path.name}: limited to {share:.0%} of the file, {limit / 1e9:.2f} GB")
    compute = unlimited(cadre, args.tests, args.tuning_rounds) if "cadre" in args.sides else {}
    tuning = Tuning(llama, limit, args.most_seconds, args.part_seconds / 2, args.window_kib if "llama-window" in args.sides else [])
    best = {side: {} for side in PEERS}
    if set(PEERS) & set(args.sides):
        for name in args.tests:
            best["llama-best"][name], best["llama-window"][name] = tuning.best(name)
    found, disk = measure_all(args, cadre, llama, limit, best)
    tests = {}
    for name in args.tests:
        row = {side: row_of(name, found[side][name]) for side in args.sides}
        if "cadre" in row and "samples" in row["cadre"]:
            row["cadre"] |= bounds(name, found["cadre"][name], disk, compute[name], file_bytes)
            for side in row:
                if side != "cadre":
                    row[side] |= ratios(name, found["cadre"][name], found[side][name])
        tests[name] = row
    return {
        "share": share, "limit_bytes": limit, "mem_budget_bytes": cadre.budget(limit),
        "disk_bytes_per_s": spread(disk, 0) | {"samples": [round(rate) for rate in disk]},
        "unlimited_ts": compute, "rounds": args.rounds, "tests": tests, "llama_best": best, "llama_tried": tuning.tried,
    }  # fmt: skip


def sweep(args, cadre, llama):
    """Tokens per second of decoding at many shares, both sides; a point that fails says why."""
    name = next(name for name in args.tests if parse(name).kind == "tg")
    file_bytes = args.path.stat().st_size
    points, disk = [], []
    for index, share in enumerate(args.share):
        limit = int(share * file_bytes)
        disk.append(disk_bandwidth(args))
        say(f"  {share:.0%}, {limit / 1e9:.2f} GB; disk {disk[-1] / 1e6:.0f} MB/s")
        point = {"share": share, "limit_bytes": limit, "disk_bytes_per_s": round(disk[-1])}

        def ours():
            samples = [cadre.measure(name, limit, args.most_seconds) for _ in range(args.rounds)]
            say(f"    cadre: {[shown(sample) for sample in samples]}")
            return {"cadre": row_of(name, samples)}

        def theirs():
            return swept_llama(args, llama, name, limit)

        parts = ([ours] if "cadre" in args.sides else []) + ([theirs] if set(PEERS) & set(args.sides) else [])
        for part in parts if index % 2 == 0 else parts[::-1]:
            point |= part()
        points.append(point)
    whole = unlimited(cadre, [name], args.rounds) if "cadre" in args.sides else {}
    return {
        "test": name, "points": points, "rounds": args.rounds, "unlimited_ts": whole,
        "disk_bytes_per_s": spread(disk, 0) | {"samples": [round(rate) for rate in disk]},
    }  # fmt: skip


def swept_llama(args, llama, name, limit):
    """llama.cpp at one limit: the faster way of loading as the machine is, and the fastest with other windows of reading ahead too."""
    rows, failed = [], {}
    for loading in SWEPT:
        for window in [None, *(args.window_kib if "llama-window" in args.sides else [])]:
            if loading in failed:
                continue
            settings = {"loading": loading, "flash": FLASH[0], "window_kib": window}
            samples = [llama.measure(name, limit, args.most_seconds, settings, args.part_seconds / 2) for _ in range(args.rounds)]
            say(f"    llama.cpp, {loading}, window {window}: {[shown(sample) for sample in samples]}")
            rows.append(row_of(name, samples) | {"loading": loading, "window_kib": window})
            if "failed" in rows[-1]:
                failed[loading] = rows[-1]["failed"]

    def fastest(among):
        return max(among, key=lambda row: row.get("median", 0)) | {"failed_loading": failed}

    found = {"llama-best": fastest([row for row in rows if row["window_kib"] is None])}
    return found | ({"llama-window": fastest(rows)} if "llama-window" in args.sides else {})


def overhead(args, cadre):
    """Streaming with a budget that holds everything, against no budget, in turns and without a limit."""
    budget = int(EVERYTHING * args.path.stat().st_size)
    names = [name for name in args.tests if parse(name).kind != "first"]
    found = {side: {name: [] for name in names} for side in ("resident", "streamed")}
    for index in range(args.rounds):
        say(f"  round {index + 1} of {args.rounds}")
        for side in sorted(found, reverse=index % 2 == 1):
            for name in names:
                result = cadre.measure(name, None, args.most_seconds, budget if side == "streamed" else None, REPETITIONS)
                found[side][name].append(result)
                say(f"    {side:12} {name:9} {shown(result)}")
    tests = {}
    for name in names:
        row = {side: row_of(name, found[side][name]) for side in found}
        tests[name] = row | ratios(name, found["streamed"][name], found["resident"][name])
    return {"mem_budget_bytes": budget, "rounds": args.rounds, "repetitions": REPETITIONS, "tests": tests}


def file_of(python, args):
    """The path of the model's file, which is made if it is missing."""
    if args.model:
        return args.model
    command = [python, str(ROOT / "bench" / "models" / "make.py"), "--shape", args.shape, "--type", args.type]
    command += ["--routing", args.routing]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        fail(f"{' '.join(command)} exited with {done.returncode}")
    return Path(done.stdout.split()[-1])


def about(args, host, what):
    """What every record says."""
    return {
        "bench": RECORD, "what": what, "date": now(), "commit": revision(), "machine": host, "versions": args.versions,
        "shape": args.shape, "type": args.type, "routing": args.routing, "file": args.path.name,
        "file_bytes": args.path.stat().st_size, "cgroup": args.cgroup_version, "window_kib": window_kib(args.path), "cadre_args": args.cadre_arg,
    }  # fmt: skip


def peer_versions(python):
    script = "import json, llama_cpp; print(json.dumps({'llama-cpp-python': llama_cpp.__version__}))"
    return json.loads(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout)


def arguments():
    parser = argparse.ArgumentParser(description="Cadre and llama.cpp with less memory than the model's file.")
    parser.add_argument("--what", choices=WHAT, default=WHAT[0])
    parser.add_argument("--shape", default="qwen3moe", help="as in bench/models/make.py")
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--routing", choices=ROUTINGS, default=ROUTINGS[0])
    parser.add_argument("--model", type=Path, help="another GGUF file")
    parser.add_argument("--share", help=f"limits as shares of the file, comma separated; {SHARES}, or {SWEEP} for a sweep")
    parser.add_argument("--tests", default=TESTS, help="comma separated, such as tg64, pp512, first32")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"comma separated, of {', '.join(SIDES)}")
    parser.add_argument("--window-kib", default=WINDOWS, help="windows of reading ahead to try for llama-window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tuning-rounds", type=int, default=1, help="repetitions without a limit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cadre", type=Path, default=default_cadre())
    parser.add_argument("--cadre-arg", action="append", default=[], help="one more argument for a limited Cadre")
    parser.add_argument("--margin-mib", type=float, default=MARGIN_BYTES / 2**20, help="how much below the limit --mem-budget is")
    parser.add_argument("--most-seconds", type=float, default=600.0, help="end of a process")
    parser.add_argument("--part-seconds", type=float, default=60.0, help="end of a decoding part of llama.cpp")
    parser.add_argument("--cgroup", type=Path, help="folder of the memory controller to make groups in")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the latest records and stop")
    args = parser.parse_args()
    args.tests, args.sides = args.tests.split(","), args.sides.split(",")
    args.share = [float(share) for share in (args.share or (SWEEP if args.what == "sweep" else SHARES)).split(",")]
    try:
        for name in args.tests:
            parse(name)
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(args.sides) - set(SIDES):
        parser.error(f"unknown side {sorted(unknown)[0]!r}; known: {', '.join(SIDES)}")
    args.window_kib = [int(kib) for kib in args.window_kib.split(",")]
    return args


def records_of(args, host, cadre, llama):
    """Measures; one record after the other."""
    if args.what == "sweep":
        yield about(args, host, "sweep") | sweep(args, cadre, llama)
    elif args.what == "overhead":
        yield about(args, host, "overhead") | overhead(args, cadre)
    else:
        for share in args.share:
            yield about(args, host, "compare") | compare(args, cadre, llama, share)


def main():
    args = arguments()
    if args.table:
        from table import limited

        print(limited(read_records(RECORD)))
        return
    script = ROOT / "bench" / "peers" / "llama.sh"
    python = subprocess.run(["bash", str(script)], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    host = machine(args.threads, pin(args.threads))
    warn_if_busy(host)
    try:
        with Group(GROUP, 1 << 30, args.cgroup) as tried:
            args.cgroup_version = tried.version
        args.path = file_of(python, args)
        bandwidth(args.path, 0.2)
    except (NoGroups, NoDirectReads) as error:
        fail(str(error))
    args.versions = peer_versions(python)
    cadre = Cadre(args.cadre, args.path, args.threads, args.cgroup, int(args.margin_mib * 2**20), args.cadre_arg)
    llama = Llama(python, args.path, args.threads, args.cgroup, args.part_seconds)
    for record in records_of(args, host, cadre, llama):
        if not args.no_record:
            append_record(RECORD, record)
        from table import limited

        print(limited([record]), flush=True)


if __name__ == "__main__":
    main()
