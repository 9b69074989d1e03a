//! Attention cut by heads into experts, of which every token takes some (Union of Experts, arXiv 2503.02495).
//!
//! An expert is an attention of its own among the tokens that took it: its cache holds those and no others, and its
//! positions count only them. A token gets the sum of what its experts say, times one number.

use cadre_kernels::{MatmulScratch, Matrix};
use cadre_routing::{Policy, Routing, RoutingError};

use super::told::Told;
use super::{Attention, AttentionScratch, Linear, Rope, RopeAngles, Step};
use crate::batch::{Sequence, Span};
use crate::model::Observer;
use crate::session::SessionShape;

/// One layer's router and experts.
#[derive(Debug)]
pub(crate) struct AttentionExperts {
    /// `[n_experts, d]`; always f32.
    pub(crate) gate: Linear,
    pub(crate) policy: Box<dyn Policy>,
    /// Attentions over some of the heads.
    pub(crate) experts: Vec<Attention>,
    pub(crate) rope: Rope,
}

/// Buffers of [`AttentionExperts`]; the experts use them one after the other.
#[derive(Debug)]
pub(crate) struct AttentionExpertsScratch {
    /// `[rows, n_experts]`.
    logits: Vec<f32>,
    routing: Routing,
    taken: Taken,
    angles: RopeAngles,
    /// Input and output of an expert, `[its rows, d]`.
    x: Vec<f32>,
    y: Vec<f32>,
    attention: AttentionScratch,
    /// The routing of one sequence of a batch, for an observer.
    part: Routing,
    /// Output norm of each pair in routing order, when an observer wants it.
    norms: Vec<f32>,
}

/// The rows of a pass that take an expert.
#[derive(Debug, Default)]
struct Taken {
    /// Of each sequence, in the expert's own positions.
    spans: Vec<Span>,
    /// Which rows of the pass these are, the pair of the routing that says so, and the weight of the expert there.
    rows: Vec<usize>,
    pairs: Vec<usize>,
    weights: Vec<f32>,
}

impl AttentionExpertsScratch {
    pub(crate) fn new(shape: &SessionShape, capacity: usize) -> Self {
        let kv = &shape.kv;
        let n_heads = shape.n_heads / kv.n_experts;
        let rows = |width: usize| vec![0.0; capacity * width];
        Self {
            logits: rows(kv.n_experts),
            routing: Routing::with_capacity(capacity, kv.n_experts),
            taken: Taken {
                spans: Vec::new(),
                rows: Vec::with_capacity(capacity),
                pairs: Vec::with_capacity(capacity),
                weights: Vec::with_capacity(capacity),
            },
            angles: RopeAngles::default(),
            x: rows(shape.d_model),
            y: rows(shape.d_model),
            attention: AttentionScratch::new(n_heads, kv.n_kv_heads, kv.key_dim, capacity),
            part: Routing::new(),
            norms: Vec::new(),
        }
    }
}

