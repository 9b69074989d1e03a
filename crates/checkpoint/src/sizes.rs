//! How large a model is: parameters, bytes, and the memory of a session, by arithmetic over its configuration and the
//! formats of its tensors.
//!
//! Two questions are kept apart: whether a model fits (everything counts), and how fast it decodes (what one token
//! reads counts).

use std::collections::BTreeMap;

use cadre_kernels::KvFormats;

use crate::Dtype;
use crate::checkpoint::Checkpoint;
use crate::config::{MlaConfig, ModelConfig};
use crate::convert::TargetDtype;
use crate::convert::formats::{for_gguf, stays_f32};
use crate::convert::forms::gguf_form;
use crate::decoupled_router::TABLE;
use crate::gguf_models;
use crate::specs::tensor_specs;

/// Bytes of an f32.
const F32: u64 = 4;

/// Rows and columns that share a scale in FP8 checkpoints.
const FP8_BLOCK: u64 = 128;

/// Bytes that the products keep per input value: blocks of 32 in 44 bytes, and blocks of 256 in 292.
const PRODUCT_BYTES: f64 = 44.0 / 32.0 + 292.0 / 256.0;

/// A quantity, split by what a token touches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Everything.
    pub total: u64,
    /// What one token uses: everything but the experts that it is not sent to, those of attention included. Where tokens
    /// get different numbers of experts, what one uses that gets the most.
    pub active: u64,
    /// What one token reads: as `active`, with one row of an input embedding that is not also the output head.
    pub read_per_token: u64,
    /// All experts, shared ones not among them.
    pub experts: u64,
    /// One expert of one layer; the mean where they differ.
    pub one_expert: u64,
}

/// Tensors of one number format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FormatSize {
    /// Canonical tensors, every expert by itself.
    pub n_tensors: usize,
    /// Their bytes as stored.
    pub n_bytes: u64,
}

/// One decoder layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerSize {
    /// All parameters of the layer.
    pub parameters: u64,
    /// All its bytes as stored.
    pub n_bytes: u64,
    /// Parameters of its experts, shared ones not among them.
    pub expert_parameters: u64,
    /// Formats of its tensors, and how many have each.
    pub formats: BTreeMap<Dtype, usize>,
}

/// What the header of a checkpoint says about sizes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelSizes {
    /// Numbers, tied ones counted once.
    pub parameters: Sizes,
    /// Bytes as the file stores them.
    pub bytes: Sizes,
    /// By number format.
    pub formats: BTreeMap<Dtype, FormatSize>,
    /// Layer by layer.
    pub layers: Vec<LayerSize>,
}

/// How the weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// In memory as stored: norms, biases and routers become f32, matrices stay.
    Loaded,
    /// In memory, with the matrices that are not quantised yet as Q8_0 where their rows are whole blocks of 32.
    LoadedQ8_0,
    /// As a GGUF file that is converted to this would hold them.
    File(TargetDtype),
}

/// Reads the sizes off the header of `checkpoint`; no tensor is touched.
#[must_use]
pub fn model_sizes(checkpoint: &Checkpoint) -> ModelSizes {
    let config = checkpoint.config();
    let mut sizes = ModelSizes {
        layers: vec![LayerSize::default(); config.n_layers],
        ..ModelSizes::default()
    };
    let (mut parameters, mut bytes) = (Counter::new(config), Counter::new(config));
    for (name, format, shape) in checkpoint.tensor_infos() {
        let (n, n_bytes) = (values(shape), stored_bytes(format, shape));
        let place = Place::of(name);
        parameters.add(place, n);
        bytes.add(place, n_bytes);
        let of_format = sizes.formats.entry(format).or_default();
        of_format.n_tensors += 1;
        of_format.n_bytes += n_bytes;
        let layer = place.layer.and_then(|layer| sizes.layers.get_mut(layer));
        if let Some(layer) = layer {
            layer.parameters += n;
            layer.n_bytes += n_bytes;
            layer.expert_parameters += if place.is_expert { n } else { 0 };
            *layer.formats.entry(format).or_default() += 1;
        }
    }
    sizes.parameters = parameters.finish();
    sizes.bytes = bytes.finish();
    sizes
}

