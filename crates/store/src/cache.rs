//! Which experts are in memory, and in which slots: bookkeeping alone, so that a store and a replay share it.

use std::ops::Range;

use crate::expert::{ExpertId, Now};
use crate::per_expert::PerExpert;
use crate::policy::Policy;

/// Slots of one size. Experts of a layer may differ in size (bit widths); every size has slots of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes of a slot.
    pub slot_bytes: usize,
    /// Slots of this size.
    pub n_slots: usize,
}

/// Where a missed expert goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Into an empty slot.
    Free(usize),
    /// Into the slot of an expert that has been forgotten for it.
    Evicted(usize, ExpertId),
    /// Nowhere: it is used once, from memory that is not the cache's.
    Refused,
}

impl Capacity {
    /// Divides `budget` bytes among sizes, each given as bytes of an expert and number of experts: the same share of
    /// the experts of every size, and what is left over to the sizes that are first. Never more slots than experts.
    pub fn divide(budget: u64, sizes: &[(usize, usize)]) -> Vec<Self> {
        let bytes_of = |&(slot_bytes, n): &(usize, usize)| slot_bytes as u128 * n as u128;
        let total = sizes.iter().map(bytes_of).sum::<u128>().max(1);
        let mut left = u128::from(budget).min(total);
        let share = |n: usize| (n as u128 * left / total) as usize;
        let mut capacities: Vec<Self> = sizes
            .iter()
            .map(|&(slot_bytes, n)| Self {
                slot_bytes,
                n_slots: share(n),
            })
            .collect();
        let used = capacities
            .iter()
            .map(|c| bytes_of(&(c.slot_bytes, c.n_slots)));
        left -= used.sum::<u128>();
        for (capacity, &(slot_bytes, n)) in capacities.iter_mut().zip(sizes) {
            let n_more = left / (slot_bytes as u128).max(1);
            let n_more = (n_more as usize).min(n - capacity.n_slots);
            capacity.n_slots += n_more;
            left -= slot_bytes as u128 * n_more as u128;
        }
        capacities
    }
}

/// What has happened since the cache was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Experts that were wanted: once per layer, pass and expert, however many tokens it served.
    pub lookups: u64,
    /// Of these, how many were cached.
    pub hits: u64,
    /// Experts that were put into a slot.
    pub placed: u64,
    /// Experts that were forgotten for another.
    pub evictions: u64,
    /// Experts that were not worth a slot, or found none.
    pub refused: u64,
}

/// Says of every slot which expert it holds, and asks a policy which one to give up. Nothing is allocated after it has
/// been made.
#[derive(Debug)]
pub struct Cache {
    policy: Box<dyn Policy>,
    /// Index into `capacities` of every expert.
    classes: PerExpert<u32>,
    capacities: Vec<Capacity>,
    /// The slots of every class, numbered over all classes.
    ranges: Vec<Range<usize>>,
    /// Empty slots of every class; the next to be used is the last.
    free: Vec<Vec<usize>>,
    /// Where an expert is, or [`NOWHERE`].
    slots: PerExpert<usize>,
    /// Who is in a slot; means something only where `slots` points back.
    experts: Vec<ExpertId>,
    /// When a slot was used last, in lookups and placements.
    used: Vec<u64>,
    tick: u64,
    /// Worths of a class's slots during an eviction.
    worths: Vec<f64>,
    counts: CacheCounts,
}

/// The slot of what is not cached.
const NOWHERE: usize = usize::MAX;

impl Cache {
    /// An empty cache with `capacities[class_of(expert)]` slots for the experts of a class.
    ///
    /// # Panics
    /// Where `class_of` names a class without a capacity, for an expert of the `n_layers` times `n_experts`. Every
    /// method panics when it is given an expert outside of these.
    pub fn new(
        capacities: Vec<Capacity>,
        class_of: impl Fn(ExpertId) -> usize,
        (n_layers, n_experts): (usize, usize),
        policy: Box<dyn Policy>,
    ) -> Self {
        let mut classes = PerExpert::new(n_layers, n_experts, 0);
        for layer in 0..n_layers as u16 {
            for expert in 0..n_experts as u16 {
                let id = ExpertId { layer, expert };
                let class = class_of(id);
                assert!(class < capacities.len(), "{id:?} is of class {class}");
                classes[id] = class as u32;
            }
        }
        let mut n_slots = 0;
        let mut ranges = Vec::with_capacity(capacities.len());
        for capacity in &capacities {
            ranges.push(n_slots..n_slots + capacity.n_slots);
            n_slots += capacity.n_slots;
        }
        let largest = ranges.iter().map(Range::len).max().unwrap_or(0);
        let nobody = ExpertId {
            layer: 0,
            expert: 0,
        };
        Self {
            policy,
            classes,
            free: ranges
                .iter()
                .map(|range| range.clone().rev().collect())
                .collect(),
            capacities,
            ranges,
            slots: PerExpert::new(n_layers, n_experts, NOWHERE),
            experts: vec![nobody; n_slots],
            used: vec![0; n_slots],
            tick: 0,
            worths: vec![0.0; largest],
            counts: CacheCounts::default(),
        }
    }

