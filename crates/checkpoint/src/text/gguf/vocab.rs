//! A GGUF vocabulary as plain data, and the tokenizer it makes.

use std::collections::HashMap;

use crate::error::{CheckpointError, Result};
use crate::gguf::Gguf;
use crate::text::decoding::Decoding;
use crate::text::ends::Ends;
use crate::text::gguf::{bpe, spm};
use crate::text::tokenizer::{Encoder, Token, Tokenizer};

/// What the keys `tokenizer.ggml.*` of a GGUF file say.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// File, for errors.
    pub origin: String,
    /// Kind of vocabulary: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// Name of the pre-tokenizer, for BPE.
    pub pre: Option<String>,
    /// Spellings, by id.
    pub tokens: Vec<String>,
    /// Scores, by id; empty or as many as tokens. SentencePiece merges the best first.
    pub scores: Vec<f32>,
    /// Types, by id; empty (all normal) or as many as tokens.
    pub token_types: Vec<TokenType>,
    /// Merges of BPE, `left right`, the first to be applied first.
    pub merges: Vec<String>,
    /// Token that starts a text.
    pub bos: Option<u32>,
    /// Token that ends a text.
    pub eos: Option<u32>,
    /// Token that ends a turn.
    pub eot: Option<u32>,
    /// Token that ends a message to a tool.
    pub eom: Option<u32>,
    /// Token for what has no token.
    pub unk: Option<u32>,
    /// Token for filling up.
    pub pad: Option<u32>,
    /// Whether a prompt starts with `bos`.
    pub add_bos: Option<bool>,
    /// Whether a prompt ends with `eos`.
    pub add_eos: Option<bool>,
    /// Whether SentencePiece puts a space before the first word.
    pub add_space_prefix: Option<bool>,
    /// Whether tokens that are cut out of the text take the white space behind them along, as those
    /// of Phi-3 do.
    pub strip_after_added: bool,
}

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenType {
    /// Comes out of the text by merging.
    #[default]
    Normal,
    /// Stands for what has no token.
    Unknown,
    /// Steers the model and gives no text.
    Control,
    /// Is cut out of the text before everything else.
    UserDefined,
    /// Fills up the vocabulary.
    Unused,
    /// Stands for one byte, `<0xE2>`.
    Byte,
}

