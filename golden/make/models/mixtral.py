"""The table of golden/mixtral: softmax top-k that is always renormalised, one sliding window for all layers."""

from variants import Architecture, Variant, Without, raw_softmax, reroute, rope

RAW = Without(patch=reroute(raw_softmax))


ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        sliding_window=None,
        tie_word_embeddings=False,
        rope_parameters=rope(1000000.0),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    ),
    v4_extra=lambda config: {"head_dim": ...} if config["head_dim"] is None else {},
    variants={
        "plain": Variant(
            "per-expert w1, w2, w3; no head_dim key; theta 1e6",
            {},
            {"renorm": RAW, "theta": Without({"rope_parameters": rope(10000.0)})},
            spelling="v4",
            dtype="bfloat16",
        ),
        "window": Variant(
            "sliding window of 5 in every layer",
            dict(sliding_window=5),
            {
                "window": Without({"sliding_window": None}),
                "window_6": Without({"sliding_window": 6}),
                "window_4": Without({"sliding_window": 4}),
            },
            dtype="float16",
            lengths=(24, 1),
        ),
        "runtime": Variant(
            "names of the running model: fused gate_up_proj and down_proj under mlp; tied embeddings",
            dict(tie_word_embeddings=True),
            {"renorm": RAW},
            layout="runtime",
        ),
        "odd_sizes": Variant(
            "3 query heads on 1 key head, head_dim 10, 5 experts of width 7, top-3, linear rope scaling, two shards",
            dict(
                vocab_size=61,
                hidden_size=28,
                num_attention_heads=3,
                num_key_value_heads=1,
                head_dim=10,
                num_local_experts=5,
                num_experts_per_tok=3,
                intermediate_size=7,
                rope_parameters=rope(10000.0, rope_type="linear", factor=4.0),
            ),
            {"rope_factor": Without({"rope_parameters": rope(10000.0)})},
            spelling="v4",
            shards=2,
        ),
    },
)
