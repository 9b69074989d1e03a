//! What is served: a model, its names, and its text side.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cadre_checkpoint::{
    ChatSide, ChatTemplate, Checkpoint, DateTime, EncodeOptions, RenderInput, Tokenizer,
};
use cadre_engine::{Model, Steering};
use http::StatusCode;
use serde_json::{Map, Value};

use crate::api::error::{ApiError, Result};
use crate::api::experts::try_on;
use crate::api::generation::too_long;
use crate::error::ServeError;
use crate::grammar::Grammars;

/// Tokenizers change text before they cut it, and may make it shorter; never by so much.
const SHRINKS: usize = 4;

/// A chat template, none, or what is wrong with it.
type Template = std::result::Result<Option<ChatTemplate>, String>;

/// A model and what belongs to it.
pub(crate) struct Served {
    pub(crate) model: Arc<dyn Model>,
    pub(crate) tokenizer: Tokenizer,
    /// Names that requests may call it; the first is the one that it tells.
    pub(crate) names: Vec<String>,
    /// When it was loaded, in seconds since the start of 1970.
    pub(crate) created: u64,
    /// Tokens that end a text.
    pub(crate) stop_tokens: Arc<[u32]>,
    /// Tokens that a sequence may have.
    pub(crate) n_ctx: usize,
    pub(crate) origin: String,
    /// Tells one checkpoint from another; plans and traces name it, too.
    pub(crate) digest: String,
    /// Steerings that requests may name.
    pub(crate) plans: Vec<(String, Steering)>,
    /// What holds answers to forms.
    pub(crate) grammars: Grammars,
    chat: ChatSide,
    /// For conversations without tools; what is wrong with it, otherwise.
    template: Template,
    /// For conversations with tools.
    tool_template: Template,
    /// Bytes of the longest token.
    longest_token: usize,
}

impl Served {
    /// Reads the text side of `checkpoint`; `template` replaces its chat template.
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        model: Arc<dyn Model>,
        template: Option<ChatTemplate>,
        (names, plans): (Vec<String>, Vec<(String, Steering)>),
        n_ctx: usize,
    ) -> crate::Result<Self> {
        for (name, plan) in &plans {
            let whole = model.info().steering.clone().and(plan);
            try_on(&whole, &*model).map_err(|source| ServeError::Plan {
                name: name.clone(),
                source: Box::new(source),
            })?;
        }
        let digest = checkpoint.digest().to_owned();
        // It has looked into every tensor, and the system maps more around each look.
        checkpoint.release_all();
        let tokenizer = checkpoint.tokenizer()?;
        let chat = checkpoint.chat(&tokenizer)?;
        // A broken template keeps nobody from using the model without it.
        let choose = |has_tools| match &template {
            Some(template) => Ok(Some(template.clone())),
            None => chat.templates.choose(None, has_tools).map_err(|error| {
                tracing::warn!("{error}; conversations will be refused");
                error.to_string()
            }),
        };
        let stop_tokens: Arc<[u32]> = chat.stop_tokens.iter().map(|token| token.id).collect();
        let n_tokens = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let lengths = (0..n_tokens).map(|id| tokenizer.token_bytes(id).len());
        Ok(Self {
            longest_token: lengths.max().unwrap_or(1),
            grammars: Grammars::new(model.info().vocab_size, Arc::clone(&stop_tokens)),
            stop_tokens,
            template: choose(false),
            tool_template: choose(true),
            created: unix_seconds(),
            origin: checkpoint.origin().to_owned(),
            digest,
            model,
            tokenizer,
            names,
            plans,
            n_ctx,
            chat,
        })
    }

    /// The name that answers tell.
    pub(crate) fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// Whether the model is called so.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    /// Spellings of the tokens that start and end a text, where there are such.
    pub(crate) fn ends(&self) -> [Option<&str>; 2] {
        [
            self.chat.bos_token.as_deref(),
            self.chat.eos_token.as_deref(),
        ]
    }

    /// The text of the chat template, if there is a proper one.
    pub(crate) fn template_source(&self) -> Option<String> {
        let template = self.template.as_ref().ok()?;
        template.as_ref().map(ChatTemplate::source)
    }

    /// Whether there is a way to put a conversation into text.
    pub(crate) fn has_chat_template(&self) -> bool {
        matches!(self.template, Ok(Some(_)))
    }

    /// Refuses the name of another model; none is fine.
    pub(crate) fn check_name(&self, name: Option<&str>) -> Result<()> {
        match name {
            Some(name) if !self.is_called(name) => {
                let shown: String = name.chars().take(100).collect();
                let message = format!(
                    "the model `{shown}` does not exist here; this server has `{}`",
                    self.names.join("`, `")
                );
                let error = ApiError::new(StatusCode::NOT_FOUND, message);
                Err(error.param("model").code("model_not_found"))
            }
            _ => Ok(()),
        }
    }

    /// Rows of the logits: ids are below it.
    pub(crate) fn n_tokens(&self) -> usize {
        self.model.info().vocab_size
    }

    pub(crate) fn has_token(&self, token: u32) -> bool {
        (token as usize) < self.n_tokens()
    }

    /// The tokens of a text, unless it is so long that they are more than the context.
    pub(crate) fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        let most = self
            .n_ctx
            .saturating_mul(self.longest_token)
            .saturating_mul(SHRINKS);
        if text.len() > most {
            return Err(too_long(self, text.len()));
        }
        let tokens = self.tokenizer.encode_with(text, options);
        tokens.map_err(|error| ApiError::bad(error.to_string()))
    }

    /// The tokens of a conversation, up to where the answer starts.
    pub(crate) fn render(&self, conversation: &Conversation) -> Result<Vec<u32>> {
        let text = self.rendered(conversation, conversation.tools.as_ref())?;
        if conversation.tools.is_some() && text == self.rendered(conversation, None)? {
            let problem = "are nothing that this model's chat template knows";
            return Err(ApiError::field("tools", problem).code("unsupported_parameter"));
        }
        let tokens = self.encode(&text, EncodeOptions::RENDERED)?;
        match tokens.is_empty() {
            false => Ok(tokens),
            true => Err(ApiError::field(
                "messages",
                "gives the model no text to read",
            )),
        }
    }

    fn rendered(&self, conversation: &Conversation, tools: Option<&Value>) -> Result<String> {
        let chosen = match &conversation.tools {
            Some(_) => &self.tool_template,
            None => &self.template,
        };
        let template = match chosen {
            Ok(Some(template)) => template,
            Ok(None) => {
                let message = format!(
                    "{} has no chat template; use /v1/completions, or start the server with --chat-template-file",
                    self.name()
                );
                return Err(ApiError::bad(message).code("no_chat_template"));
            }
            Err(problem) => return Err(ApiError::internal(problem.clone())),
        };
        let text = template.render(&RenderInput {
            messages: &conversation.messages,
            tools,
            add_generation_prompt: true,
            extra: &conversation.extra,
            bos_token: self.chat.bos_token.as_deref(),
            eos_token: self.chat.eos_token.as_deref(),
            now: DateTime::from_unix(i64::try_from(unix_seconds()).unwrap_or(i64::MAX)),
        });
        text.map_err(|error| ApiError::bad(error.to_string()).param("messages"))
    }
}

/// What a chat template makes text of.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    /// A list.
    pub(crate) messages: Value,
    /// A list, where tools may be called.
    pub(crate) tools: Option<Value>,
    /// Further variables of the template.
    pub(crate) extra: Map<String, Value>,
}

/// Seconds since the start of 1970.
pub(crate) fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