/// Bytes of the weights when they are held in another way than stored.
#[must_use]
pub fn held_sizes(checkpoint: &Checkpoint, holding: Holding) -> Sizes {
    let config = checkpoint.config();
    let mut sizes = Counter::new(config);
    let quantise = match holding {
        Holding::File(wanted) => return file_sizes(checkpoint, wanted),
        Holding::Loaded => false,
        Holding::LoadedQ8_0 => true,
    };
    for (name, format, shape) in checkpoint.tensor_infos() {
        let n_bytes = held_bytes(config, quantise, (name, format, shape));
        sizes.add(Place::of(name), n_bytes);
    }
    sizes.finish()
}

/// By the rules of [`crate::Conversion`]. A model that GGUF has no form for is counted in its own.
fn file_sizes(checkpoint: &Checkpoint, wanted: TargetDtype) -> Sizes {
    let (origin, config) = (checkpoint.origin(), checkpoint.config());
    let form = gguf_models::target(origin, config)
        .and_then(|target| gguf_form(origin, target, config))
        .unwrap_or_else(|_| config.clone());
    let mut sizes = Counter::new(&form);
    for (name, shape) in tensor_specs(&form) {
        let stored = checkpoint.tensor_info(&name);
        let stored = stored.map_or(Dtype::F32, |(format, _)| format);
        let format = for_gguf((wanted, false), &form, stored, (&name, &shape)).dtype;
        sizes.add(Place::of(&name), stored_bytes(format, &shape));
    }
    sizes.finish()
}

/// Bytes of the key and value cache per token of context, in every layer.
#[must_use]
pub fn kv_bytes_per_token(config: &ModelConfig, formats: KvFormats) -> u64 {
    (config.n_layers * kv_bytes_per_layer(config, formats)) as u64 + router_kv_bytes(config)
}

/// Bytes that a router before the model keeps of a token, which are f32 whatever the model's cache is.
fn router_kv_bytes(config: &ModelConfig) -> u64 {
    let router = config.moe.decoupled_router;
    router.map_or(0, |router| {
        F32 * (2 * router.n_layers * router.attention_width()) as u64
    })
}

/// Bytes of the cache that decoding one token reads after `position` others. Windows bound it, layer by layer; where
/// attention has experts, those of a token hold their share of the others, in the mean.
#[must_use]
pub fn kv_bytes_read(config: &ModelConfig, formats: KvFormats, position: usize) -> u64 {
    let mut stored = kv_bytes_per_layer(config, formats) as u64;
    if let Some(experts) = config.attention.experts {
        let (k, n) = (experts.top_k as u64, experts.n_experts as u64);
        stored = stored * k * k / (n * n).max(1);
    }
    let windows = config.attention.windows.iter();
    windows
        .map(|window| window.map_or(position, |window| window.min(position)) as u64)
        .map(|seen| stored.saturating_mul(seen))
        .fold(
            router_kv_bytes(config).saturating_mul(position as u64),
            u64::saturating_add,
        )
}

/// Bytes that a layer keeps of a token: of latent attention, a rotary key and the latent.
fn kv_bytes_per_layer(config: &ModelConfig, formats: KvFormats) -> usize {
    let KvFormats { keys, values } = formats;
    match config.attention.mla {
        Some(mla) => keys.n_bytes(mla.qk_rope_head_dim) + values.n_bytes(mla.kv_lora_rank),
        None => {
            config.n_kv_heads * (keys.n_bytes(config.head_dim) + values.n_bytes(config.head_dim))
        }
    }
}

