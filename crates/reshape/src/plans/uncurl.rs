//! `uncurl`: task-specific pruning in the manner of UNCURL (Sarkar, Lausen, Cevher, Zha, Brox, Karypis, arXiv 2409.01483).
//!
//! The paper's own text gives the idea (offline, per layer, by router logits on the task); the steps here are our
//! reconstruction: experts whose logits go together are clustered by average linkage, and of each cluster the expert with
//! the most weight stays. Fine-tuning on the task, which the paper adds, is not done here.

use cadre_routing::plan::ModelShape;

use super::{PruneOptions, similarity};
use crate::cluster::average_linkage;
use crate::error::{ReshapeError, Result};
use crate::select::{Scope, keep};
use crate::usage::Usage;

/// The experts that stay in each layer, ascending.
pub(super) fn kept(
    shape: &ModelShape,
    usage: &Usage,
    options: &PruneOptions,
) -> Result<Vec<Vec<u16>>> {
    if options.scope != Scope::Layer {
        return Err(ReshapeError::Option {
            name: "uncurl",
            problem: "clusters the experts of one layer and has no order among layers: use it with the scope `layer`"
                .to_owned(),
        });
    }
    // How many stay does not depend on scores here.
    let mass: Vec<Vec<f64>> = usage
        .layers
        .iter()
        .map(|layer| layer.mass.clone())
        .collect();
    let counts = keep(shape, &mass, (&options.amount, options.scope))?;
    let mut kept = Vec::with_capacity(counts.len());
    for (at, counted) in counts.iter().enumerate() {
        let n = usage.layers[at].n_experts();
        let similarity = similarity(usage, at, options.similarity)?;
        let (n_groups, mass) = (shape.groups.n.max(1), &usage.layers[at].mass);
        let (size, each) = (n / n_groups, counted.len() / n_groups);
        let mut ids = Vec::with_capacity(counted.len());
        for group in 0..n_groups {
            let members: Vec<usize> = (group * size..(group + 1) * size).collect();
            for cluster in average_linkage(&similarity, n, &members, each) {
                let best = cluster
                    .iter()
                    .max_by(|a, b| mass[**a].total_cmp(&mass[**b]).then(b.cmp(a)));
                ids.extend(best.map(|id| *id as u16));
            }
        }
        ids.sort_unstable();
        kept.push(ids);
    }
    Ok(kept)
}
