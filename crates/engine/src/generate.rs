//! The generation loop: prompt in chunks, then sample, stop or continue, one token at a time.

use std::ops::ControlFlow;

use crate::error::{EngineError, Result};
use crate::model::{Logits, Model, NoObserver, Observer};
use crate::sampling::{Sampler, SamplingOptions};
use crate::session::Session;

/// What the loop reads tokens with: a session, or several that agree on the next token.
pub(crate) trait Reader {
    /// Reads `tokens`; the logits that `want` names belong to the reader and may be changed.
    fn read(&mut self, tokens: &[u32], want: Logits, hooks: &mut dyn Hooks) -> Result<&mut [f32]>;

    /// The session whose positions count.
    fn session(&self) -> &Session;
}

/// One session of one model.
struct Alone<'a> {
    model: &'a dyn Model,
    session: &'a mut Session,
}

impl Reader for Alone<'_> {
    fn read(&mut self, tokens: &[u32], want: Logits, hooks: &mut dyn Hooks) -> Result<&mut [f32]> {
        self.model.forward(self.session, tokens, want, hooks)
    }

    fn session(&self) -> &Session {
        self.session
    }
}

/// How to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Tokens that end the text; usually [`crate::ModelInfo::eos_token_ids`].
    pub stop_tokens: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: SamplingOptions,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The number of tokens that was asked for.
    Length,
    /// A stop token was drawn; it is not among the generated tokens.
    StopToken(u32),
    /// The session has no room for the last token, so nothing can follow it.
    ContextFull,
    /// A hook broke the loop.
    Stopped,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub finish: Finish,
}

/// What a caller may do while text is generated. It also observes the routing.
///
/// The token that is announced at position `p` is routed by the forward pass that follows, so its
/// routing events come after [`Hooks::token`]; the last token is not routed.
pub trait Hooks: Observer {
    /// After each chunk of the prompt: `n_done` of `n_total` tokens are read. Break to stop.
    fn prompt(&mut self, n_done: usize, n_total: usize) -> ControlFlow<()> {
        let _ = (n_done, n_total);
        ControlFlow::Continue(())
    }

    /// A token was drawn for `position`. Break to stop after it: on a stop string, or an interrupt.
    fn token(&mut self, token: u32, position: usize) -> ControlFlow<()> {
        let _ = (token, position);
        ControlFlow::Continue(())
    }
}

impl Hooks for NoObserver {}

/// Reads `prompt` into `session` after what it holds, then draws up to `max_new_tokens` tokens.
///
/// The session keeps the prompt and all generated tokens but the last, so a later call may continue.
///
/// # Errors
/// An empty or too long prompt, bad options, or any error of the model. An error leaves the session with
/// the tokens that were processed before it.
pub fn generate(
    model: &dyn Model,
    session: &mut Session,
    prompt: &[u32],
    options: &GenerateOptions,
    hooks: &mut dyn Hooks,
) -> Result<Generated> {
    check_prompt(model, session, prompt)?;
    generate_with(&mut Alone { model, session }, prompt, options, hooks)
}

/// The loop, over whatever reads. The prompt has been checked.
pub(crate) fn generate_with(
    reader: &mut dyn Reader,
    prompt: &[u32],
    options: &GenerateOptions,
    hooks: &mut dyn Hooks,
) -> Result<Generated> {
    let mut sampler = Sampler::new(options.sampling)?;
    sampler.observe(prompt);
    let (n_free, chunk) = (reader.session().free(), reader.session().chunk());
    // Room for all of them, so that the loop does not allocate.
    let mut tokens = Vec::with_capacity(options.max_new_tokens.min(n_free + 1));
    let finished = |tokens, finish| Ok(Generated { tokens, finish });

    // By chunks, so that the caller hears of progress and may stop in between.
    let last_chunk = (prompt.len() - 1) / chunk * chunk;
    for from in (0..last_chunk).step_by(chunk) {
        let to = from + chunk;
        reader.read(&prompt[from..to], Logits::None, hooks)?;
        if hooks.prompt(to, prompt.len()).is_break() {
            return finished(tokens, Finish::Stopped);
        }
    }
    let mut logits = reader.read(&prompt[last_chunk..], Logits::Last, hooks)?;
    if hooks.prompt(prompt.len(), prompt.len()).is_break() {
        return finished(tokens, Finish::Stopped);
    }
    while tokens.len() < options.max_new_tokens {
        let token = sampler.sample(logits)?;
        if options.stop_tokens.contains(&token) {
            return finished(tokens, Finish::StopToken(token));
        }
        sampler.observe(&[token]);
        tokens.push(token);
        if hooks.token(token, reader.session().position()).is_break() {
            return finished(tokens, Finish::Stopped);
        }
        if tokens.len() == options.max_new_tokens {
            break;
        }
        if reader.session().free() == 0 {
            return finished(tokens, Finish::ContextFull);
        }
        logits = reader.read(&[token], Logits::Last, hooks)?;
    }
    finished(tokens, Finish::Length)
}

pub(crate) fn check_prompt(model: &dyn Model, session: &Session, prompt: &[u32]) -> Result<()> {
    if prompt.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    if prompt.len() > session.free() {
        return Err(EngineError::PromptTooLong {
            n_tokens: prompt.len(),
            free: session.free(),
            n_ctx: session.n_ctx(),
            limit: model.info().max_context,
        });
    }
    Ok(())
}
