"""Makes golden/reshape/expected.json: what transformers computes from golden checkpoints when it may not pick some experts.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/reshape.py

    {"cases": [{"checkpoint": "MODEL_TYPE/VARIANT", "keep": [[ids] per layer with experts], "tokens": [ids],
                "logits": [[f32; vocab] per position]}]}

A checkpoint from which the other experts have been cut out must compute the same. Nothing is cut out here: the logits of
the experts that are not kept are -inf before the router picks (where the router has a bias of its own, or one that moves
the choice, that is what is changed). Float32, eager attention, eager experts. The kept experts are drawn per layer, the
same number in every group of a grouped router; the seed is the first with which no pick is near another.
"""

import json

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from common import ROOT, f32_list, fail, forward, relative_difference, routers, routing_gap, write_cases

CHECKPOINTS = [
    "mixtral/plain", "mixtral/runtime", "qwen2_moe/plain", "qwen3_moe/plain", "qwen3_moe/dense_layer", "olmoe/plain",
    "granitemoe/plain", "gpt_oss/bf16", "glm4_moe/plain", "deepseek_v2/groups", "deepseek_v3/runtime",
]  # fmt: skip
MIN_GAP = 1e-3
HIDDEN = -1e9


def drawn(n_experts, n_groups, n_kept, generator):
    """Ascending ids, the same number of each group."""
    size = n_experts // n_groups
    kept = []
    for group in range(n_groups):
        ids = torch.randperm(size, generator=generator)[: n_kept // n_groups] + group * size
        kept += sorted(ids.tolist())
    return kept


def masked(model, keep, tokens):
    """Logits and routing when only the experts in `keep` (per layer with experts) can be picked."""
    linear, hidden, undo = F.linear, {}, []
    for (_, router), ids in zip(routers(model), keep, strict=True):
        weight = router.layer.weight if hasattr(router, "layer") else router.weight
        others = torch.ones(len(weight), dtype=torch.bool)
        others[ids] = False
        for name in ("bias", "e_score_correction_bias"):
            bias = getattr(router, name, None)
            if bias is not None:
                undo.append((bias, bias.detach().clone()))
                bias.data[others] = HIDDEN
                break
        else:
            hidden[id(weight)] = others

    def patched(x, weight, bias=None):
        y = linear(x, weight, bias)
        if id(weight) in hidden:
            y = y.masked_fill(hidden[id(weight)], float("-inf"))
        return y

    F.linear = patched
    try:
        return forward(model, tokens)
    finally:
        F.linear = linear
        for bias, before in undo:
            bias.data.copy_(before)


def case(name):
    folder = ROOT / "golden" / name
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["cases"][0]
    tokens, config = expected["tokens"], model.config
    with torch.no_grad():
        plain = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    if relative_difference(plain, torch.tensor(expected["logits"])) > 1e-5:
        fail(f"{name}: not the model that expected.json is of")
    top_k, n_groups = config.num_experts_per_tok, getattr(config, "n_group", None) or 1
    n_picked = getattr(config, "topk_group", None) or 1
    for seed in range(1, 1000):
        generator = torch.Generator().manual_seed(seed)
        keep = []
        for _, router in routers(model):
            n = len(router.layer.weight if hasattr(router, "layer") else router.weight)
            each = max(2 if n_groups > 1 else 1, -(-top_k // n_picked), (n + 1) // 2 // n_groups)
            keep.append(drawn(n, n_groups, each * n_groups, generator))
        logits, routing = masked(model, keep, tokens)
        gap = routing_gap(routing)
        moved = relative_difference(logits, plain)
        if gap > MIN_GAP and moved > 1e-2:
            print(f"{name}: seed {seed}, keeps {[len(ids) for ids in keep]} experts, gap {gap:.3g}, moved {moved:.3g}")
            return {"checkpoint": name, "keep": keep, "tokens": tokens, "logits": f32_list(logits)}
    fail(f"{name}: no seed without near picks")


def main():
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    cases = [case(name) for name in CHECKPOINTS]
    folder = ROOT / "golden" / "reshape"
    write_cases(folder, "reshape.py", cases)


if __name__ == "__main__":
    main()
