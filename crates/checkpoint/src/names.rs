//! Tensor names of Hugging Face dialects, translated to the canonical ones.
//!
//! Canonical is the per-expert spelling most MoE checkpoints use (see `crate::specs`). The spellings of all
//! architectures are disjoint, so one table serves them all.

/// What a stored tensor is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// A tensor of this canonical name.
    Tensor(String),
    /// Experts of one layer in one tensor.
    Fused(Fused),
    /// Scales of the FP8 tensor of this name.
    Scales(String),
    /// Not part of the computation, and why.
    Ignored(&'static str),
}

/// A tensor that stacks all experts of a layer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fused {
    /// `model.layers.3.mlp.experts`.
    pub(crate) prefix: String,
    /// Gate and up together, or down.
    pub(crate) is_gate_up: bool,
    pub(crate) part: FusedPart,
}

/// Which values a [`Fused`] tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FusedPart {
    /// Weights, `[E, out, in]` (or `[E, in, out]` where the architecture stores them transposed).
    Weights,
    /// Biases, `[E, out]`.
    Bias,
    /// 4-bit weights of MXFP4, `[E, out, in / 32, 16]`.
    Mxfp4Blocks,
    /// Their scales, `[E, out, in / 32]`.
    Mxfp4Scales,
    /// Block scales of FP8 weights.
    Fp8Scales,
}

/// Parts of names that dialects spell differently, applied in this order. The right side is canonical.
const SPELLINGS: &[(&str, &str)] = &[
    (".block_sparse_moe.", ".mlp."),
    (".w1.weight", ".gate_proj.weight"),
    (".w3.weight", ".up_proj.weight"),
    (".w2.weight", ".down_proj.weight"),
    (".mlp.input_linear.weight", ".mlp.experts.gate_up_proj"),
    (".mlp.output_linear.weight", ".mlp.experts.down_proj"),
    (".mlp.router.layer.", ".mlp.gate."),
    (".mlp.router.", ".mlp.gate."),
    (".mlp.shared_expert.", ".mlp.shared_experts."),
];

/// Endings of fused tensors.
const FUSED: &[(&str, bool, FusedPart)] = &[
    ("gate_up_proj", true, FusedPart::Weights),
    ("down_proj", false, FusedPart::Weights),
    ("gate_up_proj_bias", true, FusedPart::Bias),
    ("down_proj_bias", false, FusedPart::Bias),
    ("gate_up_proj_blocks", true, FusedPart::Mxfp4Blocks),
    ("down_proj_blocks", false, FusedPart::Mxfp4Blocks),
    ("gate_up_proj_scales", true, FusedPart::Mxfp4Scales),
    ("down_proj_scales", false, FusedPart::Mxfp4Scales),
    ("gate_up_proj_scale_inv", true, FusedPart::Fp8Scales),
    ("down_proj_scale_inv", false, FusedPart::Fp8Scales),
];

/// What the tensor `stored` of a Hugging Face checkpoint is. `n_layers` tells layers from what follows them.
pub(crate) fn meaning(stored: &str, n_layers: usize) -> Meaning {
    if let Some(reason) = ignored(stored, n_layers) {
        return Meaning::Ignored(reason);
    }
    if is_canonical_expert(stored) {
        return Meaning::Tensor(stored.to_owned());
    }
    let mut name = without_wrapper(stored);
    for (dialect, canonical) in SPELLINGS {
        if name.contains(dialect) {
            name = name.replace(dialect, canonical);
        }
    }
    if let Some((prefix, ending)) = name.split_once(".mlp.experts.")
        && let Some((_, is_gate_up, part)) = FUSED.iter().find(|(known, ..)| *known == ending)
    {
        return Meaning::Fused(Fused {
            prefix: format!("{prefix}.mlp.experts"),
            is_gate_up: *is_gate_up,
            part: *part,
        });
    }
    match name.strip_suffix("_scale_inv") {
        Some(weight) => Meaning::Scales(weight.to_owned()),
        None => Meaning::Tensor(name),
    }
}

/// Whether this is a matrix of one expert under its canonical name, as nearly all tensors of a large model are: the
/// table need not be searched for it.
fn is_canonical_expert(stored: &str) -> bool {
    let inside = stored
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(_, rest)| rest.strip_prefix("mlp.experts."));
    let Some((expert, part)) = inside.and_then(|rest| rest.split_once('.')) else {
        return false;
    };
    let parts = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];
    expert.bytes().all(|digit| digit.is_ascii_digit()) && parts.contains(&part)
}

