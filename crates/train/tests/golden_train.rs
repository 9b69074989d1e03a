//! Five training steps of a tiny model against the same steps by PyTorch and transformers (`golden/train/`, made by
//! `golden/make/train_parity.py`): losses, gradient norms, first gradients and final weights.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod golden_steps;

use burn::tensor::Device;
use cadre_checkpoint::Checkpoint;
use cadre_train::architecture::Architecture;
use cadre_train::export;
use cadre_train::lm::{Batch, LanguageModel, Pass};
use cadre_train::optimizer::{AdamW, AdamWConfig, GradientSum};
use cadre_train::params;
use cadre_train::routers::RouterOptions;
use golden_steps::{Settings, Step};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Relative to the value. Another order of summation moves the reference itself by 1.4e-7 (MANIFEST.json, `noise`).
const LOSS_TOLERANCE: f64 = 3e-6;
/// Relative to the largest value of the tensor; the reference moves by 1.6e-6.
const GRADIENT_TOLERANCE: f64 = 1e-5;
/// Relative to the largest value of the tensor. The reference moves by 9.2e-7; where a gradient is nearly zero AdamW
/// makes a full step of it, of either sign.
const WEIGHT_TOLERANCE: f64 = 1e-5;

#[derive(Deserialize)]
struct Golden {
    start: String,
    settings: Settings,
    batches: Vec<Vec<Vec<u32>>>,
    steps: Vec<Step>,
    grad_l2: BTreeMap<String, f64>,
}

/// What one trajectory of ours produced.
struct Ours {
    steps: Vec<Step>,
    first_gradients: BTreeMap<String, Vec<f32>>,
    weights: BTreeMap<String, Vec<f32>>,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// `[B, L + 1]` ids as inputs and the tokens that follow.
fn batch(rows: &[Vec<u32>]) -> Batch {
    let of =
        |part: &dyn Fn(&[u32]) -> Vec<u32>| Arc::new(rows.iter().flat_map(|r| part(r)).collect());
    Batch {
        tokens: of(&|r| r[..r.len() - 1].to_vec()),
        targets: of(&|r| r[1..].to_vec()),
        seq_len: rows[0].len() - 1,
    }
}

/// The model's values under checkpoint names.
fn by_name(model: &LanguageModel) -> BTreeMap<String, Vec<f32>> {
    let tensors = export::tensors(model, &[]).into_iter();
    tensors.map(|t| (t.name, t.values.into_owned())).collect()
}

/// The gradients under checkpoint names: those of a model whose parameters they are.
fn gradients_by_name(model: &LanguageModel, sum: &GradientSum) -> BTreeMap<String, Vec<f32>> {
    let gradients = params::replace(model.clone(), |path, _| {
        sum.get(path)
            .map(<[f32]>::to_vec)
            .ok_or_else(|| format!("{path} has no gradient"))
    });
    by_name(&gradients.unwrap())
}

fn train(golden: &Golden) -> Ours {
    let checkpoint = Checkpoint::open(&root().join(&golden.start)).unwrap();
    let config = checkpoint.config().clone();
    let architecture = Architecture::new(config, &RouterOptions::default()).unwrap();
    let mut model = export::import(&checkpoint, &Device::flex().autodiff()).unwrap();
    let s = &golden.settings;
    let mut optimizer = AdamW::new(AdamWConfig {
        beta1: s.betas[0],
        beta2: s.betas[1],
        eps: s.eps,
        weight_decay: s.weight_decay,
    });
    let mut steps = Vec::new();
    let mut first_gradients = None;
    for rows in &golden.batches {
        let losses = model
            .losses(&architecture, &batch(rows), &Pass::default())
            .unwrap();
        let loss = losses.cross_entropy.clone()
            + losses.balance.clone() * s.balance_coef
            + losses.z.clone() * s.z_coef;
        let mut gradients = loss.backward();
        let mut sum = GradientSum::default();
        sum.add(&model, &mut gradients, 1.0).unwrap();
        let grad_norm = sum.norm();
        let value = |x: burn::tensor::Tensor<1>| f64::from(x.into_scalar::<f32>());
        steps.push(Step {
            loss: value(loss),
            ce: value(losses.cross_entropy),
            balance: value(losses.balance),
            z: value(losses.z),
            grad_norm,
        });
        first_gradients.get_or_insert_with(|| gradients_by_name(&model, &sum));
        let scale = (s.clip_norm / (grad_norm + 1e-6)).min(1.0);
        model = optimizer.step(model, sum, s.lr, scale);
    }
    Ours {
        steps,
        first_gradients: first_gradients.unwrap(),
        weights: by_name(&model),
    }
}

fn close(what: &str, got: f64, want: f64, tolerance: f64) {
    let error = (got - want).abs() / want.abs();
    assert!(
        error <= tolerance,
        "{what}: got {got}, expected {want}: off by {error:.1e}"
    );
}

/// Holds every tensor of `golden` whose name starts with `prefix`; returns how many there were.
fn close_tensors(
    prefix: &str,
    ours: &BTreeMap<String, Vec<f32>>,
    golden: &SafeTensors<'_>,
    tolerance: f64,
) -> usize {
    let mut n = 0;
    for (name, view) in golden.tensors() {
        let Some(tensor) = name.strip_prefix(prefix) else {
            continue;
        };
        let want: Vec<f32> = view
            .data()
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let got = &ours[tensor];
        assert_eq!(got.len(), want.len(), "{name}");
        let largest = want.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let error = f64::from((got - want).abs() / largest);
            assert!(
                error <= tolerance,
                "{name}[{i}]: got {got}, expected {want}: off by {error:.1e}"
            );
        }
        n += 1;
    }
    n
}

