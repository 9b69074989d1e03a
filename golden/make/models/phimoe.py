"""The table of golden/phimoe: SparseMixer routing, layer norms with biases, long rope with two sets of factors.

transformers 5.23 computes the rope of this architecture from `short_factor` at every length (the sequence length no
longer reaches the function that picks), while it switches to `long_mscale` past original_max_position_embeddings. The
variant longrope_long holds what the checkpoint's authors and transformers before 5 compute: `long_factor` there.
Its `without.transformers_5_23` is the difference to the unpatched transformers.
"""

from functools import partial

from variants import Architecture, Variant, Without, raw_softmax, renormalised, reroute, rope


LONG = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.3, 1.7, 2.5],
    long_factor=[1.5, 3.0, 5.0, 9.0],
    short_mscale=1.15,
    long_mscale=1.4,
    original_max_position_embeddings=16,
)


def use_long_factors(model):
    """Past the original length, which every prompt of the variant is."""
    rotary = model.model.rotary_emb
    length = rotary.config.rope_parameters["original_max_position_embeddings"] + 1
    rotary.rope_init_fn = partial(rotary.rope_init_fn, seq_len=length)


ROUTER = {
    "renormalised": Without(patch=reroute(renormalised)),
    "raw_softmax": Without(patch=reroute(raw_softmax)),
    "jitter": Without({"router_jitter_noise": 0.01}),
}
NORM_BIAS = Without(fill={r"(layernorm|model\.norm)\.bias": 0.0})

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
        router_jitter_noise=0.2,
        input_jitter_noise=0.01,
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=None,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rope_parameters=rope(),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    ),
    init={r"lm_head\.bias": (0.0, 1.0)},
    variants={
        "plain": Variant(
            "per-expert w1, w2, w3; biases of norms, attention and head; jitter 0.2 so that SparseMixer's mask matters",
            {},
            ROUTER
            | {
                "norm_bias": NORM_BIAS,
                "head_bias": Without(fill={r"lm_head\.bias": 0.0}),
                "q_bias": Without(fill={r"q_proj\.bias": 0.0}),
                "o_bias": Without(fill={r"o_proj\.bias": 0.0}),
            },
            spelling="v4",
            dtype="bfloat16",
        ),
        "jitter_001": Variant(
            "router_jitter_noise 0.01 as in Phi-3.5-MoE: most other experts are masked; no attention or head biases",
            dict(router_jitter_noise=0.01, attention_bias=False, lm_head_bias=False),
            {"renormalised": ROUTER["renormalised"], "norm_bias": NORM_BIAS},
            dtype="float16",
            shards=2,
        ),
        "runtime_window": Variant(
            "names of the running model (mlp.router.weight, fused experts); sliding window of 5",
            dict(sliding_window=5),
            ROUTER | {"window": Without({"sliding_window": None})},
            layout="runtime",
            lengths=(20, 1),
        ),
        "longrope": Variant(
            "long rope below original_max_position_embeddings 16: short factors, short_mscale",
            dict(rope_parameters=rope(100.0, **LONG)),
            {
                "factors": Without({"rope_parameters": rope(100.0, **LONG | {"short_factor": [1.0] * 4})}),
                "mscale": Without({"rope_parameters": rope(100.0, **LONG | {"short_mscale": 1.0})}),
            },
            spelling="v4",
            extra={"original_max_position_embeddings": 16},
            dtype="bfloat16",
        ),
        "longrope_long": Variant(
            "long rope past original_max_position_embeddings 16: long factors, long_mscale",
            dict(rope_parameters=rope(100.0, **LONG)),
            {
                "transformers_5_23": Without(patch=lambda model: None),
                "mscale": Without({"rope_parameters": rope(100.0, **LONG | {"long_mscale": 1.15})}),
            },
            dtype="bfloat16",
            lengths=(24,),
            patch=use_long_factors,
            prefill_only=True,
        ),
    },
)
