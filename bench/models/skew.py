"""Routing as of a trained model, imposed on random weights: which experts are popular, and how long picks stay.

The popularity is that of the embedded model `nano` on held-out text (nano-routing.json, written by routing.py), stretched from 16
experts to 128: each becomes 8, one of them hot, and how hot is fitted to what was published for a
trained model with 128 experts of which 8 are picked: of all picks, the 8 most popular experts have 21.5 % in layer 0 and
44.5 % in deeper layers (BigMoeOnEdge on Qwen3-30B-A3B).

How, with nothing but weights of the usual kind, so that every engine computes it from the same file:

- The first 256 values of every embedding are the same constant. Attention's norm has weight 0 there, so that only the router sees
  them; they reach every layer, since what blocks add to them averages out over 256 values.
- A router row holds a multiple of ones there: an offset of the expert's logit, the same for every token. Its other values are
  random as before: what depends on the token. Offsets are fitted by simulation so that picks of the 8 largest of offset
  plus noise have the wanted shares.
- What of the other values is shared by neighbouring tokens is what attention adds: a mean over the context, since scores
  are made flat by the norms of queries and keys. The weight of attention's norm sets how much of it there is, and so how many
  picks a token shares with the one before it, most with short contexts.

Measured on the Q4_K_M file with routing.py, sequences of 64 random tokens (nano: what lasts in the embedded model):

    layer                               0       1       2       3       4       5
    8 most popular, of all picks     21.4 %  45.0 %  44.4 %  44.0 %  45.1 %  43.2 %
    picks shared with token before   18.9 %  46.0 %  48.0 %  50.9 %  52.7 %  52.1 %
    of them, above chance             9.2 %  19.5 %  23.9 %  29.6 %  31.7 %  34.6 %
    the same, nano                    9.8 %  16.6 %  23.9 %  28.8 %  29.8 %  34.0 %
    hits of LRU, 32 of 128 held      54.3 %  88.0 %  89.8 %  90.1 %  90.2 %  90.3 %

Published for picks shared with the token before: 43 % (Qwen3-30B-A3B) and 35 % (Qwen3.6-35B). In longer contexts attention's
mean is smaller, so that less lasts and the most popular have more.
"""

import json
import shutil
from pathlib import Path

import numpy as np

# One super-block of the K-quants, so that constants and noise do not share scales.
CONSTANT = 256
# Their value, and the deviation of the embeddings' other values (make.py).
VALUE, EMBEDDING = -0.022, 0.022
SOURCE = Path(__file__).resolve().parent / "nano-routing.json"
# Share of the picks that the `used` most popular experts have: of the first layer, of the others.
HOTTEST = (0.215, 0.445)
# Weight of the norm before the experts, where it is not constant: small, so that what experts add stays below the embedding.
FFN_NORM = 0.2
# The constant's weight there: experts hardly see it, and the router rows make up for it.
FFN_CONSTANT = 0.05
# Weight of attention's norm by layer: how much of the state neighbouring tokens share.
ATTENTION_NORM = (0.055, 0.013, 0.02, 0.017, 0.011, 0.019)
# Weight of the norms of queries and keys: flat scores, so that attention takes a mean.
FLAT = 0.7
# Deviation of what depends on the token before each layer's experts, as a multiple of the embeddings': measured.
GROWTH = (1.27, 1.32, 1.45, 1.62, 1.53, 1.57)
SAMPLES, STEPS, RATE = 20_000, 60, 0.7
SEED = 5


def split(parents, children, hot):
    """Shares of all experts: of each parent's, one child has `hot`, and the others the rest, slowly falling."""
    others = np.arange(1, children, dtype=np.float64) ** -0.5
    parts = np.concatenate([[hot], (1 - hot) * others / others.sum()])
    return (parents[:, None] * parts[None, :]).reshape(-1)


def fitted(parents, children, used, wanted):
    """The shares of all experts of which the `used` hottest have `wanted`."""
    low, high = 1 / children, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = split(parents, children, middle)
        low, high = (middle, high) if np.sort(shares)[::-1][:used].sum() < wanted else (low, middle)
    return shares


