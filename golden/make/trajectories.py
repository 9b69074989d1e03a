"""Makes golden/train/trajectories.json: twenty optimizer steps per routing rule and architecture, by plain torch.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/cadre_moe.py && "$PY" golden/make/trajectories.py [RUN ...]

Runs start from the checkpoints of golden/cadre_moe/ and use the forward pass of cadre_moe.py, part by part, with what
training adds: whole batches, capacity, a bias that balances. Gradients are torch.autograd's, the optimizer is
torch.optim.AdamW; losses, clipping and decay are those that train_parity.py describes, and so are `batches`.

    picks      constants for the gradient; weights and losses are differentiable.
    balance    per layer  N * sum_i f_i P_i  with f_i = (picks of expert i) / (all picks), counted before any dropping.
               group_limited: P_i is the mean of s_i / sum_j s_j with s = sigmoid(logits). null_experts: every null expert
               counts the mean share of the null experts, N counts them too. top_2: f counts first picks only.
    capacity   ceil(pairs / experts * factor) pairs per expert over the whole batch, earlier tokens first; a dropped pair
               adds nothing.
    bias       after a step  b_i += rate * sign(mean_j count_j - count_i); it moves selection and nothing else.

Per run: `start`, `batches` [steps][B][L + 1], and of every step `loss`, `ce`, `balance`, `z`, `grad_norm` before its update.
`noise` is the largest difference of a loss, relative to it, from the same run in float64 with the same batches. The
batches are the first seed for which no pick of any step is nearer to a tie than MIN_GAP.
"""

import json
import math
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import cadre_moe as model
from common import ROOT, f32, fail, versions, write_json

OUT = ROOT / "golden" / "train" / "trajectories.json"
SETTINGS = {
    "steps": 20,
    "batch": 2,
    "length": 8,
    "lr": 3e-3,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "balance_coef": 0.01,
    "z_coef": 1e-3,
}
MIN_GAP = 1e-4
BIAS = "mlp.gate.e_score_correction_bias"

# Name of a run: its checkpoint, and what training adds.
RUNS = {
    "switch": {"start": "switch", "capacity": 1.0},
    "top_2": {"start": "pyramid"},
    "top_p": {"start": "top_p"},
    "null_experts": {"start": "null_experts"},
    "group_limited": {"start": "group_limited", "bias_rate": 0.01},
    "union": {"start": "union"},
    "shared_raw": {"start": "shared_raw"},
    "residual_sum": {"start": "residual_sum"},
    "residual_learned": {"start": "residual_learned"},
    "recurrent": {"start": "recurrent"},
    "recurrent_top_p": {"start": "recurrent_top_p"},
}


def router_logits(x, w, prefix, moe, state):
    """(logits [T, N], state of the recurrent router)."""
    width = moe["recurrent_router"]
    if width is None:
        return x @ w[f"{prefix}.gate.weight"].T, state
    cell = torch.nn.GRUCell(width, width, dtype=x.dtype)
    parts = {part: w[f"model.router_gru.{part}"] for part in cell.state_dict()}
    before = torch.zeros(len(x), width, dtype=x.dtype) if state is None else state
    state = torch.func.functional_call(cell, parts, (x @ w[f"{prefix}.router_in.weight"].T, before))
    return state @ w[f"{prefix}.gate.weight"].T, state


def balance_loss(router, logits, picks, n_real):
    """(the loss, picks per expert)."""
    n = logits.shape[1]
    first_only = router["name"] == "top_2"
    counted = [expert for token in picks for expert, _ in (token[:1] if first_only else token)]
    counts = torch.bincount(torch.tensor(counted), minlength=n).to(logits.dtype)
    shares = counts / counts.sum()
    if n > n_real:
        shares[n_real:] = shares[n_real:].mean()
    if router.get("score") == "sigmoid":
        s = logits.sigmoid()
        probs = s / s.sum(-1, keepdim=True)
    else:
        probs = logits.softmax(-1)
    return n * (shares * probs.mean(0)).sum(), counts


def mixture(x, w, layer, c, state, run, seen):
    """The feed-forward of a layer with experts over all tokens of the batch; (output, state)."""
    moe, prefix = c["cadre_moe"], f"model.layers.{layer}.mlp"
    router, n_real = moe["router"], moe["n_experts"][moe["layers"].index(layer)]
    logits, state = router_logits(x, w, prefix, moe, state)
    top_k = 2 if router["name"] == "top_2" else moe["top_k"]
    found = [model.pick(router, top_k, row, n_real, w.get(f"model.layers.{layer}.{BIAS}")) for row in logits]
    picks, gap = [token for token, _ in found], min(gap for _, gap in found)
    n_pairs = sum(expert < n_real for token in picks for expert, _ in token)
    slots = math.ceil(n_pairs / n_real * run["capacity"]) if "capacity" in run else n_pairs
    experts = torch.stack([model.swiglu(x, w, f"{prefix}.experts.{e}") for e in range(n_real)])
    free, rows, n_dropped = [slots] * n_real, [], 0
    for t, token in enumerate(picks):
        row = torch.zeros_like(x[t])
        for expert, weight in token:
            if expert >= n_real:
                continue
            if free[expert] == 0:
                n_dropped += 1
                continue
            free[expert] -= 1
            row = row + weight * experts[expert, t]
        rows.append(row)
    y = torch.stack(rows)
    balance, counts = balance_loss(router, logits, picks, n_real)
    z = logits.logsumexp(-1).square().mean()
    seen.append({"layer": layer, "balance": balance, "z": z, "counts": counts, "gap": gap, "dropped": n_dropped})
    if moe["shared_intermediate_size"] is not None:
        y = y + model.swiglu(x, w, f"{prefix}.shared_experts")
    if moe["residual"] is not None:
        beside, mix = model.swiglu(x, w, f"{prefix}.residual_mlp"), torch.ones(len(x), 2, dtype=x.dtype)
        if moe["residual"] == "learned":
            name = f"{prefix}.residual_coefficient"
            mix = (x @ w[f"{name}.weight"].T + w[f"{name}.bias"]).softmax(-1)
        y = mix[:, :1] * y + mix[:, 1:] * beside
    return y, state


