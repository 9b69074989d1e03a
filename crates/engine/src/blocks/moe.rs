//! The mixture-of-experts block: router logits, policy, grouping by expert, experts, combination.
//!
//! The order of the stages is the order of the functions below. A token's output adds its experts in the
//! order of its routing, so it does not depend on the other tokens of the chunk.

use cadre_kernels::{Compute, MatmulScratch};
use cadre_routing::{Policy, Routing, RoutingError};

use super::experts::ExpertRows;
use super::{Experts, FeedForward, FeedForwardScratch, Linear, Step};
use crate::model::{Observer, RoutingEvent};

/// One layer's router and experts.
#[derive(Debug)]
pub(crate) struct Moe {
    /// Router, `[n_experts, d]`, always f32.
    pub(crate) gate: Linear,
    pub(crate) policy: Box<dyn Policy>,
    pub(crate) experts: Experts,
    pub(crate) shared: Option<Shared>,
}

/// The expert that every token uses.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) expert: FeedForward,
    /// `[d]`: its output is multiplied by the sigmoid of this projection.
    pub(crate) gate: Option<Vec<f32>>,
}

/// Sizes that scratch is made for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MoeShape {
    pub(crate) d_model: usize,
    pub(crate) n_experts: usize,
    /// The most experts that one token can get.
    pub(crate) max_picks: usize,
    /// Width of an expert.
    pub(crate) d_expert: usize,
    /// Width of the shared expert; 0 without.
    pub(crate) d_shared: usize,
}

/// Buffers of [`Moe::forward`] for a chunk of tokens; the feed-forward's serve dense layers too.
#[derive(Debug)]
pub(crate) struct MoeScratch {
    /// `[chunk, n_experts]`.
    logits: Vec<f32>,
    routing: Routing,
    groups: Groups,
    /// Inputs and outputs of the pairs, sorted by expert: `[chunk * max_picks, d_model]`.
    x_pd: Vec<f32>,
    y_pd: Vec<f32>,
    /// Output of the shared expert, `[chunk, d_model]`.
    shared_td: Vec<f32>,
    /// Output norm of each pair in routing order, when an observer wants it.
    norms: Vec<f32>,
    pub(crate) ffn: FeedForwardScratch,
    largest_input: usize,
}

impl MoeScratch {
    /// For `chunk` tokens; `d_dense` is the width of dense layers, 0 without.
    pub(crate) fn new(shape: &MoeShape, d_dense: usize, chunk: usize) -> Self {
        let n_pairs = chunk * shape.max_picks;
        let inner = (n_pairs * shape.d_expert).max(chunk * d_dense.max(shape.d_shared));
        Self {
            logits: vec![0.0; chunk * shape.n_experts],
            routing: Routing::with_capacity(chunk, shape.max_picks),
            groups: Groups::with_capacity(n_pairs, shape.n_experts),
            x_pd: vec![0.0; n_pairs * shape.d_model],
            y_pd: vec![0.0; n_pairs * shape.d_model],
            shared_td: vec![
                0.0;
                if shape.d_shared > 0 {
                    chunk * shape.d_model
                } else {
                    0
                }
            ],
            norms: Vec::new(),
            ffn: FeedForwardScratch::new(inner),
            largest_input: inner.max(n_pairs * shape.d_model),
        }
    }

    /// Values of the largest product input.
    pub(crate) fn largest_input(&self) -> usize {
        self.largest_input
    }
}

impl Moe {
    /// Bytes of the router and all experts.
    pub(crate) fn n_bytes(&self) -> usize {
        let shared = self
            .shared
            .as_ref()
            .map_or(0, |shared| shared.expert.n_bytes());
        self.gate.n_bytes() + self.experts.n_bytes() + shared
    }

