//! A `tokenizer.json` made of a GGUF vocabulary, for programs that read Hugging Face folders.
//!
//! Byte-level BPE takes over as it is: the file has the merges, and the name of the pre-tokenizer stands for its
//! expressions. SentencePiece has scores instead of merges; every way to put a token together from two others becomes a
//! merge, the best score first, as transformers converts such models.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::text::ends::Ends;
use crate::text::gguf::{GgufVocab, TokenType, bpe, pretokenizers, spm};

const SPACE: &str = "\u{2581}";

/// The text of a `tokenizer.json` that gives the ids of `vocab`.
///
/// # Errors
/// As those of [`crate::Tokenizer::from_gguf_vocab`].
pub(crate) fn tokenizer_json(vocab: &GgufVocab) -> Result<String> {
    let ids = vocab.ids()?;
    let words: Map<String, Value> = ids
        .iter()
        .filter(|(token, _)| !token.is_empty())
        .map(|(token, id)| ((*token).to_owned(), (*id).into()))
        .collect();
    let mut file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(vocab),
    });
    let parts = match vocab.model.as_str() {
        "gpt2" => byte_level(vocab, words)?,
        "llama" => sentencepiece(vocab, &ids, words)?,
        other => return Err(vocab.fail(format!("`{other}` has no form in tokenizer.json"))),
    };
    if let Value::Object(file) = &mut file {
        file.extend(parts);
    }
    Ok(format!("{file:#}\n"))
}

fn added_tokens(vocab: &GgufVocab) -> Vec<Value> {
    let added = |(id, text): (usize, &String)| {
        let kind = vocab.token_type(id);
        let is_cut = kind.is_special() || kind == TokenType::UserDefined;
        (is_cut && !text.is_empty()).then(|| {
            json!({
                "id": id,
                "content": text,
                "single_word": false,
                "lstrip": false,
                "rstrip": spm::strips_after(vocab, text),
                "normalized": false,
                "special": kind.is_special(),
            })
        })
    };
    vocab.tokens.iter().enumerate().filter_map(added).collect()
}

fn byte_level(vocab: &GgufVocab, words: Map<String, Value>) -> Result<Map<String, Value>> {
    let pre = vocab.pre.as_deref().unwrap_or("default");
    let kind = pretokenizers::find(pre).map_err(|problem| vocab.fail(problem))?;
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let split = |pattern: &&str| {
        json!({
            "type": "Split",
            "pattern": {"Regex": spelled_out(pattern)},
            "behavior": "Isolated",
            "invert": false,
        })
    };
    let mut steps: Vec<Value> = kind.splits.iter().map(split).collect();
    steps.push(bytes.clone());
    let ends = template(vocab, &vocab.ends(kind.add_bos, [None; 2])?);
    let processor = match ends {
        Some(ends) => json!({"type": "Sequence", "processors": [bytes, ends]}),
        None => bytes.clone(),
    };
    let mut model = model(words, bpe::merges(vocab)?);
    model["ignore_merges"] = kind.ignore_merges.into();
    Ok(object(json!({
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": processor,
        "decoder": bytes,
        "model": model,
    })))
}

