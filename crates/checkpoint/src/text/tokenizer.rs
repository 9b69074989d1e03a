//! The tokenizer of a checkpoint: one face over every kind, byte-exact in both directions.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use crate::error::{CheckpointError, Result};
use crate::text::decoding::Decoding;
use crate::text::ends::Ends;
use crate::text::gguf::spm::Spm;
use crate::text::stream::{Opening, TokenStream};

/// Turns text into token ids and back. Every token stands for fixed bytes. Clones share the
/// vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    origin: Arc<str>,
    encoder: Arc<Encoder>,
    decoding: Arc<Decoding>,
    /// What a prompt gets at its ends; `None` leaves it to the post-processor.
    ends: Option<Ends>,
    /// By token id; ids without a token are `None`.
    tokens: Arc<[Option<Token>]>,
}

/// How text becomes ids.
pub(crate) enum Encoder {
    /// A `tokenizer.json`, or a GGUF vocabulary that is equal to one.
    Json(Box<JsonEncoder>),
    /// A SentencePiece vocabulary of a GGUF file.
    Spm(Spm),
}

/// A tokenizer of the `tokenizers` crate, and on demand its twin that reads special tokens in the
/// text as plain text.
pub(crate) struct JsonEncoder {
    inner: tokenizers::Tokenizer,
    literal: OnceLock<Box<tokenizers::Tokenizer>>,
}

/// What a token stands for.
#[derive(Clone)]
pub(crate) struct Token {
    pub(crate) bytes: Vec<u8>,
    pub(crate) special: bool,
}

