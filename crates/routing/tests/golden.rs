//! Every policy, the capacity filter and the load metrics against the worked example in `golden/routing/section.json`.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use cadre_routing::filters::{self, Capacity, DropOrder, Rounding};
use cadre_routing::policies::{
    DenseToSparse, ExpertChoice, GroupLimited, GroupLimitedOptions, GroupScore, NullExperts,
    ScoreFn, Stage, Switch, Top2, TopK, TopP, update_bias,
};
use cadre_routing::{Loads, Policy, Routing};
use serde::Deserialize;

/// The figures are printed to six digits; f32 adds about one more unit of the last digit.
const TOLERANCE: f32 = 1e-6;
const N_EXPERTS: usize = 8;

#[derive(Deserialize)]
struct Golden {
    logits: Vec<Vec<f32>>,
    entropy: Vec<f32>,
    probs_of_token_0: Vec<f32>,
    switch: SwitchPicks,
    capacity: CapacityCase,
    top_2_renormalised: Vec<Picks>,
    expert_choice: ExpertChoiceCase,
    null_experts: NullCase,
    top_p: Vec<TopPCase>,
    group_limited_v2: GroupCase,
    group_limited_v3: GroupCase,
    dense_to_sparse: GateCase,
}

#[derive(Deserialize)]
struct Picks {
    token: usize,
    #[serde(default)]
    groups: Vec<u16>,
    experts: Vec<u16>,
    weights: Vec<f32>,
}

#[derive(Deserialize)]
struct SwitchPicks {
    experts: Vec<u16>,
    weights: Vec<f32>,
}

#[derive(Deserialize)]
struct CapacityCase {
    factor: f64,
    min: usize,
    slots: usize,
    kept: Vec<bool>,
}

#[derive(Deserialize)]
struct ExpertChoiceCase {
    capacity_factor: f32,
    tokens_per_expert: usize,
    token_of_expert: Vec<usize>,
}

#[derive(Deserialize)]
struct NullCase {
    n_null: usize,
    top_k: usize,
    picks: Vec<Picks>,
    mean_real_experts: f32,
}

#[derive(Deserialize)]
struct TopPCase {
    top_p: f32,
    experts: Vec<Vec<u16>>,
    mean_experts: f64,
}

#[derive(Deserialize)]
struct GroupCase {
    n_groups: usize,
    keep_groups: usize,
    top_k: usize,
    scale: f32,
    bias: Option<Vec<f32>>,
    picks: Vec<Picks>,
    #[serde(default)]
    counts: Vec<u64>,
    #[serde(default)]
    bias_update_rate: f32,
    #[serde(default)]
    bias_after_update: Vec<f32>,
}

#[derive(Deserialize)]
struct GateCase {
    token: usize,
    noise: Vec<f32>,
    threshold: f32,
    gates: Vec<Gate>,
}

#[derive(Deserialize)]
struct Gate {
    temperature: f32,
    y: Vec<f32>,
    chosen: Vec<u16>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../../golden/routing/section.json")).unwrap()
}

fn route(golden: &Golden, policy: &dyn Policy) -> Routing {
    let mut routing = Routing::new();
    policy.route(&golden.logits.concat(), &mut routing).unwrap();
    routing
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!(
            (a - b).abs() <= TOLERANCE * (1.0 + b.abs()),
            "{found:?} is not {expected:?}"
        );
    }
}

#[track_caller]
fn assert_picks(routing: &Routing, picks: &[Picks]) {
    for pick in picks {
        let (ids, weights) = routing.token(pick.token);
        assert_eq!(ids, pick.experts, "token {}", pick.token);
        assert_close(weights, &pick.weights);
    }
}

#[test]
fn softmax_of_token_0() {
    let golden = golden();
    let routing = route(&golden, &TopK::new(N_EXPERTS, N_EXPERTS, false).unwrap());
    let mut probs = vec![0.0; N_EXPERTS];
    let (ids, weights) = routing.token(0);
    ids.iter()
        .zip(weights)
        .for_each(|(&id, &w)| probs[usize::from(id)] = w);
    assert_close(&probs, &golden.probs_of_token_0);
}

#[test]
fn entropy() {
    let golden = golden();
    for (row, expected) in golden.logits.iter().zip(&golden.entropy) {
        let mut loads = Loads::new(N_EXPERTS);
        loads.add_logits(row).unwrap();
        loads.add_ids(&[0], 1).unwrap();
        assert_close(
            &[loads.summary().unwrap().mean_entropy.unwrap() as f32],
            &[*expected],
        );
    }
}

#[test]
fn switch_and_capacity_in_position_order() {
    let golden = golden();
    let routing = route(&golden, &Switch::new(N_EXPERTS).unwrap());
    assert_eq!(routing.experts(), golden.switch.experts);
    assert_close(routing.weights(), &golden.switch.weights);

    let case = &golden.capacity;
    let capacity = Capacity {
        factor: case.factor,
        min: case.min,
        rounding: Rounding::Ceil,
    };
    let slots = capacity.slots(routing.n_pairs(), N_EXPERTS);
    assert_eq!(slots, case.slots);
    let mut kept = Routing::new();
    let n_dropped = filters::limit(
        &routing,
        &[slots; N_EXPERTS],
        DropOrder::Position,
        &mut kept,
    );
    assert_eq!(
        kept.iter()
            .map(|(ids, _)| !ids.is_empty())
            .collect::<Vec<_>>(),
        case.kept
    );
    assert_eq!(n_dropped, 2);
}

