"""lm_eval against `cadre serve`: its scores of tasks with several answers, of tasks whose answers are written, and of whole texts.

    PY="$(bash bench/peers/clients.sh)" && "$PY" bench/peers/serve_lm_eval.py [path of cadre]

The tasks lie in golden/lm_eval/, with their questions; nothing is downloaded. Compared are lm_eval (`local-completions`, tokens by
the server) on a server of the embedded model, `cadre eval` on the same questions, and what lm_eval got from transformers on the same
model (golden/lm_eval/expected.json, made by golden/make/lm_eval_scores.py). Scores must be equal to the last digit, what the two
ways through Cadre give for each question as well; log likelihoods of transformers may differ by 0.001. Perplexities of texts are no
counts: the two ways through Cadre differ by how sums are rounded (1e-12), transformers by 1e-6. Prints a line per check; exits with 1 when
one fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "golden" / "lm_eval"
MAX_LENGTH = 512
# What lm_eval makes of it where it asks a server: it leaves room for a token that it draws, and for one more.
WINDOW = MAX_LENGTH - 2
TOLERANCE = 1e-3


def check(what, holds, found=""):
    print(f"{'ok  ' if holds else 'FAIL'} {what} {found if not holds else ''}")
    if not holds:
        sys.exit(1)


def evaluate(model, arguments, **options):
    """What a model scores, by task: numbers by name, and per question its log likelihoods or its text."""
    report = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["cadre_choices", "cadre_answers", "cadre_rolling"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        log_samples=True,
        # Errors of means need none; 0 would leave them out.
        bootstrap_iters=1,
        **options,
    )
    result = {}
    for task, numbers in report["results"].items():
        samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
        if task == "cadre_choices":
            answers = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
        else:
            answers = [sample["resps"][0][0] for sample in samples]
        if task == "cadre_rolling":
            answers = [float(answer) for answer in answers]
        # `acc,none` is the metric and its filter.
        numbers = {name.split(",")[0]: float(value) for name, value in numbers.items() if "," in name and value != "N/A"}
        result[task.removeprefix("cadre_")] = {"scores": numbers, "samples": answers}
    return result


def by_cadre(cadre, task, *options):
    """The same from `cadre eval`."""
    command = [cadre, "eval", task, "--data", str(TASKS / f"{task}.jsonl"), "-o", "json", "--samples", *options]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    key = "log_likelihoods" if task == "choices" else "text"
    return report, [sample[key] for sample in report["samples"]]


def check_rolling(cadre, served, expected):
    """Texts: what is compared are numbers of many digits, which are sums made in another order."""
    command = [cadre, "eval", "perplexity", "--rolling", "-c", str(WINDOW), "--data", str(TASKS / "rolling.jsonl"), "-o", "json"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    scores = served["scores"]
    print(f"     rolling: {scores}, {len(served['samples'])} texts")
    names = [json.loads(line)["domain"] for line in (TASKS / "rolling.jsonl").read_text().splitlines()]
    ours = [-report["domains"][name]["nll"] * report["domains"][name]["tokens"] for name in names]
    check("rolling: some texts are longer than a window", max(report["domains"][name]["tokens"] for name in names) > 2 * WINDOW)
    check("rolling: lm_eval and cadre eval score alike", all(abs(report[name] / scores[name] - 1) < 1e-12 for name in scores), report)
    check("rolling: every text alike", all(abs(a / b - 1) < 1e-12 for a, b in zip(ours, served["samples"], strict=True)), ours)
    printed = [f"{report[name]:.4f} {scores[name]:.4f}".split() for name in scores]
    check("rolling: to the last digit printed", all(ours == theirs for ours, theirs in printed), printed)
    apart = max(abs(scores[name] / expected["scores"][name] - 1) for name in scores)
    check(f"rolling: transformers scores alike, up to {apart:.1e}", apart < 1e-6, expected["scores"])
    worst = max(abs(a / b - 1) for a, b in zip(ours, expected["samples"], strict=True))
    check(f"rolling: its log likelihoods differ by {worst:.1e} of themselves at most", worst < 1e-6)


def main():
    cadre = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "target/release/cadre")
    # The tasks name their data from there.
    os.chdir(ROOT)
    server = subprocess.Popen([cadre, "serve", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        arguments = {"model": "nano", "base_url": f"{url}/v1/completions", "max_length": MAX_LENGTH, "num_concurrent": 4}
        served = evaluate("local-completions", arguments, batch_size=4)
    finally:
        server.terminate()
        check("the server ends in good order", server.wait(60) == 0)
    expected = json.loads((TASKS / "expected.json").read_text())
    for task, options in [("choices", []), ("answers", ["-n", "8", "--stop", "\n"])]:
        report, samples = by_cadre(cadre, task, *options)
        scores = served[task]["scores"]
        told = {name: scores[name] for name in scores if not name.endswith("_stderr")}
        print(f"     {task}: {told}, {len(samples)} questions")
        check(f"{task}: lm_eval and cadre eval score alike", all(report[name] == scores[name] for name in told), report)
        printed = [f"{report[f'{name}_stderr']:.4f} {scores[f'{name}_stderr']:.4f}".split() for name in told]
        check(f"{task}: so do their standard errors", all(ours == theirs for ours, theirs in printed), printed)
        check(f"{task}: every question alike", served[task]["samples"] == samples, (served[task]["samples"], samples))
        check(f"{task}: transformers scores alike", expected[task]["scores"] == told, expected[task]["scores"])
        reference = expected[task]["samples"]
        if task == "answers":
            check(f"{task}: transformers writes alike", reference == samples, reference)
        else:
            pairs = [pair for ours, theirs in zip(samples, reference, strict=True) for pair in zip(ours, theirs, strict=True)]
            worst = max(abs(ours - theirs) for ours, theirs in pairs)
            check(f"{task}: its log likelihoods differ by {worst:.1e} at most", worst < TOLERANCE)
    check_rolling(cadre, served["rolling"], expected["rolling"])


if __name__ == "__main__":
    main()
