"""Statistics of the claims: paired differences over seeds, and the rule that turns them into a verdict.

The rule: a difference counts when its sign is as claimed on all of 3 or 4 seeds, or on at least 4 of every 5. Fewer than 3 seeds decide
nothing. There is no pooling over seeds and no p-value: with so few of either, a sign is what can be defended.
"""

import math
import statistics

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "not decided"
LEAST_SEEDS = 3
# From here on one seed in five may disagree.
MANY_SEEDS, SHARE = 5, 0.8


def needed(n_seeds):
    """How many seeds must agree, of `n_seeds`."""
    return n_seeds if n_seeds < MANY_SEEDS else math.ceil(SHARE * n_seeds - 1e-9)


def paired(ours, theirs):
    """Differences `ours - theirs` by seed, for seeds that both have; both are {seed: value}."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs}


def agrees(difference, sign, margin=0.0):
    """Whether a difference is on the claimed side: `sign` is -1 for less and 1 for more. A positive `margin` lets it be so much on the
    wrong side ("no worse than, within"); a negative one asks for that much more. Equal is not less."""
    return math.isfinite(difference) and sign * difference > -margin


def verdict(differences, sign, margin=0.0):
    """One of HOLDS, FAILS and UNDECIDED for {seed: difference}."""
    if len(differences) < LEAST_SEEDS:
        return UNDECIDED
    n_agree = sum(agrees(difference, sign, margin) for difference in differences.values())
    return HOLDS if n_agree >= needed(len(differences)) else FAILS


def whole(verdicts):
    """The verdict on a claim of several checks: it holds when all of them do."""
    verdicts = list(verdicts)
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else UNDECIDED


def summary(values):
    """Mean, and the sample's standard deviation where there are two values or more."""
    values = list(values)
    return {"n": len(values), "mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end + 1 < len(order) and values[order[end + 1]] == values[order[at]]:
            end += 1
        for index in order[at : end + 1]:
            found[index] = (at + end) / 2 + 1
        at = end + 1
    return found


def spearman(a, b):
    """Spearman's rank correlation; 0 when one side is constant."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} values, expected as many on both sides and at least 2")
    a, b = ranks(a), ranks(b)
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    spread_a, spread_b = sum((x - mean_a) ** 2 for x in a), sum((y - mean_b) ** 2 for y in b)
    if spread_a == 0 or spread_b == 0:
        return 0.0
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b)) / math.sqrt(spread_a * spread_b)


def jensen_shannon(shares):
    """Jensen-Shannon divergence, in bits, of several distributions with equal weight: entropy of their mean less their mean entropy."""

    def entropy(distribution):
        return -sum(p * math.log2(p) for p in distribution if p > 0)

    mean = [statistics.fmean(column) for column in zip(*shares)]
    return entropy(mean) - statistics.fmean(entropy(distribution) for distribution in shares)
