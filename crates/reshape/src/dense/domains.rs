//! Experts for domains: of every layer the neurons that a domain uses most, so that neurons may be in several experts.
//!
//! Paper: the extraction of Read-ME, Cai et al., 2024, arXiv 2410.19123. Importance of a neuron is the mean of the magnitude
//! of what it hands to the last product, over the tokens of the domain; an expert has the `width` neurons of the largest.
//! A token has one expert, of weight 1. Which one is not decided here: the router is 0, and so takes the first.

use std::collections::BTreeMap;
use std::sync::Arc;

use cadre_checkpoint::{Checkpoint, MoeConfig, NewFeedForwards, RouterConfig};
use cadre_engine::{Observer, RoutingEvent, RowsEvent};

use super::partition::Partition;
use super::split::{Parts, fingerprint};
use super::{FromDense, check};
use crate::error::{ReshapeError, Result};

/// For every layer and neuron the sum of its magnitude over tokens.
#[derive(Debug, Clone, Default)]
pub struct Importance {
    layers: BTreeMap<usize, Vec<f64>>,
}

impl Observer for Importance {
    fn routed(&mut self, _event: &RoutingEvent<'_>) {}

    fn wants_neurons(&self) -> bool {
        true
    }

    fn activated(&mut self, event: &RowsEvent<'_>) {
        let sums = self.layers.entry(event.layer).or_default();
        sums.resize(event.width, 0.0);
        for row in event.rows.chunks_exact(event.width) {
            let cells = sums.iter_mut().zip(row);
            cells.for_each(|(sum, value)| *sum += f64::from(value.abs()));
        }
    }
}

/// Experts for the dense model `source`, one of `width` neurons for each of `domains`, in all layers.
///
/// # Errors
/// A model with experts or biases, fewer than two domains, a domain of which a layer was not seen, and a width that is not
/// within that of the model.
pub fn domain_experts(
    source: &Checkpoint,
    domains: &[Importance],
    width: usize,
) -> Result<(FromDense, Vec<Partition>)> {
    check(source, domains.len(), 1)?;
    let config = source.config();
    let bad = |name: &'static str, problem: String| ReshapeError::Option { name, problem };
    if !(1..=config.intermediate_size).contains(&width) {
        let problem = format!(
            "is {width}, expected 1 to {}, the neurons of a layer",
            config.intermediate_size
        );
        return Err(bad("width", problem));
    }
    if config.mlp_bias {
        let problem = format!("{} has biases in its feed-forwards", source.origin());
        return Err(bad("the model", problem));
    }
    let parts: Vec<Partition> = (0..config.n_layers)
        .map(|layer| {
            let of = |domain: &Importance| match domain.layers.get(&layer) {
                Some(sums) if sums.len() == config.intermediate_size => Ok(largest(sums, width)),
                _ => Err(bad(
                    "a domain",
                    format!("has nothing of layer {layer}; give it text"),
                )),
            };
            let experts = domains.iter().map(of).collect::<Result<_>>()?;
            Ok(Partition {
                shared: Vec::new(),
                experts,
            })
        })
        .collect::<Result<_>>()?;
    let n_experts = domains.len();
    let new = NewFeedForwards {
        moe: MoeConfig {
            layers: (0..config.n_layers).collect(),
            n_experts,
            top_k: 1,
            intermediate_size: width,
            router: RouterConfig::TopK { norm: true },
            ..MoeConfig::default()
        },
        routers: vec![vec![0.0; n_experts * config.hidden_size]; config.n_layers],
        shared_gates: Vec::new(),
        mixer: Arc::new(Parts {
            parts: parts.clone(),
            width: config.intermediate_size,
            scale: 1.0,
            shared_scale: 1.0,
        }),
    };
    let settings = format!("domains {n_experts} {width} {}", fingerprint(&parts));
    Ok((FromDense { new, settings }, parts))
}

/// The `n` largest, ascending; of equals the first.
fn largest(values: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    order.truncate(n);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_taken() {
        assert_eq!(largest(&[0.5, 2.0, 0.5, 3.0], 3), [0, 1, 3]);
        let mut seen = Importance::default();
        for rows in [[1.0, -2.0, 0.0, 4.0], [0.0, 0.0, -1.0, 0.5]] {
            seen.activated(&RowsEvent {
                sequence: 0,
                layer: 3,
                first_position: 0,
                width: 2,
                rows: &rows,
            });
        }
        assert_eq!(seen.layers[&3], [2.0, 6.5]);
    }
}
