//! Checkpoints on disk: safetensors and GGUF, configs, tensor names, tokenizers, chat templates, conversion.
//!
//! A checkpoint is a Hugging Face folder (`config.json`, one or more safetensors files,
//! `tokenizer.json`), the same files embedded in the program, or a GGUF file. Everything doubtful is an error
//! that names the key or tensor: a tensor is never skipped and a configuration key that would
//! change the result is never ignored.
//!
//! - [`Checkpoint`] opens and gives tensors; [`ModelConfig`] describes the model, dialects of both kinds of file resolved.
//! - [`write_folder`] writes a folder that other programs load unchanged.
//! - [`Tokenizer`] encodes, decodes and streams text; [`train_bpe`] makes a new one.

mod chat_side;
mod checkpoint;
mod config;
mod convert;
mod decoupled_router;
mod digest;
mod dtype;
mod error;
mod generation;
pub mod gguf;
mod gguf_models;
mod importance;
mod keys;
mod map;
mod models;
mod moe_config;
mod names;
mod on_disk;
mod rope;
mod safetensors_file;
mod shards;
mod sizes;
mod specs;
mod tensors;
mod text;
mod write;

/// Number formats of tensors.
pub use cadre_kernels::Format as Dtype;
pub use chat_side::ChatSide;
pub use checkpoint::{Checkpoint, EmbeddedFiles, TensorView};
pub use config::{
    Activation, AttentionConfig, AttentionExperts, DecoupledRouter, Factors, MlaConfig,
    ModelConfig, MoeConfig, NormKind, QkNorm, ResidualMlp, RouterConfig, Scales, Score,
    SharedExpert,
};
pub use convert::{
    Conversion, ConvertOptions, ConvertTo, Mixer, Mixture, NewExpert, NewExperts, NewFeedForwards,
    QuantizeOptions, TargetDtype,
};
pub use error::{CheckpointError, Result};
pub use importance::Importance;
pub use on_disk::{FileRange, TensorOnDisk};
pub use rope::{RopeConfig, RopeScaling};
pub use safetensors_file::{StoredTensor, read_safetensors, safetensors_outline};
pub use sizes::{
    FormatSize, Holding, LayerSize, ModelSizes, Sizes, held_sizes, kv_bytes_per_token,
    kv_bytes_read, model_sizes, scratch_bytes,
};
pub use specs::tensor_specs;
pub use tensors::BlockScales;
pub use text::{
    ChatFiles, ChatTemplate, ChatTemplates, DateTime, EncodeOptions, GgufVocab, Released,
    RenderInput, StopFiles, StopMatcher, StopToken, TokenStream, TokenType, Tokenizer,
    stop_token_ids, train_bpe,
};
pub use write::{FolderContents, TensorData, write_folder};
