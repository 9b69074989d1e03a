//! Every fused operation against a naive f64 forward, and its gradients against central finite differences of that.
//!
//! Differences of an f64 function with steps of `STEP` are good to about nine digits, so all that is left to see is the
//! f32 rounding of our side. Each case checks the forward without autodiff, the forward with it, the gradient of every
//! input, and that an input's gradient does not change when the other inputs are constants.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod naive;

use burn::tensor::{Device, Tensor, TensorData};
use cadre_routing::Routing;
use cadre_train::ops::{self, AttentionShape, Dispatch, Precision};
use naive::AttentionSizes;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use std::sync::Arc;

/// Step of the central differences: error about `STEP^2` (1e-10) plus `1e-16 / STEP` (1e-11).
const STEP: f64 = 1e-5;
/// Largest error, relative to the largest value of the tensor. One f32 rounding is 6e-8; the longest sums have some
/// hundred terms and chains are five operations deep, of which `exp` is good to 2e-7.
/// Attention scores of size 20 are good to 2e-6, and so are the probabilities made from them.
const TOLERANCE: f64 = 5e-6;

/// Random values in `[-scale, scale]`; every `(seed, len)` has its own.
fn values(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| scale * (2.0 * rng.random::<f32>() - 1.0))
        .collect()
}

/// One operation at one size: its inputs, flattened, and its two forms.
struct Case<'a> {
    name: String,
    inputs: Vec<(&'static str, Vec<f32>)>,
    naive: &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    ours: &'a dyn Fn(&[Tensor<1>]) -> Tensor<1>,
}

fn flat(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

fn read(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

impl Case<'_> {
    fn hold(&self) {
        let exact: Vec<Vec<f64>> = self.inputs.iter().map(|(_, x)| to_f64(x)).collect();
        let want = (self.naive)(&exact);
        let device = Device::flex();
        let plain: Vec<Tensor<1>> = self.inputs.iter().map(|(_, x)| flat(x, &device)).collect();
        self.compare(
            "forward without autodiff",
            &read((self.ours)(&plain)),
            &want,
        );

        let coefficients = values(99, want.len(), 1.0);
        let everything: Vec<bool> = vec![true; self.inputs.len()];
        let (y, gradients) = self.gradients(&coefficients, &everything);
        self.compare("forward", &y, &want);
        let loss = |inputs: &[Vec<f64>]| -> f64 {
            let y = (self.naive)(inputs);
            y.iter()
                .zip(&coefficients)
                .map(|(y, &c)| y * f64::from(c))
                .sum()
        };
        for (i, (name, x)) in self.inputs.iter().enumerate() {
            let mut moved = exact.clone();
            let mut want = Vec::with_capacity(x.len());
            for j in 0..x.len() {
                let mut at = |step: f64| {
                    moved[i][j] = exact[i][j] + step;
                    loss(&moved)
                };
                want.push((at(STEP) - at(-STEP)) / (2.0 * STEP));
                moved[i][j] = exact[i][j];
            }
            let got = gradients[i].as_ref().unwrap();
            self.compare(&format!("gradient of {name}"), got, &want);

            let only: Vec<bool> = (0..self.inputs.len()).map(|other| other == i).collect();
            let (_, alone) = self.gradients(&coefficients, &only);
            assert_eq!(
                alone[i].as_ref(),
                Some(got),
                "{}: gradient of {name} alone",
                self.name
            );
            assert_eq!(
                alone.iter().flatten().count(),
                1,
                "{}: constants have no gradient",
                self.name
            );
        }
    }

    /// The output, and the gradients of `sum(y * coefficients)` for the inputs that are `tracked`.
    fn gradients(
        &self,
        coefficients: &[f32],
        tracked: &[bool],
    ) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
        let device = Device::flex().autodiff();
        let input = |((_, x), &tracked): (&(&str, Vec<f32>), &bool)| {
            let leaf = flat(x, &device);
            if tracked { leaf.require_grad() } else { leaf }
        };
        let leaves: Vec<Tensor<1>> = self.inputs.iter().zip(tracked).map(input).collect();
        let y = (self.ours)(&leaves);
        let gradients = (y.clone() * flat(coefficients, &device)).sum().backward();
        (
            read(y),
            leaves
                .iter()
                .map(|leaf| leaf.grad(&gradients).map(read))
                .collect(),
        )
    }

    fn compare(&self, what: &str, got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len(), "{}: {what}", self.name);
        // Inputs and coefficients are of order one: what terms of that size cancel to cannot be exact in itself.
        let scale = want.iter().fold(0.1_f64, |m, x| m.max(x.abs()));
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(got) - want).abs() / scale;
            let name = &self.name;
            assert!(
                error <= TOLERANCE,
                "{name}: {what}: value {i} is {got}, expected {want}: off by {error:.1e}"
            );
        }
    }
}

fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn linear() {
    for [rows, n_in, n_out] in [
        [1, 1, 1],
        [1, 7, 13],
        [5, 3, 1],
        [70, 5, 3],
        [13, 33, 17],
        [3, 40, 66],
    ] {
        Case {
            name: format!("linear [{rows}, {n_in}] -> {n_out}"),
            inputs: vec![
                ("x", values(1, rows * n_in, 1.0)),
                ("w", values(2, n_out * n_in, 1.0)),
            ],
            naive: &|v| naive::linear(&v[0], &v[1], n_in),
            ours: &|v| {
                let x = v[0].clone().reshape([rows, n_in]);
                ops::linear(x, v[1].clone().reshape([n_out, n_in])).flatten(0, 1)
            },
        }
        .hold();
    }
}

#[test]
fn linear_reads_operands_that_do_not_lie_in_order() {
    let [rows, n_in, n_out] = [6, 5, 4];
    Case {
        name: "linear of a transpose and a slice".to_owned(),
        inputs: vec![
            ("x^T", values(1, rows * n_in, 1.0)),
            ("two w", values(2, 2 * n_out * n_in, 1.0)),
        ],
        naive: &|v| {
            let x: Vec<f64> = (0..rows * n_in)
                .map(|i| v[0][i % n_in * rows + i / n_in])
                .collect();
            naive::linear(&x, &v[1][n_out * n_in..], n_in)
        },
        ours: &|v| {
            let x = v[0].clone().reshape([n_in, rows]).transpose();
            let w = v[1]
                .clone()
                .reshape([2 * n_out, n_in])
                .slice([n_out..2 * n_out, 0..n_in]);
            ops::linear(x, w).flatten(0, 1)
        },
    }
    .hold();
}

#[test]
fn rms_norm() {
    for (rows, d, scale) in [
        (1, 1, 1.0),
        (1, 16, 1.0),
        (3, 19, 1.0),
        (70, 5, 1.0),
        (130, 3, 1.0),
        (4, 33, 1e-3),
    ] {
        let eps = 1e-5;
        let mut x = values(3, rows * d, scale);
        if rows > 1 {
            x[..d].fill(0.0);
        }
        Case {
            name: format!("rms_norm [{rows}, {d}] times {scale}"),
            inputs: vec![("x", x), ("w", values(4, d, 2.0))],
            naive: &|v| naive::rms_norm(&v[0], &v[1], f64::from(eps)),
            ours: &|v| {
                ops::rms_norm(v[0].clone().reshape([rows, d]), v[1].clone(), eps).flatten(0, 1)
            },
        }
        .hold();
    }
}

#[test]
fn embedding() {
    for (ids, vocab, d) in [
        (vec![0], 1, 1),
        (vec![4, 0, 4, 4, 2], 6, 3),
        (vec![1; 70], 3, 17),
    ] {
        let ids = Arc::new(ids);
        Case {
            name: format!("embedding of {} ids", ids.len()),
            inputs: vec![("w", values(5, vocab * d, 1.0))],
            naive: &|v| naive::embedding(&v[0], &ids, d),
            ours: &|v| ops::embedding(v[0].clone().reshape([vocab, d]), ids.clone()).flatten(0, 1),
        }
        .hold();
    }
}

/// Batch, sequence length, query heads, key/value heads, head width, and the size of the norm weights: with 3, scores
/// reach 20 and more and the softmax is nearly a choice.
const ATTENTION: [([usize; 5], f32); 11] = [
    ([1, 1, 1, 1, 2], 1.0),
    ([3, 1, 2, 1, 4], 1.0),
    ([2, 7, 4, 2, 6], 1.0),
    ([1, 9, 3, 3, 4], 1.0),
    ([2, 5, 6, 2, 10], 1.0),
    ([2, 6, 2, 1, 18], 1.0),
    ([1, 64, 2, 1, 2], 1.0),
    ([1, 65, 1, 1, 4], 1.0),
    ([2, 70, 3, 1, 2], 1.0),
    ([1, 130, 2, 2, 2], 1.0),
    ([1, 20, 2, 1, 6], 3.0),
];

fn attention_shape(s: AttentionSizes) -> AttentionShape {
    AttentionShape {
        batch: s.batch,
        seq_len: s.seq_len,
        n_heads: s.n_heads,
        n_kv_heads: s.n_kv_heads,
        head_dim: s.head_dim,
        rope_theta: s.rope_theta,
        eps: s.eps as f32,
        precision: Precision::F32,
    }
}

