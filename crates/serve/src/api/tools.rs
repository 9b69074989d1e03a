//! Tools: what of an answer is a call of one.
//!
//! Models write calls as their templates taught them. Understood are JSON objects between `<tool_call>` marks (Hermes, Qwen), the
//! forms with a tag per argument inside of the same marks (Qwen3-Coder, GLM-4.5), and answers that are nothing but such
//! objects, alone or in a list (Llama 3, Mistral). What looks like a call and is none stays text.

use serde_json::{Map, Value, json};

use super::error::{ApiError, Result};
use super::fields::{Fields, wrong};
use super::identifier;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Tools of a request.
const MOST_TOOLS: usize = 128;

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ToolCall {
    /// Which one of its answer, from 0.
    index: usize,
    id: String,
    name: String,
    /// A JSON object, as text.
    arguments: String,
}

impl ToolCall {
    /// As OpenAI's interface has it; in streams with its index.
    pub(crate) fn json(&self, in_stream: bool) -> Value {
        let mut call = json!({
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        });
        if in_stream {
            call["index"] = self.index.into();
        }
        call
    }
}

impl ToolCall {
    /// As a block of Anthropic's interface.
    pub(crate) fn block(&self) -> Value {
        let input = serde_json::from_str(&self.arguments).unwrap_or_else(|_| json!({}));
        json!({"type": "tool_use", "id": self.id, "name": self.name, "input": input})
    }
}

/// What a request says of tools.
#[derive(Debug, Default)]
pub(crate) struct Tools {
    /// Those that the model is told of, if any.
    pub(crate) told: Option<Value>,
    /// The schema of a call, where the answer has to be one.
    pub(crate) forced: Option<Value>,
}

/// Reads `tools` and `tool_choice`.
pub(crate) fn read(fields: &mut Fields) -> Result<Tools> {
    let tools = match fields.take("tools") {
        None => Vec::new(),
        Some(Value::Array(tools)) => tools,
        Some(other) => return Err(wrong("tools", "a list of tools", &other)),
    };
    fields.bool("parallel_tool_calls")?;
    if tools.len() > MOST_TOOLS {
        let problem = format!("has {} tools, at most {MOST_TOOLS}", tools.len());
        return Err(ApiError::field("tools", problem));
    }
    for (index, tool) in tools.iter().enumerate() {
        if tool["type"] != "function" || name_of(tool).is_empty() {
            let problem = "is no function with a name";
            return Err(ApiError::field(&format!("tools[{index}]"), problem));
        }
    }
    let forced = match fields.take("tool_choice") {
        None => None,
        Some(choice) if choice == "auto" => None,
        Some(choice) if choice == "none" => return Ok(Tools::default()),
        Some(choice) if choice == "required" => Some(calls(tools.iter())),
        Some(choice) => {
            let name = choice["function"]["name"].as_str().unwrap_or_default();
            Some(calls(tools.iter().filter(|tool| name_of(tool) == name)))
        }
    };
    if forced == Some(calls([].iter())) {
        let problem = "asks for a call of a tool that is not among `tools`";
        return Err(ApiError::field("tool_choice", problem));
    }
    Ok(Tools {
        told: (!tools.is_empty()).then_some(Value::Array(tools)),
        forced,
    })
}

fn name_of(tool: &Value) -> &str {
    tool["function"]["name"].as_str().unwrap_or_default()
}

