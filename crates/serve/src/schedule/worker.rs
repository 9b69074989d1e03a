//! The worker: the one thread that computes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use cadre_engine::{EngineError, Model, Sequence, Workspace};

use super::ScheduleOptions;
use super::door::{Ending, Shared, Waiting};
use super::job::{Event, JobError, failed};
use super::picks::Picks;
use super::plan::{PassLimits, plan};
use super::slot::{Desk, Slot};
use super::watch::Watch;
use crate::metrics::{JobClock, Metrics};

/// Bytes of logits that a pass may make for prompts that are scored.
const LOGIT_BYTES: usize = 32 << 20;
/// The thread's own.
pub(super) struct Worker {
    model: Arc<dyn Model>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    options: ScheduleOptions,
    limits: PassLimits,
    workspace: Workspace,
    slots: Vec<Slot>,
    picks: Picks,
    /// A row of logits.
    scratch: Vec<f32>,
    /// Counts what happens, to tell older from newer.
    now: u64,
}

/// Why a pass brought nothing.
enum Trouble {
    /// One slot's sequence cannot be computed; the others can.
    Slot(usize, JobError),
    /// All that were in it.
    All(JobError),
    /// A panic.
    Panic,
}

impl Worker {
    pub(super) fn new(
        model: Arc<dyn Model>,
        options: &ScheduleOptions,
        metrics: Arc<Metrics>,
        shared: Arc<Shared>,
    ) -> crate::Result<Self> {
        let session = || {
            let session = model.session(&options.session)?;
            Ok(Slot::new(session, &*model))
        };
        let slots: cadre_engine::Result<Vec<Slot>> = std::iter::repeat_with(session)
            .take(options.n_slots)
            .collect();
        let n_tokens = options.n_batch.max(options.n_slots);
        let row_bytes = (model.info().vocab_size * size_of::<f32>()).max(1);
        Ok(Self {
            slots: slots?,
            picks: Picks::new(model.info()),
            workspace: model.workspace(n_tokens)?,
            limits: PassLimits {
                n_tokens,
                n_rows: (LOGIT_BYTES / row_bytes).max(1),
            },
            model,
            shared,
            metrics,
            options: *options,
            scratch: Vec::new(),
            now: 0,
        })
    }

    pub(super) fn run(&mut self) {
        while self.admit() {
            if guarded(|| self.step()).is_none() {
                self.recover();
            }
        }
        for slot in &mut self.slots {
            slot.fail(JobError::Ended, self.now);
        }
        let mut inbox = self.shared.inbox();
        inbox.ending = Some(Ending::Now);
        for waiting in inbox.queue.drain() {
            waiting.teller.tell(Event::Failed(JobError::Ended));
        }
    }

