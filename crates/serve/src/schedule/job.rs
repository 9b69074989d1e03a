//! What the scheduler is asked for, what it tells, and how it refuses.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cadre_engine::{Contrast, EngineError, Steering};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::draw::{Constraint, DrawOptions, Scored};
use super::watch::Routed;

/// One sequence to read and continue.
pub(crate) struct Job {
    /// At least one token, and no more than a session holds.
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) max_new_tokens: usize,
    /// Tokens that end the text; they are not told.
    pub(crate) stop_tokens: Arc<[u32]>,
    pub(crate) draw: DrawOptions,
    /// Which experts are picked; what a session read with another steering is not known here.
    pub(crate) steering: Steering,
    /// What the choice of experts is contrasted with, if it is; the strong side is steered as above.
    pub(crate) contrast: Option<Arc<Contrast>>,
    /// The first position whose experts are told, if any is.
    pub(crate) routed_from: Option<usize>,
    /// What holds the text to a form.
    pub(crate) constraint: Option<Box<dyn Constraint>>,
    /// Most probable tokens that are told with the score of every token; `None` where no scores are wanted.
    pub(crate) alternatives: Option<usize>,
    /// Whether the tokens of the prompt are scored, too.
    pub(crate) scores_prompt: bool,
    /// How the prompt is to become a vector, if nothing else is done.
    pub(crate) embeds: Option<Pooling>,
}

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// Their mean.
    Mean,
    /// The last one's.
    Last,
}

impl Job {
    /// Whether something is wanted of every token of the prompt.
    pub(crate) fn wants_all(&self) -> bool {
        self.scores_prompt || self.embeds == Some(Pooling::Mean)
    }

    /// What of the prompt need not be read where it is known: never the last token, whose logits start the answer, and
    /// nothing that something is told of.
    pub(crate) fn reusable(&self) -> &[u32] {
        let n = match self.wants_all() {
            true => 0,
            false => self.prompt.len().saturating_sub(1),
        };
        &self.prompt[..n.min(self.routed_from.unwrap_or(usize::MAX))]
    }
}

/// Whom a job is done for: the queue is fair among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    /// Index of its key.
    Key(usize),
    /// Where it is, when there are no keys.
    Address(IpAddr),
}

/// What happens to a job. The last event is [`Event::Done`] or [`Event::Failed`].
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// It has a slot, which held so many tokens of the prompt already.
    Started {
        /// Tokens that need not be read.
        n_cached: usize,
    },
    /// Scores of the next tokens of the prompt; the first token of all has none.
    Prompt(Vec<Scored>),
    /// The experts of tokens that were read.
    Routed(Routed),
    /// A token was drawn.
    Token {
        /// Its id.
        token: u32,
        /// Its score, where scores are wanted.
        scored: Option<Box<Scored>>,
    },
    /// The score of the token that ends the text, where those of the prompt are wanted, too: clients that ask for a
    /// prompt's scores count on one of a token that was drawn.
    Ending(Box<Scored>),
    /// What the last layer made of the tokens of the prompt.
    Embedding(Vec<f32>),
    /// There are no more tokens.
    Done(Finish),
    /// It could not be finished.
    Failed(JobError),
}

/// Why there are no more tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// A token that ends the text.
    Stop,
    /// As many as were asked for, or as the context holds.
    Length,
}

/// Why a job was not finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum JobError {
    /// The engine's error, with its causes.
    Failed(String),
    /// The form that was asked for is more than can be held to.
    Form(String),
    /// A panic.
    Panicked,
    /// The scheduler ended.
    Ended,
}

/// Why jobs are not taken. The numbers are jobs that wait, and seconds until that may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// This client has its share of the queue.
    TooMany { waiting: usize, seconds: u32 },
    /// The queue is full.
    Full { waiting: usize, seconds: u32 },
    /// Its keys and values are larger than all memory that there is for them.
    TooLarge { bytes: usize, limit: usize },
    /// The scheduler takes no more.
    Ending,
}

/// The events of the jobs that were submitted together. Dropping it cancels all of them.
#[derive(Debug)]
pub(crate) struct Jobs {
    pub(crate) events: UnboundedReceiver<(usize, Event)>,
    pub(crate) cancelled: Vec<Arc<AtomicBool>>,
}

impl Jobs {
    /// Nothing more is wanted of one of them.
    pub(crate) fn cancel(&self, index: usize) {
        if let Some(cancelled) = self.cancelled.get(index) {
            cancelled.store(true, Ordering::Relaxed);
        }
    }
}

/// The scheduler's end of a job.
#[derive(Debug)]
pub(crate) struct Teller {
    pub(crate) index: usize,
    pub(crate) events: UnboundedSender<(usize, Event)>,
    pub(crate) cancelled: Arc<AtomicBool>,
}

impl Teller {
    pub(crate) fn tell(&self, event: Event) {
        // Whoever does not listen any more is noticed before the next pass.
        let _ = self.events.send((self.index, event));
    }

    /// Whether nobody listens.
    pub(crate) fn is_alone(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether nobody wants to hear more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.is_alone() || self.cancelled.load(Ordering::Relaxed)
    }
}

/// An error of the engine with its causes.
pub(crate) fn failed(error: &EngineError) -> JobError {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    JobError::Failed(text)
}
