//! Mixtures of block formats: which tensors of a quantised GGUF file get more bits than the rest.
//!
//! The rules are those of llama-quantize (`src/llama-quant.cpp`, as of llama-cpp-python 0.3.36) without an importance
//! matrix, so that a file of the same name has the same formats whoever wrote it.

use super::in_layer;
use crate::Dtype;
use crate::config::ModelConfig;

/// Number of experts for which llama-quantize spends more bits on attention, which is small beside them (Mixtral).
const FEW_EXPERTS: usize = 8;
/// Layers of the models whose values are shared by so many heads that they get more bits (Llama 2 70B and its kin).
const LAYERS_OF_70B: usize = 80;

/// A mixture of formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixture {
    /// Q4_K, with Q6_K for the head and for the more sensitive values and down projections.
    Q4KM,
    /// The same over Q5_K.
    Q5KM,
}

impl Mixture {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Q4KM, Self::Q5KM];

    /// Its usual name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4KM => "q4_k_m",
            Self::Q5KM => "q5_k_m",
        }
    }

    /// `general.file_type` of a file of it (`llama_ftype`).
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::Q4KM => 15,
            Self::Q5KM => 17,
        }
    }

    fn base(self) -> Dtype {
        match self {
            Self::Q4KM => Dtype::Q4K,
            Self::Q5KM => Dtype::Q5K,
        }
    }

    /// The format of a matrix with rows of `cols` values, whether or not its blocks fit them. `form` is the model as
    /// GGUF holds it, `name` canonical, that of one expert for experts.
    pub(super) fn format(self, form: &ModelConfig, name: &str, cols: usize) -> Dtype {
        let base = self.base();
        let Some((layer, part)) = in_layer(name) else {
            let head = match form.tie_word_embeddings {
                true => "model.embed_tokens.weight",
                false => "lm_head.weight",
            };
            return match name == head {
                true if cols.is_multiple_of(base.block_len()) => Dtype::Q6K,
                true => Dtype::Q8_0,
                false => base,
            };
        };
        let few = !form.moe.layers.is_empty() && form.moe.n_experts == FEW_EXPERTS;
        let favoured = gets_more_bits(layer, form.n_layers);
        match part {
            "self_attn.v_proj.weight" | "self_attn.k_proj.weight" if few => Dtype::Q8_0,
            "self_attn.v_proj.weight" if favoured => Dtype::Q6K,
            "self_attn.v_proj.weight" if is_70b(form) => Dtype::Q5K,
            "self_attn.o_proj.weight" if few => Dtype::Q5K,
            _ if part.ends_with("down_proj.weight") && favoured => Dtype::Q6K,
            _ => base,
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
        "llama" | "mixtral" => form.n_heads != form.n_kv_heads,
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
            Mixture::Q4KM.format(form, &name, 256)
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
        let format = |form: &ModelConfig, name, cols| Mixture::Q4KM.format(form, name, cols);
        assert_eq!(format(&llama, "lm_head.weight", 256), Dtype::Q6K);
        assert_eq!(format(&llama, "lm_head.weight", 128), Dtype::Q8_0);
        assert_eq!(format(&llama, "model.embed_tokens.weight", 256), Dtype::Q4K);
        assert_eq!(layers(&llama, "self_attn.v_proj", Dtype::Q4K).len(), 0);
        llama.n_kv_heads = llama.n_heads;
        assert_eq!(layers(&llama, "self_attn.v_proj", Dtype::Q5K).len(), 0);
        llama.tie_word_embeddings = true;
        assert_eq!(format(&llama, "model.embed_tokens.weight", 256), Dtype::Q6K);
    }
}
