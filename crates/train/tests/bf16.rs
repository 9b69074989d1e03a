//! Products of bf16 against the same operations in f32: close by a stated bound, the same bits on any number of threads.
//!
//! A value rounded to bf16 is off by at most 2^-9 of itself. A product of two is off by 2^-8 at most, and errors of a sum
//! have either sign: relative to the size of a tensor (root of the mean square) an operation of one product stays below
//! 2^-8, and a chain of a few products with its gradients below [`BOUND`]. Where the CPU has no products of bf16 both
//! sides are f32 and the test holds trivially.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use burn::tensor::{Device, Tensor, TensorData};
use cadre_routing::Routing;
use cadre_train::ops::{self, AttentionShape, Dispatch, Numerics, Precision, Recompute};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use std::sync::Arc;

/// Largest error of an output or gradient, both as root mean squares over the tensor.
const BOUND: f64 = 0.012;

fn values(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| scale * (2.0 * rng.random::<f32>() - 1.0))
        .collect()
}

/// An operation of flat inputs.
type Operation<'a> = &'a dyn Fn(Precision, &[Tensor<1>]) -> Tensor<1>;

/// The output, and the gradient of every input of a random weighted sum of it.
fn run(precision: Precision, inputs: &[Vec<f32>], operation: Operation<'_>) -> Vec<Vec<f32>> {
    let device = Device::flex().autodiff();
    let flat = |x: &[f32]| Tensor::<1>::from_data(TensorData::new(x.to_vec(), [x.len()]), &device);
    let leaves: Vec<_> = inputs.iter().map(|x| flat(x).require_grad()).collect();
    let y = operation(precision, &leaves);
    let coefficients = flat(&values(99, y.dims()[0], 1.0));
    let gradients = (y.clone() * coefficients).sum().backward();
    let read = |x: Tensor<1>| x.into_data().try_to_vec::<f32>().unwrap();
    let all = leaves
        .iter()
        .map(|leaf| read(leaf.grad(&gradients).unwrap()));
    std::iter::once(read(y)).chain(all).collect()
}

fn rms(x: impl Iterator<Item = f64>) -> f64 {
    let (n, sum) = x.fold((0.0, 0.0), |(n, sum), x| (n + 1.0, sum + x * x));
    (sum / n).sqrt()
}

fn hold(name: &str, inputs: &[Vec<f32>], operation: Operation<'_>) {
    let (exact, close) = (
        run(Precision::F32, inputs, operation),
        run(Precision::Bf16, inputs, operation),
    );
    for (i, (exact, close)) in exact.iter().zip(&close).enumerate() {
        let error = rms(exact.iter().zip(close).map(|(a, b)| f64::from(a - b)));
        let size = rms(exact.iter().map(|x| f64::from(*x)));
        let what = if i == 0 {
            "output".to_owned()
        } else {
            format!("gradient {}", i - 1)
        };
        assert!(
            error <= BOUND * size,
            "{name}: {what} is off by {:.4} of its size",
            error / size
        );
    }
    let rounds = Precision::Bf16.here() == Precision::Bf16;
    assert_eq!(
        exact != close,
        rounds,
        "{name}: bf16 where there is bf16, only there"
    );
}

#[test]
fn linear_is_close() {
    for [rows, n_in, n_out] in [[1, 1, 3], [7, 33, 5], [70, 64, 96], [13, 250, 40]] {
        let inputs = [values(1, rows * n_in, 1.0), values(2, n_out * n_in, 1.0)];
        hold(
            &format!("linear [{rows}, {n_in}] -> {n_out}"),
            &inputs,
            &|precision, v| {
                let x = v[0].clone().reshape([rows, n_in]);
                precision
                    .linear(x, v[1].clone().reshape([n_out, n_in]))
                    .flatten(0, 1)
            },
        );
    }
}

fn shape(
    precision: Precision,
    [batch, seq_len, n_heads, n_kv_heads, head_dim]: [usize; 5],
) -> AttentionShape {
    AttentionShape {
        batch,
        seq_len,
        n_heads,
        n_kv_heads,
        head_dim,
        rope_theta: 100.0,
        eps: 1e-6,
        precision,
    }
}

#[test]
fn attention_is_close() {
    for sizes in [
        [2, 5, 2, 1, 8],
        [1, 64, 2, 2, 16],
        [1, 130, 4, 2, 32],
        [2, 71, 2, 1, 6],
    ] {
        let [batch, seq_len, n_heads, n_kv_heads, head_dim] = sizes;
        let n_tokens = batch * seq_len;
        let inputs = [
            values(1, n_tokens * n_heads * head_dim, 1.0),
            values(2, n_tokens * n_kv_heads * head_dim, 1.0),
            values(3, n_tokens * n_kv_heads * head_dim, 1.0),
            values(4, head_dim, 1.0),
            values(5, head_dim, 1.0),
        ];
        hold(&format!("attention {sizes:?}"), &inputs, &|precision, v| {
            let [q, k, v, q_norm, k_norm] = std::array::from_fn(|i| v[i].clone());
            let qkv = [q, k, v].map(|x| x.reshape([n_tokens as i32, -1]));
            ops::attention(qkv, [q_norm, k_norm], shape(precision, sizes)).flatten(0, 1)
        });
    }
}

/// Ragged picks: none to three per token; id 1 is never picked and from `n` on they are null.
fn dispatch(n_tokens: usize, n: u16) -> (usize, Arc<Dispatch>) {
    let mut routing = Routing::new();
    for t in 0..n_tokens {
        let ids: Vec<u16> = (0..t % 4)
            .map(|i| ((t / 4 + i * 2) as u16) % (n + 1))
            .filter(|&id| id != 1)
            .collect();
        routing.push_token(&ids, &vec![1.0; ids.len()]);
    }
    (
        routing.n_pairs(),
        Arc::new(Dispatch::of(&routing, usize::from(n))),
    )
}

