//! What a store changes while it works: who is where, what is being read, what is expected.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::ahead::{Ahead, FEW, Look};
use crate::cache::{Cache, Placed};
use crate::error::StoreError;
use crate::expert::{ExpertId, Now};
use crate::form::Form;
use crate::reader::{OpenFile, Reader};
use crate::staging::Staging;
use crate::stats::StoreStats;

/// How long to wait for a completion before looking again; a disk that answers later than this is still waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// Turns without a missing expert after which none is expected.
const QUIET: usize = 256;

/// What changes.
pub(crate) struct Inner<F: Form> {
    pub(crate) files: Vec<OpenFile>,
    pub(crate) reader: Box<dyn Reader>,
    pub(crate) staging: Staging,
    pub(crate) cache: Cache,
    /// The cache's slots; memory is taken when a slot is first used.
    pub(crate) slots: Vec<Slot<F>>,
    /// Slots for what is used once: `transit` of each size class.
    pub(crate) transit: Vec<Slot<F>>,
    pub(crate) n_transit: usize,
    pub(crate) now: Now,
    pub(crate) n_tokens_of_pass: u64,
    /// Wanted experts of the pass, in the order in which they come: first those that are in memory.
    pub(crate) order: Vec<u16>,
    /// Where each of them is.
    pub(crate) places: Vec<Place>,
    /// Of `order`, those that were in memory at the start.
    pub(crate) n_hits: usize,
    /// Turns in a row in which nothing was missing.
    pub(crate) n_quiet: usize,
    /// Of `order`, those that are in memory or have been asked for.
    pub(crate) n_asked: usize,
    pub(crate) ahead: Ahead,
    /// What is to be read ahead, best first.
    pub(crate) expected: VecDeque<ExpertId>,
    /// What every layer of the pass will want, where that is known before it and acted on.
    pub(crate) foreseen: Vec<Vec<u16>>,
    pub(crate) pieces: Vec<Bytes>,
    pub(crate) stats: StoreStats,
}

/// Memory with the expert that was last made in it.
#[derive(Debug)]
pub(crate) struct Slot<F: Form> {
    pub(crate) memory: Option<F::Memory>,
    pub(crate) expert: Option<F::Expert>,
    pub(crate) class: usize,
    pub(crate) in_use: bool,
    /// Whether a later layer of the pass will want what it holds.
    pub(crate) awaited: bool,
}

/// Where a wanted expert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Slot(usize),
    Transit(usize),
    /// Not in memory yet.
    Disk,
}

impl<F: Form> Inner<F> {
    /// Experts of `layer` that are not in memory and for which there are empty slots.
    pub(crate) fn room_for(&self, layer: u16, n_experts: u16) -> Vec<u16> {
        let mut n_free = self.cache.n_free();
        let mut missing = Vec::new();
        for expert in 0..n_experts {
            let id = ExpertId { layer, expert };
            let free = &mut n_free[self.cache.class_of(id)];
            if self.cache.slot_of(id).is_none() && *free > 0 {
                *free -= 1;
                missing.push(expert);
            }
        }
        missing
    }

    pub(crate) fn begin(
        &mut self,
        layer: u16,
        experts: impl Iterator<Item = (u16, u32)>,
        n_tokens: usize,
    ) {
        self.collect(Duration::ZERO);
        if layer <= self.now.layer {
            self.now.token += self.n_tokens_of_pass;
            self.ahead.begin(n_tokens);
        }
        self.n_tokens_of_pass = n_tokens as u64;
        self.now.layer = layer;
        self.expected.clear();
        self.order.clear();
        self.places.clear();
        self.stats.passes += 1;
        for (expert, n) in experts {
            let id = ExpertId { layer, expert };
            self.stats.lookups += 1;
            let place = match self.cache.lookup(id, n, self.now) {
                Some(slot) => {
                    // It must stay until it has been computed.
                    self.slots[slot].in_use = true;
                    self.slots[slot].awaited = false;
                    Place::Slot(slot)
                }
                None => Place::Disk,
            };
            self.order.push(expert);
            self.places.push(place);
        }
        if let Some((next, ranked)) = self.ahead.observe(layer, &self.order, n_tokens) {
            let expected = ranked.iter().map(|expert| ExpertId {
                layer: next,
                expert: *expert,
            });
            self.expected.extend(expected);
        }
        self.expect_foreseen(layer + 1);
        // What is in memory comes first, then what is being read, then the rest in the order of the file.
        let rank = |inner: &Self, at: usize| {
            let id = ExpertId {
                layer,
                expert: inner.order[at],
            };
            match (inner.places[at], inner.staging.of(id)) {
                (Place::Slot(_), _) => 0,
                (_, Some(buffer)) if inner.staging.is_ready(buffer) => 1,
                (_, Some(_)) => 2,
                _ => 3,
            }
        };
        let mut n_ranked = 0;
        for wanted in 0..3 {
            let (from, n) = (n_ranked, self.order.len());
            for at in from..n {
                if rank(self, at) == wanted {
                    self.order[n_ranked..=at].rotate_right(1);
                    self.places[n_ranked..=at].rotate_right(1);
                    n_ranked += 1;
                }
            }
        }
        let hits = self
            .places
            .iter()
            .filter(|place| **place != Place::Disk)
            .count();
        self.stats.hits += hits as u64;
        (self.n_hits, self.n_asked) = (hits, hits);
        self.n_quiet = if hits == self.order.len() {
            self.n_quiet + 1
        } else {
            0
        };
        let Self {
            staging,
            order,
            stats,
            ..
        } = self;
        for expert in &order[hits..] {
            if let Some(buffer) = staging.of(ExpertId {
                layer,
                expert: *expert,
            }) {
                staging.want(buffer);
                stats.read_ahead += 1;
            }
        }
        stats.wasted += staging.forget(|id| id.layer == layer);
    }

