//! Looking ahead: what the next layer's router says to this layer's input, which is mostly what it will say to its own.
//!
//! The stream changes little from one layer to the next, so most of these picks come true. They only decide what is read
//! early, and change no result.

use cadre_kernels::MatmulScratch;
use cadre_routing::Routing;
use cadre_store::Look;

use super::experts::Turn;
use super::lossy::LossyScratch;
use super::pick::SteerScratch;
use super::{Moe, Norm, RouterScratch, Step};

/// The next layer that has experts, and the stream before this layer's.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    /// Its index among all layers.
    pub(crate) layer: usize,
    /// `[rows, d]`.
    pub(crate) hidden: &'a [f32],
    pub(crate) norm: &'a Norm,
    pub(crate) moe: &'a Moe,
}

/// Memory to look ahead with; grows to what is asked for.
#[derive(Debug, Default)]
pub(crate) struct AheadScratch {
    normed: Vec<f32>,
    logits: Vec<f32>,
    routing: Routing,
    steer: SteerScratch,
    lossy: LossyScratch,
    counts: Vec<u32>,
    ranked: Vec<u16>,
}

impl Ahead<'_> {
    /// Tells the store what the next layer will probably want.
    pub(crate) fn look(
        &self,
        step: Step<'_>,
        turn: &mut Turn<'_>,
        (scratch, router, matmul): (&mut AheadScratch, &mut RouterScratch, &mut MatmulScratch),
    ) {
        let (
            Turn::Streamed(pass),
            super::Experts::Streamed {
                layer, n_experts, ..
            },
        ) = (turn, &self.moe.experts)
        else {
            return;
        };
        match pass.look() {
            Look::Nowhere => return,
            // In the order of the file, which a disk likes best.
            Look::Everywhere => return pass.expect(*layer, 0..*n_experts as u16),
            Look::Gate => {}
        }
        let compute = step.compute;
        let n_logits = self.moe.router.n_logits();
        scratch.normed.resize(self.hidden.len(), 0.0);
        scratch.logits.resize(step.n_rows() * n_logits, 0.0);
        self.norm.forward(compute, self.hidden, &mut scratch.normed);
        let AheadScratch { normed, logits, .. } = &mut *scratch;
        self.moe
            .router
            .guess(step, normed, logits, (router, matmul));
        // What cannot be routed here says so when it is that layer's turn.
        let AheadScratch {
            logits,
            routing,
            steer,
            ..
        } = &mut *scratch;
        let step = Step {
            layer: self.layer,
            ..step
        };
        if self.moe.pick(step, logits, (routing, steer)).is_err() {
            return;
        }
        if let Some(rules) = self.moe.lossy.as_ref().filter(|_| step.decodes) {
            // What would not be computed need not be read.
            scratch.lossy.is_cached.resize(*n_experts, false);
            pass.mark_cached(*layer, &mut scratch.lossy.is_cached);
            let AheadScratch {
                logits,
                routing,
                lossy,
                ..
            } = scratch;
            rules.edit(logits, routing, lossy);
        }
        scratch.rank(*n_experts);
        pass.give(*layer, &scratch.ranked);
    }
}

impl AheadScratch {
    /// The experts of the routing, the most picked first.
    fn rank(&mut self, n_experts: usize) {
        self.counts.clear();
        self.counts.resize(n_experts, 0);
        for expert in self.routing.experts() {
            if let Some(count) = self.counts.get_mut(usize::from(*expert)) {
                *count += 1;
            }
        }
        self.ranked.clear();
        let counts = &self.counts;
        self.ranked
            .extend((0..n_experts as u16).filter(|expert| counts[usize::from(*expert)] > 0));
        self.ranked
            .sort_by_key(|expert| std::cmp::Reverse(counts[usize::from(*expert)]));
    }
}
