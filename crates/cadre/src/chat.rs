//! A conversation with a model: its messages, and the session that has read most of them already.

use anyhow::{Context, Result};
use cadre_checkpoint::{
    ChatSide, ChatTemplate, CheckpointError, DateTime, EncodeOptions, RenderInput, Tokenizer,
};
use cadre_engine::{Finish, GenerateOptions, KvFormats, SessionOptions};
use serde_json::{Map, Value, json};

use crate::cli::App;
use crate::contrast::{ContrastArgs, Sessions};
use crate::failure::Failure;
use crate::live::Live;
use crate::model::Loaded;
use crate::output::Out;

/// A conversation.
pub(crate) struct Chat<'a> {
    loaded: &'a Loaded,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    side: ChatSide,
    sessions: Sessions,
    /// The tokens in the session.
    held: Vec<u32>,
    options: GenerateOptions,
    /// What the conversation starts with.
    system: Option<String>,
    /// `{role, content}` each.
    messages: Vec<Value>,
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The model ended it, or it is as long as it may be.
    Done,
    /// Ctrl-C.
    Interrupted,
    /// The context is full.
    ContextFull,
}

/// What a conversation is made of, besides the model.
pub(crate) struct ChatOptions {
    /// System message.
    pub(crate) system: Option<String>,
    /// Tokens of context; `None` leaves it to the model.
    pub(crate) n_ctx: Option<usize>,
    /// How keys and values are stored.
    pub(crate) kv: KvFormats,
    /// Two choices of experts, if they are set against each other.
    pub(crate) contrast: ContrastArgs,
    /// Text of a chat template that replaces the one of the checkpoint, and the name of its file.
    pub(crate) template: Option<(String, String)>,
    /// How to generate; the tokens that end an answer are added here.
    pub(crate) generate: GenerateOptions,
}

impl<'a> Chat<'a> {
    /// Starts a conversation.
    pub(crate) fn new(loaded: &'a Loaded, options: ChatOptions) -> Result<Self> {
        let tokenizer = loaded.tokenizer()?;
        let side = loaded.checkpoint.chat(&tokenizer)?;
        let template = match &options.template {
            Some((text, file)) => ChatTemplate::parse(file, text)?,
            None => side
                .templates
                .choose(None, false)?
                .ok_or_else(|| no_template(loaded.checkpoint.origin()))?,
        };
        let session = SessionOptions {
            n_ctx: options.n_ctx,
            kv: options.kv,
            ..SessionOptions::default()
        };
        let sessions = Sessions::new(&*loaded.model, &session, &options.contrast)?;
        let mut generate = options.generate;
        let stops = side.stop_tokens.iter().map(|token| token.id);
        generate.stop_tokens.extend(stops);
        let mut chat = Self {
            loaded,
            tokenizer,
            template,
            side,
            sessions,
            held: Vec::new(),
            options: generate,
            system: options.system,
            messages: Vec::new(),
        };
        chat.clear();
        Ok(chat)
    }

    /// Forgets everything but the system message.
    pub(crate) fn clear(&mut self) {
        let system = self.system.iter();
        self.messages = system.map(|text| message("system", text)).collect();
    }

    /// The messages, oldest first.
    pub(crate) fn messages(&self) -> &[Value] {
        &self.messages
    }

    /// Tokens that the session holds, of how many that fit.
    pub(crate) fn room(&self) -> (usize, usize) {
        let session = self.sessions.first();
        (session.position(), session.n_ctx())
    }

    /// Asks, and shows the answer while it grows. A question without any answer is forgotten.
    pub(crate) fn ask(&mut self, app: &App, text: &str) -> Result<Ended> {
        self.messages.push(message("user", text));
        let answer = self.answer(app);
        // What the session has read is kept, whatever happened.
        self.held.truncate(self.sessions.first().position());
        match answer {
            Ok((text, ended)) if ended == Ended::Done || !text.is_empty() => {
                self.messages.push(message("assistant", &text));
                Ok(ended)
            }
            other => {
                self.messages.pop();
                other.map(|(_, ended)| ended)
            }
        }
    }

    fn answer(&mut self, app: &App) -> Result<(String, Ended)> {
        let prompt = self.prompt()?;
        if prompt.len() > self.sessions.first().n_ctx() {
            return Err(self.too_long(prompt.len()));
        }
        // The last token is always read again: its logits start the answer.
        let known = common(&self.held, &prompt).min(prompt.len() - 1);
        self.sessions.rewind(known);
        self.held.truncate(known);
        let news = &prompt[known..];
        tracing::debug!(known, new = news.len(), "prompt");

        let mut live = Live::new(&self.tokenizer, &[], app, Some(Out::new()), None);
        let model = &*self.loaded.model;
        let generated = self
            .sessions
            .generate(model, news, &self.options, &mut live);
        self.held.extend(news);
        let generated = generated.context("cannot answer")?;
        self.held.extend(&generated.tokens);
        let transcript = live.finish()?;
        let rates = transcript.clock.rates(news.len(), generated.tokens.len());
        tracing::info!("{rates}");
        let ended = match generated.finish {
            Finish::Stopped => Ended::Interrupted,
            Finish::ContextFull => Ended::ContextFull,
            Finish::Length | Finish::StopToken(_) => Ended::Done,
        };
        Ok((transcript.text, ended))
    }

    /// The token ids of the conversation, up to where the answer starts.
    fn prompt(&self) -> Result<Vec<u32>> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seconds = since.map_or(0, |since| since.as_secs());
        let text = self.template.render(&RenderInput {
            messages: &Value::Array(self.messages.clone()),
            tools: None,
            add_generation_prompt: true,
            extra: &Map::new(),
            bos_token: self.side.bos_token.as_deref(),
            eos_token: self.side.eos_token.as_deref(),
            now: DateTime::from_unix(i64::try_from(seconds).unwrap_or(i64::MAX)),
        });
        let text = text.map_err(|error| match &error {
            CheckpointError::ChatRefused { .. } if self.system.is_some() => {
                let hint = "some models take no system message; leave out --system";
                anyhow::Error::from(Failure::new(error.to_string()).hint(hint))
            }
            _ => error.into(),
        })?;
        let ids = self.tokenizer.encode_with(&text, EncodeOptions::RENDERED)?;
        if ids.is_empty() {
            return Err(Failure::new("the chat template makes no text of the messages").into());
        }
        Ok(ids)
    }

    fn too_long(&self, n_tokens: usize) -> anyhow::Error {
        let (_, n_ctx) = self.room();
        let limit = self.loaded.model.info().max_context;
        let message =
            format!("the conversation has {n_tokens} tokens, but the context holds {n_ctx}");
        let hint = if n_ctx < limit {
            format!("start with -c {limit}, the limit of the model, or begin anew with /clear")
        } else {
            "begin anew with /clear".to_owned()
        };
        Failure::new(message).hint(hint).into()
    }
}

fn message(role: &str, text: &str) -> Value {
    json!({"role": role, "content": text})
}

fn no_template(origin: &str) -> Failure {
    Failure::new(format!(
        "{origin} has no chat template, so it was hardly tuned for conversations"
    ))
    .hint("continue text with `cadre run -p`, or pass --chat-template-file")
}

/// Length of the common beginning.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_are_compared() {
        assert_eq!(common(&[1, 2, 3], &[1, 2, 4, 5]), 2);
        assert_eq!(common(&[], &[1]), 0);
        assert_eq!(common(&[1, 2], &[1, 2]), 2);
    }
}
