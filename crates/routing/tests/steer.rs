//! Steering on every policy: empty it is the policy itself, masked experts might as well not be there, forced ones are
//! picked, biases move the choice and no weight.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use cadre_routing::policies::{GroupScore, ScoreFn, TopK};
use cadre_routing::registry::{self, PolicyOptions};
use cadre_routing::steer::{Layers, SteerScratch};
use cadre_routing::{Policy, Reach, Routing, Steering};
use proptest::prelude::*;

const N: usize = 8;

fn options(n_experts: usize) -> PolicyOptions {
    PolicyOptions {
        n_experts,
        top_k: 2,
        ..PolicyOptions::default()
    }
}

/// Every policy that can be steered, several with more than one set of options.
fn policies(n_experts: usize) -> Vec<Box<dyn Policy>> {
    let build = |name, options: &PolicyOptions| registry::build(name, options).unwrap();
    let plain = options(n_experts);
    let mut all: Vec<Box<dyn Policy>> = registry::names().map(|name| build(name, &plain)).collect();
    all.push(build(
        "top_k",
        &PolicyOptions {
            norm_topk_prob: false,
            ..plain.clone()
        },
    ));
    all.push(build("group_limited", &sigmoid(n_experts)));
    all.retain(|policy| policy.stages().is_some());
    assert_eq!(
        all.len(),
        registry::names().count() + 1,
        "all but expert choice"
    );
    all
}

/// DeepSeek-V3's, in one group.
fn sigmoid(n_experts: usize) -> PolicyOptions {
    PolicyOptions {
        score: ScoreFn::Sigmoid,
        group_score: GroupScore::SumOfBestTwo,
        scale: 2.5,
        ..options(n_experts)
    }
}

/// Four groups of two experts, of which two stay, with a correction.
fn grouped() -> Box<dyn Policy> {
    let options = PolicyOptions {
        n_groups: 4,
        keep_groups: 2,
        bias: Some(vec![0.1, -0.2, 0.0, 0.3, 0.0, 0.05, -0.1, 0.2]),
        ..sigmoid(N)
    };
    registry::build("group_limited", &options).unwrap()
}

fn natural(policy: &dyn Policy, logits: &[f32]) -> Routing {
    let mut routing = Routing::new();
    policy.route(logits, &mut routing).unwrap();
    routing
}

fn steered(policy: &dyn Policy, steering: &Steering, logits: &[f32]) -> Routing {
    let prepared = steering.prepare(&[(0, policy)]).unwrap().unwrap();
    let mut routing = Routing::new();
    let (layer, mut scratch) = (prepared.layer(0).unwrap(), SteerScratch::default());
    layer.route(policy.stages().unwrap(), logits, &mut routing, &mut scratch);
    assert!(
        routing
            .iter()
            .all(|(ids, _)| ids.len() <= layer.max_picks())
    );
    routing
}

/// Takes the long way and changes nothing.
fn neutral() -> Steering {
    Steering {
        min_weight: Some(0.0),
        ..Steering::default()
    }
}

fn masking(masked: impl IntoIterator<Item = u16>) -> Steering {
    let mut steering = neutral();
    steering.mask.add(Layers::All, masked);
    steering
}

fn forcing(forced: impl IntoIterator<Item = u16>) -> Steering {
    let mut steering = Steering::default();
    steering.force.add(Layers::All, forced);
    steering
}

/// Logits with many ties, or hardly any.
fn logits(n: usize) -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![
        prop::collection::vec((-4i8..4).prop_map(f32::from), n),
        prop::collection::vec(-6f32..6.0, n),
    ]
}

