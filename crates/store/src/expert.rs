//! The unit of the store: one expert of one layer, and the moment at which it is wanted.

/// One expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertId {
    /// Index among the layers that have experts, from 0.
    pub layer: u16,
    /// Index in the layer.
    pub expert: u16,
}

/// A moment of a run: everything that experts are used at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Tokens that have gone through the model before the current pass, all sequences counted.
    pub token: u64,
    /// The layer that is being computed, counted as in [`ExpertId::layer`].
    pub layer: u16,
}
