"""The table of golden/deepseek_v3: latent attention, sigmoid routing with a correction bias and groups."""

import types

from variants import Architecture, Variant, Without, rope


YARN = dict(
    rope_type="yarn",
    factor=8.0,
    original_max_position_embeddings=16,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
)


def groups_by_best(model):
    """Ranks groups by their best expert, as DeepSeek-V2 does."""
    from common import routers

    def forward(self, hidden_states):
        logits = hidden_states.view(-1, self.hidden_dim) @ self.weight.t()
        scores = logits.sigmoid()
        keys = (scores + self.e_score_correction_bias).view(len(logits), self.num_group, -1)
        kept = keys.amax(-1).topk(self.topk_group, dim=-1).indices
        outside = logits.new_ones(len(logits), self.num_group).scatter_(1, kept, 0.0).bool()
        experts = keys.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights * self.routed_scaling_factor, experts

    for _, module in routers(model):
        module.forward = types.MethodType(forward, module)


def latent_eps(model):
    """Uses rms_norm_eps in the norms of the latents, where transformers has a fixed 1e-6."""
    for layer in model.model.layers:
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if (norm := getattr(layer.self_attn, name, None)) is not None:
                norm.variance_epsilon = model.config.rms_norm_eps


BIAS = Without(fill={"e_score_correction_bias": 0.0})
SHARED = Without(fill={r"shared_experts\.down_proj": 0.0})
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
HUB = {
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "rope_interleave": ...,
    "head_dim": ...,
    "qk_head_dim": ...,
}

ARCHITECTURE = Architecture(
    base=dict(
        vocab_size=56,
        hidden_size=32,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=7,
        attention_bias=False,
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_parameters=rope(),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    ),
    init={"e_score_correction_bias": (0.0, 0.4)},
    v4_renames={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    v4_extra=lambda config: HUB,
    variants={
        "yarn": Variant(
            "4 groups of 2 experts, top-3 of 2 groups; layer 0 dense; yarn with mscale_all_dim",
            dict(rope_parameters=rope(100.0, **YARN)),
            {
                "bias": BIAS,
                "shared": SHARED,
                "groups": Without({"n_group": 1, "topk_group": 1}),
                "groups_by_best": Without(patch=groups_by_best),
                "norm": Without({"norm_topk_prob": False}),
                "scale": Without({"routed_scaling_factor": 1.0}),
                "interleave": Without({"rope_interleave": False}),
                "yarn": Without({"rope_parameters": rope(100.0)}),
                "mscale_all_dim": Without({"rope_parameters": rope(100.0, **YARN | {"mscale_all_dim": 0.0})}),
            },
            spelling="v4",
            dtype="bfloat16",
            lengths=(20, 1),
        ),
        "no_q_lora": Variant(
            "q_lora_rank null, rope_interleave false, raw weights, no groups, two shared experts, rms_norm_eps 0.1 "
            "(which the norms of the latents do not use)",
            dict(
                q_lora_rank=None,
                rope_interleave=False,
                norm_topk_prob=False,
                n_group=1,
                topk_group=1,
                n_shared_experts=2,
                first_k_dense_replace=0,
                routed_scaling_factor=1.0,
                rms_norm_eps=0.1,
            ),
            {
                "interleave": Without({"rope_interleave": True}),
                "norm": Without({"norm_topk_prob": True}),
                "bias": BIAS,
                "latent_eps": Without(patch=latent_eps),
            },
        ),
        "runtime": Variant(
            "fused runtime names; attention_bias; 2 groups of 4 experts, 1 kept; 3 heads",
            dict(
                hidden_size=30,
                num_attention_heads=3,
                num_key_value_heads=3,
                n_group=2,
                topk_group=1,
                num_experts_per_tok=2,
                attention_bias=True,
            ),
            {
                "groups": Without({"n_group": 1, "topk_group": 1}),
                "q_bias": Without(fill={r"q_a_proj\.bias": 0.0}),
                "o_bias": Without(fill={r"o_proj\.bias": 0.0}),
            },
            dtype="bfloat16",
            layout="runtime",
        ),
        "mtp": Variant(
            "a multi-token-prediction block behind the last layer, which is not part of the model; mscale apart from "
            "mscale_all_dim; three shards",
            dict(
                rope_parameters=rope(100.0, **YARN | {"mscale": 1.0, "mscale_all_dim": 0.4}),
                n_routed_experts=4,
                n_group=2,
                topk_group=1,
                num_experts_per_tok=2,
            ),
            {
                "mscale": Without({"rope_parameters": rope(100.0, **YARN | {"mscale": 0.4, "mscale_all_dim": 0.4})}),
                "bias": BIAS,
            },
            spelling="v4",
            dtype="bfloat16",
            mtp=True,
            shards=3,
            lengths=(20, 1),
        ),
        "fp8": Variant(
            "E4M3 weights with a factor per 128x128 block, ragged at the edges; router, norms and embeddings in bf16",
            dict(vocab_size=40, hidden_size=136, intermediate_size=131, n_routed_experts=4, n_group=2, topk_group=1,
                 num_experts_per_tok=2),  # fmt: skip
            {"shared": SHARED},
            spelling="v4",
            dtype="bfloat16",
            layout="fp8",
            extra={"quantization_config": FP8},
        ),
    },
)