fn hold(name: &str) {
    let folder = root().join("golden/train");
    let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    let bytes = std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();

    let ours = train(&golden);
    assert_eq!(ours.steps.len(), golden.steps.len());
    for (i, (got, want)) in ours.steps.iter().zip(&golden.steps).enumerate() {
        close(
            &format!("{name} step {i} loss"),
            got.loss,
            want.loss,
            LOSS_TOLERANCE,
        );
        close(
            &format!("{name} step {i} ce"),
            got.ce,
            want.ce,
            LOSS_TOLERANCE,
        );
        close(
            &format!("{name} step {i} balance"),
            got.balance,
            want.balance,
            LOSS_TOLERANCE,
        );
        close(&format!("{name} step {i} z"), got.z, want.z, LOSS_TOLERANCE);
        close(
            &format!("{name} step {i} grad norm"),
            got.grad_norm,
            want.grad_norm,
            GRADIENT_TOLERANCE,
        );
    }
    let names = |map: &BTreeMap<String, Vec<f32>>| map.keys().cloned().collect::<Vec<String>>();
    assert_eq!(
        names(&ours.first_gradients),
        golden.grad_l2.keys().cloned().collect::<Vec<String>>()
    );
    for (tensor, want) in &golden.grad_l2 {
        let squares = ours.first_gradients[tensor]
            .iter()
            .map(|&g| f64::from(g).powi(2));
        close(
            &format!("{name} gradient of {tensor}"),
            squares.sum::<f64>().sqrt(),
            *want,
            GRADIENT_TOLERANCE,
        );
    }
    let n_gradients = close_tensors("grad.", &ours.first_gradients, &tensors, GRADIENT_TOLERANCE);
    let n_weights = close_tensors("after.", &ours.weights, &tensors, WEIGHT_TOLERANCE);
    assert_eq!(n_gradients + n_weights, tensors.len());
    assert!(n_gradients >= 16, "{n_gradients} tensors compared");
}

#[test]
fn tied_embeddings_and_renormalised_weights() {
    hold("qwen3_moe_tiny");
}

#[test]
fn own_head_and_raw_softmax_weights() {
    hold("qwen3_moe_tiny_raw");
}

#[test]
fn a_trajectory_does_not_depend_on_the_number_of_threads() {
    let text = std::fs::read_to_string(root().join("golden/train/qwen3_moe_tiny.json")).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    let weights = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .build()
            .unwrap();
        pool.install(|| train(&golden).weights)
    };
    assert!(
        weights(1) == weights(2),
        "two threads give other bits than one"
    );
}
