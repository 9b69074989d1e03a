//! `/v1/chat/completions`: answers a conversation, through the model's chat template.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::choice::{Choice, End, Piece};
use super::error::{ApiError, Result};
use super::fields::{Fields, wrong};
use super::generation::{IGNORED, MOST_ALTERNATIVES, Wanted, room};
use super::log_probs;
use super::voice::{Form, OpenAi};
use super::{Prepared, format, identifier, tools};
use crate::schedule::Job;
use crate::served::{Conversation, Served, unix_seconds};

/// How an answer is spelled.
#[derive(Debug)]
pub(crate) struct Chat {
    id: String,
    created: u64,
    model: String,
    scores: bool,
}

/// Understands a request.
pub(crate) fn prepare(body: &[u8], served: &Served) -> Result<Prepared> {
    let mut fields = Fields::parse(body)?;
    let mut wanted = Wanted::read(&mut fields, served)?;
    let tools = tools::read(&mut fields)?;
    let mut conversation = Conversation {
        messages: messages(fields.need("messages")?)?,
        tools: tools.told,
        ..Conversation::default()
    };
    let scores = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0..=MOST_ALTERNATIVES)?;
    if top.is_some() && !scores {
        return Err(ApiError::field("top_logprobs", "goes only with `logprobs`"));
    }
    wanted.alternatives = scores.then(|| top.unwrap_or(0));
    let asked = asked(&mut fields)?;
    conversation.extra = template_variables(&mut fields)?;
    let schema = format::read(&mut fields, tools.forced)?;
    refuse_what_is_missing(&mut fields)?;
    fields.finish(IGNORED)?;
    let prompt: Arc<[u32]> = served.render(&conversation)?.into();
    let new = room(served, prompt.len(), asked, usize::MAX)?;
    let form = Chat {
        id: identifier("chatcmpl"),
        created: unix_seconds(),
        model: served.name().to_owned(),
        scores,
    };
    let indices = 0..wanted.n;
    let mut jobs: Vec<Job> = indices
        .clone()
        .map(|index| wanted.job(&prompt, index, new))
        .collect();
    format::hold(&mut jobs, schema.as_ref(), served)?;
    Ok(Prepared {
        jobs,
        choices: indices
            .map(|_| choice(&wanted, &conversation, served))
            .map(|choice| wanted.recording(choice, prompt.len()))
            .collect(),
        n_prompt: prompt.len(),
        streams: wanted.streams,
        voice: Box::new(OpenAi::new(form, wanted.include_usage)),
    })
}

/// An answer to a conversation, before it begins.
pub(crate) fn choice(wanted: &Wanted, conversation: &Conversation, served: &Served) -> Choice {
    let stream = served.tokenizer.stream().into_owned();
    let choice = Choice::new(stream, &wanted.stops, None);
    match conversation.tools {
        Some(_) => choice.calling(),
        None => choice,
    }
}

/// The newer name, or the older one.
fn asked(fields: &mut Fields) -> Result<Option<usize>> {
    let new = fields.count("max_completion_tokens", 0..=usize::MAX)?;
    let old = fields.count("max_tokens", 0..=usize::MAX)?;
    if new.is_some() && old.is_some() && new != old {
        let problem = "contradicts `max_completion_tokens`; send one of them";
        return Err(ApiError::field("max_tokens", problem));
    }
    Ok(new.or(old))
}

/// What the template may read beside the messages.
fn template_variables(fields: &mut Fields) -> Result<Map<String, Value>> {
    let mut extra = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong("chat_template_kwargs", "an object", &other)),
    };
    if let Some(effort) = fields.text("reasoning_effort")? {
        extra.insert("reasoning_effort".to_owned(), effort.into());
    }
    Ok(extra)
}

/// Fields that would change the answer and do nothing here.
fn refuse_what_is_missing(fields: &mut Fields) -> Result<()> {
    fields.refuse("functions", "send `tools`")?;
    fields.refuse("function_call", "send `tools`")?;
    fields.refuse("audio", "answers are text")?;
    fields.refuse("web_search_options", "nothing is looked up")?;
    match fields.take("modalities") {
        Some(modalities) if modalities != json!(["text"]) => {
            Err(ApiError::field("modalities", "can only be [\"text\"]"))
        }
        _ => Ok(()),
    }
}

