//! Every weight head and router loss: automatic differentiation against central finite differences and against the
//! closed-form derivative that its documentation states. All in f64, where both comparisons are sharp.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use burn::tensor::{DType, Device, Tensor, TensorData};
use cadre_routing::{Loads, Routing};
use cadre_train::losses;
use cadre_train::weight_heads::{self as heads, Picks};

const T: usize = 6;
const E: usize = 8;
const K: usize = 3;
/// Step of the central differences; their error is about `EPS^2` plus rounding / `EPS`.
const EPS: f64 = 1e-5;
const TOLERANCE: f64 = 1e-8;

type Rows = Vec<[f64; E]>;

/// Logits without near-ties, so that a step of `EPS` never changes an order.
fn logits() -> Rows {
    let value = |t: usize, e: usize| 2.0 * ((7 * t + 3 * e * e + 1) as f64).sin() + 0.1 * e as f64;
    (0..T)
        .map(|t| std::array::from_fn(|e| value(t, e)))
        .collect()
}

/// The three best experts of each token, best first.
fn ids() -> Vec<u16> {
    let mut ids = Vec::new();
    for row in logits() {
        let mut order: Vec<u16> = (0..E as u16).collect();
        order.sort_by(|&a, &b| row[usize::from(b)].total_cmp(&row[usize::from(a)]));
        ids.extend_from_slice(&order[..K]);
    }
    ids
}

fn loads_of(ids: &[u16]) -> Loads {
    let mut loads = Loads::new(E);
    loads.add_ids(ids, K).unwrap();
    loads
}

fn tensor(rows: &Rows, device: &Device) -> Tensor<2> {
    Tensor::from_data(
        TensorData::new(rows.concat(), [rows.len(), E]),
        (device, DType::F64),
    )
}

/// `ids` in rows of `top_k` as the picks of a batch.
fn rows_of(ids: &[u16], top_k: usize, logits: &Tensor<2>) -> Picks {
    let mut routing = Routing::new();
    for ids in ids.chunks(top_k) {
        routing.push_token(ids, &vec![1.0; top_k]);
    }
    Picks::of(&routing, E, logits)
}

fn picks(logits: &Tensor<2>) -> Picks {
    rows_of(&ids(), K, logits)
}

/// Derivative of the loss with respect to the weight of pick `slot` of token `t`.
fn g(t: usize, slot: usize) -> f64 {
    ((11 * t + 5 * slot + 2) as f64).cos()
}

/// `g_e` of every expert of token `t`, 0 outside of its picks.
fn g_row(t: usize) -> [f64; E] {
    let mut row = [0.0; E];
    for (slot, id) in ids()[t * K..(t + 1) * K].iter().enumerate() {
        row[usize::from(*id)] = g(t, slot);
    }
    row
}

fn is_pick(t: usize, expert: usize) -> bool {
    ids()[t * K..(t + 1) * K].contains(&(expert as u16))
}

fn dot(a: &[f64; E], b: &[f64; E]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(row: &[f64; E]) -> [f64; E] {
    let sum: f64 = row.iter().map(|l| l.exp()).sum();
    row.map(|l| l.exp() / sum)
}

fn sigmoid(row: &[f64; E]) -> [f64; E] {
    row.map(|l| 1.0 / (1.0 + (-l).exp()))
}

fn auto_gradient(loss: impl Fn(Tensor<2>) -> Tensor<1>) -> Vec<f64> {
    let x = tensor(&logits(), &Device::flex().autodiff()).require_grad();
    let gradients = loss(x.clone()).backward();
    x.grad(&gradients).unwrap().try_into_vec_as().unwrap()
}

fn finite_differences(loss: impl Fn(Tensor<2>) -> Tensor<1>) -> Vec<f64> {
    let device = Device::flex();
    let value = |t: usize, e: usize, step: f64| -> f64 {
        let mut rows = logits();
        rows[t][e] += step;
        loss(tensor(&rows, &device)).into_scalar()
    };
    (0..T * E)
        .map(|i| (value(i / E, i % E, EPS) - value(i / E, i % E, -EPS)) / (2.0 * EPS))
        .collect()
}

#[track_caller]
fn assert_close(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(
            (a - b).abs() < TOLERANCE,
            "{what}: token {}, expert {}: {a} is not {b}",
            i / E,
            i % E
        );
    }
}