fn attention_sizes([batch, seq_len, n_heads, n_kv_heads, head_dim]: [usize; 5]) -> AttentionSizes {
    AttentionSizes {
        batch,
        seq_len,
        n_heads,
        n_kv_heads,
        head_dim,
        rope_theta: 100.0,
        eps: 1e-6,
    }
}

#[test]
fn attention() {
    for (sizes, norm_scale) in ATTENTION {
        let s = attention_sizes(sizes);
        let n_tokens = s.batch * s.seq_len;
        let (q, kv) = (
            n_tokens * s.n_heads * s.head_dim,
            n_tokens * s.n_kv_heads * s.head_dim,
        );
        let norm = |seed| {
            values(seed, s.head_dim, 0.5)
                .iter()
                .map(|x| norm_scale * (1.0 + x))
                .collect()
        };
        Case {
            name: format!("attention {sizes:?}, norms times {norm_scale}"),
            inputs: vec![
                ("q", values(6, q, 1.0)),
                ("k", values(7, kv, 1.0)),
                ("v", values(8, kv, 1.0)),
                ("q_norm", norm(9)),
                ("k_norm", norm(10)),
            ],
            naive: &|v| naive::attention(v, s),
            ours: &|v| {
                let [q, k, v, q_norm, k_norm] = std::array::from_fn(|i| v[i].clone());
                let [q, k, v] = [q, k, v].map(|x| x.reshape([n_tokens as i32, -1]));
                ops::attention([q, k, v], [q_norm, k_norm], attention_shape(s)).flatten(0, 1)
            },
        }
        .hold();
    }
}

#[test]
fn attention_without_norms() {
    for sizes in [[2, 7, 4, 2, 6], [1, 65, 2, 1, 4]] {
        let s = attention_sizes(sizes);
        let n_tokens = s.batch * s.seq_len;
        let of = |seed, n_heads| values(seed, n_tokens * n_heads * s.head_dim, 1.0);
        Case {
            name: format!("attention {sizes:?} without norms"),
            inputs: vec![
                ("q", of(6, s.n_heads)),
                ("k", of(7, s.n_kv_heads)),
                ("v", of(8, s.n_kv_heads)),
            ],
            naive: &|v| naive::attention(&[v, &[Vec::new(), Vec::new()]].concat(), s),
            ours: &|v| {
                let qkv = std::array::from_fn(|i| v[i].clone().reshape([n_tokens as i32, -1]));
                let none = || Tensor::zeros([0], &v[0].device());
                ops::attention(qkv, [none(), none()], attention_shape(s)).flatten(0, 1)
            },
        }
        .hold();
    }
}

#[test]
fn attention_of_one_tensor_in_all_roles() {
    let s = attention_sizes([2, 5, 1, 1, 4]);
    Case {
        name: "self-attention without projections".to_owned(),
        inputs: vec![("x", values(6, 40, 1.0)), ("norm", values(9, 4, 1.0))],
        naive: &|v| {
            let [x, norm] = [v[0].clone(), v[1].clone()];
            naive::attention(&[x.clone(), x.clone(), x, norm.clone(), norm], s)
        },
        ours: &|v| {
            let x = v[0].clone().reshape([10, 4]);
            let norms = [v[1].clone(), v[1].clone()];
            ops::attention([x.clone(), x.clone(), x], norms, attention_shape(s)).flatten(0, 1)
        },
    }
    .hold();
}

/// Tokens, experts, picks per token, model width, expert width, and the scale of `x`: with 30, gates saturate.
const EXPERTS: [([usize; 5], f32); 8] = [
    ([1, 1, 1, 1, 1], 1.0),
    ([1, 4, 2, 3, 5], 1.0),
    ([9, 5, 1, 4, 3], 1.0),
    ([6, 8, 3, 5, 2], 1.0),
    ([11, 3, 3, 2, 4], 1.0),
    ([70, 4, 2, 3, 2], 1.0),
    ([4, 3, 2, 18, 17], 0.5),
    ([8, 4, 2, 3, 4], 30.0),
];

/// Distinct picks; from 4 experts on, expert 1 gets no token.
fn picks(n_tokens: usize, n_experts: usize, top_k: usize) -> Vec<u16> {
    let usable: Vec<u16> = (0..n_experts as u16)
        .filter(|&e| n_experts < 4 || e != 1)
        .collect();
    let start = |t: usize| t * t + 3 * t;
    (0..n_tokens * top_k)
        .map(|i| usable[(start(i / top_k) + i % top_k) % usable.len()])
        .collect()
}

