//! Every router: against its policy, against the worked example in `golden/routing/section.json`, its gradients against
//! finite differences, and what it declares about causality against perturbed inputs.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use burn::tensor::{DType, Device, Tensor, TensorData};
use cadre_routing::Routing;
use cadre_routing::policies::{ScoreFn, Stage};
use cadre_routing::registry::{self, PolicyOptions};
use cadre_train::routers::{
    self, Per, Route, RouteContext, Routed, RouterOptions, RouterSizes, Second,
};
use serde_json::Value;

const E: usize = 8;

fn sizes(n_experts: usize, top_k: usize, norm_topk_prob: bool) -> RouterSizes {
    RouterSizes {
        n_experts,
        top_k,
        norm_topk_prob,
    }
}

/// Every router with options of some interest, on eight real experts; several per name.
fn examples() -> Vec<(String, Box<dyn Route>)> {
    let named = RouterOptions::named;
    let group = |score, norm: bool| {
        let options = RouterOptions {
            n_groups: Some(4),
            keep_groups: Some(2),
            score: Some(score),
            scale: Some(2.5),
            ..named("group_limited")
        };
        (options, 2, norm)
    };
    let second = |second| RouterOptions {
        second: Some(second),
        ..named("top_2")
    };
    let gate = |hard_from, noise| RouterOptions {
        temperature: Some(0.8),
        hard_from,
        noise: Some(noise),
        ..named("dense_to_sparse")
    };
    let mut list = vec![
        (named("top_k"), 3, true),
        (named("top_k"), 3, false),
        (named("switch"), 1, false),
        (second(Second::Plain), 2, true),
        (second(Second::Gumbel), 2, true),
        (second(Second::Random), 2, true),
        (named("top_p"), 1, true),
        (named("null_experts"), 4, true),
        group(ScoreFn::Softmax, false),
        group(ScoreFn::Softmax, true),
        group(ScoreFn::Sigmoid, false),
        group(ScoreFn::Sigmoid, true),
        (named("sparse_mixer"), 2, true),
        (named("expert_choice"), 1, true),
        (gate(None, true), 1, true),
        (gate(None, false), 1, true),
        (gate(Some(1), true), 1, true),
        (named("uniform"), 1, true),
        (named("union"), 3, true),
    ];
    list.push((
        RouterOptions {
            keep: Some(0.5),
            eps: Some(0.3),
            ..named("union")
        },
        3,
        true,
    ));
    list.push((
        RouterOptions {
            per: Some(Per::Token),
            ..named("uniform")
        },
        2,
        true,
    ));
    for name in routers::names() {
        assert!(
            list.iter().any(|(o, ..)| o.name == name),
            "no example of {name}"
        );
    }
    let built = list.into_iter().map(|(options, top_k, norm)| {
        options.check().unwrap();
        let router = options.build(sizes(E, top_k, norm)).unwrap();
        (format!("{options:?}, norm {norm}"), router)
    });
    built.collect()
}

fn context(training: bool) -> RouteContext<'static> {
    RouteContext {
        seed: 7,
        step: 3,
        layer: 1,
        pass: 2,
        training,
        seq_len: 4,
        bias: None,
    }
}

fn tensor(rows: &[f64], n: usize, device: &Device) -> Tensor<2> {
    let data = TensorData::new(rows.to_vec(), [rows.len() / n, n]);
    Tensor::from_data(data, (device, DType::F64))
}

fn weights(routed: &Routed) -> Vec<f64> {
    routed.weights.clone().try_into_vec_as().unwrap()
}

/// Values without near-ties, so that a small step never changes an order.
fn logits(n_tokens: usize, n: usize) -> Vec<f64> {
    (0..n_tokens * n)
        .map(|i| {
            let (t, e) = (i / n, i % n);
            2.0 * ((7 * t + 3 * e * e + 1) as f64).sin() + 0.1 * e as f64
        })
        .collect()
}

