//! `router-mass`: the weight that the router gave each expert in all the picks of it.

use crate::usage::Usage;

/// Sums of weights, per layer and expert.
pub(super) fn scores(usage: &Usage) -> Vec<Vec<f64>> {
    usage
        .layers
        .iter()
        .map(|layer| layer.mass.clone())
        .collect()
}
