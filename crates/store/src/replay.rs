//! What a store would have done with a recorded routing: hits and bytes of every policy at every budget, and of
//! Belady's optimum, which none can beat.

use crate::cache::{Cache, CacheCounts, Capacity, Placed};
use crate::expert::{ExpertId, Now};
use crate::per_expert::PerExpert;
use crate::policies::{Belady, PolicyKind};
use crate::policy::Policy;
use crate::predictors::Predictor;
use crate::recording::{Passing, Recording, Step};

/// Bytes of every expert, and the sizes that there are.
#[derive(Clone, Debug)]
pub struct ExpertSizes {
    classes: PerExpert<usize>,
    /// Bytes of an expert and number of experts of every size, the largest first.
    sizes: Vec<(usize, usize)>,
}

impl ExpertSizes {
    /// The sizes that `bytes_of` gives for the experts of a model: 0 for one that a layer lacks, which nobody picks.
    pub fn new(n_layers: usize, n_experts: usize, bytes_of: impl Fn(ExpertId) -> usize) -> Self {
        let ids = (0..n_layers as u16)
            .flat_map(|layer| (0..n_experts as u16).map(move |expert| ExpertId { layer, expert }));
        let mut sizes: Vec<(usize, usize)> = Vec::new();
        for id in ids.clone() {
            let n_bytes = bytes_of(id);
            if n_bytes == 0 {
                continue;
            }
            match sizes.iter_mut().find(|(size, _)| *size == n_bytes) {
                Some((_, n)) => *n += 1,
                None => sizes.push((n_bytes, 1)),
            }
        }
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        let mut classes = PerExpert::new(n_layers, n_experts, 0);
        for id in ids {
            let n_bytes = bytes_of(id);
            let class = sizes.iter().position(|&(size, _)| size == n_bytes);
            classes[id] = class.unwrap_or(0);
        }
        Self { classes, sizes }
    }

    /// Bytes of an expert.
    pub fn bytes(&self, id: ExpertId) -> usize {
        self.sizes[self.classes[id]].0
    }

    /// Bytes of all experts.
    pub fn total(&self) -> u64 {
        let bytes = |&(size, n): &(usize, usize)| size as u64 * n as u64;
        self.sizes.iter().map(bytes).sum()
    }

    /// Bytes of an expert and number of experts of every size, the largest first.
    pub fn sizes(&self) -> &[(usize, usize)] {
        &self.sizes
    }
}

/// What was wanted, and what it cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tokens.
    pub n_tokens: u64,
    /// Experts wanted: one per layer, pass and expert.
    pub lookups: u64,
    /// Of these, how many were cached.
    pub hits: u64,
    /// Bytes of those that were not.
    pub bytes_read: u64,
}

impl Tally {
    /// Share of what was wanted that was cached, 0 to 1; 0 when nothing was wanted.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / self.lookups.max(1) as f64
    }

    /// Bytes read per token.
    pub fn bytes_per_token(&self) -> f64 {
        self.bytes_read as f64 / self.n_tokens.max(1) as f64
    }
}

/// What one policy did with one budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Tokens that came one by one.
    pub decode: Tally,
    /// Tokens of prompts, in passes of many.
    pub prompt: Tally,
    /// What happened in the cache.
    pub counts: CacheCounts,
    /// Experts that fit.
    pub n_slots: usize,
}

/// What reading experts before they are wanted would have brought, over all tokens that came one by one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadAhead {
    /// Experts that were read ahead.
    pub n_reads: u64,
    /// Of these, how many were then wanted: misses that the disk had begun with.
    pub n_useful: u64,
    /// Bytes of the others.
    pub bytes_wasted: u64,
}

/// A recording, the sizes of its experts, and how its tokens came.
#[derive(Clone, Copy, Debug)]
pub struct Replay<'a> {
    recording: &'a Recording,
    sizes: &'a ExpertSizes,
    passing: Passing,
}