#[test]
fn experts_are_close() {
    // The last has more than one block of rows in an expert, the first fewer rows than a tile.
    for [n_tokens, n, d, width] in [[6, 3, 9, 5], [90, 5, 32, 24], [1200, 3, 16, 12]] {
        let (n_pairs, dispatch) = dispatch(n_tokens, n as u16);
        let inputs = [
            values(1, n_tokens * d, 1.0),
            values(2, n * 2 * width * d, 1.0),
            values(3, n * d * width, 1.0),
            values(4, n_pairs, 1.0),
        ];
        hold(
            &format!("{n} experts of {d} x {width}, {n_tokens} tokens"),
            &inputs,
            &|precision, v| {
                let [x, gate_up, down, weights] = std::array::from_fn(|i| v[i].clone());
                let y = Numerics::from(precision).experts(
                    x.reshape([n_tokens, d]),
                    gate_up.reshape([n, 2 * width, d]),
                    down.reshape([n, d, width]),
                    weights,
                    dispatch.clone(),
                );
                y.flatten(0, 1)
            },
        );
    }
}

#[test]
fn what_is_computed_again_has_the_same_bits() {
    let [n_tokens, n, d, width] = [700, 3, 10, 7];
    let (n_pairs, dispatch) = dispatch(n_tokens, n as u16);
    let inputs = [
        values(1, n_tokens * d, 1.0),
        values(2, n * 2 * width * d, 1.0),
        values(3, n * d * width, 1.0),
        values(4, n_pairs, 1.0),
    ];
    for precision in [Precision::F32, Precision::Bf16] {
        let [kept, again] = [Recompute::None, Recompute::Experts].map(|recompute| {
            let numerics = Numerics {
                precision,
                recompute,
            };
            run(precision, &inputs, &|_, v| {
                let [x, gate_up, down, weights] = std::array::from_fn(|i| v[i].clone());
                let y = numerics.experts(
                    x.reshape([n_tokens, d]),
                    gate_up.reshape([n, 2 * width, d]),
                    down.reshape([n, d, width]),
                    weights,
                    dispatch.clone(),
                );
                y.flatten(0, 1)
            })
        });
        assert!(kept == again, "{precision:?}");
    }
}

#[test]
fn cross_entropy_is_close() {
    for [n_tokens, d, vocab] in [[3, 4, 7], [70, 32, 131], [600, 16, 33]] {
        let targets: Arc<Vec<u32>> =
            Arc::new((0..n_tokens).map(|t| (t * t % vocab) as u32).collect());
        let inputs = [values(1, n_tokens * d, 1.0), values(2, vocab * d, 1.0)];
        hold(
            &format!("cross_entropy of {n_tokens} tokens, {d} -> {vocab}"),
            &inputs,
            &|precision, v| {
                let x = v[0].clone().reshape([n_tokens, d]);
                let w = v[1].clone().reshape([vocab, d]);
                precision
                    .cross_entropy(x, w, targets.clone())
                    .mul_scalar(3.0)
            },
        );
    }
}

/// Loss and gradients of a block with every operation, on `n_threads`.
fn every_operation(precision: Precision, n_threads: usize) -> Vec<Vec<f32>> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(n_threads)
        .build()
        .unwrap();
    let [n_tokens, d, vocab, n, width] = [1200, 32, 150, 3, 24];
    let (n_pairs, dispatch) = dispatch(n_tokens, n as u16);
    let ids: Arc<Vec<u32>> = Arc::new((0..n_tokens).map(|t| (t * t % vocab) as u32).collect());
    let inputs = [
        values(1, vocab * d, 1.0),
        values(2, d * d, 0.4),
        values(3, d * d, 0.4),
        values(4, d * d, 0.4),
        values(5, 8, 1.0),
        values(6, 8, 1.0),
        values(7, n * 2 * width * d, 0.4),
        values(8, n * d * width, 0.4),
        values(9, n_pairs, 1.0),
    ];
    pool.install(|| {
        run(precision, &inputs, &|precision, v| {
            let [w, q, k, value, q_norm, k_norm, gate_up, down, weights] =
                std::array::from_fn(|i| v[i].clone());
            let table = w.reshape([vocab, d]);
            let x = ops::embedding(table.clone(), ids.clone());
            let qkv = [q, k, value].map(|p| precision.linear(x.clone(), p.reshape([d, d])));
            let shape = shape(precision, [12, 100, 4, 4, 8]);
            let x = x + ops::attention(qkv, [q_norm, k_norm], shape);
            let y = Numerics::from(precision).experts(
                x.clone(),
                gate_up.reshape([n, 2 * width, d]),
                down.reshape([n, d, width]),
                weights,
                dispatch.clone(),
            );
            precision.cross_entropy(x + y, table, ids.clone())
        })
    })
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let one = every_operation(Precision::Bf16, 1);
    assert!(one.iter().flatten().all(|x| x.is_finite()));
    for n_threads in [2, 3] {
        assert!(
            every_operation(Precision::Bf16, n_threads) == one,
            "{n_threads} threads give other bits than one"
        );
    }
    let exact = every_operation(Precision::F32, 2);
    let (loss, want) = (f64::from(one[0][0]), f64::from(exact[0][0]));
    assert!((loss - want).abs() < 2e-3 * want, "loss {loss} for {want}");
}
