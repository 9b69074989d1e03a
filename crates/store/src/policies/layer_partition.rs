//! Every layer owns an equal share of the slots; inside its share the expert that was used longest ago goes first.
//!
//! Source: the cache per layer of most engines that stream experts. Differences: slots belong to nobody until all are
//! taken, and a layer that has more than its share gives way first, so that no memory is kept empty. Where experts differ in size,
//! a share is one of all slots together, and only slots of the right size can be given up.

use crate::expert::{ExpertId, Now};
use crate::per_expert::PerExpert;
use crate::policy::Policy;

/// Keeps what each layer used last.
#[derive(Debug)]
pub struct LayerPartition {
    last: PerExpert<u64>,
    tick: u64,
    /// Cached experts of every layer.
    cached: Vec<usize>,
    n_slots: usize,
}

impl LayerPartition {
    /// For a model of `n_layers` layers with `n_experts` experts each, and a cache of `n_slots`.
    pub fn new(n_layers: usize, n_experts: usize, n_slots: usize) -> Self {
        Self {
            last: PerExpert::new(n_layers, n_experts, 0),
            tick: 0,
            cached: vec![0; n_layers],
            n_slots,
        }
    }

    /// Slots of a layer; the first ones have what does not divide.
    fn share(&self, layer: usize) -> usize {
        let n_layers = self.cached.len();
        self.n_slots / n_layers + usize::from(layer < self.n_slots % n_layers)
    }
}

impl Policy for LayerPartition {
    fn used(&mut self, expert: ExpertId, _: u32, _: Now) {
        self.tick += 1;
        self.last[expert] = self.tick;
    }

    fn worth(&self, expert: ExpertId, now: Now) -> f64 {
        let layer = usize::from(expert.layer);
        // The layer that wants a slot counts as if it had it.
        let n_cached = self.cached[layer] + usize::from(expert.layer == now.layer);
        let last = self.last[expert] as f64;
        if n_cached > self.share(layer) {
            last - self.tick as f64 - 1.0
        } else {
            last
        }
    }

    fn admits(&self, _: f64, least: f64) -> bool {
        // Nobody has too much, so the layer owns no slot at all, or none of this size: it has no right to one.
        least < 0.0
    }

    fn inserted(&mut self, expert: ExpertId) {
        self.cached[usize::from(expert.layer)] += 1;
    }

    fn evicted(&mut self, expert: ExpertId) {
        let cached = &mut self.cached[usize::from(expert.layer)];
        *cached = cached.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cache, Capacity, Placed};

    const fn id(layer: u16, expert: u16) -> ExpertId {
        ExpertId { layer, expert }
    }

    fn access(cache: &mut Cache, id: ExpertId) -> Option<Placed> {
        let now = Now {
            token: 0,
            layer: id.layer,
        };
        match cache.lookup(id, 1, now) {
            Some(_) => None,
            None => Some(cache.place(id, now, &|_| false)),
        }
    }

    #[test]
    fn layers_do_not_take_from_each_other() {
        let capacity = Capacity {
            slot_bytes: 1,
            n_slots: 4,
        };
        let policy = LayerPartition::new(2, 5, 4);
        let mut cache = Cache::new(vec![capacity], |_| 0, (2, 5), Box::new(policy));
        // Layer 0 fills the empty cache, and gives back what is above its share: its oldest.
        for expert in 0..4 {
            access(&mut cache, id(0, expert));
        }
        assert_eq!(
            access(&mut cache, id(1, 0)),
            Some(Placed::Evicted(0, id(0, 0)))
        );
        assert_eq!(
            access(&mut cache, id(1, 1)),
            Some(Placed::Evicted(1, id(0, 1)))
        );
        // From here on each replaces its own, although the other's are older.
        assert_eq!(
            access(&mut cache, id(1, 2)),
            Some(Placed::Evicted(0, id(1, 0)))
        );
        assert_eq!(access(&mut cache, id(0, 2)), None);
        assert_eq!(
            access(&mut cache, id(0, 4)),
            Some(Placed::Evicted(3, id(0, 3)))
        );
    }

    #[test]
    fn a_layer_without_a_share_gets_nothing_once_all_is_taken() {
        let capacity = Capacity {
            slot_bytes: 1,
            n_slots: 1,
        };
        let policy = LayerPartition::new(2, 2, 1);
        let mut cache = Cache::new(vec![capacity], |_| 0, (2, 2), Box::new(policy));
        assert_eq!(access(&mut cache, id(0, 0)), Some(Placed::Free(0)));
        assert_eq!(access(&mut cache, id(1, 0)), Some(Placed::Refused));
        assert_eq!(
            access(&mut cache, id(0, 1)),
            Some(Placed::Evicted(0, id(0, 0)))
        );
    }
}
