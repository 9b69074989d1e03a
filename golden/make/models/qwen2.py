"""The table of golden/qwen2: biases on q, k and v without a config key, windows from layer max_window_layers on."""

from variants import Architecture, Variant, Without, rope


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
BIAS = Without(fill={r"self_attn\.[qkv]_proj\.bias$": 0.0})

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
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
    v4_extra=lambda config: {"sliding_window": config["sliding_window"] or 32768},
    variants={
        "tied_v4": Variant(
            "tied embeddings; sliding_window present but switched off",
            dict(tie_word_embeddings=True),
            {"bias": BIAS},
            spelling="v4",
            dtype="bfloat16",
        ),
        "window": Variant(
            "window of 4 in layers 1 and 2 of 3: from max_window_layers on, no layer_types key",
            dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1),
            {
                "window": Without({"layer_types": ["full_attention"] * 3}),
                "first_layers": Without({"layer_types": ["sliding_attention"] + ["full_attention"] * 2}),
                "all_layers": Without({"layer_types": ["sliding_attention"] * 3}),
                "window_5": Without({"sliding_window": 5}),
            },
            spelling="v4",
            dtype="float16",
            lengths=(20, 1),
        ),
        "yarn": Variant(
            "yarn; 3 query heads on 1 key head",
            dict(
                hidden_size=30,
                num_attention_heads=3,
                num_key_value_heads=1,
                rope_parameters=rope(10000.0, **YARN),
            ),
            {"scaling": Without({"rope_parameters": rope(10000.0)}), "bias": BIAS},
        ),
    },
)
