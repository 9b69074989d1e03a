//! Experts that are averages of several: their tensors are made when they are written, one at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cadre_checkpoint::{Checkpoint, CheckpointError, Mixer};
use cadre_routing::plan::{Plan, PlanExpert, PlanFactor};

use crate::align::{Matrices, columns, order, rows};
use crate::factor::Factors;

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
            let members = expert.from.iter().zip(&*orders);
            let members: Result<Vec<_>, _> =
                members.map(|(id, order)| ordered(*id, order)).collect();
            return Ok(ties(&members?, &expert.shares(), kept));
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

/// TIES-Merging (Yadav et al., 2023, arXiv 2306.01708), with the mean of the experts in place of a common ancestor: of each
/// one's differences to it the part `kept` of largest magnitude stays; of each value the sign that has more in all is
/// taken; and the differences of that sign are averaged by `shares`.
fn ties(members: &[Vec<f32>], shares: &[f32], kept: f32) -> Vec<f32> {
    let n = members.first().map_or(0, Vec::len);
    let mean = |at: usize| {
        let values = members.iter().zip(shares);
        values
            .map(|(values, share)| f64::from(values[at]) * f64::from(*share))
            .sum::<f64>()
    };
    let mean: Vec<f64> = (0..n).map(mean).collect();
    let trimmed = members.iter().map(|values| {
        let mut off: Vec<f64> = values
            .iter()
            .zip(&mean)
            .map(|(v, m)| f64::from(*v) - m)
            .collect();
        let n_kept = ((n as f64 * f64::from(kept)).ceil() as usize).clamp(1, n.max(1));
        let mut magnitudes: Vec<f64> = off.iter().map(|v| v.abs()).collect();
        if n_kept < n {
            let (_, least, _) = magnitudes.select_nth_unstable_by(n - n_kept, f64::total_cmp);
            let least = *least;
            off.iter_mut()
                .filter(|v| v.abs() < least)
                .for_each(|v| *v = 0.0);
        }
        off
    });
    let trimmed: Vec<Vec<f64>> = trimmed.collect();
    let merged = |at: usize| {
        let all: f64 = trimmed
            .iter()
            .zip(shares)
            .map(|(off, share)| off[at] * f64::from(*share))
            .sum();
        let agree = trimmed
            .iter()
            .zip(shares)
            .filter(|(off, _)| off[at] * all > 0.0);
        let (mut sum, mut weight) = (0.0, 0.0);
        for (off, share) in agree {
            sum += off[at] * f64::from(*share);
            weight += f64::from(*share);
        }
        let add = if weight > 0.0 { sum / weight } else { 0.0 };
        (mean[at] + add) as f32
    };
    (0..n).map(merged).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_by_hand() {
        let members = [
            vec![2.0, 3.0, 0.0, 3.5],
            vec![2.0, -1.0, 1.5, 3.5],
            vec![2.0, -2.0, 1.5, 2.0],
        ];
        // By shares that favour the first, means are 2, 0.75, 0.75, 3.125. The largest difference of each is that of the
        // second value: 2.25, -1.75 and -2.75, which weigh 1.125 against 1.125: nothing is added.
        let tied = ties(&members, &[0.5, 0.25, 0.25], 0.25);
        assert_eq!(tied, [2.0, 0.75, 0.75, 3.125]);
        // Means 2 and 9.5 / 3. The largest difference of the first is 4, of value 0, and nobody else's is; those of the
        // others are 9 - 9.5 / 3 and 0.5 - 9.5 / 3, of which the first is larger and stays.
        let members = [vec![6.0, 0.0], vec![0.0, 9.0], vec![0.0, 0.5]];
        assert_eq!(ties(&members, &[1.0 / 3.0; 3], 0.5), [6.0, 9.0]);
        // One expert is itself.
        assert_eq!(ties(&members[..1], &[1.0], 0.2), members[0]);
    }
}
