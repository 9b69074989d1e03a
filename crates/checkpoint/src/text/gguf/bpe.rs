//! Byte-level BPE of a GGUF vocabulary, as a tokenizer of the `tokenizers` crate.

use std::collections::{HashMap, HashSet};

use ahash::AHashMap;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::Result;
use crate::text::gguf::pretokenizers::{self, PreTokenizer};
use crate::text::gguf::{GgufVocab, TokenType};
use crate::text::tokenizer::JsonEncoder;

/// The encoder, and whether this kind of vocabulary starts prompts with BOS by itself.
///
/// # Errors
/// The pre-tokenizer is not known, merges are missing, or a merge makes no token.
pub(crate) fn build(vocab: &GgufVocab, ids: &HashMap<&str, u32>) -> Result<(JsonEncoder, bool)> {
    let pre = match vocab.pre.as_deref() {
        Some(pre) => pre,
        None => {
            tracing::warn!(
                origin = vocab.origin,
                "no tokenizer.ggml.pre: text is cut the default way, which may not be the model's"
            );
            "default"
        }
    };
    let kind = pretokenizers::find(pre).map_err(|problem| vocab.fail(problem))?;
    if vocab.merges.is_empty() {
        return Err(vocab.fail("tokenizer.ggml.merges is missing, which BPE needs"));
    }
    let fail = |error: tokenizers::Error| vocab.fail(format!("does not make a BPE: {error}"));
    let entries: AHashMap<String, u32> = ids
        .iter()
        .filter(|(token, _)| !token.is_empty())
        .map(|(token, id)| ((*token).to_owned(), *id))
        .collect();
    let bpe = BPE::builder()
        .vocab_and_merges(entries, merges(vocab)?)
        .ignore_merges(kind.ignore_merges)
        .build()
        .map_err(fail)?;
    let bytes = ByteLevel::new(false, false, false);
    let mut inner = tokenizers::Tokenizer::new(bpe);
    inner
        .with_pre_tokenizer(Some(splits(kind).map_err(fail)?))
        .with_post_processor(Some(bytes))
        .with_decoder(Some(bytes));
    inner.add_tokens(added_tokens(vocab)).map_err(fail)?;
    Ok((JsonEncoder::new(inner), kind.add_bos))
}

/// Merges as pairs. Of a merge that is listed twice the first counts.
pub(super) fn merges(vocab: &GgufVocab) -> Result<Vec<(String, String)>> {
    let mut seen = HashSet::with_capacity(vocab.merges.len());
    let mut pairs = Vec::with_capacity(vocab.merges.len());
    for merge in &vocab.merges {
        if !seen.insert(merge.as_str()) {
            continue;
        }
        // The left side may itself start with a space in vocabularies that are not byte-level.
        let cut = merge.char_indices().skip(1).find(|(_, c)| *c == ' ');
        let Some((at, _)) = cut else {
            return Err(vocab.fail(format!(
                "tokenizer.ggml.merges holds `{merge}`, expected two tokens with a space between"
            )));
        };
        pairs.push((merge[..at].to_owned(), merge[at + 1..].to_owned()));
    }
    Ok(pairs)
}

fn splits(kind: &PreTokenizer) -> tokenizers::Result<Sequence> {
    let mut steps = Vec::new();
    for split in kind.splits {
        let pattern = SplitPattern::Regex((*split).into());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
        steps.push(PreTokenizerWrapper::Split(split));
    }
    let bytes = ByteLevel::new(false, false, false);
    steps.push(PreTokenizerWrapper::ByteLevel(bytes));
    Ok(Sequence::new(steps))
}

/// Tokens that are cut out of the text before it is split into words.
fn added_tokens(vocab: &GgufVocab) -> Vec<AddedToken> {
    let added = |(id, text): (usize, &String)| {
        let kind = vocab.token_type(id);
        let cut = kind.is_special() || kind == TokenType::UserDefined;
        (cut && !text.is_empty())
            .then(|| AddedToken::from(text.as_str(), kind.is_special()).normalized(false))
    };
    vocab.tokens.iter().enumerate().filter_map(added).collect()
}