    pub(crate) fn mark_cached(&self, layer: u16, is_cached: &mut [bool]) {
        for (expert, is_cached) in (0..).zip(is_cached) {
            *is_cached = self.cache.slot_of(ExpertId { layer, expert }).is_some();
        }
    }

    /// The wanted expert at `at` of the order.
    fn wanted(&self, at: usize) -> ExpertId {
        ExpertId {
            layer: self.now.layer,
            expert: self.order[at],
        }
    }

    /// Asks the reader for as much as there is memory to read into: what the pass wants, then what is expected.
    pub(crate) fn feed(&mut self, form: &F) {
        while self.n_asked < self.order.len() {
            let id = self.wanted(self.n_asked);
            if self.staging.of(id).is_none() {
                let free = self.staging.free().or_else(|| {
                    let reclaimed = self.staging.reclaim();
                    self.stats.wasted += u64::from(reclaimed);
                    self.staging.free()
                });
                let Some(free) = free else { return };
                self.read(form, free, id, true);
            }
            self.n_asked += 1;
        }
        // What may not be wanted waits until the disk has nothing else to do. Prompts and what is certain do not: the disk is
        // to be busy all the time.
        if self.guesses() && self.staging.awaits() {
            return;
        }
        while let Some(id) = self.expected.front().copied() {
            let Some(free) = self.staging.free() else {
                return;
            };
            self.expected.pop_front();
            if self.cache.slot_of(id).is_none() && self.staging.of(id).is_none() {
                self.read(form, free, id, false);
            }
        }
    }

    /// Whether what is expected is a guess about a pass that decodes.
    fn guesses(&self) -> bool {
        self.n_tokens_of_pass <= FEW as u64 && !self.ahead.is_exact()
    }

    fn read(&mut self, form: &F, buffer: usize, id: ExpertId, wanted: bool) {
        let pieces = form.pieces(id);
        self.stats.reads += 1;
        self.stats.bytes_read += pieces
            .iter()
            .map(|piece| piece.range.end - piece.range.start)
            .sum::<u64>();
        self.staging
            .read(buffer, (id, wanted), pieces, &self.files, &mut *self.reader);
    }

    /// Takes completions, waiting up to `timeout` for the first.
    fn collect(&mut self, mut timeout: Duration) {
        while let Some(completion) = self.reader.next(timeout) {
            self.staging.complete(completion, &self.files);
            timeout = Duration::ZERO;
        }
    }

    /// Whether the wanted expert at `at` has been read.
    pub(crate) fn is_ready(&mut self, form: &F, at: usize) -> bool {
        let id = self.wanted(at);
        let ready = |inner: &Self| {
            let buffer = inner.staging.of(id);
            buffer.is_some_and(|buffer| inner.staging.is_ready(buffer))
        };
        if !ready(self) {
            self.collect(Duration::ZERO);
            self.feed(form);
        }
        ready(self)
    }

    /// Waits until the wanted expert at `at` has been read.
    pub(crate) fn wait(&mut self, form: &F, at: usize) {
        let start = Instant::now();
        while !self.is_ready(form, at) {
            self.collect(PATIENCE);
        }
        self.stats.stall += start.elapsed();
    }

