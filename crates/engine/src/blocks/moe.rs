//! The mixture-of-experts block: router logits, policy, grouping by expert, experts, combination.
//!
//! The order of the stages is the order of the functions below. A token's output adds its experts in the
//! order of its routing, so it does not depend on the other tokens of the pass.

use cadre_kernels::{Compute, MatmulScratch, Matrix};
use cadre_routing::{Policy, Routing, RoutingError};

use super::ahead::{Ahead, AheadScratch};
use super::groups::{Groups, combine, output_norms};
use super::lossy::LossyScratch;
use super::pick::SteerScratch;
use super::told::Told;
use super::{
    Experts, FeedForward, FeedForwardScratch, LossyRules, Residual, Router, RouterScratch, Step,
};
use crate::error::EngineError;
use crate::model::Observer;

/// One layer's router and experts.
#[derive(Debug)]
pub(crate) struct Moe {
    pub(crate) router: Router,
    pub(crate) policy: Box<dyn Policy>,
    /// What changes the policy's picks, if anything.
    pub(crate) lossy: Option<Box<LossyRules>>,
    pub(crate) experts: Experts,
    /// For every expert that the router picks from the one of `experts` whose weights it has; `None` where each has its own.
    pub(crate) weights_of: Option<Vec<u16>>,
    pub(crate) shared: Option<Shared>,
    pub(crate) residual: Option<Residual>,
}

/// The expert that every token uses.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) expert: FeedForward,
    /// `[d]`: its output is multiplied by the sigmoid of this projection.
    pub(crate) gate: Option<Vec<f32>>,
}

/// What ends a pass through the block.
#[derive(Debug)]
pub(crate) enum MoeError {
    Routing(RoutingError),
    /// An expert could not be brought in.
    Experts(EngineError),
}

impl From<RoutingError> for MoeError {
    fn from(source: RoutingError) -> Self {
        Self::Routing(source)
    }
}

/// Sizes that scratch is made for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MoeShape {
    pub(crate) d_model: usize,
    /// Router logits of a token, of the layer that has most.
    pub(crate) n_experts: usize,
    /// The most experts that one token can get.
    pub(crate) max_picks: usize,
    /// Width of an expert.
    pub(crate) d_expert: usize,
    /// Width of the wider of shared expert and feed-forward beside the experts; 0 without.
    pub(crate) d_beside: usize,
    /// Width of the state of recurrent routers; 0 without.
    pub(crate) d_router: usize,
    /// Logits of a token that are made before the layers; 0 without.
    pub(crate) n_foretold: usize,
}

/// Buffers of [`Moe::forward`] for the rows of a pass; the feed-forward's serve dense layers too.
#[derive(Debug)]
pub(crate) struct MoeScratch {
    /// `[rows, n_experts]`.
    logits: Vec<f32>,
    pub(crate) router: RouterScratch,
    routing: Routing,
    /// The routing of one sequence of a batch, for an observer.
    part: Routing,
    groups: Groups,
    /// Outputs of the pairs, and before them their inputs, sorted by expert: `[rows * max_picks, d_model]`.
    y_pd: Vec<f32>,
    /// Output of what runs beside the experts, `[rows, d_model]`.
    beside_td: Vec<f32>,
    /// Output norm of each pair in routing order, when an observer wants it.
    norms: Vec<f32>,
    /// Offsets of the rows of a batch of experts.
    offsets: Vec<usize>,
    steer: SteerScratch,
    pub(super) ahead: AheadScratch,
    lossy: LossyScratch,
    pub(crate) ffn: FeedForwardScratch,
    largest_input: usize,
}

impl MoeScratch {
    /// For `capacity` rows; `d_dense` is the width of dense layers, 0 without.
    pub(crate) fn new(shape: &MoeShape, d_dense: usize, capacity: usize) -> Self {
        let n_pairs = capacity * shape.max_picks;
        let inner = (n_pairs * shape.d_expert).max(capacity * d_dense.max(shape.d_beside));
        let n_beside = if shape.d_beside > 0 { capacity } else { 0 };
        Self {
            logits: vec![0.0; capacity * shape.n_experts],
            router: RouterScratch::new((shape.d_router, shape.n_foretold), capacity),
            routing: Routing::with_capacity(capacity, shape.max_picks),
            part: Routing::new(),
            groups: Groups::with_capacity(n_pairs, shape.n_experts),
            y_pd: vec![0.0; n_pairs * shape.d_model],
            beside_td: vec![0.0; n_beside * shape.d_model],
            norms: Vec::new(),
            offsets: Vec::with_capacity(shape.n_experts + 1),
            steer: SteerScratch::default(),
            ahead: AheadScratch::default(),
            lossy: LossyScratch::default(),
            ffn: FeedForwardScratch::new(inner),
            largest_input: inner,
        }
    }

