//! `cadre.contrast` and `cadre.plan`: what the engine does with the same, alone and among others.

use cadre_engine::{
    Contrast, ContrastSessions, GenerateOptions, NoObserver, SamplingOptions, Steering,
    generate_contrasted,
};
use serde_json::{Value, json};

use crate::client::{get, post};
use crate::load::metric;
use crate::setup::{Setup, drawn};

const PATH: &str = "/v1/completions";

/// What the engine alone makes of a contrast.
fn contrasted(setup: &Setup, prompt: &[u32], n: usize, sampling: SamplingOptions) -> Vec<u32> {
    let strong: Steering = serde_json::from_value(json!({"mask": {"1": [4]}})).unwrap();
    let contrast = Contrast::with_ranks(strong, vec![3], 0.9, 0.01);
    let mut sessions = ContrastSessions::new(&*setup.model, &setup.session, contrast).unwrap();
    let options = GenerateOptions {
        max_new_tokens: n,
        stop_tokens: Vec::new(),
        sampling,
    };
    let made = generate_contrasted(
        &*setup.model,
        &mut sessions,
        prompt,
        &options,
        &mut NoObserver,
    );
    made.unwrap().tokens
}

fn contrast() -> Value {
    json!({"mask": {"1": [4]}, "contrast": {"beta": 0.9, "alpha": 0.01, "ranks": [3]}})
}

fn body(prompt: &[u32], n: usize, seed: u64, cadre: &Value) -> Value {
    json!({"prompt": prompt, "max_tokens": n, "seed": seed, "ignore_eos": true, "cadre": cadre})
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

/// Tokens of the tiny model, none of which ends a text.
pub(crate) fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n)
        .map(|i| (5 + (i * i * 7 + i * 13 + seed * 31) % 200) as u32)
        .collect()
}

#[test]
fn a_contrast_gives_among_others_what_it_gives_alone() {
    let setup = Setup::with(|options| {
        options.parallel = 6;
        options.batch = 24;
    });
    let address = setup.address();
    // The same prompts with and without, so that what one leaves behind meets the other.
    let wanted = |i: usize| (tokens(20 + 35 * (i % 4), i / 8), 5 + i % 7 * 3, i as u64);
    let expected: Vec<String> = (0..24)
        .map(|i| {
            let (prompt, n, seed) = wanted(i);
            let made = match i.is_multiple_of(2) {
                true => contrasted(&setup, &prompt, n, drawn(seed)),
                false => setup.alone(&prompt, n, drawn(seed)),
            };
            setup.text(&prompt, &made)
        })
        .collect();
    let ask = |i: usize| {
        let (prompt, n, seed) = wanted(i);
        let cadre = match i.is_multiple_of(2) {
            true => contrast(),
            false => json!({}),
        };
        let answer = post(address, PATH, &body(&prompt, n, seed, &cadre));
        assert_eq!(answer.status, 200, "{}", answer.text());
        text(&answer.json()).to_owned()
    };
    for _ in 0..2 {
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..24).map(|i| scope.spawn(move || ask(i))).collect();
            for (i, client) in clients.into_iter().enumerate() {
                assert_eq!(client.join().unwrap(), expected[i], "client {i}");
            }
        });
    }
    assert!(
        metric(address, "vllm:prefix_cache_hits_total") > 0.0,
        "the second round finds what the first has read"
    );
    setup.end();
}

#[test]
fn without_a_difference_a_contrast_changes_nothing_and_scores_are_the_models_own() {
    let setup = Setup::new();
    let prompt = tokens(30, 1);
    let plain = post(setup.address(), PATH, &body(&prompt, 8, 3, &json!({}))).json();
    let mut none = body(
        &prompt,
        8,
        3,
        &json!({"contrast": {"beta": 0, "alpha": 1e-9}}),
    );
    none["logprobs"] = 1.into();
    let contrasted = post(setup.address(), PATH, &none).json();
    assert_eq!(text(&contrasted), text(&plain));
    // Other tokens than the contrast would ban, with the probabilities that they have without it.
    let mut strict = body(&prompt, 1, 3, &json!({"contrast": {"alpha": 1}}));
    strict["logprobs"] = 2.into();
    let mut free = strict.clone();
    free["cadre"] = json!({});
    free["temperature"] = 0.into();
    let scores =
        |body: &Value| post(setup.address(), PATH, body).json()["choices"][0]["logprobs"].take();
    assert_eq!(scores(&strict), scores(&free));
    setup.end();
}

#[test]
fn a_plan_is_the_steering_that_it_names() {
    let calm: Steering = serde_json::from_value(json!({"mute": {"0": [1, 2], "1": [3]}})).unwrap();
    let setup = Setup::with(|options| options.plans = vec![("calm".to_owned(), calm)]);
    let prompt = tokens(40, 2);
    let ask = |cadre: Value| {
        let answer = post(setup.address(), PATH, &body(&prompt, 12, 4, &cadre));
        assert_eq!(answer.status, 200, "{}", answer.text());
        text(&answer.json()).to_owned()
    };
    let plain = ask(json!({}));
    let muted = ask(json!({"mute": {"0": [1, 2], "1": [3]}}));
    assert_ne!(plain, muted);
    assert_eq!(ask(json!({"plan": "calm"})), muted);
    assert_eq!(ask(json!({"plan": {"name": "calm", "scale": 1}})), muted);
    assert_eq!(ask(json!({"plan": {"name": "calm", "scale": 0}})), plain);
    let half = ask(json!({"damp": {"0": {"1": 0.5, "2": 0.5}, "1": {"3": 0.5}}}));
    assert_eq!(ask(json!({"plan": {"name": "calm", "scale": 0.5}})), half);
    let inline = json!({"plan": {"steer": {"mute": {"0": [1, 2], "1": [3]}}, "scale": 0.5}});
    assert_eq!(ask(inline), half);
    let both = ask(json!({"plan": "calm", "bias": {"0": {"5": 9}}}));
    assert_eq!(
        ask(json!({"mute": {"0": [1, 2], "1": [3]}, "bias": {"0": {"5": 9}}})),
        both
    );
    let models = get(setup.address(), "/v1/models").json();
    assert_eq!(models["data"][0]["meta"]["plans"], json!(["calm"]));
    setup.end();
}