/// The picks of [`picks`] as a routing.
fn routing(ids: &[u16], top_k: usize) -> Routing {
    let mut routing = Routing::new();
    for ids in ids.chunks(top_k) {
        routing.push_token(ids, &vec![1.0; top_k]);
    }
    routing
}

#[test]
fn experts() {
    for ([n_tokens, n_experts, top_k, d, width], scale) in EXPERTS {
        let ids = picks(n_tokens, n_experts, top_k);
        let dispatch = Arc::new(Dispatch::of(&routing(&ids, top_k), n_experts));
        assert_eq!(
            dispatch.loads().contains(&0),
            n_experts > n_tokens * top_k || n_experts >= 4
        );
        Case {
            name: format!("experts: {top_k} of {n_experts} for {n_tokens} tokens, {d} x {width}"),
            inputs: vec![
                ("x", values(11, n_tokens * d, scale)),
                ("gate_up", values(12, n_experts * 2 * width * d, 1.0)),
                ("down", values(13, n_experts * d * width, 1.0)),
                ("weights", values(14, n_tokens * top_k, 1.0)),
            ],
            naive: &|v| {
                naive::experts(
                    v,
                    &tokens(&routing(&ids, top_k), n_experts, None),
                    [d, width],
                )
            },
            ours: &|v| {
                let [x, gate_up, down, weights] = std::array::from_fn(|i| v[i].clone());
                ops::experts(
                    x.reshape([n_tokens, d]),
                    gate_up.reshape([n_experts, 2 * width, d]),
                    down.reshape([n_experts, d, width]),
                    weights,
                    dispatch.clone(),
                )
                .flatten(0, 1)
            },
        }
        .hold();
    }
}

/// Token and expert of every pair that is computed, in the order of the weights; `None` for the others.
fn tokens(
    routing: &Routing,
    n_experts: usize,
    keep: Option<&[bool]>,
) -> Vec<Option<(usize, usize)>> {
    let pairs = routing.iter().enumerate();
    let pairs = pairs.flat_map(|(t, (ids, _))| ids.iter().map(move |&id| (t, usize::from(id))));
    pairs
        .enumerate()
        .map(|(pair, (t, e))| (e < n_experts && keep.is_none_or(|k| k[pair])).then_some((t, e)))
        .collect()
}

/// Tokens without experts, with all of them, with null experts (ids from 3 on), and pairs that a filter dropped.
#[test]
fn experts_of_ragged_picks() {
    let mut routing = Routing::new();
    for ids in [&[2u16, 0][..], &[], &[4, 1, 3], &[3], &[0, 1, 2], &[1]] {
        routing.push_token(ids, &vec![1.0; ids.len()]);
    }
    let dropped: Vec<bool> = (0..routing.n_pairs()).map(|pair| pair % 4 != 1).collect();
    let [n_tokens, n_experts, d, width] = [6, 3, 5, 4];
    for keep in [None, Some(dropped.as_slice())] {
        let dispatch = Arc::new(match keep {
            None => Dispatch::of(&routing, n_experts),
            Some(keep) => Dispatch::kept(&routing, n_experts, keep),
        });
        let pairs = tokens(&routing, n_experts, keep);
        assert_eq!(dispatch.n_dispatched(), pairs.iter().flatten().count());
        Case {
            name: format!("ragged experts, dropped: {}", keep.is_some()),
            inputs: vec![
                ("x", values(21, n_tokens * d, 1.0)),
                ("gate_up", values(22, n_experts * 2 * width * d, 1.0)),
                ("down", values(23, n_experts * d * width, 1.0)),
                ("weights", values(24, routing.n_pairs(), 1.0)),
            ],
            naive: &|v| naive::experts(v, &pairs, [d, width]),
            ours: &|v| {
                let [x, gate_up, down, weights] = std::array::from_fn(|i| v[i].clone());
                let gate_up = gate_up.reshape([n_experts, 2 * width, d]);
                let down = down.reshape([n_experts, d, width]);
                let x = x.reshape([n_tokens, d]);
                ops::experts(x, gate_up, down, weights, dispatch.clone()).flatten(0, 1)
            },
        }
        .hold();
    }
}