    /// Values of the largest product input.
    pub(crate) fn largest_input(&self) -> usize {
        self.largest_input
    }
}

impl Moe {
    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        self.router.matrices(all);
        self.experts.matrices(all);
        if let Some(shared) = &self.shared {
            shared.expert.matrices(all);
        }
        if let Some(residual) = &self.residual {
            residual.mlp.matrices(all);
        }
    }

    /// `out_td = sum over picks of weight * expert(x_td)`; tells `observer` about the routing, if it watches. Experts of
    /// the layer that `ahead` is about are read meanwhile.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        (x_td, out_td): (&[f32], &mut [f32]),
        (scratch, matmul): (&mut MoeScratch, &mut MatmulScratch),
        ahead: Option<Ahead<'_>>,
        observer: &mut dyn Observer,
    ) -> Result<(), MoeError> {
        let MoeScratch {
            logits,
            router,
            routing,
            groups,
            y_pd,
            beside_td,
            offsets,
            ffn,
            ..
        } = scratch;
        let (compute, d) = (step.compute, x_td.len() / step.n_rows().max(1));
        let logits = &mut logits[..step.n_rows() * self.router.n_logits()];
        self.router.forward(step, x_td, logits, (router, matmul));
        self.pick(step, logits, (routing, &mut scratch.steer))?;
        if let Some(rules) = self.lossy.as_ref().filter(|_| step.decodes) {
            self.experts.mark_cached(&mut scratch.lossy.is_cached);
            rules.edit(logits, routing, &mut scratch.lossy);
        }

        let weights_of = self.weights_of.as_deref();
        groups.count((routing, weights_of), self.experts.n_experts());
        let mut turn = self
            .experts
            .begin(&groups.active, &groups.counts, step.n_rows());
        groups
            .rows
            .lay_out((routing, weights_of), turn.order(), &groups.counts);
        if let Some(ahead) = ahead {
            ahead.look(step, &mut turn, (&mut scratch.ahead, router, matmul));
        }
        if y_pd.len() < groups.rows.len() * d {
            // More picks per token than the model's own.
            y_pd.resize(groups.rows.len() * d, 0.0);
        }
        let y_pd = &mut y_pd[..groups.rows.len() * d];
        turn.forward(
            compute,
            groups.rows.as_rows(),
            (x_td, y_pd),
            (offsets, ffn, matmul),
        )
        .map_err(MoeError::Experts)?;
        drop(turn);
        combine(compute, routing, &groups.rows, y_pd, out_td);
        if let Some(shared) = &self.shared {
            let shared_td = &mut beside_td[..x_td.len()];
            shared.add(compute, (x_td, shared_td), out_td, (ffn, matmul));
        }
        if let Some(residual) = &self.residual {
            let residual_td = &mut beside_td[..x_td.len()];
            residual.add(compute, (x_td, residual_td), out_td, (ffn, matmul));
        }
        if observer.watches() {
            self.tell((step, d), scratch, observer);
        }
        Ok(())
    }

    /// Tells `observer` about the routing of every sequence, with rows of width `d`.
    fn tell(
        &self,
        (step, d): (Step<'_>, usize),
        scratch: &mut MoeScratch,
        observer: &mut dyn Observer,
    ) {
        let MoeScratch {
            logits,
            routing,
            part,
            groups,
            y_pd,
            norms,
            ..
        } = scratch;
        let n_experts = self.router.n_logits();
        let has_copies = self
            .lossy
            .as_ref()
            .is_some_and(|r| r.lossy.low_bit.is_some());
        norms.clear();
        if observer.wants_norms() {
            output_norms(step.compute, &groups.rows, y_pd, d, norms);
        }
        let told = Told {
            logits: &logits[..step.n_rows() * n_experts],
            routing,
            norms,
            copies_from: has_copies.then_some(n_experts as u16),
        };
        told.each(step, part, &mut |event| observer.routed(event));
    }
}

