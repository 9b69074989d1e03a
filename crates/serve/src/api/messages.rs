//! `/v1/messages`: conversations in the words of Anthropic's interface.
//!
//! A request is turned into the conversation that `/v1/chat/completions` would make of the same, so that both get the same
//! answer; what differs is how it is told.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::choice::{End, Piece};
use super::error::{ApiError, Result};
use super::fields::{Fields, wrong};
use super::generation::{Wanted, room};
use super::tools::{self, ToolCall, Tools};
use super::voice::{Usage, Voice};
use super::{Prepared, chat, format, identifier};
use crate::served::{Conversation, Served};

/// Fields that change nothing here.
const IGNORED: &[&str] = &["metadata", "service_tier", "cache_control"];

/// Understands a request.
pub(crate) fn prepare(body: &[u8], served: &Served) -> Result<Prepared> {
    let mut fields = Fields::parse(body)?;
    let asked = fields.need("max_tokens")?;
    fields.put("max_tokens", asked);
    let asked = fields.count("max_tokens", 1..=usize::MAX)?;
    if let Some(stops) = fields.take("stop_sequences") {
        fields.put("stop", stops);
    }
    let tools = tools_of(&mut fields)?;
    let conversation = conversation(&mut fields, tools.told)?;
    // Whether the answer is streamed, and how it is drawn, is said alike.
    let wanted = Wanted::read(&mut fields, served)?;
    if let Some(mut thinking) = fields.object("thinking")?
        && thinking.text("type")?.as_deref() != Some("disabled")
    {
        let problem = "can only be disabled: templates decide whether a model thinks";
        return Err(ApiError::field("thinking", problem));
    }
    if wanted.experts.told.is_some() {
        let problem = "asks for the experts of tokens, which this interface has no words for";
        return Err(ApiError::field("cadre", problem).code("unsupported_parameter"));
    }
    fields.finish(IGNORED)?;
    let prompt: std::sync::Arc<[u32]> = served.render(&conversation)?.into();
    let new = room(served, prompt.len(), asked, 0)?;
    let mut jobs = vec![wanted.job(&prompt, 0, new)];
    format::hold(&mut jobs, tools.forced.as_ref(), served)?;
    Ok(Prepared {
        jobs,
        choices: vec![chat::choice(&wanted, &conversation, served)],
        n_prompt: prompt.len(),
        streams: wanted.streams,
        voice: Box::new(Message {
            id: identifier("msg"),
            model: served.name().to_owned(),
            block: None,
            n_blocks: 0,
            end: None,
        }),
    })
}

/// System text, messages and tools, as templates read them.
fn conversation(fields: &mut Fields, tools: Option<Value>) -> Result<Conversation> {
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        let text = text("system", system)?;
        messages.push(json!({"role": "system", "content": text}));
    }
    let Value::Array(items) = fields.need("messages")? else {
        return Err(ApiError::field("messages", "is not a list"));
    };
    if items.is_empty() {
        return Err(ApiError::field("messages", "is empty"));
    }
    for (index, item) in items.into_iter().enumerate() {
        message(&format!("messages[{index}]"), item, &mut messages)?;
    }
    Ok(Conversation {
        messages: messages.into(),
        tools,
        ..Conversation::default()
    })
}

/// Adds a message: one, or one for each result of a tool and one for the text.
fn message(path: &str, item: Value, messages: &mut Vec<Value>) -> Result<()> {
    let mut item = Fields::of(path, item)?;
    let role = item.text("role")?.unwrap_or_default();
    if role != "user" && role != "assistant" {
        return Err(ApiError::field(
            &format!("{path}.role"),
            "is neither user nor assistant",
        ));
    }
    let content = item.need("content")?;
    item.finish(&[])?;
    let Value::Array(blocks) = content else {
        let text = text(&format!("{path}.content"), content)?;
        messages.push(json!({"role": role, "content": text}));
        return Ok(());
    };
    let (mut said, mut calls) = (String::new(), Vec::new());
    for (index, block) in blocks.into_iter().enumerate() {
        let path = format!("{path}.content[{index}]");
        let mut block = Fields::of(&path, block)?;
        match block.text("type")?.as_deref() {
            Some("text") => said += &block.text("text")?.unwrap_or_default(),
            Some("tool_use") if role == "assistant" => calls.push(json!({
                "id": block.take("id"),
                "type": "function",
                "function": {"name": block.need("name")?, "arguments": block.need("input")?},
            })),
            Some("tool_result") if role == "user" => {
                let content = block.take("content").unwrap_or_else(|| "".into());
                let text = text(&format!("{path}.content"), content)?;
                let id = block.take("tool_use_id");
                messages.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
            }
            // What a model thought is not told to it again.
            Some("thinking" | "redacted_thinking") if role == "assistant" => {}
            _ => {
                let problem = "is of no type that this model reads";
                return Err(ApiError::field(&path, problem));
            }
        }
    }
    if calls.is_empty() {
        if !said.is_empty() {
            messages.push(json!({"role": role, "content": said}));
        }
    } else {
        messages.push(json!({"role": role, "content": said, "tool_calls": calls}));
    }
    Ok(())
}

