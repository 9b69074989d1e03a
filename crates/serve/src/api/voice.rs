//! How answers are spelled: each interface has its own words for the same events.

use bytes::Bytes;
use serde_json::{Value, json};

use super::choice::Piece;
use super::error::ApiError;
use super::experts::{Record, Told};
use crate::served::Served;

/// Tokens that were read and drawn.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Of all prompts, each counted once.
    pub(crate) n_prompt: usize,
    /// Of those, the ones that were known already.
    pub(crate) n_cached: usize,
    pub(crate) n_new: usize,
}

/// The words of an interface, for one answer.
pub(crate) trait Voice: Send {
    /// Events before anything is known, for `n` choices.
    fn begin(&mut self, n: usize, usage: Usage) -> Vec<Bytes>;

    /// Events for what one choice gained.
    fn piece(&mut self, index: usize, piece: &Piece, served: &Served) -> Vec<Bytes>;

    /// Events at the end.
    fn end(&mut self, usage: Usage) -> Vec<Bytes>;

    /// A sign of life.
    fn ping(&self) -> Bytes;

    /// What ends an answer that cannot be completed.
    fn failed(&self, error: &ApiError) -> Bytes;

    /// All of it at once.
    fn whole(&self, answers: &[Piece], usage: Usage, served: &Served) -> Value;
}

/// How one of OpenAI's interfaces spells a choice.
pub(crate) trait Form: Send {
    /// What everything of the answer carries: id, object, time, model.
    fn envelope(&self, is_chunk: bool) -> Value;

    /// A choice before anything is known of it.
    fn opening(&self, index: usize) -> Option<Value>;

    /// What a choice gained.
    fn piece(&self, index: usize, piece: &Piece, served: &Served) -> Value;

    /// A choice that is complete.
    fn whole(&self, index: usize, piece: &Piece, served: &Served) -> Value;
}

/// OpenAI's words: chunks of choices.
pub(crate) struct OpenAi<F> {
    form: F,
    include_usage: bool,
    /// What is told of experts at the end, in SGLang's form, with the picks of a token.
    experts: Option<(Record, usize)>,
}

impl<F: Form> OpenAi<F> {
    pub(crate) fn new(form: F, include_usage: bool) -> Self {
        Self {
            form,
            include_usage,
            experts: None,
        }
    }

    /// Keeps what is told at the end.
    fn keep(&mut self, piece: &Piece, served: &Served) {
        let Some(record) = &piece.record else {
            return;
        };
        if !matches!(record.told, Told::SgLang(_)) {
            return;
        }
        match &mut self.experts {
            Some((known, _)) => known.append(record.clone()),
            None => self.experts = Some((record.clone(), served.model.info().top_k)),
        }
    }

    fn sglext(&self) -> Option<Bytes> {
        let (record, top_k) = self.experts.as_ref()?;
        let mut chunk = self.form.envelope(true);
        chunk["choices"] = json!([]);
        chunk["sglext"] = record.sglext(*top_k)?;
        Some(event(&chunk))
    }

    fn chunk(&self, choices: Value, usage: Option<Usage>) -> Bytes {
        let mut chunk = self.form.envelope(true);
        chunk["choices"] = choices;
        if self.include_usage {
            chunk["usage"] = usage.map_or(Value::Null, spelled);
        }
        event(&chunk)
    }
}

impl<F: Form> Voice for OpenAi<F> {
    fn begin(&mut self, n: usize, _usage: Usage) -> Vec<Bytes> {
        let openings = (0..n).filter_map(|index| self.form.opening(index));
        openings
            .map(|choice| self.chunk(json!([choice]), None))
            .collect()
    }

    fn piece(&mut self, index: usize, piece: &Piece, served: &Served) -> Vec<Bytes> {
        self.keep(piece, served);
        let choice = with_experts(self.form.piece(index, piece, served), piece);
        vec![self.chunk(json!([choice]), None)]
    }

    fn end(&mut self, usage: Usage) -> Vec<Bytes> {
        let done = Bytes::from_static(b"data: [DONE]\n\n");
        let usage = self
            .include_usage
            .then(|| self.chunk(json!([]), Some(usage)));
        [self.sglext(), usage, Some(done)]
            .into_iter()
            .flatten()
            .collect()
    }

    fn ping(&self) -> Bytes {
        Bytes::from_static(b": waiting\n\n")
    }

    fn failed(&self, error: &ApiError) -> Bytes {
        event(&error.json())
    }

    fn whole(&self, answers: &[Piece], usage: Usage, served: &Served) -> Value {
        let choices = answers.iter().enumerate();
        let choices: Vec<Value> = choices
            .map(|(index, piece)| with_experts(self.form.whole(index, piece, served), piece))
            .collect();
        let mut answer = self.form.envelope(false);
        answer["choices"] = choices.into();
        answer["usage"] = spelled(usage);
        let record = answers.first().and_then(|piece| piece.record.as_ref());
        if let Some(told) = record.and_then(|record| record.sglext(served.model.info().top_k)) {
            answer["sglext"] = told;
        }
        answer
    }
}

/// A choice, and what its experts did where that is wanted.
fn with_experts(mut choice: Value, piece: &Piece) -> Value {
    if let Some(told) = piece.record.as_ref().and_then(Record::json) {
        choice["cadre"] = told;
    }
    choice
}

fn spelled(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.n_prompt,
        "completion_tokens": usage.n_new,
        "total_tokens": usage.n_prompt + usage.n_new,
        "prompt_tokens_details": {"cached_tokens": usage.n_cached},
    })
}

/// A server-sent event.
fn event(data: &Value) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}