impl Shared {
    /// `out_td += self(x_td)`, with the expert's output in `y_td`.
    fn add(
        &self,
        compute: &Compute,
        (x_td, y_td): (&[f32], &mut [f32]),
        out_td: &mut [f32],
        scratch: (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        self.expert.forward(compute, x_td, y_td, scratch);
        let kernels = compute.kernels();
        let d = self.expert.down_proj.n_out();
        compute.for_each_chunk(out_td, d, 2 * d, |row, out| {
            let weight = match &self.gate {
                None => 1.0,
                Some(gate) => 1.0 / (1.0 + (-kernels.dot(gate, &x_td[row * d..][..d])).exp()),
            };
            kernels.axpy(weight, &y_td[row * d..][..d], out);
        });
    }
}

#[cfg(test)]
mod tests {
    use cadre_checkpoint::Activation;
    use cadre_kernels::{Isa, Kernels, Matrix};
    use cadre_routing::policies::TopK;
    use cadre_testkit::{Random, assert_close};

    use super::super::Linear;
    use super::super::experts::ExpertRows;
    use super::*;
    use crate::batch::Span;
    use crate::model::{NoObserver, RoutingEvent};

    /// Keeps what it is told.
    #[derive(Default)]
    struct Recorder {
        /// Sequence, layer, first position.
        places: Vec<(usize, usize, usize)>,
        logits: Vec<f32>,
        routing: Routing,
        norms: Vec<f32>,
    }

    impl Observer for Recorder {
        fn routed(&mut self, event: &RoutingEvent<'_>) {
            let place = (event.sequence, event.layer, event.first_position);
            self.places.push(place);
            self.logits.extend_from_slice(event.logits);
            self.norms.extend_from_slice(event.norms);
            for (experts, weights) in event.routing.iter() {
                self.routing.push_token(experts, weights);
            }
        }

        fn wants_norms(&self) -> bool {
            true
        }
    }

    fn random_moe(shape: &MoeShape, norm_topk_prob: bool) -> Moe {
        let mut random = Random::new(5);
        let mut matrix =
            |n_out, n_in| Matrix::from_f32(n_out, n_in, random.values(n_out * n_in, 0.4)).unwrap();
        let (d, f) = (shape.d_model, shape.d_expert);
        let gate = matrix(shape.n_experts, d);
        let mut linear = |n_out, n_in| Linear {
            weight: matrix(n_out, n_in),
            bias: None,
        };
        let mut expert = || FeedForward {
            gate_proj: linear(f, d),
            up_proj: linear(f, d),
            down_proj: linear(d, f),
            activation: Activation::Silu,
        };
        let experts = (0..shape.n_experts).map(|_| expert()).collect();
        let policy = TopK::new(shape.n_experts, shape.max_picks, norm_topk_prob).unwrap();
        Moe {
            router: Router::Linear(Linear {
                weight: gate,
                bias: None,
            }),
            policy: Box::new(policy),
            lossy: None,
            experts: Experts::Resident(experts),
            weights_of: None,
            shared: None,
            residual: None,
        }
    }

    fn gate(moe: &Moe) -> &Matrix {
        match &moe.router {
            Router::Linear(gate) => &gate.weight,
            other => panic!("{other:?}"),
        }
    }

    fn product(w: &Matrix, x: &[f32]) -> Vec<f32> {
        let mut row = vec![0.0; w.n_in()];
        let dot = |o| {
            w.row(o, &mut row);
            row.iter().zip(x).map(|(a, b)| a * b).sum()
        };
        (0..w.n_out()).map(dot).collect()
    }

    /// One token, straight from the definition: every expert computed, the picked ones added.
    fn reference(moe: &Moe, top_k: usize, norm_topk_prob: bool, x: &[f32]) -> Vec<f32> {
        let logits = product(gate(moe), x);
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        let mut picks: Vec<(usize, f32)> =
            logits.iter().map(|l| l.exp() / total).enumerate().collect();
        picks.sort_by(|a, b| b.1.total_cmp(&a.1));
        picks.truncate(top_k);
        let kept: f32 = if norm_topk_prob {
            picks.iter().map(|p| p.1).sum()
        } else {
            1.0
        };
        let mut out = vec![0.0; x.len()];
        for (expert, p) in picks {
            let mut y = vec![0.0; x.len()];
            expert_reference(moe, expert, x, &mut y);
            for (out, y) in out.iter_mut().zip(&y) {
                *out += p / kept * y;
            }
        }
        out
    }

