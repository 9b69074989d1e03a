//! `config.json` and `generation_config.json` of a `qwen3_moe` checkpoint, with every dialect
//! resolved into one [`ModelConfig`].

use serde_json::{Value, json};

use crate::dtype::Dtype;
use crate::error::{CheckpointError, Result};
use crate::keys::Keys;

/// Architectures that this version reads.
pub(crate) const KNOWN_MODEL_TYPES: &[&str] = &["qwen3_moe"];

/// Experts of all layers together; far above any model, so that a damaged file cannot make
/// readers reserve memory without end.
const MAX_EXPERTS: usize = 1 << 22;

/// What a model is made of. Both spellings of transformers 4 and 5 arrive here as one.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Architecture, `qwen3_moe`.
    pub model_type: String,
    /// Rows of the embedding and of the logits. May exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream, `d_model`.
    pub hidden_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head; even, because of the rotary halves.
    pub head_dim: usize,
    /// Experts per MoE layer.
    pub n_experts: usize,
    /// Experts that one token uses.
    pub top_k: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Width of the feed-forward of layers that are not MoE.
    pub intermediate_size: usize,
    /// Whether the weights of the picked experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// Layers that are dense although `decoder_sparse_step` would make them MoE.
    pub mlp_only_layers: Vec<usize>,
    /// Layer `l` is MoE when `(l + 1) % decoder_sparse_step == 0`.
    pub decoder_sparse_step: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// Tokens that end a text, ascending, from both JSON files.
    pub eos_token_ids: Vec<u32>,
    /// Token put before a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Token used for padding, if the model has one.
    pub pad_token_id: Option<u32>,
    /// Number format named by the configuration. The tensors' own headers decide.
    pub dtype: Option<Dtype>,
}

impl ModelConfig {
    /// Reads `config.json` text, and `generation_config.json` text where there is one.
    ///
    /// `origin` names the checkpoint in errors.
    ///
    /// # Errors
    /// Broken JSON, a missing or contradictory key, and every key that asks for something this
    /// version would compute wrongly.
    pub fn parse(origin: &str, config: &str, generation: Option<&str>) -> Result<Self> {
        let keys = Keys::parse(format!("{origin}/config.json"), config)?;
        refuse_unsupported(&keys)?;
        let n_heads = keys.size("num_attention_heads")?;
        let hidden_size = keys.size("hidden_size")?;
        let moe_intermediate_size = keys.size("moe_intermediate_size")?;
        let mut parsed = Self {
            model_type: keys.text("model_type")?.to_owned(),
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            n_layers: keys.size("num_hidden_layers")?,
            n_heads,
            n_kv_heads: keys.size("num_key_value_heads")?,
            head_dim: keys.size_or("head_dim", hidden_size / n_heads)?,
            n_experts: keys.size_alias("num_experts", "num_local_experts")?,
            top_k: keys.size("num_experts_per_tok")?,
            moe_intermediate_size,
            intermediate_size: keys.size_or("intermediate_size", moe_intermediate_size)?,
            norm_topk_prob: keys.flag_or("norm_topk_prob", false)?,
            mlp_only_layers: keys.sizes("mlp_only_layers")?,
            decoder_sparse_step: keys.size_or("decoder_sparse_step", 1)?,
            rms_norm_eps: keys.number("rms_norm_eps")?,
            rope_theta: rope_theta(&keys)?,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            tie_word_embeddings: keys.flag_or("tie_word_embeddings", false)?,
            eos_token_ids: keys.ids("eos_token_id")?,
            bos_token_id: keys.ids("bos_token_id")?.first().copied(),
            pad_token_id: keys.ids("pad_token_id")?.first().copied(),
            dtype: keys.dtype()?,
        };
        if let Some(text) = generation {
            let keys = Keys::parse(format!("{origin}/generation_config.json"), text)?;
            parsed.eos_token_ids.extend(keys.ids("eos_token_id")?);
        }
        parsed.eos_token_ids.sort_unstable();
        parsed.eos_token_ids.dedup();
        parsed.check(&keys.file)?;
        Ok(parsed)
    }