/// Equal logits must give equal ids and weights within 1e-6 on both sides, ties included.
#[test]
fn every_router_agrees_with_its_policy() {
    const N: usize = 16;
    // Steps of 1/4 make many ties.
    let rows: Vec<f32> = (0..64 * N)
        .map(|i| (12.0 * (i as f32 * 1.37).sin()).round() / 4.0)
        .collect();
    let mut compared = 0;
    for name in routers::names() {
        for (top_k, norm_topk_prob) in [(1, false), (2, true), (4, true), (4, false), (N, true)] {
            let options = RouterOptions::named(name);
            let Ok(router) = options.build(sizes(N, top_k, norm_topk_prob)) else {
                continue;
            };
            let policy_options = PolicyOptions {
                n_experts: router.n_experts(),
                n_null: router.n_experts() - router.n_real_experts(),
                top_k,
                norm_topk_prob,
                // How the dense-to-sparse gate is evaluated.
                stage: Stage::Hard,
                eps: if name == "union" { 1.0 } else { 0.01 },
                ..PolicyOptions::default()
            };
            let policy = registry::build(name, &policy_options).unwrap();
            if !router.has_gate() {
                assert_eq!(router.name(), policy.name());
                continue;
            }
            assert_eq!(
                (router.name(), router.n_experts(), router.n_real_experts()),
                (name, policy.n_experts(), policy.n_real_experts())
            );
            assert_eq!(router.causal(), policy.causal());
            assert_eq!(router.batch_invariant(), policy.batch_invariant());
            let rows = &rows[..rows.len() / policy.n_experts() * policy.n_experts()];
            let mut routing = Routing::new();
            policy.route(rows, &mut routing).unwrap();
            let dims = [rows.len() / policy.n_experts(), policy.n_experts()];
            let data = TensorData::new(rows.to_vec(), dims);
            let routed = router
                .route(Tensor::from_data(data, &Device::flex()), &context(false))
                .unwrap();
            assert_eq!(routed.routing.experts(), routing.experts(), "{name}");
            assert_eq!(routed.routing.offsets(), routing.offsets(), "{name}");
            let found: Vec<f32> = routed.weights.try_into_vec_as().unwrap();
            assert_eq!(found.len(), routing.weights().len());
            for (a, b) in found.iter().zip(routing.weights()) {
                assert!((a - b).abs() < 1e-6, "{name}: weight {a} is not {b}");
            }
            assert_eq!(routed.loads.n_tokens(), dims[0] as u64);
            compared += 1;
        }
    }
    assert!(compared >= 20, "{compared} cases");
}

fn loss(router: &dyn Route, logits: Tensor<2>, training: bool) -> Tensor<1> {
    let routed = router.route(logits, &context(training)).unwrap();
    let n = routed.routing.n_pairs();
    let g: Vec<f64> = (0..n).map(|i| ((5 * i + 2) as f64).cos()).collect();
    let place = (&routed.weights.device(), DType::F64);
    let g = Tensor::<1>::from_data(TensorData::new(g, [n]), place);
    let balance = router.balance(&routed, &router.balance_loads(&routed), false);
    (routed.weights * g).sum() + balance.mul_scalar(0.5)
}

/// Through `route` and `balance`, in training and evaluation: picks and noise are constants, all else is differentiated.
#[test]
fn gradients_of_every_router_equal_finite_differences() {
    const STEP: f64 = 1e-6;
    for (name, router) in examples() {
        let (n, n_tokens) = (router.n_experts(), 5);
        let rows = logits(n_tokens, n);
        for training in [true, false] {
            let x = tensor(&rows, n, &Device::flex().autodiff()).require_grad();
            let value = loss(&*router, x.clone(), training);
            let gradient = if value.is_tracked() {
                x.grad(&value.backward())
            } else {
                None
            };
            let found: Vec<f64> = match gradient {
                Some(gradient) => gradient.try_into_vec_as().unwrap(),
                None => vec![0.0; rows.len()],
            };
            let random = router.name() == "uniform";
            assert_eq!(random, found.iter().all(|d| d.abs() < 1e-9), "{name}");
            for i in (0..rows.len()).filter(|_| !random) {
                let at = |step: f64| -> f64 {
                    let mut moved = rows.clone();
                    moved[i] += step;
                    loss(&*router, tensor(&moved, n, &Device::flex()), training).into_scalar()
                };
                let want = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                assert!(
                    (found[i] - want).abs() < 1e-7,
                    "{name}, training {training}: token {}, expert {}: {} is not {want}",
                    i / n,
                    i % n,
                    found[i]
                );
            }
        }
    }
}

