"""What a finished run says: numbers by name, from its log and its result.

nll               mean over domains of the held-out nats per token at the end; nll.DOMAIN for one
nll@0.4           the same at the last evaluation within the first 40 % of the steps
max_vio, cv, dead, entropy, picks
                  means over the MoE layers and the last tenth of the steps
picks.first, picks.last, picks.start
                  the first and the last MoE layer; all layers in the first five steps
z, balance, cross_entropy, part.NAME
                  parts of the loss, without coefficients, over the last tenth of the steps
"""

import json
import statistics

LAST_SHARE, FIRST_STEPS = 0.1, 5
OF_LAYERS = ("max_vio", "cv", "dead", "entropy", "picks")
OF_STEPS = ("z", "balance", "cross_entropy", "grad_norm")
EARLY = 0.4


def mean_nll(evaluation):
    """Mean over domains, each counting the same."""
    return statistics.fmean(score["nll"] for score in evaluation.values())


def read_log(path):
    """Step lines and evaluation lines of a run's log."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval" in line]


def of_run(steps, evaluations):
    """All numbers of a run, from its log's lines."""
    last = steps[-max(1, round(LAST_SHARE * len(steps))) :]
    found = {"nll": mean_nll(evaluations[-1]["eval"])}
    found |= {f"nll.{domain}": score["nll"] for domain, score in evaluations[-1]["eval"].items()}
    early = [line for line in evaluations if line["step"] <= EARLY * steps[-1]["step"]]
    if early:
        found[f"nll@{EARLY}"] = mean_nll(early[-1]["eval"])
    found |= {key: statistics.fmean(line[key] for line in last) for key in OF_STEPS if key in last[0]}
    for name in last[0].get("parts", {}):
        found[f"part.{name}"] = statistics.fmean(line["parts"][name] for line in last)
    for key in OF_LAYERS:
        if last[0]["layers"] and key in last[0]["layers"][0]:
            found |= of_layers(key, steps[:FIRST_STEPS], last)
    return found


def of_layers(key, first, last):
    """One number of the layers: of all, of the first and the last of them, and at the start."""

    def mean(lines, layers=slice(None)):
        return statistics.fmean(layer[key] for line in lines for layer in line["layers"][layers])

    found = {key: mean(last)}
    if key == "picks":
        found |= {f"{key}.first": mean(last, slice(0, 1)), f"{key}.last": mean(last, slice(-1, None)), f"{key}.start": mean(first)}
    return found


def curve(evaluations):
    """Held-out loss by step."""
    return [[line["step"], round(mean_nll(line["eval"]), 5)] for line in evaluations]
