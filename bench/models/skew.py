"""Routing as of a trained model, imposed on random weights: which experts are popular, and how long picks stay.

The popularity is that of the embedded model `nano` on held-out text (nano-routing.json, written by routing.py), stretched from 16
experts to 128: each becomes 8 with shares that fall as a power of their rank, and the power is fitted to what was published for a
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

Published for picks repeated from the token before: 43 % of a token's picks (Qwen3-30B-A3B) and 35 % (Qwen3.6-35B).
"""

import json
from pathlib import Path

import numpy as np

# One super-block of the K-quants, so that constants and noise do not share scales.
CONSTANT = 256
SOURCE = Path(__file__).resolve().parent / "nano-routing.json"
# Share of the picks that the `used` most popular experts have: of the first layer, of the others.
HOTTEST = (0.215, 0.445)
# Weight of the norm before the experts, where it is not constant: small, so that what experts add stays below the embedding.
FFN_NORM = 0.2
# The constant's weight there: experts hardly see it, and the router rows make up for it.
FFN_CONSTANT = 0.05
# Weight of attention's norm by layer: how much of the state neighbouring tokens share.
ATTENTION_NORM = (0.03, 0.06, 0.06, 0.06, 0.06, 0.06)
# Weight of the norms of queries and keys: flat scores, so that attention takes a mean.
FLAT = 0.7
# Deviation of the part that depends on the token, before each layer's experts, as a multiple of the embedding's: measured.
GROWTH = (1.2, 1.6, 1.8, 2.0, 2.1, 2.2)
SAMPLES, STEPS, RATE = 20_000, 60, 0.7
SEED = 5


def fitted_power(parents, children, used, wanted):
    """The power of the rank by which each parent's share is split so that the `used` hottest have `wanted` of all."""
    low, high = 0.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = split(parents, children, middle)
        low, high = (middle, high) if np.sort(shares)[::-1][:used].sum() < wanted else (low, middle)
    return (low + high) / 2


def split(parents, children, power):
    """Shares of all experts: those of the parents, each cut into `children` that fall as a power of their rank."""
    ranks = np.arange(1, children + 1, dtype=np.float64) ** -power
    return (parents[:, None] * (ranks / ranks.sum())[None, :]).reshape(-1)


def popularity(layer, n_experts, used):
    """The share of all picks that each expert of a layer is to have; an expert cannot be picked twice by a token."""
    source = json.loads(SOURCE.read_text(encoding="utf-8"))
    layers = source["layers"]
    parents = np.array(layers[min(layer, len(layers) - 1)]["share"])
    wanted = HOTTEST[0] if layer == 0 else HOTTEST[1]
    # Uniform shares hold used / n_experts; nothing that is less can be asked for.
    shares = split(parents, n_experts // len(parents), fitted_power(parents, n_experts // len(parents), used, wanted))
    return np.minimum(shares, 0.95 / used)


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


def norm(tensor, layer, shape):
    """The weights of a norm, of a layer's or the last."""
    weights = np.ones(shape, np.float32)
    if tensor.endswith("attn_norm.weight"):
        weights[:] = at(ATTENTION_NORM, layer)
        weights[:CONSTANT] = 0
    elif tensor.endswith("ffn_norm.weight"):
        weights[:] = FFN_NORM
        weights[:CONSTANT] = FFN_CONSTANT
    elif tensor.endswith(("attn_q_norm.weight", "attn_k_norm.weight")):
        weights[:] = FLAT
    elif tensor == "output_norm.weight":
        weights[:CONSTANT] = 0
    return weights


def router(noise, layer, used, deviation):
    """A router from random rows of `deviation`: the rows as they are for tokens, offsets on the constant values."""
    n_experts, hidden = noise.shape
    random = np.random.default_rng(SEED + layer)
    shares = random.permutation(popularity(layer, n_experts, used))
    rows = noise / np.float32(FFN_NORM)
    # Deviation of what depends on the token, and the sum that an offset of 1 needs; both before division by the root mean square.
    changing = deviation * np.sqrt(hidden - CONSTANT) * deviation * at(GROWTH, layer)
    rows[:, :CONSTANT] = (offsets(shares, used, random) * changing / (CONSTANT * FFN_CONSTANT * deviation))[:, None]
    return rows.astype(np.float32)


def embeddings(rows, constant):
    """Makes the first values of BF16 rows (as uint16) the constant."""
    bits = np.float32(constant).view(np.uint32)
    rows[:, :CONSTANT] = np.uint16((int(bits) + 0x8000) >> 16)
    return rows


def at(values, layer):
    """A layer's value; the last one for deeper layers."""
    return values[min(layer, len(values) - 1)]
