"""The table of golden/deepseek_v2: latent attention, softmax routing, groups ranked by their best expert."""

from models.deepseek_v3 import SHARED, YARN, rope
from variants import Architecture, Variant, Without, renormalised, reroute


def groups_by_two_best(model):
    """Ranks groups by the sum of their two best experts, as DeepSeek-V3 and llama.cpp do."""
    import types

    from common import routers

    def forward(self, hidden_states):
        logits = hidden_states.view(-1, self.hidden_dim) @ self.weight.t()
        scores = logits.softmax(-1)
        keys = scores.view(len(logits), self.num_group, -1)
        kept = keys.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
        outside = logits.new_ones(len(logits), self.num_group).scatter_(1, kept, 0.0).bool()
        experts = keys.masked_fill(outside.unsqueeze(-1), 0.0).flatten(1).topk(self.top_k, dim=-1).indices
        return logits, scores.gather(1, experts) * self.routed_scaling_factor, experts

    for _, module in routers(model):
        module.forward = types.MethodType(forward, module)


YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
NORM = Without(patch=reroute(renormalised))
HUB = {
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "seq_aux": True,
    "mlp_bias": ...,
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
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        q_lora_rank=None,
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
    v4_renames={"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"},
    v4_extra=lambda config: HUB,
    variants={
        "lite": Variant(
            "greedy top-2 without q_lora, two shared experts, layer 0 dense, yarn with mscale, as V2-Lite",
            dict(rope_parameters=rope(100.0, **YARN)),
            {
                "shared": SHARED,
                "norm": NORM,
                "yarn": Without({"rope_parameters": rope(100.0)}),
                "mscale_all_dim": Without({"rope_parameters": rope(100.0, **YARN | {"mscale_all_dim": 0.0})}),
            },
            spelling="v4",
            dtype="bfloat16",
            lengths=(20, 1),
        ),
        "groups": Variant(
            "group_limited_greedy: top-3 of 2 of 4 groups, routed_scaling_factor 4, q_lora_rank 12, as V2",
            dict(
                topk_method="group_limited_greedy",
                n_group=4,
                topk_group=2,
                n_routed_experts=12,
                num_experts_per_tok=3,
                routed_scaling_factor=4.0,
                q_lora_rank=12,
                n_shared_experts=1,
                moe_intermediate_size=6,
            ),
            {
                "scale": Without({"routed_scaling_factor": 1.0}),
                "groups": Without({"topk_method": "greedy"}),
                "two_best": Without(patch=groups_by_two_best),
                "norm": NORM,
            },
            lengths=(20, 1),
        ),
        "runtime": Variant(
            "fused runtime names; attention_bias; 3 heads; rms_norm_eps 0.1, which the norms of the latents do not use",
            dict(
                hidden_size=30,
                num_attention_heads=3,
                num_key_value_heads=3,
                q_lora_rank=9,
                attention_bias=True,
                rms_norm_eps=0.1,
                first_k_dense_replace=0,
                n_shared_experts=1,
            ),
            {
                "q_bias": Without(fill={r"q_a_proj\.bias": 0.0}),
                "kv_bias": Without(fill={r"kv_a_proj_with_mqa\.bias": 0.0}),
                "o_bias": Without(fill={r"o_proj\.bias": 0.0}),
            },
            dtype="float16",
            layout="runtime",
            shards=2,
        ),
    },
)