impl<'a> Replay<'a> {
    /// `sizes` are those of the model that was recorded.
    pub fn new(recording: &'a Recording, sizes: &'a ExpertSizes, passing: Passing) -> Self {
        Self {
            recording,
            sizes,
            passing,
        }
    }

    /// A cache of `budget` bytes under a policy, empty at the start. As in a store, what the current step uses keeps
    /// its slot.
    pub fn run(&self, kind: PolicyKind, budget: u64) -> Outcome {
        self.watched(kind, budget, |_, _| ())
    }

    /// [`Replay::run`] under a policy that has no name.
    pub fn run_with(&self, policy: Box<dyn Policy>, budget: u64) -> Outcome {
        let capacities = Capacity::divide(budget, self.sizes.sizes());
        self.run_policy(policy, capacities, true, |_, _| ())
    }

    /// The most that any policy could have hit with `budget` bytes. Nothing is pinned, which only helps it.
    pub fn bound(&self, budget: u64) -> Outcome {
        let (n_layers, n_experts) = self.shape();
        let mut policy = Belady::new(n_layers, n_experts);
        self.recording
            .uses(self.passing, |id, now| policy.foresee(id, now));
        let capacities = Capacity::divide(budget, self.sizes.sizes());
        self.run_policy(Box::new(policy), capacities, false, |_, _| ())
    }

    /// A cache of `budget` bytes under Belady's rule, where the routing of `n_tokens` tokens is known before the first of
    /// them is computed: that of a model whose router does not wait for the layers. What is not known goes by recency.
    pub fn ahead(&self, budget: u64, n_tokens: u64) -> Outcome {
        let (n_layers, n_experts) = self.shape();
        let mut future = Vec::new();
        self.recording
            .uses(self.passing, |id, now| future.push((id, now)));
        let mut future = future.into_iter().peekable();
        let foresee = |cache: &mut Cache, step: Step<'_>| {
            let now = step.now;
            let known =
                |(_, then): &(ExpertId, Now)| then.token < now.token.saturating_add(n_tokens);
            while let Some((id, then)) = future.next_if(known) {
                cache.foresee(id, then);
            }
        };
        let policy = Box::new(Belady::new(n_layers, n_experts));
        let capacities = Capacity::divide(budget, self.sizes.sizes());
        self.run_policy(policy, capacities, true, foresee)
    }

    /// [`Replay::run`], and before every layer of a token that comes by itself, `predictor` names up to `most` experts
    /// that are not cached. What they bring is not in the outcome.
    pub fn reading_ahead(
        &self,
        kind: PolicyKind,
        budget: u64,
        predictor: &mut dyn Predictor,
        most: usize,
    ) -> (Outcome, ReadAhead) {
        let (mut ahead, mut ranked) = (ReadAhead::default(), Vec::new());
        let recording = self.recording;
        let outcome = self.watched(kind, budget, |cache, step| {
            let (layer, n_layers) = (step.now.layer, recording.n_layers());
            let first = step.now.token as usize;
            if step.is_prompt {
                // Predictors see token by token what went through layer by layer.
                let is_last = usize::from(layer) + 1 == n_layers;
                let tokens = first..first + step.n_tokens as usize;
                for token in tokens.filter(|_| is_last) {
                    for layer in 0..n_layers {
                        predictor.observe(layer as u16, recording.picks(layer, token));
                    }
                }
                return;
            }
            predictor.rank(layer, &mut ranked);
            let is_missing = |expert: u16| cache.slot_of(ExpertId { layer, expert }).is_none();
            let guesses = ranked.iter().filter(|&&expert| is_missing(expert));
            let picks = recording.picks(usize::from(layer), first);
            for &expert in guesses.take(most) {
                ahead.n_reads += 1;
                if picks.contains(&expert) {
                    ahead.n_useful += 1;
                } else {
                    ahead.bytes_wasted += self.sizes.bytes(ExpertId { layer, expert }) as u64;
                }
            }
            predictor.observe(layer, picks);
        });
        (outcome, ahead)
    }

    fn watched(
        &self,
        kind: PolicyKind,
        budget: u64,
        before_each: impl FnMut(&mut Cache, Step<'_>),
    ) -> Outcome {
        let capacities = Capacity::divide(budget, self.sizes.sizes());
        let n_slots = capacities.iter().map(|capacity| capacity.n_slots).sum();
        let (n_layers, n_experts) = self.shape();
        let policy = kind.make(n_layers, n_experts, n_slots);
        self.run_policy(policy, capacities, true, before_each)
    }

    fn shape(&self) -> (usize, usize) {
        (self.recording.n_layers(), self.recording.n_experts())
    }

    fn run_policy(
        &self,
        policy: Box<dyn Policy>,
        capacities: Vec<Capacity>,
        pins: bool,
        mut before_each: impl FnMut(&mut Cache, Step<'_>),
    ) -> Outcome {
        let class_of = |id| self.sizes.classes[id];
        let mut run = Run {
            cache: Cache::new(capacities, class_of, self.shape(), policy),
            sizes: self.sizes,
            pins,
            pinned: Vec::new(),
            step: 0,
            missed: Vec::new(),
        };
        run.pinned.resize(run.cache.n_slots(), 0);
        let mut outcome = Outcome::default();
        self.recording.steps(self.passing, |step| {
            let tally = if step.is_prompt {
                &mut outcome.prompt
            } else {
                &mut outcome.decode
            };
            before_each(&mut run.cache, step);
            run.step(step, tally);
        });
        Outcome {
            counts: run.cache.counts(),
            n_slots: run.cache.n_slots(),
            ..outcome
        }
    }
}

/// One cache on its way through a recording.
struct Run<'a> {
    cache: Cache,
    sizes: &'a ExpertSizes,
    pins: bool,
    /// The last step that used each slot; steps are counted from 1.
    pinned: Vec<u64>,
    step: u64,
    missed: Vec<ExpertId>,
}