    /// Makes the wanted expert at `at`, which has been read, in a slot. False when there is none left for this batch.
    pub(crate) fn make(&mut self, form: &F, at: usize) -> Result<bool, F::Error> {
        let id = self.wanted(at);
        let class = self.cache.class_of(id);
        let first = class * self.n_transit;
        let free = (first..first + self.n_transit).find(|slot| !self.transit[*slot].in_use);
        let Some(free) = free else { return Ok(false) };
        let (slots, now) = (&self.slots, self.now);
        let pinned = |slot: usize| slots[slot].in_use || slots[slot].awaited;
        let placed = self.cache.place(id, now, &pinned);
        let place = match placed {
            Placed::Free(slot) => Place::Slot(slot),
            Placed::Evicted(slot, _) => {
                self.stats.evictions += 1;
                Place::Slot(slot)
            }
            Placed::Refused => {
                self.stats.refused += 1;
                Place::Transit(free)
            }
        };
        if let Err(error) = self.make_in(form, id, place) {
            self.cache.remove(id);
            return Err(error);
        }
        self.places[at] = place;
        Ok(true)
    }

    fn make_in(&mut self, form: &F, id: ExpertId, place: Place) -> Result<(), F::Error> {
        let start = Instant::now();
        let Some(buffer) = self.staging.of(id) else {
            unreachable!("only what has been read is made");
        };
        let slot = match place {
            Place::Slot(slot) => &mut self.slots[slot],
            Place::Transit(slot) => &mut self.transit[slot],
            Place::Disk => unreachable!("a place in memory"),
        };
        slot.expert = None;
        let memory = self.staging.take(buffer, &mut self.pieces, &self.files)?;
        let n_bytes = self.cache.capacities()[slot.class].slot_bytes;
        let made = match &mut slot.memory {
            Some(memory) => form.make(id, &self.pieces, memory),
            none => match form.memory(n_bytes) {
                Some(memory) => form.make(id, &self.pieces, none.insert(memory)),
                None => Err(StoreError::NoMemory { n_bytes }.into()),
            },
        };
        self.pieces.clear();
        self.staging.put(buffer, memory);
        slot.expert = Some(made?);
        slot.in_use = true;
        self.stats.making += start.elapsed();
        Ok(())
    }

    /// The expert at `at` of the order, which is in memory.
    pub(crate) fn expert(&self, at: usize) -> &F::Expert {
        let slot = match self.places[at] {
            Place::Slot(slot) => &self.slots[slot],
            Place::Transit(slot) => &self.transit[slot],
            Place::Disk => unreachable!("experts are used in the batch that they come in"),
        };
        let Some(expert) = &slot.expert else {
            unreachable!("a slot that is in the cache has been made");
        };
        expert
    }

    /// The experts of a batch may make room for others.
    pub(crate) fn release(&mut self, batch: Range<usize>) {
        for place in &self.places[batch] {
            match *place {
                Place::Slot(slot) => self.slots[slot].in_use = false,
                Place::Transit(slot) => self.transit[slot].in_use = false,
                Place::Disk => {}
            }
        }
    }

    /// Expects experts of a later layer, best first, and reads up to `limit` missing ones when nothing else is to be read.
    pub(crate) fn expect(
        &mut self,
        form: &F,
        layer: u16,
        experts: impl Iterator<Item = u16>,
        limit: usize,
    ) {
        let Self {
            cache,
            staging,
            expected,
            ..
        } = self;
        let missing = experts
            .map(|expert| ExpertId { layer, expert })
            .filter(|id| cache.slot_of(*id).is_none() && staging.of(*id).is_none());
        expected.extend(missing.take(limit));
        self.feed(form);
    }

    /// Whether all of a layer's experts are in memory.
    fn is_whole(&self, (layer, n_experts): (u16, u16)) -> bool {
        (0..n_experts).all(|expert| self.cache.slot_of(ExpertId { layer, expert }).is_some())
    }

    /// What to find out about the next layer.
    pub(crate) fn look(&self) -> Look {
        // Where nothing has been missing for a while, there is nothing to read.
        if self.n_quiet > QUIET || self.is_whole(self.ahead.next(self.now.layer)) {
            return Look::Nowhere;
        }
        let n_tokens = self.n_tokens_of_pass as usize;
        self.ahead.look(self.now.layer, n_tokens, self.order.len())
    }

    /// Takes what the router of a later layer said early.
    pub(crate) fn give(&mut self, form: &F, layer: u16, ranked: &[u16]) {
        let limit = self
            .ahead
            .give(layer, ranked, self.n_tokens_of_pass as usize);
        self.expect(form, layer, ranked.iter().copied(), limit);
    }

    /// Ends the pass, whether all was computed or not.
    pub(crate) fn end(&mut self) {
        self.release(0..self.order.len());
        self.staging.want_nothing();
        self.n_asked = self.order.len();
    }
}
