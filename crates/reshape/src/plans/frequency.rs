//! `frequency`: how often each expert was picked.

use crate::usage::Usage;

/// Picks of every expert, per layer, as a part of the layer's.
pub(super) fn scores(usage: &Usage) -> Vec<Vec<f64>> {
    usage.layers.iter().map(|layer| layer.shares()).collect()
}