/// Holds the gradient of `loss` to finite differences and to `closed(t, row)`.
#[track_caller]
fn check(loss: impl Fn(Tensor<2>) -> Tensor<1>, closed: impl Fn(usize, &[f64; E]) -> [f64; E]) {
    let auto = auto_gradient(&loss);
    let closed: Vec<f64> = logits()
        .iter()
        .enumerate()
        .flat_map(|(t, row)| closed(t, row))
        .collect();
    assert_close(&auto, &closed, "autodiff against closed form");
    assert_close(
        &auto,
        &finite_differences(&loss),
        "autodiff against finite differences",
    );
    assert!(
        auto.iter().any(|d| d.abs() > 1e-3),
        "a gradient of zero proves nothing"
    );
}

/// `sum g w`: a loss whose derivative with respect to the weights is `g`.
fn weigh(weights: Tensor<1>) -> Tensor<1> {
    let values: Vec<f64> = (0..T * K).map(|i| g(i / K, i % K)).collect();
    let g = Tensor::<1>::from_data(
        TensorData::new(values, [T * K]),
        (&weights.device(), DType::F64),
    );
    (weights * g).sum()
}

#[test]
fn head_a_raw_softmax() {
    let scale = 1.7;
    check(
        |l| {
            let picks = picks(&l);
            weigh(heads::raw_softmax(l, &picks, scale))
        },
        |t, row| {
            let (g, p) = (g_row(t), softmax(row));
            std::array::from_fn(|j| scale * p[j] * (g[j] - dot(&g, &p)))
        },
    );
}

/// Softmax weights over the picks, 0 elsewhere.
fn renormalised(t: usize, score: &[f64; E]) -> [f64; E] {
    let sum: f64 = (0..E).filter(|&e| is_pick(t, e)).map(|e| score[e]).sum();
    std::array::from_fn(|e| if is_pick(t, e) { score[e] / sum } else { 0.0 })
}

#[test]
fn head_b_renormalised() {
    check(
        |l| {
            let picks = picks(&l);
            weigh(heads::renormalised(l, &picks, 1.0))
        },
        |t, row| {
            let (g, w) = (g_row(t), renormalised(t, &softmax(row)));
            std::array::from_fn(|j| w[j] * (g[j] - dot(&w, &g)))
        },
    );
}

#[test]
fn head_b_with_one_pick_has_no_gradient() {
    let first: Vec<u16> = ids().chunks(K).map(|row| row[0]).collect();
    let gradient = auto_gradient(|l| {
        let picks = rows_of(&first, 1, &l);
        heads::renormalised(l, &picks, 1.0).sum()
    });
    assert_eq!(gradient, [0.0; T * E]);
}

#[test]
fn head_c_sigmoid_renormalised() {
    let scale = 2.5;
    check(
        |l| {
            let picks = picks(&l);
            weigh(heads::sigmoid_renormalised(l, &picks, scale))
        },
        |t, row| {
            let (g, s) = (g_row(t), sigmoid(row));
            let share = renormalised(t, &s);
            let sum: f64 = (0..E).filter(|&e| is_pick(t, e)).map(|e| s[e]).sum();
            std::array::from_fn(|j| {
                let outer = if is_pick(t, j) {
                    scale / sum * (g[j] - dot(&g, &share))
                } else {
                    0.0
                };
                outer * s[j] * (1.0 - s[j])
            })
        },
    );
}

#[test]
fn head_d_constant() {
    let l = tensor(&logits(), &Device::flex().autodiff()).require_grad();
    let weights = heads::constant(&l, &picks(&l), 1.0);
    assert!(!weights.is_tracked());
    assert_eq!(weights.try_into_vec_as::<f64>().unwrap(), [1.0; T * K]);
}

