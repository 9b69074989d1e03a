//! SentencePiece vocabularies: pairs of neighbours that are a token together are merged, the best
//! score first.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use crate::error::Result;
use crate::text::decoding::byte_of;
use crate::text::gguf::{GgufVocab, TokenType};

/// The encoder.
pub(crate) struct Spm {
    ids: HashMap<Box<str>, u32>,
    /// By id.
    scores: Vec<f32>,
    /// By byte: what spells a byte that is in no token.
    bytes: Vec<Option<u32>>,
    /// Tokens that are cut out of the text first, the longest first.
    cut: Vec<Cut>,
    unk: Option<u32>,
    space_prefix: bool,
}

struct Cut {
    text: Box<str>,
    id: u32,
    special: bool,
    /// Whether white space behind it goes with it.
    strip_after: bool,
}

/// A piece of the text between tokens that were cut out, or one of these.
#[derive(Clone, Copy)]
enum Part<'a> {
    Text(&'a str),
    Token(u32),
}

/// Characters `start..start + len` of the text (in bytes), and their neighbours in the list.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    before: usize,
    after: usize,
}

const NONE: usize = usize::MAX;

/// Tokens of Phi-3 that leave the white space behind them alone.
const KEEP_AFTER: &[&str] = &["<unk>", "<s>", "<|endoftext|>"];

/// Whether an added token takes the white space behind it along.
pub(super) fn strips_after(vocab: &GgufVocab, token: &str) -> bool {
    vocab.strip_after_added && !KEEP_AFTER.contains(&token)
}

fn is_ascii_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

/// Two neighbours that make a token.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Spm {
    /// # Errors
    /// There are no scores.
    pub(crate) fn new(
        vocab: &GgufVocab,
        ids: &HashMap<&str, u32>,
        space_prefix: bool,
    ) -> Result<Self> {
        if vocab.scores.is_empty() {
            return Err(vocab.fail("tokenizer.ggml.scores is missing, which SentencePiece needs"));
        }
        let ids: HashMap<Box<str>, u32> = ids
            .iter()
            .filter(|(token, _)| !token.is_empty())
            .map(|(token, id)| ((*token).into(), *id))
            .collect();
        let mut bytes = vec![None; 256];
        for (token, id) in &ids {
            if let Some(byte) = byte_of(token) {
                bytes[usize::from(byte)] = Some(*id);
            }
        }
        let cut = |(id, text): (usize, &String)| {
            let kind = vocab.token_type(id);
            let cut = kind.is_special() || kind == TokenType::UserDefined;
            (cut && !text.is_empty()).then(|| Cut {
                text: text.as_str().into(),
                id: id as u32,
                special: kind.is_special(),
                strip_after: strips_after(vocab, text),
            })
        };
        let mut cut: Vec<Cut> = vocab.tokens.iter().enumerate().filter_map(cut).collect();
        cut.sort_by_key(|cut| std::cmp::Reverse(cut.text.len()));
        Ok(Self {
            ids,
            scores: vocab.scores.clone(),
            bytes,
            cut,
            unk: vocab
                .unk
                .or(Some(0))
                .filter(|id| (*id as usize) < vocab.tokens.len()),
            space_prefix,
        })
    }

    /// The id of a token by its spelling.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// Token ids of `text`, without anything at its ends.
    pub(crate) fn encode(&self, text: &str, parse_special: bool) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut after_token = true;
        for part in self.parts(text, parse_special) {
            match part {
                Part::Token(id) => {
                    ids.push(id);
                    after_token = true;
                }
                Part::Text(text) => {
                    let prefix = if self.space_prefix && after_token {
                        " "
                    } else {
                        ""
                    };
                    let spelled = format!("{prefix}{text}").replace(' ', "\u{2581}");
                    self.merge(&spelled, &mut ids);
                    after_token = false;
                }
            }
        }
        ids
    }

    /// Cuts added tokens out of the text.
    fn parts<'a>(&self, text: &'a str, parse_special: bool) -> Vec<Part<'a>> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut parts = vec![Part::Text(text)];
        for cut in &self.cut {
            if (cut.special && !parse_special) || !text.contains(&*cut.text) {
                continue;
            }
            let mut finer = Vec::with_capacity(parts.len() + 2);
            for part in parts {
                let Part::Text(text) = part else {
                    finer.push(part);
                    continue;
                };
                for (i, piece) in text.split(&*cut.text).enumerate() {
                    let piece = if i > 0 && cut.strip_after {
                        piece.trim_start_matches(is_ascii_space)
                    } else {
                        piece
                    };
                    if i > 0 {
                        finer.push(Part::Token(cut.id));
                    }
                    if !piece.is_empty() {
                        finer.push(Part::Text(piece));
                    }
                }
            }
            parts = finer;
        }
        parts
    }

    fn merge(&self, text: &str, ids: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                len: c.len_utf8(),
                before: i.checked_sub(1).unwrap_or(NONE),
                after: i + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.after = NONE;
        }
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.propose(text, &symbols, right - 1, right, &mut queue);
        }
        while let Some(pair) = queue.pop() {
            let (left, right) = (symbols[pair.left], symbols[pair.right]);
            // A symbol that was merged meanwhile is longer, or gone.
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.len {
                continue;
            }
            symbols[pair.left].len = pair.len;
            symbols[pair.left].after = right.after;
            symbols[pair.right].len = 0;
            if right.after != NONE {
                symbols[right.after].before = pair.left;
            }
            self.propose(text, &symbols, left.before, pair.left, &mut queue);
            self.propose(text, &symbols, pair.left, right.after, &mut queue);
        }
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            self.spell(&text[symbol.start..symbol.start + symbol.len], ids);
        }
    }

    /// Queues two neighbours if they are a token together.
    fn propose(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        queue: &mut BinaryHeap<Pair>,
    ) {
        if left == NONE || right == NONE {
            return;
        }
        let start = symbols[left].start;
        let len = symbols[left].len + symbols[right].len;
        if let Some(id) = self.id(&text[start..start + len]) {
            queue.push(Pair {
                score: self.scores[id as usize],
                left,
                right,
                len,
            });
        }
    }

    /// The token of `symbol`, or its bytes; a byte without a token is the unknown token.
    fn spell(&self, symbol: &str, ids: &mut Vec<u32>) {
        match self.id(symbol) {
            Some(id) => ids.push(id),
            None => ids.extend(
                symbol
                    .bytes()
                    .filter_map(|byte| self.bytes[usize::from(byte)].or(self.unk)),
            ),
        }
    }
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = self.score.total_cmp(&other.score);
        // Of equal scores the leftmost first; scores are finite, and both zeros are one.
        let by_score = if self.score == other.score {
            Ordering::Equal
        } else {
            by_score
        };
        by_score.then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

