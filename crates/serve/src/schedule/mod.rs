//! The scheduler: token in, token out, many sequences at a time on one thread.
//!
//! A [`Job`] is one sequence to read and continue. They are handed in at the door ([`door`]) and wait in a queue that is fair to
//! clients ([`queue`]); the worker ([`worker`]) gives them slots ([`slot`]), each with a session, or two for a job that contrasts two choices of
//! experts, and computes all running jobs together: every pass takes the next token of each that generates and pieces of the
//! prompts of others ([`plan`]), or the tokens of some, chosen by the experts that they share ([`steps`]). What is in a pass changes no bit of anybody's result, so clients never notice each other but by the clock.
//!
//! Keys and values of all sessions share a bounded memory ([`room`]). Blocks of what was read stay for whoever begins alike ([`prefixes`]); where
//! memory is short, blocks that nobody uses go, then young jobs wait, and in the end the youngest gives its memory up and reads again later.

mod door;
mod draw;
mod job;
mod lane;
mod picks;
mod plan;
mod prefixes;
mod queue;
mod room;
mod slot;
mod steps;
mod watch;
mod worker;

pub(crate) use door::Scheduler;
pub(crate) use draw::{Constraint, DrawOptions, Scored};
pub(crate) use job::{Client, Event, Finish, Job, JobError, Jobs, Pooling, Refusal};
pub(crate) use picks::LayerUse;
pub use steps::{StepOptions, StepOrder};
pub(crate) use watch::Routed;

/// What a scheduler may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScheduleOptions {
    /// Sequences that are computed together.
    pub(crate) n_slots: usize,
    /// Tokens of a pass.
    pub(crate) n_batch: usize,
    /// Of these, tokens of prompts while somebody generates; by default what suits the model.
    pub(crate) n_beside: Option<usize>,
    /// Jobs that may wait.
    pub(crate) n_waiting: usize,
    /// The sessions.
    pub(crate) session: cadre_engine::SessionOptions,
    /// The most bytes of keys and values of all sessions together; by default what they all take when they are full.
    pub(crate) kv_bytes: Option<usize>,
    /// How many of those that generate take part in a pass, and which; by default all.
    pub(crate) steps: Option<StepOptions>,
}
