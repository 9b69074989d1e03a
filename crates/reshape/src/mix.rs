//! Experts that are averages of several: their tensors are made when they are written, one at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cadre_checkpoint::{Checkpoint, CheckpointError, Mixer};
use cadre_routing::plan::{Plan, PlanExpert};

use crate::align::{Matrices, columns, order, rows};

/// For every expert that is merged, the order of its neurons; nothing for the first.
type Orders = Arc<Vec<Option<Vec<usize>>>>;

/// Averages the experts that a plan merges.
#[derive(Debug)]
pub(crate) struct Averages {
    plan: Plan,
    /// By decoder layer and place. Kept, because the three matrices of an expert are far apart in most files.
    orders: Mutex<HashMap<(usize, usize), Orders>>,
}

impl Averages {
    pub(crate) fn new(plan: Plan) -> Self {
        Self {
            plan,
            orders: Mutex::default(),
        }
    }

    fn expert(&self, layer: usize, at: usize) -> Option<&PlanExpert> {
        let layers = &self.plan.layers;
        let layer = layers.iter().find(|one| one.layer == layer)?;
        layer.experts.get(at)
    }

    fn orders(
        &self,
        source: &Checkpoint,
        (layer, at): (usize, usize),
        expert: &PlanExpert,
    ) -> Result<Orders, CheckpointError> {
        let key = (layer, at);
        let known = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(orders) = known.get(&key) {
            return Ok(Arc::clone(orders));
        }
        // Another thread may do the same meanwhile, with the same result.
        drop(known);
        let mut orders = vec![None; expert.from.len()];
        if expert.align {
            let reference = matrices(source, layer, expert.from[0])?;
            for (slot, id) in orders.iter_mut().zip(&expert.from).skip(1) {
                *slot = Some(order(&reference, &matrices(source, layer, *id)?));
            }
        }
        let orders = Arc::new(orders);
        let mut known = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(key, Arc::clone(&orders));
        Ok(orders)
    }
}

impl Mixer for Averages {
    fn mix(
        &self,
        source: &Checkpoint,
        layer: usize,
        at: usize,
        part: &str,
    ) -> Result<Vec<f32>, CheckpointError> {
        let Some(expert) = self.expert(layer, at) else {
            return Err(CheckpointError::Experts {
                origin: source.origin().to_owned(),
                problem: format!("the plan has no entry {at} for layer {layer}"),
            });
        };
        let orders = self.orders(source, (layer, at), expert)?;
        let mut sum: Vec<f64> = Vec::new();
        let members = expert.from.iter().zip(expert.shares()).zip(&*orders);
        for ((id, share), order) in members {
            let values = tensor(source, &name(layer, *id, part))?;
            let values = match (order, part) {
                (None, _) | (Some(_), "down_proj.bias") => values,
                (Some(order), "down_proj.weight") => columns(&values, order),
                (Some(order), _) => rows(&values, order),
            };
            sum.resize(values.len(), 0.0);
            for (sum, value) in sum.iter_mut().zip(values) {
                *sum += f64::from(share) * f64::from(value);
            }
        }
        Ok(sum.into_iter().map(|value| value as f32).collect())
    }
}

pub(crate) fn name(layer: usize, expert: u16, part: &str) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}.{part}")
}

pub(crate) fn tensor(source: &Checkpoint, name: &str) -> Result<Vec<f32>, CheckpointError> {
    let view = source.tensor(name)?;
    let values = view.to_f32();
    source.release(&view.bytes);
    Ok(values)
}

fn matrices(source: &Checkpoint, layer: usize, expert: u16) -> Result<Matrices, CheckpointError> {
    let part = |part: &str| tensor(source, &name(layer, expert, part));
    let (hidden, width) = (
        source.config().hidden_size,
        source.config().moe.intermediate_size,
    );
    Ok(Matrices {
        gate: part("gate_proj.weight")?,
        up: part("up_proj.weight")?,
        down: part("down_proj.weight")?,
        width,
        hidden,
    })
}
