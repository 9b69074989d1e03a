//! Steps of some of those that generate: fewer experts, the same answers, and nobody is left behind.

use std::time::Duration;

use cadre_serve::{StepOptions, StepOrder};
use cadre_testkit::TinyMoe;
use serde_json::json;

use crate::client::post;
use crate::contrast::tokens;
use crate::load::{metric, wait_until};
use crate::setup::{Setup, checkpoint, checkpoint_with, greedy, model};

const PATH: &str = "/v1/completions";
const N: usize = 1900;

/// Eight answers at a time, four to a step. Half of the clients write one token again and again, half another, so that
/// each half picks about the same experts. Experts per step, and the longest wait.
fn run(setup: &Setup) -> (f64, f64) {
    let address = setup.address();
    let ask = |i: usize| {
        let word = if i.is_multiple_of(2) { "50" } else { "120" };
        let body = json!({"prompt": tokens(5, i % 2), "max_tokens": N, "temperature": 0, "ignore_eos": true,
            "logit_bias": {word: 100}});
        let answer = post(address, PATH, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["choices"][0]["text"].take()
    };
    std::thread::scope(|scope| {
        // One after the other, so that turns take two of each kind.
        let begin = |i: usize| {
            let client = scope.spawn(move || ask(i));
            wait_until("it runs", Duration::from_secs(5), || {
                metric(address, "vllm:num_requests_running") == i as f64 + 1.0
            });
            client
        };
        let clients: Vec<_> = (0..8).map(begin).collect();
        for (i, client) in clients.into_iter().enumerate() {
            let word = if i.is_multiple_of(2) { 50 } else { 120 };
            let expected = setup.text(&tokens(5, i % 2), &[word; N]);
            assert_eq!(client.join().unwrap(), expected, "client {i}");
        }
    });
    let steps = metric(address, "cadre:steps_total");
    assert!(steps > 100.0, "{steps}");
    let experts = metric(address, "cadre:step_experts_total") / steps;
    (experts, metric(address, "cadre:step_longest_wait"))
}

fn with(order: StepOrder, checkpoint: &cadre_checkpoint::Checkpoint) -> Setup {
    Setup::of(checkpoint, model(checkpoint), |options| {
        options.parallel = 8;
        // Long enough that all run when the last one begins.
        options.session.n_ctx = Some(2048);
        options.steps = Some(StepOptions { most: 4, order });
    })
}

#[test]
fn steps_of_those_that_share_experts_need_fewer() {
    let decoupled = checkpoint_with(TinyMoe::decouple);
    for checkpoint in [checkpoint(), decoupled] {
        let setup = with(StepOrder::Turns, &checkpoint);
        let (turns, waited) = run(&setup);
        // Who comes later waits for a round at most.
        assert!(waited <= 2.0, "{waited}");
        setup.end();
        let setup = with(StepOrder::Experts, &checkpoint);
        let (grouped, waited) = run(&setup);
        assert!(waited <= 6.0, "three rounds of two steps: {waited}");
        assert!(
            grouped < 0.85 * turns,
            "{grouped} experts, {turns} in turns"
        );
        setup.end();
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
