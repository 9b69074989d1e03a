//! Which tokens end an answer. Models say so in up to five places that often disagree, so the
//! union counts, and every id carries where it is from.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{CheckpointError, Result};
use crate::text::ends::special_token;
use crate::text::{GgufVocab, Tokenizer};

/// Where stop tokens are looked for; what a checkpoint lacks stays `None`.
#[derive(Clone, Copy, Debug, Default)]
pub struct StopFiles<'a> {
    /// Folder or file, for errors.
    pub origin: &'a str,
    /// `generation_config.json`.
    pub generation_config: Option<&'a Value>,
    /// `config.json`.
    pub config: Option<&'a Value>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<&'a Value>,
    /// Vocabulary of a GGUF file.
    pub gguf: Option<&'a GgufVocab>,
    /// The tokenizer, for spellings.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// A token that ends an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopToken {
    /// Its id.
    pub id: u32,
    /// The places that name it, such as `generation_config.json`.
    pub sources: Vec<&'static str>,
}

/// Spellings that end a turn or a text wherever they are a token of the vocabulary (llama.cpp's
/// list, version of llama-cpp-python 0.3.36).
const WELL_KNOWN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[e~[",
    // Between the files of a code model's training text.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];
/// Spellings that end a text only where they are control tokens: elsewhere they are mark-up.
const WELL_KNOWN_CONTROL: &[&str] = &["</s>", "<eos>"];

/// The tokens that end an answer, in the order of their ids.
///
/// # Errors
/// An `eos_token_id` is neither an id nor a list of ids.
pub fn stop_token_ids(files: &StopFiles<'_>) -> Result<Vec<StopToken>> {
    let mut stops: BTreeMap<u32, Vec<&'static str>> = BTreeMap::new();
    let mut add = |id: u32, source: &'static str| {
        let sources = stops.entry(id).or_default();
        if !sources.contains(&source) {
            sources.push(source);
        }
    };
    for (json, file) in [
        (files.generation_config, "generation_config.json"),
        (files.config, "config.json"),
    ] {
        for id in eos_ids(files.origin, file, json)? {
            add(id, file);
        }
    }
    if let (Some(config), Some(tokenizer)) = (files.tokenizer_config, files.tokenizer)
        && let Some(id) =
            special_token(&config["eos_token"]).and_then(|eos| tokenizer.token_id(eos))
    {
        add(id, "tokenizer_config.json");
    }
    if let Some(vocab) = files.gguf {
        for (id, source) in [
            (vocab.eos, "tokenizer.ggml.eos_token_id"),
            (vocab.eot, "tokenizer.ggml.eot_token_id"),
            (vocab.eom, "tokenizer.ggml.eom_token_id"),
        ] {
            if let Some(id) = id {
                add(id, source);
            }
        }
    }
    for id in files.tokenizer.into_iter().flat_map(well_known) {
        add(id, "well-known spelling");
    }
    Ok(stops
        .into_iter()
        .map(|(id, sources)| StopToken { id, sources })
        .collect())
}

/// `eos_token_id` of a file: a number or a list of numbers, in the file or in its `text_config`.
fn eos_ids(origin: &str, file: &str, json: Option<&Value>) -> Result<Vec<u32>> {
    let key = "eos_token_id";
    let Some(json) = json else {
        return Ok(Vec::new());
    };
    let value = [&json[key], &json["text_config"][key]]
        .into_iter()
        .find(|value| !value.is_null());
    let ids = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().collect(),
        Some(id) => vec![id],
    };
    let id = |id: &Value| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        number.ok_or_else(|| CheckpointError::Key {
            file: format!("{origin}/{file}"),
            key: key.to_owned(),
            problem: format!("holds {id}, expected a token id or a list of them"),
        })
    };
    ids.into_iter().map(id).collect()
}

fn well_known(tokenizer: &Tokenizer) -> Vec<u32> {
    let has = |token: &str| tokenizer.token_id(token).is_some();
    // In these vocabularies `<|end|>` is between the messages of one answer.
    let end_is_inner = has("<|return|>") && has("<|call|>") || has("<|calls|>") && has("<|flush|>");
    let any = WELL_KNOWN
        .iter()
        .filter(|token| !(end_is_inner && **token == "<|end|>"))
        .filter_map(|token| tokenizer.token_id(token));
    let control = WELL_KNOWN_CONTROL
        .iter()
        .filter_map(|token| tokenizer.token_id(token))
        .filter(|id| tokenizer.is_special(*id));
    any.chain(control).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::text::train_bpe;

    fn tokenizer(specials: &[&str]) -> Tokenizer {
        let json = train_bpe(["a b"].into_iter(), 300, specials).unwrap();
        Tokenizer::from_json("t", &json).unwrap()
    }

    fn ids(files: &StopFiles<'_>) -> Vec<(u32, Vec<&'static str>)> {
        let stops = stop_token_ids(files).unwrap();
        stops
            .into_iter()
            .map(|stop| (stop.id, stop.sources))
            .collect()
    }

    #[test]
    fn every_place_counts_and_is_named() {
        let tokenizer = tokenizer(&["<x>", "<|im_end|>", "</s>"]);
        let generation = json!({"eos_token_id": [1, 7]});
        let config = json!({"text_config": {"eos_token_id": 7}});
        let tokenizer_config = json!({"eos_token": {"content": "<x>"}});
        let files = StopFiles {
            origin: "m",
            generation_config: Some(&generation),
            config: Some(&config),
            tokenizer_config: Some(&tokenizer_config),
            gguf: None,
            tokenizer: Some(&tokenizer),
        };
        assert_eq!(
            ids(&files),
            [
                (0, vec!["tokenizer_config.json"]),
                (1, vec!["generation_config.json", "well-known spelling"]),
                (2, vec!["well-known spelling"]),
                (7, vec!["generation_config.json", "config.json"]),
            ]
        );
        let vocab = GgufVocab {
            eos: Some(3),
            eot: Some(3),
            ..GgufVocab::default()
        };
        let files = StopFiles {
            gguf: Some(&vocab),
            ..StopFiles::default()
        };
        let both = vec!["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
        assert_eq!(ids(&files), [(3, both)]);
    }

    #[test]
    fn the_end_of_a_message_is_not_the_end_of_a_harmony_answer() {
        let stops = |specials: &[&str]| {
            let tokenizer = tokenizer(specials);
            let files = StopFiles {
                tokenizer: Some(&tokenizer),
                ..StopFiles::default()
            };
            ids(&files)
                .into_iter()
                .map(|(id, _)| id)
                .collect::<Vec<_>>()
        };
        assert_eq!(stops(&["<|end|>", "<|return|>", "<|call|>"]), [1, 2]);
        assert_eq!(stops(&["<|end|>", "<|user|>"]), [0]);
    }

    #[test]
    fn an_id_that_is_none_is_refused() {
        let config = json!({"eos_token_id": ["</s>"]});
        let files = StopFiles {
            origin: "m",
            config: Some(&config),
            ..StopFiles::default()
        };
        let error = stop_token_ids(&files).unwrap_err().to_string();
        assert!(
            error.contains("m/config.json") && error.contains("eos_token_id"),
            "{error}"
        );
    }
}
