//! Losses and weight heads against the worked example in `golden/routing/section.json`.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{DType, Device, Tensor, TensorData};
use cadre_routing::{Loads, Policy, Routing, policies};
use cadre_train::{losses, weight_heads};
use serde::Deserialize;

/// The figures are printed to six digits after the point.
const TOLERANCE: f64 = 6e-7;
const N_EXPERTS: usize = 8;

#[derive(Deserialize)]
struct Golden {
    logits: Vec<Vec<f64>>,
    mean_probs: Vec<f64>,
    entropy: Vec<f64>,
    null_experts: NullCase,
    dense_to_sparse: GateCase,
    losses: Losses,
}

#[derive(Deserialize)]
struct NullCase {
    n_null: usize,
    top_k: usize,
    balance_null_averaged: f64,
    balance_plain: f64,
}

#[derive(Deserialize)]
struct GateCase {
    token: usize,
    noise: Vec<f64>,
    gates: Vec<Gate>,
}

#[derive(Deserialize)]
struct Gate {
    temperature: f64,
    y: Vec<f64>,
}

#[derive(Deserialize)]
struct Losses {
    z_loss: f64,
    balance_switch: f64,
    balance_top_2: f64,
    balance_top_2_legacy_scale: f64,
    sequence_v3_top_2: f64,
    symmetric_kl_tokens_0_1: f64,
    by_device: ByDevice,
    balance_switch_two_micro_batches: MicroBatches,
}

#[derive(Deserialize)]
struct MicroBatches {
    micro: f64,
    synced: f64,
    full: f64,
    buffered: f64,
}

#[derive(Deserialize)]
struct ByDevice {
    one_sequence: DeviceLosses,
    two_sequences: DeviceLosses,
}

#[derive(Deserialize)]
struct DeviceLosses {
    sequence: f64,
    device: f64,
    communication: f64,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../../golden/routing/section.json")).unwrap()
}

/// Rows as a tensor in f64: the figures were worked out in double precision.
fn tensor(rows: &[Vec<f64>]) -> Tensor<2> {
    let data = TensorData::new(rows.concat(), [rows.len(), rows[0].len()]);
    Tensor::from_data(data, (&Device::flex(), DType::F64))
}

fn routing(rows: &[Vec<f64>], policy: &dyn Policy) -> Routing {
    let logits: Vec<f32> = rows.concat().iter().map(|&l| l as f32).collect();
    let mut routing = Routing::new();
    policy.route(&logits, &mut routing).unwrap();
    routing
}

fn loads(rows: &[Vec<f64>], policy: &dyn Policy) -> Loads {
    let routing = routing(rows, policy);
    let mut loads = Loads::new(policy.n_experts());
    loads.add_routing(&routing).unwrap();
    loads
}

fn switch() -> policies::Switch {
    policies::Switch::new(N_EXPERTS).unwrap()
}

#[track_caller]
fn assert_value(found: Tensor<1>, expected: f64) {
    let found: f64 = found.into_scalar();
    assert!(
        (found - expected).abs() < TOLERANCE,
        "{found} is not {expected}"
    );
}

#[track_caller]
fn assert_close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() < TOLERANCE, "{found:?} is not {expected:?}");
    }
}

#[test]
fn mean_probs_and_entropy() {
    let golden = golden();
    let mean = softmax(tensor(&golden.logits), 1)
        .mean_dim(0)
        .try_into_vec_as::<f64>()
        .unwrap();
    assert_close(&mean, &golden.mean_probs);
    for (row, &expected) in golden.logits.iter().zip(&golden.entropy) {
        assert_value(losses::entropy(tensor(std::slice::from_ref(row))), expected);
    }
}

#[test]
fn balance_and_z_loss() {
    let golden = golden();
    let probs = || softmax(tensor(&golden.logits), 1);
    let expected = &golden.losses;
    let top_1 = loads(&golden.logits, &switch());
    assert_value(
        losses::load_balance(probs(), &top_1, false),
        expected.balance_switch,
    );
    let top_2 = loads(
        &golden.logits,
        &policies::TopK::new(N_EXPERTS, 2, true).unwrap(),
    );
    assert_value(
        losses::load_balance(probs(), &top_2, false),
        expected.balance_top_2,
    );
    assert_value(
        losses::load_balance(probs(), &top_2, true),
        expected.balance_top_2_legacy_scale,
    );
    assert_value(losses::z_loss(tensor(&golden.logits)), expected.z_loss);
}

