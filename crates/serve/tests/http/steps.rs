//! Steps of some of those that generate: fewer experts, the same answers, and nobody is left behind.

use std::io::Write;
use std::time::Duration;

use cadre_checkpoint::Checkpoint;
use cadre_serve::{StepOptions, StepOrder};
use cadre_testkit::TinyMoe;
use serde_json::json;

use crate::client::{connect, post, request};
use crate::contrast::tokens;
use crate::load::{metric, metrics, wait_until};
use crate::setup::{Setup, checkpoint, checkpoint_with, greedy, model};

const PATH: &str = "/v1/completions";
/// More than any test waits for: who writes is told to stop by closing the connection.
const N: usize = 16_000;
/// One client for each of `kinds`, four answers to a step; all of a kind have the same two experts of each layer left.
/// Experts per step while all run, and the longest wait in steps.
fn run(order: StepOrder, checkpoint: &Checkpoint, kinds: &[usize]) -> (f64, f64) {
    let setup = Setup::of(checkpoint, model(checkpoint), |options| {
        options.parallel = kinds.len();
        options.session.n_ctx = Some(N + 16);
        options.steps = Some(StepOptions { most: 4, order });
    });
    let address = setup.address();
    let begin = |&kind: &usize| {
        let masked: Vec<usize> = (0..8).filter(|expert| expert / 2 != kind).collect();
        let body = json!({"prompt": tokens(5, kind), "max_tokens": N, "temperature": 0, "ignore_eos": true,
            "cadre": {"mask": {"*": masked}}});
        let mut client = connect(address);
        let bytes = request("POST", PATH, &[], body.to_string().as_bytes());
        client.write_all(&bytes).unwrap();
        client
    };
    let clients: Vec<_> = kinds.iter().map(begin).collect();
    wait_until("all run", Duration::from_secs(30), || {
        metric(address, "vllm:num_requests_running") == kinds.len() as f64
    });
    let counts = || {
        let names = [
            "cadre:steps_total",
            "cadre:step_experts_total",
            "cadre:step_longest_wait",
            "vllm:num_requests_running",
        ];
        metrics(address, names)
    };
    let [steps, experts, ..] = counts();
    wait_until("hundreds of steps", Duration::from_secs(60), || {
        counts()[0] >= steps + 400.0
    });
    let [steps_then, experts_then, waited, running] = counts();
    assert_eq!(running, kinds.len() as f64, "all run to the end");
    drop(clients);
    setup.end();
    ((experts_then - experts) / (steps_then - steps), waited)
}

#[test]
fn steps_of_those_that_share_experts_need_fewer() {
    let decoupled = checkpoint_with(TinyMoe::decouple);
    let eight = [0, 1, 0, 1, 0, 1, 0, 1];
    for checkpoint in [checkpoint(), decoupled] {
        let (grouped, waited) = run(StepOrder::Experts, &checkpoint, &eight);
        assert!(waited <= 6.0, "three rounds of two steps: {waited}");
        // Both layers of a kind have four, and those of two kinds eight.
        assert!((4.0..4.2).contains(&grouped), "{grouped} experts");
        // Four at a time leave nothing to choose.
        let (mixed, _) = run(StepOrder::Experts, &checkpoint, &eight[..4]);
        assert_eq!(mixed, 8.0);
        // Who comes later waits for a round at most.
        let (_, waited) = run(StepOrder::Turns, &checkpoint, &eight);
        assert!(waited <= 2.0, "{waited}");
    }
}

#[test]
fn steps_change_no_answer() {
    let setup = Setup::with(|options| {
        options.parallel = 6;
        options.steps = Some(StepOptions {
            most: 2,
            order: StepOrder::Experts,
        });
    });
    let address = setup.address();
    let ask = |i: usize| {
        let cadre = match i % 3 {
            0 => json!({"contrast": {"beta": 0.3}}),
            _ => json!({}),
        };
        let body = json!({"prompt": tokens(3 + 17 * i, i), "max_tokens": 20 + i, "temperature": 0, "ignore_eos": true,
            "cadre": cadre});
        post(address, PATH, &body).json()["choices"][0]["text"].take()
    };
    let alone: Vec<_> = (0..9).map(ask).collect();
    let prompt = tokens(20, 1);
    let expected = setup.text(&prompt, &setup.alone(&prompt, 21, greedy()));
    assert_eq!(alone[1], expected);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..9).map(|i| scope.spawn(move || ask(i))).collect();
        for (i, client) in clients.into_iter().enumerate() {
            assert_eq!(client.join().unwrap(), alone[i], "client {i}");
        }
    });
    setup.end();
}
