//! What a tokenizer's decoder makes of its tokens: the bytes of each one, and what is cut from the
//! start of a text.
//!
//! `tokenizer.json` describes a decoder as a chain of steps over a list of strings. All chains that
//! language models use split into a part that looks at one token at a time and a part that looks
//! only at the start of the text; [`Decoding`] is that split. Other chains are refused.

use serde_json::Value;

/// The bytes of every token, and the rule for the start of a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Decoding {
    replacements: Vec<(String, String)>,
    byte_fallback: bool,
    byte_level: bool,
    /// What the first characters of a text lose.
    pub(crate) lead: Lead,
}

/// What is cut from the start of a text. SentencePiece puts a space before the first word, so its
/// decoders take one away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Lead {
    /// Nothing.
    #[default]
    Keep,
    /// Up to so many leading copies of a character.
    Strip(char, usize),
    /// All spaces of the first token.
    FirstToken,
}

/// The decoder steps that are understood, for error messages.
const KNOWN: &str = "ByteLevel, Metaspace, Replace of a plain string, ByteFallback, Fuse, Strip of \
                     the start";

impl Decoding {
    /// SentencePiece as GGUF stores it: U+2581 is a space and `<0xE2>` a byte.
    pub(crate) fn sentencepiece(space_prefix: bool) -> Self {
        Self {
            replacements: vec![("\u{2581}".to_owned(), " ".to_owned())],
            byte_fallback: true,
            byte_level: false,
            lead: if space_prefix {
                Lead::Strip(' ', 1)
            } else {
                Lead::Keep
            },
        }
    }

    /// Byte-level spelling alone, as in the GPT-2 family.
    pub(crate) fn byte_level() -> Self {
        Self {
            byte_level: true,
            ..Self::default()
        }
    }

    /// Reads the `decoder` of a `tokenizer.json`.
    ///
    /// # Errors
    /// What is not supported, as text.
    pub(crate) fn from_json(decoder: &Value) -> Result<Self, String> {
        if decoder.is_null() {
            return Err(format!("it has no decoder; supported: {KNOWN}"));
        }
        let mut decoding = Self::default();
        let mut fused = false;
        for step in steps(decoder) {
            decoding.add(step, &mut fused)?;
        }
        Ok(decoding)
    }

    fn add(&mut self, step: &Value, fused: &mut bool) -> Result<(), String> {
        let refuse = || {
            Err(format!(
                "decoder step {step} is not supported; known: {KNOWN}"
            ))
        };
        match step["type"].as_str() {
            Some("ByteLevel") if !*fused => self.byte_level = true,
            Some("ByteFallback") if !*fused => self.byte_fallback = true,
            Some("Fuse") => *fused = true,
            Some("Replace") => {
                let (Some(from), Some(to)) =
                    (step["pattern"]["String"].as_str(), step["content"].as_str())
                else {
                    return refuse();
                };
                // A single character cannot reach over the seam of two tokens.
                if from.is_empty() || (*fused && from.chars().count() > 1) {
                    return refuse();
                }
                self.replacements.push((from.to_owned(), to.to_owned()));
            }
            Some("Metaspace") if !*fused => {
                let mark = step["replacement"].as_str().unwrap_or("\u{2581}");
                self.replacements.push((mark.to_owned(), " ".to_owned()));
                if step["prepend_scheme"] != "never" {
                    self.lead = Lead::FirstToken;
                }
            }
            Some("Strip") if *fused && self.lead == Lead::Keep => {
                let content = step["content"].as_str().and_then(only_char);
                match (content, step["start"].as_u64(), step["stop"].as_u64()) {
                    (Some(content), Some(start), Some(0)) => {
                        self.lead = Lead::Strip(content, start as usize);
                    }
                    _ => return refuse(),
                }
            }
            _ => return refuse(),
        }
        Ok(())
    }

    /// The bytes that a token of the vocabulary stands for.
    pub(crate) fn bytes(&self, text: &str) -> Vec<u8> {
        if self.byte_fallback
            && let Some(byte) = byte_of(text)
        {
            return vec![byte];
        }
        let mut text = text.to_owned();
        for (from, to) in &self.replacements {
            text = text.replace(from.as_str(), to);
        }
        if self.byte_level {
            byte_level_bytes(&text)
        } else {
            text.into_bytes()
        }
    }

    /// The bytes of an added token. In byte-level vocabularies these are spelled as they are read.
    pub(crate) fn added_bytes(&self, text: &str) -> Vec<u8> {
        if self.byte_level {
            text.as_bytes().to_vec()
        } else {
            self.bytes(text)
        }
    }
}

/// The steps of a decoder, sequences unrolled.
fn steps(decoder: &Value) -> Vec<&Value> {
    match decoder["decoders"].as_array() {
        Some(inner) if decoder["type"] == "Sequence" => inner.iter().flat_map(steps).collect(),
        _ => vec![decoder],
    }
}

fn only_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

/// The byte that `<0xE2>` spells.
pub(crate) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hex.then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Undoes the byte-level spelling; a token with other characters stands for itself.
fn byte_level_bytes(text: &str) -> Vec<u8> {
    text.chars()
        .map(byte_of_char)
        .collect::<Option<_>>()
        .unwrap_or_else(|| text.as_bytes().to_vec())
}

/// The byte that a character spells in byte-level vocabularies: visible Latin-1 characters spell
/// themselves, and the other 68 bytes follow, in order, from U+0100 on.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match u8::try_from(code) {
        Ok(byte) => is_visible(byte).then_some(byte),
        Err(_) => (0..=u8::MAX)
            .filter(|byte| !is_visible(*byte))
            .nth(code as usize - 256),
    }
}

fn is_visible(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_alphabet_is_that_of_the_crate() {
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert_eq!(theirs.len(), 256);
        let mut bytes: Vec<u8> = theirs.iter().filter_map(|c| byte_of_char(*c)).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of_char('\u{120}'), Some(b' '));
        assert_eq!(byte_of_char('\u{144}'), None);
        assert_eq!(byte_of_char(' '), None);
    }

    #[test]
    fn the_decoder_of_llama_becomes_bytes_and_a_cut_space() {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let decoding = Decoding::from_json(&decoder).unwrap();
        assert_eq!(decoding, Decoding::sentencepiece(true));
        assert_eq!(decoding.bytes("\u{2581}the"), b" the");
        assert_eq!(decoding.bytes("<0xE2>"), [0xe2]);
        assert_eq!(decoding.bytes("<0xG2>"), b"<0xG2>");
        assert_eq!(decoding.bytes("<0x+2>"), b"<0x+2>");
    }

    #[test]
    fn metaspace_and_byte_level_are_read_and_the_rest_is_refused_with_its_name() {
        let metaspace = json!({"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"});
        let decoding = Decoding::from_json(&metaspace).unwrap();
        assert_eq!(decoding.bytes("_a"), b" a");
        assert_eq!(decoding.lead, Lead::FirstToken);
        let decoding = Decoding::from_json(&json!({"type": "ByteLevel"})).unwrap();
        assert_eq!(decoding.bytes("\u{120}\u{e2}"), [b' ', 0xe2]);
        assert_eq!(decoding.added_bytes("\u{e9}"), "\u{e9}".as_bytes());
        for decoder in [
            json!({"type": "WordPiece", "prefix": "##"}),
            json!({"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"}),
            json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
            json!(null),
        ] {
            let error = Decoding::from_json(&decoder).unwrap_err();
            assert!(
                error.contains("decoder") && error.contains("ByteFallback"),
                "{error}"
            );
        }
    }
}
