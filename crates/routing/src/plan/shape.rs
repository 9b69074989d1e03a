//! What a plan must fit.

/// What a plan must fit: the experts of a model and how they are picked.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// Digest of the checkpoint.
    pub digest: String,
    /// Its `model_type`.
    pub architecture: String,
    /// The layers that have experts, ascending, and how many each has, null ones not counted.
    pub layers: Vec<(usize, usize)>,
    /// Experts that a token is sent to at least, so that no layer may have fewer; null ones count.
    pub top_k: usize,
    /// Null experts of each layer.
    pub n_null: usize,
    /// How experts are grouped; [`Groups::NONE`] where they are not.
    pub groups: Groups,
    /// Whether one router picks the same experts in all layers, so that all have to keep the same.
    pub same_picks: bool,
}

/// Consecutive experts that are picked or left together (DeepSeek's routing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups; each has the same number of experts.
    pub n: usize,
    /// Groups that a token's experts come from.
    pub keep: usize,
    /// Experts that a group must have, because its score is made of so many.
    pub least: usize,
}

impl Groups {
    /// All experts are one group.
    pub const NONE: Self = Self {
        n: 1,
        keep: 1,
        least: 1,
    };
}

impl ModelShape {
    /// The fewest experts that a layer can be left with.
    #[must_use]
    pub fn least(&self) -> usize {
        let Groups { n, keep, least } = self.groups;
        let picked = self.top_k.saturating_sub(self.n_null).max(1);
        n * least.max(picked.div_ceil(keep.max(1)))
    }
}
