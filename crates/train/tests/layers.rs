//! What stands beside routed experts: shared experts, a dense feed-forward, the recurrent router, per-layer counts, slices
//! of one feed-forward, experts of attention. Exact identities, gradients of whole models against finite differences, parameter counts.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod tiny;

use burn::tensor::{Device, Tensor, TensorData};
use cadre_train::architecture::Architecture;
use cadre_train::init::Init;
use cadre_train::layers::attention::SelfAttention;
use cadre_train::layers::attention_experts;
use cadre_train::layers::mlp::Mlp;
use cadre_train::lm::{Batch, LanguageModel, Pass};
use cadre_train::ops::{self, AttentionShape, Dispatch, Numerics, Precision};
use cadre_train::params;
use cadre_train::routers::{Per, Route, RouteContext, RouterOptions, RouterSizes, Union};
use std::sync::Arc;
use tiny::recipe;

fn model_of(architecture: &Architecture, device: &Device) -> LanguageModel {
    let init = Init {
        seed: 5,
        std: 0.3,
        device: device.clone(),
    };
    LanguageModel::init(architecture, &init)
}

fn batch() -> Batch {
    let ids = |a: u32| Arc::new((0..10).map(|i| (i * i * 7 + a) % 40).collect::<Vec<u32>>());
    Batch {
        tokens: ids(3),
        targets: ids(11),
        seq_len: 5,
    }
}

const VARIANTS: &[(&str, &str)] = &[
    ("n_experts = 4\ntop_k = 2\nshared_intermediate_size = 5", ""),
    ("n_experts = [2, 5]\ntop_k = 2\nresidual = 'sum'", ""),
    (
        "n_experts = 4\nresidual = 'learned'\nresidual_intermediate_size = 7",
        "name = 'switch'",
    ),
    ("n_experts = 4\ntop_k = 2\nrecurrent_router = 3", ""),
    (
        "n_experts = 3\ntop_k = 3\nrecurrent_router = 3\nshared_intermediate_size = 4\nresidual = 'learned'",
        "name = 'null_experts'\nn_null = 2",
    ),
    ("n_experts = 4", "name = 'uniform'"),
    (
        "n_experts = 4\ntop_k = 2\ndecoupled_router = { hidden_size = 10, n_heads = 2, head_dim = 6, intermediate_size = 7 }",
        "",
    ),
    (
        "n_experts = [2, 5]\ndecoupled_router = { hidden_size = 6, n_layers = 2, n_heads = 1, head_dim = 4, intermediate_size = 5, per_layer = true }",
        "name = 'switch'",
    ),
    ("n_experts = 4\ntop_k = 2", "name = 'union'\neps = 1.0"),
    (
        "n_experts = 4\ntop_k = 2",
        "name = 'union'\nkeep = 0.5\nallow_non_causal = true",
    ),
    (
        "n_experts = 4\ntop_k = 2\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 1 }",
        "name = 'union'",
    ),
    (
        "n_experts = 0\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 2, eps = 0.3 }",
        "",
    ),
    (
        "n_experts = 0\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 2, keep = 0.6 }",
        "allow_non_causal = true",
    ),
];

/// The loss, and all picks.
fn loss(model: &LanguageModel, architecture: &Architecture) -> (Tensor<1>, Vec<u16>) {
    let pass = Pass {
        seed: 1,
        step: 1,
        training: true,
        ..Pass::default()
    };
    let losses = model.losses(architecture, &batch(), &pass).unwrap();
    let all = losses.routed.iter().chain(&losses.attention);
    let picks = all.flat_map(|r| r.routing.experts().to_vec());
    let picks = picks.collect();
    let router = losses.balance.mul_scalar(0.1) + losses.z.mul_scalar(0.01);
    (losses.cross_entropy + router, picks)
}

