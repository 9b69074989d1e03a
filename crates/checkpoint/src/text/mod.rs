//! Text around a model: tokenizers of every kind, chat templates, stop tokens.
//!
//! - [`Tokenizer`] encodes and decodes; [`TokenStream`] decodes token by token.
//! - [`train_bpe`] makes a new byte-level tokenizer.
//! - [`ChatTemplates`] finds the chat templates of a checkpoint; [`ChatTemplate`] renders one.

mod bpe;
mod chat;
mod decoding;
mod ends;
mod gguf;
mod stream;
mod tokenizer;

pub use bpe::train_bpe;
pub use chat::{ChatFiles, ChatTemplate, ChatTemplates, DateTime, RenderInput};
pub use gguf::{GgufVocab, TokenType};
pub use stream::TokenStream;
pub use tokenizer::{EncodeOptions, Tokenizer};
