//! What GGUF calls the tensors of a block, and what they are called here. One table for reading and writing.

/// How an architecture calls the norms around its feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormNames {
    /// `ffn_norm` before the feed-forward.
    Usual,
    /// `post_attention_norm` before the feed-forward.
    PostAttention,
    /// `ffn_norm` before it, `post_attention_norm` and `post_ffw_norm` after both parts.
    Gemma,
}

/// Stems (a name without `.weight` or `.bias`) that mean the same in every architecture.
const STEMS: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_k_b", "self_attn.k_b_proj"),
    ("attn_v_b", "self_attn.v_b_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
];

/// Whole names that are not a stem and an ending.
const WHOLE: &[(&str, &str)] = &[
    ("attn_sinks.weight", "self_attn.sinks"),
    ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
];

/// Tensors outside of blocks.
const OUTSIDE: &[(&str, &str)] = &[
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output_norm.bias", "model.norm.bias"),
    ("output.weight", "lm_head.weight"),
    ("output.bias", "lm_head.bias"),
];

impl NormNames {
    fn stems(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Usual => &[("ffn_norm", "post_attention_layernorm")],
            Self::PostAttention => &[("post_attention_norm", "post_attention_layernorm")],
            Self::Gemma => &[
                ("post_attention_norm", "post_attention_layernorm"),
                ("ffn_norm", "pre_feedforward_layernorm"),
                ("post_ffw_norm", "post_feedforward_layernorm"),
            ],
        }
    }

    /// The canonical name of what block `layer` calls `name`, such as `attn_q.weight`.
    pub(crate) fn canonical(self, layer: usize, name: &str) -> Option<String> {
        let found = WHOLE.iter().find(|(gguf, _)| *gguf == name);
        if let Some((_, canonical)) = found {
            return Some(format!("model.layers.{layer}.{canonical}"));
        }
        let (stem, ending) = name.rsplit_once('.')?;
        if !matches!(ending, "weight" | "bias") {
            return None;
        }
        let mut stems = STEMS.iter().chain(self.stems());
        let (_, canonical) = stems.find(|(gguf, _)| *gguf == stem)?;
        Some(format!("model.layers.{layer}.{canonical}.{ending}"))
    }

    /// What GGUF calls `name`, a canonical name without `model.layers.N.`.
    pub(crate) fn gguf(self, layer: usize, name: &str) -> Option<String> {
        let found = WHOLE.iter().find(|(_, canonical)| *canonical == name);
        if let Some((gguf, _)) = found {
            return Some(format!("blk.{layer}.{gguf}"));
        }
        let (stem, ending) = name.rsplit_once('.')?;
        let mut stems = STEMS.iter().chain(self.stems());
        let (gguf, _) = stems.find(|(_, canonical)| *canonical == stem)?;
        Some(format!("blk.{layer}.{gguf}.{ending}"))
    }
}

/// The canonical name of a tensor outside of blocks.
pub(crate) fn outside(name: &str) -> Option<&'static str> {
    let found = OUTSIDE.iter().find(|(gguf, _)| *gguf == name);
    found.map(|(_, canonical)| *canonical)
}

/// What GGUF calls a tensor outside of layers.
pub(crate) fn outside_gguf(name: &str) -> Option<&'static str> {
    let found = OUTSIDE.iter().find(|(_, canonical)| *canonical == name);
    found.map(|(gguf, _)| *gguf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_agree() {
        for norms in [NormNames::Usual, NormNames::PostAttention, NormNames::Gemma] {
            for (gguf, _) in STEMS.iter().chain(norms.stems()) {
                let name = format!("{gguf}.weight");
                let canonical = norms.canonical(3, &name).unwrap();
                let rest = canonical.strip_prefix("model.layers.3.").unwrap();
                assert_eq!(norms.gguf(3, rest), Some(format!("blk.3.{name}")));
            }
        }
        let sinks = NormNames::Usual.canonical(0, "attn_sinks.weight");
        assert_eq!(sinks.as_deref(), Some("model.layers.0.self_attn.sinks"));
        assert_eq!(NormNames::Usual.canonical(0, "attn_q.scale"), None);
        assert_eq!(NormNames::Usual.canonical(0, "post_ffw_norm.weight"), None);
        for (gguf, canonical) in OUTSIDE {
            assert_eq!(
                (outside(gguf), outside_gguf(canonical)),
                (Some(*canonical), Some(*gguf))
            );
        }
    }
}