#[test]
fn head_e_token_scalar() {
    let eps = 0.3;
    check(
        |l| {
            let picks = picks(&l);
            weigh(heads::token_scalar(l, &picks, eps))
        },
        |t, row| {
            let (g, p) = (g_row(t), softmax(row));
            let mass: f64 = (0..E).filter(|&e| is_pick(t, e)).map(|e| p[e]).sum();
            let outer = eps / (mass + eps).powi(2) * g.iter().sum::<f64>();
            std::array::from_fn(|j| outer * p[j] * (f64::from(u8::from(is_pick(t, j))) - mass))
        },
    );
}

#[test]
fn head_a_with_temperature_and_gumbel_noise() {
    let tau = 0.7;
    let uniform = |t: usize, e: usize| 0.5 + 0.45 * ((13 * t + 7 * e) as f64).sin();
    let noise = |t: usize, e: usize| -(-uniform(t, e).ln()).ln();
    let uniform_rows: Rows = (0..T)
        .map(|t| std::array::from_fn(|e| uniform(t, e)))
        .collect();
    check(
        |l| {
            let (picks, noise) = (picks(&l), heads::gumbel(tensor(&uniform_rows, &l.device())));
            weigh(heads::tempered_softmax(l, noise, &picks, tau))
        },
        |t, row| {
            let (g, y) = (
                g_row(t),
                softmax(&std::array::from_fn(|e| (row[e] + noise(t, e)) / tau)),
            );
            std::array::from_fn(|j| y[j] / tau * (g[j] - dot(&g, &y)))
        },
    );
}

/// Ids from 6 on are null; token 2 has no pick, token 4 only null ones.
fn ragged() -> Routing {
    let mut routing = Routing::new();
    for ids in [
        &[1u16, 7, 4][..],
        &[3],
        &[],
        &[0, 2, 5, 1, 6],
        &[7, 6],
        &[5, 0],
    ] {
        routing.push_token(ids, &vec![1.0; ids.len()]);
    }
    routing
}

/// Every head over rows of unequal length against finite differences; null picks have weight 0.
#[test]
fn heads_over_ragged_picks_with_null_experts() {
    type Head = fn(Tensor<2>, &Picks) -> Tensor<1>;
    let heads: [(&str, Head); 7] = [
        ("raw softmax", |l, p| heads::raw_softmax(l, p, 1.3)),
        ("renormalised", |l, p| heads::renormalised(l, p, 1.3)),
        ("raw sigmoid", |l, p| heads::raw_sigmoid(l, p, 1.3)),
        ("renormalised sigmoid", |l, p| {
            heads::sigmoid_renormalised(l, p, 1.3)
        }),
        ("token scalar", |l, p| heads::token_scalar(l, p, 0.3)),
        ("tempered", |l, p| {
            heads::tempered_softmax(l.clone(), l.detach(), p, 0.7)
        }),
        ("straight through", heads::straight_through),
    ];
    let (routing, n_real) = (ragged(), 6);
    for (name, head) in heads {
        let weights = |l: &Tensor<2>| head(l.clone(), &Picks::of(&routing, n_real, l));
        let plain = weights(&tensor(&logits(), &Device::flex()));
        let plain: Vec<f64> = plain.try_into_vec_as().unwrap();
        assert_eq!(plain.len(), routing.n_pairs());
        for (w, &id) in plain.iter().zip(routing.experts()) {
            assert_eq!(
                *w == 0.0,
                usize::from(id) >= n_real,
                "{name}: expert {id} has {w}"
            );
        }
        let loss = |l: Tensor<2>| {
            let w = weights(&l);
            let g: Vec<f64> = (0..routing.n_pairs()).map(|i| g(i, 1)).collect();
            let n = g.len();
            (w.clone() * Tensor::from_data(TensorData::new(g, [n]), (&w.device(), DType::F64)))
                .sum()
        };
        let auto = auto_gradient(loss);
        assert!(auto.iter().any(|d| d.abs() > 1e-3), "{name}");
        if !matches!(name, "straight through" | "tempered") {
            assert_close(&auto, &finite_differences(loss), name);
        }
        // Tokens without a real pick send no gradient.
        for t in [2, 4] {
            assert_eq!(auto[t * E..(t + 1) * E], [0.0; E], "{name}");
        }
    }
}