/// Bytes that a session of `n_ctx` tokens writes and forgets, when it reads `chunk` tokens together: activations,
/// routing, quantised inputs, and one row of logits.
#[must_use]
pub fn scratch_bytes(config: &ModelConfig, n_ctx: usize, chunk: usize) -> u64 {
    let chunk = chunk.min(n_ctx) as u64;
    let hidden = config.hidden_size as u64;
    let moe = &config.moe;
    let shared = moe.shared.map_or(0, |shared| shared.intermediate_size);
    let dense = if config.has_dense_layers() {
        config.intermediate_size
    } else {
        0
    };
    let residual = moe.residual.map_or(0, |part| part.intermediate_size);
    let picks = moe.top_k as u64;
    let widest = dense.max(shared).max(residual) as u64;
    let inner = (picks * moe.intermediate_size as u64).max(widest);
    let (attention, attention_input) = attention_widths(config);
    // Per token: the stream, its norm and a block's output; attention; the router; the rows of the picked experts, inside
    // and out; the output of what runs beside them; the recurrent router's state, its input and two products of it.
    let mut width = 3 * hidden + attention + moe.n_logits() as u64 + picks * hidden + inner;
    if shared.max(residual) > 0 {
        width += hidden;
    }
    width += 8 * moe.recurrent_router.unwrap_or(0) as u64;
    if let Some(router) = moe.decoupled_router {
        // Its logits; stream, norm and output of a block; queries, keys, values and what they mix to; the feed-forward.
        let heads = router.attention_width();
        let own = router.n_logits(moe) + 3 * router.hidden_size + 4 * heads;
        width += (own + router.intermediate_size) as u64;
    }
    let routing = picks * 32;
    let router = moe.decoupled_router.map_or(0, |router| {
        let widest = router.attention_width().max(router.hidden_size);
        widest.max(router.intermediate_size) as u64
    });
    let largest_input = [hidden, attention_input, inner, router];
    let input = largest_input.into_iter().max().unwrap_or(0) as f64;
    let products = (chunk as f64 * input * PRODUCT_BYTES) as u64;
    chunk * (F32 * width + routing) + products + F32 * config.vocab_size as u64
}

/// Values per token in the buffers of attention, and in the widest input of its products.
fn attention_widths(config: &ModelConfig) -> (u64, u64) {
    let n_heads = config.n_heads as u64;
    let Some(mla) = config.attention.mla else {
        let head = config.head_dim as u64;
        let n_kv = config.n_kv_heads as u64;
        let heads = 2 * (n_heads + n_kv) * head;
        // Of experts one computes after the other; their rows are gathered, and their outputs scattered.
        let held = config.attention.experts.map_or(heads, |experts| {
            let n = experts.n_experts as u64;
            heads / n.max(1) + 2 * config.hidden_size as u64 + n
        });
        return (held, n_heads * head);
    };
    let MlaConfig {
        q_lora_rank,
        kv_lora_rank: latent,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope,
        v_head_dim: v,
        ..
    } = mla;
    let per_head = 2 * (nope + rope) + 2 * latent + 2 * v;
    let own = q_lora_rank.unwrap_or(0) + latent + rope;
    let widest = latent.max(nope).max(v) as u64;
    (n_heads * per_head as u64 + own as u64, n_heads * widest)
}

type Tensor<'a> = (&'a str, Dtype, &'a [usize]);

fn values(shape: &[usize]) -> u64 {
    shape
        .iter()
        .fold(1, |n: u64, dim| n.saturating_mul(*dim as u64))
}

/// Bytes in the file; with the scales that 8-bit floats have apart.
fn stored_bytes(format: Dtype, shape: &[usize]) -> u64 {
    let n = values(shape);
    let scales = match shape {
        [rows, cols] if format == Dtype::F8E4M3 => {
            (*rows as u64).div_ceil(FP8_BLOCK) * (*cols as u64).div_ceil(FP8_BLOCK) * F32
        }
        _ => 0,
    };
    n / format.block_len() as u64 * format.block_bytes() as u64 + scales
}

fn held_bytes(config: &ModelConfig, quantise: bool, (name, format, shape): Tensor<'_>) -> u64 {
    if stays_f32(name, shape) {
        return F32 * values(shape);
    }
    let splits = shape
        .last()
        .is_some_and(|cols| cols.is_multiple_of(Dtype::Q8_0.block_len()));
    if quantise && splits && !format.is_quantized() {
        return stored_bytes(Dtype::Q8_0, shape);
    }
    loaded_bytes(config, (name, format, shape))
}

/// As stored, except that latent attention turns the part of `kv_b_proj` that makes keys around: a copy in f32 unless
/// the format is a plain one of 16 bits.
fn loaded_bytes(config: &ModelConfig, (name, format, shape): Tensor<'_>) -> u64 {
    let stored = stored_bytes(format, shape);
    match config.attention.mla {
        Some(mla)
            if name.ends_with(".kv_b_proj.weight")
                && !matches!(format, Dtype::F16 | Dtype::Bf16) =>
        {
            let (nope, all) = (mla.qk_nope_head_dim, mla.qk_nope_head_dim + mla.v_head_dim);
            stored + F32 * values(shape) * nope as u64 / all.max(1) as u64
        }
        _ => stored,
    }
}

