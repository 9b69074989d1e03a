//! Experts that are averages of several: their tensors are made when they are written, one at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cadre_checkpoint::{Checkpoint, CheckpointError, Mixer};
use cadre_routing::plan::{Plan, PlanExpert, PlanFactor};

use crate::align::{Matrices, columns, order, rows};
use crate::factor::Factors;
use crate::ties::ties;

/// For every expert that is merged, the order of its neurons; nothing for the first.
type Orders = Arc<Vec<Option<Vec<usize>>>>;

/// Averages the experts that a plan merges.
#[derive(Debug)]
pub(crate) struct Averages {
    plan: Plan,
    /// What was factored last: its three tensors are asked for one after the other.
    last: Mutex<Option<(Matrix, Arc<Factors>)>>,
    /// Whether places are those of experts before, not those of entries.
    by_row: bool,
    /// By decoder layer and place. Kept, because the three matrices of an expert are far apart in most files.
    orders: Mutex<HashMap<(usize, usize), Orders>>,
}

impl Averages {
    /// Of `plan`. With `copies`, layers whose routers keep their rows are written with an expert for each row.
    pub(crate) fn new(plan: Plan, copies: bool) -> Self {
        Self {
            plan,
            last: Mutex::default(),
            by_row: copies,
            orders: Mutex::default(),
        }
    }

    fn expert(&self, layer: usize, at: usize) -> Option<&PlanExpert> {
        let layers = &self.plan.layers;
        let layer = layers.iter().find(|one| one.layer == layer)?;
        let at = match self.by_row && layer.keep_rows {
            true => (*layer.entries().get(at)?)?,
            false => at,
        };
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
        let Some(factor) = self.plan.factor else {
            return self.average(source, (layer, at), part);
        };
        let (part, what) = match part.rsplit_once('.') {
            Some((part, what @ ("inner" | "outer" | "rows"))) => (part, what),
            Some((part, "weight")) => (part, "whole"),
            _ => return self.average(source, (layer, at), part),
        };
        let config = source.config();
        let (hidden, width) = (config.hidden_size, config.moe.intermediate_size);
        let shape = match part {
            "down_proj" => [hidden, width],
            _ => [width, hidden],
        };
        let key = (layer, at, part.to_owned());
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let known = last.as_ref().filter(|(known, _)| *known == key);
        let factors = match known {
            Some((_, factors)) => Arc::clone(factors),
            None => {
                let values = self.average(source, (layer, at), &format!("{part}.weight"))?;
                let sizes = sizes(&factor, shape[0]);
                let made = Arc::new(crate::factor::factor(&values, shape, sizes));
                *last = Some((key, Arc::clone(&made)));
                made
            }
        };
        Ok(match what {
            "inner" => factors.inner.clone(),
            "outer" => factors.outer.clone(),
            "rows" => factors.rows.iter().map(|row| *row as f32).collect(),
            _ => factors.multiplied(shape),
        })
    }

    fn memory(&self, source: &Checkpoint, n: usize) -> usize {
        let layers = &self.plan.layers;
        let entries = || layers.iter().flat_map(|layer| &layer.experts);
        let width = source.config().moe.intermediate_size;
        // An average is summed as f64, with the values of one expert as they are stored, decoded, and in order.
        let average = 20 * n;
        let ties = entries().any(|one| one.ties.is_some());
        let aligned = entries().filter(|one| one.align && one.from.len() > 1);
        let n_ordered: usize = aligned.map(|one| one.from.len() - 1).sum();
        let most = [
            average,
            // Four lists of f64, and the values of one expert.
            if ties { 44 * n } else { 0 },
            // Three matrices of two experts, and what their neurons have in common as f32 and f64.
            if n_ordered > 0 {
                28 * n + 12 * width * width
            } else {
                0
            },
            if self.plan.factor.is_some() {
                36 * n
            } else {
                0
            },
        ];
        most.into_iter().max().unwrap_or(0) + n_ordered * width * size_of::<usize>()
    }
}

/// Rank, and rows of a matrix with `n_out`.
pub(crate) fn sizes(factor: &PlanFactor, n_out: usize) -> (usize, usize) {
    let rows = (f64::from(factor.rest) * n_out as f64).ceil() as usize;
    (factor.rank, rows.min(n_out))
}

/// Layer, place and part.
type Matrix = (usize, usize, String);

impl Averages {
    /// The average, or what the plan says else, of the experts of an entry.
    fn average(
        &self,
        source: &Checkpoint,
        (layer, at): (usize, usize),
        part: &str,
    ) -> Result<Vec<f32>, CheckpointError> {
        let Some(expert) = self.expert(layer, at) else {
            return Err(CheckpointError::experts(
                source.origin(),
                format!("the plan has no entry {at} for layer {layer}"),
            ));
        };
        let orders = self.orders(source, (layer, at), expert)?;
        let ordered = |id: u16, order: &Option<Vec<usize>>| -> Result<Vec<f32>, CheckpointError> {
            let values = tensor(source, &name(layer, id, part))?;
            Ok(match (order, part) {
                (None, _) | (Some(_), "down_proj.bias") => values,
                (Some(order), "down_proj.weight") => columns(&values, order),
                (Some(order), _) => rows(&values, order),
            })
        };
        if let Some(kept) = expert.ties {
            let member = |at: usize| ordered(expert.from[at], &orders[at]);
            return ties(member, &expert.shares(), kept);
        }
        let mut sum: Vec<f64> = Vec::new();
        let members = expert.from.iter().zip(expert.shares()).zip(&*orders);
        for ((id, share), order) in members {
            let values = ordered(*id, order)?;
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
