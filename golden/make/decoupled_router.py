"""Makes golden/routing/decoupled.json: logits of the router that runs before the model (Read-ME), and their gradients.

    "$PY" golden/make/decoupled_router.py

Plain torch, written from the description in docs/guide/models.md: an embedding, layers of causal attention (norms on queries
and keys, rotary positions) and SwiGLU, a norm, a head. Values are float64, printed in full, named as the trainer names its
parameters (gate and up in one, gate first). `loss` is sum(logits * coefficients); `gradients` are its derivatives.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

torch.manual_seed(30)
torch.set_default_dtype(torch.float64)
SIZES = {"hidden_size": 6, "n_layers": 2, "n_heads": 3, "head_dim": 4, "intermediate_size": 5}
VOCAB, N_LOGITS, SEQ_LEN, THETA, EPS = 9, 4, 5, 100.0, 1e-6
TOKENS = [1, 4, 0, 8, 4, 3, 3, 7, 2, 5]

r, heads, dim, inner = SIZES["hidden_size"], SIZES["n_heads"], SIZES["head_dim"], SIZES["intermediate_size"]
shapes = {"embed_tokens": (VOCAB, r), "norm": (r,), "head": (N_LOGITS, r)}
for layer in range(SIZES["n_layers"]):
    parts = {
        "input_layernorm": (r,),
        "self_attn.q_proj": (heads * dim, r),
        "self_attn.k_proj": (heads * dim, r),
        "self_attn.v_proj": (heads * dim, r),
        "self_attn.o_proj": (r, heads * dim),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "post_attention_layernorm": (r,),
        "mlp.gate_up": (1, 2 * inner, r),
        "mlp.down": (1, r, inner),
    }
    shapes |= {f"layers.{layer}.{part}": shape for part, shape in parts.items()}
w = {
    name: (1 + 0.2 * torch.randn(shape) if len(shape) == 1 else 0.6 * torch.randn(shape)).requires_grad_()
    for name, shape in shapes.items()
}


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotate(x):
    """[T, heads, dim], the two halves of a head being the pairs."""
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), THETA ** (-torch.arange(0, dim, 2) / dim))
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def sequence(tokens):
    x, n = w["embed_tokens"][tokens], len(tokens)
    for layer in range(SIZES["n_layers"]):
        own = {name.removeprefix(f"layers.{layer}."): t for name, t in w.items() if name.startswith(f"layers.{layer}.")}
        h = norm(x, own["input_layernorm"])
        q, k, v = ((h @ own[f"self_attn.{part}_proj"].T).view(n, heads, dim) for part in "qkv")
        q, k = rotate(norm(q, own["self_attn.q_norm"])), rotate(norm(k, own["self_attn.k_norm"]))
        scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)
        x = x + mixed @ own["self_attn.o_proj"].T
        h = norm(x, own["post_attention_layernorm"])
        gate, up = (h @ own["mlp.gate_up"][0].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ own["mlp.down"][0].T
    return norm(x, w["norm"]) @ w["head"].T


out = torch.cat([sequence(torch.tensor(TOKENS[i : i + SEQ_LEN])) for i in range(0, len(TOKENS), SEQ_LEN)])
coefficients = torch.randn(out.shape)
(out * coefficients).sum().backward()
flat = lambda t: t.detach().flatten().tolist()
record = {
    "about": f"plain torch {torch.__version__.split('+')[0]}; rows of sequences of {SEQ_LEN} tokens",
    "vocab_size": VOCAB,
    "n_logits": N_LOGITS,
    "seq_len": SEQ_LEN,
    "rope_theta": THETA,
    "eps": EPS,
    "sizes": SIZES,
    "tokens": TOKENS,
    "coefficients": flat(coefficients),
    "values": {name: flat(t) for name, t in w.items()},
    "output": flat(out),
    "gradients": {name: flat(t.grad) for name, t in w.items()},
}
path = Path(__file__).parent.parent / "routing" / "decoupled.json"
path.write_text(json.dumps(record, indent=1) + "\n")
print(path)
