//! Which number format every tensor gets, and the rules that change it, each with a reason to report.

use super::ConvertOptions;
use super::mixture::Mixture;
use crate::Dtype;
use crate::config::ModelConfig;
use crate::decoupled_router::is_matrix_of_router;
use crate::error::{CheckpointError, Result};

/// What the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetDtype {
    /// Every tensor as it is stored, where the target can hold that.
    Keep,
    /// This format, where a tensor can have it.
    Is(Dtype),
    /// The formats of this mixture, where tensors can have them.
    Mix(Mixture),
}

impl TargetDtype {
    /// Parses `keep`, the name of a format or that of a mixture, in any case.
    ///
    /// # Errors
    /// An unknown format, or one that cannot be written; the text lists those that can.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        if text.eq_ignore_ascii_case("keep") {
            return Ok(Self::Keep);
        }
        // A name that a format and a mixture share is that of the format.
        if let Some(format) = Dtype::from_name(text).filter(|format| format.can_encode()) {
            return Ok(Self::Is(format));
        }
        if let Some(mixture) = Mixture::from_name(text) {
            return Ok(Self::Mix(mixture));
        }
        let formats = Dtype::all().filter(|format| format.can_encode());
        let mut names: Vec<String> = formats.map(|format| format.name().to_lowercase()).collect();
        for mixture in Mixture::all().map(Mixture::name) {
            if !names.iter().any(|known| known == mixture) {
                names.push(mixture.to_owned());
            }
        }
        Err(format!(
            "`{text}` is no format that is written; known: keep, {}",
            names.join(", ")
        ))
    }

    /// Parses the name of a type of llama-quantize, in any case: what its files of that name hold.
    ///
    /// # Errors
    /// An unknown type, or one that is not written; the text lists those that are.
    pub fn parse_quantize(text: &str) -> std::result::Result<Self, String> {
        /// Types with one format for all matrices.
        const UNIFORM: [Dtype; 4] = [Dtype::Q8_0, Dtype::F16, Dtype::Bf16, Dtype::F32];
        if let Some(mixture) = Mixture::from_name(text) {
            return Ok(Self::Mix(mixture));
        }
        let mut uniform = UNIFORM.iter();
        if let Some(dtype) = uniform.find(|dtype| dtype.name().eq_ignore_ascii_case(text)) {
            return Ok(Self::Is(*dtype));
        }
        let mixtures = Mixture::all().map(Mixture::name);
        let names: Vec<String> = mixtures
            .chain(UNIFORM.iter().map(|dtype| dtype.name()))
            .map(str::to_ascii_uppercase)
            .collect();
        Err(format!(
            "`{text}` is no type that is written; known: {}",
            names.join(", ")
        ))
    }

    /// Its usual name, in lower case.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Keep => "keep".to_owned(),
            Self::Is(dtype) => dtype.name().to_lowercase(),
            Self::Mix(mixture) => mixture.name().to_owned(),
        }
    }
}

/// A tensor's format and, where it is not what was asked for, why.
pub(crate) struct Choice {
    pub(crate) dtype: Dtype,
    pub(super) reason: Option<&'static str>,
}

/// Norms, biases, sinks and routers with all that belongs to them: llama.cpp reads them in f32 only, and loading makes
/// them f32 in any case.
/// `name` and `shape` are canonical, those of one expert for experts.
pub(crate) fn stays_f32(name: &str, shape: &[usize]) -> bool {
    shape.len() < 2
        || name.ends_with(".mlp.gate.weight")
        || name.ends_with(".self_attn.gate.weight")
        || name.ends_with("shared_expert_gate.weight")
        || name.ends_with(".mlp.router_in.weight")
        || name.ends_with(".mlp.residual_coefficient.weight")
        || name.starts_with("model.router_gru.")
        || is_matrix_of_router(name)
}

/// The format of a tensor of a GGUF file. `form` is the model as GGUF holds it, `name` and `shape` are canonical (of
/// one expert for experts), `stored` is what the tensor has now, and the flag beside `wanted` says whether there is an
/// importance matrix.
pub(crate) fn for_gguf(
    (wanted, has_importance): (TargetDtype, bool),
    form: &ModelConfig,
    stored: Dtype,
    (name, shape): (&str, &[usize]),
) -> Choice {
    let plain = |dtype| Choice {
        dtype,
        reason: None,
    };
    if stays_f32(name, shape) {
        return plain(Dtype::F32);
    }
    let cols = shape.last().copied().unwrap_or(1);
    let asked = match wanted {
        TargetDtype::Keep => stored,
        TargetDtype::Is(dtype) => dtype,
        TargetDtype::Mix(mixture) => mixture.format(form, (name, shape), has_importance),
    };
    fitting(asked, cols)
}

/// `asked`, or what stands in for it in rows of `cols` values.
pub(super) fn fitting(asked: Dtype, cols: usize) -> Choice {
    let plain = |dtype| Choice {
        dtype,
        reason: None,
    };
    if asked.gguf_id().is_none() {
        return Choice {
            dtype: Dtype::Bf16,
            reason: Some("GGUF has no 8-bit floats"),
        };
    }
    if cols.is_multiple_of(asked.block_len()) {
        return plain(asked);
    }
    // llama-quantize's: the next larger format with blocks of 32, or 16 bits.
    let smaller = match asked {
        Dtype::Q2K | Dtype::Q3K => Dtype::Q4_0,
        Dtype::Q4K => Dtype::Q5_0,
        Dtype::Q5K => Dtype::Q5_1,
        Dtype::Q6K => Dtype::Q8_0,
        Dtype::Iq4Xs => Dtype::Iq4Nl,
        _ => Dtype::F16,
    };
    if cols.is_multiple_of(smaller.block_len()) {
        return Choice {
            dtype: smaller,
            reason: Some("rows are no multiple of the format's block"),
        };
    }
    Choice {
        dtype: Dtype::F16,
        reason: Some("rows are no multiple of 32"),
    }
}

