"""Makes golden/cadre_moe/: tiny random checkpoints of Cadre's own model type, with what plain torch computes from them.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/cadre_moe.py [[--add] VARIANT ...]

Without names all variants replace the old ones; names alone are a trial; with `--add` these variants join the others.

No library knows this model type, so the model is written out here, from the description of the format in
docs/guide/models.md and the papers named there, one function per part and no thought of speed: every expert computes every
token, attention is a masked softmax, an expert of attention is that over some of the tokens, the recurrent router is
torch.nn.GRUCell, the router before the model a decoder of its own. The folders, expected.json and MANIFEST.json have the form that checkpoints.py describes; `routing` lists
null picks too, with weight 0, and leaves out attention. Cases are computed over the whole sequence; the script checks that
every prefix gives the same numbers.

`without` holds how far the logits move when one thing is computed otherwise; the script fails when that is under 1e-2.
"""

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common import ROOT, f32_list, fail, relative_difference, versions, write_json

MIN_GAP = 1e-3
VISIBLE = 1e-2
LENGTHS = (11, 1)

BASE = {
    "architectures": ["CadreMoeForCausalLM"],
    "model_type": "cadre_moe",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "dtype": "float32",
}

MOE = {
    "layers": [0, 1, 2],
    "n_experts": [6, 6, 6],
    "n_null": 0,
    "top_k": 2,
    "intermediate_size": 12,
    "router": {"name": "top_k", "norm_topk_prob": True},
    "shared_intermediate_size": None,
    "residual": None,
    "residual_intermediate_size": None,
    "recurrent_router": None,
}

# A router before the model.
BEFORE = {"hidden_size": 24, "n_layers": 1, "n_heads": 4, "head_dim": 6, "intermediate_size": 20, "per_layer": False}
BEFORE_EACH = BEFORE | {"n_layers": 2, "per_layer": True}

HEADS = {"n_experts": 4, "top_k": 2, "eps": 0.5}
NO_MOE = {"layers": [], "n_experts": [], "top_k": None, "intermediate_size": None, "router": None}

GROUPS = {
    "name": "group_limited", "score": "sigmoid", "n_groups": 3, "keep_groups": 2, "group_score": "sum_of_best_two",
    "norm_topk_prob": True, "scale": 2.5, "bias": True,
}  # fmt: skip
SOFT = {"name": "dense_to_sparse", "temperature": 0.7, "threshold": 0.05, "stage": "soft"}

