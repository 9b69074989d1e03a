"""How long runs take: seconds per step of each arm, measured while nothing else runs and kept among the records, and the plan made of them.

A record of a speed has `kind` "speed", and `others`: the share of the processors that other programs had during the measurement. Above
IDLE it says more about those than about the arm, and is used only where there is nothing better.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from claims import ARMS, meaning
from common import ROOT, append_record, now, say

CLAIM_MINUTES, TABLE_HOURS = 45, 12
IDLE = 0.1
# Steps of a measurement, and those at its start that do not count.
STEPS, WARM_UP = 10, 2
# What evaluations on held-out text, snapshots and probes add to the time of the steps.
WITH_EVALUATION = 1.15


class Others:
    """The share of the processors that programs other than this one and its children have between `with` and its end."""

    def __enter__(self):
        self.start = self.now()
        return self

    def __exit__(self, *_):
        busy, own, wall = (after - before for before, after in zip(self.start, self.now()))
        self.share = max(0.0, round((busy - own) / (wall * os.cpu_count()), 3)) if wall > 0 else 0.0

    @staticmethod
    def now():
        """Busy seconds of all processors, those of this process and its finished children, and the clock's."""
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, first[:8])
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own, time.monotonic()


def known(job, records):
    """Records with seconds per step of a job's arm on as many threads: speeds and runs, those of an idle machine if there are any."""
    wanted = {"arm": job.arm.name, "set": list(job.arm.set), "recipe_sha256": meaning(job.arm)}
    alike = [
        record
        for record in records
        if all(record.get(key) == value for key, value in wanted.items()) and record["machine"]["threads"] == job.args.threads
    ]
    return [record for record in alike if is_idle(record)] or alike


def is_idle(record):
    """Whether a record's times are those of a machine that did nothing else. Nothing is known of runs that were trained side by side."""
    return record.get("others") is not None and record["others"] <= IDLE


def calibrate(job):
    """Measures a few steps of an arm on random tokens; None where it does not start. Where the recipe has phases, those steps are of the
    costly one (Arm.calibrate)."""
    with tempfile.TemporaryDirectory() as folder:
        teachers = []
        for key, arm in job.arm.needs:
            model = first_step(job.for_arm(ARMS[arm]), Path(folder) / arm)
            teachers += ["--set", f"{key}={model}"]
        extra = [word for change in job.arm.calibrate for word in ("--set", change)]
        with Others() as others:
            words = job.command("--bench", "--steps", str(STEPS)) + teachers + extra
            done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        say(f"{job.arm.name}: cadre train --bench exited with {done.returncode}")
        return None
    samples = json.loads(done.stdout)["samples"][WARM_UP:]
    seconds = tokens_per_step(job) / statistics.median(samples)
    return {
        "kind": "speed", "arm": job.arm.name, "set": list(job.arm.set), "recipe_sha256": meaning(job.arm), "bench": "claims", "date": now(),
        "commit": job.args.commit, "machine": job.args.host, "steps": STEPS, "step_seconds": round(seconds, 5), "others": others.share,
    }  # fmt: skip


def first_step(job, folder):
    """The model that an arm has after one step: as fast as any that it could have."""
    words = job.command("--set", "train.steps=1", "--set", "train.warmup_steps=0", "--set", f"output.dir={folder}")
    subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(folder / "snapshots", ignore_errors=True)
    return folder / "model"


def seconds_of(job, records, measure):
    """Seconds that a run takes, and whether they are of an idle machine; None without anything to tell from."""
    found = known(job, records)
    if not any(map(is_idle, found)) and measure:
        speed = calibrate(job)
        if speed:
            records.append(speed)
            if is_idle(speed) and not job.args.no_record:
                append_record("claims", speed)
            found = known(job, records)
    if not found:
        return None
    # What other programs took makes a step slower, never faster.
    per_step = statistics.median(record["step_seconds"] for record in found) if is_idle(found[0]) else min(record["step_seconds"] for record in found)
    return per_step * WITH_EVALUATION * job.steps, is_idle(found[0])


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


def plan(jobs_of, claims, seconds):
    """Lines that say what each claim trains and how long that takes. `jobs_of` gives a claim's runs, `seconds` those of a run as
    `seconds_of` does."""
    seen, total, left, busy, unknown = set(), 0.0, 0.0, set(), set()
    yield f"{'claim':22} {'arms':>4} {'runs':>4} {'done':>4} {'minutes':>8} {'not shared':>10}"
    for claim in claims:
        jobs = jobs_of(claim)
        minutes = new = 0.0
        for job in jobs:
            found = seconds(job)
            if found is None:
                unknown.add(job.arm.name)
                continue
            if not found[1]:
                busy.add(job.arm.name)
            minutes += found[0] / 60
            if (job.arm.name, job.seed) not in seen:
                seen.add((job.arm.name, job.seed))
                new += found[0] / 60
                left += 0.0 if job.record() else found[0]
        total += new * 60
        n_arms = len({job.arm.name for job in jobs})
        mark = f"  over {CLAIM_MINUTES} minutes" if new > CLAIM_MINUTES else ""
        yield f"{claim.name:22} {n_arms:4} {len(jobs):4} {sum(job.record() is not None for job in jobs):4} {minutes:8.1f} {new:10.1f}{mark}"
    mark = f", over {TABLE_HOURS} hours" if total > TABLE_HOURS * 3600 else ""
    yield f"{len(seen)} runs, {total / 3600:.1f} hours in all, one at a time{mark}; {left / 3600:.1f} hours of it not recorded yet"
    if busy:
        yield f"measured while other programs ran, so too slow: {', '.join(sorted(busy))}"
    if unknown:
        yield f"not measured, and left out of the sums: {', '.join(sorted(unknown))}"