    /// Whether layer `layer` (from 0) has experts; the others have one dense feed-forward.
    #[must_use]
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        !self.mlp_only_layers.contains(&layer)
            && (layer + 1).is_multiple_of(self.decoder_sparse_step)
    }

    /// Indices of the layers that have experts, ascending.
    #[must_use]
    pub fn moe_layers(&self) -> Vec<usize> {
        (0..self.n_layers)
            .filter(|layer| self.is_moe_layer(*layer))
            .collect()
    }

    /// Checks the relations between the fields. `file` names the configuration in errors.
    ///
    /// # Errors
    /// The first relation that does not hold, with its key.
    pub fn check(&self, file: &str) -> Result<()> {
        let complain = |key: &str, problem: String| {
            Err(CheckpointError::Key {
                file: file.to_owned(),
                key: key.to_owned(),
                problem,
            })
        };
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let problem = format!(
                "is {}, which does not divide num_attention_heads = {}",
                self.n_kv_heads, self.n_heads
            );
            return complain("num_key_value_heads", problem);
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            let problem = format!("is {}, expected a positive even number", self.head_dim);
            return complain("head_dim", problem);
        }
        if self.n_layers.saturating_mul(self.n_experts) > MAX_EXPERTS {
            let problem = format!(
                "is {}, which with num_experts = {} makes more than {MAX_EXPERTS} experts",
                self.n_layers, self.n_experts
            );
            return complain("num_hidden_layers", problem);
        }
        if self.top_k > self.n_experts {
            let problem = format!(
                "is {}, more than num_experts = {}",
                self.top_k, self.n_experts
            );
            return complain("num_experts_per_tok", problem);
        }
        if self.n_experts > usize::from(u16::MAX) {
            let problem = format!("is {}, expected at most {}", self.n_experts, u16::MAX);
            return complain("num_experts", problem);
        }
        if let Some(layer) = self
            .mlp_only_layers
            .iter()
            .find(|layer| **layer >= self.n_layers)
        {
            let problem = format!(
                "names layer {layer}, but there are {} layers",
                self.n_layers
            );
            return complain("mlp_only_layers", problem);
        }
        for (key, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return complain(key, format!("is {value}, expected a positive number"));
            }
        }
        let ids = self.eos_token_ids.iter().chain(&self.bos_token_id);
        if let Some(id) = ids.copied().find(|id| *id as usize >= self.vocab_size) {
            let problem = format!("is {id}, outside of vocab_size = {}", self.vocab_size);
            return complain("eos_token_id / bos_token_id", problem);
        }
        Ok(())
    }

    /// The `config.json` that transformers writes for this model, keys sorted, with the spellings
    /// of both transformers 4 (`num_experts`, `rope_theta`, `torch_dtype`) and 5
    /// (`num_local_experts`, `rope_parameters`, `dtype`) so that either reads it.
    #[must_use]
    pub fn to_config_json(&self, dtype: Dtype) -> String {
        let value = json!({
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "decoder_sparse_step": self.decoder_sparse_step,
            "dtype": dtype.torch_name(),
            "eos_token_id": one_or_many(&self.eos_token_ids),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_only_layers": self.mlp_only_layers,
            "model_type": self.model_type,
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "num_attention_heads": self.n_heads,
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "num_local_experts": self.n_experts,
            "output_router_logits": false,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.001,
            "sliding_window": null,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype.torch_name(),
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab_size,
        });
        format!("{value:#}\n")
    }

    /// The `generation_config.json` that belongs to this model.
    #[must_use]
    pub fn to_generation_json(&self) -> String {
        let value = json!({
            "_from_model_config": true,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": one_or_many(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        });
        format!("{value:#}\n")
    }
}

fn one_or_many(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        _ => json!(ids),
    }
}

