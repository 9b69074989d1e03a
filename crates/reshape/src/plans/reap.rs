//! `reap`: how much each expert adds where it is picked, weight x norm of its output, averaged over its picks; the
//! saliency of Router-weighted Expert Activation Pruning (Lasby et al., arXiv 2510.13999), with the weights of a token
//! made to sum to 1 as its code does. Needs norms in the trace.

use crate::error::{ReshapeError, Result};
use crate::usage::Usage;

/// Mean weighted norms, per layer and expert; 0 for experts that were never picked.
pub(super) fn scores(usage: &Usage) -> Result<Vec<Vec<f64>>> {
    let layers = usage.layers.iter().map(|layer| {
        let output = layer
            .output
            .as_ref()
            .ok_or_else(|| ReshapeError::TraceLacks {
                origin: usage.origin.clone(),
                problem: "has no norms of outputs, which `reap` is made of".to_owned(),
                hint: "record it with `cadre trace --norms`".to_owned(),
            })?;
        let pairs = output.iter().zip(&layer.picks);
        let mean = pairs.map(|(sum, n)| if *n == 0 { 0.0 } else { sum / *n as f64 });
        Ok(mean.collect())
    });
    layers.collect()
}