/// The gradient along a random direction through every parameter of a model, against the central difference along it:
/// one number per parameter tensor, so that every path counts, that through the recurrent state included.
#[test]
fn gradients_of_every_variant_equal_finite_differences() {
    for (model, router) in VARIANTS {
        let architecture = recipe(model, router).architecture().unwrap();
        let tracked = model_of(&architecture, &Device::flex().autodiff());
        let (value, picks) = loss(&tracked, &architecture);
        let mut gradients = value.backward();
        let mut sum = cadre_train::optimizer::GradientSum::default();
        sum.add(&tracked, &mut gradients, 1.0).unwrap();
        let plain = model_of(&architecture, &Device::flex());
        let mut compared = 0;
        for (path, (shape, values)) in params::collect(&plain) {
            let direction: Vec<f32> = (0..values.len()).map(|i| (i as f32 * 1.7).sin()).collect();
            let norm = direction.iter().map(|d| d * d).sum::<f32>().sqrt();
            let along: f64 = match sum.get(&path) {
                Some(gradient) => gradient
                    .iter()
                    .zip(&direction)
                    .map(|(g, d)| f64::from(g * d / norm))
                    .sum(),
                None => 0.0,
            };
            let at = |step: f32| {
                let moved = params::replace(tracked.clone(), |other, _| {
                    let mut found = params::collect(&plain).remove(other).unwrap().1;
                    if other == path {
                        found
                            .iter_mut()
                            .zip(&direction)
                            .for_each(|(x, d)| *x += step * d / norm);
                    }
                    Ok::<_, String>(found)
                });
                let (value, picks) = loss(&moved.unwrap(), &architecture);
                (f64::from(value.into_scalar::<f32>()), picks)
            };
            // The largest step that changes no pick; a loss of about 4 in f32 is good to 5e-7.
            let Some((want, step)) = [1e-2, 4e-3, 2e-3, 1e-3].into_iter().find_map(|step| {
                let (up, down) = (at(step), at(-step));
                let same = up.1 == picks && down.1 == picks;
                same.then(|| ((up.0 - down.0) / (2.0 * f64::from(step)), step))
            }) else {
                continue;
            };
            compared += 1;
            let noise = 2e-6 / f64::from(step);
            assert!(
                (along - want).abs() < 2e-4 + noise + 1e-2 * want.abs(),
                "{model} {router}: {path} {shape:?}: {along} is not {want}, step {step}"
            );
        }
        let all = params::collect(&plain).len();
        assert!(
            compared * 10 >= all * 9,
            "{model} {router}: {compared} of {all}"
        );
    }
}

/// The routing of the first layer reaches the logits of the second one through the state: without a second MoE layer's
/// picks in the loss, `router_in` of layer 0 would have no other gradient.
#[test]
fn the_recurrent_state_carries_gradient_between_layers() {
    let recipe = recipe("n_experts = 4\ntop_k = 2\nrecurrent_router = 3", "");
    let architecture = recipe.architecture().unwrap();
    let model = model_of(&architecture, &Device::flex().autodiff());
    let forward = model
        .forward(&architecture, &batch(), &Pass::default())
        .unwrap();
    // Only the last layer's logits: layer 0 touches them through the stream and through the state.
    let last = forward.routed[1].logits.clone().square().sum();
    let mut gradients = last.backward();
    let mut sum = cadre_train::optimizer::GradientSum::default();
    sum.add(&model, &mut gradients, 1.0).unwrap();
    let of = |path: &str| {
        let found = params::collect(&model)
            .into_keys()
            .find(|key| key.contains(path));
        let gradient = sum.get(&found.unwrap()).map(<[f32]>::to_vec);
        gradient
            .unwrap_or_default()
            .iter()
            .map(|g| g.abs())
            .sum::<f32>()
    };
    assert!(of("router_in") > 1e-3, "W1 of layer 0");
    assert!(of("router_gru") > 1e-3);
}

