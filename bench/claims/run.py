#!/usr/bin/env python3
"""Trains what the claims of the papers need, records it, and writes docs/claims.md.

    cargo build --release
    recipes/data/synthetic                          # the text, once
    python3 bench/claims/run.py --plan              # what would be trained, and for how long
    python3 bench/claims/run.py                     # every claim, 3 seeds; run it again after a stop and it goes on
    python3 bench/claims/run.py deepseek adamoe     # some claims
    python3 bench/claims/run.py --steps 100         # shorter runs, which are records of their own
    python3 bench/claims/run.py --data nano         # the real text of recipes/data/nano
    python3 bench/claims/run.py --table             # docs/claims.md from the records, training nothing

The claims, their arms and their checks: claims.py. An arm is a recipe of recipes/claims and what is set over it. All arms of a seed
start from the same initial values, as far as they have the same parameters, and see the same tokens in the same order, because both are
functions of the seed. A run that is done is one line of bench/record/claims.jsonl, found again by recipe, settings, data,
seed and steps; claims share runs. The verdicts come from stats.py, the numbers from values.py and probes.py.

Needs Python 3.9 or newer. The probe `difficulty` also needs pyarrow, and its checks stay undecided without it.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import probes  # noqa: E402
import values  # noqa: E402
from claims import ARMS, CLAIMS, arms_of, claim_named, recipe_of, steps_of, waits_for  # noqa: E402
from common import ROOT, append_record, fail, machine, now, pin, read_records, revision, say  # noqa: E402

RECORD = "claims"
RUNS = ROOT / "runs" / "claims"
DATA = ROOT / ".cache" / "data"
NANO_DOMAINS = ("prose", "code", "math", "dialogue", "german")
CLAIM_MINUTES, TABLE_HOURS = 45, 12
# Steps that tell the speed of an arm nobody has trained yet.
SPEED_STEPS = 4
# What evaluations on held-out text and probes add to the time of the steps.
WITH_EVALUATION = 1.15


def sha256(data):
    return hashlib.sha256(data).hexdigest()[:16]


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
        # A recipe that was changed gets another folder, because snapshots of the old one are refused there.
        digest = sha256(self.recipe.read_bytes() + json.dumps(arm.set).encode())[:8]
        self.folder = RUNS / args.data / arm.name / f"{seed}-{self.steps}-{digest}"

    @property
    def key(self):
        """What a record must have to be this run's."""
        return {
            "arm": self.arm.name, "set": list(self.arm.set), "recipe_sha256": sha256(self.recipe.read_bytes()),
            "data": self.args.data, "data_sha256": self.args.data_sha256, "seed": self.seed, "steps": self.steps,
        }  # fmt: skip

    def record(self):
        """The newest record of this run, or None."""
        found = [record for record in self.args.records if all(record.get(name) == value for name, value in self.key.items())]
        return found[-1] if found else None

    def command(self, *more):
        """The training as a command line."""
        given = [*sources(self.args.data), *self.arm.set, f"seed={self.seed}", f"output.dir={self.folder.relative_to(ROOT)}"]
        if self.args.steps:
            given.append(f"train.steps={self.args.steps}")
        for key, arm in self.arm.needs:
            given.append(f"{key}={(Job(ARMS[arm], self.seed, self.args).folder / 'model').relative_to(ROOT)}")
        words = [str(self.args.cadre), "train", str(self.recipe.relative_to(ROOT)), "--threads", str(self.args.threads), "-o", "json", *more]
        return words + [word for change in given for word in ("--set", change)]

    def train(self):
        """Trains unless that is recorded; what was needed of the model is measured at once."""
        for _, arm in self.arm.needs:
            teacher = Job(ARMS[arm], self.seed, self.args)
            if not (teacher.folder / "model" / "config.json").is_file():
                teacher.again()
        return self.record() or self.again()

    def again(self):
        """Trains and appends a record."""
        say(f"{self.arm.name}, seed {self.seed}, {self.steps} steps")
        start = time.monotonic()
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
            "bench": RECORD, "date": now(), "commit": revision(), "machine": self.args.host, "seconds": round(seconds, 1),
            "step_seconds": round(statistics.median(line["seconds"] for line in steps), 5),
            "values": {name: round(value, 6) for name, value in found.items()}, "missing": missing, "curve": values.curve(evaluations),
        }  # fmt: skip
        if not self.args.no_record:
            append_record(RECORD, record)
        self.args.records.append(record)
        for part in ("snapshots", "tokens"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        return record


def predicted(job, speeds):
    """Seconds of a run: those of its records, or measured on a few steps; None where that is not possible."""
    alike = [r for r in job.args.records if r["arm"] == job.arm.name and r["data"] == job.args.data and r["machine"]["threads"] == job.args.threads]
    if alike:
        return statistics.median(record["step_seconds"] for record in alike) * WITH_EVALUATION * job.steps
    if job.arm.name not in speeds:
        words = job.command("--bench", "--steps", str(SPEED_STEPS))
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        speeds[job.arm.name] = None
        if done.returncode == 0:
            measured = json.loads(done.stdout)
            speeds[job.arm.name] = WITH_EVALUATION * tokens_per_step(job) / measured["tokens_per_second"]
    return None if speeds[job.arm.name] is None else speeds[job.arm.name] * job.steps


def tokens_per_step(job):
    """Tokens of an optimizer step, from the recipe and what is set over it."""
    found = {"batch_size": 1, "seq_len": 1, "accumulate": 1}
    for line in job.recipe.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition("=")
        if key.strip() in found:
            found[key.strip()] = int(value)
    for change in job.arm.set:
        key, value = change.split("=", 1)
        if key.startswith("train.") and key[6:] in found:
            found[key[6:]] = int(value)
    return found["batch_size"] * found["seq_len"] * found["accumulate"]


def plan(args, claims):
    """Prints what each claim trains, and the minutes that it takes."""
    speeds, seen, total, left = {}, {}, 0.0, 0.0
    print(f"{'claim':22} {'arms':>4} {'runs':>4} {'done':>4} {'minutes':>8}")
    for claim in claims:
        if recipes := waits_for(claim):
            print(f"{claim.name:22} waits for {', '.join(recipes)}")
            continue
        jobs = [Job(arm, seed, args) for arm in arms_of(claim) for seed in args.seed_list]
        times = [predicted(job, speeds) for job in jobs]
        known = [seconds for seconds in times if seconds is not None]
        minutes = sum(known) / 60 * (len(times) / len(known)) if known else float("nan")
        n_done = sum(job.record() is not None for job in jobs)
        mark = f"  over {CLAIM_MINUTES} minutes" if minutes > CLAIM_MINUTES else ""
        guess = "" if len(known) == len(times) else f"  {len(times) - len(known)} of them guessed from the others"
        print(f"{claim.name:22} {len(jobs) // len(args.seed_list):4} {len(jobs):4} {n_done:4} {minutes:8.1f}{mark}{guess}")
        mean = statistics.fmean(known) if known else 0.0
        for job, seconds in zip(jobs, times):
            if (job.arm.name, job.seed) not in seen:
                seen[job.arm.name, job.seed] = True
                total += seconds or mean
                left += 0.0 if job.record() else seconds or mean
    mark = f", over {TABLE_HOURS} hours" if total > TABLE_HOURS * 3600 else ""
    print(f"{len(seen)} runs, {total / 3600:.1f} hours in all{mark}; {left / 3600:.1f} hours of it not recorded yet")


def default_cadre():
    return ROOT / "target" / "release" / ("cadre.exe" if os.name == "nt" else "cadre")


def arguments():
    parser = argparse.ArgumentParser(description="Trains what the claims of the papers need, and writes docs/claims.md.")
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(claim.name for claim in CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=3, help="3 to decide anything, 5 to let one disagree")
    parser.add_argument("--steps", type=int, help="instead of the recipes' own")
    parser.add_argument("--data", choices=("synthetic", "nano"), default="synthetic")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cadre", type=Path, default=default_cadre())
    parser.add_argument("--plan", action="store_true", help="print runs and predicted minutes, and stop")
    parser.add_argument("--table", action="store_true", help="write docs/claims.md from the records, and stop")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    args.cadre = args.cadre.resolve()
    args.seed_list = list(range(1, args.seeds + 1))
    if args.seeds < 1 or args.threads < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--seeds, --threads and --steps must be at least 1")
    try:
        args.found = [claim_named(name) for name in args.claims] or [claim for claim in CLAIMS if claim.checks]
    except KeyError as error:
        parser.error(f"no claim is called {error.args[0]!r}; known: {', '.join(claim.name for claim in CLAIMS)}")
    return args


def write_table():
    from report import OUT, document

    OUT.write_text(document(read_records(RECORD)), encoding="utf-8")
    say(f"wrote {OUT.relative_to(ROOT)}")


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
    args.data_sha256, args.records = sha256(manifest.read_bytes()), read_records(RECORD)
    args.host = machine(args.threads, pin(args.threads))
    if args.plan:
        plan(args, args.found)
        return
    failed = []
    # Seed by seed, so that what a stop leaves is a whole comparison.
    for claim in args.found:
        if recipes := waits_for(claim):
            say(f"{claim.name}: waits for {', '.join(f'recipes/claims/{name}.toml' for name in recipes)}")
        for seed in args.seed_list:
            for arm in arms_of(claim):
                try:
                    Job(arm, seed, args).train()
                except RuntimeError as error:
                    failed.append(str(error))
                    say(f"  {error}")
    if not args.no_record:
        write_table()
    if failed:
        fail(f"{len(failed)} runs failed; the first: {failed[0]}")


if __name__ == "__main__":
    main()