/// A text, or blocks of text.
fn text(path: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Array(blocks) => chat::parts_text(path, blocks),
        other => Err(wrong(path, "a string or a list of blocks", &other)),
    }
}

/// Tools in OpenAI's form.
fn tools_of(fields: &mut Fields) -> Result<Tools> {
    if let Some(choice) = fields.take("tool_choice") {
        let choice = match choice["type"].as_str() {
            Some(kind @ ("auto" | "none")) => kind.into(),
            Some("any") => "required".into(),
            _ => json!({"function": {"name": choice["name"]}}),
        };
        fields.put("tool_choice", choice);
    }
    let Some(value) = fields.take("tools") else {
        return tools::read(fields);
    };
    let Value::Array(items) = value else {
        return Err(wrong("tools", "a list of tools", &value));
    };
    let tool = |item: Value| {
        let mut function = Map::new();
        for (from, to) in [
            ("name", "name"),
            ("description", "description"),
            ("input_schema", "parameters"),
        ] {
            if let Some(value) = item.get(from) {
                function.insert(to.to_owned(), value.clone());
            }
        }
        json!({"type": "function", "function": function})
    };
    fields.put("tools", items.into_iter().map(tool).collect());
    tools::read(fields)
}

/// What is open in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TextBlock(usize);

/// Anthropic's words.
struct Message {
    id: String,
    model: String,
    /// The block of text that grows.
    block: Option<TextBlock>,
    n_blocks: usize,
    end: Option<End>,
}

impl Message {
    fn envelope(&self, content: &[Value], end: Option<&End>, usage: Usage) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": end.map(reason),
            "stop_sequence": end.and_then(stop_sequence),
            "usage": spelled(usage),
        })
    }

    fn close(&mut self, events: &mut Vec<Bytes>) {
        if let Some(TextBlock(index)) = self.block.take() {
            events.push(event(json!({"type": "content_block_stop", "index": index})));
        }
    }

    fn open(&mut self, block: Value, events: &mut Vec<Bytes>) -> usize {
        let index = self.n_blocks;
        self.n_blocks += 1;
        let start = json!({"type": "content_block_start", "index": index, "content_block": block});
        events.push(event(start));
        index
    }
}

impl Voice for Message {
    fn begin(&mut self, _n: usize, usage: Usage) -> Vec<Bytes> {
        let message = self.envelope(&[], None, usage);
        vec![event(json!({"type": "message_start", "message": message}))]
    }

    fn piece(&mut self, _index: usize, piece: &Piece, _served: &Served) -> Vec<Bytes> {
        let mut events = Vec::new();
        if !piece.text.is_empty() {
            let TextBlock(index) = match self.block {
                Some(block) => block,
                None => TextBlock(self.open(json!({"type": "text", "text": ""}), &mut events)),
            };
            self.block = Some(TextBlock(index));
            let delta = json!({"type": "text_delta", "text": piece.text});
            events.push(event(
                json!({"type": "content_block_delta", "index": index, "delta": delta}),
            ));
        }
        for call in &piece.calls {
            self.close(&mut events);
            let mut block = call.block();
            let input = std::mem::replace(&mut block["input"], json!({}));
            let index = self.open(block, &mut events);
            let delta = json!({"type": "input_json_delta", "partial_json": input.to_string()});
            events.push(event(
                json!({"type": "content_block_delta", "index": index, "delta": delta}),
            ));
            events.push(event(json!({"type": "content_block_stop", "index": index})));
        }
        if let Some(end) = &piece.end {
            self.close(&mut events);
            self.end = Some(end.clone());
        }
        events
    }

    fn end(&mut self, usage: Usage) -> Vec<Bytes> {
        let end = self.end.as_ref();
        let delta = json!({
            "stop_reason": end.map(reason),
            "stop_sequence": end.and_then(stop_sequence),
        });
        let delta = json!({"type": "message_delta", "delta": delta, "usage": spelled(usage)});
        vec![event(delta), event(json!({"type": "message_stop"}))]
    }

    fn ping(&self) -> Bytes {
        event(json!({"type": "ping"}))
    }

    fn failed(&self, error: &ApiError) -> Bytes {
        event(error.anthropic())
    }

    fn whole(&self, answers: &[Piece], usage: Usage, _served: &Served) -> Value {
        let mut content = Vec::new();
        let mut end = None;
        for answer in answers {
            if !answer.text.is_empty() {
                content.push(json!({"type": "text", "text": answer.text}));
            }
            content.extend(answer.calls.iter().map(ToolCall::block));
            end = answer.end.as_ref();
        }
        self.envelope(&content, end, usage)
    }
}

fn reason(end: &End) -> &'static str {
    match end {
        End::Token => "end_turn",
        End::Text(_) => "stop_sequence",
        End::Length => "max_tokens",
        End::Calls => "tool_use",
    }
}

fn stop_sequence(end: &End) -> Option<&str> {
    match end {
        End::Text(stop) => Some(stop),
        _ => None,
    }
}

fn spelled(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.n_prompt - usage.n_cached,
        "cache_read_input_tokens": usage.n_cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.n_new,
    })
}

/// A server-sent event, which has the name of its type.
fn event(data: Value) -> Bytes {
    let name = data["type"].as_str().unwrap_or_default();
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}