impl AttentionExperts {
    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        self.gate.matrices(all);
        for expert in &self.experts {
            expert.matrices(all);
        }
    }

    /// Stores keys and values of every row of `x_td` with the experts that it takes.
    pub(crate) fn remember(
        &self,
        step: Step<'_>,
        x_td: &[f32],
        batch: &mut [Sequence<'_>],
        (scratch, matmul): (&mut AttentionExpertsScratch, &mut MatmulScratch),
    ) -> Result<(), RoutingError> {
        self.route(step, x_td, (scratch, matmul))?;
        let d = self.gate.weight.n_in();
        for (index, expert) in self.experts.iter().enumerate() {
            let layer = self.cache_of(step, index);
            for (span, sequence) in step.spans.iter().zip(&mut *batch) {
                // What is there from here on was rewound, or is of a pass that failed.
                let kv = &mut sequence.session.kv;
                let n_before = kv.position_in(layer, span.position);
                kv.held[layer].truncate(n_before);
            }
            let taken = &mut scratch.taken;
            taken.take((step, index, layer), &scratch.routing, batch);
            let Some(x) = taken.gather(d, x_td, &mut scratch.x) else {
                continue;
            };
            for ((own, span), sequence) in taken.spans.iter().zip(step.spans).zip(&mut *batch) {
                let rows = &taken.rows[own.first_row..own.end()];
                let positions = rows.iter().map(|row| span.position_of(*row) as u32);
                sequence.session.kv.held[layer].extend(positions);
            }
            let angles = &mut scratch.angles;
            self.rope.angles(step.compute, &taken.spans, angles);
            let own = Step {
                layer,
                spans: &taken.spans,
                ..step
            };
            expert.remember(own, angles, x, batch, (&mut scratch.attention, matmul));
        }
        Ok(())
    }

    /// `out_td = attention(x_td)`, for rows whose keys and values are stored; tells `observer` about the routing, if it
    /// watches.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        (x_td, out_td): (&[f32], &mut [f32]),
        batch: &[Sequence<'_>],
        (scratch, matmul): (&mut AttentionExpertsScratch, &mut MatmulScratch),
        observer: &mut dyn Observer,
    ) -> Result<(), RoutingError> {
        // Again, because there may be fewer rows now than were stored.
        self.route(step, x_td, (scratch, matmul))?;
        let (kernels, d) = (step.compute.kernels(), self.gate.weight.n_in());
        out_td.fill(0.0);
        scratch.norms.clear();
        if observer.watches() && observer.wants_norms() {
            scratch.norms.resize(scratch.routing.n_pairs(), 0.0);
        }
        for (index, expert) in self.experts.iter().enumerate() {
            let layer = self.cache_of(step, index);
            let taken = &mut scratch.taken;
            taken.take((step, index, layer), &scratch.routing, batch);
            let Some(x) = taken.gather(d, x_td, &mut scratch.x) else {
                continue;
            };
            let angles = &mut scratch.angles;
            self.rope.angles(step.compute, &taken.spans, angles);
            let own = Step {
                layer,
                spans: &taken.spans,
                ..step
            };
            let y = &mut scratch.y[..x.len()];
            let attention = &mut scratch.attention;
            expert.forward(own, angles, (x, &mut *y), batch, (attention, matmul));
            if !scratch.norms.is_empty() {
                for (y, pair) in y.chunks_exact(d).zip(&taken.pairs) {
                    scratch.norms[*pair] = kernels.dot(y, y).sqrt();
                }
            }
            // Experts in their order, whatever else is in the pass.
            let outputs = y.chunks_exact(d).zip(&taken.rows).zip(&taken.weights);
            for ((y, row), weight) in outputs {
                kernels.axpy(*weight, y, &mut out_td[row * d..][..d]);
            }
        }
        if observer.watches() {
            let told = Told {
                logits: &scratch.logits[..step.n_rows() * self.experts.len()],
                routing: &scratch.routing,
                norms: &scratch.norms,
                copies_from: None,
            };
            told.each(step, &mut scratch.part, &mut |event| {
                observer.attention_routed(event);
            });
        }
        Ok(())
    }

    /// Picks experts for every row.
    fn route(
        &self,
        step: Step<'_>,
        x_td: &[f32],
        (scratch, matmul): (&mut AttentionExpertsScratch, &mut MatmulScratch),
    ) -> Result<(), RoutingError> {
        let logits = &mut scratch.logits[..step.n_rows() * self.experts.len()];
        self.gate.forward(step.compute, x_td, logits, matmul);
        self.policy.route(logits, &mut scratch.routing)
    }

    /// Index of an expert's cache in a session.
    fn cache_of(&self, step: Step<'_>, expert: usize) -> usize {
        step.layer * self.experts.len() + expert
    }
}

impl Taken {
    /// Finds the rows that take `expert`, whose cache is the sessions' `layer`.
    fn take(
        &mut self,
        (step, expert, layer): (Step<'_>, usize, usize),
        routing: &Routing,
        batch: &[Sequence<'_>],
    ) {
        self.spans.clear();
        self.rows.clear();
        self.pairs.clear();
        self.weights.clear();
        for (span, sequence) in step.spans.iter().zip(batch) {
            let first_row = self.rows.len();
            for row in span.first_row..span.end() {
                let (experts, weights) = routing.token(row);
                let place = experts.iter().position(|id| usize::from(*id) == expert);
                if let Some(place) = place {
                    self.rows.push(row);
                    self.pairs.push(routing.offsets()[row] as usize + place);
                    self.weights.push(weights[place]);
                }
            }
            let first = self.rows.get(first_row);
            let position = first.map_or(span.position, |row| span.position_of(*row));
            self.spans.push(Span {
                first_row,
                n_rows: self.rows.len() - first_row,
                position: sequence.session.kv.position_in(layer, position),
                n_ctx: span.n_ctx,
            });
        }
    }

    /// The rows of `x_td` that were found, `d` wide, put together in `to`; `None` where there are none.
    fn gather<'a>(&self, d: usize, x_td: &[f32], to: &'a mut [f32]) -> Option<&'a [f32]> {
        let to = &mut to[..self.rows.len() * d];
        for (to, row) in to.chunks_exact_mut(d).zip(&self.rows) {
            to.copy_from_slice(&x_td[row * d..][..d]);
        }
        (!self.rows.is_empty()).then_some(&*to)
    }
}
