"""The table of golden/glm4_moe: sigmoid routing with a correction bias on a plain attention with partial rope."""

from models.deepseek_v3 import BIAS, SHARED
from variants import Architecture, Variant, Without


def rope(theta=10000.0, partial_rotary_factor=0.5, **scaling):
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial_rotary_factor} | scaling


PARTIAL = Without({"rope_parameters": rope(partial_rotary_factor=1.0)})
QKV_BIAS = Without(fill={r"[qkv]_proj\.bias": 0.0})

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        attention_bias=True,
        use_qk_norm=False,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_parameters=rope(),
        bos_token_id=None,
        eos_token_id=[1, 2, 3],
        pad_token_id=1,
    ),
    init={"e_score_correction_bias": (0.0, 0.4)},
    v4_renames={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    variants={
        "plain": Variant(
            "layer 0 dense, half of each head rotated, biases on q, k and v but not o, no q/k norms",
            {},
            {
                "bias": BIAS,
                "shared": SHARED,
                "partial": PARTIAL,
                "qkv_bias": QKV_BIAS,
                "norm": Without({"norm_topk_prob": False}),
            },
            spelling="v4",
            dtype="bfloat16",
        ),
        "qk_norm": Variant(
            "use_qk_norm, routed_scaling_factor 2.5, raw weights, two shared experts, every layer sparse",
            dict(
                use_qk_norm=True,
                attention_bias=False,
                first_k_dense_replace=0,
                routed_scaling_factor=2.5,
                norm_topk_prob=False,
                n_shared_experts=2,
            ),
            {
                "norms": Without(fill={r"[qk]_norm\.weight": 1.0}),
                "scale": Without({"routed_scaling_factor": 1.0}),
                "bias": BIAS,
                "norm": Without({"norm_topk_prob": True}),
            },
        ),
        "mtp": Variant(
            "a multi-token-prediction block behind the last layer, which is not part of the model; 3 heads on 1",
            dict(hidden_size=30, num_attention_heads=3, num_key_value_heads=1, head_dim=8, n_routed_experts=4),
            {"bias": BIAS, "partial": PARTIAL},
            dtype="bfloat16",
            mtp=True,
            shards=2,
        ),
    },
)