    /// The rule of what is worth keeping.
    pub(crate) fn policy(&self) -> &dyn Policy {
        &*self.policy
    }

    /// Slots over all classes.
    pub fn n_slots(&self) -> usize {
        self.experts.len()
    }

    /// Empty slots of every class.
    pub fn n_free(&self) -> Vec<usize> {
        self.free.iter().map(Vec::len).collect()
    }

    /// The slots of every class.
    pub fn capacities(&self) -> &[Capacity] {
        &self.capacities
    }

    /// Which capacity an expert belongs to.
    pub fn class_of(&self, id: ExpertId) -> usize {
        self.classes[id] as usize
    }

    /// The slots of a class, among those of all classes.
    pub fn slots_of_class(&self, class: usize) -> Range<usize> {
        self.ranges[class].clone()
    }

    /// What has happened so far.
    pub fn counts(&self) -> CacheCounts {
        self.counts
    }

    /// The slot of an expert, if it is cached; neither counted nor told to the policy.
    pub fn slot_of(&self, id: ExpertId) -> Option<usize> {
        Some(self.slots[id]).filter(|&slot| slot != NOWHERE)
    }

    /// The expert in a slot.
    pub fn expert_in(&self, slot: usize) -> Option<ExpertId> {
        Some(self.experts[slot]).filter(|&id| self.slots[id] == slot)
    }

    /// Wants an expert for `n_tokens` tokens of the pass at `now`: its slot, if it is cached.
    pub fn lookup(&mut self, id: ExpertId, n_tokens: u32, now: Now) -> Option<usize> {
        self.policy.used(id, n_tokens, now);
        self.counts.lookups += 1;
        let slot = self.slot_of(id)?;
        self.counts.hits += 1;
        self.touch(slot);
        Some(slot)
    }

    /// Tells the policy of a use to come; see [`Policy::foresee`].
    pub fn foresee(&mut self, id: ExpertId, now: Now) {
        self.policy.foresee(id, now);
    }

    /// Finds a slot for an expert that has been looked up at `now`, and not found. Slots of which `pinned` is true stay
    /// as they are. An expert that is there already keeps its slot.
    pub fn place(&mut self, id: ExpertId, now: Now, pinned: &dyn Fn(usize) -> bool) -> Placed {
        if let Some(slot) = self.slot_of(id) {
            return Placed::Free(slot);
        }
        let class = self.class_of(id);
        if let Some(slot) = self.free[class].pop() {
            self.put(id, slot);
            return Placed::Free(slot);
        }
        let Some((slot, least)) = self.least(class, now, pinned) else {
            self.counts.refused += 1;
            return Placed::Refused;
        };
        if !self.policy.admits(self.policy.worth(id, now), least) {
            self.counts.refused += 1;
            return Placed::Refused;
        }
        let old = self.experts[slot];
        self.slots[old] = NOWHERE;
        self.policy.evicted(old);
        self.counts.evictions += 1;
        self.put(id, slot);
        Placed::Evicted(slot, old)
    }

    /// Forgets an expert, because what is in its slot cannot be used; returns the slot, which is empty now.
    pub fn remove(&mut self, id: ExpertId) -> Option<usize> {
        let slot = self.slot_of(id)?;
        self.slots[id] = NOWHERE;
        // Room for all slots of the class was made at the start.
        self.free[self.classes[id] as usize].push(slot);
        self.policy.evicted(id);
        Some(slot)
    }

    /// The slot of the least worthy expert of a class that is full, and its worth.
    fn least(
        &mut self,
        class: usize,
        now: Now,
        pinned: &dyn Fn(usize) -> bool,
    ) -> Option<(usize, f64)> {
        let range = self.ranges[class].clone();
        let worths = &mut self.worths[..range.len()];
        self.policy
            .worths(&self.experts[range.clone()], now, worths);
        let mut least: Option<(usize, f64)> = None;
        for (slot, &worth) in range.zip(worths.iter()) {
            let is_less = least.is_none_or(|(best, least)| {
                worth < least || (worth == least && self.used[slot] < self.used[best])
            });
            if is_less && !pinned(slot) {
                least = Some((slot, worth));
            }
        }
        least
    }

    fn put(&mut self, id: ExpertId, slot: usize) {
        self.slots[id] = slot;
        self.experts[slot] = id;
        self.touch(slot);
        self.counts.placed += 1;
        self.policy.inserted(id);
    }

