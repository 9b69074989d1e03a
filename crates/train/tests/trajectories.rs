//! Twenty optimizer steps of every routing rule: against plain torch where its rule is written there
//! (`golden/train/trajectories.json`, made by `golden/make/trajectories.py`), and against what we recorded ourselves for
//! the others, which holds us to yesterday's numbers only.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod golden_steps;

use burn::tensor::{Device, Tensor};
use cadre_checkpoint::Checkpoint;
use cadre_routing::filters::{Capacity, Rounding};
use cadre_train::architecture::{Architecture, MoeParts};
use cadre_train::export;
use cadre_train::lm::{Batch, Pass};
use cadre_train::methods::balance_bias::BalanceBias;
use cadre_train::optimizer::{AdamW, AdamWConfig, GradientSum};
use cadre_train::routers::{Order, RouterOptions, names};
use golden_steps::{Settings, Step};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

/// Relative to the value. In float64 torch moves by at most 3e-6 (`noise`), and we sum in another order still.
const TOLERANCE: f64 = 3e-5;
/// Norms of gradients move more: every step starts from weights that differ already.
const NORM_TOLERANCE: f64 = 3e-4;

#[derive(Deserialize)]
struct Golden {
    settings: Settings,
    runs: BTreeMap<String, Run>,
}

#[derive(Clone, Deserialize)]
struct Run {
    start: String,
    capacity: Option<f64>,
    bias_rate: Option<f32>,
    noise: f64,
    batches: Vec<Vec<Vec<u32>>>,
    steps: Vec<Step>,
}