impl Run<'_> {
    /// All lookups of a layer, then places for what was missed, as a store does it.
    fn step(&mut self, step: Step<'_>, tally: &mut Tally) {
        self.step += 1;
        if step.now.layer == 0 {
            tally.n_tokens += u64::from(step.n_tokens);
        }
        for &(expert, n_tokens) in step.uses {
            let layer = step.now.layer;
            let id = ExpertId { layer, expert };
            tally.lookups += 1;
            match self.cache.lookup(id, n_tokens, step.now) {
                Some(slot) => {
                    tally.hits += 1;
                    self.pinned[slot] = self.step;
                }
                None => {
                    tally.bytes_read += self.sizes.bytes(id) as u64;
                    self.missed.push(id);
                }
            }
        }
        for id in self.missed.drain(..) {
            let (pins, pinned, step_now) = (self.pins, &self.pinned, self.step);
            let is_pinned = |slot: usize| pins && pinned[slot] == step_now;
            match self.cache.place(id, step.now, &is_pinned) {
                Placed::Free(slot) | Placed::Evicted(slot, _) => self.pinned[slot] = self.step,
                Placed::Refused => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictors::{Exact, Previous};
    use proptest::prelude::*;

    /// Tokens of one layer with one pick each, and experts of one byte.
    fn one_layer(experts: &[u16]) -> (Recording, ExpertSizes) {
        let mut recording = Recording::new(1, 8);
        let picks: Vec<&[u16]> = experts.chunks(1).collect();
        assert!(recording.push_sequence(&[picks]));
        (recording, ExpertSizes::new(1, 8, |_| 1))
    }

    #[test]
    fn the_golden_trace_is_reproduced() {
        let (recording, sizes) = one_layer(&[0, 1, 2, 0, 3, 1, 4, 0, 2, 1, 3, 0, 4, 2, 1, 0]);
        let replay = Replay::new(&recording, &sizes, Passing::default());
        for (budget, hits) in [(2, 0), (3, 1), (4, 6), (5, 11)] {
            let outcome = replay.run(PolicyKind::Lru, budget);
            let expected = Tally {
                n_tokens: 16,
                lookups: 16,
                hits,
                bytes_read: 16 - hits,
            };
            assert_eq!(outcome.decode, expected, "{budget}");
            assert_eq!(outcome.prompt, Tally::default());
            assert_eq!(outcome.counts.evictions, 16 - hits - budget);
            assert!(replay.bound(budget).decode.hits >= hits);
        }
    }

    #[test]
    fn a_prompt_reads_an_expert_once_per_layer() {
        let (recording, sizes) = one_layer(&[1, 1, 2, 1, 1, 3]);
        let passing = Passing {
            n_prompt: 4,
            chunk: 4,
        };
        let outcome = Replay::new(&recording, &sizes, passing).run(PolicyKind::Lru, 8);
        let prompt = Tally {
            n_tokens: 4,
            lookups: 2,
            hits: 0,
            bytes_read: 2,
        };
        let decode = Tally {
            n_tokens: 2,
            lookups: 2,
            hits: 1,
            bytes_read: 1,
        };
        assert_eq!((outcome.prompt, outcome.decode), (prompt, decode));
        assert_eq!(outcome.decode.hit_rate(), 0.5);
        assert_eq!(outcome.prompt.bytes_per_token(), 0.5);
    }

    #[test]
    fn a_long_prompt_finds_as_much_as_fits() {
        // Ten passes of eight tokens, each of which wants all 16 experts twice; 8 fit.
        let mut recording = Recording::new(4, 4);
        let tokens: Vec<&[u16]> = [0, 0, 1, 1, 2, 2, 3, 3].chunks(1).collect();
        assert!(recording.push_sequence(&[
            tokens.repeat(10),
            tokens.repeat(10),
            tokens.repeat(10),
            tokens.repeat(10)
        ]));
        let sizes = ExpertSizes::new(4, 4, |_| 1);
        let passing = Passing {
            n_prompt: 80,
            chunk: 8,
        };
        let replay = Replay::new(&recording, &sizes, passing);
        assert_eq!(replay.run(PolicyKind::Lru, 8).prompt.hits, 0);
        assert_eq!(replay.bound(8).prompt.hits, 72);
        let hits = replay.run(PolicyKind::Lfu, 8).prompt.hits;
        assert!(hits >= 64, "{hits} of 72");
    }

    #[test]
    fn a_step_does_not_evict_what_it_uses() {
        let mut recording = Recording::new(1, 4);
        assert!(recording.push_sequence(&[vec![&[0, 1, 2], &[0, 1, 3]]]));
        let sizes = ExpertSizes::new(1, 4, |_| 10);
        let replay = Replay::new(&recording, &sizes, Passing::default());
        // Two slots hold 0 and 1; 2 and then 3 find no slot that is not in use.
        let outcome = replay.run(PolicyKind::Lru, 25);
        assert_eq!((outcome.decode.hits, outcome.counts.refused), (2, 2));
        assert_eq!((outcome.n_slots, outcome.decode.bytes_read), (2, 40));
    }

    #[test]
    fn sizes_have_slots_of_their_own() {
        let sizes = ExpertSizes::new(2, 2, |id| if id.layer == 0 { 2 } else { 6 });
        assert_eq!((sizes.total(), sizes.sizes()), (16, &[(6, 2), (2, 2)][..]));
        let mut recording = Recording::new(2, 2);
        for _ in 0..2 {
            assert!(recording.push_sequence(&[vec![&[0], &[1]], vec![&[1], &[1]]]));
        }
        let replay = Replay::new(&recording, &sizes, Passing::default());
        // Half of all: one slot of each size.
        let outcome = replay.run(PolicyKind::Lru, 8);
        assert_eq!(
            (outcome.decode.hits, outcome.decode.bytes_read),
            (3, 4 * 2 + 6)
        );
    }

    #[test]
    fn knowing_the_next_tokens_is_worth_as_much_as_they_are() {
        // A cycle of three through two slots: recency always evicts what comes next.
        let (recording, sizes) = one_layer(&[0, 1, 2].repeat(10));
        let replay = Replay::new(&recording, &sizes, Passing::default());
        let hits = |outcome: Outcome| outcome.decode.hits;
        assert_eq!(hits(replay.run(PolicyKind::Lru, 2)), 0);
        assert_eq!(hits(replay.ahead(2, 1)), 0);
        assert_eq!(hits(replay.bound(2)), 18);
        assert_eq!(hits(replay.ahead(2, 4)), 18);
        assert_eq!(hits(replay.ahead(2, u64::MAX)), 18);
    }

    #[test]
    fn reading_ahead_counts_what_was_right_and_what_was_not() {
        let (recording, sizes) = one_layer(&[0, 0, 1, 1, 1, 2]);
        let replay = Replay::new(&recording, &sizes, Passing::default());
        let mut previous = Previous::new(1);
        // Without a cache: right at the second 0 and at two of the 1.
        let (outcome, ahead) = replay.reading_ahead(PolicyKind::Lru, 0, &mut previous, 2);
        let expected = ReadAhead {
            n_reads: 5,
            n_useful: 3,
            bytes_wasted: 2,
        };
        assert_eq!((outcome.decode.bytes_read, ahead), (6, expected));
        // With room for one, what came before is there already.
        let (_, ahead) = replay.reading_ahead(PolicyKind::Lru, 1, &mut Previous::new(1), 2);
        assert_eq!(ahead, ReadAhead::default());
    }

    #[test]
    fn reading_ahead_of_a_router_that_does_not_wait_is_exact() {
        let mut recording = Recording::new(2, 8);
        let tokens = [[0, 5], [6, 1], [3, 2], [5, 7]];
        let picks: Vec<&[u16]> = tokens.iter().map(|picks| &picks[..]).collect();
        assert!(recording.push_sequence(&[picks.clone(), picks]));
        let sizes = ExpertSizes::new(2, 8, |_| 1);
        let passing = Passing {
            n_prompt: 1,
            chunk: 512,
        };
        let replay = Replay::new(&recording, &sizes, passing);
        let mut exact = Exact::new(2);
        for layer in 0..2 {
            for picks in &tokens {
                exact.give(layer, picks);
            }
        }
        let (outcome, ahead) = replay.reading_ahead(PolicyKind::Lfu, 4, &mut exact, 2);
        let missed = outcome.decode.lookups - outcome.decode.hits;
        assert_eq!((ahead.n_reads, ahead.n_useful), (missed, missed));
        assert_eq!(ahead.bytes_wasted, 0);
    }

    proptest! {
        #[test]
        fn no_policy_beats_the_bound(
            tokens in prop::collection::vec(prop::collection::btree_set(0_u16..8, 2), 2..80),
            budget in 0_u64..17, n_prompt in 0_usize..20,
        ) {
            let tokens: Vec<Vec<u16>> = tokens.into_iter().map(Vec::from_iter).collect();
            let halves = tokens.chunks_exact(tokens.len() / 2).take(2);
            let picks: Vec<_> = halves.map(|half| half.iter().map(Vec::as_slice).collect()).collect();
            let mut recording = Recording::new(2, 8);
            prop_assert!(recording.push_sequence(&picks));
            let sizes = ExpertSizes::new(2, 8, |_| 1);
            let replay = Replay::new(&recording, &sizes, Passing { n_prompt, chunk: 7 });
            let bound = replay.bound(budget);
            for kind in PolicyKind::all() {
                let outcome = replay.run(kind, budget);
                let hits = |outcome: &Outcome| outcome.decode.hits + outcome.prompt.hits;
                prop_assert!(hits(&outcome) <= hits(&bound), "{}", kind);
                prop_assert_eq!(outcome.decode.lookups, bound.decode.lookups);
                if budget == 16 {
                    prop_assert_eq!(hits(&outcome), hits(&bound), "all fits: {}", kind);
                }
            }
        }
    }
}
