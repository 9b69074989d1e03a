"""Makes golden/lm_eval/expected.json: what lm_eval gets from transformers on the tasks beside it.

    PY="$(bash golden/make/env.sh)"
    "$PY" -m pip install --no-deps --requirement bench/peers/requirements-clients.txt accelerate==1.15.0 psutil==7.2.2
    "$PY" golden/make/lm_eval_scores.py --model models/nano

The model is read in float32 (bf16 weights are widened) and asked one question at a time. The tasks (YAML) and their questions (JSON
lines) were written by hand; the texts of rolling.jsonl are four of recipes/data/sample.jsonl.

Files
    expected.json   by task: `scores` by lm_eval's names, and `samples`, per question the log likelihoods of its choices or the text, per text its
                    log likelihood.
    MANIFEST.json   script, versions.
"""

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path

from common import ROOT, versions, write_json

sys.path.insert(0, str(ROOT / "bench" / "peers"))
from serve_lm_eval import TASKS, WINDOW, evaluate  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    os.chdir(ROOT)
    arguments = {"pretrained": str(args.model.resolve()), "dtype": "float32", "max_length": WINDOW}
    expected = evaluate("hf", arguments, device="cpu", batch_size=1)
    for task in expected.values():
        task["scores"] = {name: value for name, value in task["scores"].items() if not name.endswith("_stderr")}
    write_json(TASKS / "expected.json", expected)
    write_json(TASKS / "MANIFEST.json", {
        "script": "golden/make/lm_eval_scores.py",
        "requirements": ["golden/make/requirements.txt", "bench/peers/requirements-clients.txt"],
        "versions": versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
        "expected": "models/nano in float32",
    })


if __name__ == "__main__":
    main()
