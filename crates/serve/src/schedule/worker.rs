//! The worker: the one thread that computes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use cadre_engine::{EngineError, KV_BLOCK, KvMemory, Model, Sequence, Workspace};

use super::ScheduleOptions;
use super::door::{Ending, Shared, Waiting};
use super::job::{Event, JobError, failed};
use super::lane::Rooms;
use super::picks::Picks;
use super::plan::{Need, PassLimits, RowsBeside, plan};
use super::prefixes::Prefixes;
use super::room::{KvLimits, make_room};
use super::slot::{Desk, Slot};
use super::steps::Steps;
use super::watch::Watch;
use crate::metrics::{JobClock, Metrics};

/// Bytes of logits that a pass may make for prompts that are scored.
const LOGIT_BYTES: usize = 32 << 20;
/// The thread's own.
pub(super) struct Worker {
    model: Arc<dyn Model>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    limits: PassLimits,
    kv: KvLimits,
    rooms: Rooms,
    workspace: Workspace,
    slots: Vec<Slot>,
    picks: Picks,
    /// Who takes part, where not all do.
    steps: Option<Steps>,
    /// Of every slot that generates, when its job began.
    generating: Vec<Option<u64>>,
    /// Whether the model may know picks before its layers run.
    foretells: bool,
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

/// A slot's part of a batch.
struct Member {
    slot: usize,
    /// Its first sequence; the one of its weaker experts follows.
    first: usize,
    /// Values of logits of either.
    n: usize,
    n_weak: Option<usize>,
}

impl Worker {
    pub(super) fn new(
        model: Arc<dyn Model>,
        (options, kv): (&ScheduleOptions, KvLimits),
        metrics: Arc<Metrics>,
        shared: Arc<Shared>,
    ) -> crate::Result<Self> {
        let rooms = Rooms {
            options: options.session,
            memory: KvMemory::default(),
            prefixes: Prefixes::default(),
        };
        let lane = || Ok(Slot::new(rooms.lane(&*model)?));
        let slots: cadre_engine::Result<Vec<Slot>> =
            std::iter::repeat_with(lane).take(options.n_slots).collect();
        // A slot may have two sessions.
        let n_tokens = options.n_batch.max(2 * options.n_slots);
        let info = model.info();
        let beside = match options.n_beside {
            Some(n) => RowsBeside::fixed(n),
            None => RowsBeside::of((info.n_ids(), info.top_k), n_tokens),
        };
        let row_bytes = (model.info().vocab_size * size_of::<f32>()).max(1);
        Ok(Self {
            slots: slots?,
            picks: Picks::new(model.info()),
            steps: options
                .steps
                .map(|steps| Steps::new(model.info(), options.n_slots, steps)),
            generating: Vec::new(),
            foretells: true,
            workspace: model.workspace(n_tokens)?,
            limits: PassLimits {
                n_tokens,
                beside,
                n_rows: (LOGIT_BYTES / row_bytes).max(1),
            },
            kv,
            rooms,
            model,
            shared,
            metrics,
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
            let kv_share = n_held as f64 / self.kv.n_tokens().max(1.0);
            self.metrics.jobs(n_running, inbox.queue.len(), kv_share);
            let taken = self.rooms.memory.n_bytes();
            self.metrics.kv(taken, self.kv.limit);
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
        self.now += 1;
        let found = self
            .rooms
            .prefixes
            .find(&job.steering, job.reusable(), self.now);
        // What others have left serves in any slot.
        let n_left = found.len() * KV_BLOCK;
        let free = self.slots.iter_mut().filter(|slot| slot.is_free());
        let best = free.max_by_key(|slot| {
            let n_known = slot.n_known(&job);
            (
                if n_known > n_left { n_known } else { 0 },
                u64::MAX - slot.used(),
            )
        });
        if let Some(slot) = best {
            let clock = JobClock::new(since, Arc::clone(&self.metrics));
            let place = (&*self.model, &mut self.rooms);
            slot.begin(place, job, teller, (self.now, clock));
        }
    }

    /// One pass for everybody.
    fn step(&mut self) {
        self.now += 1;
        let now = self.now;
        for slot in &mut self.slots {
            slot.drop_cancelled(now);
        }
        let Some(pieces) = self.pieces() else {
            return;
        };
        let trouble = match self.pass(&pieces) {
            Ok(()) => return self.took(&pieces),
            Err(trouble) => trouble,
        };
        match trouble {
            Trouble::Slot(slot, error) => self.slots[slot].fail(error, now),
            Trouble::All(error) => self.fail(&pieces, &error),
            Trouble::Panic => self.one_by_one(&pieces),
        }
    }

    /// Tokens that each slot reads in the next pass, for which there is memory; `None` when nobody can go on.
    fn pieces(&mut self) -> Option<Vec<usize>> {
        // Once, so that what is given up below stays so.
        for slot in &mut self.slots {
            slot.resume(&mut self.rooms, self.now);
        }
        let mut may_cut = true;
        loop {
            let mut needs: Vec<_> = self.slots.iter().map(Slot::need).collect();
            let is_cut = may_cut && self.cut(&mut needs);
            let mut pieces = plan(&needs, self.limits);
            make_room(&mut self.slots, &mut self.rooms, self.kv, &mut pieces);
            if pieces.iter().any(|n| *n > 0) {
                return Some(pieces);
            }
            if is_cut {
                // There is no memory for these; there may be for others.
                may_cut = false;
                continue;
            }
            let running = self.slots.iter_mut().filter(|slot| !slot.is_free());
            let oldest = running.min_by_key(|slot| slot.since())?;
            let oldest = oldest.since();
            let others = self
                .slots
                .iter_mut()
                .filter(|slot| slot.since() > oldest && slot.holds_any());
            match others.max_by_key(|slot| slot.since()) {
                Some(youngest) => {
                    // One that waits to begin again holds only what it shares.
                    if youngest.n_to_admit().is_none() {
                        self.metrics.preempted();
                    }
                    youngest.give_up();
                }
                None => {
                    // The door lets nobody in who does not fit alone.
                    let slot = self.slots.iter_mut().find(|slot| slot.since() == oldest)?;
                    let message = "there is no memory for keys and values; start the server with a larger --kv-memory";
                    slot.fail(JobError::Failed(message.to_owned()), self.now);
                }
            }
        }
    }

    /// Cuts the next pass to those of `needs` that take part in a step; whether some do not.
    fn cut(&mut self, needs: &mut [Option<Need>]) -> bool {
        let generates = |need: &Option<Need>| need.filter(|need| need.generates);
        let since = needs.iter().map(|need| Some(generates(need)?.since));
        self.generating = since.collect();
        let Some(steps) = &mut self.steps else {
            return false;
        };
        if !steps.is_crowded(&self.generating) {
            return false;
        }
        self.foretell();
        let Some(steps) = &self.steps else {
            return false;
        };
        let chosen = steps.choose(&self.generating);
        for (slot, need) in needs.iter_mut().enumerate() {
            if generates(need).is_some() && !chosen.contains(&slot) {
                *need = None;
            }
        }
        true
    }

    /// Finds what those that generate will pick next, where the model knows.
    fn foretell(&mut self) {
        let Self {
            model,
            slots,
            workspace,
            steps: Some(steps),
            generating,
            ..
        } = self
        else {
            return;
        };
        if !(self.foretells && steps.wants_picks()) {
            return;
        }
        let (mut batch, mut places) = (Vec::new(), Vec::new());
        for (index, (slot, since)) in slots.iter_mut().zip(&*generating).enumerate() {
            // Looking ahead takes no memory that has not been taken.
            if since.is_some()
                && slot.bytes_to_take(1) == 0
                && let Some((sequence, weak)) = slot.sequences(1)
            {
                for sequence in std::iter::once(sequence).chain(weak) {
                    batch.push(sequence);
                    places.push(index);
                }
            }
        }
        if batch.is_empty() {
            return;
        }
        let mut notes = steps.note(&places);
        let (model, memory) = (&**model, &mut *workspace);
        let told = guarded(|| model.foretold(&mut batch, memory, &mut notes));
        // What is wrong with a sequence is told when it is computed.
        self.foretells = !matches!(told, None | Some(Ok(false)));
    }

    /// Takes note of a step in which not all took part.
    fn took(&mut self, pieces: &[usize]) {
        if let Some(steps) = &mut self.steps {
            let taken = steps.took(&self.generating, pieces);
            // A pass that reads prompts is not watched for it.
            if taken.0 > 0 && pieces.iter().all(|n| *n <= 1) {
                self.metrics.step(taken);
            }
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
        if let Ok(lane) = self.rooms.lane(&*self.model) {
            self.slots[slot].renew(lane);
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
            steps,
            ..
        } = self;
        let vocab = model.info().vocab_size;
        let mut batch: Vec<Sequence<'_>> = Vec::new();
        // Slots of the batch, and values of logits that their sequences get.
        let mut members = Vec::new();
        let (mut wanted, mut places) = (Vec::new(), Vec::new());
        for (index, (slot, n)) in slots.iter_mut().zip(pieces).enumerate() {
            let wants = slot.watches(*n);
            if *n > 0
                && let Some((sequence, weak)) = slot.sequences(*n)
            {
                wanted.push(wants);
                places.push(index);
                let n_weak = weak.as_ref().map(|weak| weak.n_logits() * vocab);
                members.push(Member {
                    slot: index,
                    first: batch.len(),
                    n: sequence.n_logits() * vocab,
                    n_weak,
                });
                batch.push(sequence);
                if let Some(weak) = weak {
                    // What the weaker experts do is not told.
                    wanted.push(false);
                    places.push(index);
                    batch.push(weak);
                }
            }
        }
        let is_watched = picks.begin();
        // Watching a prompt would cost rows of the last layer that nobody needs.
        let steps = steps.as_mut().filter(|_| pieces.iter().all(|n| *n <= 1));
        let notes = steps.map(|steps| steps.note(&places));
        let mut watch = Watch::new(picks, &wanted, notes);
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
        let mut seen: Vec<_> = watch.seen().collect();
        if is_watched {
            self.metrics.experts(picks.summary());
        }
        let d_model = model.info().d_model;
        // Vectors are in the same memory as logits, so they come after them.
        let (mut row, mut vectors) = (0, Vec::new());
        for member in &members {
            let slot = &mut slots[member.slot];
            let (rows, rest) = logits.split_at_mut(member.n);
            let (weak, rest) = rest.split_at_mut(member.n_weak.unwrap_or(0));
            logits = rest;
            let first = row;
            row += (member.n + weak.len()) / vocab.max(1);
            if slot.embeds() {
                let values = first * d_model..(first + member.n / vocab.max(1)) * d_model;
                vectors.push((member.slot, values));
                continue;
            }
            let layers = seen.get_mut(member.first).map(std::mem::take);
            let mut desk = Desk {
                model: &**model,
                scratch,
                layers: layers.unwrap_or_default(),
            };
            slot.advance(rows, weak, &mut desk, self.now);
        }
        for (slot, values) in vectors {
            slots[slot].embed(&workspace.hidden()[values], d_model, self.now);
        }
        for member in &members {
            slots[member.slot].publish(&mut self.rooms, self.now);
        }
        Ok(())
    }
}

/// `None` for a panic. What `work` changed is put in order, or thrown away, by whoever calls this.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

fn trouble(error: &EngineError, members: &[Member]) -> Trouble {
    match error {
        EngineError::InBatch { sequence, source } => {
            match members.iter().rfind(|member| member.first <= *sequence) {
                Some(member) => Trouble::Slot(member.slot, failed(source)),
                None => Trouble::All(failed(error)),
            }
        }
        error => Trouble::All(failed(error)),
    }
}
