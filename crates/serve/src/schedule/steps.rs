//! Steps: which of the sequences that generate take part in a pass, where a pass takes fewer than there are.
//!
//! Paper: Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design, Cai et al., NeurIPS 2024, arXiv
//! 2410.19123, Algorithm 1 (expert-aware batching).
//! Rule: sequences that pick the same experts go together, so that a step reads fewer experts from disk. The step begins
//! with the sequence that has waited for longest; then the one joins that adds the fewest experts, until the step is full.
//! Differs from the paper, which picks one expert for all layers and empties its queue: here every layer picks, and a
//! sequence is known by its picks in all of them. Those are the ones that it will make where the model's router runs before its
//! layers, and else the ones that it made last. And nobody starves: see [`AGEING`].
//!
//! What is in a pass changes no result, so the choice is free.

use cadre_engine::{ModelInfo, Observer, RoutingEvent};

/// With `c` steps for everybody to have one, who has waited for so many times `c` comes before all who have not, in the order
/// of waiting. So nobody ever waits for more than this plus one times `c` steps.
pub(super) const AGEING: usize = 2;

/// How sequences are chosen for steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StepOrder {
    /// Those that share experts.
    #[default]
    Experts,
    /// In turns, whatever they pick.
    Turns,
}

/// The steps of a server.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions {
    /// The most sequences that generate in one step.
    pub most: usize,
    /// How they are chosen.
    pub order: StepOrder,
}

/// The experts that a sequence picks for a token: a bit for each of every layer; empty where they are not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Picked(Vec<u64>);

impl Picked {
    fn add(&mut self, at: usize) {
        let (word, bit) = (at / 64, at % 64);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << bit;
    }

    fn join(&mut self, other: &Self) {
        self.0.resize(self.0.len().max(other.0.len()), 0);
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word |= other;
        }
    }

    /// Experts that `self` does not have.
    fn n_new(&self, other: &Self) -> u32 {
        let words = other.0.iter().enumerate();
        words
            .map(|(at, word)| (word & !self.0.get(at).unwrap_or(&0)).count_ones())
            .sum()
    }

    fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
}

/// A sequence that generates.
#[derive(Clone, Debug, Default)]
struct Walker {
    /// When its job began, by which it is told from the one before in its slot.
    since: Option<u64>,
    /// Steps since it took part in one.
    waited: usize,
    picked: Picked,
}

/// What is known of the sequences in all slots.
#[derive(Debug)]
pub(super) struct Steps {
    options: StepOptions,
    walkers: Vec<Walker>,
    /// First bit of each layer.
    layers: Vec<Option<usize>>,
}

/// Notes the experts of the tokens of a pass.
pub(super) struct Notes<'a> {
    steps: &'a mut Steps,
    /// The slot of each sequence of the batch.
    slots: &'a [usize],
}

impl Steps {
    pub(super) fn new(info: &ModelInfo, n_slots: usize, options: StepOptions) -> Self {
        let mut layers = vec![None; info.n_layers];
        let mut first = 0;
        for (layer, n) in info.moe_layers.iter().zip(&info.experts_per_layer) {
            if let Some(place) = layers.get_mut(*layer) {
                *place = Some(first);
            }
            first += n + info.n_null;
        }
        Self {
            options,
            walkers: vec![Walker::default(); n_slots],
            layers,
        }
    }

    /// Whether more generate than a step takes, by when the job of each slot began; `None` where none generates.
    pub(super) fn is_crowded(&mut self, generating: &[Option<u64>]) -> bool {
        for (walker, since) in self.walkers.iter_mut().zip(generating) {
            if since.is_some() && walker.since != *since {
                *walker = Walker {
                    since: *since,
                    ..Walker::default()
                };
            }
        }
        generating.iter().flatten().count() > self.options.most
    }

    /// Whether the picks of the next tokens matter.
    pub(super) fn wants_picks(&self) -> bool {
        self.options.order == StepOrder::Experts
    }

    /// The slots that take part in the next step.
    pub(super) fn choose(&self, generating: &[Option<u64>]) -> Vec<usize> {
        let slots = generating.iter().enumerate();
        let mut slots: Vec<usize> = slots
            .filter_map(|(slot, since)| since.map(|_| slot))
            .collect();
        let most = self.options.most.max(1);
        slots.sort_by_key(|slot| std::cmp::Reverse(self.walkers[*slot].waited));
        if self.options.order == StepOrder::Turns {
            slots.truncate(most);
            return slots;
        }
        let overdue = AGEING * slots.len().div_ceil(most);
        let mut left = slots;
        let mut chosen: Vec<usize> = Vec::with_capacity(most);
        let mut all = Picked::default();
        while chosen.len() < most && !left.is_empty() {
            let must = chosen.is_empty() || self.walkers[left[0]].waited >= overdue;
            let next = match must {
                true => 0,
                false => {
                    let cost = |at: &usize| all.n_new(&self.walkers[left[*at]].picked);
                    (0..left.len()).min_by_key(cost).unwrap_or(0)
                }
            };
            let slot = left.remove(next);
            all.join(&self.walkers[slot].picked);
            chosen.push(slot);
        }
        chosen
    }