    /// `out_td = sum over picks of weight * expert(x_td)`; tells `observer` about the routing.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        x_td: &[f32],
        out_td: &mut [f32],
        (scratch, matmul): (&mut MoeScratch, &mut MatmulScratch),
        observer: &mut dyn Observer,
    ) -> Result<(), RoutingError> {
        let MoeScratch {
            logits,
            routing,
            groups,
            x_pd,
            y_pd,
            shared_td,
            norms,
            ffn,
            ..
        } = scratch;
        let logits = &mut logits[..step.n_tokens * self.gate.n_out()];
        self.gate.forward(step.compute, x_td, logits, matmul);
        self.policy.route(logits, routing)?;

        let d = self.gate.weight.n_in();
        groups.sort(routing, self.experts.n_experts());
        let n_rows = groups.n_rows();
        let (x_pd, y_pd) = (&mut x_pd[..n_rows * d], &mut y_pd[..n_rows * d]);
        groups.gather(x_td, d, x_pd);
        let rows = ExpertRows {
            active: &groups.active,
            offsets: &groups.offsets,
            x_pd,
        };
        self.experts
            .forward(step.compute, rows, y_pd, (ffn, matmul));
        combine(step.compute, routing, groups, y_pd, out_td);
        if let Some(shared) = &self.shared {
            let shared_td = &mut shared_td[..x_td.len()];
            shared.add(step.compute, (x_td, shared_td), out_td, (ffn, matmul));
        }

        norms.clear();
        if observer.wants_norms() {
            output_norms(step.compute, groups, y_pd, d, norms);
        }
        let first_position = step.position;
        observer.routed(&RoutingEvent {
            layer: step.layer,
            first_position,
            logits,
            routing,
            norms,
        });
        Ok(())
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
        let rows = x_td.chunks_exact(d).zip(y_td.chunks_exact(d));
        for ((x, y), out) in rows.zip(out_td.chunks_exact_mut(d)) {
            let weight = match &self.gate {
                None => 1.0,
                Some(gate) => 1.0 / (1.0 + (-kernels.dot(gate, x)).exp()),
            };
            kernels.axpy(weight, y, out);
        }
    }
}

/// The pairs of a routing sorted by expert; pairs of one expert stay in the order of their tokens.
#[derive(Debug, Default)]
struct Groups {
    active: Vec<u16>,
    offsets: Vec<usize>,
    /// Row of each pair of the routing; [`NO_ROW`] for experts that are not computed.
    row_of_pair: Vec<u32>,
    /// Token of each row.
    token_of_row: Vec<u32>,
    /// Next free row of each expert while sorting.
    next: Vec<u32>,
}

/// Marks the pair of a null expert, which has no weights and adds nothing.
const NO_ROW: u32 = u32::MAX;

impl Groups {
    fn with_capacity(n_pairs: usize, n_experts: usize) -> Self {
        Self {
            active: Vec::with_capacity(n_experts),
            offsets: Vec::with_capacity(n_experts + 1),
            row_of_pair: Vec::with_capacity(n_pairs),
            token_of_row: Vec::with_capacity(n_pairs),
            next: Vec::with_capacity(n_experts),
        }
    }

    fn n_rows(&self) -> usize {
        self.token_of_row.len()
    }

    /// Counting sort of the pairs. Ids from `n_experts` on are null experts.
    fn sort(&mut self, routing: &Routing, n_experts: usize) {
        self.next.clear();
        self.next.resize(n_experts, 0);
        for expert in routing.experts() {
            if let Some(count) = self.next.get_mut(usize::from(*expert)) {
                *count += 1;
            }
        }
        self.active.clear();
        self.offsets.clear();
        self.offsets.push(0);
        let mut n_rows = 0;
        for (expert, next) in (0u16..).zip(&mut self.next) {
            let count = std::mem::replace(next, n_rows);
            n_rows += count;
            if count > 0 {
                self.active.push(expert);
                self.offsets.push(n_rows as usize);
            }
        }
        self.row_of_pair.clear();
        self.token_of_row.clear();
        self.token_of_row.resize(n_rows as usize, 0);
        for (t, (experts, _)) in (0u32..).zip(routing.iter()) {
            for expert in experts {
                let mut row = NO_ROW;
                if let Some(next) = self.next.get_mut(usize::from(*expert)) {
                    row = *next;
                    *next += 1;
                    self.token_of_row[row as usize] = t;
                }
                self.row_of_pair.push(row);
            }
        }
    }

    /// Copies each row's input from its token.
    fn gather(&self, x_td: &[f32], d: usize, x_pd: &mut [f32]) {
        for (x, t) in x_pd.chunks_exact_mut(d).zip(&self.token_of_row) {
            x.copy_from_slice(&x_td[*t as usize * d..][..d]);
        }
    }
}

