//! What a plan must fit, from a checkpoint, or from a trace where that says enough.

use cadre_checkpoint::{Checkpoint, RouterConfig};
use cadre_routing::plan::{Groups, ModelShape};

use crate::error::{ReshapeError, Result};
use crate::usage::Usage;

/// Architectures whose routers may have groups, or a number of picks that follows the number of experts: their traces do not
/// say all that a plan needs.
const ASK_THE_MODEL: &[&str] = &["deepseek_v2", "deepseek_v3", "glm4_moe", "cadre_moe"];

/// The experts of a checkpoint and how they are picked.
#[must_use]
pub fn shape_of(checkpoint: &Checkpoint) -> ModelShape {
    let config = checkpoint.config();
    let moe = &config.moe;
    let groups = match moe.router {
        RouterConfig::GroupLimited {
            n_groups,
            keep_groups,
            sum_of_best_two,
            ..
        } => Groups {
            n: n_groups,
            keep: keep_groups,
            least: if sum_of_best_two { 2 } else { 1 },
        },
        _ => Groups::NONE,
    };
    let layers = moe.layers.iter().copied().zip(moe.counts());
    ModelShape {
        digest: checkpoint.digest().to_owned(),
        architecture: config.model_type.clone(),
        layers: layers.collect(),
        // Rules that may pick all experts pick at least one.
        top_k: if moe.router.may_pick_all() {
            1
        } else {
            moe.top_k
        },
        n_null: moe.n_null,
        groups,
        same_picks: (moe.decoupled_router.as_ref()).is_some_and(|router| !router.per_layer),
    }
}

/// The same of the model that a trace was recorded from, as far as the trace says it.
///
/// # Errors
/// The architecture is one whose traces do not say how experts are grouped.
pub fn shape_of_trace(usage: &Usage) -> Result<ModelShape> {
    let meta = &usage.meta;
    if ASK_THE_MODEL.contains(&meta.architecture.as_str()) {
        return Err(ReshapeError::TraceLacks {
            origin: usage.origin.clone(),
            problem: format!(
                "does not say how the experts of `{}` are grouped",
                meta.architecture
            ),
            hint: "pass the model too (-m MODEL)".to_owned(),
        });
    }
    let layers = usage.layers.iter();
    Ok(ModelShape {
        digest: meta.digest.clone(),
        architecture: meta.architecture.clone(),
        layers: layers
            .map(|layer| (layer.layer, layer.n_experts()))
            .collect(),
        top_k: meta.top_k,
        n_null: meta.n_null,
        groups: Groups::NONE,
        // A model with one router is of an architecture that is asked.
        same_picks: false,
    })
}
