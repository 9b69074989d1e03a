//! `/v1/completions`: continues text or tokens, and scores them.

use std::sync::Arc;

use cadre_checkpoint::EncodeOptions;
use serde_json::{Value, json};

use super::choice::{Choice, Echo, End, Piece};
use super::error::{ApiError, Result};
use super::experts::Told;
use super::fields::{Fields, wrong};
use super::generation::{IGNORED, MOST_ALTERNATIVES, MOST_CHOICES, Wanted, room, tokens};
use super::log_probs;
use super::voice::{Form, OpenAi};
use super::{Prepared, identifier};
use crate::schedule::Job;
use crate::served::{Served, unix_seconds};

/// New tokens unless told otherwise, as in OpenAI's interface.
const NEW_TOKENS: usize = 16;

/// A prompt with its text, where that was given.
pub(crate) struct Prompt {
    text: Option<String>,
    pub(crate) tokens: Arc<[u32]>,
}

/// How an answer is spelled.
#[derive(Debug)]
pub(crate) struct Completion {
    id: String,
    created: u64,
    model: String,
    /// Whether scores are told, and alternatives with them.
    scores: Option<bool>,
}

/// Understands a request.
pub(crate) fn prepare(body: &[u8], served: &Served) -> Result<Prepared> {
    let mut fields = Fields::parse(body)?;
    let mut wanted = Wanted::read(&mut fields, served)?;
    let prompts = prompts("prompt", fields.need("prompt")?, served)?;
    let asked = fields.count("max_tokens", 0..=usize::MAX)?;
    let echo = fields.bool("echo")?.unwrap_or(false);
    wanted.alternatives = fields.count("logprobs", 0..=MOST_ALTERNATIVES)?;
    fields.refuse("suffix", "text is only continued, never filled in")?;
    let best_of = fields.count("best_of", 1..=MOST_CHOICES)?;
    if best_of.is_some_and(|best_of| best_of != wanted.n) {
        return Err(ApiError::field(
            "best_of",
            "is supported only where it equals `n`",
        ));
    }
    fields.finish(IGNORED)?;
    let n_choices = prompts.len().saturating_mul(wanted.n);
    if n_choices > MOST_CHOICES {
        let message = format!(
            "the request asks for {n_choices} answers ({} prompts, `n` = {}); at most {MOST_CHOICES} at a time",
            prompts.len(),
            wanted.n
        );
        return Err(ApiError::bad(message).param("prompt"));
    }
    if matches!(wanted.experts.told, Some(Told::SgLang(_))) && n_choices > 1 {
        let problem = "goes only with one prompt";
        return Err(ApiError::field("return_routed_experts", problem));
    }
    let mut jobs = Vec::with_capacity(n_choices);
    let mut choices = Vec::with_capacity(n_choices);
    for prompt in &prompts {
        let new = room(served, prompt.tokens.len(), asked, NEW_TOKENS)?;
        for index in 0..wanted.n {
            jobs.push(Job {
                scores_prompt: echo && wanted.alternatives.is_some(),
                ..wanted.job(&prompt.tokens, index, new)
            });
            let choice = choice(prompt, &wanted, echo, served);
            choices.push(wanted.recording(choice, prompt.tokens.len()));
        }
    }
    let form = Completion {
        id: identifier("cmpl"),
        created: unix_seconds(),
        model: served.name().to_owned(),
        scores: wanted.alternatives.map(|n| n > 0),
    };
    Ok(Prepared {
        jobs,
        choices,
        n_prompt: prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
        streams: wanted.streams,
        voice: Box::new(OpenAi::new(form, wanted.include_usage)),
    })
}

fn choice(prompt: &Prompt, wanted: &Wanted, echo: bool, served: &Served) -> Choice {
    let text = |text: &Option<String>| match text {
        Some(text) => text.clone(),
        None => served.tokenizer.decode(&prompt.tokens),
    };
    let echo = echo.then(|| Echo {
        text: text(&prompt.text),
        tokens: match wanted.alternatives {
            Some(_) => prompt.tokens.to_vec(),
            None => Vec::new(),
        },
    });
    let stream = served.tokenizer.stream_after(&prompt.tokens).into_owned();
    Choice::new(stream, &wanted.stops, echo)
}

/// A text, a list of texts, a list of token ids, or a list of such lists.
pub(crate) fn prompts(name: &str, value: Value, served: &Served) -> Result<Vec<Prompt>> {
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::text(name, text, served)?]),
        Value::Array(items) => items,
        other => {
            let expected = "a string, a list of strings, or token ids";
            return Err(wrong(name, expected, &other));
        }
    };
    match items.first() {
        None => Err(ApiError::field(name, "is empty")),
        Some(Value::Number(_)) => {
            let tokens = tokens(name, &Value::Array(items), served)?;
            Ok(vec![Prompt::tokens(name, tokens)?])
        }
        Some(_) if items.len() > MOST_CHOICES => {
            let problem = format!("has {} prompts, at most {MOST_CHOICES}", items.len());
            Err(ApiError::field(name, problem))
        }
        Some(_) => {
            let prompt = |item| match item {
                Value::String(text) => Prompt::text(name, text, served),
                list @ Value::Array(_) => Prompt::tokens(name, tokens(name, &list, served)?),
                other => Err(wrong(name, "a list of one kind of prompts", &other)),
            };
            items.into_iter().map(prompt).collect()
        }
    }
}

impl Prompt {
    fn text(name: &str, text: String, served: &Served) -> Result<Self> {
        let tokens = served.encode(&text, EncodeOptions::PROMPT)?;
        Ok(Self {
            text: Some(text),
            ..Self::tokens(name, tokens)?
        })
    }

    fn tokens(name: &str, tokens: Vec<u32>) -> Result<Self> {
        if tokens.is_empty() {
            return Err(ApiError::field(
                name,
                "has no tokens: there is nothing to read",
            ));
        }
        Ok(Self {
            text: None,
            tokens: tokens.into(),
        })
    }
}

impl Form for Completion {
    fn envelope(&self, _is_chunk: bool) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        })
    }

    fn opening(&self, _index: usize) -> Option<Value> {
        None
    }

    fn piece(&self, index: usize, piece: &Piece, served: &Served) -> Value {
        self.whole(index, piece, served)
    }

    fn whole(&self, index: usize, piece: &Piece, served: &Served) -> Value {
        let scores = self
            .scores
            .map(|with_top| log_probs::lists(&piece.entries, &served.tokenizer, with_top));
        json!({
            "index": index,
            "text": piece.text,
            "logprobs": scores,
            "finish_reason": piece.end.as_ref().map(End::openai),
        })
    }
}
