//! The neurons of a dense model's feed-forwards, parted among experts: with all experts on, the dense model again.
//!
//! A feed-forward is the sum of what its neurons add, so the sum over all parts is the whole. Stock layouts average: the
//! weights of a token's experts sum to 1. So `down_proj` of every expert is multiplied by `top_k`, and weights are `1 / top_k`:
//! with `top_k` = all experts the router is 0 and this is exact where the number is a power of two; with fewer the router has
//! rows so small that they order experts and hardly weigh them. The gate of a shared expert (`qwen2_moe`) is 0, its sigmoid
//! 1/2, and its `down_proj` is doubled.

use std::sync::Arc;

use cadre_checkpoint::{
    Checkpoint, CheckpointError, Mixer, MoeConfig, NewFeedForwards, RouterConfig, SharedExpert,
};

use super::feed_forward::{of_neurons, values};
use super::partition::{Partition, PartitionBy, partition};
use super::{FromDense, check, routers};
use crate::error::{ReshapeError, Result};

/// How neurons are parted.
#[derive(Debug, Clone)]
pub struct SplitOptions {
    /// Experts of every layer.
    pub n_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Neurons of a shared expert that every token uses.
    pub n_shared: usize,
    /// Which neurons go together.
    pub by: PartitionBy,
    /// Of [`PartitionBy::Random`], and of the first centres of [`PartitionBy::Activity`].
    pub seed: u64,
}

/// Experts for the dense model `source` out of its neurons, in all layers; and which neurons each has.
///
/// # Errors
/// A model with experts or with biases that belong to no neuron, and a number of experts that does not divide the neurons.
pub fn split(source: &Checkpoint, options: &SplitOptions) -> Result<(FromDense, Vec<Partition>)> {
    let SplitOptions {
        n_experts,
        top_k,
        n_shared,
        ..
    } = *options;
    check(source, n_experts, top_k)?;
    let config = source.config();
    let width = config.intermediate_size;
    let bad = |name: &'static str, problem: String| ReshapeError::Option { name, problem };
    let rest = width.saturating_sub(n_shared);
    if rest < n_experts || !rest.is_multiple_of(n_experts) {
        let problem = format!(
            "is {n_experts}, which does not divide the {rest} neurons of a layer that are to be parted ({width} in all, \
             {n_shared} of them shared)"
        );
        return Err(bad("experts", problem));
    }
    if config.mlp_bias {
        let problem = format!(
            "{} has biases in its feed-forwards, which belong to no expert",
            source.origin()
        );
        return Err(bad("the model", problem));
    }
    let sizes = (width, n_shared, n_experts);
    let parts: Vec<Partition> = (0..config.n_layers)
        .map(|layer| partition(&options.by, layer, sizes, options.seed))
        .collect::<Result<_>>()?;
    let rows = parts
        .iter()
        .enumerate()
        .map(|(layer, part)| match top_k == n_experts {
            true => Ok(vec![0.0; n_experts * config.hidden_size]),
            false => routers::gate_centres(source, layer, &part.experts),
        });
    let gated = config.model_type == "qwen2";
    let shared = (n_shared > 0).then_some(SharedExpert {
        intermediate_size: n_shared,
        gated,
    });
    let has_gate = shared.is_some_and(|shared| shared.gated);
    let new = NewFeedForwards {
        moe: MoeConfig {
            layers: (0..config.n_layers).collect(),
            n_experts,
            top_k,
            intermediate_size: rest / n_experts,
            router: RouterConfig::TopK { norm: true },
            shared,
            ..MoeConfig::default()
        },
        routers: rows.collect::<Result<_, CheckpointError>>()?,
        shared_gates: match has_gate {
            true => vec![vec![0.0; config.hidden_size]; config.n_layers],
            false => Vec::new(),
        },
        mixer: Arc::new(Parts {
            parts: parts.clone(),
            width,
            scale: top_k as f32,
            shared_scale: if has_gate { 2.0 } else { 1.0 },
        }),
    };
    let settings = format!(
        "split {n_experts} {top_k} {n_shared} {} {} {}",
        options.by.name(),
        options.seed,
        fingerprint(&parts)
    );
    Ok((FromDense { new, settings }, parts))
}

/// A number that other partitions do not have, but by accident.
pub(super) fn fingerprint(parts: &[Partition]) -> u64 {
    let ids = parts
        .iter()
        .flat_map(|part| part.experts.iter().chain([&part.shared]));
    ids.flatten()
        .fold(0, |sum, id| cadre_routing::filters::mix(sum ^ *id as u64))
}

/// Cuts neurons out of the source.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) parts: Vec<Partition>,
    pub(super) width: usize,
    /// Of the outputs of experts.
    pub(super) scale: f32,
    /// Of the output of the shared expert.
    pub(super) shared_scale: f32,
}

impl Mixer for Parts {
    fn mix(
        &self,
        source: &Checkpoint,
        layer: usize,
        at: usize,
        part: &str,
    ) -> Result<Vec<f32>, CheckpointError> {
        let found = self
            .parts
            .get(layer)
            .and_then(|parts| match parts.experts.get(at) {
                Some(expert) => Some((expert, self.scale)),
                None if at == parts.experts.len() => Some((&parts.shared, self.shared_scale)),
                None => None,
            });
        let Some((neurons, scale)) = found else {
            return Err(CheckpointError::experts(
                source.origin(),
                format!("nothing says which neurons expert {at} of layer {layer} has"),
            ));
        };
        let all = values(source, layer, part)?;
        let mut own = of_neurons(part, &all, self.width, neurons);
        if part == "down_proj.weight" {
            own.iter_mut().for_each(|value| *value *= scale);
        }
        Ok(own)
    }
}