def losses(batch, w, c, run):
    """The loss parts of one batch [B, L + 1], and what the routers did."""
    eps, state, seen = c["rms_norm_eps"], None, []
    length = batch.shape[1] - 1
    x = w["model.embed_tokens.weight"][batch[:, :-1].reshape(-1)]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        normed = model.rms_norm(x, w[f"{prefix}.input_layernorm.weight"], eps)
        sequences = normed.split(length)
        x = x + torch.cat([model.attention(one, w, f"{prefix}.self_attn", c) for one in sequences])
        normed = model.rms_norm(x, w[f"{prefix}.post_attention_layernorm.weight"], eps)
        if layer in c["cadre_moe"]["layers"]:
            y, state = mixture(normed, w, layer, c, state, run, seen)
        else:
            y = model.swiglu(normed, w, f"{prefix}.mlp")
        x = x + y
    head = w["model.embed_tokens.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    logits = model.rms_norm(x, w["model.norm.weight"], eps) @ head.T
    ce = F.cross_entropy(logits, batch[:, 1:].reshape(-1))
    balance = torch.stack([layer["balance"] for layer in seen]).mean()
    z = torch.stack([layer["z"] for layer in seen]).mean()
    loss = ce + SETTINGS["balance_coef"] * balance + SETTINGS["z_coef"] * z
    return {"loss": loss, "ce": ce, "balance": balance, "z": z}, seen


def train(run, seed, dtype=torch.float32):
    """(batches, steps, smallest gap, dropped pairs); steps end early when the gap is too small."""
    folder = ROOT / "golden" / "cadre_moe" / run["start"]
    c = json.loads((folder / "config.json").read_text())
    w = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    parameters = [value.requires_grad_() for name, value in w.items() if not name.endswith(BIAS)]
    s = SETTINGS
    generator = torch.Generator().manual_seed(seed)
    shape = (s["steps"], s["batch"], s["length"] + 1)
    batches = torch.randint(0, c["vocab_size"], shape, generator=generator)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": s["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=s["lr"], betas=tuple(s["betas"]), eps=s["eps"])
    steps, least, dropped = [], float("inf"), 0
    for batch in batches:
        optimizer.zero_grad()
        parts, seen = losses(batch, w, c, run)
        least = min([least] + [layer["gap"] for layer in seen])
        dropped += sum(layer["dropped"] for layer in seen)
        if least < MIN_GAP and dtype == torch.float32:
            break
        parts["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, s["clip_norm"])
        optimizer.step()
        for layer in seen if "bias_rate" in run else []:
            bias, counts = w[f"model.layers.{layer['layer']}.{BIAS}"], layer["counts"]
            bias += run["bias_rate"] * (counts.mean() - counts).sign()
        steps.append({name: part.item() for name, part in parts.items()} | {"grad_norm": norm.item()})
    return batches, steps, least, dropped


def make(name):
    run = RUNS[name]
    for seed in range(1, 500):
        batches, steps, gap, dropped = train(run, seed)
        if gap >= MIN_GAP:
            break
    else:
        fail(f"{name}: no seed below 500 gives clear picks")
    if ("capacity" in run) != (dropped > 0):
        fail(f"{name}: {dropped} pairs dropped")
    if not steps[-1]["loss"] < float("inf"):
        fail(f"{name}: the loss is not finite")
    _, exact, _, _ = train(run, seed, torch.float64)
    noise = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(steps, exact, strict=True))
    print(name, f"seed {seed}, gap {gap:.2g}, noise {noise:.2g}, loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}")
    return run | {
        "seed": seed,
        "noise": float(f"{noise:.2g}"),
        "batches": batches.tolist(),
        "steps": [{key: f32(value) for key, value in step.items()} for step in steps],
    }


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    wanted = sys.argv[1:]
    runs = {name: make(name) for name in wanted or RUNS}
    if not wanted:
        write_json(
            OUT,
            {
                "script": "golden/make/trajectories.py",
                "requirements": "golden/make/requirements.txt",
                "versions": versions(),
                "settings": SETTINGS,
                "runs": runs,
            },
        )
        OUT.chmod(0o644)


if __name__ == "__main__":
    main()
