"""Owns what the golden scripts share: exact JSON for f32 numbers, manifests, and a forward pass that also reports routing.

A golden is one file or folder small enough to read in a diff. Numbers are written with the fewest digits that
give back the same f32, so that reading the JSON loses nothing.
"""

import json
import platform
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def f32(value):
    """The shortest decimal that reads back as the same f32."""
    number = float(str(np.float32(value)))
    if not np.isfinite(number):
        raise ValueError(f"a golden must be finite, got {value}")
    return number


def f32_list(array):
    """A tensor or array of any rank as nested lists of exact f32 decimals."""
    array = np.asarray(array, dtype=np.float32)
    return [f32_list(row) if array.ndim > 1 else f32(row) for row in array]


def write_json(path, value):
    """Writes JSON with one key a line at the top level, and lists of plain values on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_render(value, 0) + "\n", encoding="utf-8")


def write_cases(folder, script, cases):
    """Writes what eager transformers gave for `cases`, and the manifest that says by which script and versions."""
    write_json(folder / "expected.json", {"cases": cases})
    manifest = {
        "script": f"golden/make/{script}",
        "requirements": "golden/make/requirements.txt",
        "versions": versions(),
        "expected": "float32, eager attention, eager experts, one thread",
    }
    write_json(folder / "MANIFEST.json", manifest)


def _render(value, depth):
    flat = json.dumps(value, ensure_ascii=False)
    is_flat = not isinstance(value, (dict, list)) or (
        isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)
    )
    if is_flat or len(flat) <= 100:
        return flat
    pad = "  " * (depth + 1)
    if isinstance(value, dict):
        body = (f"{pad}{json.dumps(key, ensure_ascii=False)}: {_render(item, depth + 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(body) + "\n" + "  " * depth + "}"
    body = (f"{pad}{_render(item, depth + 1)}" for item in value)
    return "[\n" + ",\n".join(body) + "\n" + "  " * depth + "]"


def versions():
    """The versions that a manifest records. No machine names."""
    import safetensors
    import tokenizers
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "arch": platform.machine(),
    }


def routers(model):
    """(decoder layer, router module) of every layer that has experts, in order; dense layers are left out."""
    return [
        (i, module)
        for i, layer in enumerate(model.model.layers)
        for _, module in layer.named_modules()
        if type(module).__name__.lower().endswith("topkrouter")
    ]


def moe_layers(model):
    """Indices of the decoder layers that have experts, in order."""
    return [i for i, _ in routers(model)]


def selection(module, logits):
    """What a router sorts experts by, and how near its other decisions are to tipping over.

    Returns (keys [T, n_experts] with -inf for experts outside the kept groups, smallest margin of those decisions).
    """
    import torch

    bias = getattr(module, "e_score_correction_bias", None)
    keys = logits if bias is None else logits.sigmoid() + bias
    margin = float("inf")
    groups = getattr(module, "num_group", None)
    if groups is not None and groups > 1 and getattr(module, "topk_method", None) != "greedy":
        per_group = keys.view(len(keys), groups, -1)
        # DeepSeek-V2 ranks groups by their best expert, V3 and GLM by the sum of their two best.
        score = per_group.amax(-1) if bias is None else per_group.topk(2, dim=-1).values.sum(-1)
        kept = module.topk_group
        ordered = score.sort(dim=-1, descending=True).values
        if kept < groups:
            margin = (ordered[:, kept - 1] - ordered[:, kept]).min().item()
        mask = torch.zeros_like(score).scatter_(1, score.topk(kept, dim=-1).indices, 1.0).bool()
        keys = per_group.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(1)
    if (jitter := getattr(module, "router_jitter_noise", None)) is not None:
        # SparseMixer drops experts whose relative distance to the best one exceeds 2 * jitter: a jump in the weight.
        for rank in range(2):
            best = keys.sort(dim=-1, descending=True).values[:, rank : rank + 1]
            distance = (best - keys) / keys.abs().clamp(min=best)
            margin = min(margin, (distance - 2 * jitter).abs().min().item())
    return keys, margin


def forward(model, tokens):
    """Logits and routing of one sequence.

    Returns (logits [T, vocab], routing), where routing has one entry per MoE layer: {"layer": model layer index,
    "logits": [T, n_experts], "weights": [T, top_k], "experts": [T, top_k], "keys": what was sorted by, "margin"}.
    Experts are ordered by falling sorting key (transformers leaves the order open where it asks for unsorted top-k).
    """
    import torch

    seen = []
    hooks = [
        module.register_forward_hook(
            lambda module, _inputs, output, layer=layer: seen.append((layer, module, *output))
        )
        for layer, module in routers(model)
    ]
    try:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    routing = []
    for layer, module, scores, weights, experts in seen:
        keys, margin = selection(module, scores.float())
        order = keys.gather(1, experts).argsort(dim=-1, descending=True, stable=True)
        routing.append(
            {
                "layer": layer,
                "logits": scores.float(),
                "weights": weights.float().gather(1, order),
                "experts": experts.gather(1, order),
                "keys": keys,
                "margin": margin,
            }
        )
    return logits, routing


def routing_gap(routing):
    """The smallest difference between the sorting keys of neighbouring picks, and of the last pick and the next expert.

    A golden with a gap far above rounding error pins the picked experts, whatever the order of summation.
    """
    gaps = [float("inf")]
    for layer in routing:
        top_k = layer["experts"].shape[1]
        ordered = layer["keys"].sort(dim=-1, descending=True).values
        picked = ordered[:, :top_k]
        if top_k > 1:  # the order inside the picks matters as well
            gaps.append((picked[:, :-1] - picked[:, 1:]).min().item())
        if top_k < ordered.shape[1]:
            gaps.append((ordered[:, top_k - 1] - ordered[:, top_k]).min().item())
        gaps.append(layer["margin"])
    return min(gaps)


def relative_difference(ours, theirs):
    """Largest absolute difference, relative to the largest absolute value of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes differ: {ours.shape} and {theirs.shape}")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def fail(message):
    """One clear line on stderr, then exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")
