//! Training a byte-level BPE tokenizer.

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::{CheckpointError, Result};

/// How text is cut before merging: English contractions; words with one leading sign or space;
/// single digits; runs of signs; line ends; other white space, leaving the last one to the word
/// that follows.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Trains a byte-level BPE tokenizer and returns the text of its `tokenizer.json`.
///
/// Ids: first `special_tokens` in their order, then the 256 bytes, then merges. Any text encodes,
/// and encoding followed by decoding gives it back. The result depends only on the multiset of
/// texts. With too little text the vocabulary stays smaller than `vocab_size`.
///
/// # Errors
/// `vocab_size` cannot hold the bytes and the special tokens.
pub fn train_bpe<'a>(
    texts: impl Iterator<Item = &'a str> + Send,
    vocab_size: usize,
    special_tokens: &[&str],
) -> Result<String> {
    let fail = |problem: String| CheckpointError::Tokenizer {
        origin: "(new)".to_owned(),
        problem,
    };
    let least = 256 + special_tokens.len();
    if vocab_size < least {
        return Err(fail(format!(
            "vocab_size is {vocab_size}, expected at least {least}: 256 bytes and {} special \
             tokens",
            special_tokens.len()
        )));
    }
    let fail = |error: tokenizers::Error| fail(format!("cannot be trained: {error}"));
    let mut tokenizer = untrained().map_err(fail)?;
    let special = special_tokens
        .iter()
        .map(|token| AddedToken::from(*token, true))
        .collect();
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    tokenizer.train(&mut trainer, texts).map_err(fail)?;
    let size = tokenizer.get_vocab_size(true);
    if size < vocab_size {
        tracing::warn!(size, vocab_size, "too little text for the whole vocabulary");
    }
    tokenizer.to_string(true).map_err(fail)
}

fn untrained() -> tokenizers::Result<tokenizers::Tokenizer> {
    let words = Split::new(
        SplitPattern::Regex(WORDS.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )?;
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(Sequence::new(vec![
            PreTokenizerWrapper::Split(words),
            PreTokenizerWrapper::ByteLevel(bytes),
        ])))
        .with_post_processor(Some(bytes))
        .with_decoder(Some(bytes));
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::Tokenizer;

    const TEXTS: [&str; 3] = [
        "low lower lowest",
        "new newer 1234",
        "the low newer lower end",
    ];

    #[test]
    fn training_is_deterministic_and_ignores_the_order_of_texts() {
        let first = train_bpe(TEXTS.into_iter(), 280, &["<|endoftext|>"]).unwrap();
        for _ in 0..3 {
            let again = train_bpe(TEXTS.into_iter().rev(), 280, &["<|endoftext|>"]).unwrap();
            assert_eq!(first, again);
        }
    }

    #[test]
    fn ids_are_specials_then_bytes_then_merges_and_digits_stay_single() {
        let json = train_bpe(TEXTS.into_iter(), 280, &["<|endoftext|>", "<|pad|>"]).unwrap();
        let tokenizer = Tokenizer::from_json("t", &json).unwrap();
        assert_eq!(tokenizer.token_id("<|endoftext|>"), Some(0));
        assert_eq!(tokenizer.token_id("<|pad|>"), Some(1));
        assert_eq!(tokenizer.token_str(2), "!");
        assert!(tokenizer.vocab_size() > 258 && tokenizer.vocab_size() <= 280);
        assert_eq!(tokenizer.encode("1234").unwrap().len(), 4);
        assert!(tokenizer.encode("low").unwrap().len() < 3);
    }

    #[test]
    fn a_vocabulary_below_the_bytes_is_refused() {
        let error = train_bpe(TEXTS.into_iter(), 100, &["<|endoftext|>"]).unwrap_err();
        assert!(error.to_string().contains("257"), "{error}");
    }
}