/// How [`Tokenizer::encode_with`] treats special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Whether the text gets the tokens that the model wants around a prompt (such as BOS).
    pub add_special: bool,
    /// Whether special tokens that are written out in the text become their ids.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// A plain prompt: what the model wants around it, special tokens understood.
    pub const PROMPT: Self = Self {
        add_special: true,
        parse_special: true,
    };
    /// The output of a chat template, which has written all special tokens itself.
    pub const RENDERED: Self = Self {
        add_special: false,
        parse_special: true,
    };
    /// Text alone: `<|im_end|>` in it is ten characters, not the end of a turn.
    pub const TEXT: Self = Self {
        add_special: false,
        parse_special: false,
    };
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("origin", &self.origin)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the text of a `tokenizer.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// The text does not parse, or its decoder is of a kind that language models do not use.
    pub fn from_json(origin: &str, json: &str) -> Result<Self> {
        Self::from_files(origin, json, &Value::Null)
    }

    /// [`Tokenizer::from_json`] with the `tokenizer_config.json` beside it, whose `add_bos_token`
    /// and `add_eos_token` overrule the post-processor.
    ///
    /// # Errors
    /// As [`Tokenizer::from_json`]; or these keys contradict the vocabulary.
    pub fn from_files(origin: &str, json: &str, config: &Value) -> Result<Self> {
        let fail = |problem: String| CheckpointError::Tokenizer {
            origin: origin.to_owned(),
            problem,
        };
        let mut inner: tokenizers::Tokenizer = json
            .parse()
            .map_err(|error: tokenizers::Error| fail(format!("does not parse: {error}")))?;
        // Saved by training scripts; a prompt is never cut or filled up behind its author's back.
        inner
            .with_truncation(None)
            .map_err(|error| fail(error.to_string()))?;
        inner.with_padding(None);
        let decoder = serde_json::to_value(inner.get_decoder())
            .map_err(|error| fail(format!("its decoder cannot be read: {error}")))?;
        let decoding = Decoding::from_json(&decoder).map_err(fail)?;
        let ends = Ends::from_config(config, |token| inner.token_to_id(token)).map_err(fail)?;
        let tokens = token_table(&inner, &decoding);
        let encoder = Encoder::Json(Box::new(JsonEncoder::new(inner)));
        Ok(Self::from_parts(origin, encoder, decoding, ends, tokens))
    }

    pub(crate) fn from_parts(
        origin: &str,
        encoder: Encoder,
        decoding: Decoding,
        ends: Option<Ends>,
        tokens: Vec<Option<Token>>,
    ) -> Self {
        Self {
            origin: origin.into(),
            encoder: Arc::new(encoder),
            decoding: Arc::new(decoding),
            ends,
            tokens: tokens.into(),
        }
    }

    /// [`Tokenizer::encode_with`] of a plain prompt.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_with`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, EncodeOptions::PROMPT)
    }

    /// Token ids of `text`.
    ///
    /// # Errors
    /// The pre-tokenizer gives up on the text.
    pub fn encode_with(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        let by_processor = options.add_special && self.ends.is_none();
        let ids = match &*self.encoder {
            Encoder::Json(json) => json
                .with(options.parse_special)
                .encode_fast(text, by_processor)
                .map(|encoding| encoding.get_ids().to_vec()),
            Encoder::Spm(spm) => Ok(spm.encode(text, options.parse_special)),
        }
        .map_err(|error| self.fail(&error))?;
        Ok(self.with_ends(ids, options))
    }

    /// [`Tokenizer::encode`] of many texts, in their order; in parallel where the kind of
    /// tokenizer can.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_batch(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        match &*self.encoder {
            Encoder::Json(json) => {
                let encodings = json
                    .inner
                    .encode_batch_fast(texts.to_vec(), self.ends.is_none())
                    .map_err(|error| self.fail(&error))?;
                Ok(encodings
                    .iter()
                    .map(|encoding| {
                        self.with_ends(encoding.get_ids().to_vec(), EncodeOptions::PROMPT)
                    })
                    .collect())
            }
            Encoder::Spm(_) => texts.iter().map(|text| self.encode(text)).collect(),
        }
    }

    fn with_ends(&self, ids: Vec<u32>, options: EncodeOptions) -> Vec<u32> {
        match &self.ends {
            Some(ends) if options.add_special => ends.around(&ids),
            _ => ids,
        }
    }

    fn fail(&self, error: &tokenizers::Error) -> CheckpointError {
        let problem = format!("cannot encode the text: {error}");
        CheckpointError::Tokenizer {
            origin: self.origin.to_string(),
            problem,
        }
    }

    /// The text of `ids`, special tokens included. Bytes that are not UTF-8 and ids without a
    /// token become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut opening = Opening::new(self.decoding.lead);
        let mut bytes = Vec::new();
        for id in ids {
            opening.feed(self.token_bytes(*id), &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A decoder that turns ids into text one by one and never cuts a character in two. Special
    /// tokens give no text. The text starts here: a SentencePiece tokenizer takes away the space
    /// before the first word.
    #[must_use]
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self, self.decoding.lead)
    }

    /// [`Tokenizer::stream`] for ids that continue `before`: joined to the text of `before` they
    /// give the text of the whole. This is the one for generated tokens.
    #[must_use]
    pub fn stream_after(&self, before: &[u32]) -> TokenStream<'_> {
        let mut stream = self.stream();
        for id in before {
            stream.push(*id);
        }
        stream
    }

    /// The bytes of a token; those of U+FFFD for an id without a token.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.token(id)
            .map_or("\u{fffd}".as_bytes(), |token| &token.bytes)
    }

    /// The text of a token for people to read; `<0xE2>` for bytes that are not UTF-8 alone.
    #[must_use]
    pub fn token_str(&self, id: u32) -> Cow<'_, str> {
        let bytes = self.token_bytes(id);
        match std::str::from_utf8(bytes) {
            Ok(text) => Cow::Borrowed(text),
            Err(_) => bytes.iter().map(|byte| format!("<0x{byte:02X}>")).collect(),
        }
    }

    /// Whether `id` is a control token such as `<|endoftext|>`.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.token(id).is_some_and(|token| token.special)
    }

    /// The id of a token by its spelling in the vocabulary.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &*self.encoder {
            Encoder::Json(json) => json.inner.token_to_id(token),
            Encoder::Spm(spm) => spm.id(token),
        }
    }

    /// One more than the largest token id.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    fn token(&self, id: u32) -> Option<&Token> {
        self.tokens.get(id as usize)?.as_ref()
    }
}

