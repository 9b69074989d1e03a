//! Mixtures of block formats: which tensors of a quantised GGUF file get more bits than the rest.
//!
//! The rules are those of llama-quantize (`src/llama-quant.cpp`, as of llama-cpp-python 0.3.36), with and without an
//! importance matrix, so that a file of the same name has the same formats whoever wrote it.

use super::in_layer;
use crate::Dtype;
use crate::config::ModelConfig;

/// Number of experts for which llama-quantize spends more bits on attention, which is small beside them (Mixtral).
const FEW_EXPERTS: usize = 8;
/// Layers of the models whose values are shared by so many heads that they get more bits (Llama 2 70B and its kin).
const LAYERS_OF_70B: usize = 80;
/// Heads that share their values from which on these get more bits in small mixtures.
const MANY_HEADS: usize = 4;

/// A mixture of formats, by its name in llama-quantize.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixture {
    /// Q4_0, with Q6_K for the head.
    Q4_0,
    /// Q4_1, with Q6_K for the head.
    Q4_1,
    /// Q5_0, with Q6_K for the head.
    Q5_0,
    /// Q5_1, with Q6_K for the head.
    Q5_1,
    /// Q2_K, with Q3_K for down projections and outputs of attention, and more for values.
    Q2K,
    /// Q2_K, with more for values and the first down projections; wants an importance matrix.
    Q2KS,
    /// Q3_K, with Q6_K for the head.
    Q3KS,
    /// Q3_K, with Q4_K or Q5_K for down projections, values and outputs of attention.
    Q3KM,
    /// Q3_K, with Q5_K for these.
    Q3KL,
    /// Q4_K, with Q5_K for the first values and down projections.
    Q4KS,
    /// Q4_K, with Q6_K for the head and for the more sensitive values and down projections.
    Q4KM,
    /// Q5_K, with Q6_K for the head.
    Q5KS,
    /// The same as [`Mixture::Q4KM`] over Q5_K.
    Q5KM,
    /// Q6_K.
    Q6K,
    /// IQ4_NL, with Q6_K for the head and Q5_K for a few.
    Iq4Nl,
    /// IQ4_XS, with the same.
    Iq4Xs,
    /// MXFP4 for experts, Q8_0 for all else.
    Mxfp4Moe,
}

/// What is known about one mixture.
struct Row {
    mixture: Mixture,
    name: &'static str,
    /// Another name for it in llama-quantize.
    alias: Option<&'static str>,
    /// `llama_ftype`.
    file_type: u32,
    base: Dtype,
}

const fn row(mixture: Mixture, name: &'static str, file_type: u32, base: Dtype) -> Row {
    Row {
        mixture,
        name,
        alias: None,
        file_type,
        base,
    }
}

const fn also(alias: &'static str, row: Row) -> Row {
    Row {
        alias: Some(alias),
        ..row
    }
}

/// Every mixture, in the order of the enum.
const ROWS: &[Row] = &[
    row(Mixture::Q4_0, "q4_0", 2, Dtype::Q4_0),
    row(Mixture::Q4_1, "q4_1", 3, Dtype::Q4_1),
    row(Mixture::Q5_0, "q5_0", 8, Dtype::Q5_0),
    row(Mixture::Q5_1, "q5_1", 9, Dtype::Q5_1),
    row(Mixture::Q2K, "q2_k", 10, Dtype::Q2K),
    row(Mixture::Q2KS, "q2_k_s", 21, Dtype::Q2K),
    row(Mixture::Q3KS, "q3_k_s", 11, Dtype::Q3K),
    also("q3_k", row(Mixture::Q3KM, "q3_k_m", 12, Dtype::Q3K)),
    row(Mixture::Q3KL, "q3_k_l", 13, Dtype::Q3K),
    row(Mixture::Q4KS, "q4_k_s", 14, Dtype::Q4K),
    also("q4_k", row(Mixture::Q4KM, "q4_k_m", 15, Dtype::Q4K)),
    row(Mixture::Q5KS, "q5_k_s", 16, Dtype::Q5K),
    also("q5_k", row(Mixture::Q5KM, "q5_k_m", 17, Dtype::Q5K)),
    row(Mixture::Q6K, "q6_k", 18, Dtype::Q6K),
    row(Mixture::Iq4Nl, "iq4_nl", 25, Dtype::Iq4Nl),
    row(Mixture::Iq4Xs, "iq4_xs", 30, Dtype::Iq4Xs),
    row(Mixture::Mxfp4Moe, "mxfp4_moe", 38, Dtype::Mxfp4),
];

