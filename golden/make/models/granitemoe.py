"""The table of golden/granitemoe: softmax over the picked experts, and four multipliers in the stream."""

from variants import Architecture, Variant, Without, raw_softmax, reroute, rope


RAW = Without(patch=reroute(raw_softmax))
MULTIPLIERS = {
    "embedding": Without({"embedding_multiplier": 1.0}),
    "residual": Without({"residual_multiplier": 1.0}),
    "logits": Without({"logits_scaling": 1.0}),
    "attention": Without({"attention_multiplier": 8**-0.5}),
}

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
        embedding_multiplier=3.0,
        logits_scaling=2.5,
        residual_multiplier=0.6,
        attention_multiplier=0.8,
        attention_bias=False,
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_parameters=rope(),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    ),
    init={r"gate_up_proj$|down_proj$|o_proj\.weight": (0.0, 0.4)},
    variants={
        "plain": Variant(
            "input_linear, output_linear and router.layer; tied embeddings; all four multipliers",
            {},
            MULTIPLIERS | {"renorm": RAW},
            spelling="v4",
            dtype="bfloat16",
        ),
        "runtime": Variant(
            "names of the running model (experts.gate_up_proj, router.weight); untied head; attention_bias; top-3",
            dict(tie_word_embeddings=False, attention_bias=True, num_experts_per_tok=3),
            {
                "q_bias": Without(fill={r"q_proj\.bias": 0.0}),
                "o_bias": Without(fill={r"o_proj\.bias": 0.0}),
                "renorm": RAW,
            },
            layout="runtime",
        ),
        "odd_sizes": Variant(
            "3 query heads on 1 key head, 5 experts of width 7, integer multipliers, linear rope scaling, two shards",
            dict(
                vocab_size=61,
                hidden_size=30,
                num_attention_heads=3,
                num_key_value_heads=1,
                num_local_experts=5,
                intermediate_size=7,
                embedding_multiplier=6,
                logits_scaling=4,
                residual_multiplier=0.5,
                attention_multiplier=1,
                rope_parameters=rope(10000.0, rope_type="linear", factor=4.0),
            ),
            MULTIPLIERS | {"scaling": Without({"rope_parameters": rope()})},
            dtype="float16",
            shards=2,
        ),
    },
)
