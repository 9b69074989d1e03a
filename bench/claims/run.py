#!/usr/bin/env python3
"""Trains what the claims of the papers need, records it, and writes docs/claims.md.

    cargo build --release
    recipes/data/synthetic                          # the text, once
    python3 bench/claims/run.py --plan              # what would be trained, and for how long; on an idle machine
    python3 bench/claims/run.py                     # every claim, 3 seeds; run it again after a stop and it goes on
    python3 bench/claims/run.py deepseek adamoe     # some claims
    python3 bench/claims/run.py --jobs 2            # two runs at a time
    python3 bench/claims/run.py --steps 100         # shorter runs, which are records of their own
    python3 bench/claims/run.py --data nano         # the real text of recipes/data/nano
    python3 bench/claims/run.py --table             # docs/claims.md from the records, training nothing

The claims, their arms and their checks: claims.py. An arm is a recipe of recipes/claims and what is set over it. All arms of a seed
start from the same initial values, as far as they have the same parameters, and see the same tokens in the same order, because both are
functions of the seed. A run that is done is one line of bench/record/claims.jsonl, found again by recipe, settings, data,
seed and steps; claims share runs. The verdicts come from stats.py, the numbers from values.py and probes.py, the times from speed.py:
`--plan` measures a few steps of every arm of which no record says how fast it is, which wants a machine that does nothing else.

Needs Python 3.9 or newer. The probe `difficulty` also needs pyarrow, and its checks stay undecided without it.
"""

import argparse
import collections
import concurrent.futures
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import probes  # noqa: E402
import speed  # noqa: E402
import values  # noqa: E402
from claims import ARMS, CLAIMS, arms_of, claim_named, meaning, recipe_of, sha256, steps_of, waits_for  # noqa: E402
from common import ROOT, append_record, fail, machine, now, pin, read_records, say  # noqa: E402

RECORD = "claims"
RUNS = ROOT / "runs" / "claims"
DATA = ROOT / ".cache" / "data"
NANO_DOMAINS = ("prose", "code", "math", "dialogue", "german")
# One run at a time in a folder: students wait for a teacher that is being trained.
BUSY = collections.defaultdict(threading.Lock)
WRITING = threading.Lock()


def commit():
    """The newest commit that changed what `cadre` is built from, with a mark when the tree differs from it."""

    def git(*words):
        paths = ("--", "crates", "Cargo.toml", "Cargo.lock")
        return subprocess.run(["git", "-C", str(ROOT), *words, *paths], capture_output=True, text=True, check=False).stdout.strip()

    return (git("log", "-1", "--format=%h", "--abbrev=12") or "unknown") + ("-dirty" if git("status", "--porcelain", "-uno") else "")


def sources(data):
    """`--set` of a recipe's text, for the real one."""
    entries = [
        f'{{domain="{domain}",train=".cache/data/nano/{domain}.train.jsonl",heldout=".cache/data/nano/{domain}.heldout.jsonl"}}'
        for domain in NANO_DOMAINS
    ]
    return [f"data.sources=[{','.join(entries)}]"] if data == "nano" else []


