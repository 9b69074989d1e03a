//! `/tokenize`, `/detokenize` and `/tokenizer_info`: text to tokens and back, as vLLM and llama.cpp spell it.

use cadre_checkpoint::EncodeOptions;
use serde_json::{Value, json};

use super::chat::messages;
use super::error::{ApiError, Result};
use super::fields::Fields;
use super::generation::tokens;
use crate::served::{Conversation, Served};

/// What a client needs beside the tokens of texts, as vLLM spells it; lm_eval looks for it.
pub(crate) fn info(served: &Served) -> Value {
    let [bos_token, eos_token] = served.ends();
    json!({
        "bos_token": bos_token,
        "eos_token": eos_token,
        "chat_template": served.template_source(),
        "model_max_length": served.n_ctx,
    })
}

/// The tokens of a text, or of a conversation as the model's template writes it.
pub(crate) fn tokenize(body: &[u8], served: &Served) -> Result<Value> {
    let mut fields = Fields::parse(body)?;
    served.check_name(fields.text("model")?.as_deref())?;
    // vLLM's word, and llama.cpp's.
    let (prompt, content) = (fields.text("prompt")?, fields.text("content")?);
    let text = prompt.or(content);
    let (add, also) = (
        fields.bool("add_special_tokens")?,
        fields.bool("add_special")?,
    );
    let options = EncodeOptions {
        add_special: add.or(also).unwrap_or(true),
        parse_special: fields.bool("parse_special")?.unwrap_or(true),
    };
    let with_pieces = fields.bool("return_token_strs")?.unwrap_or(false)
        | fields.bool("with_pieces")?.unwrap_or(false);
    let conversation = fields.take("messages");
    fields.finish(&[])?;
    let tokens = match (text, conversation) {
        (Some(text), None) => served.encode(&text, options)?,
        (None, Some(value)) => served.render(&Conversation {
            messages: messages(value)?,
            ..Conversation::default()
        })?,
        _ => {
            return Err(ApiError::field(
                "prompt",
                "or `messages` is needed, and one of them alone",
            ));
        }
    };
    let pieces = with_pieces.then(|| {
        let spelled = |token: &u32| served.tokenizer.token_str(*token).into_owned();
        tokens.iter().map(spelled).collect::<Vec<_>>()
    });
    Ok(json!({
        "count": tokens.len(),
        "max_model_len": served.n_ctx,
        "tokens": tokens,
        "token_strs": pieces,
    }))
}

/// The text of tokens, special ones included.
pub(crate) fn detokenize(body: &[u8], served: &Served) -> Result<Value> {
    let mut fields = Fields::parse(body)?;
    served.check_name(fields.text("model")?.as_deref())?;
    let list = fields.need("tokens")?;
    fields.finish(&[])?;
    let text = served.tokenizer.decode(&tokens("tokens", &list, served)?);
    Ok(json!({"prompt": text, "content": text}))
}