    fn touch(&mut self, slot: usize) {
        self.tick += 1;
        self.used[slot] = self.tick;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Worth is the expert's number; refuses what is worth less than the least.
    #[derive(Debug)]
    struct ByNumber;

    impl Policy for ByNumber {
        fn used(&mut self, _: ExpertId, _: u32, _: Now) {}

        fn worth(&self, expert: ExpertId, _: Now) -> f64 {
            f64::from(expert.expert)
        }

        fn admits(&self, new: f64, least: f64) -> bool {
            new > least
        }
    }

    fn id(expert: u16) -> ExpertId {
        ExpertId { layer: 0, expert }
    }

    /// Even experts have two slots, odd ones one.
    fn cache() -> Cache {
        let capacity = |n_slots| Capacity {
            slot_bytes: 1,
            n_slots,
        };
        let class_of = |id: ExpertId| usize::from(id.expert % 2);
        Cache::new(
            vec![capacity(2), capacity(1)],
            class_of,
            (1, 10),
            Box::new(ByNumber),
        )
    }

    const NOW: Now = Now { token: 0, layer: 0 };

    #[test]
    fn slots_fill_then_the_least_of_the_same_class_goes() {
        let mut cache = cache();
        let free = |_: usize| false;
        assert_eq!(cache.lookup(id(4), 1, NOW), None);
        assert_eq!(cache.place(id(4), NOW, &free), Placed::Free(0));
        assert_eq!(cache.place(id(2), NOW, &free), Placed::Free(1));
        assert_eq!(cache.place(id(1), NOW, &free), Placed::Free(2));
        assert_eq!(cache.place(id(0), NOW, &free), Placed::Refused);
        assert_eq!(cache.place(id(6), NOW, &free), Placed::Evicted(1, id(2)));
        assert_eq!(cache.place(id(3), NOW, &free), Placed::Evicted(2, id(1)));
        assert_eq!(cache.lookup(id(6), 1, NOW), Some(1));
        assert_eq!(
            (cache.slot_of(id(2)), cache.slot_of(id(4))),
            (None, Some(0))
        );
        assert_eq!(cache.expert_in(2), Some(id(3)));
        let expected = CacheCounts {
            lookups: 2,
            hits: 1,
            placed: 5,
            evictions: 2,
            refused: 1,
        };
        assert_eq!(cache.counts(), expected);
    }

    #[test]
    fn pinned_slots_stay_and_removed_ones_are_used_again() {
        let mut cache = cache();
        for expert in [2, 4] {
            cache.place(id(expert), NOW, &|_| false);
        }
        assert_eq!(cache.place(id(8), NOW, &|_| true), Placed::Refused);
        assert_eq!(
            cache.place(id(8), NOW, &|slot| slot == 0),
            Placed::Evicted(1, id(4))
        );
        assert_eq!(cache.remove(id(2)), Some(0));
        assert_eq!(cache.remove(id(2)), None);
        assert_eq!(cache.expert_in(0), None);
        assert_eq!(cache.place(id(6), NOW, &|_| true), Placed::Free(0));
        assert_eq!(cache.place(id(6), NOW, &|_| true), Placed::Free(0));
    }

    #[test]
    fn a_budget_is_divided_by_the_same_share() {
        let slots = |budget, sizes: &[(usize, usize)]| -> Vec<usize> {
            let capacities = Capacity::divide(budget, sizes);
            capacities.iter().map(|capacity| capacity.n_slots).collect()
        };
        // A third of 10 experts of 6 bytes and 20 of 3: 3 and 6, and one more of 3 from the 4 bytes that are left.
        assert_eq!(slots(40, &[(6, 10), (3, 20)]), [3, 7]);
        assert_eq!(slots(43, &[(6, 10), (3, 20)]), [3, 8]);
        assert_eq!(slots(5, &[(6, 10), (3, 20)]), [0, 1]);
        assert_eq!(slots(0, &[(6, 10)]), [0]);
        assert_eq!(slots(u64::MAX, &[(6, 10), (3, 20)]), [10, 20]);
        assert_eq!(slots(7, &[]), [] as [usize; 0]);
        assert_eq!(slots(7, &[(0, 3)]), [3]);
    }

    #[test]
    fn a_class_without_slots_refuses() {
        let capacities = vec![Capacity {
            slot_bytes: 1,
            n_slots: 0,
        }];
        let mut cache = Cache::new(capacities, |_| 0, (1, 1), Box::new(ByNumber));
        assert_eq!(cache.place(id(0), NOW, &|_| false), Placed::Refused);
        assert_eq!(cache.lookup(id(0), 1, NOW), None);
    }
}
