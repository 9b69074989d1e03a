//! Tokenizers from the vocabulary of a GGUF file (`tokenizer.ggml.*`).
//!
//! [`vocab`] is the vocabulary as data, [`json`] makes a `tokenizer.json` of it, [`bpe`] builds the GPT-2 family out of it (cut by
//! [`pretokenizers`]), [`spm`] is SentencePiece as in Llama 2, Mixtral and Gemma.

mod bpe;
mod json;
mod pretokenizers;
pub(crate) mod spm;
mod vocab;

pub(crate) use json::tokenizer_json;
pub(crate) use pretokenizers::{GPT2 as GPT2_SPLIT, name_of as pretokenizer_of};
pub use vocab::{GgufVocab, TokenType};
