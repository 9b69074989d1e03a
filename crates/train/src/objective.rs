//! What one micro-batch is trained on: its text, the routers' losses, and what training methods add.

use crate::architecture::Architecture;
use crate::device::read;
use crate::layerwise::{self, Kept, Replay};
use crate::lm::{Batch, Forward, LanguageModel, Losses, Pass};
use crate::losses::{self, LossWeights};
use crate::methods::balance_scope::{ScopedLoads, merge};
use crate::methods::consistency::consistency;
use crate::methods::distill::Teacher;
use crate::methods::router_distill::Guide;
use crate::ops::Recompute;
use crate::optimizer::GradientSum;
use crate::routers::Routed;
use burn::tensor::Tensor;
use cadre_routing::{Loads, RoutingError};
use std::collections::BTreeMap;

/// The losses of a run and their coefficients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Objective<'a> {
    pub(crate) architecture: &'a Architecture,
    pub(crate) weights: LossWeights,
    pub(crate) teacher: Option<&'a Teacher>,
    /// What a router before the layers follows.
    pub(crate) guide: Option<&'a Guide>,
}

/// The loss of a micro-batch and its parts without their coefficients.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The sum with coefficients, to go backward from.
    pub(crate) loss: Tensor<1>,
    pub(crate) cross_entropy: f64,
    pub(crate) balance: f64,
    pub(crate) z: f64,
    /// Parts that only some recipes have, by name.
    pub(crate) further: BTreeMap<String, f64>,
    /// Picks of each MoE layer, over all passes.
    pub(crate) loads: Vec<Loads>,
    /// Picks of each layer's attention, where it has experts.
    pub(crate) attention: Vec<Loads>,
    /// What layers are computed again from, per pass, and the loads that its balance losses counted.
    kept: Vec<(Kept, Vec<Loads>)>,
}