    /// Gives waiting jobs free slots; waits for some when there is nothing to do. False at the end.
    fn admit(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut inbox = shared.inbox();
        loop {
            inbox.queue.retain(|waiting| !waiting.teller.is_cancelled());
            if inbox.ending == Some(Ending::Now) {
                return false;
            }
            while self.slots.iter().any(Slot::is_free)
                && let Some(waiting) = inbox.queue.pop()
            {
                self.place(waiting);
            }
            let n_running = self.slots.iter().filter(|slot| !slot.is_free()).count();
            let n_held: usize = self.slots.iter().map(Slot::n_held).sum();
            let n_all: usize = self.slots.iter().map(Slot::n_ctx).sum();
            let kv_share = n_held as f64 / n_all.max(1) as f64;
            self.metrics.jobs(n_running, inbox.queue.len(), kv_share);
            if n_running > 0 {
                return true;
            }
            if inbox.ending.is_some() {
                return false;
            }
            inbox = shared
                .wake
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Begins a job where most of its prompt has been read already, or else where nobody has been for longest.
    fn place(&mut self, waiting: Waiting) {
        let Waiting { job, teller, since } = waiting;
        let free = self.slots.iter_mut().filter(|slot| slot.is_free());
        let best = free.max_by_key(|slot| (slot.n_known(&job), u64::MAX - slot.used()));
        if let Some(slot) = best {
            self.now += 1;
            let clock = JobClock::new(since, Arc::clone(&self.metrics));
            slot.begin(&*self.model, job, teller, (self.now, clock));
        }
    }

    /// One pass for everybody.
    fn step(&mut self) {
        self.now += 1;
        let now = self.now;
        for slot in &mut self.slots {
            slot.drop_cancelled(now);
        }
        let needs: Vec<_> = self.slots.iter().map(Slot::need).collect();
        let pieces = plan(&needs, self.limits);
        let trouble = match self.pass(&pieces) {
            Ok(()) => return,
            Err(trouble) => trouble,
        };
        match trouble {
            Trouble::Slot(slot, error) => self.slots[slot].fail(error, now),
            Trouble::All(error) => self.fail(&pieces, &error),
            Trouble::Panic => self.one_by_one(&pieces),
        }
    }

    /// After a panic in a pass: computes its members alone, which finds the one that is to blame. No session has advanced.
    fn one_by_one(&mut self, pieces: &[usize]) {
        for (slot, n) in pieces.iter().enumerate().filter(|(_, n)| **n > 0) {
            // What the pass wrote is forgotten with the memory that it wrote to.
            if let Ok(workspace) = self.model.workspace(self.limits.n_tokens) {
                self.workspace = workspace;
            }
            let mut alone = vec![0; pieces.len()];
            alone[slot] = *n;
            match self.pass(&alone) {
                Ok(()) => {}
                Err(Trouble::Slot(_, error) | Trouble::All(error)) => self.fail(&alone, &error),
                Err(Trouble::Panic) => {
                    self.fail(&alone, &JobError::Panicked);
                    self.renew(slot);
                }
            }
        }
    }

    /// After a panic outside of a pass: everything that runs fails, and nothing of its state is kept.
    fn recover(&mut self) {
        for slot in 0..self.slots.len() {
            if !self.slots[slot].is_free() {
                self.slots[slot].fail(JobError::Panicked, self.now);
                self.renew(slot);
            }
        }
    }

    fn renew(&mut self, slot: usize) {
        // The same options made one before.
        if let Ok(session) = self.model.session(&self.options.session) {
            self.slots[slot].renew(session, &*self.model);
        }
    }

    fn fail(&mut self, pieces: &[usize], error: &JobError) {
        for (slot, n) in self.slots.iter_mut().zip(pieces) {
            if *n > 0 {
                slot.fail(error.clone(), self.now);
            }
        }
    }

    /// Computes so many tokens of each slot together.
    fn pass(&mut self, pieces: &[usize]) -> Result<(), Trouble> {
        let Self {
            model,
            slots,
            workspace,
            scratch,
            picks,
            ..
        } = self;
        let vocab = model.info().vocab_size;
        let mut batch: Vec<Sequence<'_>> = Vec::new();
        // Slots of the batch, and values of logits that they get.
        let mut members = Vec::new();
        let mut wanted = Vec::new();
        for (index, (slot, n)) in slots.iter_mut().zip(pieces).enumerate() {
            let wants = slot.watches(*n);
            if *n > 0
                && let Some(sequence) = slot.sequence(*n)
            {
                wanted.push(wants);
                members.push((index, sequence.n_logits() * vocab));
                batch.push(sequence);
            }
        }
        let is_watched = picks.begin();
        let mut watch = Watch::new(picks, &wanted);
        let observer = &mut watch;
        let start = Instant::now();
        let (shared_model, sequences) = (&**model, &mut batch[..]);
        let memory = &mut *workspace;
        let computed = guarded(move || shared_model.forward_batch(sequences, memory, observer));
        drop(batch);
        let mut logits = match computed {
            Some(Ok(logits)) => logits,
            Some(Err(error)) => return Err(trouble(&error, &members)),
            None => return Err(Trouble::Panic),
        };
        self.metrics.pass(pieces.iter().sum(), start.elapsed());
        let seen: Vec<_> = watch.seen().collect();
        if is_watched {
            self.metrics.experts(picks.summary());
        }
        let d_model = model.info().d_model;
        // Vectors are in the same memory as logits, so they come after them.
        let (mut row, mut vectors) = (0, Vec::new());
        for ((slot, n), layers) in members.into_iter().zip(seen) {
            let (rows, rest) = logits.split_at_mut(n);
            logits = rest;
            let first = row;
            row += n / vocab.max(1);
            if slots[slot].embeds() {
                vectors.push((slot, first * d_model..row * d_model));
                continue;
            }
            let mut desk = Desk {
                model: &**model,
                scratch,
                layers,
            };
            slots[slot].advance(rows, &mut desk, self.now);
        }
        for (slot, values) in vectors {
            slots[slot].embed(&workspace.hidden()[values], d_model, self.now);
        }
        Ok(())
    }
}

/// `None` for a panic. What `work` changed is put in order, or thrown away, by whoever calls this.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

fn trouble(error: &EngineError, members: &[(usize, usize)]) -> Trouble {
    match error {
        EngineError::InBatch { sequence, source } => match members.get(*sequence) {
            Some((slot, _)) => Trouble::Slot(*slot, failed(source)),
            None => Trouble::All(failed(error)),
        },
        error => Trouble::All(failed(error)),
    }
}
