"""docs/claims.md from the records alone."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stats  # noqa: E402
from claims import CLAIMS, LESS, NO_WORSE, arms_of, meaning, other_side, steps_of, waits_for  # noqa: E402
from common import ROOT  # noqa: E402

OUT = ROOT / "docs" / "claims.md"
RUN = "python3 bench/claims/run.py"
INTRO = f"""# What the papers claim, and what was measured here

Written by `{RUN} --table` from the records in `bench/record/claims.jsonl`; no number and no verdict here is typed. The claims, arms and checks are in
[bench/claims/claims.py](../bench/claims/claims.py), the recipes in [recipes/claims](../recipes/claims), and how to train them in [training](guide/train.md).

The test bed is small on purpose: models of at most a million parameters on synthetic text of four domains (`recipes/data/synthetic`), so that every row can be trained again on two cores. A claim that
does not hold here may hold at the size of its paper, and the other way round. What is compared sees the same tokens in the same order from the same initial values. The text is tables that have to be known by
heart, so that parameters are what is scarce; text, sizes and schedule were chosen once, by whether top-2 beats the dense model of equal active size with one seed, and nothing was tuned for a claim
([how](log.md)).

**Rule.** Differences are taken seed by seed. A check holds when their sign is as claimed on all of 3 or 4 seeds, or on 4 of every 5; a claim holds when all of its checks do. Fewer than 3 seeds decide
nothing. "No worse" allows {NO_WORSE} nats per token. Losses are nats per token (byte) of held-out text, mean over domains.
"""


def current(records, arms):
    """The records of runs on the newest synthetic text by the recipes as they are now, oldest first. Those of other text and of recipes that
    have changed since stay in the file and count no more."""
    wanted = {arm.name: meaning(arm) for arm in arms}
    ours = [r for r in records if "values" in r and r["data"] == "synthetic" and wanted.get(r["arm"]) == r["recipe_sha256"]]
    return [record for record in ours if record["data_sha256"] == ours[-1]["data_sha256"]]


def by_arm(records, claim):
    """{arm: {seed: values}} of the newest records, at the largest number of steps that most of the claim's arms have; and their steps."""
    newest = {}
    for record in current(records, arms_of(claim)):
        newest[record["steps"], record["arm"], record["seed"]] = record
    sizes = {}
    for steps, _, _ in newest:
        sizes[steps] = sizes.get(steps, 0) + 1
    if not sizes:
        return {}, None, []
    best = max(sizes, key=lambda steps: (sizes[steps], steps))
    found, used = {}, []
    for (steps, arm, seed), record in newest.items():
        if steps == best:
            found.setdefault(arm, {})[seed] = record["values"]
            used.append(record)
    return found, best, used


def sides(check, found):
    """{seed: value} of both sides of a check."""
    ours = {seed: values[check.measure] for seed, values in found.get(check.arm, {}).items() if check.measure in values}
    if not isinstance(check.against, str):
        return ours, {seed: check.against for seed in ours}
    arm, measure = other_side(check)
    return ours, {seed: check.factor * values[measure] for seed, values in found.get(arm, {}).items() if measure in values}


def judged(check, found):
    """Means of both sides, the paired differences, and the verdict."""
    ours, theirs = sides(check, found)
    differences = stats.paired(ours, theirs)
    return {
        "ours": statistics.fmean(ours[seed] for seed in differences) if differences else None,
        "theirs": statistics.fmean(theirs[seed] for seed in differences) if differences else None,
        "differences": list(differences.values()),
        "verdict": stats.verdict(differences, check.sign, check.margin),
    }


def number(value):
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def names_of(check):
    """Both sides in words."""
    if not isinstance(check.against, str):
        return f"`{check.arm}`", f"{check.against:g}"
    arm, measure = other_side(check)
    theirs = f"`{arm}`" if measure == check.measure else f"`{arm}`, {measure}"
    return f"`{check.arm}`", theirs if check.factor == 1 else f"{check.factor:g} x {theirs}"


