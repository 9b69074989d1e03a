//! Scores of tokens in the two forms that OpenAI's interface has for them.

use cadre_checkpoint::Tokenizer;
use serde_json::{Map, Value, json};

use super::choice::Entry;

/// Of `/v1/completions`: four lists of one length.
pub(crate) fn lists(entries: &[Entry], tokenizer: &Tokenizer, with_top: bool) -> Value {
    let tokens: Vec<_> = entries
        .iter()
        .map(|entry| tokenizer.token_str(entry.token))
        .collect();
    let log_probs: Vec<_> = entries
        .iter()
        .map(|entry| entry.scored.as_ref().map(|scored| scored.log_prob))
        .collect();
    let top: Vec<_> = entries.iter().map(|entry| top(entry, tokenizer)).collect();
    let offsets: Vec<_> = entries.iter().map(|entry| entry.offset).collect();
    json!({
        "tokens": tokens,
        "token_logprobs": log_probs,
        "top_logprobs": with_top.then_some(top),
        "text_offset": offsets,
    })
}

/// The most probable tokens, and the token itself, by their spelling.
fn top(entry: &Entry, tokenizer: &Tokenizer) -> Option<Map<String, Value>> {
    let scored = entry.scored.as_ref()?;
    let mut map = Map::new();
    let own = (entry.token, scored.log_prob);
    for (token, log_prob) in scored.top.iter().chain([&own]) {
        // Of tokens with one spelling the most probable counts.
        map.entry(tokenizer.token_str(*token))
            .or_insert_with(|| json!(log_prob));
    }
    Some(map)
}

/// Of `/v1/chat/completions`: an object per token.
pub(crate) fn objects(entries: &[Entry], tokenizer: &Tokenizer) -> Value {
    let content: Vec<Value> = entries
        .iter()
        .filter_map(|entry| {
            let scored = entry.scored.as_ref()?;
            let mut object = one(entry.token, scored.log_prob, tokenizer);
            let top = scored.top.iter();
            let top = top.map(|(token, log_prob)| one(*token, *log_prob, tokenizer));
            object["top_logprobs"] = top.collect();
            Some(object)
        })
        .collect();
    json!({"content": content, "refusal": null})
}

fn one(token: u32, log_prob: f64, tokenizer: &Tokenizer) -> Value {
    json!({
        "token": tokenizer.token_str(token),
        "logprob": log_prob,
        "bytes": tokenizer.token_bytes(token),
    })
}