impl Mixture {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        ROWS.iter().map(|row| row.mixture)
    }

    /// The mixture of this name, in any case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let is = |known: &str| known.eq_ignore_ascii_case(name);
        let mut rows = ROWS.iter();
        let found = rows.find(|row| is(row.name) || row.alias.is_some_and(is));
        found.map(|row| row.mixture)
    }

    fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// Its usual name.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// `general.file_type` of a file of it (`llama_ftype`).
    pub(super) fn file_type(self) -> u32 {
        self.row().file_type
    }

    /// The format of most matrices.
    #[must_use]
    pub fn base(self) -> Dtype {
        self.row().base
    }

    /// The format of a matrix, whether or not its blocks fit the rows. `form` is the model as GGUF holds it, `name` and
    /// `shape` are canonical, those of one expert for experts; `has_importance` says whether there is an importance matrix.
    pub(super) fn format(
        self,
        form: &ModelConfig,
        (name, shape): (&str, &[usize]),
        has_importance: bool,
    ) -> Dtype {
        let base = self.base();
        let head = match form.tie_word_embeddings {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        };
        if name == head {
            let cols = shape.last().copied().unwrap_or(1);
            return match self {
                Self::Mxfp4Moe => Dtype::Q8_0,
                _ if !cols.is_multiple_of(base.block_len()) => Dtype::Q8_0,
                _ => Dtype::Q6K,
            };
        }
        if self == Self::Mxfp4Moe {
            // What is stacked: experts, and the halves of latent attention.
            let is_stacked = name.contains(".mlp.experts.") || shape.len() > 2;
            return if is_stacked { base } else { Dtype::Q8_0 };
        }
        let Some((layer, part)) = in_layer(name) else {
            return base;
        };
        let few = !form.moe.layers.is_empty() && form.moe.n_experts == FEW_EXPERTS;
        match part {
            "self_attn.v_proj.weight" | "self_attn.k_proj.weight" if few => Dtype::Q8_0,
            "self_attn.v_proj.weight" => match self.values(form, layer) {
                Dtype::Q3K | Dtype::Q4K if is_70b(form) => Dtype::Q5K,
                dtype => dtype,
            },
            "self_attn.o_proj.weight" => self.outputs(few),
            _ if part.ends_with("down_proj.weight") => {
                self.down(layer, form.n_layers, has_importance)
            }
            _ => base,
        }
    }

    /// The format of the values of attention.
    fn values(self, form: &ModelConfig, layer: usize) -> Dtype {
        let many = form.n_heads / form.n_kv_heads.max(1) >= MANY_HEADS;
        match self {
            Self::Q2K if !many => Dtype::Q3K,
            Self::Q2K | Self::Q2KS if many => Dtype::Q4K,
            Self::Q3KM if layer < 2 => Dtype::Q5K,
            Self::Q3KM => Dtype::Q4K,
            Self::Q3KL => Dtype::Q5K,
            Self::Iq4Nl | Self::Iq4Xs if many => Dtype::Q5K,
            Self::Q4KM | Self::Q5KM if gets_more_bits(layer, form.n_layers) => Dtype::Q6K,
            Self::Q4KS if layer < 4 => Dtype::Q5K,
            _ => self.base(),
        }
    }

    /// The format of the output of attention, in a model of `few` experts or another.
    fn outputs(self, few: bool) -> Dtype {
        match self {
            Self::Q2K | Self::Q3KS | Self::Q3KM | Self::Q4KS | Self::Q4KM if few => Dtype::Q5K,
            Self::Iq4Nl | Self::Iq4Xs if few => Dtype::Q5K,
            Self::Q2K if !few => Dtype::Q3K,
            Self::Q3KM if !few => Dtype::Q4K,
            Self::Q3KL if !few => Dtype::Q5K,
            _ => self.base(),
        }
    }

    /// The format of down projections.
    fn down(self, layer: usize, n_layers: usize, has_importance: bool) -> Dtype {
        let is_early = layer < n_layers / 8;
        match self {
            Self::Q2K => Dtype::Q3K,
            Self::Q2KS if is_early => Dtype::Q4K,
            Self::Q3KM if layer < n_layers / 16 => Dtype::Q5K,
            Self::Q3KM => Dtype::Q4K,
            Self::Q3KL => Dtype::Q5K,
            Self::Q4KM | Self::Q5KM if gets_more_bits(layer, n_layers) => Dtype::Q6K,
            Self::Iq4Nl | Self::Iq4Xs if is_early && !has_importance => Dtype::Q5K,
            Self::Q4KS if is_early => Dtype::Q5K,
            Self::Q4_0 if is_early && has_importance => Dtype::Q4_1,
            Self::Q5_0 if is_early && has_importance => Dtype::Q5_1,
            _ => self.base(),
        }
    }
}

/// The first and the last eighth of the layers, and every third between.
fn gets_more_bits(layer: usize, n_layers: usize) -> bool {
    let eighth = n_layers / 8;
    layer < eighth || layer >= 7 * n_layers / 8 || (layer - eighth) % 3 == 2
}

