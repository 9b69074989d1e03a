"""Makes golden/dense/expected.json: what transformers computes from models that `cadre split` and `cadre upcycle` write.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/dense.py --cadre target/release/cadre

    {"cases": [{"checkpoint": "MODEL_TYPE/VARIANT", "command": [..], "model_type": "mixtral", "tokens": [ids],
                "logits": [[f32; vocab] per position]}]}

The dense models are goldens. Every output is loaded by transformers, in float32 with eager attention and eager experts. Where
all experts are on, or are copies, its logits have to be those of the dense model; that is checked here. Where fewer are on,
there is nothing else to compare with: the logits are what Cadre has to compute from what it writes.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from common import ROOT, f32_list, fail, write_cases

CASES = [
    ("llama/plain", ["split", "--experts", "4"], True),
    ("llama/smollm", ["split", "--experts", "8", "--by", "random", "--seed", "1"], True),
    ("llama/llama3", ["split", "--experts", "5"], True),
    ("llama/plain", ["split", "--experts", "4", "--top-k", "2", "--by", "random"], False),
    ("qwen3/plain", ["split", "--experts", "8"], True),
    ("qwen3/plain", ["split", "--experts", "4", "--top-k", "1"], False),
    ("qwen2/yarn", ["split", "--experts", "4", "--shared", "8"], True),
    ("qwen2/yarn", ["split", "--experts", "4", "--shared", "8", "--top-k", "2"], False),
    ("llama/plain", ["upcycle", "--experts", "4"], True),
    ("qwen3/plain", ["upcycle", "--experts", "4", "--top-k", "3"], True),
    ("qwen3/plain", ["upcycle", "--experts", "4", "--drop", "0.5"], False),
]  # fmt: skip
TOLERANCE = 1e-5


def logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model.config.model_type, model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def case(cadre, name, command, is_exact):
    dense = ROOT / "golden" / name
    expected = json.loads((dense / "expected.json").read_text(encoding="utf-8"))["cases"][0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "moe"
        said = subprocess.run([cadre, *command, "-m", dense, "-o", out], capture_output=True, text=True)
        if said.returncode:
            fail(f"{name} {command}: {said.stderr}")
        model_type, found = logits(out, expected["tokens"])
    _, before = logits(dense, expected["tokens"])
    worst = ((found - before).abs().max() / before.abs().max()).item()
    print(f"{name} {' '.join(command)}: {model_type}, {worst:.2e} from the dense model")
    if is_exact and worst > TOLERANCE:
        fail(f"{name} {command}: {worst} from the dense model")
    if not is_exact and worst < 1e-3:
        fail(f"{name} {command}: nothing is left out")
    return {
        "checkpoint": name,
        "command": command,
        "model_type": model_type,
        "tokens": expected["tokens"],
        "logits": f32_list(found),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cadre", default=str(ROOT / "target/release/cadre"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write_cases(ROOT / "golden/dense", "dense.py", [case(args.cadre, *one) for one in CASES])


if __name__ == "__main__":
    main()