/// The format of a tensor of a folder.
pub(super) fn for_folder(wanted: TargetDtype, stored: Dtype) -> Choice {
    match wanted {
        TargetDtype::Is(dtype) => Choice {
            dtype,
            reason: None,
        },
        TargetDtype::Keep if stored.torch_name().is_some() => Choice {
            dtype: stored,
            reason: None,
        },
        TargetDtype::Keep | TargetDtype::Mix(_) => Choice {
            dtype: Dtype::Bf16,
            reason: Some("folders are written in plain formats"),
        },
    }
}

/// Refuses block formats for folders.
pub(super) fn check_folder(origin: &str, options: &ConvertOptions) -> Result<()> {
    let wanted = options.dtype;
    let quantize = &options.quantize;
    let is_given = quantize.importance.is_some() || !quantize.formats.is_empty();
    let is_plain = match wanted {
        TargetDtype::Keep => true,
        TargetDtype::Is(dtype) => dtype.torch_name().is_some(),
        TargetDtype::Mix(_) => false,
    };
    if is_plain && !is_given {
        return Ok(());
    }
    Err(CheckpointError::Unsupported {
        file: origin.to_owned(),
        key: "dtype".to_owned(),
        value: wanted.name(),
        reason: match is_plain {
            true => "a folder takes no importance matrix and no formats of single tensors; a GGUF file does",
            false => "a folder is written as keep, f32, f16 or bf16",
        }
        .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_do_not_fit_fall_back_with_a_reason() {
        let json = r#"{"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 96, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64, "rope_theta": 10000.0}"#;
        let form = ModelConfig::parse("m", json, None).unwrap();
        let choose = |wanted, name, shape: &[usize]| {
            let choice = for_gguf((wanted, false), &form, Dtype::Bf16, (name, shape));
            (choice.dtype, choice.reason.is_some())
        };
        let up = "model.layers.0.mlp.up_proj.weight";
        let of = |dtype, cols| choose(TargetDtype::Is(dtype), up, &[4, cols]);
        assert_eq!(of(Dtype::Q4K, 512), (Dtype::Q4K, false));
        assert_eq!(of(Dtype::Q4K, 96), (Dtype::Q5_0, true));
        assert_eq!(of(Dtype::Q5K, 96), (Dtype::Q5_1, true));
        assert_eq!(of(Dtype::Q6K, 96), (Dtype::Q8_0, true));
        assert_eq!(of(Dtype::Q6K, 40), (Dtype::F16, true));
        assert_eq!(of(Dtype::Q8_0, 40), (Dtype::F16, true));
        assert_eq!(of(Dtype::Bf16, 7), (Dtype::Bf16, false));
        let (q8, mix) = (
            TargetDtype::Is(Dtype::Q8_0),
            TargetDtype::Mix(Mixture::Q4KM),
        );
        assert_eq!(choose(q8, "model.norm.weight", &[64]), (Dtype::F32, false));
        let router = "model.layers.0.mlp.gate.weight";
        assert_eq!(choose(q8, router, &[4, 64]), (Dtype::F32, false));
        assert_eq!(choose(mix, up, &[4, 512]), (Dtype::Q4K, false));
        assert_eq!(choose(mix, up, &[4, 96]), (Dtype::Q5_0, true));
        // The head does not fall back: llama-quantize gives it Q8_0 at once.
        assert_eq!(
            choose(mix, "lm_head.weight", &[4, 64]),
            (Dtype::Q8_0, false)
        );
    }

    #[test]
    fn names_are_parsed_and_unknown_ones_list_the_known() {
        assert_eq!(TargetDtype::parse("keep"), Ok(TargetDtype::Keep));
        assert_eq!(TargetDtype::parse("q4_k"), Ok(TargetDtype::Is(Dtype::Q4K)));
        let mixed = TargetDtype::parse("Q4_K_M").unwrap();
        assert_eq!(mixed, TargetDtype::Mix(Mixture::Q4KM));
        assert_eq!(mixed.name(), "q4_k_m");
        assert_eq!(TargetDtype::parse("q2_k"), Ok(TargetDtype::Is(Dtype::Q2K)));
        let quantize = |name| TargetDtype::parse_quantize(name);
        assert_eq!(quantize("Q2_K"), Ok(TargetDtype::Mix(Mixture::Q2K)));
        assert_eq!(quantize("q8_0"), Ok(TargetDtype::Is(Dtype::Q8_0)));
        assert!(quantize("keep").unwrap_err().contains("MXFP4_MOE"));
        for bad in ["q9", "u8", "q8_k"] {
            let error = TargetDtype::parse(bad).unwrap_err();
            assert!(
                error.contains("q8_0") && error.contains("q4_k_m"),
                "{error}"
            );
        }
    }
}