/// Tokens do not mix: a permuted batch has permuted router logits in every layer (single-token sequences, so that
/// attention does not mix them either).
#[test]
fn the_recurrent_state_belongs_to_its_token() {
    let recipe = recipe("n_experts = 4\ntop_k = 2\nrecurrent_router = 3", "");
    let architecture = recipe.architecture().unwrap();
    let model = model_of(&architecture, &Device::flex());
    let logits = |tokens: Vec<u32>| {
        let batch = Batch {
            targets: Arc::new(tokens.clone()),
            tokens: Arc::new(tokens),
            seq_len: 1,
        };
        let forward = model
            .forward(&architecture, &batch, &Pass::default())
            .unwrap();
        forward.routed[1]
            .logits
            .to_data()
            .try_to_vec::<f32>()
            .unwrap()
    };
    let (a, b) = (logits(vec![1, 2, 3]), logits(vec![3, 1, 2]));
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        for e in 0..4 {
            assert!((a[from * 4 + e] - b[to * 4 + e]).abs() < 1e-6);
        }
    }
}

fn random(seed: u64, shape: [usize; 3]) -> Vec<f32> {
    let mut state = seed;
    (0..shape.iter().product::<usize>())
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 1.2
        })
        .collect()
}

fn three(values: Vec<f32>, shape: [usize; 3]) -> Tensor<3> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

#[track_caller]
fn assert_close(a: Tensor<2>, b: Tensor<2>) {
    let (a, b): (Vec<f32>, Vec<f32>) = (a.try_into_vec_as().unwrap(), b.try_into_vec_as().unwrap());
    assert_eq!(a.len(), b.len());
    assert!(a.iter().any(|x| x.abs() > 1e-2));
    for (a, b) in a.iter().zip(&b) {
        assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    }
}

/// Cuts a feed-forward `gate_up [1, 2 I, d]`, `down [1, d, I]` into `m` slices of its hidden channels.
fn slices(gate_up: &[f32], down: &[f32], [width, d, m]: [usize; 3]) -> (Tensor<3>, Tensor<3>) {
    let part = width / m;
    let (mut up, mut out) = (Vec::new(), Vec::new());
    for s in 0..m {
        for half in 0..2 {
            let first = half * width + s * part;
            up.extend_from_slice(&gate_up[first * d..(first + part) * d]);
        }
        for row in 0..d {
            out.extend_from_slice(&down[row * width + s * part..row * width + (s + 1) * part]);
        }
    }
    (three(up, [m, 2 * part, d]), three(out, [m, d, part]))
}

/// Fine-grained experts and the union of experts: all slices of a feed-forward, each with weight 1, are the feed-forward;
/// and with a subset the rest is missing.
#[test]
fn all_slices_together_are_the_whole() {
    let [n_tokens, d, width, m] = [5, 6, 12, 4];
    let (gate_up, down) = (random(1, [1, 2 * width, d]), random(2, [1, d, width]));
    let x = three(random(3, [1, n_tokens, d]), [1, n_tokens, d]).reshape([n_tokens, d]);
    let whole = |x: Tensor<2>| {
        ops::experts(
            x,
            three(gate_up.clone(), [1, 2 * width, d]),
            three(down.clone(), [1, d, width]),
            Tensor::ones([n_tokens], &Device::flex()),
            Arc::new(Dispatch::dense(n_tokens)),
        )
    };
    let some = |picks: &[u16]| {
        let mut routing = cadre_routing::Routing::new();
        for _ in 0..n_tokens {
            routing.push_token(picks, &vec![1.0; picks.len()]);
        }
        let (up, out) = slices(&gate_up, &down, [width, d, m]);
        let weights = Tensor::ones([n_tokens * picks.len()], &Device::flex());
        ops::experts(
            x.clone(),
            up,
            out,
            weights,
            Arc::new(Dispatch::of(&routing, m)),
        )
    };
    assert_close(some(&[2, 0, 3, 1]), whole(x.clone()));
    assert_close(some(&[1, 3]) + some(&[0, 2]), whole(x.clone()));

    // The union's own weights: all experts picked and eps 0 make the scalar 1.
    let router = cadre_train::routers::RouterOptions {
        eps: Some(0.0),
        ..cadre_train::routers::RouterOptions::named("union")
    };
    let sizes = cadre_train::routers::RouterSizes {
        n_experts: m,
        top_k: m,
        norm_topk_prob: true,
    };
    let logits = three(random(4, [1, n_tokens, m]), [1, n_tokens, m]).reshape([n_tokens, m]);
    let context = cadre_train::routers::RouteContext::default();
    let routed = router
        .build(sizes)
        .unwrap()
        .route(logits, &context)
        .unwrap();
    let (up, out) = slices(&gate_up, &down, [width, d, m]);
    let dispatch = Arc::new(Dispatch::of(&routed.routing, m));
    assert_close(
        ops::experts(x.clone(), up, out, routed.weights, dispatch),
        whole(x),
    );
}

