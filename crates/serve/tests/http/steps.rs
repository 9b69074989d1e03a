//! Steps of some of those that generate: fewer experts, the same answers, and nobody is left behind.

use std::time::Duration;

use cadre_checkpoint::Checkpoint;
use cadre_serve::{StepOptions, StepOrder};
use cadre_testkit::TinyMoe;
use serde_json::json;

use crate::client::post;
use crate::contrast::tokens;
use crate::load::{metric, wait_until};
use crate::setup::{Setup, checkpoint, checkpoint_with, greedy, model};

const PATH: &str = "/v1/completions";
const N: usize = 1900;
/// Tokens that clients write again and again: those of one word pick about the same experts.
const WORDS: [usize; 2] = [50, 120];

/// One client for each of `words`, by index, four answers to a step: experts per step while all of them run, and the
/// longest wait in steps.
fn run(order: StepOrder, checkpoint: &Checkpoint, words: &[usize]) -> (f64, f64) {
    let setup = Setup::of(checkpoint, model(checkpoint), |options| {
        options.parallel = words.len();
        // Long enough that all run when the last one begins.
        options.session.n_ctx = Some(2048);
        options.steps = Some(StepOptions { most: 4, order });
    });
    let address = setup.address();
    let ask = |word: usize| {
        let body = json!({"prompt": tokens(5, word), "max_tokens": N, "temperature": 0, "ignore_eos": true,
            "logit_bias": {WORDS[word].to_string(): 100}});
        let answer = post(address, PATH, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["choices"][0]["text"].take()
    };
    let counts =
        || ["cadre:steps_total", "cadre:step_experts_total"].map(|name| metric(address, name));
    let mut per_step = 0.0;
    std::thread::scope(|scope| {
        let clients: Vec<_> = words
            .iter()
            .map(|&word| scope.spawn(move || ask(word)))
            .collect();
        wait_until("all run", Duration::from_secs(5), || {
            metric(address, "vllm:num_requests_running") == words.len() as f64
        });
        let [steps, experts] = counts();
        wait_until("hundreds of steps", Duration::from_secs(60), || {
            counts()[0] >= steps + 300.0
        });
        let [steps_then, experts_then] = counts();
        per_step = (experts_then - experts) / (steps_then - steps);
        for (client, &word) in clients.into_iter().zip(words) {
            let expected = setup.text(&tokens(5, word), &[WORDS[word] as u32; N]);
            assert_eq!(client.join().unwrap(), expected);
        }
    });
    let waited = metric(address, "cadre:step_longest_wait");
    setup.end();
    (per_step, waited)
}

#[test]
fn steps_of_those_that_share_experts_need_fewer() {
    let decoupled = checkpoint_with(TinyMoe::decouple);
    let eight = [0, 1, 0, 1, 0, 1, 0, 1];
    for checkpoint in [checkpoint(), decoupled] {
        // Four at a time leave nothing to choose.
        let turns = |words: [usize; 4]| run(StepOrder::Turns, &checkpoint, &words).0;
        let (alike, mixed) = ((turns([0; 4]) + turns([1; 4])) / 2.0, turns([0, 0, 1, 1]));
        assert!(alike < 0.85 * mixed, "{alike} experts alike, {mixed} mixed");
        let (grouped, waited) = run(StepOrder::Experts, &checkpoint, &eight);
        assert!(waited <= 6.0, "three rounds of two steps: {waited}");
        assert!(
            grouped < alike + 0.25 * (mixed - alike),
            "{grouped} experts, {alike} alike, {mixed} mixed"
        );
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
