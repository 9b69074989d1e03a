"""The table of golden/qwen2_moe: a gated shared expert, biases on q, k and v, raw or renormalised softmax top-k."""

from variants import Architecture, Variant, Without, rope


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
BIAS = Without(fill={r"self_attn\.[qkv]_proj\.bias$": 0.0})
SHARED = Without(fill={r"shared_expert\.down_proj": 0.0})
SHARED_GATE = Without(fill={r"shared_expert_gate": 0.0})

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        qkv_bias=True,
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        use_sliding_window=False,
        tie_word_embeddings=False,
        rope_parameters=rope(1000000.0),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    ),
    init={"shared_expert_gate": (0.0, 0.5)},
    v4_renames={"num_local_experts": "num_experts"},
    # Version 4 had neither qkv_bias nor mlp_only_layers in the files of the first models, and a window that is switched off.
    v4_extra=lambda config: {"sliding_window": config["sliding_window"] or 32768, "max_window_layers": 21},
    variants={
        "plain": Variant(
            "raw top-2 weights; shared expert; biases by default; sliding_window present but switched off",
            {},
            {"bias": BIAS, "shared": SHARED, "shared_gate": SHARED_GATE, "norm": Without({"norm_topk_prob": True})},
            spelling="v4",
            extra={"qkv_bias": ..., "mlp_only_layers": ...},
            dtype="bfloat16",
        ),
        "norm_yarn": Variant(
            "renormalised top-3, qkv_bias false, yarn, tied embeddings",
            dict(
                norm_topk_prob=True,
                num_experts_per_tok=3,
                qkv_bias=False,
                tie_word_embeddings=True,
                rope_parameters=rope(10000.0, **YARN),
            ),
            {"norm": Without({"norm_topk_prob": False}), "yarn": Without({"rope_parameters": rope(10000.0)})},
        ),
        "dense_layers": Variant(
            "4 layers: 0 and 2 are dense by decoder_sparse_step 2, 1 by mlp_only_layers; three shards",
            dict(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[1]),
            {"bias": BIAS},
            dtype="bfloat16",
            shards=3,
        ),
        "window": Variant(
            "use_sliding_window with layer_types: window of 4 in layer 0",
            dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
            {
                "window": Without({"layer_types": ["full_attention"] * 2}),
                "layer_types": Without({"layer_types": ["sliding_attention"] * 2}),
                "window_5": Without({"sliding_window": 5}),
            },
            dtype="float16",
            lengths=(20, 1),
        ),
        "runtime": Variant(
            "names of the running model: fused gate_up_proj; 3 query heads on 1 key head, 5 experts of width 7",
            dict(
                vocab_size=61,
                hidden_size=30,
                num_attention_heads=3,
                num_key_value_heads=1,
                num_experts=5,
                moe_intermediate_size=7,
                shared_expert_intermediate_size=9,
            ),
            {"bias": BIAS, "shared": SHARED},
            layout="runtime",
        ),
    },
)
