"""The table of golden/mistral: Llama with one sliding window for all layers, or none."""

from variants import Architecture, Variant, Without, rope


ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        sliding_window=None,
        tie_word_embeddings=False,
        rope_parameters=rope(),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    ),
    v4_extra=lambda config: {"head_dim": ...} if config["head_dim"] is None else {},
    variants={
        "plain": Variant(
            "no window, heads of 12, as later files",
            dict(head_dim=12, rope_parameters=rope(1000000.0)),
            {"theta": Without({"rope_parameters": rope(10000.0)})},
            dtype="bfloat16",
        ),
        "window": Variant(
            "sliding window of 5 in every layer, no head_dim key, as the first file",
            dict(sliding_window=5),
            {
                "window": Without({"sliding_window": None}),
                "window_6": Without({"sliding_window": 6}),
                "window_4": Without({"sliding_window": 4}),
            },
            spelling="v4",
            dtype="float16",
            lengths=(24, 1),
        ),
    },
)
