"""The table of golden/llama: the dense decoder that most others vary; all plain kinds of rope scaling."""

from variants import Architecture, Variant, Without, rope


LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=False,
        mlp_bias=False,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_parameters=rope(),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    ),
    variants={
        "plain": Variant(
            "no head_dim, attention_bias or mlp_bias key, as the first Llama files",
            {},
            {"theta": Without({"rope_parameters": rope(500000.0)})},
            spelling="v4",
            extra={"head_dim": ..., "attention_bias": ..., "mlp_bias": ...},
            dtype="float16",
        ),
        "smollm": Variant(
            "9 query heads on 3 key heads of 4, tied embeddings, rope_theta 100000, as SmolLM2",
            dict(
                hidden_size=36,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
                rope_parameters=rope(100000.0),
            ),
            {"theta": Without({"rope_parameters": rope(10000.0)})},
            spelling="v4",
            extra={"pretraining_tp": 1, "rope_interleaved": False, "is_llama_config": True},
            dtype="bfloat16",
        ),
        "llama3": Variant(
            "rope scaling of Llama 3.1, an end-of-sequence list",
            dict(rope_parameters=rope(500.0, **LLAMA3), eos_token_id=[2, 3]),
            {
                "scaling": Without({"rope_parameters": rope(500.0)}),
                "smooth_band": Without({"rope_parameters": rope(500.0, **LLAMA3 | {"high_freq_factor": 1.0001})}),
            },
            lengths=(24, 1),
        ),
        "linear": Variant(
            "linear rope scaling, version 4 spelling, two shards",
            dict(rope_parameters=rope(10000.0, rope_type="linear", factor=3.0)),
            {"scaling": Without({"rope_parameters": rope()})},
            spelling="v4",
            dtype="bfloat16",
            shards=2,
        ),
        "yarn": Variant(
            "yarn with its default attention factor; head_dim 12",
            dict(rope_parameters=rope(100.0, **YARN), head_dim=12),
            {
                "scaling": Without({"rope_parameters": rope(100.0)}),
                "attention_factor": Without({"rope_parameters": rope(100.0, **YARN, attention_factor=1.0)}),
                "ramp": Without({"rope_parameters": rope(100.0, **YARN, beta_fast=2.0)}),
            },
            lengths=(24, 1),
        ),
        "yarn_v4": Variant(
            "yarn in the version 4 spelling, with attention_factor, beta_fast and beta_slow given",
            dict(rope_parameters=rope(1000.0, **YARN, attention_factor=1.3, beta_fast=4.0, beta_slow=0.5)),
            {
                "scaling": Without({"rope_parameters": rope(1000.0)}),
                "attention_factor": Without({"rope_parameters": rope(1000.0, **YARN, beta_fast=4.0, beta_slow=0.5)}),
                "betas": Without({"rope_parameters": rope(1000.0, **YARN, attention_factor=1.3)}),
            },
            spelling="v4",
            dtype="float16",
            lengths=(24, 1),
        ),
        "bias": Variant(
            "attention_bias and mlp_bias: all seven projections of a layer have one",
            dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
            {
                f"{p}_bias": Without(fill={rf"\.{p}_proj\.bias": 0.0}) for p in ("q", "v", "o", "gate", "up", "down")
            },
            dtype="bfloat16",
        ),
    },
)
