"""The table of golden/gemma3_text: norms as 1 + w around both blocks, two ropes, windows, scaled embeddings."""

from variants import Architecture, Variant, Without


def rope(full=1000000.0, local=10000.0, **scaling):
    return {
        "full_attention": {"rope_type": "default", "rope_theta": full} | scaling,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def hub_keys(config):
    """Two thetas and a pattern at the top level, as the published files have them."""
    full = dict(config["rope_parameters"]["full_attention"])
    theta = full.pop("rope_theta")
    return {
        "rope_theta": theta,
        "rope_local_base_freq": config["rope_parameters"]["sliding_attention"]["rope_theta"],
        "rope_scaling": None if full["rope_type"] == "default" else full,
        "sliding_window_pattern": config["layer_types"].index("full_attention") + 1,
        "cache_implementation": "hybrid",
    }


def plain_embedding(model):
    """Forgets the embeddings' factor sqrt(hidden_size)."""
    model.model.embed_tokens.embed_scale.fill_(1.0)


FEATURES = {
    "embed_scale": Without(patch=plain_embedding),
    "query_scalar": Without({"query_pre_attn_scalar": 8}),
    "activation": Without({"hidden_activation": "silu"}),
    "qk_norm": Without(fill={r"[qk]_norm\.weight": 0.0}),
    "post_attention_norm": Without(fill={r"post_attention_layernorm": 0.0}),
    "pre_feedforward_norm": Without(fill={r"pre_feedforward_layernorm": 0.0}),
    "post_feedforward_norm": Without(fill={r"post_feedforward_layernorm": 0.0}),
}

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=24,
        sliding_window=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_parameters=rope(),
        bos_token_id=2,
        eos_token_id=[1, 3],
        pad_token_id=0,
    ),
    init={"norm": (0.0, 0.4)},
    v4_extra=hub_keys,
    variants={
        "pattern_v4": Variant(
            "sliding_window_pattern 3, rope_theta and rope_local_base_freq, tied embeddings by default",
            {},
            FEATURES
            | {
                "window": Without({"layer_types": ["full_attention"] * 3, "rope_parameters": rope(10000.0)}),
                "local_theta": Without({"rope_parameters": rope(local=1000000.0)}),
                "global_theta": Without({"rope_parameters": rope(full=10000.0)}),
            },
            spelling="v4",
            extra={"tie_word_embeddings": ...},
            dtype="bfloat16",
            lengths=(20, 1),
        ),
        "pattern_6": Variant(
            "no pattern key: every sixth layer is full; query_pre_attn_scalar is head_dim, as in the small published ones",
            dict(
                hidden_size=24,
                intermediate_size=16,
                num_hidden_layers=7,
                query_pre_attn_scalar=8,
                num_attention_heads=3,
                layer_types=None,
            ),
            {
                "window": Without({"sliding_window": 128}),
                "pattern": Without({"layer_types": ["sliding_attention"] * 7}),
                "all_full": Without({"layer_types": ["full_attention"] * 7}),
            },
            spelling="v4",
            extra={"sliding_window_pattern": ...},
            dtype="bfloat16",
            lengths=(20, 1),
        ),
        "layer_types": Variant(
            "explicit layer_types, linear factor 8 on the full layers only, untied head, head_dim 10, two shards",
            dict(
                num_hidden_layers=2,
                head_dim=10,
                num_attention_heads=4,
                num_key_value_heads=2,
                layer_types=["full_attention", "sliding_attention"],
                sliding_window=5,
                tie_word_embeddings=False,
                rope_parameters=rope(100.0, 10.0, rope_type="linear", factor=8.0),
            ),
            {
                "factor": Without({"rope_parameters": rope(100.0, 10.0)}),
                "window": Without({"sliding_window": 128}),
                "window_6": Without({"sliding_window": 6}),
                "local_theta": Without(
                    {"rope_parameters": rope(100.0, 100.0, rope_type="linear", factor=8.0)}
                ),
                "qk_norm": FEATURES["qk_norm"],
            },
            dtype="float16",
            shards=2,
            lengths=(20, 1),
        ),
    },
)