def popularity(layer, n_experts, used):
    """The share of all picks that each expert of a layer is to have; an expert cannot be picked twice by a token."""
    source = json.loads(SOURCE.read_text(encoding="utf-8"))
    layers = source["layers"]
    parents = np.array(layers[min(layer, len(layers) - 1)]["share"])
    wanted = HOTTEST[0] if layer == 0 else HOTTEST[1]
    # An expert that every token picks has 1 / used of the picks.
    return np.minimum(fitted(parents, n_experts // len(parents), used, wanted), 0.95 / used)


def offsets(shares, used, random):
    """Offsets of logits so that the `used` largest of offset plus a standard normal number are picked as often as wanted."""
    wanted = shares / shares.sum() * used
    noise = random.standard_normal((SAMPLES, len(shares)), dtype=np.float32)
    found = np.log(wanted).astype(np.float32)
    for step in range(STEPS):
        picks = np.argpartition(-(noise + found), used - 1, axis=1)[:, :used]
        picked = np.bincount(picks.reshape(-1), minlength=len(shares)) / SAMPLES
        # Smaller steps towards the end: what is left is the noise of the samples.
        rate = RATE / (1 + step / 20)
        found += rate * (np.log(wanted) - np.log(np.maximum(picked, 1 / SAMPLES))).astype(np.float32)
    return found - found.mean()


def norm(tensor, size):
    """The weights of a norm, of a layer's or the last; None for one that stays."""
    weights = np.empty(size, np.float32)
    name = tensor.split(".")[-2]
    if name == "attn_norm":
        weights[:] = at(ATTENTION_NORM, layer_of(tensor))
        weights[:CONSTANT] = 0
    elif name == "ffn_norm":
        weights[:] = FFN_NORM
        weights[:CONSTANT] = FFN_CONSTANT
    elif name in ("attn_q_norm", "attn_k_norm"):
        weights[:] = FLAT
    elif name == "output_norm":
        weights[:] = 1
        weights[:CONSTANT] = 0
    else:
        return None
    return weights


def router(noise, layer, used):
    """A router from random rows: the rows as they are for what depends on the token, offsets on the constant values."""
    n_experts, hidden = noise.shape
    random = np.random.default_rng(SEED + layer)
    shares = random.permutation(popularity(layer, n_experts, used))
    rows = noise / np.float32(FFN_NORM)
    # Deviation of what depends on the token, and what an offset of 1 adds up to; both before division by the root mean square.
    deviation = noise[:, CONSTANT:].std()
    changing = deviation * np.sqrt(hidden - CONSTANT) * EMBEDDING * at(GROWTH, layer)
    rows[:, :CONSTANT] = (offsets(shares, used, random) * changing / (CONSTANT * FFN_CONSTANT * VALUE))[:, None]
    return rows


def constant_bytes(kind):
    """CONSTANT values of VALUE in a format, as bytes."""
    import gguf

    if kind == gguf.GGMLQuantizationType.Q4_K:
        # Scale 0 and the minimum VALUE for all eight blocks: no multiple of a scale, less 1 times the minimum.
        head = np.array([0, -VALUE], np.float16).tobytes()
        return np.frombuffer(head + bytes([0] * 4 + [1] * 4 + [0x10] * 4) + bytes(128), np.uint8)
    return gguf.quants.quantize(np.full(CONSTANT, VALUE, np.float32), kind).view(np.uint8).reshape(-1)


def impose(source, target, used):
    """Writes `target`: the GGUF file `source` with the routing that is described above."""
    import gguf

    shutil.copyfile(source, target)
    reader = gguf.GGUFReader(target, "r+")
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            constant = constant_bytes(tensor.tensor_type)
            rows = tensor.data.view(np.uint8)
            rows[:, : len(constant)] = constant
        elif tensor.name.endswith("ffn_gate_inp.weight"):
            tensor.data[:] = router(np.array(tensor.data), layer_of(tensor.name), used)
        elif tensor.data.ndim == 1 and (weights := norm(tensor.name, tensor.data.shape)) is not None:
            tensor.data[:] = weights
    reader.data.flush()


def layer_of(tensor):
    """The number in `blk.3.attn_norm.weight`; 0 outside of layers."""
    parts = tensor.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0


def at(values, layer):
    """A layer's value; the last one for deeper layers."""
    return values[min(layer, len(values) - 1)]