#[cfg(test)]
mod tests {
    use crate::text::gguf::{GgufVocab, TokenType};
    use crate::text::tokenizer::{EncodeOptions, Tokenizer};

    /// `a`, `b`, ` ` (spelled U+0120), `ab`, and two added tokens.
    fn vocab() -> GgufVocab {
        let tokens = ["a", "b", "\u{120}", "ab", "<|x|>", "<u>"];
        let mut token_types = vec![TokenType::Normal; tokens.len()];
        token_types[4] = TokenType::Control;
        token_types[5] = TokenType::UserDefined;
        GgufVocab {
            origin: "m.gguf".to_owned(),
            model: "gpt2".to_owned(),
            pre: Some("qwen2".to_owned()),
            tokens: tokens.map(str::to_owned).to_vec(),
            token_types,
            merges: vec!["a b".to_owned()],
            bos: Some(4),
            ..GgufVocab::default()
        }
    }

    #[test]
    fn control_tokens_are_parsed_on_demand_and_user_tokens_always() {
        let tokenizer = Tokenizer::from_gguf_vocab(&vocab()).unwrap();
        assert_eq!(
            tokenizer.encode("ab ba<|x|><u>").unwrap(),
            [3, 2, 1, 0, 4, 5]
        );
        let ids = tokenizer
            .encode_with("ab<|x|><u>", EncodeOptions::TEXT)
            .unwrap();
        // The signs of `<|x|>` have no tokens in this vocabulary.
        assert_eq!(ids, [3, 5]);
        assert_eq!(tokenizer.decode(&[3, 2, 4]), "ab <|x|>");
        assert!(tokenizer.is_special(4) && !tokenizer.is_special(5));
        assert_eq!(tokenizer.token_id("<|x|>"), Some(4));
    }

    #[test]
    fn the_start_of_a_prompt_follows_the_file_and_then_the_kind() {
        let ids = |vocab: GgufVocab| {
            Tokenizer::from_gguf_vocab(&vocab)
                .unwrap()
                .encode("a")
                .unwrap()
        };
        assert_eq!(ids(vocab()), [0]);
        let llama = Some("llama-bpe".to_owned());
        assert_eq!(
            ids(GgufVocab {
                pre: llama.clone(),
                ..vocab()
            }),
            [4, 0]
        );
        let add_bos = Some(false);
        assert_eq!(
            ids(GgufVocab {
                pre: llama,
                add_bos,
                ..vocab()
            }),
            [0]
        );
        let (add_eos, eos) = (Some(true), Some(5));
        assert_eq!(
            ids(GgufVocab {
                add_eos,
                eos,
                ..vocab()
            }),
            [0, 5]
        );
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = |vocab: GgufVocab| Tokenizer::from_gguf_vocab(&vocab).unwrap_err().to_string();
        let pre = Some("qwen9".to_owned());
        assert!(error(GgufVocab { pre, ..vocab() }).contains("qwen9"));
        assert!(
            error(GgufVocab {
                merges: Vec::new(),
                ..vocab()
            })
            .contains("merges")
        );
        let merges = vec!["ab".to_owned()];
        assert!(error(GgufVocab { merges, ..vocab() }).contains("`ab`"));
        let merges = vec!["b a".to_owned()];
        assert!(error(GgufVocab { merges, ..vocab() }).contains("ba"));
        assert!(
            error(GgufVocab {
                add_eos: Some(true),
                ..vocab()
            })
            .contains("eos")
        );
        let (add_bos, bos) = (Some(true), Some(99));
        assert!(
            error(GgufVocab {
                add_bos,
                bos,
                ..vocab()
            })
            .contains("99")
        );
        assert!(
            error(GgufVocab {
                scores: vec![0.0],
                ..vocab()
            })
            .contains("scores")
        );
        let model = "bert".to_owned();
        assert!(error(GgufVocab { model, ..vocab() }).contains("WordPiece"));
        let mut twice = vocab();
        twice.tokens[1] = "a".to_owned();
        assert!(error(twice).contains("tokens 0 and 1"));
    }
}