impl Objective<'_> {
    /// Forward passes over one micro-batch that its loss takes.
    pub(crate) fn n_passes(&self) -> usize {
        if self.weights.consistency > 0.0 { 2 } else { 1 }
    }

    /// The loss of `batch`, the micro-batch of `pass.index`.
    pub(crate) fn of(
        &self,
        model: &LanguageModel,
        batch: &Batch,
        pass: &Pass<'_>,
        scoped: &mut ScopedLoads,
    ) -> Result<Parts, RoutingError> {
        let (hidden, mut parts) = self.one_pass(model, batch, &self.nth(pass, 0), scoped)?;
        if self.n_passes() == 2 {
            let (second, other) = self.one_pass(model, batch, &self.nth(pass, 1), scoped)?;
            parts.kept.extend(other.kept);
            let disagreement = consistency(hidden.clone(), second, model.head());
            parts.loss = parts.loss + other.loss + disagreement.clone() * self.weights.consistency;
            parts.cross_entropy = 0.5 * (parts.cross_entropy + other.cross_entropy);
            parts.balance = 0.5 * (parts.balance + other.balance);
            parts.z = 0.5 * (parts.z + other.z);
            for (name, value) in other.further {
                let both = |first: &mut f64| *first = 0.5 * (*first + value);
                parts.further.entry(name).and_modify(both);
            }
            merge(&mut parts.loads, other.loads.iter())?;
            merge(&mut parts.attention, other.attention.iter())?;
            parts.insert("consistency", disagreement)?;
        }
        if let Some(teacher) = self.teacher {
            let followed = teacher.loss(hidden, model.head(), batch, pass.step)?;
            if let Some(loss) = followed {
                parts.loss = parts.loss + loss.clone() * teacher.beta();
                parts.insert("distillation", loss)?;
            }
        }
        Ok(parts)
    }

    /// The `i`-th pass over the micro-batch of `pass.index`.
    fn nth<'a>(&self, pass: &Pass<'a>, i: usize) -> Pass<'a> {
        let index = pass.index * self.n_passes() + i;
        Pass { index, ..*pass }
    }

    /// Adds `share` times the gradients of `parts`, which [`Objective::of`] made of the same model, batch and pass.
    pub(crate) fn add_gradients(
        &self,
        (model, batch, pass): (&LanguageModel, &Batch, &Pass<'_>),
        parts: Parts,
        share: f32,
        into: &mut GradientSum,
    ) -> Result<(), RoutingError> {
        let mut gradients = parts.loss.backward();
        if parts.kept.is_empty() {
            into.add(model, &mut gradients, share)?;
            return Ok(());
        }
        let above = ["consistency", "distillation"];
        let further = above.iter().any(|name| parts.further.contains_key(*name));
        let mut sum = GradientSum::default();
        sum.add(model, &mut gradients, 1.0)?;
        for (i, (kept, loads)) in parts.kept.into_iter().enumerate() {
            let replay = Replay {
                model,
                architecture: self.architecture,
                batch,
                pass: &self.nth(pass, i),
                weights: self.weights,
                further,
            };
            kept.backward(&replay, &loads, &mut gradients, &mut sum)?;
        }
        into.merge(sum, share);
        Ok(())
    }

    fn one_pass(
        &self,
        model: &LanguageModel,
        batch: &Batch,
        pass: &Pass<'_>,
        scoped: &mut ScopedLoads,
    ) -> Result<(Tensor<2>, Parts), RoutingError> {
        let (forward, kept) = match pass.numerics.recompute {
            Recompute::Layer => {
                let (forward, kept) = layerwise::forward(model, self.architecture, batch, pass)?;
                (forward, Some(kept))
            }
            Recompute::None | Recompute::Experts => {
                (model.forward(self.architecture, batch, pass)?, None)
            }
        };
        let loads = scoped.of(self.architecture.balance_loads(&forward.routed))?;
        let (hidden, foretold) = (forward.hidden.clone(), forward.foretold.clone());
        let losses = model.score(self.architecture, forward, batch, &loads);
        let weights = self.weights;
        let loss = losses.cross_entropy.clone()
            + losses.balance.clone() * weights.balance
            + losses.z.clone() * weights.z;
        let Losses {
            cross_entropy,
            balance,
            z,
            routed,
            attention,
        } = losses;
        let mut parts = Parts {
            loss,
            cross_entropy: value(cross_entropy)?,
            balance: value(balance)?,
            z: value(z)?,
            further: BTreeMap::new(),
            loads: routed.iter().map(|r| r.loads.clone()).collect(),
            attention: attention.into_iter().map(|r| r.loads).collect(),
            kept: kept.map(|kept| (kept, loads)).into_iter().collect(),
        };
        for (name, weight, mean) in self.further(&routed, batch.seq_len)? {
            parts.loss = parts.loss + mean.clone() * weight;
            parts.insert(name, mean)?;
        }
        if let (Some(guide), Some(logits)) = (self.guide, foretold) {
            let followed = guide.follow(&logits, self.architecture, batch)?;
            parts.loss = parts.loss + followed.loss.clone() * guide.beta();
            parts.insert("router_distillation", followed.loss)?;
            let agreement = ("router_agreement".to_owned(), followed.agreement);
            parts.further.extend([agreement]);
        }
        Ok((hidden, parts))
    }

    /// The router losses that only some recipes ask for, with their coefficients, as means over the layers.
    fn further(
        &self,
        routed: &[Routed],
        seq_len: usize,
    ) -> Result<Vec<(&'static str, f32, Tensor<1>)>, RoutingError> {
        let mut means: Vec<(&'static str, f32, Tensor<1>)> = Vec::new();
        for (layer, routed) in self.architecture.moe.iter().zip(routed) {
            let parts = losses::further(&self.weights, &*layer.router, routed, seq_len)?;
            if means.is_empty() {
                means = parts;
                continue;
            }
            for (mean, (_, _, part)) in means.iter_mut().zip(parts) {
                mean.2 = mean.2.clone() + part;
            }
        }
        let n = routed.len() as f32;
        means
            .iter_mut()
            .for_each(|mean| mean.2 = mean.2.clone() / n);
        Ok(means)
    }

    /// Counts the picks of a micro-batch without gradient, with the random draws that its training pass will make.
    pub(crate) fn count(
        &self,
        valid: &LanguageModel,
        batch: &Batch,
        pass: &Pass<'_>,
        scoped: &mut ScopedLoads,
    ) -> Result<(), RoutingError> {
        for i in 0..self.n_passes() {
            let pass = self.nth(pass, i);
            let Forward { routed, .. } = valid.forward(self.architecture, batch, &pass)?;
            scoped.count(&self.architecture.balance_loads(&routed))?;
        }
        Ok(())
    }
}

impl Parts {
    fn insert(&mut self, name: &str, part: Tensor<1>) -> Result<(), RoutingError> {
        self.further.insert(name.to_owned(), value(part)?);
        Ok(())
    }
}

/// The value of a loss.
///
/// # Errors
/// A device that did not compute it.
pub(crate) fn value(tensor: Tensor<1>) -> Result<f64, RoutingError> {
    Ok(f64::from(read(tensor)?[0]))
}