#[test]
fn straight_through() {
    let loss = |l: Tensor<2>| {
        let picks = picks(&l);
        weigh(heads::straight_through(l, &picks))
    };
    let value: f64 = loss(tensor(&logits(), &Device::flex())).into_scalar();
    let sum_of_g: f64 = (0..T * K).map(|i| g(i / K, i % K)).sum();
    assert!((value - sum_of_g).abs() < 1e-12, "the weights are all 1");

    let auto = auto_gradient(loss);
    let closed: Vec<f64> = logits()
        .iter()
        .enumerate()
        .flat_map(|(t, row)| {
            let (g, p) = (g_row(t), softmax(row));
            let sum: f64 = g.iter().sum();
            std::array::from_fn::<f64, E, _>(|j| g[j] - sum * p[j])
        })
        .collect();
    assert_close(&auto, &closed, "autodiff against closed form");

    // Finite differences of what the gradient belongs to: the denominator frozen at the unmoved logits.
    let frozen = tensor(&logits(), &Device::flex());
    let frozen = heads::raw_softmax(frozen.clone(), &picks(&frozen), 1.0);
    let differences = finite_differences(|l| {
        let picks = picks(&l);
        weigh(heads::raw_softmax(l, &picks, 1.0) / frozen.clone())
    });
    assert_close(&auto, &differences, "autodiff against finite differences");
}

#[test]
fn load_balance() {
    let loads = loads_of(&ids());
    for legacy_scale in [false, true] {
        let picks_per_f = if legacy_scale { T } else { T * K };
        check(
            |l| {
                losses::load_balance(
                    burn::tensor::activation::softmax(l, 1),
                    &loads,
                    legacy_scale,
                )
            },
            |_, row| {
                let p = softmax(row);
                let f: [f64; E] =
                    std::array::from_fn(|e| loads.counts()[e] as f64 / picks_per_f as f64);
                std::array::from_fn(|j| E as f64 / T as f64 * p[j] * (f[j] - dot(&f, &p)))
            },
        );
    }
}

#[test]
fn null_load_balance() {
    let (loads, n_real) = (loads_of(&ids()), 5);
    let mut f: [f64; E] = std::array::from_fn(|e| loads.counts()[e] as f64 / T as f64);
    let mean = f[n_real..].iter().sum::<f64>() / (E - n_real) as f64;
    f[n_real..].fill(mean);
    check(
        |l| {
            losses::null_load_balance(
                burn::tensor::activation::softmax(l, 1),
                &loads,
                n_real,
                true,
            )
        },
        |_, row| {
            let p = softmax(row);
            std::array::from_fn(|j| E as f64 / T as f64 * p[j] * (f[j] - dot(&f, &p)))
        },
    );
}

#[test]
fn micro_batches_with_synced_loads_have_the_gradient_of_the_whole_batch() {
    let loads = loads_of(&ids());
    let probs = |l: Tensor<2>| burn::tensor::activation::softmax(l, 1);
    let whole = auto_gradient(|l| losses::load_balance(probs(l), &loads, false));
    let parts = auto_gradient(|l| {
        let part = |from: usize| {
            losses::load_balance(probs(l.clone().narrow(0, from, T / 2)), &loads, false)
        };
        (part(0) + part(T / 2)).div_scalar(2.0)
    });
    assert_close(&parts, &whole, "parts against whole");
}

#[test]
fn z_loss() {
    check(losses::z_loss, |_, row| {
        let lse = row.iter().map(|l| l.exp()).sum::<f64>().ln();
        softmax(row).map(|p| 2.0 / T as f64 * lse * p)
    });
}

#[test]
fn entropy() {
    check(losses::entropy, |_, row| {
        let p = softmax(row);
        let h: f64 = -p.iter().map(|p| p * p.ln()).sum::<f64>();
        p.map(|p| -p * (p.ln() + h) / T as f64)
    });
}

/// The picks of all tokens.
fn routing() -> Routing {
    let mut routing = Routing::new();
    ids()
        .chunks(K)
        .for_each(|ids| routing.push_token(ids, &[1.0; K]));
    routing
}

const N_SEQUENCES: usize = 2;