fn golden() -> Golden {
    let path = folder("train").join("trajectories.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn folder(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.join("golden").join(name)
}

/// `[B, L + 1]` ids as inputs and the tokens that follow.
fn batch(rows: &[Vec<u32>]) -> Batch {
    let all = |skip: usize| {
        let rows = rows.iter();
        Arc::new(
            rows.flat_map(|r| r[skip..r.len() - 1 + skip].to_vec())
                .collect(),
        )
    };
    Batch {
        tokens: all(0),
        targets: all(1),
        seq_len: rows[0].len() - 1,
    }
}

/// Our steps of `run`, with another rule in the place of the checkpoint's where one is given.
fn train(run: &Run, s: Settings, rule: Option<&str>) -> Vec<Step> {
    let checkpoint = Checkpoint::open(&folder("cadre_moe").join(&run.start)).unwrap();
    let mut architecture = Architecture::of(checkpoint.config()).unwrap();
    if let Some(rule) = rule {
        let config = checkpoint.config().clone();
        let counts: Vec<usize> = config.moe.counts().collect();
        let options = RouterOptions::named(rule);
        architecture =
            Architecture::with_parts(config, &options, &counts, MoeParts::default()).unwrap();
    }
    for layer in &mut architecture.moe {
        let capacity = |factor| Capacity {
            factor,
            min: 0,
            rounding: Rounding::Ceil,
        };
        layer.capacity = run.capacity.map(|f| (capacity(f), Order::Position));
    }
    let mut model = export::import(&checkpoint, &Device::flex().autodiff()).unwrap();
    let mut biases = export::import_biases(&checkpoint).unwrap();
    let rule = run.bias_rate.map(|rate| BalanceBias {
        rate,
        until_step: None,
    });
    let mut optimizer = AdamW::new(AdamWConfig {
        beta1: s.betas[0],
        beta2: s.betas[1],
        eps: s.eps,
        weight_decay: s.weight_decay,
    });
    let mut steps = Vec::new();
    for (step, rows) in (1..).zip(&run.batches) {
        let pass = Pass {
            step,
            training: true,
            biases: &biases,
            ..Pass::default()
        };
        let losses = model.losses(&architecture, &batch(rows), &pass).unwrap();
        let loss = losses.cross_entropy.clone()
            + losses.balance.clone() * s.balance_coef
            + losses.z.clone() * s.z_coef;
        let mut gradients = loss.backward();
        let mut sum = GradientSum::default();
        sum.add(&model, &mut gradients, 1.0).unwrap();
        let grad_norm = sum.norm();
        let value = |x: Tensor<1>| f64::from(x.into_scalar::<f32>());
        steps.push(Step {
            loss: value(loss),
            ce: value(losses.cross_entropy),
            balance: value(losses.balance),
            z: value(losses.z),
            grad_norm,
        });
        let scale = (s.clip_norm / (grad_norm + 1e-6)).min(1.0);
        model = optimizer.step(model, sum, s.lr, scale);
        if let Some(rule) = rule {
            let loads: Vec<_> = losses.routed.iter().map(|r| r.loads.clone()).collect();
            rule.update(step, &mut biases, &loads);
        }
    }
    steps
}

fn close(what: &str, got: f64, want: f64, tolerance: f64) {
    let error = (got - want).abs() / want.abs();
    assert!(
        error <= tolerance,
        "{what}: got {got}, expected {want}: off by {error:.1e}"
    );
}

#[test]
fn twenty_steps_are_those_of_torch() {
    let golden = golden();
    assert!(golden.runs.len() >= 11);
    for (name, run) in &golden.runs {
        let ours = train(run, golden.settings, None);
        assert_eq!((ours.len(), run.steps.len()), (20, 20));
        assert!(run.noise * 4.0 < TOLERANCE, "{name}: torch itself moves");
        for (i, (got, want)) in ours.iter().zip(&run.steps).enumerate() {
            let what = |part: &str| format!("{name}, {part} of step {}", i + 1);
            for (part, got, want) in [
                ("loss", got.loss, want.loss),
                ("ce", got.ce, want.ce),
                ("balance", got.balance, want.balance),
                ("z", got.z, want.z),
            ] {
                close(&what(part), got, want, TOLERANCE);
            }
            let part = what("grad norm");
            close(&part, got.grad_norm, want.grad_norm, NORM_TOLERANCE);
        }
    }
}

/// Losses of the first, the tenth and the last step, by ourselves; for rules whose training draws at random, or that
/// the script does not have.
const OURS: [(&str, &str, [f64; 3]); 4] = [
    (
        "sparse_mixer",
        "sparse_mixer",
        [4.091541, 3.927463, 4.462678],
    ),
    (
        "dense_to_sparse",
        "dense_to_sparse_soft",
        [4.600486, 4.444636, 4.395998],
    ),
    ("expert_choice", "switch", [4.328226, 4.155783, 4.421114]),
    ("uniform", "uniform", [4.394471, 4.333694, 4.476664]),
];

#[test]
fn the_other_rules_train_as_recorded() {
    let golden = golden();
    let mut moved = Vec::new();
    for (rule, start, want) in OURS {
        let run = Run {
            start: start.to_owned(),
            capacity: None,
            bias_rate: None,
            ..golden.runs["top_p"].clone()
        };
        let other = (rule == "expert_choice").then_some(rule);
        let steps = train(&run, golden.settings, other);
        let got = [0, 9, 19].map(|i| steps[i].loss);
        let same = |(got, want): (&f64, &f64)| (got - want).abs() < 1e-4 * want;
        if !got.iter().zip(&want).all(same) {
            moved.push(format!("{rule}: {got:?}, recorded {want:?}"));
        }
    }
    assert!(moved.is_empty(), "{}", moved.join("\n"));
}

#[test]
fn every_rule_has_a_trajectory() {
    let golden = golden();
    let mut held: BTreeSet<String> = OURS.iter().map(|(rule, ..)| (*rule).to_owned()).collect();
    for run in golden.runs.values() {
        let checkpoint = Checkpoint::open(&folder("cadre_moe").join(&run.start)).unwrap();
        let architecture = Architecture::of(checkpoint.config()).unwrap();
        held.extend(architecture.moe.iter().map(|m| m.router.name().to_owned()));
    }
    let missing: Vec<&str> = names().filter(|name| !held.contains(*name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