fn sentencepiece(
    vocab: &GgufVocab,
    ids: &HashMap<&str, u32>,
    words: Map<String, Value>,
) -> Result<Map<String, Value>> {
    if vocab.scores.is_empty() {
        return Err(vocab.fail("tokenizer.ggml.scores is missing, which SentencePiece needs"));
    }
    let prefix = vocab.add_space_prefix.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![
        replace(SPACE, " "),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unk = vocab.unk.unwrap_or(0) as usize;
    let mut model = model(words, pairs(vocab, ids));
    model["unk_token"] = vocab.tokens.get(unk).map(String::as_str).into();
    model["fuse_unk"] = true.into();
    model["byte_fallback"] = true.into();
    let ends = vocab.ends(true, [Some(1), Some(2)])?;
    Ok(object(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": template(vocab, &ends),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    })))
}

fn model(words: Map<String, Value>, merges: Vec<(String, String)>) -> Value {
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": null,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": false,
        "byte_fallback": false,
        "ignore_merges": false,
        "vocab": words,
        "merges": merges,
    })
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Every way to make a token of two others: the best score first, then by the ids of the parts.
fn pairs(vocab: &GgufVocab, ids: &HashMap<&str, u32>) -> Vec<(String, String)> {
    let mut found: Vec<(f32, u32, u32, &str, &str)> = Vec::new();
    for (token, id) in ids {
        let score = vocab.scores[*id as usize];
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                found.push((score, *l, *r, left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let owned =
        |(.., left, right): (f32, u32, u32, &str, &str)| (left.to_owned(), right.to_owned());
    found.into_iter().map(owned).collect()
}

/// What puts tokens at the ends of a prompt, if any are put there.
fn template(vocab: &GgufVocab, ends: &Ends) -> Option<Value> {
    if ends.before.is_empty() && ends.after.is_empty() {
        return None;
    }
    let spelled = |id: &u32| vocab.tokens[*id as usize].as_str();
    let special =
        |id: &u32, side: u32| json!({"SpecialToken": {"id": spelled(id), "type_id": side}});
    let with_ends = |name: &str, side: u32| {
        let text = json!({"Sequence": {"id": name, "type_id": side}});
        let before = ends.before.iter().map(|id| special(id, side));
        let after = ends.after.iter().map(|id| special(id, side));
        before.chain([text]).chain(after).collect::<Vec<_>>()
    };
    let (single, second) = (with_ends("A", 0), with_ends("B", 1));
    let tokens = ends.before.iter().chain(&ends.after).map(|id| {
        let token = spelled(id);
        let entry = json!({"id": token, "ids": [id], "tokens": [token]});
        (token.to_owned(), entry)
    });
    let tokens: Map<String, Value> = tokens.collect();
    let pair = [single.clone(), second].concat();
    Some(json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": tokens,
    }))
}

/// An expression with the characters themselves in place of `\u{4e00}`, which not every engine reads.
fn spelled_out(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once(r"\u{") {
        out += before;
        let Some((digits, after)) = after.split_once('}') else {
            return pattern.to_owned();
        };
        match u32::from_str_radix(digits, 16)
            .ok()
            .and_then(char::from_u32)
        {
            Some(c) => out.push(c),
            None => return pattern.to_owned(),
        }
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::{EncodeOptions, Tokenizer};

    fn same(vocab: &GgufVocab, texts: &[&str]) {
        let theirs = Tokenizer::from_gguf_vocab(vocab).unwrap();
        let json = tokenizer_json(vocab).unwrap();
        let made = Tokenizer::from_json("made", &json).unwrap();
        for text in texts {
            let ids = theirs.encode(text).unwrap();
            assert_eq!(made.encode(text).unwrap(), ids, "{text:?}");
            assert_eq!(made.decode(&ids), theirs.decode(&ids), "{text:?}");
            for (id, _) in vocab.tokens.iter().enumerate() {
                let id = id as u32;
                assert_eq!(made.is_special(id), theirs.is_special(id), "{id}");
            }
        }
        let bare = |tokenizer: &Tokenizer| {
            tokenizer
                .encode_with(texts[0], EncodeOptions::RENDERED)
                .unwrap()
        };
        assert_eq!(bare(&made), bare(&theirs));
    }

    fn words(tokens: &[&str], kinds: &[(usize, TokenType)]) -> (Vec<String>, Vec<TokenType>) {
        let mut types = vec![TokenType::Normal; tokens.len()];
        for (at, kind) in kinds {
            types[*at] = *kind;
        }
        (
            tokens.iter().map(|token| (*token).to_owned()).collect(),
            types,
        )
    }

    #[test]
    fn byte_level_vocabularies_keep_their_merges_and_ends() {
        let kinds = [(4, TokenType::Control), (5, TokenType::UserDefined)];
        let list = ["a", "b", "\u{120}", "ab", "<|x|>", "<u>", "\u{120}ab"];
        let (tokens, token_types) = words(&list, &kinds);
        for (pre, add_bos) in [("qwen2", None), ("llama-bpe", None), ("gpt-2", Some(true))] {
            let vocab = GgufVocab {
                model: "gpt2".to_owned(),
                pre: Some(pre.to_owned()),
                tokens: tokens.clone(),
                token_types: token_types.clone(),
                merges: vec!["a b".to_owned(), "\u{120} ab".to_owned()],
                bos: Some(4),
                add_bos,
                ..GgufVocab::default()
            };
            same(&vocab, &["ab ab ba<|x|>a<u>b", "", " a"]);
        }
    }

    #[test]
    fn sentencepiece_scores_become_merges() {
        let mut list: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        list.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
        let pieces = [
            "\u{2581}",
            "a",
            "b",
            "c",
            "\u{2581}a",
            "ab",
            "bc",
            "abc",
            "\u{2581}abc",
            "<u>",
        ];
        list.extend(pieces.map(str::to_owned));
        let mut types = vec![TokenType::Normal; list.len()];
        types[0] = TokenType::Unknown;
        types[1] = TokenType::Control;
        types[2] = TokenType::Control;
        types[3..259].fill(TokenType::Byte);
        types[list.len() - 1] = TokenType::UserDefined;
        let mut scores = vec![0.0; list.len()];
        for (at, score) in [
            (263, -4.0),
            (264, -2.0),
            (265, -1.0),
            (266, -3.0),
            (267, -5.0),
        ] {
            scores[at] = score;
        }
        for add_space_prefix in [None, Some(false)] {
            let vocab = GgufVocab {
                model: "llama".to_owned(),
                tokens: list.clone(),
                token_types: types.clone(),
                scores: scores.clone(),
                add_space_prefix,
                ..GgufVocab::default()
            };
            same(&vocab, &["abc", "abcab cba  a", "a\u{e9}\nb", "a<u>b</s>c"]);
        }
    }

    #[test]
    fn escapes_become_the_characters() {
        assert_eq!(
            spelled_out(r"[\u{4e00}-\u{9fa5}]+|\s"),
            "[\u{4e00}-\u{9fa5}]+|\\s"
        );
        assert_eq!(spelled_out(r"\p{L}"), r"\p{L}");
    }
}
