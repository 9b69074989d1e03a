//! How evenly experts are used, counted in some passes of many.

use cadre_engine::{ModelInfo, Observer, RoutingEvent};
use cadre_routing::Loads;

/// One of so many passes is counted: a pass that is watched computes rows of the last layer that nobody else needs.
const ONE_OF: u64 = 8;

/// Picks per layer since the start.
#[derive(Debug)]
pub(crate) struct Picks {
    /// Layers with experts, ascending.
    layers: Vec<(usize, Loads)>,
    n_passes: u64,
    watches: bool,
}

/// How a layer's experts are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LayerUse {
    pub(crate) layer: usize,
    /// Tokens that were counted, and their picks.
    pub(crate) n_tokens: u64,
    pub(crate) n_picks: u64,
    /// The most picks of any expert over their mean, less 1; 0 is perfectly even.
    pub(crate) max_violation: f64,
    /// Entropy of the picks over that of even ones: 1 is perfectly even.
    pub(crate) entropy: f64,
    /// Experts that nobody picked.
    pub(crate) n_unused: usize,
}

impl Picks {
    pub(crate) fn new(info: &ModelInfo) -> Self {
        let layers = info.moe_layers.iter().zip(&info.experts_per_layer);
        let loads = |(layer, n): (&usize, &usize)| (*layer, Loads::new(n + info.n_null));
        Self {
            layers: layers.map(loads).collect(),
            n_passes: 0,
            watches: false,
        }
    }

    /// Begins a pass; whether it is counted.
    pub(crate) fn begin(&mut self) -> bool {
        self.watches = self.n_passes.is_multiple_of(ONE_OF) && !self.layers.is_empty();
        self.n_passes += 1;
        self.watches
    }

    /// What was counted so far, of layers where something was.
    pub(crate) fn summary(&self) -> Vec<LayerUse> {
        let used = |(layer, loads): &(usize, Loads)| {
            let summary = loads.summary()?;
            let n_picks: u64 = loads.counts().iter().sum();
            Some(LayerUse {
                layer: *layer,
                n_tokens: summary.n_tokens,
                n_picks,
                max_violation: summary.max_vio,
                entropy: evenness(loads.counts(), n_picks),
                n_unused: summary.n_dead,
            })
        };
        self.layers.iter().filter_map(used).collect()
    }
}

/// Entropy of the shares over its highest value.
fn evenness(counts: &[u64], n_picks: u64) -> f64 {
    let shares = counts.iter().filter(|count| **count > 0);
    let shares = shares.map(|count| *count as f64 / n_picks as f64);
    let entropy: f64 = shares.map(|share| -share * share.ln()).sum();
    match counts.len() {
        0 | 1 => 1.0,
        n => entropy / (n as f64).ln(),
    }
}

impl Observer for Picks {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let found = self
            .layers
            .iter_mut()
            .find(|(layer, _)| *layer == event.layer);
        if let Some((layer, loads)) = found
            && let Err(error) = loads.add_routing(event.routing)
        {
            tracing::warn!("picks of layer {layer} are not counted: {error}");
        }
    }

    fn watches(&self) -> bool {
        self.watches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_use_has_the_highest_entropy() {
        assert!((evenness(&[5, 5, 5, 5], 20) - 1.0).abs() < 1e-12);
        assert!((evenness(&[10, 10, 0, 0], 20) - 0.5).abs() < 1e-12);
        assert_eq!(evenness(&[20, 0, 0, 0], 20), 0.0);
        assert_eq!(evenness(&[7], 7), 1.0);
    }
}
