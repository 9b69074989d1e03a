//! Where the chat templates of a checkpoint are, and which one a conversation takes.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{CheckpointError, Result};
use crate::text::chat::ChatTemplate;

/// The chat templates of a checkpoint by name; the usual one is `default`. They are parsed when
/// one is chosen, so a broken template does not keep a model from running.
#[derive(Clone, Debug, Default)]
pub struct ChatTemplates {
    /// Name of the template to where it is from and its text.
    sources: BTreeMap<String, (String, String)>,
}

/// The files of a Hugging Face folder that hold chat templates.
#[derive(Clone, Copy, Debug)]
pub struct ChatFiles<'a> {
    /// Folder, or name of the embedded checkpoint.
    pub origin: &'a str,
    /// `tokenizer_config.json`, or null.
    pub tokenizer_config: &'a Value,
    /// Text of `chat_template.jinja`.
    pub jinja: Option<&'a str>,
    /// Name (without `.jinja`) and text of the files in `additional_chat_templates/`.
    pub additional: &'a [(String, String)],
}

const DEFAULT: &str = "default";
const GGUF_KEY: &str = "tokenizer.chat_template";

impl ChatTemplates {
    /// Collects the templates of a Hugging Face folder. Files of their own replace everything in
    /// `tokenizer_config.json`, as in transformers.
    ///
    /// # Errors
    /// `chat_template` in `tokenizer_config.json` is neither text nor a list of named texts.
    pub fn from_files(files: &ChatFiles<'_>) -> Result<Self> {
        let mut templates = Self::default();
        if let Some(jinja) = files.jinja {
            templates.add(DEFAULT, files.origin, "chat_template.jinja", jinja);
        }
        for (name, text) in files.additional {
            let file = format!("additional_chat_templates/{name}.jinja");
            templates.add(name, files.origin, &file, text);
        }
        if templates.sources.is_empty() {
            templates.add_config(files.origin, &files.tokenizer_config["chat_template"])?;
        }
        Ok(templates)
    }

    fn add_config(&mut self, origin: &str, value: &Value) -> Result<()> {
        let file = "tokenizer_config.json";
        match value {
            Value::Null => {}
            Value::String(text) => self.add(DEFAULT, origin, file, text),
            other => {
                let named = other.as_array().into_iter().flatten();
                let pairs: Option<Vec<_>> = named
                    .map(|item| Some((item["name"].as_str()?, item["template"].as_str()?)))
                    .collect();
                let Some(pairs) = pairs.filter(|pairs| !pairs.is_empty()) else {
                    return Err(CheckpointError::Key {
                        file: format!("{origin}/{file}"),
                        key: "chat_template".to_owned(),
                        problem: "is neither text nor a list of objects with `name` and `template`"
                            .to_owned(),
                    });
                };
                for (name, text) in pairs {
                    self.add(name, origin, &format!("{file} ({name})"), text);
                }
            }
        }
        Ok(())
    }

    /// Collects the templates of a GGUF file from its keys `tokenizer.chat_template` and
    /// `tokenizer.chat_template.NAME`; other keys are passed over.
    pub fn from_gguf<'a>(origin: &str, texts: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut templates = Self::default();
        for (key, text) in texts {
            let Some(name) = key.strip_prefix(GGUF_KEY) else {
                continue;
            };
            match name.strip_prefix('.') {
                Some(name) => templates.add(name, origin, key, text),
                None if name.is_empty() => templates.add(DEFAULT, origin, key, text),
                None => {}
            }
        }
        templates
    }

    fn add(&mut self, name: &str, origin: &str, file: &str, text: &str) {
        let source = (format!("{origin}/{file}"), text.to_owned());
        self.sources.insert(name.to_owned(), source);
    }

    /// Names of the templates, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.keys().map(String::as_str)
    }

    /// The text of a template as it is in the file.
    #[must_use]
    pub fn source(&self, name: &str) -> Option<&str> {
        self.sources.get(name).map(|(_, text)| text.as_str())
    }

    /// The file, or key of a GGUF file, that a template is from.
    #[must_use]
    pub fn location(&self, name: &str) -> Option<&str> {
        self.sources.get(name).map(|(file, _)| file.as_str())
    }

    /// The template called `name`; without a name, `tool_use` for a conversation with tools where
    /// there is one, and otherwise `default`. `None` when the checkpoint has no template at all.
    ///
    /// # Errors
    /// There are templates but not this one, or it does not parse.
    pub fn choose(&self, name: Option<&str>, has_tools: bool) -> Result<Option<ChatTemplate>> {
        if self.sources.is_empty() {
            return Ok(None);
        }
        let wanted = match name {
            Some(name) => name,
            None if has_tools && self.sources.contains_key("tool_use") => "tool_use",
            None => DEFAULT,
        };
        let Some((origin, text)) = self.sources.get(wanted) else {
            let known: Vec<&str> = self.names().collect();
            let origin = self
                .sources
                .values()
                .next()
                .map(|(origin, _)| origin.clone());
            return Err(CheckpointError::ChatTemplate {
                origin: origin.unwrap_or_default(),
                line: 0,
                problem: format!(
                    "there is no template `{wanted}`; known: {}",
                    known.join(", ")
                ),
            });
        };
        ChatTemplate::parse(origin, text).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn files_win_over_the_configuration() {
        let config = json!({"chat_template": "from config"});
        let mut files = ChatFiles {
            origin: "m",
            tokenizer_config: &config,
            jinja: None,
            additional: &[],
        };
        let templates = ChatTemplates::from_files(&files).unwrap();
        assert_eq!(templates.source("default"), Some("from config"));
        let additional = [("rag".to_owned(), "r".to_owned())];
        files.jinja = Some("from file");
        files.additional = &additional;
        let templates = ChatTemplates::from_files(&files).unwrap();
        assert_eq!(templates.source("default"), Some("from file"));
        assert_eq!(templates.names().collect::<Vec<_>>(), ["default", "rag"]);
    }

    #[test]
    fn named_templates_are_chosen_as_in_transformers() {
        let config = json!({"chat_template": [{"name": "default", "template": "d"},
            {"name": "tool_use", "template": "{% oops"}]});
        let files = ChatFiles {
            origin: "m",
            tokenizer_config: &config,
            jinja: None,
            additional: &[],
        };
        let templates = ChatTemplates::from_files(&files).unwrap();
        assert!(templates.choose(None, false).unwrap().is_some());
        let error = templates.choose(None, true).unwrap_err().to_string();
        assert!(error.contains("tool_use"), "{error}");
        let error = templates
            .choose(Some("rag"), false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("default, tool_use"), "{error}");
        let none = ChatTemplates::default();
        assert!(none.choose(None, true).unwrap().is_none());
        let config = json!({"chat_template": 1});
        let files = ChatFiles {
            tokenizer_config: &config,
            ..files
        };
        assert!(ChatTemplates::from_files(&files).is_err());
    }

    #[test]
    fn gguf_keys_name_their_template() {
        let keys = [
            ("tokenizer.chat_template", "d"),
            ("tokenizer.chat_template.tool_use", "t"),
            ("tokenizer.chat_templates", "x"),
            ("general.name", "n"),
        ];
        let templates = ChatTemplates::from_gguf("m.gguf", keys.into_iter());
        assert_eq!(
            templates.names().collect::<Vec<_>>(),
            ["default", "tool_use"]
        );
    }
}
