"""Makes golden/train/: five training steps of a tiny Qwen3-MoE by PyTorch and transformers, for holding our trainer to.

    PY="$(bash golden/make/env.sh)" && "$PY" golden/make/checkpoints.py qwen3_moe && "$PY" golden/make/train_parity.py

Two trajectories start from checkpoints of golden/qwen3_moe/:
    qwen3_moe_tiny       from tied_v4:  tied embeddings, weights renormalised over the top-2
    qwen3_moe_tiny_raw   from raw_topk: untied head, raw softmax weights of the top-3

What is computed, exactly
    batch      one entry of `batches` is [B, L+1] token ids; inputs are [:, :-1], targets are [:, 1:]; positions from 0,
               causal attention, no padding, T = B*L tokens. Everything is float32; no dropout, no gradient accumulation.
    ce         mean over the T tokens of -log softmax(logits)[target].
    balance    per MoE layer  N * sum_i f_i P_i,  f_i = (times expert i was picked) / (top_k * T), a constant for the
               gradient;  P_i = mean over tokens of softmax(router logits)_i over all N experts. A uniform router gives 1.
               Then the MEAN over the MoE layers.
    z          per MoE layer the mean over tokens of logsumexp(router logits)^2; then the MEAN over the MoE layers.
    loss       ce + balance_coef * balance + z_coef * z        (0.01 and 0.001)
               `balance` and `z` are recorded without their coefficients.
    clipping   global L2 norm over all parameters (a tied matrix counts once): g *= min(1, 1 / (norm + 1e-6)).
               `grad_norm` is the norm before clipping.
    AdamW      decoupled: p *= 1 - lr*weight_decay;  m = b1*m + (1-b1)*g;  v = b2*v + (1-b2)*g^2;
               p -= lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps), t from 1; lr constant, no warm-up.
    decay      matrices (rank >= 2: projections, experts, routers, embeddings, head). Norm weights are not decayed.

Files
    NAME.json         settings, `batches` and per step `loss`, `ce`, `balance`, `z`, `grad_norm`, all measured before that
                      step's update; `grad_l2`: L2 norm of the first step's gradient (before clipping) of EVERY tensor.
    NAME.safetensors  `grad.<tensor>`: that first gradient for selected tensors; `after.<tensor>`: the same tensors after
                      the last update. Tensor names are those of the checkpoint (experts apart, gate and up apart).

The batches are the first seed for which every expert of every layer gets tokens in every step (so that no convention
about experts without tokens matters) and no pick is nearer to a tie than MIN_GAP in router logits.
"""

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from common import ROOT, f32, fail, moe_layers, relative_difference, versions, write_json

OUT = ROOT / "golden" / "train"
SETTINGS = {
    "steps": 5,
    "batch": 4,
    "length": 16,
    "lr": 3e-3,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "balance_coef": 0.01,
    "z_coef": 1e-3,
}
MIN_GAP = 1e-3
RUNS = {"qwen3_moe_tiny": "tied_v4", "qwen3_moe_tiny_raw": "raw_topk"}
SELECTED = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.self_attn.k_norm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.experts.0.gate_proj.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight",
    "model.layers.0.mlp.experts.0.down_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.experts.3.gate_proj.weight",
    "model.layers.1.mlp.experts.3.up_proj.weight",
    "model.layers.1.mlp.experts.3.down_proj.weight",
]


def balance_loss(logits_tn, ids_tk):
    """N * sum_i f_i P_i with f over all top_k slots: 1 for a uniform router."""
    n_tokens, n_experts = logits_tn.shape
    counts = torch.bincount(ids_tk.reshape(-1), minlength=n_experts).to(logits_tn.dtype)
    share = counts / (ids_tk.shape[1] * n_tokens)
    return n_experts * (share * logits_tn.softmax(-1).mean(0)).sum()


def z_loss(logits_tn):
    """Mean of the squared logsumexp."""
    return logits_tn.logsumexp(-1).square().mean()


def check_losses():
    """The two router losses against numbers worked out by hand for six tokens and eight experts, top-2."""
    logits = torch.tensor(
        [
            [1.2, -0.3, 0.7, 2.1, -1.0, 0.4, 0.0, 1.6],
            [0.1, 0.9, -0.5, 1.1, 2.3, -0.7, 1.4, 0.2],
            [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3],
            [-1.2, 3.5, 0.3, -0.4, 0.6, 0.2, -2.0, 0.9],
            [0.5, 0.4, -0.1, 2.6, 0.3, 1.0, 0.8, 2.4],
            [1.1, -0.8, 0.6, 1.9, 0.7, -0.2, 1.3, -0.6],
        ]
    )
    ids = logits.topk(2, dim=-1).indices
    for name, value, want in [("balance", balance_loss(logits, ids), 1.254903), ("z", z_loss(logits), 11.427802)]:
        if abs(value.item() - want) > 2e-6:
            fail(f"{name} loss is {value.item()}, expected {want}")
    if abs(balance_loss(torch.zeros(4, 4), torch.tensor([[0], [1], [2], [3]])).item() - 1.0) > 1e-6:
        fail("the balance loss of a uniform router is not 1")