# What a variant changes in MOE, and what must show: edits of the configuration that leave something out.
VARIANTS = {
    "top_p": (
        "dynamic top-p: ragged picks, raw probabilities",
        {"router": {"name": "top_p", "top_p": 0.6}, "top_k": None},
        {"mass": {"router": {"name": "top_p", "top_p": 0.3}}, "ragged": {"router": {"name": "top_k", "norm_topk_prob": False}, "top_k": 2}},
    ),
    "null_experts": (
        "AdaMoE: null experts, weights over the real picks",
        {"router": {"name": "null_experts"}, "n_null": 4, "top_k": 3},
        {"all_picks_in_sum": {"router": {"name": "null_experts", "over_all": True}}},
    ),
    "shared_raw": (
        "DeepSeekMoE: shared experts without a gate, raw softmax",
        {"router": {"name": "top_k", "norm_topk_prob": False}, "shared_intermediate_size": 24},
        {"shared": {"shared_intermediate_size": None}, "raw": {"router": {"name": "top_k", "norm_topk_prob": True}}},
    ),
    "group_limited": (
        "sigmoid, bias on the selection, groups, scale, shared expert",
        {"router": GROUPS, "shared_intermediate_size": 8},
        {
            "bias": {"router": GROUPS | {"bias": False}},
            "groups": {"router": GROUPS | {"n_groups": 1, "keep_groups": 1}},
            "scale": {"router": GROUPS | {"scale": 1.0}},
        },
    ),
    "residual_sum": (
        "PR-MoE as in the paper: a feed-forward beside a top-1 expert, added",
        {"router": {"name": "switch"}, "top_k": 1, "residual": "sum", "residual_intermediate_size": 20},
        {"residual": {"residual": None}},
    ),
    "residual_learned": (
        "PR-MoE as in the code: learned coefficients",
        {"residual": "learned", "residual_intermediate_size": 20, "shared_intermediate_size": 8},
        {"residual": {"residual": None}, "coefficients": {"residual": "sum"}},
    ),
    "pyramid": (
        "layers with different numbers of experts, one dense layer",
        {"layers": [0, 2], "n_experts": [3, 7], "router": {"name": "top_2"}},
        {"norm": {"router": {"name": "top_k", "norm_topk_prob": False}}},
    ),
    "pyramid_null": (
        "uneven layers with null experts: the same id is null in one layer and real in another",
        {"n_experts": [2, 4, 6], "n_null": 2, "router": {"name": "null_experts"}, "top_k": 3},
        {"all_picks_in_sum": {"router": {"name": "null_experts", "over_all": True}}},
    ),
    "recurrent": (
        "RMoE: a GRU along depth, past a dense layer",
        {"layers": [0, 2, 3], "recurrent_router": 10},
        {"recurrence": {"recurrent_router": 10, "forgets": True}},
    ),
    "recurrent_top_p": (
        "a recurrent router with ragged picks and a tied head",
        {"recurrent_router": 7, "router": {"name": "top_p", "top_p": 0.5}, "top_k": None},
        {"recurrence": {"recurrent_router": 7, "forgets": True}},
    ),
    "switch": (
        "top-1 with its raw probability",
        {"router": {"name": "switch"}, "top_k": 1},
        {"raw": {"router": {"name": "top_k", "norm_topk_prob": True}}},
    ),
    "dense_to_sparse_soft": (
        "EvoMoE's gate while it is soft",
        {"router": SOFT, "top_k": None},
        {"temperature": {"router": SOFT | {"temperature": 1.0}}, "threshold": {"router": SOFT | {"threshold": 0.2}}},
    ),
    "dense_to_sparse_hard": (
        "EvoMoE's gate when it is hard",
        {"router": SOFT | {"stage": "hard"}, "top_k": 1},
        {"temperature": {"router": SOFT | {"stage": "hard", "temperature": 1.0}}},
    ),
    "union": (
        "UoE's feed-forward: experts summed, with a scalar per token",
        {"router": {"name": "union", "eps": 0.5}, "top_k": 3},
        {"scalar": {"router": {"name": "union", "eps": 0.0}}},
    ),
    "sparse_mixer": (
        "PhiMoE's router",
        {"router": {"name": "sparse_mixer", "eps": 0.2}},
        {"threshold": {"router": {"name": "sparse_mixer", "eps": 0.9}}},
    ),
    "uniform": (
        "random experts: no router, draws from seed, layer and position",
        {"router": {"name": "uniform", "seed": 2**63 + 11}, "top_k": 2},
        {"seed": {"router": {"name": "uniform", "seed": 12}}},
    ),
    "decoupled": (
        "Read-ME: one router before the model, the best expert in all layers, with weight 1",
        {"top_k": 1, "decoupled_router": BEFORE},
        {"attention": {"decoupled_router": BEFORE | {"mutes": "self_attn"}}, "feed_forward": {"decoupled_router": BEFORE | {"mutes": "mlp"}}},
    ),
    "decoupled_per_layer": (
        "a router before the model of two layers, picks for each of uneven layers, raw softmax, past a dense layer",
        {
            "layers": [0, 2], "n_experts": [4, 7], "router": {"name": "top_k", "norm_topk_prob": False},
            "shared_intermediate_size": 8, "decoupled_router": BEFORE_EACH,
        },
        {
            "raw": {"router": {"name": "top_k", "norm_topk_prob": True}},
            "attention": {"decoupled_router": BEFORE_EACH | {"mutes": "self_attn"}},
        },
    ),
    "attention_experts": (
        "UoE whole: experts of attention, and of the feed-forward",
        {"router": {"name": "union", "eps": 0.5}, "top_k": 3, "attention_experts": HEADS},
        {
            "scalar": {"attention_experts": HEADS | {"eps": 0.0}},
            "positions": {"attention_experts": HEADS | {"absolute": True}},
            "picks": {"attention_experts": HEADS | {"top_k": 4}},
        },
    ),
    "attention_experts_dense": (
        "experts of attention that have two heads of queries to one of keys, and dense feed-forwards",
        NO_MOE | {"attention_experts": {"n_experts": 2, "top_k": 1, "eps": 1.0}},
        {"experts": {"attention_experts": None}},
    ),
}  # fmt: skip