/// The messages as templates read them: content is text.
pub(crate) fn messages(value: Value) -> Result<Value> {
    const NAME: &str = "messages";
    let Value::Array(items) = value else {
        return Err(wrong(NAME, "a list of messages", &value));
    };
    if items.is_empty() {
        return Err(ApiError::field(NAME, "is empty"));
    }
    let items = items.into_iter().enumerate();
    items
        .map(|(index, item)| message(&format!("{NAME}[{index}]"), item))
        .collect()
}

fn message(path: &str, value: Value) -> Result<Value> {
    let Value::Object(mut message) = value else {
        return Err(wrong(path, "an object", &value));
    };
    let role = message.get("role").and_then(Value::as_str);
    let role = role.unwrap_or_default().to_owned();
    match role.as_str() {
        // Templates know the older name.
        "developer" => {
            message.insert("role".to_owned(), "system".into());
        }
        "system" | "user" | "assistant" | "tool" => {}
        _ => {
            let problem = "is not one of system, developer, user, assistant, tool";
            return Err(ApiError::field(&format!("{path}.role"), problem));
        }
    }
    let at = format!("{path}.content");
    let content = match message.remove("content") {
        None | Some(Value::Null) if role == "assistant" && message.contains_key("tool_calls") => {
            String::new()
        }
        None | Some(Value::Null) => return Err(ApiError::field(&at, "is missing")),
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts_text(&at, parts)?,
        Some(other) => return Err(wrong(&at, "a string or a list of parts", &other)),
    };
    message.insert("content".to_owned(), content.into());
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        // Clients have arguments as text, templates write them out as JSON.
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(Ok(parsed)) = arguments.as_str().map(serde_json::from_str)
        {
            *arguments = parsed;
        }
    }
    Ok(Value::Object(message))
}

/// The text of a message in parts.
pub(crate) fn parts_text(path: &str, parts: Vec<Value>) -> Result<String> {
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let mut part = Fields::of(&path, part)?;
        match part.text("type")?.as_deref() {
            Some("text") => text += &part.text("text")?.unwrap_or_default(),
            _ => {
                let problem = "is not text, which is all that this model reads";
                return Err(ApiError::field(&path, problem));
            }
        }
    }
    Ok(text)
}

impl Chat {
    fn scores(&self, piece: &Piece, served: &Served) -> Option<Value> {
        self.scores
            .then(|| log_probs::objects(&piece.entries, &served.tokenizer))
    }
}

impl Form for Chat {
    fn envelope(&self, is_chunk: bool) -> Value {
        json!({
            "id": self.id,
            "object": if is_chunk { "chat.completion.chunk" } else { "chat.completion" },
            "created": self.created,
            "model": self.model,
        })
    }

    fn opening(&self, index: usize) -> Option<Value> {
        Some(json!({
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": null,
            "finish_reason": null,
        }))
    }

    fn piece(&self, index: usize, piece: &Piece, served: &Served) -> Value {
        let mut delta = match piece.text.is_empty() {
            true => json!({}),
            false => json!({"content": piece.text}),
        };
        if !piece.calls.is_empty() {
            delta["tool_calls"] = piece.calls.iter().map(|call| call.json(true)).collect();
        }
        json!({
            "index": index,
            "delta": delta,
            "logprobs": self.scores(piece, served),
            "finish_reason": piece.end.as_ref().map(End::openai),
        })
    }

    fn whole(&self, index: usize, piece: &Piece, served: &Served) -> Value {
        let mut message = json!({"role": "assistant", "content": piece.text, "refusal": null});
        if !piece.calls.is_empty() {
            message["tool_calls"] = piece.calls.iter().map(|call| call.json(false)).collect();
            if piece.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        json!({
            "index": index,
            "message": message,
            "logprobs": self.scores(piece, served),
            "finish_reason": piece.end.as_ref().map(End::openai),
        })
    }
}
