//! One chat template: parsing and rendering it as transformers does.
//!
//! Beyond plain Jinja, transformers (`utils/chat_template_utils.py`) sets `trim_blocks` and
//! `lstrip_blocks`, adds loop controls, `raise_exception`, `strftime_now` and its own `tojson`,
//! passes absent tools and documents as `none`, gives the reasoning of a message all names that
//! templates use for it, and lets `{% generation %}` blocks through.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::Map;

use crate::error::{CheckpointError, Result};
use crate::text::chat::{DateTime, python_json, python_methods};

/// A parsed chat template. Clones share it.
#[derive(Clone)]
pub struct ChatTemplate {
    origin: Arc<str>,
    environment: Arc<Environment<'static>>,
}

/// What a chat template sees.
#[derive(Clone, Copy, Debug)]
pub struct RenderInput<'a> {
    /// List of messages: objects with `role`, `content` and whatever else the template reads.
    pub messages: &'a serde_json::Value,
    /// List of tools as JSON schemas; `None` is `none` in the template, as in transformers.
    pub tools: Option<&'a serde_json::Value>,
    /// Whether the text ends where the model's answer starts.
    pub add_generation_prompt: bool,
    /// Further variables (`chat_template_kwargs` of servers), such as `enable_thinking`.
    pub extra: &'a Map<String, serde_json::Value>,
    /// Spelling of the token that starts a text.
    pub bos_token: Option<&'a str>,
    /// Spelling of the token that ends a text.
    pub eos_token: Option<&'a str>,
    /// What `strftime_now` tells.
    pub now: DateTime,
}

/// The message of `raise_exception`, to tell a template's refusal from its failure.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

const NAME: &str = "chat_template";
/// Instructions that a template may execute; a runaway loop ends here instead of never.
const FUEL: u64 = 20_000_000;
/// Names for the reasoning of a message; the first that is set counts.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Its text.
    #[must_use]
    pub fn source(&self) -> String {
        let template = self.environment.get_template(NAME);
        template.map_or_else(|_| String::new(), |template| template.source().to_owned())
    }

    /// Parses the text of a template; `origin` names it in errors.
    ///
    /// # Errors
    /// The template is not valid Jinja; the error names its line.
    pub fn parse(origin: &str, source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| failure(origin, &error))?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(python_methods::call);
        environment.set_fuel(Some(FUEL));
        environment.set_debug(true);
        environment.add_filter(
            "tojson",
            |value: &Value, options: minijinja::value::Kwargs| python_json::tojson(value, options),
        );
        environment.add_test("iterable", is_iterable);
        environment.add_filter("indent", python_methods::indent);
        environment.add_function(
            "raise_exception",
            |message: Value| -> Result<Value, Error> {
                let refusal = Refusal(message.to_string());
                Err(Error::new(ErrorKind::InvalidOperation, message.to_string())
                    .with_source(refusal))
            },
        );
        environment
            .add_template_owned(NAME, without_generation_tags(&unix_lines(source)))
            .map_err(|error| failure(origin, &error))?;
        Ok(Self {
            origin: origin.into(),
            environment: Arc::new(environment),
        })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`CheckpointError::ChatRefused`] when the template itself refuses the conversation (say,
    /// roles in an order it does not know), [`CheckpointError::ChatTemplate`] when it fails.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String> {
        let mut variables: Vec<(String, Value)> = Vec::new();
        let mut set = |name: &str, value: Value| variables.push((name.to_owned(), value));
        for (name, token) in [
            ("bos_token", input.bos_token),
            ("eos_token", input.eos_token),
        ] {
            if let Some(token) = token {
                set(name, Value::from(token));
            }
        }
        set("documents", Value::from(()));
        for (name, value) in input.extra {
            set(name, Value::from(Serde(value)));
        }
        set(
            "messages",
            Value::from(Serde(with_reasoning(input.messages))),
        );
        set(
            "tools",
            input
                .tools
                .map_or(Value::from(()), |tools| Value::from(Serde(tools))),
        );
        set(
            "add_generation_prompt",
            Value::from(input.add_generation_prompt),
        );
        let now = input.now;
        let strftime = move |format: &str| {
            now.strftime(format)
                .map_err(|problem| Error::new(ErrorKind::InvalidOperation, problem))
        };
        set("strftime_now", Value::from_function(strftime));
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(Value::from_pairs(variables)))
            .map_err(|error| failure(&self.origin, &error))
    }
}

/// Jinja's `iterable`: what is undefined is an empty list, but `none` is nothing.
fn is_iterable(value: &Value) -> bool {
    value.is_undefined() || (!value.is_none() && value.try_iter().is_ok())
}