proptest! {
    #[test]
    fn the_stages_of_a_policy_are_the_policy(logits in logits(5 * N)) {
        let mut all = policies(N);
        all.push(grouped());
        for policy in &all {
            prop_assert_eq!(
                steered(&**policy, &neutral(), &logits), natural(&**policy, &logits), "{}", policy.name()
            );
        }
    }

    #[test]
    fn a_masked_expert_might_as_well_not_be_there(
        logits in logits(3 * N), left in prop::sample::subsequence((0..N as u16).collect::<Vec<_>>(), 3..N),
    ) {
        let small: Vec<f32> = logits
            .chunks(N)
            .flat_map(|row| left.iter().map(|id| row[usize::from(*id)]))
            .collect();
        let steering = masking((0..N as u16).filter(|id| !left.contains(id)));
        for (policy, smaller) in policies(N).iter().zip(policies(left.len())) {
            let mut expected = Routing::new();
            for (ids, weights) in natural(&*smaller, &small).iter() {
                let ids: Vec<u16> = ids.iter().map(|id| left[usize::from(*id)]).collect();
                expected.push_token(&ids, weights);
            }
            prop_assert_eq!(steered(&**policy, &steering, &logits), expected, "{}", policy.name());
        }
    }

    #[test]
    fn what_is_forced_is_picked_and_what_is_picked_anyway_changes_nothing(
        logits in logits(4 * N), forced in 0..N as u16,
    ) {
        let mut all = policies(N);
        all.push(grouped());
        for policy in &all {
            let plain = natural(&**policy, &logits);
            let steered = steered(&**policy, &forcing([forced]), &logits);
            let is_fixed = matches!(policy.stages().unwrap().reach(), Reach::Fixed(_));
            for ((was, was_weights), (is, weights)) in plain.iter().zip(steered.iter()) {
                prop_assert!(is.contains(&forced), "{}", policy.name());
                if was.contains(&forced) {
                    prop_assert_eq!((was, was_weights), (is, weights), "{}", policy.name());
                }
                prop_assert_eq!(is.len() == was.len(), is_fixed || was.contains(&forced));
            }
        }
    }

    #[test]
    fn a_bias_moves_the_choice_and_not_the_weights(logits in logits(4 * N), expert in 0..N as u16) {
        let policy = TopK::new(N, 3, false).unwrap();
        let mut steering = Steering::default();
        steering.bias.add(Layers::All, expert, 1e4);
        let (biased, forced) = (
            steered(&policy, &steering, &logits),
            steered(&policy, &forcing([expert]), &logits),
        );
        for ((ids, weights), (same, as_forced)) in biased.iter().zip(forced.iter()) {
            prop_assert_eq!(ids[0], expert);
            let mut pairs: Vec<_> = ids.iter().zip(weights).collect();
            let mut expected: Vec<_> = same.iter().zip(as_forced).collect();
            pairs.sort_by_key(|pair| pair.0);
            expected.sort_by_key(|pair| pair.0);
            prop_assert_eq!(pairs, expected);
        }
    }

    #[test]
    fn tokens_do_not_touch_each_other(logits in logits(6 * N)) {
        let mut steering = Steering { top_p: Some(0.5), ..forcing([1]) };
        steering.mask.add(Layers::All, [4, 6]);
        steering.gain.add(Layers::All, 2, 0.5);
        let policy = TopK::new(N, 3, true).unwrap();
        let together = steered(&policy, &steering, &logits);
        for (t, row) in logits.chunks(N).enumerate() {
            let alone = steered(&policy, &steering, row);
            prop_assert_eq!(alone.token(0), together.token(t));
        }
    }

    #[test]
    fn the_first_ranks_are_the_usual_picks(logits in logits(3 * N)) {
        let ranks = |ranks: &[usize]| Steering { ranks: Some(ranks.to_vec()), ..Steering::default() };
        let policy = TopK::new(N, 2, true).unwrap();
        prop_assert_eq!(steered(&policy, &ranks(&[1, 2]), &logits), natural(&policy, &logits));
        let sorted = natural(&TopK::new(N, N, true).unwrap(), &logits);
        let fifth = steered(&policy, &ranks(&[5]), &logits);
        for ((ids, weights), (order, _)) in fifth.iter().zip(sorted.iter()) {
            prop_assert_eq!((ids, weights), (&order[4..5], &[1.0][..]));
        }
    }
}

/// softmax of these is 8/16, 4/16, 2/16, 2/16.
fn halves() -> [f32; 4] {
    let ln2 = std::f32::consts::LN_2;
    [3.0 * ln2, 2.0 * ln2, ln2, ln2]
}

fn token(policy: &dyn Policy, json: &str) -> (Vec<u16>, Vec<f32>) {
    let routing = steered(policy, &serde_json::from_str(json).unwrap(), &halves());
    let (ids, weights) = routing.token(0);
    // Exact up to rounding, which these tests are not about.
    let rounded = weights.iter().map(|w| (w * 1e4).round() / 1e4);
    (ids.to_vec(), rounded.collect())
}

