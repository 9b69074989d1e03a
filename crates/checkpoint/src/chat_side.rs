//! What a checkpoint says about chatting: its templates, and the tokens that bound a text or turn.

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{CheckpointError, Result};
use crate::gguf::Gguf;
use crate::text::{
    ChatFiles, ChatTemplates, GgufVocab, StopFiles, StopToken, Tokenizer, special_token,
    stop_token_ids,
};

/// What a checkpoint says about chatting.
#[derive(Clone, Debug, Default)]
pub struct ChatSide {
    /// The chat templates; none for a model that only continues text.
    pub templates: ChatTemplates,
    /// Spelling of the token that starts a text.
    pub bos_token: Option<String>,
    /// Spelling of the token that ends a text or a turn.
    pub eos_token: Option<String>,
    /// The tokens that end an answer.
    pub stop_tokens: Vec<StopToken>,
}

impl Checkpoint {
    /// What the checkpoint says about chatting, from `chat_template.jinja`, `tokenizer_config.json`
    /// (of a GGUF file: from its metadata) and wherever stop tokens are named. All of it may be absent.
    ///
    /// # Errors
    /// A file that cannot be read, or does not say it as transformers does.
    pub fn chat(&self, tokenizer: &Tokenizer) -> Result<ChatSide> {
        match self.gguf() {
            Some(gguf) => self.gguf_chat(gguf, tokenizer),
            None => self.folder_chat(Some(tokenizer)),
        }
    }

    /// As [`Checkpoint::chat`] as far as that goes without parsing the vocabulary, which can be large: stop tokens that
    /// are named by their spelling are missing, and so are spellings of ids.
    ///
    /// # Errors
    /// As [`Checkpoint::chat`].
    pub fn chat_without_tokenizer(&self) -> Result<ChatSide> {
        match self.gguf() {
            Some(gguf) => self.gguf_chat_header(gguf),
            None => self.folder_chat(None),
        }
    }

    fn folder_chat(&self, tokenizer: Option<&Tokenizer>) -> Result<ChatSide> {
        let tokenizer_config = self.json("tokenizer_config.json")?;
        let additional = self.folder_texts("additional_chat_templates", ".jinja")?;
        let templates = ChatTemplates::from_files(&ChatFiles {
            origin: self.origin(),
            tokenizer_config: tokenizer_config.as_ref().unwrap_or(&Value::Null),
            jinja: self.file_text("chat_template.jinja")?.as_deref(),
            additional: &additional,
        })?;
        let stop_tokens = stop_token_ids(&StopFiles {
            origin: self.origin(),
            generation_config: self.json("generation_config.json")?.as_ref(),
            config: self.json("config.json")?.as_ref(),
            tokenizer_config: tokenizer_config.as_ref(),
            gguf: None,
            tokenizer,
        })?;
        let config = tokenizer_config.unwrap_or_default();
        let token = |key: &str| special_token(&config[key]).map(str::to_owned);
        Ok(ChatSide {
            templates,
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
            stop_tokens,
        })
    }

    fn gguf_chat(&self, gguf: &Gguf, tokenizer: &Tokenizer) -> Result<ChatSide> {
        let vocab = self.vocab(gguf)?;
        let token = |id: Option<u32>| id.map(|id| tokenizer.token_str(id).into_owned());
        Ok(ChatSide {
            templates: self.gguf_templates(gguf),
            bos_token: token(vocab.bos),
            eos_token: token(vocab.eos),
            stop_tokens: stop_token_ids(&StopFiles {
                origin: self.origin(),
                gguf: Some(&vocab),
                tokenizer: Some(tokenizer),
                ..StopFiles::default()
            })?,
        })
    }

    fn gguf_chat_header(&self, gguf: &Gguf) -> Result<ChatSide> {
        let vocab = GgufVocab {
            eos: gguf.u32_opt("tokenizer.ggml.eos_token_id")?,
            eot: gguf.u32_opt("tokenizer.ggml.eot_token_id")?,
            eom: gguf.u32_opt("tokenizer.ggml.eom_token_id")?,
            ..GgufVocab::default()
        };
        Ok(ChatSide {
            templates: self.gguf_templates(gguf),
            stop_tokens: stop_token_ids(&StopFiles {
                origin: self.origin(),
                gguf: Some(&vocab),
                ..StopFiles::default()
            })?,
            ..ChatSide::default()
        })
    }

    fn gguf_templates(&self, gguf: &Gguf) -> ChatTemplates {
        let texts = gguf
            .entries()
            .iter()
            .filter_map(|(key, value)| match value {
                crate::gguf::Value::Text(text) => Some((key.as_str(), text.as_str())),
                _ => None,
            });
        ChatTemplates::from_gguf(self.origin(), texts)
    }

    fn json(&self, name: &str) -> Result<Option<Value>> {
        let Some(text) = self.file_text(name)? else {
            return Ok(None);
        };
        let value = serde_json::from_str(&text).map_err(|source| CheckpointError::Json {
            file: format!("{}/{name}", self.origin()),
            source,
        })?;
        Ok(Some(value))
    }
}
