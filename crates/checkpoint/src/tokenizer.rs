//! The tokenizer of a checkpoint: a thin face over the `tokenizers` crate, byte-exact.

use std::borrow::Cow;

use tokenizers::DecoderWrapper;

use crate::error::{CheckpointError, Result};
use crate::stream::TokenStream;

/// A byte-level BPE tokenizer. Decoding is exact on bytes: every token stands for fixed bytes.
#[derive(Clone)]
pub struct Tokenizer {
    origin: String,
    inner: tokenizers::Tokenizer,
    /// By token id; ids without a token are `None`.
    tokens: Vec<Option<Token>>,
}

#[derive(Clone)]
struct Token {
    bytes: Vec<u8>,
    special: bool,
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
    /// The text does not parse, or the tokenizer is not byte-level.
    pub fn from_json(origin: &str, json: &str) -> Result<Self> {
        let fail = |problem: String| CheckpointError::Tokenizer {
            origin: origin.to_owned(),
            problem,
        };
        let inner: tokenizers::Tokenizer = json
            .parse()
            .map_err(|error: tokenizers::Error| fail(format!("does not parse: {error}")))?;
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(fail(
                "its decoder is not ByteLevel, the only one supported".to_owned(),
            ));
        }
        let tokens = token_table(&inner);
        Ok(Self {
            origin: origin.to_owned(),
            inner,
            tokens,
        })
    }

    /// Token ids of `text`; special tokens written out in the text become their ids.
    ///
    /// # Errors
    /// The pre-tokenizer gives up on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, true)
            .map_err(|error| self.fail(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`Tokenizer::encode`] of many texts, in parallel, in their order.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_batch(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        let encodings = self
            .inner
            .encode_batch_fast(texts.to_vec(), true)
            .map_err(|error| self.fail(&error))?;
        Ok(encodings
            .iter()
            .map(|encoding| encoding.get_ids().to_vec())
            .collect())
    }

    fn fail(&self, error: &tokenizers::Error) -> CheckpointError {
        let problem = format!("cannot encode the text: {error}");
        CheckpointError::Tokenizer {
            origin: self.origin.clone(),
            problem,
        }
    }

    /// The text of `ids`, special tokens included. Bytes that are not UTF-8 and ids without a
    /// token become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|id| self.token_bytes(*id))
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A decoder that turns ids into text one by one and never cuts a character in two. Special
    /// tokens give no text.
    #[must_use]
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self)
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

    /// The id of a token by its spelling in `tokenizer.json`.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
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

fn token_table(inner: &tokenizers::Tokenizer) -> Vec<Option<Token>> {
    let alphabet = byte_alphabet();
    let added = inner.get_added_tokens_decoder();
    let mut tokens = Vec::new();
    for (text, id) in inner.get_vocab(true) {
        let at = id as usize;
        if at >= tokens.len() {
            tokens.resize(at + 1, None);
        }
        let token = match added.get(&id) {
            Some(added) => Token {
                bytes: text.into_bytes(),
                special: added.special,
            },
            None => Token {
                bytes: token_bytes(&alphabet, &text),
                special: false,
            },
        };
        tokens[at] = Some(token);
    }
    tokens
}

/// Undoes the byte-level spelling; a token with other characters stands for itself.
fn token_bytes(alphabet: &[Option<u8>], text: &str) -> Vec<u8> {
    let byte = |c: char| alphabet.get(c as usize).copied().flatten();
    text.chars()
        .map(byte)
        .collect::<Option<_>>()
        .unwrap_or_else(|| text.as_bytes().to_vec())
}

/// The byte that each character up to U+0143 spells in byte-level vocabularies: visible Latin-1
/// characters spell themselves, and the other 68 bytes follow, in order, from U+0100 on.
fn byte_alphabet() -> Vec<Option<u8>> {
    let visible = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut alphabet: Vec<Option<u8>> = (0..=255)
        .map(|byte| visible(byte).then_some(byte))
        .collect();
    alphabet.extend((0..=255).filter(|byte| !visible(*byte)).map(Some));
    alphabet
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bpe::train_bpe;

    const TEXT: &str = "the cat sat on the mat; the dog sat on the log. \
        der Baer und die Kaetzchen: gr\u{fc}\u{df}e, 12345 \u{20ac}.";

    fn tokenizer() -> Tokenizer {
        let json = train_bpe([TEXT].into_iter(), 300, &["<|endoftext|>"]).unwrap();
        Tokenizer::from_json("t", &json).unwrap()
    }

    #[test]
    fn alphabet_matches_the_crate() {
        let alphabet = byte_alphabet();
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert_eq!(theirs.len(), 256);
        let ours: Vec<char> = (0..alphabet.len() as u32)
            .filter(|c| alphabet[*c as usize].is_some())
            .map(|c| char::from_u32(c).unwrap())
            .collect();
        assert_eq!(ours.len(), 256);
        assert!(ours.iter().all(|c| theirs.contains(c)));
    }

    #[test]
    fn decoding_agrees_with_the_crate() {
        let tokenizer = tokenizer();
        let ids = tokenizer
            .encode(&format!("{TEXT}<|endoftext|>\u{1f600}"))
            .unwrap();
        assert_eq!(
            tokenizer.decode(&ids),
            tokenizer.inner.decode(&ids, false).unwrap()
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
