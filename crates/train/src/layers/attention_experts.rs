//! Selective attention: attention cut by heads into experts, of which every token takes some.
//!
//! Paper: Union of Experts (UoE), Yang, Lian and Li, 2025, arXiv 2503.02495; the attention part (SMHA).
//! Rule: expert i is the i-th part of the query, key and value heads with its columns of the output projection, so that
//! all experts together are the attention that was cut. Each token takes its k best experts by `p = softmax(W_g x)`; of
//! the tokens of a sequence that took it, each expert keeps the share `keep` with the largest p. An expert attends among
//! its own tokens and no others (queries, keys and values), causally, at positions 0, 1, ... that count only them.
//! Outputs are summed and multiplied by one scalar per token (head E), `M / (M + eps)`, M the sum of its picks' p.
//! Shapes: x and y [T, d], `W_g` [E, d], with E a divisor of the key and value heads.
//! Aux: none.
//! Differs from paper: the gate learns through the scalar (in the released code it gets no gradient); a token that did
//! not take an expert never gets its output, where the code pads to the largest count and adds it; an expert may have
//! several heads; no choice per sample, which needs sequences of one length, and no memory of earlier segments.
//! Causal unless `keep` is below 1, and a sequence does not see another. Check: tests/layers.rs (all experts are the
//! attention, gradients, causality), tests/reference_models.rs (plain torch).

use super::attention::SelfAttention;
use crate::ops::{self, AttentionShape};
use crate::routers::{Route, RouteContext, Routed, Union};
use burn::tensor::Tensor;
use cadre_routing::{Routing, RoutingError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// `model.attention_experts` of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Experts of every layer's attention; divides the key and value heads.
    pub n_experts: usize,
    /// Experts that a token takes.
    pub top_k: usize,
    /// Share of a sequence's tokens that an expert keeps of those that took it. Less than 1 is not causal.
    #[serde(default = "one")]
    pub keep: f32,
    /// Added to M in the scalar. 0 makes that 1, and the router then learns nothing, as in the released code.
    #[serde(default = "one")]
    pub eps: f32,
}

fn one() -> f32 {
    1.0
}

impl Options {
    /// The rule of every layer.
    ///
    /// # Errors
    /// As [`Union::new`].
    pub fn rule(&self) -> Result<Union, RoutingError> {
        Union::new(self.n_experts, self.top_k, self.keep, self.eps)
    }

    /// What a checkpoint says of them.
    #[must_use]
    pub fn stored(&self) -> cadre_checkpoint::AttentionExperts {
        cadre_checkpoint::AttentionExperts {
            n_experts: self.n_experts,
            top_k: self.top_k,
            eps: f64::from(self.eps),
        }
    }
}