def row(check, found):
    """A line of a claim's table."""
    result = judged(check, found)
    ours, theirs = names_of(check)
    differences = result["differences"]
    if not differences:
        return f"| {check.what} | {ours} - | {theirs} | - | - | {result['verdict']} |"
    spread = f"{number(min(differences))} to {number(max(differences))}"
    theirs = theirs if not isinstance(check.against, str) else f"{theirs} {number(result['theirs'])}"
    mean = number(statistics.fmean(differences))
    return f"| {check.what} | {ours} {number(result['ours'])} | {theirs} | {mean} ({spread}) | {len(differences)} | {result['verdict']} |"


def verdict_of(claim, found):
    if claim.untestable:
        return "not testable at this size"
    if waits_for(claim):
        return "no recipe yet"
    results = [judged(check, found) for check in claim.checks]
    if not any(result["differences"] for result in results):
        return "not yet measured"
    return stats.whole(result["verdict"] for result in results)


def command_of(claim, steps):
    """What trains a claim again as its records were."""
    arms = arms_of(claim)
    if not arms:
        return "-"
    own = steps is None or steps == steps_of(arms[0])
    return f"`{RUN} {claim.name}`" if own else f"`{RUN} {claim.name} --steps {steps}`"


def baselines(claim, found):
    """One line with the losses of the four baselines."""
    shown = []
    for arm in claim.baselines:
        losses = [values["nll"] for values in found.get(arm, {}).values()]
        shown.append(f"`{arm}` {number(statistics.fmean(losses))} ({len(losses)} seeds)" if losses else f"`{arm}` -")
    return "Baselines, held-out loss: " + ", ".join(shown) + "."


def section(claim, records):
    """One claim."""
    found, steps, used = by_arm(records, claim)
    lines = [f"## {claim.name}", "", f"{claim.says} ({claim.paper})", ""]
    if claim.untestable:
        return lines + [f"Not testable here: {claim.untestable}.", ""]
    if recipes := waits_for(claim):
        return lines + [f"Not trained: there is no recipe {', '.join(f'`{name}`' for name in recipes)}.", ""]
    lines += ["| check | measured | against | paired difference, mean (least to most) | seeds | verdict |", "|---|---|---|---|---|---|"]
    lines += [row(check, found) for check in claim.checks]
    lines += ["", baselines(claim, found)]
    if used:
        commits = ", ".join(sorted({record["commit"] for record in used}))
        minutes = sum(record["step_seconds"] * record["steps"] for record in used) / 60
        short = "" if steps >= steps_of(arms_of(claim)[0]) else f" (a first look; the recipe has {steps_of(arms_of(claim)[0])})"
        lines.append(f"{steps} steps a run{short}, {len(used)} runs, {minutes:.0f} minutes of training steps; commits {commits}.")
        missing = sorted({f"{name}: {why}" for record in used for name, why in record["missing"].items()})
        lines += [f"Not measured: {text}." for text in missing]
    return lines + [f"Again: {command_of(claim, steps)}", ""]


def measured(claim, found):
    """The first check in few words, for the table at the top."""
    if claim.untestable or not found:
        return "-"
    check = claim.checks[0]
    result = judged(check, found)
    if not result["differences"]:
        return "-"
    if check.measure == "nll" and isinstance(check.against, str):
        mean = statistics.fmean(result["differences"])
        return f"`{check.arm}` less `{other_side(check)[0]}`: {mean:+.4f} nats, {len(result['differences'])} seeds"
    sign = "below" if check.sign == LESS else "above"
    return f"{check.what.rstrip('.')}: {number(result['ours'])}, {sign} {number(result['theirs'])} is claimed"


def document(records):
    """The whole file."""
    lines = [INTRO, "| claim | what the papers say | measured here (first check) | verdict | command |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        found, steps, _ = by_arm(records, claim)
        command = command_of(claim, steps)
        lines.append(f"| [{claim.name}](#{claim.name}) | {claim.says} | {measured(claim, found)} | **{verdict_of(claim, found)}** | {command} |")
    lines.append("")
    for claim in CLAIMS:
        lines += section(claim, records)
    return "\n".join(lines).rstrip() + "\n"