/// Identical experts with weights that sum to 1 are one feed-forward (sparse upcycling starts there), whatever the picks;
/// and two shared experts are one of twice the width.
#[test]
fn identical_experts_and_fused_shared_experts() {
    let [n_tokens, d, width, n] = [5, 6, 4, 3];
    let (gate_up, down) = (random(1, [1, 2 * width, d]), random(2, [1, d, width]));
    let x = three(random(3, [1, n_tokens, d]), [1, n_tokens, d]).reshape([n_tokens, d]);
    let one = |x: Tensor<2>| {
        let ones = Tensor::ones([n_tokens], &Device::flex());
        let up = three(gate_up.clone(), [1, 2 * width, d]);
        let out = three(down.clone(), [1, d, width]);
        ops::experts(x, up, out, ones, Arc::new(Dispatch::dense(n_tokens)))
    };
    let sizes = cadre_train::routers::RouterSizes {
        n_experts: n,
        top_k: 2,
        norm_topk_prob: true,
    };
    let router = cadre_train::routers::RouterOptions::default()
        .build(sizes)
        .unwrap();
    let logits = three(random(4, [1, n_tokens, n]), [1, n_tokens, n]).reshape([n_tokens, n]);
    let routed = router
        .route(logits, &cadre_train::routers::RouteContext::default())
        .unwrap();
    let dispatch = Arc::new(Dispatch::of(&routed.routing, n));
    let up = three(gate_up.repeat(n), [n, 2 * width, d]);
    let out = three(down.repeat(n), [n, d, width]);
    assert_close(
        ops::experts(x.clone(), up, out, routed.weights, dispatch),
        one(x.clone()),
    );

    let fused = random(5, [1, 4 * width, d]);
    let fused_down = random(6, [1, d, 2 * width]);
    let (up, out) = slices(&fused, &fused_down, [2 * width, d, 2]);
    let both = |e: usize| {
        let ones = Tensor::ones([n_tokens], &Device::flex());
        let (up, out) = (up.clone().narrow(0, e, 1), out.clone().narrow(0, e, 1));
        ops::experts(
            x.clone(),
            up,
            out,
            ones,
            Arc::new(Dispatch::dense(n_tokens)),
        )
    };
    let whole = Mlp {
        gate_up: burn::module::Param::from_tensor(three(fused, [1, 4 * width, d])),
        down: burn::module::Param::from_tensor(three(fused_down, [1, d, 2 * width])),
    };
    assert_close(
        both(0) + both(1),
        whole.forward(x.clone(), Numerics::default()),
    );
}