/// Two sequences of four tokens. A causal rule routes tokens 0 to 2 the same whatever token 3 is; a batch-invariant one
/// routes the first sequence the same whatever the second is. What a rule does not declare, some change must show.
#[test]
fn every_router_keeps_what_it_declares() {
    for (name, router) in examples() {
        let n = router.n_experts();
        for training in [true, false] {
            let route = |rows: &[f64]| {
                let routed = router.route(tensor(rows, n, &Device::flex()), &context(training));
                let routed = routed.unwrap();
                let weights = weights(&routed);
                let offsets = routed.routing.offsets().to_vec();
                let token = move |t: usize| {
                    let pairs = offsets[t] as usize..offsets[t + 1] as usize;
                    let ids = routed.routing.experts()[pairs.clone()].to_vec();
                    (ids, weights[pairs].to_vec())
                };
                (0..8).map(token).collect::<Vec<_>>()
            };
            let rows = logits(8, n);
            let before = route(&rows);
            let (mut causal, mut invariant) = (true, true);
            for trial in 0..12 {
                let moved = |from: usize| {
                    let mut moved = rows.clone();
                    for (i, x) in moved[from * n..].iter_mut().enumerate() {
                        *x += 3.0 * ((17 * trial + i) as f64).sin();
                    }
                    route(&moved)
                };
                // The last token of the first sequence, and with it all of the second.
                causal &= moved(3)[..3] == before[..3];
                invariant &= moved(4)[..4] == before[..4];
            }
            assert_eq!(router.causal(), causal, "{name}, training {training}");
            assert_eq!(
                router.batch_invariant(),
                invariant,
                "{name}, training {training}"
            );
        }
    }
}

/// Noise is a function of seed, step, layer and pass: the same for a recomputed pass, another for any other.
#[test]
fn what_is_random_follows_from_the_context() {
    let base = context(true);
    let others = [
        RouteContext { seed: 8, ..base },
        RouteContext { step: 4, ..base },
        RouteContext { layer: 2, ..base },
        RouteContext { pass: 3, ..base },
    ];
    let mut random = 0;
    for (name, router) in examples() {
        let n = router.n_experts();
        let route = |context: &RouteContext<'_>| {
            let routed = router
                .route(tensor(&logits(32, n), n, &Device::flex()), context)
                .unwrap();
            (routed.routing.clone(), weights(&routed))
        };
        let first = route(&base);
        assert!(first == route(&base), "{name}");
        let differ = others
            .iter()
            .filter(|context| route(context) != first)
            .count();
        assert!(
            differ == 0 || differ >= 3,
            "{name}: {differ} of four contexts differ"
        );
        random += usize::from(differ > 0);
    }
    // GShard's two, the noisy gate soft and hard, and the two uniform ones.
    assert_eq!(random, 6);
}

#[test]
fn logits_that_are_not_finite_are_refused_by_every_router() {
    for (name, router) in examples() {
        let n = router.n_experts();
        let mut rows = logits(3, n);
        rows[n + 1] = f64::NAN;
        let routed = router.route(tensor(&rows, n, &Device::flex()), &context(true));
        let text = routed.unwrap_err().to_string();
        assert!(text.contains("token 1"), "{name}: {text}");
    }
}

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../golden/routing/section.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