impl TokenType {
    fn from_id(id: i32) -> Option<Self> {
        // 0 is "undefined", which files of some converters hold for normal tokens.
        Some(match id {
            0 | 1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Its number in files.
    pub(crate) fn id(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }

    /// Whether a token gives no text in an answer.
    pub(crate) fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::Unknown)
    }
}

/// Kinds of vocabularies that exist but are for other models than ours.
const OTHER_MODELS: &str = "`bert` (WordPiece), `t5` (Unigram), `rwkv`, `plamo2`, `hybriddna` and \
                            `whitespace` are not read";

impl GgufVocab {
    /// Reads the vocabulary of an open file.
    ///
    /// # Errors
    /// A key is missing, or holds something else than a vocabulary does.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let id = |name: &str| gguf.u32_opt(&format!("tokenizer.ggml.{name}_token_id"));
        let owned = |texts: Vec<&str>| texts.into_iter().map(str::to_owned).collect();
        let types_key = "tokenizer.ggml.token_type";
        let token_types = gguf
            .i32s_opt(types_key)?
            .unwrap_or_default()
            .into_iter()
            .map(|id| {
                TokenType::from_id(id).ok_or_else(|| {
                    gguf.key_error(types_key, format!("holds {id}, expected 1 to 6"))
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            origin: gguf.origin().to_owned(),
            model: gguf.text("tokenizer.ggml.model")?.to_owned(),
            pre: gguf.text_opt("tokenizer.ggml.pre")?.map(str::to_owned),
            tokens: owned(gguf.strings("tokenizer.ggml.tokens")?),
            scores: gguf.f32s_opt("tokenizer.ggml.scores")?.unwrap_or_default(),
            token_types,
            merges: owned(
                gguf.strings_opt("tokenizer.ggml.merges")?
                    .unwrap_or_default(),
            ),
            bos: id("bos")?,
            eos: id("eos")?,
            eot: id("eot")?,
            eom: id("eom")?,
            unk: id("unknown")?,
            pad: id("padding")?,
            add_bos: gguf.flag_opt("tokenizer.ggml.add_bos_token")?,
            add_eos: gguf.flag_opt("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: gguf.flag_opt("tokenizer.ggml.add_space_prefix")?,
            strip_after_added: is_phi_3(gguf.text_opt("general.name")?.unwrap_or_default()),
        })
    }

    /// The type of a token.
    #[must_use]
    pub fn token_type(&self, id: usize) -> TokenType {
        self.token_types.get(id).copied().unwrap_or_default()
    }

    pub(crate) fn fail(&self, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Tokenizer {
            origin: self.origin.clone(),
            problem: problem.into(),
        }
    }

    /// Ids by spelling.
    pub(super) fn ids(&self) -> Result<HashMap<&str, u32>> {
        let n_tokens = self.tokens.len();
        for (name, len) in [
            ("scores", self.scores.len()),
            ("token_type", self.token_types.len()),
        ] {
            if len != 0 && len != n_tokens {
                return Err(self.fail(format!(
                    "tokenizer.ggml.{name} has {len} entries, tokenizer.ggml.tokens {n_tokens}"
                )));
            }
        }
        let mut ids = HashMap::with_capacity(n_tokens);
        for (id, token) in self.tokens.iter().enumerate() {
            let id = u32::try_from(id).map_err(|_| self.fail("has over 2^32 tokens"))?;
            if let Some(other) = ids.insert(token.as_str(), id).filter(|_| !token.is_empty()) {
                return Err(self.fail(format!("tokens {other} and {id} are both `{token}`")));
            }
        }
        Ok(ids)
    }

    /// What a prompt gets at its ends. `add_bos` is what the kind of vocabulary does by itself, and
    /// `defaults` are its ids of BOS and EOS where the file has none.
    pub(super) fn ends(&self, add_bos: bool, defaults: [Option<u32>; 2]) -> Result<Ends> {
        let end = |add: bool, id: Option<u32>, name: &str| match id {
            _ if !add => Ok(Vec::new()),
            Some(id) if (id as usize) < self.tokens.len() => Ok(vec![id]),
            Some(id) => Err(self.fail(format!(
                "tokenizer.ggml.{name}_token_id is {id}, but there are {} tokens",
                self.tokens.len()
            ))),
            None => Err(self.fail(format!(
                "prompts should get a {name} token, but tokenizer.ggml.{name}_token_id is missing"
            ))),
        };
        Ok(Ends {
            before: end(
                self.add_bos.unwrap_or(add_bos),
                self.bos.or(defaults[0]),
                "bos",
            )?,
            after: end(
                self.add_eos.unwrap_or(false),
                self.eos.or(defaults[1]),
                "eos",
            )?,
        })
    }

    fn table(&self, decoding: &Decoding) -> Vec<Option<Token>> {
        let token = |(id, text): (usize, &String)| {
            let kind = self.token_type(id);
            let bytes = match kind {
                TokenType::Normal | TokenType::Byte => decoding.bytes(text),
                _ => decoding.added_bytes(text),
            };
            Some(Token {
                bytes,
                special: kind.is_special(),
            })
        };
        self.tokens.iter().enumerate().map(token).collect()
    }
}

/// GGUF has no key for it: llama.cpp too goes by the name of the model.
fn is_phi_3(name: &str) -> bool {
    let name = name.to_lowercase();
    name.contains("phi-3") || name.contains("phi3")
}

impl Tokenizer {
    /// The tokenizer of a GGUF vocabulary. Ids are those of llama.cpp, except where its regular
    /// expressions approximate those of the model (`docs/guide/text.md`).
    ///
    /// # Errors
    /// The kind of vocabulary or its pre-tokenizer is not known (the error lists those that are),
    /// or the vocabulary contradicts itself.
    pub fn from_gguf_vocab(vocab: &GgufVocab) -> Result<Self> {
        let ids = vocab.ids()?;
        let (encoder, decoding, ends) = match vocab.model.as_str() {
            "gpt2" => {
                let (encoder, add_bos) = bpe::build(vocab, &ids)?;
                (
                    Encoder::Json(Box::new(encoder)),
                    Decoding::byte_level(),
                    vocab.ends(add_bos, [None; 2])?,
                )
            }
            "llama" => {
                let space_prefix = vocab.add_space_prefix.unwrap_or(true);
                let spm = spm::Spm::new(vocab, &ids, space_prefix)?;
                // The ids that every SentencePiece model of Llama's family has.
                let ends = vocab.ends(true, [Some(1), Some(2)])?;
                (
                    Encoder::Spm(spm),
                    Decoding::sentencepiece(space_prefix),
                    ends,
                )
            }
            other => {
                return Err(vocab.fail(format!(
                    "tokenizer.ggml.model is `{other}`; known: gpt2, llama ({OTHER_MODELS})"
                )));
            }
        };
        let tokens = vocab.table(&decoding);
        Ok(Self::from_parts(
            &vocab.origin,
            encoder,
            decoding,
            Some(ends),
            tokens,
        ))
    }
}