/// The schema of a call of one of the tools.
fn calls<'a>(tools: impl Iterator<Item = &'a Value>) -> Value {
    let call = |tool: &Value| {
        let parameters = match &tool["function"]["parameters"] {
            Value::Null => json!({"type": "object"}),
            parameters => parameters.clone(),
        };
        json!({
            "type": "object",
            "properties": {"name": {"const": name_of(tool)}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": false,
        })
    };
    json!({"anyOf": tools.map(call).collect::<Vec<_>>()})
}

/// Finds calls in an answer as it grows. Text that may be the start of one is held back.
#[derive(Debug, Default)]
pub(crate) struct ToolParser {
    held: String,
    /// Whether anything but white space was told.
    has_text: bool,
    n_calls: usize,
}

impl ToolParser {
    /// Takes text; gives the text that is no call, and the calls.
    pub(crate) fn push(&mut self, text: &str) -> (String, Vec<ToolCall>) {
        self.held += text;
        let mut calls = Vec::new();
        let mut told = String::new();
        while let Some(open) = self.held.find(OPEN) {
            let Some(close) = self.held[open..].find(CLOSE) else {
                break;
            };
            let end = open + close + CLOSE.len();
            let inner = self.held[open + OPEN.len()..open + close].trim();
            let found = tagged(inner);
            told += match found {
                Some(_) => &self.held[..open],
                None => &self.held[..end],
            };
            calls.extend(found.map(|call| self.number(call)));
            self.held.drain(..end);
        }
        let keep = self.kept();
        let rest = self.held.split_off(self.held.len() - keep);
        told += &std::mem::replace(&mut self.held, rest);
        self.has_text |= !told.trim().is_empty();
        (told, calls)
    }

    /// What is left at the end of the answer.
    pub(crate) fn finish(&mut self) -> (String, Vec<ToolCall>) {
        let held = std::mem::take(&mut self.held);
        let found = match self.has_text || self.n_calls > 0 {
            true => Vec::new(),
            false => bare(held.trim()).unwrap_or_default(),
        };
        match found.is_empty() {
            true => (held, Vec::new()),
            false => {
                let calls = found.into_iter().map(|call| self.number(call)).collect();
                (String::new(), calls)
            }
        }
    }

    /// Whether any call was found.
    pub(crate) fn has_called(&self) -> bool {
        self.n_calls > 0
    }

    /// Bytes at the end of what is held that may belong to a call.
    fn kept(&self) -> usize {
        let held = &self.held;
        if let Some(open) = held.find(OPEN) {
            return held.len() - open;
        }
        let is_bare = !self.has_text && self.n_calls == 0;
        if is_bare && held.trim_start().starts_with(['{', '[']) {
            return held.len();
        }
        // White space after a call is not worth telling.
        if self.n_calls > 0 && held.trim().is_empty() {
            return held.len();
        }
        let starts = (0..=held.len()).filter(|at| held.is_char_boundary(*at));
        let mut ends = starts.map(|at| &held[at..]);
        ends.find(|end| OPEN.starts_with(end)).map_or(0, str::len)
    }

    fn number(&mut self, (name, arguments): (String, Value)) -> ToolCall {
        let index = self.n_calls;
        self.n_calls += 1;
        ToolCall {
            index,
            id: identifier("call"),
            name,
            arguments: arguments.to_string(),
        }
    }
}

/// The call between two marks.
fn tagged(inner: &str) -> Option<(String, Value)> {
    match serde_json::from_str(inner) {
        Ok(value) => object(value),
        Err(_) => by_parameters(inner).or_else(|| by_keys(inner)),
    }
}

/// An answer that is nothing but calls.
fn bare(text: &str) -> Option<Vec<(String, Value)>> {
    match serde_json::from_str(text).ok()? {
        Value::Array(items) => items.into_iter().map(object).collect(),
        value => object(value).map(|call| vec![call]),
    }
}

/// `{"name": .., "arguments": {..}}`; Llama says `parameters`.
fn object(value: Value) -> Option<(String, Value)> {
    let Value::Object(mut map) = value else {
        return None;
    };
    let name = map.get("name")?.as_str()?.to_owned();
    let arguments = map
        .remove("arguments")
        .or_else(|| map.remove("parameters"))?;
    let arguments = match arguments {
        Value::String(text) => serde_json::from_str(&text).ok()?,
        other => other,
    };
    (arguments.is_object() && !name.is_empty()).then_some((name, arguments))
}

/// `<function=NAME><parameter=KEY>VALUE</parameter>...</function>`.
fn by_parameters(inner: &str) -> Option<(String, Value)> {
    let rest = inner.strip_prefix("<function=")?;
    let (name, mut rest) = rest.split_once('>')?;
    let mut arguments = Map::new();
    while let Some((_, after)) = rest.split_once("<parameter=") {
        let (key, after) = after.split_once('>')?;
        let (value, after) = after.split_once("</parameter>")?;
        arguments.insert(key.trim().to_owned(), plain(value));
        rest = after;
    }
    Some((name.trim().to_owned(), arguments.into()))
}

/// `NAME`, then `<arg_key>KEY</arg_key>` and `<arg_value>VALUE</arg_value>` in turn.
fn by_keys(inner: &str) -> Option<(String, Value)> {
    const KEY: &str = "<arg_key>";
    let (name, mut rest) = inner.split_at(inner.find(KEY).unwrap_or(inner.len()));
    let name = name.trim();
    let is_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || !name.chars().all(is_name) {
        return None;
    }
    let mut arguments = Map::new();
    while let Some((_, after)) = rest.split_once(KEY) {
        let (key, after) = after.split_once("</arg_key>")?;
        let (_, after) = after.split_once("<arg_value>")?;
        let (value, after) = after.split_once("</arg_value>")?;
        arguments.insert(key.trim().to_owned(), plain(value));
        rest = after;
    }
    Some((name.to_owned(), arguments.into()))
}

/// A value that is written as it is: JSON where it is JSON, else text.
fn plain(text: &str) -> Value {
    let text = text.strip_prefix('\n').unwrap_or(text);
    let text = text.strip_suffix('\n').unwrap_or(text);
    serde_json::from_str(text).unwrap_or_else(|_| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text and calls of an answer that comes in pieces of `n` characters.
    fn parsed(answer: &str, n: usize) -> (String, Vec<(usize, String, String)>) {
        let mut parser = ToolParser::default();
        let (mut text, mut calls) = (String::new(), Vec::new());
        let chars: Vec<char> = answer.chars().collect();
        for piece in chars.chunks(n) {
            let (more, found) = parser.push(&piece.iter().collect::<String>());
            text += &more;
            calls.extend(found);
        }
        let (more, found) = parser.finish();
        text += &more;
        calls.extend(found);
        assert_eq!(parser.has_called(), !calls.is_empty());
        let calls = calls
            .into_iter()
            .map(|call| (call.index, call.name, call.arguments));
        (text, calls.collect())
    }

    #[track_caller]
    fn check(answer: &str, text: &str, calls: &[(&str, &str)]) {
        let calls: Vec<_> = calls
            .iter()
            .enumerate()
            .map(|(index, (name, arguments))| (index, (*name).to_owned(), (*arguments).to_owned()))
            .collect();
        for n in [1, 2, 7, 1000] {
            let (said, found) = parsed(answer, n);
            assert_eq!((said.trim_end(), &found), (text, &calls), "pieces of {n}");
        }
    }

    #[test]
    fn every_form_is_understood() {
        let call = r#"{"name": "add", "arguments": {"a": 1, "b": [2]}}"#;
        let one = ("add", r#"{"a":1,"b":[2]}"#);
        check(
            &format!("I add. <tool_call>\n{call}\n</tool_call>"),
            "I add.",
            &[one],
        );
        check(
            &format!("<tool_call>{call}</tool_call>\n<tool_call>{call}</tool_call>"),
            "",
            &[one, one],
        );
        check(call, "", &[one]);
        check(&format!(" [{call}, {call}]"), "", &[one, one]);
        check(r#"{"name": "now", "parameters": {}}"#, "", &[("now", "{}")]);
        let coder = "<tool_call>\n<function=read>\n<parameter=path>\n/a b\n</parameter>\n<parameter=n>\n3\n</parameter>\n\
            </function>\n</tool_call>";
        check(coder, "", &[("read", r#"{"path":"/a b","n":3}"#)]);
        let glm =
            "<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>/a</arg_value>\n</tool_call>";
        check(glm, "", &[("read", r#"{"path":"/a"}"#)]);
    }

    #[test]
    fn what_only_looks_like_a_call_is_text() {
        for text in [
            "a < b and a <tool",
            "<tool_call>{not json}</tool_call>",
            "<tool_call>{\"name\": \"x\"}",
            "[1, 2]",
            "{\"name\": \"x\"}",
            "see {\"name\": \"x\", \"arguments\": {}}",
            "\u{fc}",
        ] {
            check(text, text, &[]);
        }
    }
}
