"""The table of golden/qwen3: query and key norms per head, head_dim apart from hidden_size / heads."""

from variants import Architecture, Variant, Without, rope


NORMS = Without(fill={r"[qk]_norm\.weight": 1.0})

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        attention_bias=False,
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        use_sliding_window=False,
        max_window_layers=2,
        tie_word_embeddings=False,
        rope_parameters=rope(1000000.0),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    ),
    init={r"[qk]_norm\.weight": (1.0, 0.5)},
    variants={
        "plain": Variant("head_dim 12, untied head", {}, {"norms": NORMS}, dtype="bfloat16"),
        "tied_v4": Variant(
            "tied embeddings, 3 query heads on 1 key head of 10",
            dict(hidden_size=30, num_attention_heads=3, num_key_value_heads=1, head_dim=10, tie_word_embeddings=True),
            {"norms": NORMS},
            spelling="v4",
            extra={"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2},
        ),
        "window": Variant(
            "window of 4 in layer 1 of 2 by layer_types",
            dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
            {
                "window": Without({"layer_types": ["full_attention"] * 2}),
                "all_layers": Without({"layer_types": ["sliding_attention"] * 2}),
            },
            dtype="float16",
            lengths=(20, 1),
            shards=2,
        ),
        "bias": Variant(
            "attention_bias on all four projections",
            dict(attention_bias=True),
            {
                "q_bias": Without(fill={r"q_proj\.bias": 0.0}),
                "v_bias": Without(fill={r"v_proj\.bias": 0.0}),
                "o_bias": Without(fill={r"o_proj\.bias": 0.0}),
            },
            dtype="bfloat16",
        ),
    },
)
