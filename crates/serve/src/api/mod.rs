//! The interfaces that clients speak: OpenAI's, and what belongs to it.

pub(crate) mod chat;
pub(crate) mod choice;
pub(crate) mod completions;
mod contrast;
pub(crate) mod embeddings;
pub(crate) mod error;
pub(crate) mod experts;
pub(crate) mod fields;
pub(crate) mod format;
pub(crate) mod generation;
pub(crate) mod log_probs;
pub(crate) mod messages;
pub(crate) mod models;
mod plans;
pub(crate) mod sse;
pub(crate) mod tokens;
pub(crate) mod tools;
pub(crate) mod voice;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use crate::schedule::Job;
use choice::Choice;
use voice::Voice;

/// A request for text, understood.
pub(crate) struct Prepared {
    pub(crate) jobs: Vec<Job>,
    /// One per job.
    pub(crate) choices: Vec<Choice>,
    /// Tokens of all prompts, each counted once.
    pub(crate) n_prompt: usize,
    pub(crate) streams: bool,
    /// How the answer is told.
    pub(crate) voice: Box<dyn Voice>,
}

/// A name for an answer.
pub(crate) fn identifier(prefix: &str) -> String {
    // New hashers are seeded by the operating system, and each differs from the one before.
    let part = || RandomState::new().build_hasher().finish();
    format!("{prefix}-{:016x}{:08x}", part(), part() as u32)
}
