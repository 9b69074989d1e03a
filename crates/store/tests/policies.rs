//! What must hold of every policy, and what Belady's must reach, on arbitrary accesses.

use std::collections::HashSet;

use cadre_store::policies::{Belady, Lru};
use cadre_store::{Cache, Capacity, ExpertId, Now, Placed, Policy, PolicyKind};
use proptest::prelude::*;

/// The golden trace of published hit counts: LRU 0, 1, 6 and Belady 4, 7, 9 with 2, 3, 4 slots.
const GOLDEN: [u16; 16] = [0, 1, 2, 0, 3, 1, 4, 0, 2, 1, 3, 0, 4, 2, 1, 0];

type Access = (ExpertId, Now);

/// One layer, a token per access.
fn one_layer(experts: &[u16]) -> Vec<Access> {
    let access = |(token, &expert): (usize, &u16)| {
        let now = Now {
            token: token as u64,
            layer: 0,
        };
        (ExpertId { layer: 0, expert }, now)
    };
    experts.iter().enumerate().map(access).collect()
}

/// Hits of a cache whose slots are all of one size, in which nothing is pinned.
fn hits(policy: Box<dyn Policy>, accesses: &[Access], n_slots: usize, n_layers: usize) -> u64 {
    let capacity = Capacity {
        slot_bytes: 1,
        n_slots,
    };
    let mut cache = Cache::new(vec![capacity], |_| 0, (n_layers, 16), policy);
    for &(id, now) in accesses {
        if cache.lookup(id, 1, now).is_none() {
            cache.place(id, now, &|_| false);
        }
    }
    cache.counts().hits
}

fn belady(accesses: &[Access], n_layers: usize) -> Box<dyn Policy> {
    Box::new(Belady::with_future(n_layers, 16, accesses.iter().copied()))
}

/// Belady's rule where every missed expert must be cached.
#[derive(Debug)]
struct Forced(Box<dyn Policy>);

impl Policy for Forced {
    fn used(&mut self, expert: ExpertId, n_tokens: u32, now: Now) {
        self.0.used(expert, n_tokens, now);
    }

    fn worth(&self, expert: ExpertId, now: Now) -> f64 {
        self.0.worth(expert, now)
    }
}

/// LRU as a list with the newest at the end: the obvious, slow twin.
fn lru_plain(accesses: &[u16], n_slots: usize) -> u64 {
    let (mut cache, mut hits): (Vec<u16>, u64) = (Vec::new(), 0);
    for &expert in accesses {
        if let Some(at) = cache.iter().position(|&other| other == expert) {
            cache.remove(at);
            hits += 1;
        } else if n_slots == 0 {
            continue;
        } else if cache.len() == n_slots {
            cache.remove(0);
        }
        cache.push(expert);
    }
    hits
}

/// The best that any policy can do, by trying all: every victim, and (where allowed) none.
fn best(accesses: &[u16], cache: &[u16], n_slots: usize, bypass: bool) -> u64 {
    let Some((&expert, rest)) = accesses.split_first() else {
        return 0;
    };
    if cache.contains(&expert) {
        return 1 + best(rest, cache, n_slots, bypass);
    }
    if cache.len() < n_slots {
        return best(rest, &[cache, &[expert]].concat(), n_slots, bypass);
    }
    let replaced = (0..cache.len()).map(|victim| {
        let mut cache = cache.to_vec();
        cache[victim] = expert;
        best(rest, &cache, n_slots, bypass)
    });
    let bypassed = bypass.then(|| best(rest, cache, n_slots, bypass));
    replaced.chain(bypassed).max().unwrap_or(0)
}

#[test]
fn the_golden_trace_is_reproduced() {
    let accesses = one_layer(&GOLDEN);
    for (n_slots, lru, forced) in [(2, 0, 4), (3, 1, 7), (4, 6, 9)] {
        let lru_hits = hits(Box::new(Lru::new(1, 16)), &accesses, n_slots, 1);
        assert_eq!(lru_hits, lru, "LRU, {n_slots} slots");
        let must_cache = Box::new(Forced(belady(&accesses, 1)));
        let forced_hits = hits(must_cache, &accesses, n_slots, 1);
        assert_eq!(forced_hits, forced, "Belady, {n_slots} slots");
        let free = hits(belady(&accesses, 1), &accesses, n_slots, 1);
        let bypass = best(&GOLDEN, &[], n_slots, true);
        assert_eq!(free, bypass, "Belady with bypass, {n_slots} slots");
        assert!(free >= forced);
    }
}

