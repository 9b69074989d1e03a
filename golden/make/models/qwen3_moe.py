"""The table of golden/qwen3_moe: query and key norms per head, raw or renormalised softmax top-k, no shared expert."""

from variants import Architecture, Variant, Without, rope


def v4_config(config):
    """The config.json that transformers 4 wrote for the same model."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config["bos_token_id"],
        "decoder_sparse_step": config["decoder_sparse_step"],
        "eos_token_id": config["eos_token_id"],
        "head_dim": config["head_dim"],
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "max_window_layers": config["num_hidden_layers"],
        "mlp_only_layers": config["mlp_only_layers"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": config["moe_intermediate_size"],
        "norm_topk_prob": config["norm_topk_prob"],
        "num_attention_heads": config["num_attention_heads"],
        "num_experts": config.get("num_experts") or config["num_local_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": config["num_key_value_heads"],
        "output_router_logits": False,
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_scaling": None,
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": config["dtype"],
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config["vocab_size"],
    }


RAW = {"norm": Without({"norm_topk_prob": False})}
RENORMALISED = {"norm": Without({"norm_topk_prob": True})}
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
}

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_parameters=rope(),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    ),
    v4=v4_config,
    variants={
        "plain": Variant("untied head, renormalised top-2", {}, RAW),
        "tied_v4": Variant(
            "tied embeddings, rope_theta at the top level",
            dict(tie_word_embeddings=True, rope_parameters=rope(1000000.0)),
            {"theta": Without({"rope_parameters": rope()})},
            spelling="v4",
        ),
        "raw_topk": Variant(
            "raw softmax weights, top-3",
            dict(norm_topk_prob=False, num_experts_per_tok=3),
            RENORMALISED,
            spelling="v4",
        ),
        "dense_layer": Variant(
            "layer 0 is dense by mlp_only_layers",
            dict(num_hidden_layers=2, mlp_only_layers=[0], num_experts=8, num_experts_per_tok=3),
        ),
        "sparse_step": Variant(
            "decoder_sparse_step 2: only layer 1 of 3 has experts",
            dict(num_hidden_layers=3, decoder_sparse_step=2, intermediate_size=16),
            spelling="v4",
        ),
        "odd_sizes": Variant(
            "3 query heads on 1 key head, head_dim 10 (not hidden/heads), 5 experts of width 7, top-3, vocabulary 61",
            dict(
                vocab_size=61,
                hidden_size=28,
                num_attention_heads=3,
                num_key_value_heads=1,
                head_dim=10,
                num_experts=5,
                num_experts_per_tok=3,
                moe_intermediate_size=7,
                rms_norm_eps=1e-5,
                eos_token_id=[1, 2],
            ),
        ),
        "top1": Variant(
            "top-1 with raw weights, one key head per query head",
            dict(num_key_value_heads=4, num_experts=5, num_experts_per_tok=1, norm_topk_prob=False),
            RENORMALISED,
        ),
        "bf16_sharded": Variant(
            "bf16 weights in three shards with an index",
            dict(num_experts=8, num_experts_per_tok=4, eos_token_id=[1, 3]),
            RAW,
            spelling="v4",
            dtype="bfloat16",
            shards=3,
        ),
        "runtime_window": Variant(
            "fused runtime names; attention_bias; a sliding window of 4 in every layer",
            dict(attention_bias=True, use_sliding_window=True, sliding_window=4),
            {
                "window": Without({"sliding_window": None, "use_sliding_window": False}),
                "q_bias": Without(fill={r"q_proj\.bias": 0.0}),
                "o_bias": Without(fill={r"o_proj\.bias": 0.0}),
            },
            dtype="bfloat16",
            layout="runtime",
            lengths=(20, 1),
        ),
        "fp8": Variant(
            "E4M3 weights with a factor per 128x128 block; hidden size 136 leaves a ragged block",
            dict(vocab_size=40, hidden_size=136, head_dim=10, moe_intermediate_size=9, num_experts=4),
            RAW,
            dtype="bfloat16",
            layout="fp8",
            extra={"quantization_config": FP8},
        ),
    },
)