/// Refuses every key whose effect is not implemented, rather than ignoring it.
fn refuse_unsupported(keys: &Keys) -> Result<()> {
    let model_type = keys.text("model_type")?;
    if !KNOWN_MODEL_TYPES.contains(&model_type) {
        let known = format!("known model types: {}", KNOWN_MODEL_TYPES.join(", "));
        return Err(keys.unsupported("model_type", &json!(model_type), &known));
    }
    let only = |key: &str, allowed: Value, reason: &str| match keys.get(key) {
        Some(value) if *value != allowed => Err(keys.unsupported(key, value, reason)),
        _ => Ok(()),
    };
    only(
        "attention_bias",
        json!(false),
        "only attention without biases is implemented",
    )?;
    only(
        "use_sliding_window",
        json!(false),
        "only full attention is implemented",
    )?;
    only("hidden_act", json!("silu"), "only silu is implemented")?;
    only(
        "partial_rotary_factor",
        json!(1.0),
        "only rotation of the whole head is implemented",
    )?;
    if let Some(value) = keys.get("quantization_config") {
        let reason = "only F32, F16 and BF16 tensors are read; use the unquantised checkpoint";
        return Err(keys.unsupported("quantization_config", value, reason));
    }
    if let Some(value) = keys.get("layer_types") {
        let full = |kind: &Value| kind == "full_attention";
        if !value.as_array().is_some_and(|kinds| kinds.iter().all(full)) {
            let reason = "only `full_attention` in every layer is implemented";
            return Err(keys.unsupported("layer_types", value, reason));
        }
    }
    for key in ["rope_scaling", "rope_parameters"] {
        refuse_rope_scaling(keys, key)?;
    }
    Ok(())
}

/// Allows only the unscaled rotation in `rope_scaling` (v4) or `rope_parameters` (v5).
fn refuse_rope_scaling(keys: &Keys, key: &str) -> Result<()> {
    let Some(value) = keys.get(key) else {
        return Ok(());
    };
    let Some(map) = value.as_object() else {
        return Err(keys.problem(key, format!("is {value}, expected an object or null")));
    };
    for (name, entry) in map {
        let harmless = match name.as_str() {
            "rope_type" | "type" => entry == "default",
            "rope_theta" => true,
            "partial_rotary_factor" => entry.as_f64() == Some(1.0),
            _ => entry.is_null(),
        };
        if !harmless {
            let reason = "only the unscaled `default` rotation is implemented";
            return Err(keys.unsupported(key, value, reason));
        }
    }
    Ok(())
}