    /// Takes note of a step: of those that generate, the ones with a piece took part. Returns how many did, how many different
    /// experts they picked, and for how many steps any of them had waited.
    pub(super) fn took(
        &mut self,
        generating: &[Option<u64>],
        pieces: &[usize],
    ) -> (usize, usize, usize) {
        let (mut n, mut longest, mut all) = (0, 0, Picked::default());
        let slots = self.walkers.iter_mut().zip(generating).zip(pieces);
        for ((walker, _), piece) in slots.filter(|((_, since), _)| since.is_some()) {
            if *piece > 0 {
                n += 1;
                longest = longest.max(walker.waited);
                walker.waited = 0;
                all.join(&walker.picked);
            } else {
                walker.waited += 1;
            }
        }
        (n, all.len(), longest)
    }

    /// Forgets the picks of the slots of a batch, and notes new ones.
    pub(super) fn note<'a>(&'a mut self, slots: &'a [usize]) -> Notes<'a> {
        for slot in slots {
            self.walkers[*slot].picked.0.clear();
        }
        Notes { steps: self, slots }
    }
}

impl Observer for Notes<'_> {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let first = self.steps.layers.get(event.layer).copied().flatten();
        let (Some(first), Some(slot)) = (first, self.slots.get(event.sequence)) else {
            return;
        };
        // The last token is the one whose picks those of the next will resemble.
        let Some(last) = event.routing.n_tokens().checked_sub(1) else {
            return;
        };
        let picked = &mut self.steps.walkers[*slot].picked;
        for expert in event.routing.token(last).0 {
            picked.add(first + usize::from(*expert));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(most: usize, order: StepOrder, picks: &[&[usize]]) -> Steps {
        let walker = |picks: &&[usize]| {
            let mut picked = Picked::default();
            picks.iter().for_each(|at| picked.add(*at));
            Walker {
                since: Some(1),
                waited: 0,
                picked,
            }
        };
        Steps {
            options: StepOptions { most, order },
            walkers: picks.iter().map(walker).collect(),
            layers: Vec::new(),
        }
    }

    /// Runs `n` steps in which everybody always picks the same; experts of all steps, and the longest wait.
    fn run(mut steps: Steps, n: usize) -> (usize, usize) {
        let generating = vec![Some(1); steps.walkers.len()];
        let (mut experts, mut longest) = (0, 0);
        for _ in 0..n {
            let chosen = steps.choose(&generating);
            assert_eq!(chosen.len(), steps.options.most);
            let mut pieces = vec![0; generating.len()];
            chosen.iter().for_each(|slot| pieces[*slot] = 1);
            assert_eq!(pieces.iter().sum::<usize>(), chosen.len(), "each once");
            let (_, n_experts, waited) = steps.took(&generating, &pieces);
            experts += n_experts;
            longest = longest.max(waited);
        }
        (experts, longest)
    }

    #[test]
    fn those_that_share_experts_go_together() {
        let (a, b): (&[usize], &[usize]) = (&[1, 2, 70], &[3, 4, 130]);
        let picks = [a, b, a, b, a, b, b, a];
        let (grouped, _) = run(steps(2, StepOrder::Experts, &picks), 40);
        let (turns, waited) = run(steps(2, StepOrder::Turns, &picks), 40);
        assert_eq!(grouped, 40 * 3, "one kind in every step");
        assert!(turns > grouped && waited == 3, "{turns}, {waited}");
    }

    #[test]
    fn nobody_waits_longer_than_ageing_allows() {
        // Seven are alike, one is like nobody, and one step in three would do for all.
        let like: &[usize] = &[1, 2];
        let mut picks = vec![like; 7];
        picks.push(&[100, 101, 102, 103]);
        for most in [1, 2, 3, 5] {
            let round = picks.len().div_ceil(most);
            let (_, longest) = run(steps(most, StepOrder::Experts, &picks), 300);
            assert!(longest <= (AGEING + 1) * round, "{most}: {longest}");
            assert!(longest >= round - 1);
        }
    }

    #[test]
    fn a_new_job_is_not_taken_for_the_one_before() {
        let mut steps = steps(1, StepOrder::Experts, &[&[1], &[2]]);
        steps.walkers[0].waited = 9;
        assert!(steps.is_crowded(&[Some(5), Some(1)]));
        assert_eq!(steps.walkers[0].waited, 0);
        assert_eq!(steps.walkers[0].picked, Picked::default());
        assert!(!steps.is_crowded(&[None, Some(1)]));
    }

    #[test]
    fn experts_are_counted_once() {
        let mut picked = Picked::default();
        [3, 64, 64, 200].iter().for_each(|at| picked.add(*at));
        let mut other = Picked::default();
        [3, 300].iter().for_each(|at| other.add(*at));
        assert_eq!((picked.len(), picked.n_new(&other)), (3, 1));
        picked.join(&other);
        assert_eq!((picked.len(), picked.n_new(&other)), (4, 0));
    }
}