/// Where in the model a tensor belongs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Place {
    layer: Option<usize>,
    /// Part of an expert that is not shared.
    is_expert: bool,
    /// Rows or columns of heads, of which every expert of attention has a part.
    is_heads: bool,
    /// The input embedding.
    is_table: bool,
    /// That of the router before the model.
    is_router_table: bool,
}

impl Place {
    /// The place of the tensor of this canonical name.
    fn of(name: &str) -> Self {
        let Some(rest) = name.strip_prefix("model.layers.") else {
            return Self {
                is_table: name == "model.embed_tokens.weight",
                is_router_table: name == TABLE,
                ..Self::default()
            };
        };
        let (layer, inside) = rest.split_once('.').unwrap_or((rest, ""));
        Self {
            layer: layer.parse().ok(),
            is_expert: inside.starts_with("mlp.experts."),
            is_heads: inside.starts_with("self_attn.") && inside.ends_with("_proj.weight"),
            ..Self::default()
        }
    }
}

/// Adds up tensors, the experts of each layer apart.
struct Counter<'a> {
    config: &'a ModelConfig,
    sizes: Sizes,
    experts: Vec<u64>,
}

impl<'a> Counter<'a> {
    fn new(config: &'a ModelConfig) -> Self {
        Self {
            config,
            sizes: Sizes::default(),
            experts: vec![0; config.n_layers],
        }
    }

    /// Counts one tensor.
    fn add(&mut self, place: Place, size: u64) {
        self.sizes.total += size;
        if place.is_expert {
            self.sizes.experts += size;
            let layer = place.layer.and_then(|layer| self.experts.get_mut(layer));
            if let Some(experts) = layer {
                *experts += size;
            }
            return;
        }
        let size = match self.config.attention.experts.filter(|_| place.is_heads) {
            Some(experts) => size / experts.n_experts.max(1) as u64 * experts.top_k as u64,
            None => size,
        };
        self.sizes.active += size;
        let is_looked_up = place.is_table && !self.config.tie_word_embeddings;
        self.sizes.read_per_token += if is_looked_up || place.is_router_table {
            size / (self.config.vocab_size as u64).max(1)
        } else {
            size
        };
    }

    /// Adds the picked experts, once all tensors are counted.
    fn finish(mut self) -> Sizes {
        let layers = 0..self.config.moe.layers.len();
        let n_experts = layers
            .map(|at| self.config.moe.n_stored_at(at))
            .sum::<usize>() as u64;
        if n_experts == 0 {
            return self.sizes;
        }
        self.sizes.one_expert = self.sizes.experts / n_experts;
        for (layer, experts) in self.experts.iter().enumerate() {
            let all = (self.config.n_stored_in(layer) as u64).max(1);
            let picked = experts / all * self.config.picks_in(layer) as u64;
            self.sizes.active += picked;
            self.sizes.read_per_token += picked;
        }
        self.sizes
    }
}

#[cfg(test)]
mod tests {
    use cadre_kernels::KvFormat;

    use super::*;

    fn config() -> ModelConfig {
        let json = r#"{"model_type": "qwen3_moe", "vocab_size": 100, "hidden_size": 256, "num_hidden_layers": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64, "rope_theta": 10000.0, "norm_topk_prob": true}"#;
        ModelConfig::parse("m", json, None).unwrap()
    }

    const EXPERT: &str = "model.layers.3.mlp.experts.1.down_proj.weight";