impl JsonEncoder {
    pub(crate) fn new(inner: tokenizers::Tokenizer) -> Self {
        Self {
            inner,
            literal: OnceLock::new(),
        }
    }

    /// The tokenizer that understands special tokens in the text, or the one that does not.
    fn with(&self, parse_special: bool) -> &tokenizers::Tokenizer {
        if parse_special {
            return &self.inner;
        }
        self.literal.get_or_init(|| {
            let mut twin = Box::new(self.inner.clone());
            twin.set_encode_special_tokens(true);
            twin
        })
    }
}

fn token_table(inner: &tokenizers::Tokenizer, decoding: &Decoding) -> Vec<Option<Token>> {
    let added = inner.get_added_tokens_decoder();
    let mut tokens = Vec::new();
    for (text, id) in inner.get_vocab(true) {
        let at = id as usize;
        if at >= tokens.len() {
            tokens.resize(at + 1, None);
        }
        let token = match added.get(&id) {
            Some(added) => Token {
                bytes: decoding.added_bytes(&text),
                special: added.special,
            },
            None => Token {
                bytes: decoding.bytes(&text),
                special: false,
            },
        };
        tokens[at] = Some(token);
    }
    tokens
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::bpe::train_bpe;

    const TEXT: &str = "the cat sat on the mat; the dog sat on the log. \
        der Baer und die Kaetzchen: gr\u{fc}\u{df}e, 12345 \u{20ac}.";

    fn tokenizer() -> Tokenizer {
        let json = train_bpe([TEXT].into_iter(), 300, &["<|endoftext|>"]).unwrap();
        Tokenizer::from_json("t", &json).unwrap()
    }

    fn inner(tokenizer: &Tokenizer) -> &tokenizers::Tokenizer {
        let Encoder::Json(json) = &*tokenizer.encoder else {
            panic!("not made from JSON");
        };
        &json.inner
    }

    #[test]
    fn decoding_agrees_with_the_crate() {
        let tokenizer = tokenizer();
        let ids = tokenizer
            .encode(&format!("{TEXT}<|endoftext|>\u{1f600}"))
            .unwrap();
        assert_eq!(
            tokenizer.decode(&ids),
            inner(&tokenizer).decode(&ids, false).unwrap()
        );
        assert_eq!(
            tokenizer.encode_batch(&[TEXT]).unwrap()[0],
            tokenizer.encode(TEXT).unwrap()
        );
    }

    #[test]
    fn special_tokens_are_known_and_streams_leave_them_out() {
        let tokenizer = tokenizer();
        let end = tokenizer.token_id("<|endoftext|>").unwrap();
        assert!(tokenizer.is_special(end));
        assert_eq!(tokenizer.encode("<|endoftext|>").unwrap(), [end]);
        assert_eq!(tokenizer.token_str(end), "<|endoftext|>");
        assert_eq!(tokenizer.stream().push(end), "");
        assert_eq!(tokenizer.decode(&[100_000]), "\u{fffd}");
        assert_eq!(
            tokenizer.token_bytes(tokenizer.encode("\n").unwrap()[0]),
            b"\n"
        );
    }

    #[test]
    fn a_broken_or_foreign_tokenizer_is_refused() {
        let error = Tokenizer::from_json("m/tokenizer.json", "{")
            .unwrap_err()
            .to_string();
        assert!(error.contains("m/tokenizer.json"), "{error}");
        let json = train_bpe([TEXT].into_iter(), 300, &[]).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
        json["decoder"] = serde_json::Value::Null;
        let error = Tokenizer::from_json("t", &json.to_string())
            .unwrap_err()
            .to_string();
        assert!(error.contains("decoder"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn text_survives_and_streams_alike(text in "\\PC{0,40}[ \n\t]{0,3}\\PC{0,10}") {
            let tokenizer = tokenizer();
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids), text.clone());
            let mut stream = tokenizer.stream();
            let mut streamed: String = ids.iter().map(|id| stream.push(*id)).collect();
            streamed += &stream.finish();
            prop_assert_eq!(streamed, text);
        }
    }
}
