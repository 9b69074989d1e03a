//! Chat templates: the Jinja programs that turn messages into the text a model was tuned on.
//!
//! Rendering follows `apply_chat_template` of transformers 5 byte for byte (`golden/text/chat/`).
//! What that means beyond Jinja itself is in [`template`]; `tojson` is in [`python_json`], methods
//! of Python strings that templates call in [`python_methods`], and dates in [`date`].

mod date;
mod python_json;
mod python_methods;
mod sources;
mod template;

pub use date::DateTime;
pub use sources::{ChatFiles, ChatTemplates};
pub use template::{ChatTemplate, RenderInput};