    fn expert_reference(moe: &Moe, expert: usize, x: &[f32], y: &mut [f32]) {
        let active = [expert as u16];
        let compute = Compute::new(Kernels::for_isa(Isa::Scalar).unwrap(), 1);
        let mut scratch = (FeedForwardScratch::new(64), MatmulScratch::default());
        let rows = ExpertRows {
            offsets: &[0, 1],
            token_of_row: &[0],
        };
        let mut turn = moe.experts.begin(&active, &[], 1);
        let scratch = (&mut Vec::new(), &mut scratch.0, &mut scratch.1);
        turn.forward(&compute, rows, (x, y), scratch).unwrap();
    }

    fn run(moe: &Moe, shape: &MoeShape, x_td: &[f32], observer: &mut dyn Observer) -> Vec<f32> {
        let compute = Compute::new(Kernels::detect(), 2);
        let n_tokens = x_td.len() / shape.d_model;
        let mut scratch = MoeScratch::new(shape, 0, n_tokens.max(1));
        let mut matmul = MatmulScratch::default();
        let mut out = vec![f32::NAN; x_td.len()];
        // The last two tokens, if there are so many, are a sequence of their own.
        let n_last = if n_tokens > 2 { 2 } else { 0 };
        let span = |first_row, n_rows, position| Span {
            first_row,
            n_rows,
            position,
            n_ctx: 100,
        };
        let n_first = n_tokens - n_last;
        let step = Step {
            compute: &compute,
            layer: 3,
            decodes: false,
            steering: &[],
            spans: &[
                span(0, n_first, 10),
                span(n_first, 0, 7),
                span(n_first, n_last, 20),
            ],
        };
        let scratch = (&mut scratch, &mut matmul);
        moe.forward(step, (x_td, &mut out), scratch, None, observer)
            .unwrap();
        out
    }

    #[test]
    fn the_block_is_its_definition() {
        for (n_experts, top_k, norm) in [(8, 2, true), (8, 3, false), (1, 1, true), (5, 5, false)] {
            let shape = MoeShape {
                d_model: 20,
                n_experts,
                max_picks: top_k,
                d_expert: 12,
                d_beside: 0,
                d_router: 0,
                n_foretold: 0,
            };
            let moe = random_moe(&shape, norm);
            let x_td = Random::new(9).values(17 * shape.d_model, 1.0);
            let got = run(&moe, &shape, &x_td, &mut NoObserver);
            for (x, got) in x_td.chunks_exact(20).zip(got.chunks_exact(20)) {
                assert_close("moe", got, &reference(&moe, top_k, norm, x), 1e-5);
            }
        }
    }

    #[test]
    fn tokens_do_not_touch_each_other() {
        let shape = MoeShape {
            d_model: 32,
            n_experts: 6,
            max_picks: 2,
            d_expert: 40,
            d_beside: 0,
            d_router: 0,
            n_foretold: 0,
        };
        let moe = random_moe(&shape, true);
        let x_td = Random::new(2).values(50 * shape.d_model, 1.0);
        let together = run(&moe, &shape, &x_td, &mut NoObserver);
        for (x, together) in x_td.chunks_exact(32).zip(together.chunks_exact(32)) {
            assert_eq!(run(&moe, &shape, x, &mut NoObserver), together);
        }
        assert!(run(&moe, &shape, &[], &mut NoObserver).is_empty());
    }

    #[test]
    fn the_observer_sees_logits_routing_and_norms() {
        let shape = MoeShape {
            d_model: 16,
            n_experts: 4,
            max_picks: 2,
            d_expert: 8,
            d_beside: 0,
            d_router: 0,
            n_foretold: 0,
        };
        let moe = random_moe(&shape, true);
        let x_td = Random::new(3).values(5 * shape.d_model, 1.0);
        let mut recorder = Recorder::default();
        run(&moe, &shape, &x_td, &mut recorder);
        let Recorder {
            places,
            logits,
            routing,
            norms,
        } = recorder;
        assert_eq!(places, [(0, 3, 10), (2, 3, 20)]);
        assert_eq!((logits.len(), routing.n_tokens(), norms.len()), (20, 5, 10));
        for (t, x) in x_td.chunks_exact(16).enumerate() {
            assert_close(
                "logits",
                &logits[t * 4..][..4],
                &product(gate(&moe), x),
                1e-6,
            );
            for (slot, expert) in routing.token(t).0.iter().enumerate() {
                let mut y = [0.0; 16];
                expert_reference(&moe, usize::from(*expert), x, &mut y);
                let norm = y.iter().map(|v| v * v).sum::<f32>().sqrt();
                assert_close("norm", &norms[t * 2 + slot..][..1], &[norm], 1e-5);
            }
        }
    }
}
