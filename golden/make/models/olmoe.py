"""The table of golden/olmoe: query and key norms over the whole projection, optional clipping of q, k and v."""

from variants import Architecture, Variant, Without, rope


def per_head_norms(model):
    """Normalises each head by its own mean square, as Qwen3 does."""
    import torch

    def normalise(module, inputs):
        x = inputs[0]
        shape = x.shape
        x = x.view(*shape[:-1], -1, 8)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (x.view(shape),)

    for layer in model.model.layers:
        layer.self_attn.q_norm.register_forward_pre_hook(normalise)
        layer.self_attn.k_norm.register_forward_pre_hook(normalise)


PER_HEAD = Without(patch=per_head_norms)
WEIGHTS = Without(fill={r"[qk]_norm\.weight": 1.0})

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        clip_qkv=None,
        attention_bias=False,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_parameters=rope(),
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    ),
    init={r"[qk]_norm\.weight": (1.0, 0.5)},
    v4_renames={"num_local_experts": "num_experts"},
    variants={
        "plain": Variant(
            "raw top-3 weights, one key head per query head",
            {},
            {"norm_weights": WEIGHTS, "per_head": PER_HEAD, "norm": Without({"norm_topk_prob": True})},
            spelling="v4",
            dtype="bfloat16",
        ),
        "clip": Variant(
            "clip_qkv 0.6, renormalised, 2 key heads for 4 query heads, tied embeddings, fused runtime names",
            dict(clip_qkv=0.6, norm_topk_prob=True, num_key_value_heads=2, tie_word_embeddings=True),
            {
                "clip": Without({"clip_qkv": None}),
                "norm": Without({"norm_topk_prob": False}),
                "per_head": PER_HEAD,
            },
            layout="runtime",
        ),
        "bias": Variant(
            "attention_bias on all four projections, top-1",
            dict(attention_bias=True, num_experts_per_tok=1, num_experts=5),
            {
                "bias": Without(fill={r"[qkv]_proj\.bias": 0.0}),
                "o_bias": Without(fill={r"o_proj\.bias": 0.0}),
            },
            dtype="float16",
            shards=2,
        ),
    },
)
