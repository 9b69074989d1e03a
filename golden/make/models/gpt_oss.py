"""The table of golden/gpt_oss: sinks, alternating windows, clamped experts with biases, MXFP4 weights."""

from variants import Architecture, Variant, Without, raw_softmax, reroute, rope


# The hub's values scaled down so that the ramp covers the frequencies of a small head; truncate false as there.
YARN = dict(
    rope_type="yarn", factor=8.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=256, truncate=False
)


def activation(change):
    """A patch: change(gate_up, limit, alpha) replaces the experts' activation."""

    def apply(model):
        for layer in model.model.layers:
            experts = layer.mlp.experts
            experts._apply_gate = lambda gate_up, e=experts: change(gate_up, e.limit, e.alpha)

    return apply


def gated(gate, up, limit, alpha, one):
    """(up + one) * gate * sigmoid(alpha * gate), clamped."""
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + one) * gate * (gate * alpha).sigmoid()


def no_plus_one(gate_up, limit, alpha):
    """Forgets to add one to the up projection."""
    return gated(gate_up[..., ::2], gate_up[..., 1::2], limit, alpha, 0.0)


def halves(gate_up, limit, alpha):
    """Takes gate and up as halves instead of interleaved."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gated(gate, up, limit, alpha, 1.0)


FEATURES = {
    "sinks": Without(fill={"sinks": -1e4}),
    "window": Without({"layer_types": ["full_attention"] * 2}),
    "all_windows": Without({"layer_types": ["sliding_attention"] * 2}),
    "limit": Without({"swiglu_limit": 1e9}),
    "alpha": Without({"swiglu_alpha": 1.0}),
    "plus_one": Without(patch=activation(no_plus_one)),
    "interleaved": Without(patch=activation(halves)),
    "raw_softmax": Without(patch=reroute(raw_softmax)),
    "router_bias": Without(fill={r"router\.bias": 0.0}),
    "gate_up_bias": Without(fill={"gate_up_proj_bias": 0.0}),
    "down_bias": Without(fill={"down_proj_bias": 0.0}),
    "q_bias": Without(fill={r"q_proj\.bias": 0.0}),
    "o_bias": Without(fill={r"o_proj\.bias": 0.0}),
    "yarn": Without({"rope_parameters": rope(100.0)}),
    "truncate": Without({"rope_parameters": rope(100.0, **YARN | {"truncate": True})}),
}
MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def hub_keys(config):
    """What the published files have besides: layer_types, older names, rope_type inside rope_scaling."""
    rope = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    return {
        "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "layer_types": config["layer_types"],
        "rope_scaling": rope,
        "swiglu_alpha": ...,
    }


ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=4,
        swiglu_limit=7.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        rope_parameters=rope(100.0, **YARN),
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    ),
    init={
        "gate_up_proj_bias": (0.0, 2.0),
        "gate_up_proj$": (0.0, 0.6),
        "down_proj$": (0.0, 0.2),
        "down_proj_bias": (0.0, 0.6),
        r"router\.bias": (0.0, 1.0),
        "sinks": (0.5, 1.0),
    },
    v4_extra=hub_keys,
    variants={
        "bf16": Variant(
            "transposed bf16 experts with interleaved gate and up, sinks, window of 4 in layer 0, yarn without truncation",
            {},
            FEATURES,
            dtype="bfloat16",
            lengths=(20, 1),
        ),
        "mxfp4": Variant(
            "experts as MXFP4 blocks and scales, the rest bf16; yarn with truncation, which is its default",
            dict(
                num_local_experts=4,
                num_experts_per_tok=2,
                intermediate_size=32,
                hidden_size=64,
                head_dim=8,
                rope_parameters=rope(100.0, **{key: value for key, value in YARN.items() if key != "truncate"}),
            ),
            {key: FEATURES[key] for key in ("sinks", "window", "limit", "plus_one", "router_bias", "down_bias")},
            spelling="v4",
            dtype="bfloat16",
            layout="mxfp4",
            extra={"quantization_config": MXFP4},
            lengths=(20, 1),
        ),
        "odd_sizes": Variant(
            "3 query heads on 1 key head, 3 layers of which 0 and 2 have windows, limit 1.5, plain rope, tied embeddings",
            dict(
                vocab_size=61,
                hidden_size=30,
                num_hidden_layers=3,
                num_attention_heads=3,
                num_key_value_heads=1,
                head_dim=8,
                num_local_experts=5,
                num_experts_per_tok=2,
                intermediate_size=7,
                swiglu_limit=1.5,
                tie_word_embeddings=True,
                rope_parameters=rope(10000.0),
            ),
            {"limit": Without({"swiglu_limit": 7.0}), "sinks": FEATURES["sinks"]},
            shards=2,
            lengths=(16, 1),
        ),
    },
)