class Job:
    """One arm with one seed."""

    def __init__(self, arm, seed, args):
        self.arm, self.seed, self.args = arm, seed, args
        self.recipe = recipe_of(arm)
        self.steps = args.steps or steps_of(arm)
        # A recipe that was changed gets another folder, because snapshots of the old one are refused there; so does other text.
        digest = sha256((meaning(arm) + args.data_sha256).encode())[:8]
        self.folder = RUNS / args.data / arm.name / f"{seed}-{self.steps}-{digest}"

    @property
    def key(self):
        """What a record must have to be this run's."""
        return {
            "arm": self.arm.name, "set": list(self.arm.set), "recipe_sha256": meaning(self.arm),
            "data": self.args.data, "data_sha256": self.args.data_sha256, "seed": self.seed, "steps": self.steps,
        }  # fmt: skip

    def record(self):
        """The newest record of this run, or None."""
        found = [record for record in self.args.records if all(record.get(name) == value for name, value in self.key.items())]
        return found[-1] if found else None

    def for_arm(self, arm):
        """The run of another arm with the same seed."""
        return Job(arm, self.seed, self.args)

    def command(self, *more):
        """The training as a command line."""
        given = [*sources(self.args.data), *self.arm.set, f"seed={self.seed}", f"output.dir={self.folder.relative_to(ROOT)}"]
        if self.args.steps:
            given.append(f"train.steps={self.args.steps}")
        for key, arm in self.arm.needs:
            given.append(f"{key}={(self.for_arm(ARMS[arm]).folder / 'model').relative_to(ROOT)}")
        words = [str(self.args.cadre), "train", str(self.recipe.relative_to(ROOT)), "--threads", str(self.args.threads), "-o", "json"]
        # Of values that are set twice the last one counts.
        return words + [word for change in given for word in ("--set", change)] + list(more)

    def train(self):
        """Trains unless that is recorded; what was needed of the model is measured at once."""
        for _, arm in self.arm.needs:
            teacher = self.for_arm(ARMS[arm])
            with BUSY[teacher.folder]:
                if not (teacher.folder / "model" / "config.json").is_file():
                    teacher.again()
        with BUSY[self.folder]:
            return self.record() or self.again()

    def again(self):
        """Trains and appends a record."""
        say(f"{self.arm.name}, seed {self.seed}, {self.steps} steps")
        start = time.monotonic()
        with speed.Others() as others:
            done = subprocess.run(self.command(), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        log = self.folder / "log.jsonl"
        steps, evaluations = values.read_log(log) if log.is_file() else ([], [])
        # A model that no engine could run (expert choice) is trained and scored, but not written, which is an error at the very end.
        if done.returncode != 0 and not (evaluations and evaluations[-1]["step"] == self.steps):
            raise RuntimeError(f"{self.arm.name}, seed {self.seed}: cadre train exited with {done.returncode}")
        # A run that was stopped in between: the log has the seconds of every step, the clock only those of its last part.
        seconds = max(time.monotonic() - start, sum(line["seconds"] for line in steps))
        found, missing = values.of_run(steps, evaluations), {}
        for name in self.arm.probes:
            try:
                found |= probes.PROBES[name](self.args.cadre, self.folder / "model", DATA / "synthetic")
            except probes.Unavailable as error:
                missing[name] = str(error)
                say(f"  {name}: {error}")
        record = self.key | {
            "bench": RECORD, "date": now(), "commit": self.args.commit, "machine": self.args.host, "seconds": round(seconds, 1),
            "others": others.share if self.args.jobs == 1 else None,
            "step_seconds": round(statistics.median(line["seconds"] for line in steps), 5),
            "values": {name: round(value, 6) for name, value in found.items()}, "missing": missing, "curve": values.curve(evaluations),
        }  # fmt: skip
        with WRITING:
            if not self.args.no_record:
                append_record(RECORD, record)
            self.args.records.append(record)
        for part in ("snapshots", "tokens"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        return record


def plan(args):
    """Prints what each claim trains, and the minutes that it takes."""
    times = {}

    def seconds(job):
        if job.arm.name not in times:
            times[job.arm.name] = speed.seconds_of(job, args.records, measure=True)
        return times[job.arm.name]

    def jobs(claim):
        return [Job(arm, seed, args) for arm in arms_of(claim) for seed in args.seed_list]

    waiting = {claim.name: recipes for claim in args.found if (recipes := waits_for(claim))}
    for line in speed.plan(jobs, [claim for claim in args.found if claim.name not in waiting], seconds):
        print(line)
    for name, recipes in waiting.items():
        print(f"{name} waits for {', '.join(recipes)}")


def default_cadre():
    return ROOT / "target" / "release" / ("cadre.exe" if os.name == "nt" else "cadre")


def arguments():
    parser = argparse.ArgumentParser(description="Trains what the claims of the papers need, and writes docs/claims.md.")
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(claim.name for claim in CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=3, help="3 to decide anything, 5 to let one disagree")
    parser.add_argument("--steps", type=int, help="instead of the recipes' own")
    parser.add_argument("--data", choices=("synthetic", "nano"), default="synthetic")
    parser.add_argument("--threads", type=int, default=1, help="of a run; models as small as these gain little from more")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--cadre", type=Path, default=default_cadre())
    parser.add_argument("--built-from", metavar="COMMIT", help="what --cadre was built from, where that is not this tree")
    parser.add_argument("--plan", action="store_true", help="print runs and predicted minutes, and stop")
    parser.add_argument("--table", action="store_true", help="write docs/claims.md from the records, and stop")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    args.cadre = args.cadre.resolve()
    args.seed_list = list(range(1, args.seeds + 1))
    if min(args.seeds, args.threads, args.jobs) < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--seeds, --threads, --jobs and --steps must be at least 1")
    try:
        args.found = [claim_named(name) for name in args.claims] or [claim for claim in CLAIMS if claim.checks]
    except KeyError as error:
        parser.error(f"no claim is called {error.args[0]!r}; known: {', '.join(claim.name for claim in CLAIMS)}")
    return args


def write_table():
    from report import OUT, document

    OUT.write_text(document(read_records(RECORD)), encoding="utf-8")
    say(f"wrote {OUT.relative_to(ROOT)}")


def train_all(args):
    """Trains what the claims need, each run once; returns what went wrong. Seed by seed, so that what a stop leaves is a whole comparison."""
    runs, failed = {}, []
    for claim in args.found:
        if recipes := waits_for(claim):
            say(f"{claim.name}: waits for {', '.join(f'recipes/claims/{name}.toml' for name in recipes)}")
        for seed in args.seed_list:
            for arm in arms_of(claim):
                runs.setdefault((arm.name, seed), Job(arm, seed, args))
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(job.train) for job in runs.values()]):
            if isinstance(error := done.exception(), RuntimeError):
                failed.append(str(error))
                say(f"  {error}")
            elif error:
                raise error
    return failed


def main():
    args = arguments()
    if args.table:
        write_table()
        return
    manifest = DATA / args.data / "manifest.json"
    if not manifest.is_file():
        fail(f"{manifest.relative_to(ROOT)} is missing: run recipes/data/{args.data} first")
    if not args.cadre.is_file():
        fail(f"{args.cadre} does not exist: run `cargo build --release` first, or give --cadre")
    args.data_sha256, args.records, args.commit = sha256(manifest.read_bytes()), read_records(RECORD), args.built_from or commit()
    args.host = machine(args.threads, pin(args.threads * args.jobs))
    if args.plan:
        plan(args)
        return
    failed = train_all(args)
    if not args.no_record:
        write_table()
    if failed:
        fail(f"{len(failed)} runs failed; the first: {failed[0]}")


if __name__ == "__main__":
    main()