fn example_logits() -> Vec<f64> {
    let golden = golden();
    golden["logits"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(numbers)
        .collect()
}

/// Holds picks and weights of `options` to `{token, experts, weights}` entries.
#[track_caller]
fn hold(options: &RouterOptions, sizes: RouterSizes, bias: Option<&[f32]>, picks: &Value) {
    let router = options.build(sizes).unwrap();
    let context = RouteContext {
        bias,
        ..context(false)
    };
    let routed = router
        .route(tensor(&example_logits(), E, &Device::flex()), &context)
        .unwrap();
    let all = weights(&routed);
    for pick in picks.as_array().unwrap() {
        let t = pick["token"].as_u64().unwrap() as usize;
        let (ids, _) = routed.routing.token(t);
        let wanted: Vec<f64> = numbers(&pick["experts"]);
        assert_eq!(
            ids.iter().map(|&id| f64::from(id)).collect::<Vec<_>>(),
            wanted
        );
        let from = routed.routing.offsets()[t] as usize;
        for (a, b) in all[from..from + ids.len()]
            .iter()
            .zip(numbers(&pick["weights"]))
        {
            assert!(
                (a - b).abs() < 6e-7 * (1.0 + b),
                "{}: {a} is not {b}",
                options.name
            );
        }
    }
}

#[test]
fn picks_and_weights_of_the_worked_example() {
    let golden = golden();
    let named = RouterOptions::named;
    let switch: Vec<Value> = (0..6)
        .map(|t| {
            serde_json::json!({"token": t, "experts": [golden["switch"]["experts"][t]],
                "weights": [golden["switch"]["weights"][t]]})
        })
        .collect();
    hold(&named("switch"), sizes(E, 1, false), None, &switch.into());
    hold(
        &named("top_2"),
        sizes(E, 2, true),
        None,
        &golden["top_2_renormalised"],
    );
    hold(
        &named("top_k"),
        sizes(E, 2, true),
        None,
        &golden["top_2_renormalised"],
    );
    let options = RouterOptions {
        n_null: Some(3),
        ..named("null_experts")
    };
    hold(
        &options,
        sizes(5, 4, true),
        None,
        &golden["null_experts"]["picks"],
    );
    let v2 = RouterOptions {
        n_groups: Some(4),
        keep_groups: Some(2),
        scale: Some(16.0),
        ..named("group_limited")
    };
    hold(
        &v2,
        sizes(E, 2, false),
        None,
        &golden["group_limited_v2"]["picks"],
    );
    let v3 = RouterOptions {
        score: Some(ScoreFn::Sigmoid),
        scale: Some(2.5),
        ..v2
    };
    let bias: Vec<f32> = numbers(&golden["group_limited_v3"]["bias"])
        .iter()
        .map(|&b| b as f32)
        .collect();
    hold(
        &v3,
        sizes(E, 2, true),
        Some(&bias),
        &golden["group_limited_v3"]["picks"],
    );
}

#[test]
fn ragged_picks_of_the_worked_example() {
    let golden = golden();
    let probs = burn::tensor::activation::softmax(tensor(&example_logits(), E, &Device::flex()), 1);
    let probs: Vec<f64> = probs.try_into_vec_as().unwrap();
    let check = |options: &RouterOptions, wanted: &[Vec<u16>]| {
        let router = options.build(sizes(E, 1, true)).unwrap();
        let routed = router
            .route(
                tensor(&example_logits(), E, &Device::flex()),
                &context(false),
            )
            .unwrap();
        let mut found = weights(&routed).into_iter();
        for (t, (ids, _)) in routed.routing.iter().enumerate() {
            let mut sorted = ids.to_vec();
            sorted.sort_by(|&a, &b| {
                probs[t * E + usize::from(b)].total_cmp(&probs[t * E + usize::from(a)])
            });
            assert_eq!(
                (ids, &sorted),
                (wanted[t].as_slice(), &wanted[t]),
                "{options:?}"
            );
            for &id in ids {
                assert!((found.next().unwrap() - probs[t * E + usize::from(id)]).abs() < 1e-12);
            }
        }
    };
    for case in golden["top_p"].as_array().unwrap() {
        let ids = |row: &Value| {
            numbers(row)
                .iter()
                .map(|&id| id as u16)
                .collect::<Vec<u16>>()
        };
        let wanted: Vec<Vec<u16>> = case["experts"]
            .as_array()
            .unwrap()
            .iter()
            .map(ids)
            .collect();
        let options = RouterOptions {
            top_p: Some(case["top_p"].as_f64().unwrap() as f32),
            ..RouterOptions::named("top_p")
        };
        check(&options, &wanted);
    }
    let mut wanted = vec![Vec::new(); 6];
    for (e, t) in (0..).zip(numbers(&golden["expert_choice"]["token_of_expert"])) {
        wanted[t as usize].push(e);
    }
    for (t, ids) in wanted.iter_mut().enumerate() {
        ids.sort_by(|&a: &u16, &b| {
            probs[t * E + usize::from(b)].total_cmp(&probs[t * E + usize::from(a)])
        });
    }
    check(&RouterOptions::named("expert_choice"), &wanted);
}

#[test]
fn the_gate_of_the_worked_example() {
    let golden = &golden()["dense_to_sparse"];
    let noise = numbers(&golden["noise"]);
    let row: Vec<f64> = example_logits()
        .iter()
        .zip(&noise)
        .map(|(l, g)| l + g)
        .collect();
    for gate in golden["gates"].as_array().unwrap() {
        let options = RouterOptions {
            temperature: Some(gate["temperature"].as_f64().unwrap() as f32),
            noise: Some(false),
            ..RouterOptions::named("dense_to_sparse")
        };
        let router = options.build(sizes(E, 1, true)).unwrap();
        let routed = router
            .route(tensor(&row, E, &Device::flex()), &context(true))
            .unwrap();
        let mut ids: Vec<f64> = routed
            .routing
            .experts()
            .iter()
            .map(|&id| f64::from(id))
            .collect();
        for (id, w) in ids.iter().zip(weights(&routed)) {
            let y = gate["y"][*id as usize].as_f64().unwrap();
            assert!((w - y).abs() < 6e-7, "{w} is not {y}");
        }
        ids.sort_by(f64::total_cmp);
        assert_eq!(ids, numbers(&gate["chosen"]));
        // All chosen: the loss is E times the sum of the mean gates, which is E.
        if ids.len() == E {
            let balance: f64 = router.balance(&routed, &routed.loads, false).into_scalar();
            assert!((balance - E as f64).abs() < 1e-6);
        }
    }
}

/// A token whose picks are all null gets weights of 0 and sends no gradient; first picks alone are what GShard balances.
#[test]
fn corner_cases() {
    let options = RouterOptions {
        n_null: Some(2),
        ..RouterOptions::named("null_experts")
    };
    let router = options.build(sizes(2, 2, true)).unwrap();
    let x = tensor(&[0.0, 0.0, 5.0, 6.0], 4, &Device::flex().autodiff()).require_grad();
    let routed = router.route(x.clone(), &context(true)).unwrap();
    assert_eq!(routed.routing.experts(), [3, 2]);
    assert_eq!(weights(&routed), [0.0, 0.0]);
    let gradients = routed.weights.sum().backward();
    let gradient: Vec<f64> = x.grad(&gradients).unwrap().try_into_vec_as().unwrap();
    assert_eq!(gradient, [0.0; 4]);

    let router = RouterOptions::named("top_2")
        .build(sizes(E, 2, true))
        .unwrap();
    let routed = router
        .route(
            tensor(&example_logits(), E, &Device::flex()),
            &context(false),
        )
        .unwrap();
    let loads = router.balance_loads(&routed);
    assert_eq!(loads.counts(), [1, 1, 0, 3, 1, 0, 0, 0]);
    let balance: f64 = router.balance(&routed, &loads, false).into_scalar();
    let switch = golden()["losses"]["balance_switch"].as_f64().unwrap();
    assert!((balance - switch).abs() < 6e-7);
}

/// The bias moves the selection and nothing else: adding a constant changes nothing, and an unchanged set has unchanged
/// weights.
#[test]
fn a_bias_moves_the_selection_only() {
    let options = RouterOptions {
        score: Some(ScoreFn::Sigmoid),
        ..RouterOptions::named("group_limited")
    };
    let router = options.build(sizes(E, 3, true)).unwrap();
    assert!(router.takes_bias());
    let route = |bias: Option<&[f32]>| {
        let context = RouteContext {
            bias,
            ..context(true)
        };
        let routed = router
            .route(tensor(&logits(16, E), E, &Device::flex()), &context)
            .unwrap();
        (routed.routing.experts().to_vec(), weights(&routed))
    };
    let none = route(None);
    assert!(none == route(Some(&[0.5; E])));
    let (ids, moved) = route(Some(&[0.0, 0.0, 0.3, 0.0, 0.0, -0.3, 0.0, 0.0]));
    assert_ne!(ids, none.0);
    for t in 0..16 {
        let sorted = |ids: &[u16]| {
            let mut ids = ids[3 * t..3 * t + 3].to_vec();
            ids.sort_unstable();
            ids
        };
        if sorted(&ids) == sorted(&none.0) {
            let sum = |w: &[f64]| w[3 * t..3 * t + 3].iter().map(|w| w * w).sum::<f64>();
            assert!((sum(&moved) - sum(&none.1)).abs() < 1e-12);
        }
    }
}