#[test]
fn cross_entropy() {
    let cases = [
        ([1, 1, 1], 1.0),
        ([1, 3, 7], 1.0),
        ([17, 4, 5], 1.0),
        ([70, 2, 19], 1.0),
        ([300, 2, 3], 1.0),
        ([6, 3, 9], 12.0),
    ];
    for ([n_tokens, d, vocab], scale) in cases {
        let targets: Arc<Vec<u32>> = Arc::new(
            (0..n_tokens)
                .map(|t| ((t * t + t / 3) % vocab) as u32)
                .collect(),
        );
        Case {
            name: format!("cross_entropy of {n_tokens} tokens, {d} -> {vocab}, times {scale}"),
            inputs: vec![
                ("x", values(15, n_tokens * d, scale)),
                ("w", values(16, vocab * d, scale)),
            ],
            // The sum over tokens, so that gradients are of order one.
            naive: &|v| vec![n_tokens as f64 * naive::cross_entropy(&v[0], &v[1], &targets, d)],
            ours: &|v| {
                let w = v[1].clone().reshape([vocab, d]);
                let x = v[0].clone().reshape([n_tokens, d]);
                ops::cross_entropy(x, w, targets.clone()).mul_scalar(n_tokens as f64)
            },
        }
        .hold();
    }
}

#[test]
fn tied_embedding_adds_the_gradients_of_both_uses() {
    let (ids, targets) = (Arc::new(vec![0, 3, 3, 1]), Arc::new(vec![3, 3, 1, 0]));
    let [vocab, d] = [5, 3];
    Case {
        name: "embedding, norm and cross-entropy with one matrix".to_owned(),
        inputs: vec![
            ("w", values(17, vocab * d, 1.0)),
            ("norm", values(18, d, 2.0)),
        ],
        naive: &|v| {
            let x = naive::rms_norm(&naive::embedding(&v[0], &ids, d), &v[1], 1e-6);
            vec![naive::cross_entropy(&x, &v[0], &targets, d)]
        },
        ours: &|v| {
            let w = v[0].clone().reshape([vocab, d]);
            let x = ops::rms_norm(ops::embedding(w.clone(), ids.clone()), v[1].clone(), 1e-6);
            ops::cross_entropy(x, w, targets.clone())
        },
    }
    .hold();
}

/// Loss and all gradients of a block with every operation, large enough for every loop to be shared among threads.
fn every_operation(n_threads: usize) -> Vec<Vec<f32>> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(n_threads)
        .build()
        .unwrap();
    pool.install(|| {
        let device = Device::flex().autodiff();
        let [n_tokens, d, vocab, n_experts, width] = [300, 32, 70, 5, 24];
        let leaf = |seed, len, scale| flat(&values(seed, len, scale), &device).require_grad();
        let w = leaf(1, vocab * d, 1.0);
        let projections: [_; 3] = std::array::from_fn(|i| leaf(2 + i as u64, d * d, 0.3));
        let norms: [_; 3] =
            std::array::from_fn(|i| leaf(5 + i as u64, if i == 2 { d } else { 8 }, 1.0));
        let (gate_up, down) = (
            leaf(8, n_experts * 2 * width * d, 0.3),
            leaf(9, n_experts * d * width, 0.3),
        );
        let weights = leaf(10, n_tokens * 2, 1.0);

        let ids: Arc<Vec<u32>> = Arc::new((0..n_tokens).map(|t| (t * t % vocab) as u32).collect());
        let table = w.clone().reshape([vocab, d]);
        let x = ops::embedding(table.clone(), ids.clone());
        let qkv = projections
            .each_ref()
            .map(|p| ops::linear(x.clone(), p.clone().reshape([d, d])));
        let shape = attention_shape(attention_sizes([3, 100, 4, 4, 8]));
        let x = x + ops::attention(qkv, [norms[0].clone(), norms[1].clone()], shape);
        let dispatch = Arc::new(Dispatch::of(
            &routing(&picks(n_tokens, n_experts, 2), 2),
            n_experts,
        ));
        let x = x.clone()
            + ops::experts(
                x,
                gate_up.clone().reshape([n_experts, 2 * width, d]),
                down.clone().reshape([n_experts, d, width]),
                weights.clone(),
                dispatch,
            );
        let x = ops::rms_norm(x, norms[2].clone(), 1e-6);
        let loss = ops::cross_entropy(x, table, ids);
        let gradients = loss.backward();
        let leaves = [w, gate_up, down, weights]
            .into_iter()
            .chain(projections)
            .chain(norms);
        let all = leaves.map(|leaf| read(leaf.grad(&gradients).unwrap()));
        std::iter::once(read(loss)).chain(all).collect()
    })
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let one = every_operation(1);
    assert!(one.iter().flatten().all(|x| x.is_finite()));
    for n_threads in [2, 3] {
        assert!(
            every_operation(n_threads) == one,
            "{n_threads} threads give other bits than one"
        );
    }
}