fn is_70b(form: &ModelConfig) -> bool {
    let shares = match form.model_type.as_str() {
        "llama" | "mistral" | "mixtral" => form.n_heads != form.n_kv_heads,
        "qwen2" => true,
        _ => false,
    };
    shares && form.n_layers == LAYERS_OF_70B
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(kind: &str, n_layers: usize, n_experts: usize) -> ModelConfig {
        let json = format!(
            r#"{{"model_type": "{kind}", "vocab_size": 100, "hidden_size": 256, "num_hidden_layers": {n_layers},
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": {n_experts},
            "num_experts_per_tok": 2, "intermediate_size": 256, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64, "rope_theta": 10000.0}}"#
        );
        ModelConfig::parse("m", &json, None).unwrap()
    }

    fn layers(form: &ModelConfig, part: &str, wanted: Dtype) -> Vec<usize> {
        let format = |layer: &usize| {
            let name = format!("model.layers.{layer}.{part}.weight");
            Mixture::Q4KM.format(form, (&name, &[256]), false)
        };
        (0..form.n_layers)
            .filter(|layer| format(layer) == wanted)
            .collect()
    }

    #[test]
    fn values_and_down_projections_of_some_layers_get_more_bits() {
        let llama = model("llama", 8, 0);
        // One eighth is one layer: 0 and 7, and 3 and 6 of those between.
        assert_eq!(layers(&llama, "self_attn.v_proj", Dtype::Q6K), [0, 3, 6, 7]);
        assert_eq!(layers(&llama, "mlp.down_proj", Dtype::Q6K), [0, 3, 6, 7]);
        assert_eq!(layers(&llama, "mlp.up_proj", Dtype::Q4K).len(), 8);
        let four = model("mixtral", 4, 4);
        // No eighth: every third, and the last layer.
        let down = "mlp.experts.2.down_proj";
        assert_eq!(layers(&four, down, Dtype::Q6K), [2, 3]);
    }

    #[test]
    fn eight_experts_leave_bits_for_attention() {
        let mixtral = model("mixtral", 4, 8);
        let count = |part, format| layers(&mixtral, part, format).len();
        assert_eq!(count("self_attn.v_proj", Dtype::Q8_0), 4);
        assert_eq!(count("self_attn.k_proj", Dtype::Q8_0), 4);
        assert_eq!(count("self_attn.o_proj", Dtype::Q5K), 4);
        assert_eq!(count("self_attn.q_proj", Dtype::Q4K), 4);
    }

    #[test]
    fn the_head_and_the_values_of_large_models_get_more_bits() {
        let mut llama = model("llama", 80, 0);
        let format =
            |form: &ModelConfig, name, cols| Mixture::Q4KM.format(form, (name, &[cols]), false);
        assert_eq!(format(&llama, "lm_head.weight", 256), Dtype::Q6K);
        assert_eq!(format(&llama, "lm_head.weight", 128), Dtype::Q8_0);
        assert_eq!(format(&llama, "model.embed_tokens.weight", 256), Dtype::Q4K);
        assert_eq!(layers(&llama, "self_attn.v_proj", Dtype::Q4K).len(), 0);
        llama.n_kv_heads = llama.n_heads;
        assert_eq!(layers(&llama, "self_attn.v_proj", Dtype::Q5K).len(), 0);
        llama.tie_word_embeddings = true;
        assert_eq!(format(&llama, "model.embed_tokens.weight", 256), Dtype::Q6K);
    }

    #[test]
    fn names_and_types_are_those_of_llama_quantize() {
        for (at, mixture) in Mixture::all().enumerate() {
            assert_eq!(mixture as usize, at);
            let upper = mixture.name().to_ascii_uppercase();
            assert_eq!(Mixture::from_name(&upper), Some(mixture));
        }
        assert_eq!(Mixture::from_name("Q4_K"), Some(Mixture::Q4KM));
        assert_eq!(Mixture::from_name("q8_0"), None);
    }

    #[test]
    fn an_importance_matrix_changes_the_first_down_projections() {
        let form = model("llama", 16, 0);
        let of = |mixture: Mixture, layer, has_importance| {
            let name = format!("model.layers.{layer}.mlp.down_proj.weight");
            mixture.format(&form, (&name, &[256, 256]), has_importance)
        };
        assert_eq!(of(Mixture::Q4_0, 1, true), Dtype::Q4_1);
        assert_eq!(of(Mixture::Q4_0, 1, false), Dtype::Q4_0);
        assert_eq!(of(Mixture::Q4_0, 2, true), Dtype::Q4_0);
        assert_eq!(of(Mixture::Iq4Xs, 0, false), Dtype::Q5K);
        assert_eq!(of(Mixture::Iq4Xs, 0, true), Dtype::Iq4Xs);
        assert_eq!(of(Mixture::Q2KS, 1, true), Dtype::Q4K);
        assert_eq!(of(Mixture::Q3KM, 0, false), Dtype::Q5K);
    }

    #[test]
    fn experts_are_mxfp4_and_all_else_is_not() {
        let form = model("mixtral", 4, 4);
        let of = |name, shape: &[usize]| Mixture::Mxfp4Moe.format(&form, (name, shape), false);
        let expert = "model.layers.1.mlp.experts.2.up_proj.weight";
        assert_eq!(of(expert, &[256, 256]), Dtype::Mxfp4);
        assert_eq!(of("lm_head.weight", &[100, 256]), Dtype::Q8_0);
        assert_eq!(of("model.embed_tokens.weight", &[100, 256]), Dtype::Q8_0);
        let keys = "model.layers.1.self_attn.k_b_proj.weight";
        assert_eq!(of(keys, &[4, 64, 32]), Dtype::Mxfp4);
    }
}
