//! The field `cadre`: experts are steered as the engine steers them, and told as the engine picked them.

use cadre_engine::{GenerateOptions, Hooks, Observer, RoutingEvent, Steering, generate};
use serde_json::{Value, json};

use crate::client::{get, post, send};
use crate::setup::{Setup, greedy};

const PATH: &str = "/v1/completions";
const PROMPT: &str = "the cat sat on the mill";

/// The experts that the engine picks: by position, by layer.
#[derive(Default)]
struct Seen(Vec<Vec<Vec<u16>>>);

impl Hooks for Seen {}

impl Observer for Seen {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        for (t, (experts, _)) in event.routing.iter().enumerate() {
            let position = event.first_position + t;
            self.0.resize(self.0.len().max(position + 1), Vec::new());
            self.0[position].push(experts.to_vec());
        }
    }
}

/// What the engine alone makes of it: the text, and the experts of every token that was read.
fn alone(setup: &Setup, steering: &Value, n: usize) -> (String, Vec<Vec<Vec<u16>>>) {
    let steering: Steering = serde_json::from_value(steering.clone()).unwrap();
    let ids = setup.tokenizer.encode(PROMPT).unwrap();
    let mut session = setup.model.session(&setup.session).unwrap();
    setup.model.steer(&mut session, &steering).unwrap();
    let options = GenerateOptions {
        max_new_tokens: n,
        stop_tokens: Vec::new(),
        sampling: greedy(),
    };
    let mut seen = Seen::default();
    let made = generate(&*setup.model, &mut session, &ids, &options, &mut seen).unwrap();
    (setup.text(&ids, &made.tokens), seen.0)
}

fn request(cadre: &Value) -> Value {
    json!({"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": true, "cadre": cadre})
}

#[test]
fn experts_are_steered_and_told_as_in_the_engine() {
    let setup = Setup::new();
    let n_prompt = setup.tokenizer.encode(PROMPT).unwrap().len();
    // Twice, so that what one request left in a place meets the next.
    for _ in 0..2 {
        for steering in [
            json!({}),
            json!({"top_k": 1}),
            json!({"mask": {"*": [0, 1]}}),
            json!({"force": {"1": [3]}, "bias": {"0": {"2": 4.0}}}),
        ] {
            let (text, seen) = alone(&setup, &steering, 6);
            let mut cadre = steering.clone();
            cadre["return_routing"] = true.into();
            let choice = post(setup.address(), PATH, &request(&cadre)).json()["choices"][0].take();
            assert_eq!(choice["text"], text, "{steering}");
            let told = &choice["cadre"];
            assert_eq!(
                (&told["n_prompt"], &told["n_tokens"]),
                (&json!(n_prompt), &json!(6))
            );
            assert_eq!(told["routing"]["layers"], json!([0, 1]));
            let tokens = told["routing"]["tokens"].as_array().unwrap();
            assert_eq!(tokens.len(), 6, "as many as were drawn");
            for (i, token) in tokens.iter().enumerate() {
                let position = n_prompt - 1 + i;
                assert_eq!(token["position"], position);
                assert_eq!(
                    token["experts"],
                    json!(seen[position]),
                    "{steering} {position}"
                );
                assert_eq!(
                    token["weights"][0].as_array().unwrap().len(),
                    seen[position][0].len()
                );
            }
        }
    }
    setup.end();
}

#[test]
fn a_stream_tells_the_same_piece_by_piece() {
    let setup = Setup::new();
    let cadre = json!({"top_k": 1, "return_routing": "all"});
    let whole = post(setup.address(), PATH, &request(&cadre)).json();
    let whole = &whole["choices"][0]["cadre"]["routing"]["tokens"];
    let mut body = request(&cadre);
    body["stream"] = true.into();
    let mut pieces: Vec<Value> = Vec::new();
    for event in post(setup.address(), PATH, &body).events() {
        let told = &event["choices"][0]["cadre"]["routing"]["tokens"];
        pieces.extend(told.as_array().unwrap().iter().cloned());
    }
    assert_eq!(&json!(pieces), whole);
    assert_eq!(
        whole[0]["position"], 0,
        "also the tokens of the prompt, which another request had left"
    );
    setup.end();
}

