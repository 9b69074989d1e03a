//! Looking ahead: what the next layer's router says to this layer's input, which is mostly what it will say to its own; and
//! what all layers will pick, where a router has said so before the first of them.
//!
//! The stream changes little from one layer to the next, so most of the guesses come true; what a router before the model
//! says is certain. Either only decides what is read early, and changes no result.

use cadre_kernels::MatmulScratch;
use cadre_routing::{Routing, RoutingError};
use cadre_store::Look;

use super::experts::Turn;
use super::groups::weights;
use super::lossy::LossyScratch;
use super::pick::SteerScratch;
use super::told::Told;
use super::{Experts, Moe, MoeScratch, Norm, Router, RouterScratch, Step};
use crate::batch::{Sequence, Span};
use crate::model::Observer;
use crate::streaming::ExpertStore;

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
    /// Rows of each sequence that a layer will compute.
    spans: Vec<Span>,
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
            Experts::Streamed {
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
        let step = Step {
            layer: self.layer,
            ..step
        };
        let mark = |is_cached: &mut [bool]| pass.mark_cached(*layer, is_cached);
        if scratch.pick(self.moe, step, mark) {
            pass.give(*layer, &scratch.ranked);
        }
    }
}

/// Tells the store what `layers` will pick, by logits that a router has made before them: each with its index among all
/// layers, and whether it computes only the rows whose logits are wanted.
pub(crate) fn foresee<'m>(
    step: Step<'_>,
    layers: impl Iterator<Item = (usize, &'m Moe, bool)>,
    batch: &[Sequence<'_>],
    store: &ExpertStore,
    scratch: &mut MoeScratch,
) {
    let mut foresight = store.foresee();
    for (index, moe, trimmed) in layers {
        let (Experts::Streamed { layer, .. }, Router::Foretold(part)) = (&moe.experts, &moe.router)
        else {
            continue;
        };
        let (ahead, router) = (&mut scratch.ahead, &scratch.router);
        let mut spans = std::mem::take(&mut ahead.spans);
        spans.clear();
        let mut n_rows = 0;
        for (span, sequence) in step.spans.iter().zip(batch) {
            let n = match trimmed {
                true => sequence.n_logits(),
                false => span.n_rows,
            };
            spans.push(span.last(n, n_rows));
            n_rows += n;
        }
        ahead.logits.resize(n_rows * part.n_logits, 0.0);
        let rows = step.spans.iter().zip(&spans);
        let rows = rows.flat_map(|(span, kept)| span.end() - kept.n_rows..span.end());
        part.copy(router, rows, &mut ahead.logits);
        let own = Step {
            layer: index,
            spans: &spans,
            ..step
        };
        let mark = |is_cached: &mut [bool]| foresight.mark_cached(*layer, is_cached);
        if ahead.pick(moe, own, mark) {
            foresight.wants(*layer, &ahead.ranked);
        }
        ahead.spans = spans;
    }
}

/// Tells `observer` what `moe` will pick for the rows of `step`, by logits that a router has made before the layers.
pub(crate) fn tell(
    step: Step<'_>,
    moe: &Moe,
    scratch: &mut MoeScratch,
    observer: &mut dyn Observer,
) -> Result<(), RoutingError> {
    let Router::Foretold(part) = &moe.router else {
        return Ok(());
    };
    let (ahead, n) = (&mut scratch.ahead, part.n_logits);
    ahead.logits.resize(step.n_rows() * n, 0.0);
    part.copy(&scratch.router, 0..step.n_rows(), &mut ahead.logits);
    moe.pick(step, &ahead.logits, (&mut ahead.routing, &mut ahead.steer))?;
    let told = Told {
        logits: &ahead.logits,
        routing: &ahead.routing,
        norms: &[],
        copies_from: None,
    };
    told.each(step, &mut Routing::new(), &mut |event| {
        observer.routed(event);
    });
    Ok(())
}

impl AheadScratch {
    /// Routes the logits as `moe` will, as far as is known now; `mark` says which of its experts are in memory. False
    /// where they cannot be routed, which is said when it is that layer's turn.
    fn pick(&mut self, moe: &Moe, step: Step<'_>, mark: impl FnOnce(&mut [bool])) -> bool {
        let picks = (&mut self.routing, &mut self.steer);
        if moe.pick(step, &self.logits, picks).is_err() {
            return false;
        }
        let n_experts = moe.experts.n_experts();
        if let Some(rules) = moe.lossy.as_ref().filter(|_| step.decodes) {
            // What would not be computed need not be read.
            self.lossy.is_cached.resize(n_experts, false);
            mark(&mut self.lossy.is_cached);
            rules.edit(&self.logits, &mut self.routing, &mut self.lossy);
        }
        self.rank(moe.weights_of.as_deref(), n_experts);
        true
    }

    /// The experts whose weights the routing wants, the most wanted first.
    fn rank(&mut self, weights_of: Option<&[u16]>, n_experts: usize) {
        self.counts.clear();
        self.counts.resize(n_experts, 0);
        for expert in self.routing.experts() {
            if let Some(count) = self.counts.get_mut(weights(weights_of, *expert)) {
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