/// Drops what multimodal wrappers put around the language model.
fn without_wrapper(stored: &str) -> String {
    if let Some(rest) = stored.strip_prefix("model.language_model.") {
        return format!("model.{rest}");
    }
    let rest = stored.strip_prefix("language_model.").unwrap_or(stored);
    rest.to_owned()
}

fn ignored(stored: &str, n_layers: usize) -> Option<&'static str> {
    const WRAPPED: &[&str] = &[
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ];
    if WRAPPED.iter().any(|prefix| stored.starts_with(prefix)) {
        return Some("image input");
    }
    if stored.ends_with(".rotary_emb.inv_freq") {
        return Some("derived from the configuration");
    }
    let layer = stored.strip_prefix("model.layers.")?.split('.').next()?;
    let beyond = layer.parse::<usize>().is_ok_and(|layer| layer >= n_layers);
    beyond.then_some("multi-token prediction")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(stored: &str) -> String {
        match meaning(stored, 4) {
            Meaning::Tensor(name) => name,
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn dialects_become_canonical() {
        let cases = [
            (
                "block_sparse_moe.experts.3.w1.weight",
                "mlp.experts.3.gate_proj.weight",
            ),
            (
                "block_sparse_moe.experts.3.w3.weight",
                "mlp.experts.3.up_proj.weight",
            ),
            (
                "block_sparse_moe.experts.3.w2.weight",
                "mlp.experts.3.down_proj.weight",
            ),
            ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
            ("block_sparse_moe.router.layer.weight", "mlp.gate.weight"),
            ("block_sparse_moe.router.weight", "mlp.gate.weight"),
            ("mlp.router.bias", "mlp.gate.bias"),
            (
                "mlp.shared_expert.up_proj.weight",
                "mlp.shared_experts.up_proj.weight",
            ),
            (
                "mlp.shared_expert_gate.weight",
                "mlp.shared_expert_gate.weight",
            ),
            (
                "mlp.gate.e_score_correction_bias",
                "mlp.gate.e_score_correction_bias",
            ),
        ];
        for (dialect, canonical) in cases {
            let name = tensor(&format!("model.layers.1.{dialect}"));
            assert_eq!(name, format!("model.layers.1.{canonical}"));
        }
        for same in ["gate_proj", "up_proj", "down_proj"] {
            let name = format!("model.layers.1.mlp.experts.12.{same}.weight");
            assert_eq!(tensor(&name), name);
        }
        assert_eq!(tensor("language_model.lm_head.weight"), "lm_head.weight");
        assert_eq!(
            tensor("model.language_model.norm.weight"),
            "model.norm.weight"
        );
    }

    #[test]
    fn fused_tensors_and_scales_are_recognised() {
        let fused = |is_gate_up, part| {
            Meaning::Fused(Fused {
                prefix: "model.layers.0.mlp.experts".to_owned(),
                is_gate_up,
                part,
            })
        };
        for (ending, expected) in [
            ("mlp.experts.gate_up_proj", fused(true, FusedPart::Weights)),
            (
                "mlp.experts.down_proj_blocks",
                fused(false, FusedPart::Mxfp4Blocks),
            ),
            (
                "block_sparse_moe.input_linear.weight",
                fused(true, FusedPart::Weights),
            ),
            (
                "block_sparse_moe.experts.down_proj",
                fused(false, FusedPart::Weights),
            ),
        ] {
            assert_eq!(meaning(&format!("model.layers.0.{ending}"), 4), expected);
        }
        assert_eq!(
            meaning("model.layers.0.mlp.experts.1.up_proj.weight_scale_inv", 4),
            Meaning::Scales("model.layers.0.mlp.experts.1.up_proj.weight".to_owned())
        );
    }

    #[test]
    fn what_is_not_computed_says_why() {
        let reason = |name| match meaning(name, 4) {
            Meaning::Ignored(reason) => reason,
            _ => "",
        };
        assert_eq!(
            reason("model.layers.4.eh_proj.weight"),
            "multi-token prediction"
        );
        assert_eq!(reason("model.layers.3.eh_proj.weight"), "");
        assert_eq!(reason("vision_tower.x"), "image input");
    }
}
