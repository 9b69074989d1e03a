//! The scheduler: token in, token out, many sequences at a time on one thread.
//!
//! A [`Job`] is one sequence to read and continue. They are handed in at the door ([`door`]) and wait in a queue that is fair to
//! clients ([`queue`]); the worker ([`worker`]) gives them slots, each with a session that keeps what it has read for whoever begins alike, and computes
//! all running jobs together: every pass takes the next token of each that generates and pieces of the prompts of
//! others ([`plan`]). What is in a pass changes no bit of anybody's result, so clients never notice each other but by the clock.

mod door;
mod draw;
mod job;
mod picks;
mod plan;
mod queue;
mod slot;
mod watch;
mod worker;

pub(crate) use door::Scheduler;
pub(crate) use draw::{Constraint, DrawOptions, Scored};
pub(crate) use job::{Client, Event, Finish, Job, JobError, Jobs, Refusal};
pub(crate) use picks::LayerUse;
pub(crate) use watch::Routed;

/// What a scheduler may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScheduleOptions {
    /// Sequences that are computed together.
    pub(crate) n_slots: usize,
    /// Tokens of a pass.
    pub(crate) n_batch: usize,
    /// Jobs that may wait.
    pub(crate) n_waiting: usize,
    /// The sessions.
    pub(crate) session: cadre_engine::SessionOptions,
}
