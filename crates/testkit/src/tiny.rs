//! Tiny random `qwen3_moe` checkpoints.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cadre_checkpoint::{
    Activation, AttentionConfig, Checkpoint, DecoupledRouter, Dtype, FolderContents, ModelConfig,
    MoeConfig, NormKind, QkNorm, RopeConfig, RouterConfig, Scales, TensorData, tensor_specs,
    write_folder,
};

use crate::random::Random;
use crate::text::tiny_tokenizer_json;

/// Builds a random checkpoint: by default hidden 32, 2 layers, 8 experts of width 16 with top-2,
/// 4 query heads and 2 key/value heads of width 8, 384 tokens, context 128, untied, f32.
///
/// ```
/// let folder = cadre_testkit::TinyMoe::default().n_experts(4).tied(true).build().unwrap();
/// assert_eq!(folder.open().unwrap().config().moe.n_experts, 4);
/// ```
#[derive(Debug, Clone)]
pub struct TinyMoe {
    config: ModelConfig,
    dtype: Dtype,
    seed: u64,
}

impl Default for TinyMoe {
    fn default() -> Self {
        let config = ModelConfig {
            model_type: "qwen3_moe".to_owned(),
            vocab_size: 384,
            hidden_size: 32,
            n_layers: 2,
            max_position_embeddings: 128,
            tie_word_embeddings: false,
            lm_head_bias: false,
            norm: NormKind::Rms,
            norm_eps: 1e-6,
            post_norms: false,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 8,
            attention: AttentionConfig {
                qkv_bias: false,
                o_bias: false,
                qk_norm: QkNorm::PerHead,
                sinks: false,
                clip_qkv: None,
                scale: 1.0 / 8f64.sqrt(),
                windows: vec![None; 2],
                mla: None,
                experts: None,
            },
            rope: RopeConfig::plain(10_000.0, 8),
            local_rope: None,
            intermediate_size: 48,
            mlp_bias: false,
            activation: Activation::Silu,
            moe: MoeConfig {
                layers: vec![0, 1],
                n_experts: 8,
                top_k: 2,
                intermediate_size: 16,
                ..MoeConfig::default()
            },
            scales: Scales::default(),
            eos_token_ids: vec![0],
            bos_token_id: None,
            pad_token_id: None,
            dtype: Some(Dtype::F32),
        };
        Self {
            config,
            dtype: Dtype::F32,
            seed: 1,
        }
    }
}

impl TinyMoe {
    /// Experts per layer.
    #[must_use]
    pub fn n_experts(mut self, n_experts: usize) -> Self {
        self.config.moe.n_experts = n_experts;
        self
    }

    /// Experts per token.
    #[must_use]
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.config.moe.top_k = top_k;
        self
    }

    /// Whether the head is the embedding.
    #[must_use]
    pub fn tied(mut self, tied: bool) -> Self {
        self.config.tie_word_embeddings = tied;
        self
    }

    /// Whether picked weights are divided by their sum.
    #[must_use]
    pub fn norm_topk_prob(mut self, norm: bool) -> Self {
        self.config.moe.router = RouterConfig::TopK { norm };
        self
    }

    /// Dense layers.
    #[must_use]
    pub fn mlp_only_layers(mut self, layers: &[usize]) -> Self {
        self.config
            .moe
            .layers
            .retain(|layer| !layers.contains(layer));
        self
    }

    /// Query heads, key/value heads, and their width.
    #[must_use]
    pub fn heads(mut self, n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Self {
        (
            self.config.n_heads,
            self.config.n_kv_heads,
            self.config.head_dim,
        ) = (n_heads, n_kv_heads, head_dim);
        self.config.rope.dim = head_dim;
        self.config.attention.scale = 1.0 / (head_dim as f64).sqrt();
        self
    }

    /// Decoder layers.
    #[must_use]
    pub fn n_layers(mut self, n_layers: usize) -> Self {
        let was_dense: Vec<usize> = (0..self.config.n_layers)
            .filter(|layer| !self.config.is_moe_layer(*layer))
            .collect();
        self.config.moe.layers = (0..n_layers)
            .filter(|layer| !was_dense.contains(layer))
            .collect();
        self.config.attention.windows = vec![None; n_layers];
        self.config.n_layers = n_layers;
        self
    }

    /// Number format on disk.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self.config.dtype = Some(dtype);
        self
    }

    /// Seed of the weights.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Any other field of the configuration.
    #[must_use]
    pub fn configure(mut self, edit: impl FnOnce(&mut ModelConfig)) -> Self {
        edit(&mut self.config);
        self
    }

    /// Makes `config` that of a model with one router before its layers, which picks for each of them.
    pub fn decouple(config: &mut ModelConfig) {
        config.model_type = "cadre_moe".to_owned();
        config.moe.decoupled_router = Some(DecoupledRouter {
            hidden_size: 16,
            n_layers: 1,
            n_heads: 2,
            head_dim: 8,
            intermediate_size: 16,
            per_layer: true,
        });
    }

    /// The configuration as it stands.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Random tensors of the architecture: norms around 1, matrices scaled by their width, the
    /// router wide enough that tokens differ in their experts.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorData<'static>> {
        let mut random = Random::new(self.seed);
        tensor_specs(&self.config)
            .into_iter()
            .map(|(name, shape)| {
                let n_values = shape.iter().product();
                let values = match shape.as_slice() {
                    [_] => random
                        .values(n_values, 0.2)
                        .iter()
                        .map(|value| 1.0 + value)
                        .collect(),
                    _ if name == "model.embed_tokens.weight" => random.values(n_values, 1.0),
                    _ if name.ends_with("mlp.gate.weight") => random.values(n_values, 0.5),
                    [_, width, ..] => random.values(n_values, (3.0 / *width as f32).sqrt()),
                    [] => random.values(n_values, 1.0),
                };
                TensorData {
                    name,
                    shape,
                    values: Cow::Owned(values),
                }
            })
            .collect()
    }

    /// Writes the checkpoint, with its tokenizer, into `folder`.
    ///
    /// # Errors
    /// The configuration contradicts itself, or the file system fails.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let tokenizer = tiny_tokenizer_json(self.config.vocab_size)?;
        let contents = FolderContents {
            config: &self.config,
            tensors: &self.tensors(),
            dtype: self.dtype,
            tokenizer_json: Some(&tokenizer),
        };
        Ok(write_folder(folder, &contents)?)
    }

    /// Writes the checkpoint into a new temporary folder.
    ///
    /// # Errors
    /// As [`TinyMoe::write`].
    pub fn build(&self) -> Result<TinyFolder> {
        let parent = tempfile::tempdir()?;
        let path = parent.path().join("tiny");
        self.write(&path)?;
        Ok(TinyFolder {
            path,
            _parent: parent,
        })
    }
}