/// `y [T, d]` of `x [T, d]`, and what the router decided. The router is f32 whatever the precision of `shape`.
///
/// # Errors
/// Router logits that are not finite.
///
/// # Panics
/// If the attention has no router, or the heads of `shape` do not divide.
pub fn forward(
    attention: &SelfAttention,
    x: Tensor<2>,
    shape: AttentionShape,
    (rule, context): (&dyn Route, &RouteContext<'_>),
) -> Result<(Tensor<2>, Routed), RoutingError> {
    let gate = attention.gate.as_ref();
    let gate = gate.expect("attention with a rule has a router").val();
    let routed = rule.route(ops::linear(x.clone(), gate), context)?;
    let n = rule.n_experts();
    let layout = Layout::of(&routed.routing, n, shape);
    let mut outputs = Vec::with_capacity(n + 1);
    for (index, own) in layout.experts.iter().enumerate() {
        if own.seq_len == 0 {
            continue;
        }
        let own_shape = AttentionShape {
            seq_len: own.seq_len,
            n_heads: shape.n_heads / n,
            n_kv_heads: shape.n_kv_heads / n,
            ..shape
        };
        let rows = ops::embedding(x.clone(), Arc::clone(&own.tokens));
        let matrices = matrices_of(attention, index, n);
        outputs.push(attention.attend(rows, matrices, own_shape));
    }
    // What a token gets that has fewer picks than others.
    outputs.push(Tensor::zeros([1, x.dims()[1]], &x.device()));
    let y = layout.combine(
        Tensor::cat(outputs, 0),
        routed.weights.clone(),
        &routed.routing,
    );
    Ok((y, routed))
}

/// The projections of queries, keys, values and outputs of expert `index` of `n`.
fn matrices_of(attention: &SelfAttention, index: usize, n: usize) -> [Tensor<2>; 4] {
    let part = |matrix: Tensor<2>, dim: usize| {
        let len = matrix.dims()[dim] / n;
        matrix.narrow(dim, index * len, len)
    };
    [
        part(attention.q_proj.val(), 0),
        part(attention.k_proj.val(), 0),
        part(attention.v_proj.val(), 0),
        part(attention.o_proj.val(), 1),
    ]
}

/// Where the tokens of the experts lie: expert by expert, sequence by sequence.
struct Layout {
    experts: Vec<Own>,
    /// Row of each pair of the routing, over all experts.
    row_of_pair: Vec<u32>,
    n_rows: usize,
}

/// The tokens of an expert as sequences of equal length. Shorter ones are filled up behind, where no token sees it.
struct Own {
    seq_len: usize,
    tokens: Arc<Vec<u32>>,
}

impl Layout {
    fn of(routing: &Routing, n_experts: usize, shape: AttentionShape) -> Self {
        let AttentionShape { batch, seq_len, .. } = shape;
        // Tokens of each expert, in each sequence.
        let mut tokens = vec![Vec::new(); n_experts * batch];
        let mut place_of_pair = Vec::with_capacity(routing.n_pairs());
        for (token, (experts, _)) in routing.iter().enumerate() {
            for &expert in experts {
                let list = usize::from(expert) * batch + token / seq_len;
                place_of_pair.push((list, tokens[list].len()));
                tokens[list].push(token as u32);
            }
        }
        let (mut experts, mut firsts, mut n_rows) = (Vec::new(), Vec::new(), 0);
        for lists in tokens.chunks(batch) {
            let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
            let mut all = Vec::with_capacity(batch * longest);
            for list in lists {
                firsts.push(n_rows + all.len());
                all.extend_from_slice(list);
                all.resize(all.len() + longest - list.len(), 0);
            }
            n_rows += all.len();
            experts.push(Own {
                seq_len: longest,
                tokens: Arc::new(all),
            });
        }
        let row = |(list, place): (usize, usize)| (firsts[list] + place) as u32;
        Self {
            experts,
            row_of_pair: place_of_pair.into_iter().map(row).collect(),
            n_rows,
        }
    }

    /// `y_t = sum over the pairs p of token t of weights[p] rows[row of p]`; behind the rows of the experts is one of zeros.
    fn combine(&self, rows: Tensor<2>, weights: Tensor<1>, routing: &Routing) -> Tensor<2> {
        let n_pairs = routing.n_pairs();
        let device = rows.device();
        let none = Tensor::zeros([1], &device);
        let weights: Tensor<2> = Tensor::cat(vec![weights, none], 0).reshape([n_pairs + 1, 1]);
        let most = routing.iter().map(|(experts, _)| experts.len()).max();
        let mut y = Tensor::zeros([routing.n_tokens(), rows.dims()[1]], &device);
        for nth in 0..most.unwrap_or(0) {
            let ends = routing.offsets().windows(2);
            let pairs = ends.map(|ends| {
                let pair = ends[0] as usize + nth;
                (pair < ends[1] as usize).then_some(pair)
            });
            let (at, of): (Vec<u32>, Vec<u32>) = pairs
                .map(|pair| match pair {
                    Some(pair) => (self.row_of_pair[pair], pair as u32),
                    None => (self.n_rows as u32, n_pairs as u32),
                })
                .unzip();
            let of = ops::embedding(weights.clone(), Arc::new(of));
            y = y + ops::embedding(rows.clone(), Arc::new(at)) * of;
        }
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Precision;

    #[test]
    fn experts_get_their_tokens_sequence_by_sequence() {
        let mut routing = Routing::new();
        // Two sequences of three tokens.
        for picks in [&[1, 0][..], &[1], &[], &[0, 1], &[2], &[0]] {
            routing.push_token(picks, &vec![1.0; picks.len()]);
        }
        let shape = AttentionShape {
            batch: 2,
            seq_len: 3,
            n_heads: 3,
            n_kv_heads: 3,
            head_dim: 2,
            rope_theta: 1e4,
            eps: 1e-6,
            precision: Precision::F32,
        };
        let layout = Layout::of(&routing, 4, shape);
        let experts: Vec<(usize, &[u32])> = layout
            .experts
            .iter()
            .map(|own| (own.seq_len, own.tokens.as_slice()))
            .collect();
        let expected: [(usize, &[u32]); 4] = [
            (2, &[0, 0, 3, 5]),
            (2, &[0, 1, 3, 0]),
            (1, &[0, 4]),
            (0, &[]),
        ];
        assert_eq!(experts, expected);
        assert_eq!(layout.row_of_pair, [4, 0, 5, 2, 6, 9, 3]);
        assert_eq!(layout.n_rows, 10);
    }
}