/// A coefficient whose bias leaves everything to the feed-forward is the dense block, and the other way round.
#[test]
fn a_learned_residual_of_one_is_the_dense_block() {
    use cadre_train::architecture::Residual;
    use cadre_train::layers::residual::ResidualMlp;
    let init = Init {
        seed: 1,
        std: 0.4,
        device: Device::flex(),
    };
    let mut residual = ResidualMlp::init([6, 4], Residual::Learned, &init, "r", 1.0);
    let x = three(random(3, [1, 5, 6]), [1, 5, 6]).reshape([5, 6]);
    let experts = x.clone().mul_scalar(2.0);
    let mut with_bias = |bias: [f32; 2]| {
        let coefficient = residual.coefficient.as_mut().unwrap();
        let bias = Tensor::from_floats(bias, &Device::flex());
        coefficient.bias = burn::module::Param::from_tensor(bias);
        residual.forward(x.clone(), experts.clone(), Numerics::default())
    };
    let (dense, routed, sum) = (
        with_bias([-90.0, 90.0]),
        with_bias([90.0, -90.0]),
        with_bias([0.0, 0.0]),
    );
    assert_close(routed, experts.clone());
    assert_close(
        dense.clone(),
        residual.mlp.forward(x.clone(), Numerics::default()),
    );
    let plain = ResidualMlp {
        coefficient: None,
        ..residual
    };
    assert_close(
        plain.forward(x.clone(), experts.clone(), Numerics::default()),
        dense + experts,
    );
    assert_eq!(sum.dims(), [5, 6]);
}

/// Attention by eight heads in four groups, and its shape for two sequences of five tokens.
fn attention(n_experts: usize) -> (SelfAttention, AttentionShape) {
    let keys = "n_experts = 0\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 1 }";
    let mut config = recipe(keys, "").model_config();
    (config.n_heads, config.n_kv_heads) = (8, 4);
    config.attention.experts = Some(cadre_checkpoint::AttentionExperts {
        n_experts,
        top_k: 1,
        eps: 1.0,
    });
    let init = Init {
        seed: 3,
        std: 0.6,
        device: Device::flex(),
    };
    let shape = AttentionShape {
        batch: 2,
        seq_len: 5,
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        rope_theta: 100.0,
        eps: 1e-6,
        precision: Precision::F32,
    };
    (SelfAttention::init(&config, &init, "a", 1.0), shape)
}

/// Where the experts of [`attention`] are asked.
fn sequences() -> RouteContext<'static> {
    RouteContext {
        seq_len: 5,
        ..RouteContext::default()
    }
}

/// What defines the decomposition: all experts with weight 1 are the attention that was cut; and where all tokens take the
/// same ones, only the heads of the others are missing.
#[test]
fn all_experts_of_attention_together_are_the_whole() {
    let x = three(random(9, [1, 10, 8]), [1, 10, 8]).reshape([10, 8]);
    for n in [2, 4] {
        let (mut attention, shape) = attention(n);
        let whole = attention.forward(x.clone(), shape);
        let all = Union::new(n, n, 1.0, 0.0).unwrap();
        let (y, routed) =
            attention_experts::forward(&attention, x.clone(), shape, (&all, &sequences())).unwrap();
        assert_close(y, whole);
        assert_eq!(routed.routing.n_pairs(), 10 * n);

        // One draw for all tokens; each pick has weight 1 / k.
        let options = RouterOptions {
            per: Some(Per::Pass),
            ..RouterOptions::named("uniform")
        };
        let sizes = RouterSizes {
            n_experts: n,
            top_k: n / 2,
            norm_topk_prob: true,
        };
        let some = options.build(sizes).unwrap();
        let training = RouteContext {
            training: true,
            ..sequences()
        };
        let (y, routed) =
            attention_experts::forward(&attention, x.clone(), shape, (&*some, &training)).unwrap();
        let picked = routed.routing.token(0).0.to_vec();
        assert!(routed.routing.iter().all(|(ids, _)| ids == picked));
        let width = 8 * 4;
        let mask: Vec<f32> = (0..width)
            .map(|column| f32::from(picked.contains(&((column / (width / n)) as u16))))
            .collect();
        let mask = three(mask, [1, 1, width]).reshape([1, width]);
        let masked = attention.o_proj.val() * mask;
        attention.o_proj = burn::module::Param::from_tensor(masked);
        let missing = attention.forward(x.clone(), shape);
        assert_close(y.mul_scalar((n / 2) as f32), missing);
    }
}