#[test]
fn the_number_of_picks_is_chosen_or_follows_from_the_scores() {
    let policy = TopK::new(4, 2, false).unwrap();
    assert_eq!(
        token(&policy, r#"{"top_k":3}"#),
        (vec![0, 1, 2], vec![0.5, 0.25, 0.125])
    );
    // More than 0.4 is the first alone; more than 0.6 takes two; the policy takes two at most.
    assert_eq!(token(&policy, r#"{"top_p":0.4}"#).0, [0]);
    assert_eq!(token(&policy, r#"{"top_p":0.6}"#).0, [0, 1]);
    assert_eq!(token(&policy, r#"{"top_p":0.8}"#).0, [0, 1]);
    assert_eq!(token(&policy, r#"{"top_p":0.8,"top_k":4}"#).0, [0, 1, 2]);
    assert_eq!(token(&policy, r#"{"min_weight":0.49,"top_k":4}"#).0, [0, 1]);
    assert_eq!(token(&policy, r#"{"min_weight":0.6,"top_k":4}"#).0, [0]);
    assert_eq!(
        token(&policy, r#"{"min_weight":0.6,"min_experts":3,"top_k":4}"#).0,
        [0, 1, 2]
    );
    let forced = r#"{"min_weight":0.6,"top_k":4,"force":{"*":[3]}}"#;
    assert_eq!(token(&policy, forced).0, [0, 3]);
    let normed = TopK::new(4, 3, true).unwrap();
    let (ids, weights) = token(&normed, r#"{"min_weight":0.49}"#);
    assert_eq!(
        (ids, weights),
        (vec![0, 1], vec![0.6667, 0.3333]),
        "weighed anew"
    );
}

#[test]
fn muted_picks_leave_their_weight_to_the_others() {
    let raw = TopK::new(4, 2, false).unwrap();
    assert_eq!(token(&raw, r#"{"mute":{"*":[0]}}"#), (vec![1], vec![0.75]));
    assert_eq!(
        token(&raw, r#"{"mute":{"*":[3]}}"#),
        (vec![0, 1], vec![0.5, 0.25])
    );
    assert_eq!(token(&raw, r#"{"mute":{"*":[0,1]}}"#), (vec![], vec![]));
    assert_eq!(
        token(&raw, r#"{"mask":{"*":[0]}}"#),
        (vec![1, 2], vec![0.5, 0.25])
    );
}

#[test]
fn damped_picks_leave_a_part_of_their_weight_to_the_others() {
    let raw = TopK::new(4, 2, false).unwrap();
    // Half of 0.5 stays, which is as much as the other has; together they weigh 0.75 as before.
    assert_eq!(
        token(&raw, r#"{"damp":{"*":{"0":0.5}}}"#),
        (vec![0, 1], vec![0.375, 0.375])
    );
    assert_eq!(
        token(&raw, r#"{"damp":{"*":{"0":0,"3":1}}}"#),
        (vec![0, 1], vec![0.5, 0.25])
    );
    for (damp, mute) in [
        (r#"{"damp":{"*":{"0":1}}}"#, r#"{"mute":{"*":[0]}}"#),
        (r#"{"damp":{"*":{"0":1,"1":1}}}"#, r#"{"mute":{"*":[0,1]}}"#),
    ] {
        assert_eq!(token(&raw, damp), token(&raw, mute));
    }
}

#[test]
fn gains_multiply_what_is_picked() {
    let raw = TopK::new(4, 2, false).unwrap();
    assert_eq!(
        token(&raw, r#"{"gain":{"*":{"1":2,"3":9}}}"#),
        (vec![0, 1], vec![0.5, 0.5])
    );
    assert_eq!(
        token(&raw, r#"{"gain":{"*":{"0":0}}}"#),
        (vec![1], vec![0.25])
    );
}

#[test]
fn forced_picks_come_from_losing_groups_too_and_masks_fill_up_from_them() {
    // Groups of two: the first and second stay.
    let logits = [3.0, 2.9, 2.0, 2.1, -1.0, -2.0, -3.0, -2.5];
    let policy = grouped();
    assert_eq!(natural(&*policy, &logits).experts(), [3, 0]);
    assert_eq!(steered(&*policy, &forcing([7]), &logits).experts(), [3, 7]);
    let three = Steering {
        top_k: Some(3),
        ..masking([1, 2, 4, 6, 7])
    };
    let rest = steered(&*policy, &three, &logits);
    assert_eq!(
        rest.experts(),
        [3, 0, 5],
        "5 is the best outside of the groups that stay"
    );
    assert!((rest.weights().iter().sum::<f32>() - 2.5).abs() < 1e-5);
}