CONFIG = {
    "recurrent": {"num_hidden_layers": 4},
    "recurrent_top_p": {"tie_word_embeddings": True},
    "attention_experts": {"num_key_value_heads": 4},
}
BF16 = {"pyramid", "residual_learned", "attention_experts_dense"}


# ---- the model -------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def swiglu(x, w, prefix):
    hidden = F.silu(x @ w[f"{prefix}.gate_proj.weight"].T) * (x @ w[f"{prefix}.up_proj.weight"].T)
    return hidden @ w[f"{prefix}.down_proj.weight"].T


def rotate(x, theta, positions):
    """Rotary positions over [T, heads, dim], the two halves of a head being the pairs."""
    dim = x.shape[-1]
    angles = torch.outer(positions.float(), theta ** (-torch.arange(0, dim, 2).float() / dim))
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attention(x, w, prefix, c, positions=None):
    n, dim = len(x), c["head_dim"]
    heads = {name: (x @ w[f"{prefix}.{name}_proj.weight"].T).view(n, -1, dim) for name in "qkv"}
    for name in "qk":
        heads[name] = rms_norm(heads[name], w[f"{prefix}.{name}_norm.weight"], c["rms_norm_eps"])
        heads[name] = rotate(heads[name], c["rope_theta"], torch.arange(n) if positions is None else positions)
    repeat = c["num_attention_heads"] // c["num_key_value_heads"]
    k, v = (heads[name].repeat_interleave(repeat, dim=1) for name in "kv")
    scores = torch.einsum("qhd,khd->hqk", heads["q"], k) / dim**0.5
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)
    return mixed @ w[f"{prefix}.o_proj.weight"].T