    #[test]
    fn the_cache_is_read_as_far_as_windows_reach() {
        let mut config = config();
        assert_eq!(
            kv_bytes_per_token(&config, KvFormats::default()),
            8 * 2 * 2 * 64 * 4
        );
        assert_eq!(
            kv_bytes_read(&config, KvFormats::default(), 10),
            10 * kv_bytes_per_token(&config, KvFormats::default())
        );
        config.attention.windows[0] = Some(4);
        let layer = kv_bytes_per_token(&config, KvFormats::default()) / 8;
        assert_eq!(
            kv_bytes_read(&config, KvFormats::default(), 10),
            (7 * 10 + 4) * layer
        );
        assert_eq!(kv_bytes_read(&config, KvFormats::default(), 0), 0);
        let small = KvFormats {
            keys: KvFormat::F16,
            values: KvFormat::Q8_0,
        };
        assert_eq!(kv_bytes_per_token(&config, small), 8 * 2 * (128 + 68));
        assert_eq!(
            kv_bytes_read(&config, KvFormats::default(), usize::MAX),
            u64::MAX
        );
    }

    #[test]
    fn buffers_grow_with_the_chunk_only() {
        let config = config();
        // Per token: stream 3 x 256, attention 2 x (4 + 2) x 64, router 4, two rows of 256 for the picks, inner values
        // of both 2 x 32, in f32; 32 bytes per pick; products over 256 values.
        let values = 3 * 256 + 768 + 4 + 2 * 256 + 64;
        let products = (256.0 * PRODUCT_BYTES) as u64;
        assert_eq!(
            scratch_bytes(&config, 1, 256),
            4 * values + 64 + products + 400
        );
        assert_eq!(
            scratch_bytes(&config, 512, 256),
            scratch_bytes(&config, 4096, 256)
        );
        assert!(scratch_bytes(&config, 512, 256) > scratch_bytes(&config, 255, 256));
    }

    #[test]
    fn buffers_at_a_published_shape() {
        let json = r#"{"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 40960, "rope_theta": 1e6, "norm_topk_prob": true}"#;
        let config = ModelConfig::parse("m", json, None).unwrap();
        // The figure in the description of the engine's `Workspace`.
        let logits = 4 * 151_936;
        assert_eq!((scratch_bytes(&config, 4096, 512) - logits) >> 20, 81);
    }

    #[test]
    fn matrices_change_their_format_and_the_rest_stays_f32() {
        let config = config();
        let held = |quantise, name, format, shape: &[usize]| {
            held_bytes(&config, quantise, (name, format, shape))
        };
        let shape = [256, 32];
        assert_eq!(held(false, EXPERT, Dtype::Bf16, &shape), 2 * 256 * 32);
        assert_eq!(held(true, EXPERT, Dtype::Bf16, &shape), 256 * 34);
        assert_eq!(held(true, EXPERT, Dtype::Q4_0, &shape), 256 * 18);
        assert_eq!(held(true, EXPERT, Dtype::Bf16, &[256, 33]), 2 * 256 * 33);
        assert_eq!(
            held(false, "model.norm.weight", Dtype::Bf16, &[256]),
            4 * 256
        );
        let router = "model.layers.0.mlp.gate.weight";
        assert_eq!(held(true, router, Dtype::Bf16, &[4, 256]), 4 * 4 * 256);
        assert_eq!(stored_bytes(Dtype::F8E4M3, &[129, 128]), 129 * 128 + 2 * 4);
    }

    #[test]
    fn a_token_reads_its_experts_and_one_row_of_the_embedding() {
        let config = config();
        let mut sizes = Counter::new(&config);
        sizes.add(Place::of("model.embed_tokens.weight"), 100 * 256);
        for layer in 0..8 {
            for expert in 0..4 {
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight");
                sizes.add(Place::of(&name), 10);
            }
        }
        let expected = Sizes {
            total: 100 * 256 + 320,
            active: 100 * 256 + 160,
            read_per_token: 256 + 160,
            experts: 320,
            one_expert: 10,
        };
        assert_eq!(sizes.finish(), expected);
    }

    #[test]
    fn layers_with_few_experts_are_counted_with_theirs() {
        let mut config = config();
        config.moe.layers = vec![1, 3];
        config.moe.set_counts(vec![2, 6]);
        config.moe.top_k = 4;
        let mut sizes = Counter::new(&config);
        for (layer, n_experts) in [(1, 2), (3, 6)] {
            for expert in 0..n_experts {
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight");
                sizes.add(Place::of(&name), 10);
            }
        }
        let sizes = sizes.finish();
        assert_eq!((sizes.experts, sizes.active), (80, 20 + 40));
        assert_eq!(sizes.one_expert, 10);
    }
}
