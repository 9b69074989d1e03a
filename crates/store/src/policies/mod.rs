//! Which cached expert makes room for the next: one small file per rule. Files here do not import each other; what they
//! share is in `policy` one level up.

mod belady;
mod duel;
mod edgemoe;
mod layer_partition;
mod lfru;
mod lfu;
mod lru;
mod random;

use std::fmt;
use std::str::FromStr;

pub use belady::Belady;
pub use duel::Duel;
pub use edgemoe::EdgeMoe;
pub use layer_partition::LayerPartition;
pub use lfru::Lfru;
pub use lfu::Lfu;
pub use lru::Lru;
pub use random::Random;

use crate::error::{StoreError, by_name};
use crate::policy::Policy;

/// Tokens after which a use counts half, where a policy forgets.
pub const HALF_LIFE: f64 = 128.0;

/// The policies that can be chosen by name. [`Belady`] is not among them: it needs the future.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// [`Duel`] between [`Lfu`] and [`Lru`].
    #[default]
    Duel,
    /// [`Lru`].
    Lru,
    /// [`Lfu`].
    Lfu,
    /// [`Lfru`].
    Lfru,
    /// [`EdgeMoe`].
    EdgeMoe,
    /// [`LayerPartition`].
    LayerPartition,
    /// [`Random`].
    Random,
}

impl PolicyKind {
    /// All of them.
    pub fn all() -> [Self; 7] {
        [
            Self::Duel,
            Self::Lru,
            Self::Lfu,
            Self::Lfru,
            Self::EdgeMoe,
            Self::LayerPartition,
            Self::Random,
        ]
    }

    /// The name that [`PolicyKind::from_str`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Duel => "duel",
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::Lfru => "lfru",
            Self::EdgeMoe => "edgemoe",
            Self::LayerPartition => "layer-partition",
            Self::Random => "random",
        }
    }

    /// The policy for a model of `n_layers` layers with `n_experts` experts each, and a cache of `n_slots`.
    pub fn make(self, n_layers: usize, n_experts: usize, n_slots: usize) -> Box<dyn Policy> {
        match self {
            Self::Duel => {
                let rules =
                    [Self::Lfu, Self::Lru].map(|kind| kind.make(n_layers, n_experts, n_slots));
                Box::new(Duel::new(rules, (n_layers, n_experts), n_slots))
            }
            Self::Lru => Box::new(Lru::new(n_layers, n_experts)),
            Self::Lfu => Box::new(Lfu::new(n_layers, n_experts, HALF_LIFE)),
            Self::Lfru => Box::new(Lfru::new(n_layers, n_experts, HALF_LIFE)),
            Self::EdgeMoe => Box::new(EdgeMoe::new(n_layers, n_experts)),
            Self::LayerPartition => Box::new(LayerPartition::new(n_layers, n_experts, n_slots)),
            Self::Random => Box::new(Random::new(0)),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PolicyKind {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        by_name("cache policy", &Self::all(), Self::name, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for kind in PolicyKind::all() {
            assert_eq!(kind.name().parse::<PolicyKind>().unwrap(), kind);
        }
        let error = "lfu2".parse::<PolicyKind>().unwrap_err().to_string();
        assert!(
            error.contains("\"lfu2\"") && error.contains("layer-partition"),
            "{error}"
        );
    }
}