#[test]
fn balance_with_null_experts() {
    let golden = golden();
    let case = &golden.null_experts;
    let policy = policies::NullExperts::new(N_EXPERTS, case.n_null, case.top_k).unwrap();
    let loads = loads(&golden.logits, &policy);
    let probs = || softmax(tensor(&golden.logits), 1);
    let pooled = losses::null_load_balance(probs(), &loads, policy.n_real_experts(), true);
    assert_value(pooled, case.balance_null_averaged);
    assert_value(
        losses::load_balance(probs(), &loads, true),
        case.balance_plain,
    );
}

#[test]
fn balance_over_two_micro_batches() {
    let golden = golden();
    let expected = &golden.losses.balance_switch_two_micro_batches;
    let parts = [&golden.logits[..3], &golden.logits[3..]];
    let part_loads = parts.map(|part| loads(part, &switch()));
    let mut all = part_loads[0].clone();
    all.merge(&part_loads[1]).unwrap();
    let mean = |with: [&Loads; 2]| {
        let value = |i: usize| losses::load_balance(softmax(tensor(parts[i]), 1), with[i], false);
        (value(0) + value(1)).div_scalar(2.0)
    };
    assert_value(mean([&part_loads[0], &part_loads[1]]), expected.micro);
    assert_value(mean([&all, &all]), expected.synced);
    assert_value(
        losses::load_balance(softmax(tensor(&golden.logits), 1), &all, false),
        expected.full,
    );
    // A buffer has seen only the first part when the first loss is taken.
    assert_value(mean([&part_loads[0], &all]), expected.buffered);
}

#[test]
fn sequence_loss_and_symmetric_kl() {
    let golden = golden();
    // Sigmoid keeps the order of the logits, so plain top-2 makes the unbiased picks.
    let policy = policies::TopK::new(N_EXPERTS, 2, true).unwrap();
    let scores = sigmoid(tensor(&golden.logits));
    let probs = scores.clone() / scores.sum_dim(1);
    assert_value(
        losses::sequence_balance(probs, &routing(&golden.logits, &policy), 1),
        golden.losses.sequence_v3_top_2,
    );
    let kl = losses::symmetric_kl(tensor(&golden.logits[..1]), tensor(&golden.logits[1..2]));
    assert_value(kl, golden.losses.symmetric_kl_tokens_0_1);
}

#[test]
fn losses_by_device() {
    let golden = golden();
    let policy = policies::GroupLimited::new(
        policies::GroupLimitedOptions {
            n_experts: N_EXPERTS,
            top_k: 2,
            n_groups: 4,
            keep_groups: 2,
            score: policies::ScoreFn::Softmax,
            group_score: policies::GroupScore::Max,
            norm_topk_prob: false,
            scale: 16.0,
        },
        None,
    )
    .unwrap();
    let picks = routing(&golden.logits, &policy);
    let probs = || softmax(tensor(&golden.logits), 1);
    let by_device = &golden.losses.by_device;
    for (n, expected) in [(1, &by_device.one_sequence), (2, &by_device.two_sequences)] {
        assert_value(
            losses::sequence_balance(probs(), &picks, n),
            expected.sequence,
        );
        assert_value(
            losses::device_balance(probs(), &picks, n, 4),
            expected.device,
        );
        let communication = losses::communication_balance(probs(), &picks, n, [4, 2]);
        assert_value(communication, expected.communication);
    }
}

#[test]
fn dense_to_sparse_gate_values() {
    let golden = golden();
    let case = &golden.dense_to_sparse;
    let logits = tensor(&golden.logits[case.token..=case.token]);
    let all: Vec<u16> = (0..N_EXPERTS as u16).collect();
    for gate in &case.gates {
        let noise = tensor(std::slice::from_ref(&case.noise));
        let mut routing = Routing::new();
        routing.push_token(&all, &[1.0; N_EXPERTS]);
        let picks = weight_heads::Picks::of(&routing, N_EXPERTS, &logits);
        let y = weight_heads::tempered_softmax(logits.clone(), noise, &picks, gate.temperature);
        assert_close(&y.try_into_vec_as::<f64>().unwrap(), &gate.y);
    }
}