/// The rows of `y` by which two passes over inputs that differ in `changed` differ.
fn differing(rule: &Union, changed: usize) -> Vec<usize> {
    let (attention, shape) = attention(4);
    let mut values = random(9, [1, 10, 8]);
    let pass = |values: &[f32]| {
        let x = three(values.to_vec(), [1, 10, 8]).reshape([10, 8]);
        let (y, _) =
            attention_experts::forward(&attention, x, shape, (rule, &sequences())).unwrap();
        y.try_into_vec_as::<f32>().unwrap()
    };
    let before = pass(&values);
    values[changed * 8..][..8]
        .iter_mut()
        .for_each(|v| *v = 1.7 - *v);
    let after = pass(&values);
    let rows = before.chunks(8).zip(after.chunks(8)).enumerate();
    let differ = |(a, b): (&[f32], &[f32])| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-6);
    rows.filter(|(_, pair)| differ(*pair))
        .map(|(row, _)| row)
        .collect()
}

/// What a token gets does not depend on later tokens and other sequences, unless experts keep a share of a sequence: then
/// later tokens push earlier ones out.
#[test]
fn attention_experts_look_back_only() {
    let causal = Union::new(4, 2, 1.0, 1.0).unwrap();
    for changed in 0..10 {
        let end = (changed / 5 + 1) * 5;
        let rows = differing(&causal, changed);
        assert!(
            rows.iter().all(|row| (changed..end).contains(row)),
            "{changed}: {rows:?}"
        );
        assert!(rows.contains(&changed));
    }
    let sharing = Union::new(4, 2, 0.4, 1.0).unwrap();
    assert!(causal.causal() && !sharing.causal());
    let leaks = (0..10).flat_map(|changed| {
        let rows = differing(&sharing, changed);
        assert!(
            rows.iter().all(|row| row / 5 == changed / 5),
            "another sequence"
        );
        rows.into_iter().filter(move |row| *row < changed)
    });
    assert!(leaks.count() > 0);
}

fn count(text: &str) -> usize {
    let recipe = recipe(text, "");
    let architecture = recipe.architecture().unwrap();
    let held: usize = params::collect(&model_of(&architecture, &Device::flex()))
        .values()
        .map(|(_, values)| values.len())
        .sum();
    assert_eq!(architecture.n_parameters(), held, "{text}");
    held
}

/// Parameters are those that the model has; the router of RMoE's small model has the 0.47 million of the paper's table.
#[test]
fn parameters_are_counted() {
    for (model, router) in VARIANTS {
        let architecture = recipe(model, router).architecture().unwrap();
        let held: usize = params::collect(&model_of(&architecture, &Device::flex()))
            .values()
            .map(|(_, values)| values.len())
            .sum();
        assert_eq!(architecture.n_parameters(), held, "{model} {router}");
    }
    let base = count("n_experts = 4\ntop_k = 2");
    // Two layers: linear routers of 4 x 8 give way to 3 x 8 + 4 x 3, and one GRU of width 3 joins.
    let recurrent = count("n_experts = 4\ntop_k = 2\nrecurrent_router = 3");
    assert_eq!(
        recurrent as i64 - base as i64,
        2 * (3 * 8 + 4 * 3 - 4 * 8) + 6 * 9 + 6 * 3
    );
    // Table 1 of the paper: L (p d + N p) + 6 p^2 + 6 p.
    let [l, d, n, p] = [8, 352, 16, 128];
    assert_eq!(l * (p * d + n * p) + 6 * p * p + 6 * p, 475_904);
}
