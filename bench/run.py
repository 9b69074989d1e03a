#!/usr/bin/env python3
"""Speed of Cadre next to llama.cpp on MoE models with random weights: prompts, decoding, decoding 8 sequences together.

    cargo build --release
    python3 bench/run.py --shape qwen3moe --type q8_0,q4_k_m              # makes the files that are missing
    python3 bench/run.py --shape olmoe --type q8_0 --rounds 3 --no-record
    python3 bench/run.py --table                                          # the latest records, measuring nothing

Per shape and type: the file is made (bench/models/make.py) and llama.cpp is loaded. Its settings are tried on a small grid:
weights repacked or not, the file mapped or read, flash attention automatic or off, and, for several sequences, one cache
or one each; the fastest for each test counts as its best. Then come rounds. Each round measures every side once, in an
order that turns by one: Cadre in a process of its own (`cadre bench -r 1`, which warms up first), llama.cpp with its
default settings, llama.cpp with its best. The llama.cpp processes keep their models loaded (bench/peers/llama_bench.py).
All sides are pinned to the same --threads CPUs, and nothing else should run.

One line per shape and type is appended to bench/record/moe.jsonl; bench/table.py turns records into docs/performance.md.
Needs Python 3.9 or newer; llama.cpp is compiled on first use (bench/peers/llama.sh).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from common import ROOT, append_record, fail, machine, now, pin, read_records, revision, say, spread, warn_if_busy
from tests_spec import parse

RECORD = "moe"
SHAPES, TYPES = ("qwen3moe", "olmoe"), ("q8_0", "q4_k_m", "q4_0", "mxfp4", "bf16")
DEFAULT_TESTS = "pp256,pp512,tg64,tg64x8"
SIDES = ("cadre", "llama", "llama-best")
LOADING = {
    "default": [],
    "not repacked": ["--no-repack"],
    "not mapped": ["--load", "none"],
}
DEFAULT = {"loading": "default", "flash": "auto", "unified": False}
# Tuning decodes fewer steps of several sequences: every step costs the same.
TUNING_STEPS = 16


class Llama:
    """A llama.cpp process that keeps its model loaded."""

    def __init__(self, python, path, threads, loading):
        command = [python, str(ROOT / "bench" / "peers" / "llama_bench.py"), str(path), "--threads", str(threads), "--serve"]
        self.process = subprocess.Popen(
            command + LOADING[loading], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.peak_rss_bytes = self.read()["peak_rss_bytes"]

    def read(self):
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": f"it ended with code {self.process.wait()}"}
        if "error" in found:
            fail(f"llama.cpp: {found['error']}")
        return found

    def measure(self, test, settings):
        """Tokens per second of one test."""
        command = {"test": test, "flash": settings["flash"], "unified": settings["unified"]}
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        found = self.read()
        self.peak_rss_bytes = found["peak_rss_bytes"]
        return found["ts"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def run_cadre(args, path, tests):
    """One process of Cadre; the record of each test."""
    wanted = {name: parse(name) for name in tests}
    found = {}
    for depth in sorted({test.n_depth for test in wanted.values()}):
        here = [test for test in wanted.values() if test.n_depth == depth]

        def values(numbers):
            return ",".join(map(str, sorted({n for n in numbers if n})) or ["0"])

        command = [str(args.cadre), "bench", "-m", str(path), "-r", "1", "-t", str(args.threads), "-o", "json"]
        command += ["-p", values(test.n_prompt for test in here), "-n", values(test.n_gen for test in here)]
        command += ["-d", str(depth)]
        seqs = values(test.n_seqs for test in here if test.n_gen)
        if seqs not in ("0", "1"):
            command += ["--seqs", seqs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            fail(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-2000:]}")
        for record in json.loads(done.stdout):
            key = tuple(record.get(name, 1) for name in ("n_prompt", "n_gen", "n_seqs", "n_depth"))
            found[key] = record
    try:
        return {name: found[(t.n_prompt, t.n_gen, t.n_seqs, t.n_depth)] for name, t in wanted.items()}
    except KeyError as error:
        fail(f"cadre bench measured no test of {error}")


def grid(test, loading):
    """Settings to try for one way of loading."""
    unified = (False, True) if parse(test).n_seqs > 1 else (False,)
    return [{"loading": loading, "flash": flash, "unified": one} for flash in ("auto", "off") for one in unified]


def tune(args, python, path, tests):
    """The fastest settings of llama.cpp for each test, and all that was measured."""
    tried = {name: [] for name in tests}
    for loading in LOADING:
        llama = Llama(python, path, args.threads, loading)
        for name in tests:
            test = parse(name)
            short = f"tg{min(test.n_gen, TUNING_STEPS)}x{test.n_seqs}@d{test.n_depth}" if test.n_seqs > 1 else name
            for settings in grid(name, loading):
                rates = [llama.measure(short, settings) for _ in range(args.tuning_rounds)]
                tried[name].append(settings | {"ts": round(max(rates), 2)})
        llama.close()
    best = {}
    for name, rows in tried.items():
        row = max(rows, key=lambda row: row["ts"])
        best[name] = {key: row[key] for key in DEFAULT}
        say(f"  llama.cpp, {name}: best is {row}")
    return best, tried


def rounds(args, python, path, tests, best):
    """All rounds, alternating. Per side and test a list of samples; Cadre's are whole records."""
    needed = {"default"} | {settings["loading"] for settings in best.values()}
    workers = {loading: Llama(python, path, args.threads, loading) for loading in sorted(needed)}

    def one(side, keep=True):
        if side == "cadre":
            result = run_cadre(args, path, tests)
            rates = {name: record["samples_ts"][0] for name, record in result.items()}
        else:
            settings = {name: best[name] if side == "llama-best" else DEFAULT for name in tests}
            result = rates = {name: workers[settings[name]["loading"]].measure(name, settings[name]) for name in tests}
        if keep:
            say(f"  {side:10} " + "  ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
        return result

    found = {side: {name: [] for name in tests} for side in args.sides}
    for side in args.sides:
        one(side, keep=False)
    for index in range(args.rounds):
        turn = index % len(args.sides)
        say(f"  round {index + 1} of {args.rounds}")
        for side in args.sides[turn:] + args.sides[:turn]:
            for name, value in one(side).items():
                found[side][name].append(value)
    memory = {"llama": max(worker.peak_rss_bytes for worker in workers.values())}
    for worker in workers.values():
        worker.close()
    return found, memory


def summarise(tests, found):
    """Per test: every side's median and extremes, what Cadre says of its bound, and the ratios."""
    table = {}
    for name in tests:
        row = {}
        for side, samples in found.items():
            rates = [sample["samples_ts"][0] for sample in samples[name]] if side == "cadre" else samples[name]
            row[side] = spread(rates) | {"samples": [round(rate, 2) for rate in rates]}
        if "cadre" in found:
            row["cadre"] |= own_figures(found["cadre"][name])
            for side in found:
                if side != "cadre":
                    row[side]["ratio"] = round(row["cadre"]["median"] / row[side]["median"], 3)
                    pairs = zip(row["cadre"]["samples"], row[side]["samples"])
                    row[side]["ratio_by_round"] = [round(a / b, 3) for a, b in pairs]
        table[name] = row
    return table


def own_figures(records):
    """What `cadre bench` measured beside the speed: medians over the rounds."""
    figures = {}
    for key in ("bandwidth_bytes_per_s", "bytes_per_token", "bound_ts", "bound_share", "gflops", "peak_share", "peak_rss_bytes"):
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            figures[key] = float(f"{statistics.median(values):.5g}")
    return figures


def make(python, shape, kind):
    """The path of the file, which is made if it is missing."""
    command = [python, str(ROOT / "bench" / "models" / "make.py"), "--shape", shape, "--type", kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        fail(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return Path(done.stdout.split()[-1])


def compare(args, python, host, shape, kind):
    """One shape and type; the record."""
    path = make(python, shape, kind)
    say(f"{path.name}")
    best, tried = ({}, {})
    if "llama-best" in args.sides:
        best, tried = tune(args, python, path, args.tests)
    found, memory = rounds(args, python, path, args.tests, best)
    return {
        "bench": RECORD,
        "date": now(),
        "commit": revision(),
        "machine": host,
        "versions": peer_versions(python),
        "shape": shape,
        "type": kind,
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "rounds": args.rounds,
        "tests": summarise(args.tests, found),
        "llama_best": best,
        "llama_tried": tried,
        "peak_rss_bytes": memory,
    }


def peer_versions(python):
    script = "import json, llama_cpp; print(json.dumps({'llama-cpp-python': llama_cpp.__version__}))"
    return json.loads(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout)


def latest():
    """The newest record of every shape and type, in the order of SHAPES and TYPES."""
    newest = {(record["shape"], record["type"]): record for record in read_records(RECORD)}
    return [newest[(shape, kind)] for shape in SHAPES for kind in TYPES if (shape, kind) in newest]


def arguments():
    parser = argparse.ArgumentParser(description="Speed of Cadre next to llama.cpp on MoE models.")
    parser.add_argument("--shape", default=",".join(SHAPES), help=f"comma separated, of {', '.join(SHAPES)}")
    parser.add_argument("--type", default=",".join(TYPES), help=f"comma separated, of {', '.join(TYPES)}")
    parser.add_argument("--tests", default=DEFAULT_TESTS, help="comma separated, such as pp512, tg64, tg64x8, tg64@d512")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"comma separated, of {', '.join(SIDES)}")
    parser.add_argument("--cadre", type=Path, default=ROOT / "target" / "release" / "cadre")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tuning-rounds", type=int, default=2, help="measurements of each of llama.cpp's settings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="print, but append nothing to bench/record/")
    parser.add_argument("--table", action="store_true", help="print the tables of the latest records and stop")
    args = parser.parse_args()
    for name, known in (("shape", SHAPES), ("type", TYPES), ("sides", SIDES)):
        values = getattr(args, name).split(",")
        if unknown := [value for value in values if value not in known]:
            parser.error(f"--{name}: unknown {unknown[0]!r}; known: {', '.join(known)}")
        setattr(args, name, values)
    args.tests = args.tests.split(",")
    try:
        for name in args.tests:
            parse(name)
    except ValueError as error:
        parser.error(str(error))
    if args.rounds < 1 or args.tuning_rounds < 1:
        parser.error("--rounds and --tuning-rounds must be at least 1")
    if not args.table and "cadre" in args.sides and not args.cadre.is_file():
        parser.error(f"{args.cadre} does not exist; build it with `cargo build --release`, or leave cadre out of --sides")
    return args


def main():
    args = arguments()
    if args.table:
        from table import moe

        print(moe(latest()))
        return
    script = ROOT / "bench" / "peers" / "llama.sh"
    python = subprocess.run(["bash", str(script)], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    host = machine(args.threads, pin(args.threads))
    warn_if_busy(host)
    for shape in args.shape:
        for kind in args.type:
            record = compare(args, python, host, shape, kind)
            if not args.no_record:
                append_record(RECORD, record)
            from table import moe

            print(moe([record]), flush=True)


if __name__ == "__main__":
    main()