/// Passes of several layers, each with a set of experts.
fn passes(n_layers: u16) -> impl Strategy<Value = Vec<Access>> {
    let set = prop::collection::btree_set(0_u16..16, 1..5);
    prop::collection::vec(set, 0..120).prop_map(move |sets| {
        let mut accesses = Vec::new();
        for (step, experts) in sets.into_iter().enumerate() {
            let layer = step as u16 % n_layers;
            let now = Now {
                token: step as u64 / u64::from(n_layers),
                layer,
            };
            let id = |expert| ExpertId { layer, expert };
            accesses.extend(experts.into_iter().map(|expert| (id(expert), now)));
        }
        accesses
    })
}

proptest! {
    #[test]
    fn lru_and_belady_are_their_obvious_twins(
        accesses in prop::collection::vec(0_u16..16, 0..200), n_slots in 0_usize..9,
    ) {
        let lru = hits(Box::new(Lru::new(1, 16)), &one_layer(&accesses), n_slots, 1);
        prop_assert_eq!(lru, lru_plain(&accesses, n_slots));
    }

    #[test]
    fn belady_is_optimal(accesses in prop::collection::vec(0_u16..5, 0..10), n_slots in 1_usize..4) {
        let timed = one_layer(&accesses);
        let free = hits(belady(&timed, 1), &timed, n_slots, 1);
        prop_assert_eq!(free, best(&accesses, &[], n_slots, true));
        let forced = hits(Box::new(Forced(belady(&timed, 1))), &timed, n_slots, 1);
        prop_assert_eq!(forced, best(&accesses, &[], n_slots, false));
    }

    #[test]
    fn nothing_beats_belady(accesses in passes(3), n_slots in 0_usize..40) {
        let bound = hits(belady(&accesses, 3), &accesses, n_slots, 3);
        for kind in PolicyKind::all() {
            let found = hits(kind.make(3, 16, n_slots), &accesses, n_slots, 3);
            prop_assert!(found <= bound, "{kind}: {found} of {bound}");
        }
    }

    /// Two sizes of experts, and some slots in use whenever one is looked for.
    #[test]
    fn slots_are_never_shared_nor_taken_while_pinned(
        accesses in passes(3), sizes in (0_usize..9, 0_usize..9), modulus in 1_usize..5,
    ) {
        let class_of = |id: ExpertId| usize::from((id.layer + id.expert) % 2);
        let ranges = [0..sizes.0, sizes.0..sizes.0 + sizes.1];
        let capacities = [sizes.0, sizes.1].map(|n_slots| Capacity { slot_bytes: 1, n_slots });
        let belady = (belady(&accesses, 3), "belady");
        let others = PolicyKind::all().map(|kind| (kind.make(3, 16, sizes.0 + sizes.1), kind.name()));
        for (policy, name) in others.into_iter().chain([belady]) {
            let mut cache = Cache::new(capacities.to_vec(), class_of, (3, 16), policy);
            // The twin: what must be in each slot.
            let mut slots = vec![None; cache.n_slots()];
            for &(id, now) in &accesses {
                let expected = slots.iter().position(|&held| held == Some(id));
                prop_assert_eq!(cache.lookup(id, 1, now), expected, "{}", name);
                if expected.is_some() {
                    continue;
                }
                let pinned = |slot: usize| slot.is_multiple_of(modulus);
                match cache.place(id, now, &pinned) {
                    Placed::Free(slot) => {
                        prop_assert!(ranges[class_of(id)].contains(&slot));
                        prop_assert_eq!(slots[slot].replace(id), None);
                    }
                    Placed::Evicted(slot, old) => {
                        prop_assert!(ranges[class_of(id)].contains(&slot) && !pinned(slot));
                        prop_assert_eq!(slots[slot].replace(id), Some(old));
                    }
                    Placed::Refused => {
                        let full = slots[ranges[class_of(id)].clone()].iter().all(Option::is_some);
                        prop_assert!(full, "{} refused an empty slot", name);
                    }
                }
            }
            let counts = cache.counts();
            let held: HashSet<ExpertId> = slots.iter().flatten().copied().collect();
            prop_assert_eq!(held.len() as u64, counts.placed - counts.evictions);
            prop_assert_eq!(counts.lookups, counts.hits + counts.placed + counts.refused);
        }
    }
}