/// A checkpoint folder that is deleted with this value.
#[derive(Debug)]
pub struct TinyFolder {
    path: PathBuf,
    _parent: tempfile::TempDir,
}

impl TinyFolder {
    /// The checkpoint folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the checkpoint.
    ///
    /// # Errors
    /// The folder was damaged meanwhile.
    pub fn open(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(&self.path)?)
    }

    /// Replaces one key of `config.json`; `null` stays in the file as `null`.
    ///
    /// # Errors
    /// The file system fails.
    pub fn set_config(&self, key: &str, value: serde_json::Value) -> Result<()> {
        let path = self.path.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        config[key] = value;
        Ok(std::fs::write(&path, config.to_string())?)
    }

    /// Rewrites `model.safetensors` with `edit` applied to its tensors, unchecked: for making
    /// damaged checkpoints.
    ///
    /// # Errors
    /// The file system fails.
    pub fn edit_tensors(&self, edit: impl FnOnce(&mut Vec<TensorData<'_>>)) -> Result<()> {
        let checkpoint = self.open()?;
        let mut tensors = Vec::new();
        for name in checkpoint.tensor_names() {
            let view = checkpoint.tensor(name)?;
            tensors.push(TensorData {
                name: name.to_owned(),
                shape: view.shape.to_vec(),
                values: Cow::Owned(view.to_f32()),
            });
        }
        edit(&mut tensors);
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|tensor| Dtype::F32.encode(&tensor.values).unwrap_or_default())
            .collect();
        let mut views = Vec::new();
        for (tensor, bytes) in tensors.iter().zip(&bytes) {
            let shape = tensor.shape.clone();
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes)?;
            views.push((tensor.name.as_str(), view));
        }
        let file = safetensors::serialize(views, None)?;
        // A new file rather than a shorter one under the map that `checkpoint` still holds.
        let path = self.path.join("model.safetensors");
        std::fs::remove_file(&path)?;
        Ok(std::fs::write(&path, file)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_models_and_others_do_not() {
        let digest = |seed| {
            let folder = TinyMoe::default().seed(seed).build().unwrap();
            folder.open().unwrap().digest().to_owned()
        };
        assert_eq!(digest(1), digest(1));
        assert_ne!(digest(1), digest(2));
    }

    #[test]
    fn every_knob_gives_a_checkpoint_that_opens() {
        let builders = [
            TinyMoe::default().tied(true).dtype(Dtype::Bf16),
            TinyMoe::default()
                .mlp_only_layers(&[0])
                .norm_topk_prob(false),
            TinyMoe::default()
                .n_experts(1)
                .top_k(1)
                .heads(6, 2, 4)
                .n_layers(1),
        ];
        for builder in builders {
            let folder = builder.build().unwrap();
            let checkpoint = folder.open().unwrap();
            assert_eq!(checkpoint.config(), builder.config());
            checkpoint
                .expect_exactly(&tensor_specs(builder.config()))
                .unwrap();
            assert!(checkpoint.tokenizer().unwrap().vocab_size() <= 384);
        }
    }
}