/// Line ends as Jinja sees them.
fn unix_lines(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

/// `{% generation %}` marks what an assistant says, for training; here it is a block that is
/// always taken. Marks for white space stay as they are.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        text.push_str(before);
        let Some(end) = tag.find("%}") else {
            return text + tag;
        };
        let inner = &tag[..end];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => text.push_str(&inner.replace(word, "if true")),
            "endgeneration" => text.push_str(&inner.replace(word, "endif")),
            _ => text.push_str(inner),
        }
        rest = &tag[end..];
    }
    text + rest
}

/// Messages with their reasoning under `reasoning_content` and `thinking`, whatever name it came
/// with.
fn with_reasoning(messages: &serde_json::Value) -> serde_json::Value {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().into_iter().flatten() {
        let Some(fields) = message.as_object_mut() else {
            continue;
        };
        let reasoning = REASONING
            .iter()
            .find_map(|name| fields.get(*name).filter(|v| !v.is_null()));
        if let Some(reasoning) = reasoning.cloned() {
            if !fields.contains_key("thinking") {
                fields.shift_insert(0, "thinking".to_owned(), reasoning.clone());
            }
            fields.insert("reasoning_content".to_owned(), reasoning);
        }
    }
    messages
}

fn failure(origin: &str, error: &Error) -> CheckpointError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(here) = cause {
        if let Some(Refusal(message)) = here.downcast_ref() {
            return CheckpointError::ChatRefused {
                origin: origin.to_owned(),
                line: error.line().unwrap_or(0),
                message: message.clone(),
            };
        }
        cause = here.source();
    }
    let detail = error.detail().map(|detail| format!(": {detail}"));
    CheckpointError::ChatTemplate {
        origin: origin.to_owned(),
        line: error.line().unwrap_or(0),
        problem: format!("{}{}", error.kind(), detail.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: serde_json::Value) -> Result<String> {
        let extra = Map::from_iter([("flag".to_owned(), json!(true))]);
        ChatTemplate::parse("t", source)?.render(&RenderInput {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            extra: &extra,
            bos_token: Some("<s>"),
            eos_token: None,
            now: DateTime::from_unix(0),
        })
    }

    #[test]
    fn blocks_lose_their_lines_and_values_look_as_in_python() {
        let source = "{{ bos_token }}\r\n{% for m in messages %}\n  {% if m.role == 'user' %}\n\
            [{{ m.content }}]\n  {% endif %}\n{% endfor %}{{ flag }} {{ none }} {{ tools is none }} \
            {{ eos_token is defined }} {{ {'a': [1, true]} }} {{ strftime_now('%Y') }}\n";
        let messages = json!([{"role": "user", "content": "hi <b>"}, {"role": "x", "content": ""}]);
        assert_eq!(
            render(source, messages).unwrap(),
            "<s>\n[hi <b>]\nTrue None True False {'a': [1, True]} 1970"
        );
    }

    #[test]
    fn generation_tags_are_let_through_and_loops_can_stop() {
        let source = "{% for m in messages %}{%- generation -%} a {% endgeneration %}\
            {% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}";
        assert_eq!(render(source, json!([1, 2, 3])).unwrap(), "a 1a ");
    }

    #[test]
    fn order_of_keys_is_kept_and_reasoning_gets_its_names() {
        let messages = json!([{"role": "a", "reasoning": "why", "z": 1, "b": 2}]);
        assert_eq!(
            render("{{ messages[0] | tojson }}", messages).unwrap(),
            "{\"thinking\": \"why\", \"role\": \"a\", \"reasoning\": \"why\", \"z\": 1, \"b\": 2, \
             \"reasoning_content\": \"why\"}"
        );
    }

    #[test]
    fn refusals_and_failures_name_the_line() {
        let error = render(
            "\n\n{{ raise_exception('Roles must alternate') }}",
            json!([]),
        );
        let error = error.unwrap_err();
        assert!(
            matches!(error, CheckpointError::ChatRefused { line: 3, .. }),
            "{error}"
        );
        assert!(
            error.to_string().contains("Roles must alternate"),
            "{error}"
        );
        let error = render("\n{{ messages.x.y }}", json!([])).unwrap_err();
        assert!(
            matches!(error, CheckpointError::ChatTemplate { line: 2, .. }),
            "{error}"
        );
        let error = render("a\n{% frob %}", json!([])).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }

    #[test]
    fn a_runaway_template_ends() {
        let loops = "{% for a in range(10000) %}".repeat(4) + &"{% endfor %}".repeat(4);
        let error = render(&loops, json!([])).unwrap_err();
        assert!(error.to_string().contains("fuel"), "{error}");
    }
}