#[test]
fn top_2_renormalised() {
    let golden = golden();
    assert_picks(
        &route(&golden, &TopK::new(N_EXPERTS, 2, true).unwrap()),
        &golden.top_2_renormalised,
    );
    assert_picks(
        &route(&golden, &Top2::new(N_EXPERTS).unwrap()),
        &golden.top_2_renormalised,
    );
}

#[test]
fn expert_choice() {
    let golden = golden();
    let case = &golden.expert_choice;
    let policy = ExpertChoice::new(N_EXPERTS, case.capacity_factor).unwrap();
    assert_eq!(
        policy.tokens_per_expert(golden.logits.len()),
        case.tokens_per_expert
    );
    let routing = route(&golden, &policy);
    let mut tokens = vec![Vec::new(); N_EXPERTS];
    for (t, (ids, _)) in routing.iter().enumerate() {
        ids.iter().for_each(|&id| tokens[usize::from(id)].push(t));
    }
    assert_eq!(
        tokens,
        case.token_of_expert
            .iter()
            .map(|&t| vec![t])
            .collect::<Vec<_>>()
    );
}

#[test]
fn null_experts() {
    let golden = golden();
    let case = &golden.null_experts;
    let policy = NullExperts::new(N_EXPERTS, case.n_null, case.top_k).unwrap();
    let routing = route(&golden, &policy);
    assert_picks(&routing, &case.picks);
    let n_real = routing
        .experts()
        .iter()
        .filter(|&&id| usize::from(id) < policy.n_real_experts())
        .count();
    assert_close(
        &[n_real as f32 / routing.n_tokens() as f32],
        &[case.mean_real_experts],
    );
}

#[test]
fn top_p() {
    let golden = golden();
    for case in &golden.top_p {
        let routing = route(&golden, &TopP::new(N_EXPERTS, case.top_p).unwrap());
        assert_eq!(
            routing
                .iter()
                .map(|(ids, _)| ids.to_vec())
                .collect::<Vec<_>>(),
            case.experts
        );
        let mut loads = Loads::new(N_EXPERTS);
        loads.add_routing(&routing).unwrap();
        assert!((loads.summary().unwrap().mean_picks - case.mean_experts).abs() < 1e-6);
    }
}

fn group_limited(case: &GroupCase, score: ScoreFn, group_score: GroupScore) -> GroupLimited {
    let options = GroupLimitedOptions {
        n_experts: N_EXPERTS,
        top_k: case.top_k,
        n_groups: case.n_groups,
        keep_groups: case.keep_groups,
        score,
        group_score,
        norm_topk_prob: score == ScoreFn::Sigmoid,
        scale: case.scale,
    };
    GroupLimited::new(options, case.bias.clone()).unwrap()
}

fn assert_groups(routing: &Routing, case: &GroupCase) {
    let size = (N_EXPERTS / case.n_groups) as u16;
    for pick in &case.picks {
        assert!(
            routing
                .token(pick.token)
                .0
                .iter()
                .all(|id| pick.groups.contains(&(id / size)))
        );
    }
}

#[test]
fn group_limited_of_v2() {
    let golden = golden();
    let case = &golden.group_limited_v2;
    let routing = route(
        &golden,
        &group_limited(case, ScoreFn::Softmax, GroupScore::Max),
    );
    assert_picks(&routing, &case.picks);
    assert_groups(&routing, case);
}

#[test]
fn group_limited_of_v3_with_one_bias_update() {
    let golden = golden();
    let case = &golden.group_limited_v3;
    let routing = route(
        &golden,
        &group_limited(case, ScoreFn::Sigmoid, GroupScore::SumOfBestTwo),
    );
    assert_picks(&routing, &case.picks);
    assert_groups(&routing, case);

    let mut loads = Loads::new(N_EXPERTS);
    loads.add_routing(&routing).unwrap();
    assert_eq!(loads.counts(), case.counts);
    let mut bias = case.bias.clone().unwrap();
    update_bias(&mut bias, loads.counts(), case.bias_update_rate);
    assert_close(&bias, &case.bias_after_update);
}

#[test]
fn dense_to_sparse_with_given_noise() {
    let golden = golden();
    let case = &golden.dense_to_sparse;
    for gate in &case.gates {
        let policy =
            DenseToSparse::new(N_EXPERTS, gate.temperature, case.threshold, Stage::Soft).unwrap();
        let mut routing = Routing::new();
        policy
            .route_with_noise(&golden.logits[case.token], &case.noise, &mut routing)
            .unwrap();
        let (ids, weights) = routing.token(0);
        let mut chosen = ids.to_vec();
        chosen.sort_unstable();
        assert_eq!(chosen, gate.chosen);
        let expected: Vec<f32> = ids.iter().map(|&id| gate.y[usize::from(id)]).collect();
        assert_close(weights, &expected);
    }
}
