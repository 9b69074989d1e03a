"""Makes golden/steering/: what transformers computes when experts are taken from its routers.

    PY="$(bash golden/make/env.sh)"
    "$PY" golden/make/steering.py --golden golden

The checkpoints are those under golden/MODEL_TYPE/. Nothing of a model is patched but the product that makes its router
logits: a masked expert's logit becomes minus infinity there, and with `rank` so do all but the one of that rank. In
DeepSeek-V3, whose scores are sigmoids, a masked expert's correction becomes -1e9 instead.

Files
    expected.json   `cases`: checkpoint, steering, token ids, and the logits of the last three positions.
    MANIFEST.json   script and versions.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common import f32_list, fail, relative_difference, write_cases

TOKENS = [1, 5, 9, 2, 7, 11, 3, 8, 4, 6]
N_LAST = 3
CASES = [
    ("qwen3_moe/plain", {"mask": {"*": [0, 2]}}),
    ("qwen3_moe/plain", {"ranks": [2]}),
    ("qwen3_moe/raw_topk", {"mask": {"*": [1]}}),
    ("deepseek_v3/no_q_lora", {"mask": {"*": [1, 3]}}),
]


def gates(model):
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def edited(logits, steering):
    """Router logits as the steering leaves them."""
    logits = logits.clone()
    for expert in steering.get("mask", {}).get("*", []):
        logits[..., expert] = float("-inf")
    if "ranks" in steering:
        (rank,) = steering["ranks"]
        kept = logits.sort(dim=-1, descending=True, stable=True).indices[..., rank - 1 : rank]
        only = torch.full_like(logits, float("-inf"))
        logits = only.scatter(-1, kept, logits.gather(-1, kept))
    return logits


def steered(model, steering):
    """The logits of TOKENS under a steering."""
    weights = {id(gate.weight) for gate in gates(model)}
    corrections = [gate.e_score_correction_bias for gate in gates(model) if hasattr(gate, "e_score_correction_bias")]
    for correction in corrections:
        correction[steering["mask"]["*"]] = -1e9
    linear = torch.nn.functional.linear

    def product(x, weight, bias=None):
        y = linear(x, weight, bias)
        return edited(y, steering) if id(weight) in weights and not corrections else y

    torch.nn.functional.linear = product
    try:
        return model(torch.tensor([TOKENS])).logits[0]
    finally:
        torch.nn.functional.linear = linear


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    cases = []
    for name, steering in CASES:
        model = AutoModelForCausalLM.from_pretrained(
            args.golden / name, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        plain = model(torch.tensor([TOKENS])).logits[0]
        logits = steered(model, steering)
        effect = relative_difference(plain.numpy(), logits.numpy())
        print(f"{name} {json.dumps(steering)}: {effect:.3f} of the largest logit away from the plain model")
        if not torch.isfinite(logits).all() or effect < 0.01:
            fail(f"{name}: the steering does nothing, or too much")
        rows = [f32_list(row) for row in logits[-N_LAST:].numpy()]
        cases.append({"model": name, "steering": steering, "tokens": TOKENS, "logits": rows})
    folder = args.golden / "steering"
    write_cases(folder, "steering.py", cases)


if __name__ == "__main__":
    main()