/// Adds up each token's experts in the order of its picks.
fn combine(
    compute: &Compute,
    routing: &Routing,
    groups: &Groups,
    y_pd: &[f32],
    out_td: &mut [f32],
) {
    let d = out_td.len() / routing.n_tokens().max(1);
    if d == 0 {
        return;
    }
    let kernels = compute.kernels();
    let work = routing.n_pairs().div_ceil(routing.n_tokens()) * d;
    compute.for_each_chunk(out_td, d, work, |t, out| {
        out.fill(0.0);
        let first = routing.offsets()[t] as usize;
        let (_, weights) = routing.token(t);
        for (weight, row) in weights.iter().zip(&groups.row_of_pair[first..]) {
            if *row != NO_ROW {
                kernels.axpy(*weight, &y_pd[*row as usize * d..][..d], out);
            }
        }
    });
}

fn output_norms(compute: &Compute, groups: &Groups, y_pd: &[f32], d: usize, norms: &mut Vec<f32>) {
    let kernels = compute.kernels();
    norms.extend(groups.row_of_pair.iter().map(|row| match *row {
        NO_ROW => 0.0,
        row => {
            let y = &y_pd[row as usize * d..][..d];
            kernels.dot(y, y).sqrt()
        }
    }));
}

#[cfg(test)]
mod tests {
    use cadre_checkpoint::Activation;
    use cadre_kernels::{Isa, Kernels, Matrix};
    use cadre_routing::policies::TopK;
    use cadre_testkit::{Random, assert_close};

    use super::*;
    use crate::model::NoObserver;

    /// Keeps what it is told.
    #[derive(Default)]
    struct Recorder {
        places: Vec<(usize, usize)>,
        logits: Vec<f32>,
        routing: Routing,
        norms: Vec<f32>,
    }

    impl Observer for Recorder {
        fn routed(&mut self, event: &RoutingEvent<'_>) {
            self.places.push((event.layer, event.first_position));
            self.logits.extend_from_slice(event.logits);
            self.norms.extend_from_slice(event.norms);
            self.routing = event.routing.clone();
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
            gate: Linear {
                weight: gate,
                bias: None,
            },
            policy: Box::new(policy),
            experts: Experts::new(experts),
            shared: None,
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
        let logits = product(&moe.gate.weight, x);
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
        let compute = Compute::new(Kernels::for_isa(Isa::Scalar).unwrap(), 1);
        let mut scratch = (FeedForwardScratch::new(64), MatmulScratch::default());
        let active = [expert as u16];
        let rows = ExpertRows {
            active: &active,
            offsets: &[0, 1],
            x_pd: x,
        };
        moe.experts
            .forward(&compute, rows, y, (&mut scratch.0, &mut scratch.1));
    }

    fn run(moe: &Moe, shape: &MoeShape, x_td: &[f32], observer: &mut dyn Observer) -> Vec<f32> {
        let compute = Compute::new(Kernels::detect(), 2);
        let n_tokens = x_td.len() / shape.d_model;
        let mut scratch = MoeScratch::new(shape, 0, n_tokens.max(1));
        let mut matmul = MatmulScratch::default();
        let mut out = vec![f32::NAN; x_td.len()];
        let step = Step {
            compute: &compute,
            layer: 3,
            position: 10,
            n_tokens,
        };
        moe.forward(step, x_td, &mut out, (&mut scratch, &mut matmul), observer)
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
                d_shared: 0,
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
            d_shared: 0,
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
            d_shared: 0,
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
        assert_eq!(places, [(3, 10)]);
        assert_eq!((logits.len(), routing.n_tokens(), norms.len()), (20, 5, 10));
        for (t, x) in x_td.chunks_exact(16).enumerate() {
            assert_close(
                "logits",
                &logits[t * 4..][..4],
                &product(&moe.gate.weight, x),
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

    #[test]
    fn null_experts_get_no_row() {
        let mut routing = Routing::new();
        routing.push_token(&[2, 7], &[0.5, 0.0]);
        routing.push_token(&[], &[]);
        routing.push_token(&[0, 2], &[0.25, 0.75]);
        let mut groups = Groups::default();
        groups.sort(&routing, 3);
        assert_eq!(groups.active, [0, 2]);
        assert_eq!(groups.offsets, [0, 1, 3]);
        assert_eq!(groups.row_of_pair, [1, NO_ROW, 0, 2]);
        assert_eq!(groups.token_of_row, [2, 0, 2]);

        let compute = Compute::new(Kernels::detect(), 1);
        let mut out = [9.0; 3];
        combine(&compute, &routing, &groups, &[1.0, 10.0, 100.0], &mut out);
        assert_eq!(out, [5.0, 0.0, 75.25]);
    }
}
