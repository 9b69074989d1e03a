"""Owns what the golden scripts share: exact JSON for f32 numbers, manifests, and one Qwen3-MoE forward pass that also reports routing.

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


def moe_layers(model):
    """Indices of the decoder layers that have experts, in order; dense layers are left out."""
    return [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]


def forward(model, tokens):
    """Logits and routing of one sequence.

    Returns (logits [T, vocab], routing), where routing has one entry per MoE layer:
    {"layer": model layer index, "logits": [T, n_experts], "weights": [T, top_k], "experts": [T, top_k]}.
    Experts are ordered by falling probability.
    """
    import torch

    seen = []
    hooks = [
        model.model.layers[i].mlp.gate.register_forward_hook(
            lambda _module, _inputs, output, layer=i: seen.append((layer, *output))
        )
        for i in moe_layers(model)
    ]
    try:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    routing = [
        {"layer": layer, "logits": scores.float(), "weights": weights.float(), "experts": experts}
        for layer, scores, weights, experts in seen
    ]
    return logits, routing


def routing_gap(routing):
    """The smallest difference between the router logits of the last picked and the first unpicked expert.

    A golden with a gap far above rounding error pins the picked experts, whatever the order of summation.
    """
    gaps = []
    for layer in routing:
        top_k = layer["experts"].shape[1]
        ordered = layer["logits"].sort(dim=-1, descending=True).values
        picked = ordered[:, :top_k]
        if top_k > 1:  # the order inside the picks matters as well
            gaps.append((picked[:, :-1] - picked[:, 1:]).min().item())
        if top_k < ordered.shape[1]:
            gaps.append((ordered[:, top_k - 1] - ordered[:, top_k]).min().item())
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