def losses(model, batch):
    """The loss parts of one batch [B, L+1], with gradients, and how close any token came to another pick."""
    routers = []
    hooks = [
        model.model.layers[i].mlp.gate.register_forward_hook(
            lambda _module, _inputs, output: routers.append((output[0], output[2]))
        )
        for i in moe_layers(model)
    ]
    try:
        logits = model(batch[:, :-1], use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    ce = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
    balance = torch.stack([balance_loss(scores, ids) for scores, ids in routers]).mean()
    z = torch.stack([z_loss(scores) for scores, _ in routers]).mean()
    total = ce + SETTINGS["balance_coef"] * balance + SETTINGS["z_coef"] * z

    top_k = model.config.num_experts_per_tok
    ordered = [scores.detach().sort(dim=-1, descending=True).values for scores, _ in routers]
    gap = min((s[:, top_k - 1] - s[:, top_k]).min().item() for s in ordered)
    n_experts = routers[0][0].shape[1]
    all_used = all(len(ids.unique()) == n_experts for _, ids in routers)
    return {"loss": total, "ce": ce, "balance": balance, "z": z}, gap, all_used


def checkpoint_tensors(model, value):
    """Applies `value` to every parameter and splits fused experts: {checkpoint tensor name: tensor}."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = value(parameter)
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2, dim=0)
                tensors[f"{prefix}{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}{expert}.up_proj.weight"] = up
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                tensors[f"{prefix}{expert}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return tensors


def train(variant, seed, experts="eager"):
    """Runs one trajectory; None when the batches of this seed come too near to a tie or leave an expert idle."""
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "golden" / "qwen3_moe" / variant,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation=experts,
    ).train()
    generator = torch.Generator().manual_seed(seed)
    shape = (SETTINGS["steps"], SETTINGS["batch"], SETTINGS["length"] + 1)
    batches = torch.randint(0, model.config.vocab_size, shape, generator=generator)

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS["lr"], betas=tuple(SETTINGS["betas"]), eps=SETTINGS["eps"])

    steps, first_gradient, smallest_gap = [], None, float("inf")
    for batch in batches:
        optimizer.zero_grad()
        parts, gap, all_used = losses(model, batch)
        smallest_gap = min(smallest_gap, gap)
        if gap < MIN_GAP or not all_used:
            return None
        parts["loss"].backward()
        if first_gradient is None:
            first_gradient = checkpoint_tensors(model, lambda p: p.grad.clone())
        norm = torch.nn.utils.clip_grad_norm_(parameters, SETTINGS["clip_norm"])
        optimizer.step()
        steps.append({name: f32(part.item()) for name, part in parts.items()} | {"grad_norm": f32(norm.item())})
    after = checkpoint_tensors(model, lambda p: p.detach().clone())
    return batches, steps, first_gradient, after, smallest_gap


def noise(result, variant, seed):
    """How far the same trajectory is when transformers sums the experts in another order (`batched_mm`).

    `loss` and `grad_norm`: largest difference relative to the value; `grad` and `after`: largest difference relative to
    the largest value of the tensor. A trainer that is right can be expected to be within a small multiple of these.
    `after` is the loosest: AdamW turns a gradient near zero into a full step of either sign.
    """
    _, steps, gradient, after, _ = result
    _, other_steps, other_gradient, other_after, _ = train(variant, seed, "batched_mm")

    def of_steps(key):
        return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(steps, other_steps, strict=True))

    def of_tensors(ours, theirs):
        return max(relative_difference(theirs[name], ours[name]) for name in ours)

    found = {
        "loss": of_steps("loss"),
        "grad_norm": of_steps("grad_norm"),
        "grad": of_tensors(gradient, other_gradient),
        "after": of_tensors(after, other_after),
    }
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    check_losses()
    OUT.mkdir(parents=True, exist_ok=True)
    runs = {}
    for name, variant in RUNS.items():
        for seed in range(1, 2000):
            result = train(variant, seed)
            if result is not None:
                break
        else:
            fail(f"no seed below 2000 gives {name} clear picks and busy experts")
        batches, steps, gradient, after, gap = result
        write_json(
            OUT / f"{name}.json",
            {
                "start": f"golden/qwen3_moe/{variant}",
                "settings": SETTINGS,
                "batches": batches.tolist(),
                "steps": steps,
                "grad_l2": {tensor: f32(g.norm().item()) for tensor, g in sorted(gradient.items())},
            },
        )
        picked = [tensor for tensor in SELECTED if tensor in gradient]
        tensors = {f"grad.{t}": gradient[t].contiguous() for t in picked}
        tensors |= {f"after.{t}": after[t].contiguous() for t in picked}
        save_file(tensors, OUT / f"{name}.safetensors")
        (OUT / f"{name}.safetensors").chmod(0o644)
        runs[name] = {
            "start": variant,
            "seed": seed,
            "routing_gap": float(f"{gap:.3g}"),
            "noise": noise(result, variant, seed),
        }
        print(name, runs[name])
        for step in steps:
            print("  ", step)
    write_json(
        OUT / "MANIFEST.json",
        {
            "script": "golden/make/train_parity.py",
            "requirements": "golden/make/requirements.txt",
            "versions": versions(),
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
