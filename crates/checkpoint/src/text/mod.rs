//! Text around a model: tokenizers of every kind, chat templates, stop tokens.
//!
//! - [`Tokenizer`] encodes and decodes; [`TokenStream`] decodes token by token.
//! - [`train_bpe`] makes a new byte-level tokenizer.
//! - [`ChatTemplates`] finds the chat templates of a checkpoint; [`ChatTemplate`] renders one.
//! - [`stop_token_ids`] collects the tokens that end an answer; [`StopMatcher`] finds the strings that do.
//! - [`GgufVocab`] is the vocabulary of a GGUF file.

mod bpe;
mod chat;
mod decoding;
mod ends;
mod gguf;
mod stop;
mod stop_strings;
mod stream;
mod tokenizer;

pub use bpe::train_bpe;
pub use chat::{ChatFiles, ChatTemplate, ChatTemplates, DateTime, RenderInput};
pub(crate) use ends::special_token;
pub(crate) use gguf::{GPT2_SPLIT, pretokenizer_of, tokenizer_json};
pub use gguf::{GgufVocab, TokenType};
pub use stop::{StopFiles, StopToken, stop_token_ids};
pub use stop_strings::{Released, StopMatcher};
pub use stream::TokenStream;
pub use tokenizer::{EncodeOptions, Tokenizer};