fn rope_theta(keys: &Keys) -> Result<f64> {
    let nested = keys
        .get("rope_parameters")
        .and_then(|value| value.get("rope_theta"));
    match (nested, keys.get("rope_theta")) {
        (Some(nested), Some(flat)) if nested.as_f64() != flat.as_f64() => {
            let problem = format!("is {flat}, but rope_parameters.rope_theta is {nested}");
            Err(keys.problem("rope_theta", problem))
        }
        (Some(value), _) | (None, Some(value)) => value
            .as_f64()
            .ok_or_else(|| keys.problem("rope_theta", format!("is {value}, expected a number"))),
        (None, None) => Err(keys.problem("rope_theta", "is missing".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published layout of transformers 4.
    const V4: &str = r#"{"model_type":"qwen3_moe","vocab_size":64,"hidden_size":32,
        "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,
        "num_experts":8,"num_experts_per_tok":2,"moe_intermediate_size":16,
        "intermediate_size":48,"norm_topk_prob":true,"mlp_only_layers":[],"decoder_sparse_step":1,
        "rms_norm_eps":1e-06,"rope_theta":1000000.0,"rope_scaling":null,
        "max_position_embeddings":128,"tie_word_embeddings":false,"eos_token_id":5,
        "bos_token_id":3,"attention_bias":false,"use_sliding_window":false,"sliding_window":null,
        "hidden_act":"silu","torch_dtype":"bfloat16"}"#;

    fn edited(key: &str, value: Value) -> String {
        let mut config: Value = serde_json::from_str(V4).unwrap();
        config[key] = value;
        config.to_string()
    }

    fn message(config: &str) -> String {
        ModelConfig::parse("m", config, None)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn both_dialects_give_the_same_config() {
        let v4 = ModelConfig::parse("m", V4, None).unwrap();
        let mut other: Value = serde_json::from_str(V4).unwrap();
        let map = other.as_object_mut().unwrap();
        for gone in ["num_experts", "rope_theta", "rope_scaling", "torch_dtype"] {
            map.remove(gone);
        }
        map.insert("num_local_experts".into(), json!(8));
        map.insert(
            "rope_parameters".into(),
            json!({"rope_theta": 1e6, "rope_type": "default"}),
        );
        map.insert("dtype".into(), json!("bfloat16"));
        assert_eq!(
            ModelConfig::parse("m", &other.to_string(), None).unwrap(),
            v4
        );
        assert_eq!(
            (v4.n_experts, v4.top_k, v4.head_dim, v4.rope_theta),
            (8, 2, 16, 1e6)
        );
        assert_eq!((v4.bos_token_id, v4.dtype), (Some(3), Some(Dtype::Bf16)));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let config = ModelConfig::parse("m", V4, Some(r#"{"eos_token_id":[7,5]}"#)).unwrap();
        assert_eq!(config.eos_token_ids, [5, 7]);
        let text = config.to_config_json(Dtype::Bf16);
        let generation = config.to_generation_json();
        assert_eq!(
            ModelConfig::parse("m", &text, Some(&generation)).unwrap(),
            config
        );
    }

    #[test]
    fn sparse_layers_follow_step_and_exceptions() {
        let mut config = ModelConfig::parse("m", V4, None).unwrap();
        config.n_layers = 6;
        config.decoder_sparse_step = 2;
        config.mlp_only_layers = vec![3];
        assert_eq!(config.moe_layers(), [1, 5]);
    }

    #[test]
    fn keys_that_would_change_the_result_are_refused_by_name() {
        let cases = [
            ("model_type", json!("mixtral"), "qwen3_moe"),
            ("attention_bias", json!(true), "attention_bias"),
            ("use_sliding_window", json!(true), "use_sliding_window"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            (
                "rope_scaling",
                json!({"type": "yarn", "factor": 4.0}),
                "rope_scaling",
            ),
            ("rope_parameters", json!({"rope_type": "linear"}), "linear"),
            (
                "quantization_config",
                json!({"quant_method": "gptq"}),
                "quantization_config",
            ),
            ("layer_types", json!(["sliding_attention"]), "layer_types"),
            ("num_local_experts", json!(4), "num_local_experts"),
            ("dtype", json!("float64"), "float64"),
        ];
        for (key, value, expected) in cases {
            let text = message(&edited(key, value));
            assert!(
                text.contains(expected) && text.contains("m/config.json"),
                "{key}: {text}"
            );
        }
    }

    #[test]
    fn impossible_numbers_are_refused_by_name() {
        let cases = [
            ("hidden_size", json!("wide")),
            ("num_hidden_layers", json!(0)),
            ("num_hidden_layers", json!(1_000_000)),
            ("hidden_size", json!(1u64 << 40)),
            ("vocab_size", Value::Null),
            ("num_key_value_heads", json!(3)),
            ("head_dim", json!(15)),
            ("num_experts_per_tok", json!(9)),
            ("mlp_only_layers", json!([2])),
            ("rms_norm_eps", json!(0.0)),
            ("eos_token_id", json!(64)),
            ("norm_topk_prob", json!("yes")),
        ];
        for (key, value) in cases {
            let text = message(&edited(key, value));
            assert!(text.contains(key), "{key}: {text}");
        }
        assert!(message("{").contains("m/config.json"));
        assert!(message("[]").contains("not an object"));
    }
}