#[test]
fn sglang_clients_get_their_form() {
    let setup = Setup::new();
    let (_, seen) = alone(&setup, &json!({}), 6);
    let ids: Vec<u8> = seen
        .iter()
        .flatten()
        .flatten()
        .flat_map(|id| i32::from(*id).to_le_bytes())
        .collect();
    let mut body = request(&Value::Null);
    body["return_routed_experts"] = true.into();
    let answer = post(setup.address(), PATH, &body).json();
    let coded = answer["sglext"]["routed_experts"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(decoded(&coded), ids);
    assert!(answer["choices"][0].get("cadre").is_none());
    body["stream"] = true.into();
    let events = post(setup.address(), PATH, &body).events();
    assert_eq!(events.last().unwrap()["sglext"]["routed_experts"], coded);
    body["n"] = 2.into();
    assert_eq!(
        post(setup.address(), PATH, &body).error(),
        (400, "return_routed_experts".into())
    );
    setup.end();
}

/// The bytes of base64, the long way.
fn decoded(text: &str) -> Vec<u8> {
    const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = text.trim_end_matches('=').chars().flat_map(|letter| {
        let value = LETTERS.find(letter).unwrap();
        (0..6).rev().map(move |bit| ((value >> bit) & 1) as u8)
    });
    let bits: Vec<u8> = bits.collect();
    let bytes = bits.chunks_exact(8);
    bytes
        .map(|byte| byte.iter().fold(0, |all, bit| (all << 1) | bit))
        .collect()
}

#[test]
fn what_does_not_fit_the_model_is_refused_by_its_key() {
    let setup = Setup::new();
    for (cadre, param) in [
        (json!(7), "cadre"),
        (json!({"masks": {}}), "cadre.masks"),
        (json!({"contrast": 1}), "cadre.contrast"),
        (json!({"contrast": {"beta": -1}}), "cadre.contrast.beta"),
        (json!({"contrast": {"alpha": 2}}), "cadre.contrast.alpha"),
        (json!({"contrast": {"ranks": [9]}}), "cadre.contrast.ranks"),
        (json!({"contrast": {"rank": [2]}}), "cadre.contrast.rank"),
        (json!({"plan": "calm"}), "cadre.plan"),
        (json!({"plan": {"scale": 1}}), "cadre.plan"),
        (
            json!({"plan": {"steer": {"masks": {}}}}),
            "cadre.plan.steer.masks",
        ),
        (
            json!({"plan": {"steer": {"mask": {"0": [1]}}, "scale": 0.5}}),
            "cadre.plan.scale",
        ),
        (
            json!({"plan": {"steer": {}, "force": 1}}),
            "cadre.plan.force",
        ),
        (
            json!({"plan": {"steer": {"mask": {"2": [0]}}}}),
            "cadre.plan",
        ),
        (json!({"return_routing": 3}), "cadre.return_routing"),
        (json!({"top_k": 0}), "cadre.top_k"),
        (json!({"top_k": 9}), "cadre.top_k"),
        (json!({"top_p": 1.5}), "cadre.top_p"),
        (json!({"mask": {"2": [0]}}), "cadre.mask"),
        (json!({"mask": {"0": [8]}}), "cadre.mask"),
        (
            json!({"mask": {"0": [0, 1, 2, 3, 4, 5, 6, 7]}}),
            "cadre.mask",
        ),
        (
            json!({"force": {"0": [0, 1, 2, 3, 4, 5, 6, 7]}}),
            "cadre.force",
        ),
        (json!({"bias": {"0": {"1": "much"}}}), "cadre.bias"),
    ] {
        let refused = post(setup.address(), PATH, &request(&cadre));
        assert_eq!(refused.error(), (400, param.into()), "{cadre}");
    }
    setup.end();
}

#[test]
fn the_page_needs_no_key_and_says_where_it_may_load_from() {
    let setup = Setup::with(|options| options.keys = vec!["secret".to_owned()]);
    let page = get(setup.address(), "/");
    assert_eq!(page.status, 200);
    assert!(page.text().starts_with("<!doctype html>"));
    let policy = page.field("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
    let known = format!("If-None-Match: {}", page.field("etag").unwrap());
    assert_eq!(
        send(setup.address(), "GET", "/", &[&known], b"").status,
        304
    );
    assert_eq!(send(setup.address(), "POST", "/", &[], b"").status, 405);
    assert_eq!(get(setup.address(), "/v1/models").status, 401);
    let script = get(setup.address(), "/main.js");
    assert!(
        script
            .field("content-type")
            .unwrap()
            .starts_with("text/javascript")
    );
    setup.end();
}