#[cfg(test)]
mod tests {
    use crate::text::gguf::{GgufVocab, TokenType};
    use crate::text::tokenizer::{EncodeOptions, Tokenizer};

    fn vocab() -> GgufVocab {
        let mut tokens: Vec<(String, f32, TokenType)> = vec![
            ("<unk>".into(), 0.0, TokenType::Unknown),
            ("<s>".into(), 0.0, TokenType::Control),
            ("</s>".into(), 0.0, TokenType::Control),
        ];
        for byte in 0..=255 {
            tokens.push((format!("<0x{byte:02X}>"), 0.0, TokenType::Byte));
        }
        // From id 259 on.
        for (text, score) in [
            ("\u{2581}", -9.0),
            ("a", -9.0),
            ("b", -9.0),
            ("ab", -2.0),
            ("ba", -1.0),
            ("\u{2581}a", -3.0),
        ] {
            tokens.push((text.into(), score, TokenType::Normal));
        }
        tokens.push(("<u>".into(), 0.0, TokenType::UserDefined));
        GgufVocab {
            origin: "m.gguf".to_owned(),
            model: "llama".to_owned(),
            tokens: tokens.iter().map(|token| token.0.clone()).collect(),
            scores: tokens.iter().map(|token| token.1).collect(),
            token_types: tokens.iter().map(|token| token.2).collect(),
            ..GgufVocab::default()
        }
    }

    #[test]
    fn the_best_score_merges_first() {
        let tokenizer = Tokenizer::from_gguf_vocab(&vocab()).unwrap();
        let ids = tokenizer.encode("aba").unwrap();
        // Space and `a`, then `ba`, whose score is better than that of `ab`.
        assert_eq!(ids, [1, 264, 263]);
        assert_eq!(tokenizer.stream_after(&[]).push(264), "a");
        assert_eq!(tokenizer.stream_after(&ids).push(264), " a");
        assert_eq!(tokenizer.decode(&ids[1..]), "aba");
        assert!(
            tokenizer
                .encode_with("", EncodeOptions::TEXT)
                .unwrap()
                .is_empty()
        );
        assert_eq!(tokenizer.encode("").unwrap(), [1]);
    }

    #[test]
    fn bytes_stand_in_and_added_tokens_are_cut_out() {
        let tokenizer = Tokenizer::from_gguf_vocab(&vocab()).unwrap();
        let ids = tokenizer
            .encode_with("\u{e9}<u>b</s>a", EncodeOptions::RENDERED)
            .unwrap();
        assert_eq!(ids, [259, 3 + 0xc3, 3 + 0xa9, 265, 259, 261, 2, 264]);
        let mut stream = tokenizer.stream();
        let text: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
        assert_eq!(text.concat(), "\u{e9}<u> b a");
        let ids = tokenizer.encode_with("</s>", EncodeOptions::TEXT).unwrap();
        assert!(!ids.contains(&2), "{ids:?}");
        assert_eq!(tokenizer.token_id("<u>"), Some(265));
    }

    #[test]
    fn tokens_of_phi_3_take_white_space_along() {
        let vocab = GgufVocab {
            strip_after_added: true,
            ..vocab()
        };
        let tokenizer = Tokenizer::from_gguf_vocab(&vocab).unwrap();
        let ids = |text: &str| {
            tokenizer
                .encode_with(text, EncodeOptions::RENDERED)
                .unwrap()
        };
        assert_eq!(ids("<u> \nb"), ids("<u>b"));
        assert_ne!(ids("<s> b"), ids("<s>b"));
        assert_eq!(ids("<u>  "), [265]);
    }

    #[test]
    fn without_scores_it_is_refused_and_without_bytes_unknown() {
        let no_scores = GgufVocab {
            scores: Vec::new(),
            ..vocab()
        };
        let error = Tokenizer::from_gguf_vocab(&no_scores)
            .unwrap_err()
            .to_string();
        assert!(error.contains("scores"), "{error}");
        let mut no_bytes = vocab();
        no_bytes.tokens[3 + usize::from(b'z')] = "zz".to_owned();
        let tokenizer = Tokenizer::from_gguf_vocab(&no_bytes).unwrap();
        assert_eq!(
            tokenizer.encode_with("z", EncodeOptions::TEXT).unwrap(),
            [259, 0]
        );
    }
}