def attention_experts(x, w, prefix, c, seen):
    """Attention cut by heads: each expert is attention among the tokens that picked it, whose positions count only them."""
    options = c["cadre_moe"]["attention_experts"]
    n, rule = options["n_experts"], {"name": "union", "eps": options["eps"]}
    cut = c | {key: c[key] // n for key in ("num_attention_heads", "num_key_value_heads")}
    logits = x @ w[f"{prefix}.gate.weight"].T
    decided = [pick(rule, options["top_k"], row, n, None) for row in logits]
    y = torch.zeros_like(x)
    for expert in range(n):
        weights = {t: dict(picked)[expert] for t, (picked, _) in enumerate(decided) if expert in dict(picked)}
        if not weights:
            continue
        rows = torch.tensor(list(weights))
        own = {name: tensor for name, tensor in w.items() if name.startswith(f"{prefix}.")}
        for name in "qkv":
            own[f"{prefix}.{name}_proj.weight"] = w[f"{prefix}.{name}_proj.weight"].chunk(n)[expert]
        own[f"{prefix}.o_proj.weight"] = w[f"{prefix}.o_proj.weight"].chunk(n, dim=1)[expert]
        out = attention(x[rows], own, prefix, cut, rows if options.get("absolute") else None)
        y[rows] += torch.stack(list(weights.values()))[:, None] * out
    seen.append({"gap": min(gap for _, gap in decided)})
    return y


def split_mix(state):
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def draws(seed, layer, n_tokens, n_experts):
    """Numbers from 0 to 1 that a token gets in place of logits."""

    def one(position, expert):
        state = split_mix(seed)
        for value in (layer, position, expert):
            state = split_mix(state ^ value)
        return (state >> 40) / 2**24

    return torch.tensor([[one(t, e) for e in range(n_experts)] for t in range(n_tokens)])


def pick(router, top_k, logits, n_real, bias):
    """The picks of one token: [(expert, weight)], best first, and how near the decision is to tipping over."""

    def ranked(keys):
        """Ids by falling key."""
        return keys.argsort(descending=True, stable=True).tolist()

    def gap(keys, n):
        """The smallest step among the best n keys and the one after them."""
        best = keys.sort(descending=True).values[: n + 1]
        return (best[:-1] - best[1:]).min().item() if len(best) > 1 else float("inf")

    name, p = router["name"], logits.softmax(-1)
    if name in ("top_k", "switch", "top_2"):
        ids = ranked(logits)[:top_k]
        norm = name == "top_2" or (name == "top_k" and router["norm_topk_prob"])
        total = p[ids].sum() if norm else 1.0
        return [(i, p[i] / total) for i in ids], gap(logits, top_k)
    if name == "top_p":
        ids, mass, margin = [], 0.0, float("inf")
        for i in ranked(p):
            ids.append(i)
            mass += p[i].item()
            margin = min(margin, abs(mass - router["top_p"]))
            if mass > router["top_p"]:
                break
        return [(i, p[i]) for i in ids], min(margin, gap(p, len(ids)))
    if name == "null_experts":
        ids = ranked(logits)[:top_k]
        counted = ids if router.get("over_all") else [i for i in ids if i < n_real]
        total = p[counted].sum() if counted else torch.tensor(1.0)
        return [(i, p[i] / total if i < n_real else torch.tensor(0.0)) for i in ids], gap(logits, top_k)
    if name == "dense_to_sparse":
        y = (logits / router["temperature"]).softmax(-1)
        ids = ranked(y)
        margin = (y - router["threshold"]).abs().min().item()
        if router["stage"] == "hard":
            return [(ids[0], y[ids[0]])], gap(y, 1)
        ids = [i for i in ids if y[i] > router["threshold"]] or ids[:1]
        return [(i, y[i]) for i in ids], min(margin, gap(y, len(ids)))
    if name == "union":
        ids = ranked(logits)[:top_k]
        mass = p[ids].sum()
        return [(i, mass / (mass + router["eps"])) for i in ids], gap(logits, top_k)
    if name == "sparse_mixer":
        left, picked, margin = logits.clone(), [], gap(logits, 2)
        for _ in range(2):
            best = left.argmax()
            # Experts that are too far below the best one take no part in its softmax.
            far = (left[best] - logits) / logits.abs().clamp(min=left[best])
            margin = min(margin, (far - 2 * router["eps"]).abs().min().item())
            near = left.masked_fill(far > 2 * router["eps"], float("-inf"))
            picked.append((best.item(), near.softmax(-1)[best]))
            left[best] = float("-inf")
        return picked, margin
    if name == "uniform":
        return [(i, torch.tensor(1.0 / top_k)) for i in ranked(logits)[:top_k]], float("inf")  # draws are exact
    assert name == "group_limited"
    scores = logits.sigmoid() if router["score"] == "sigmoid" else p
    keys = scores + bias if router["bias"] else scores
    groups = keys.view(router["n_groups"], -1)
    best = groups.topk(2, dim=-1).values.sum(-1) if router["group_score"] == "sum_of_best_two" else groups.amax(-1)
    margin = gap(best, router["keep_groups"]) if router["keep_groups"] < router["n_groups"] else float("inf")
    kept = ranked(best)[: router["keep_groups"]]
    mask = torch.full_like(groups, float("-inf"))
    mask[kept] = 0.0
    keys = keys + mask.flatten()
    ids = ranked(keys)[:top_k]
    total = scores[ids].sum() if router["norm_topk_prob"] else 1.0
    return [(i, scores[i] / total * router["scale"]) for i in ids], min(margin, gap(keys, top_k))


def logits_before(tokens, w, c):
    """The logits [T, n] of a router that runs before the model, from tokens alone; None without one."""
    sizes = c["cadre_moe"].get("decoupled_router")
    if sizes is None:
        return None
    own = c | {"head_dim": sizes["head_dim"], "num_attention_heads": sizes["n_heads"], "num_key_value_heads": sizes["n_heads"]}
    x, eps = w["model.router.embed_tokens.weight"][torch.tensor(tokens)], c["rms_norm_eps"]
    for layer in range(sizes["n_layers"]):
        prefix = f"model.router.layers.{layer}"
        mixed = attention(rms_norm(x, w[f"{prefix}.input_layernorm.weight"], eps), w, f"{prefix}.self_attn", own)
        x = x + mixed * (sizes.get("mutes") != "self_attn")
        inner = swiglu(rms_norm(x, w[f"{prefix}.post_attention_layernorm.weight"], eps), w, f"{prefix}.mlp")
        x = x + inner * (sizes.get("mutes") != "mlp")
    return rms_norm(x, w["model.router.norm.weight"], eps) @ w["model.router.head.weight"].T


def part_of(logits, layer, c):
    """A layer's columns of the logits that were made before the model."""
    moe = c["cadre_moe"]
    if not moe["decoupled_router"]["per_layer"]:
        return logits
    at, counts = moe["layers"].index(layer), [n + moe["n_null"] for n in moe["n_experts"]]
    return logits[:, sum(counts[:at]) : sum(counts[: at + 1])]


def mixture(x, w, layer, c, state, seen, before=None):
    """The feed-forward of a layer with experts. `state` is what routers below left, or None; returns (output, state).
    `before` are the logits of a router that runs before the model, of all layers."""
    moe, prefix = c["cadre_moe"], f"model.layers.{layer}.mlp"
    n_real = moe["n_experts"][moe["layers"].index(layer)]
    router = moe["router"]
    if router["name"] == "uniform":
        logits = draws(router["seed"], layer, len(x), n_real)
    elif before is not None:
        logits = part_of(before, layer, c)
    elif (width := moe["recurrent_router"]) is not None:
        cell = torch.nn.GRUCell(width, width)
        cell.load_state_dict({part: w[f"model.router_gru.{part}"] for part in cell.state_dict()})
        before = torch.zeros(len(x), width) if state is None or moe.get("forgets") else state
        with torch.no_grad():
            state = cell(x @ w[f"{prefix}.router_in.weight"].T, before)
        logits = state @ w[f"{prefix}.gate.weight"].T
    else:
        logits = x @ w[f"{prefix}.gate.weight"].T
    bias = w.get(f"{prefix}.gate.e_score_correction_bias")
    top_k = 2 if router["name"] == "top_2" else moe["top_k"]
    experts = torch.stack([swiglu(x, w, f"{prefix}.experts.{e}") for e in range(n_real)])
    y, picks, gaps = torch.zeros_like(x), [], []
    for t in range(len(x)):
        picked, gap = pick(router, top_k, logits[t], n_real, bias)
        picks.append(picked)
        gaps.append(gap)
        for expert, weight in picked:
            if expert < n_real:
                y[t] += weight * experts[expert, t]
    seen.append({"layer": layer, "picks": picks, "gap": min(gaps)})
    if moe["shared_intermediate_size"] is not None:
        y = y + swiglu(x, w, f"{prefix}.shared_experts")
    if moe["residual"] is not None:
        beside = swiglu(x, w, f"{prefix}.residual_mlp")
        mix = torch.ones(len(x), 2)
        if moe["residual"] == "learned":
            name = f"{prefix}.residual_coefficient"
            mix = (x @ w[f"{name}.weight"].T + w[f"{name}.bias"]).softmax(-1)
        y = mix[:, :1] * y + mix[:, 1:] * beside
    return y, state


def forward(tokens, w, c):
    """(logits [T, vocab], routing of every layer with experts; of attention only how near it is to tipping over)."""
    eps, state, seen = c["rms_norm_eps"], None, []
    x = w["model.embed_tokens.weight"][torch.tensor(tokens)]
    before = logits_before(tokens, w, c)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, w[f"{prefix}.input_layernorm.weight"], eps)
        if c["cadre_moe"].get("attention_experts"):
            x = x + attention_experts(normed, w, f"{prefix}.self_attn", c, seen)
        else:
            x = x + attention(normed, w, f"{prefix}.self_attn", c)
        normed = rms_norm(x, w[f"{prefix}.post_attention_layernorm.weight"], eps)
        if layer in c["cadre_moe"]["layers"]:
            y, state = mixture(normed, w, layer, c, state, seen, before)
        else:
            y = swiglu(normed, w, f"{prefix}.mlp")
        x = x + y
    head = w["model.embed_tokens.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T, seen


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def shapes(c):
    """Names and shapes of all tensors."""
    d, dim, moe = c["hidden_size"], c["head_dim"], c["cadre_moe"]
    n_q, n_kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    all_of = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        all_of["lm_head.weight"] = (c["vocab_size"], d)

    def ffn(prefix, width):
        all_of[f"{prefix}.gate_proj.weight"] = all_of[f"{prefix}.up_proj.weight"] = (width, d)
        all_of[f"{prefix}.down_proj.weight"] = (d, width)

    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            all_of[f"{prefix}.{norm}.weight"] = (d,)
        for name, n in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            all_of[f"{prefix}.self_attn.{name}_proj.weight"] = (n, d)
        all_of[f"{prefix}.self_attn.o_proj.weight"] = (d, n_q)
        for name in "qk":
            all_of[f"{prefix}.self_attn.{name}_norm.weight"] = (dim,)
        if moe.get("attention_experts"):
            all_of[f"{prefix}.self_attn.gate.weight"] = (moe["attention_experts"]["n_experts"], d)
        mlp = f"{prefix}.mlp"
        if layer not in moe["layers"]:
            ffn(mlp, c["intermediate_size"])
            continue
        n, width = moe["n_experts"][moe["layers"].index(layer)], moe["recurrent_router"]
        for expert in range(n):
            ffn(f"{mlp}.experts.{expert}", moe["intermediate_size"])
        if moe["router"]["name"] != "uniform" and not moe.get("decoupled_router"):
            all_of[f"{mlp}.gate.weight"] = (n + moe["n_null"], width or d)
        if moe["router"].get("bias"):
            all_of[f"{mlp}.gate.e_score_correction_bias"] = (n,)
        if width is not None:
            all_of[f"{mlp}.router_in.weight"] = (width, d)
        if moe["shared_intermediate_size"] is not None:
            ffn(f"{mlp}.shared_experts", moe["shared_intermediate_size"])
        if moe["residual"] is not None:
            ffn(f"{mlp}.residual_mlp", moe["residual_intermediate_size"])
        if moe["residual"] == "learned":
            all_of[f"{mlp}.residual_coefficient.weight"], all_of[f"{mlp}.residual_coefficient.bias"] = (2, d), (2,)
    if (width := moe["recurrent_router"]) is not None:
        for part in ("ih", "hh"):
            all_of[f"model.router_gru.weight_{part}"] = (3 * width, width)
            all_of[f"model.router_gru.bias_{part}"] = (3 * width,)
    if sizes := moe.get("decoupled_router"):
        r, heads, inner = sizes["hidden_size"], sizes["n_heads"] * sizes["head_dim"], sizes["intermediate_size"]
        all_of["model.router.embed_tokens.weight"], all_of["model.router.norm.weight"] = (c["vocab_size"], r), (r,)
        counts = [n + moe["n_null"] for n in moe["n_experts"]]
        all_of["model.router.head.weight"] = (sum(counts) if sizes["per_layer"] else counts[0], r)
        for layer in range(sizes["n_layers"]):
            prefix = f"model.router.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                all_of[f"{prefix}.{norm}.weight"] = (r,)
            for name in "qkv":
                all_of[f"{prefix}.self_attn.{name}_proj.weight"] = (heads, r)
            all_of[f"{prefix}.self_attn.o_proj.weight"] = (r, heads)
            for name in "qk":
                all_of[f"{prefix}.self_attn.{name}_norm.weight"] = (sizes["head_dim"],)
            for name in ("gate", "up"):
                all_of[f"{prefix}.mlp.{name}_proj.weight"] = (inner, r)
            all_of[f"{prefix}.mlp.down_proj.weight"] = (r, inner)
    return all_of


def spread(name, shape, tied):
    """(mean, deviation): large enough that every part matters."""
    if "norm.weight" in name or "layernorm" in name:
        return 1.0, 0.2
    if len(shape) == 1:
        return 0.0, 0.3
    if name == "model.embed_tokens.weight":
        return 0.0, 0.3 if tied else 1.0
    scale = {"gate.weight": 2.0, "router_in.weight": 2.0, "router_gru": 1.5, "coefficient.weight": 2.0}
    factor = next((factor for part, factor in scale.items() if part in name), 1.0)
    if name.endswith("mlp.gate.weight") and shape[1] < 16:
        factor = 4.0  # the state of a recurrence is below 1, so that its logits would be small
    return 0.0, factor * shape[-1] ** -0.5


def tensors_of(c, seed, dtype):
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, shape in sorted(shapes(c).items()):
        mean, deviation = spread(name, shape, c["tie_word_embeddings"])
        made[name] = (mean + deviation * torch.randn(shape, generator=generator)).to(dtype)
    return made


def prompts(vocab_size):
    generator = torch.Generator().manual_seed(7)
    for length in LENGTHS:
        yield torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def expect(c, w):
    """(cases for expected.json, logits, smallest gap)."""
    cases, all_logits, least = [], [], float("inf")
    for tokens in prompts(c["vocab_size"]):
        logits, seen = forward(tokens, w, c)
        least = min([least] + [layer["gap"] for layer in seen])
        rows = [
            {
                "layer": layer["layer"],
                "experts": [[expert for expert, _ in token] for token in layer["picks"]],
                "weights": [f32_list([float(weight) for _, weight in token]) for token in layer["picks"]],
            }
            for layer in seen
            if "picks" in layer
        ]
        cases.append({"tokens": tokens, "logits": f32_list(logits), "routing": rows})
        all_logits.append(logits)
        for n in range(1, len(tokens)):
            prefix, _ = forward(tokens[:n], w, c)
            if (off := relative_difference(prefix, logits[:n])) > 1e-5:
                fail(f"a prefix of {n} tokens differs by {off:.2e}")
    return cases, all_logits, least


def check_visible(name, c, w, logits, edits):
    seen = {}
    for feature, edit in edits.items():
        other = copy.deepcopy(c)
        other["cadre_moe"] |= edit
        seen[feature] = max(
            relative_difference(forward(tokens, w, other)[0], ours)
            for tokens, ours in zip(prompts(c["vocab_size"]), logits)
        )
        if not seen[feature] > VISIBLE:
            fail(f"{name}: leaving out {feature} moves the logits by {seen[feature]:.2e} only")
    return {feature: float(f"{difference:.2g}") for feature, difference in seen.items()}


def make_variant(name, folder):
    purpose, edit, edits = VARIANTS[name]
    c = BASE | CONFIG.get(name, {})
    c["cadre_moe"] = MOE | edit
    dtype = torch.bfloat16 if name in BF16 else torch.float32
    c["dtype"] = str(dtype).removeprefix("torch.")
    for seed in range(1, 4000):
        w = {key: value.float() for key, value in tensors_of(c, seed, dtype).items()}
        gap = min(min(layer["gap"] for layer in forward(tokens, w, c)[1]) for tokens in prompts(c["vocab_size"]))
        if gap > MIN_GAP:
            break
    else:
        fail(f"{name}: no seed gives a gap above {MIN_GAP}")
    folder.mkdir(parents=True)
    save_file(tensors_of(c, seed, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", c)
    w = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    cases, logits, gap = expect(c, w)
    write_json(folder / "expected.json", {"cases": cases})
    visible = check_visible(name, c, w, logits, edits)
    for file in folder.iterdir():
        file.chmod(0o644)
    return {
        "purpose": purpose,
        "dtype": c["dtype"],
        "seed": seed,
        "moe_layers": c["cadre_moe"]["layers"],
        "routing_gap": float(f"{gap:.3g}") if gap != float("inf") else None,
        "bytes": sum(f.stat().st_size for f in folder.iterdir()),
        "without": visible,
    }


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out, variants = ROOT / "golden" / "cadre_moe", {}
    adds = sys.argv[1:2] == ["--add"]
    wanted = sys.argv[2:] if adds else sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted or VARIANTS:
            variants[name] = make_variant(name, Path(scratch) / name)
            print(name, variants[name], flush=True)
        if wanted and not adds:
            return  # a trial
        if adds:
            variants = json.loads((out / "MANIFEST.json").read_text())["variants"] | variants
        else:
            shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(scratch, out, dirs_exist_ok=True)
    manifest = {
        "script": "golden/make/cadre_moe.py",
        "requirements": "golden/make/requirements.txt",
        "versions": versions(),
        "expected": "float32, every expert over every token, one thread",
        "variants": variants,
    }
    write_json(out / "MANIFEST.json", manifest)


if __name__ == "__main__":
    main()