/// For the sequence of token `t`, the number that `per_token` adds up to for every expert.
fn f_of(t: usize, per_token: impl Fn(&[u16], usize) -> f64) -> [f64; E] {
    let seq_len = T / N_SEQUENCES;
    let ids = ids();
    let sequence: Vec<&[u16]> = ids
        .chunks(K)
        .skip(t / seq_len * seq_len)
        .take(seq_len)
        .collect();
    std::array::from_fn(|e| sequence.iter().map(|ids| per_token(ids, e)).sum())
}

/// `1 / T p_j (f_j - sum_i f_i p_i)`.
fn through_softmax(f: &[f64; E], row: &[f64; E]) -> [f64; E] {
    let p = softmax(row);
    std::array::from_fn(|j| p[j] * (f[j] - dot(f, &p)) / T as f64)
}

#[test]
fn sequence_balance() {
    let f = |t: usize| {
        let picked = |ids: &[u16], e: usize| f64::from(u8::from(ids.contains(&(e as u16))));
        f_of(t, |ids, e| {
            picked(ids, e) * (E * N_SEQUENCES) as f64 / (K * T) as f64
        })
    };
    check(
        |l| {
            let s = burn::tensor::activation::sigmoid(l);
            let share = s.clone() / s.sum_dim(1);
            losses::sequence_balance(share, &routing(), N_SEQUENCES)
        },
        |t, row| {
            let (f, s) = (f(t), sigmoid(row));
            let sum: f64 = s.iter().sum();
            let share = s.map(|s| s / sum);
            std::array::from_fn(|j| (f[j] - dot(&f, &share)) / sum * s[j] * (1.0 - s[j]) / T as f64)
        },
    );
    let probs = |l: Tensor<2>| burn::tensor::activation::softmax(l, 1);
    check(
        |l| losses::sequence_balance(probs(l), &routing(), N_SEQUENCES),
        |t, row| through_softmax(&f(t), row),
    );
}

#[test]
fn device_and_communication_balance() {
    let n_devices = 4;
    let per_device = E / n_devices;
    let on_device = |ids: &[u16], e: usize| {
        let same = ids
            .iter()
            .filter(|&&id| usize::from(id) / per_device == e / per_device);
        same.count() as f64
    };
    let probs = |l: Tensor<2>| burn::tensor::activation::softmax(l, 1);
    check(
        |l| losses::device_balance(probs(l), &routing(), N_SEQUENCES, n_devices),
        |t, row| {
            // The mean over a device's experts of E count / (K L).
            let one = (E * N_SEQUENCES) as f64 / (K * T * per_device) as f64;
            through_softmax(&f_of(t, |ids, e| one * on_device(ids, e)), row)
        },
    );
    let limit = 3;
    check(
        |l| {
            let devices = [n_devices, limit];
            losses::communication_balance(probs(l), &routing(), N_SEQUENCES, devices)
        },
        |t, row| {
            let one = (n_devices * N_SEQUENCES) as f64 / (limit * T) as f64;
            let sent = |ids: &[u16], e: usize| one * on_device(ids, e).min(1.0);
            through_softmax(&f_of(t, sent), row)
        },
    );
}

/// A second, fixed set of logits.
fn other() -> Rows {
    logits()
        .iter()
        .rev()
        .map(|row| std::array::from_fn(|e| 0.7 * row[E - 1 - e]))
        .collect()
}

#[test]
fn symmetric_kl() {
    check(
        |l| {
            let q = tensor(&other(), &l.device());
            losses::symmetric_kl(l, q)
        },
        |t, row| {
            let (p, q) = (softmax(row), softmax(&other()[t]));
            let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            std::array::from_fn(|j| {
                (p[j] * ((p[j] / q[j]).ln() - kl) + p[j] - q[j]) / 2.0 / T as f64
            })
        },
    );
}

#[test]
fn distillation() {
    for tau in [1.0, 2.5] {
        check(
            |l| {
                let teacher = tensor(&other(), &l.device());
                losses::distillation(l, teacher, tau)
            },
            |t, row| {
                let (student, teacher) = (
                    softmax(&row.map(|l| l / tau)),
                    softmax(&other()[t].map(|l| l / tau)),
                );
                std::array::from_fn(|j| tau * (student[j] - teacher[j]) / T as f64)
            },
        );
    }
}
