//! Requests that are wrong in some way: each gets the right status in OpenAI's form, and the server goes on.

use serde_json::{Value, json};

use crate::client::{post, send};
use crate::setup::Setup;

const PATH: &str = "/v1/completions";

#[test]
fn bodies_that_are_no_requests() {
    let setup = Setup::new();
    let deep = "[".repeat(200_000);
    let bodies: &[&[u8]] = &[
        b"",
        b"{",
        b"null",
        b"[1]",
        b"{\"prompt\": \"\xff\xfe\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"\xef\xbb\xbf{}",
        b"{\"prompt\": \"x\"} {}",
        b"{\"prompt\": 1e999}",
        deep.as_bytes(),
    ];
    for body in bodies {
        let answer = send(setup.address(), "POST", PATH, &[], body);
        assert_eq!(
            answer.error(),
            (400, Value::Null),
            "{:?}",
            String::from_utf8_lossy(&body[..body.len().min(40)])
        );
    }
    setup.end();
}

#[test]
fn fields_that_are_wrong_are_named() {
    let setup = Setup::new();
    let many_stops: Vec<String> = (0..100_000).map(|i| i.to_string()).collect();
    let many_biases: serde_json::Map<String, Value> =
        (0..5000).map(|i| (i.to_string(), json!(1))).collect();
    for (field, value, status, param) in [
        ("prompt", json!(null), 400, "prompt"),
        ("prompt", json!(7), 400, "prompt"),
        ("prompt", json!([]), 400, "prompt"),
        ("prompt", json!([[]]), 400, "prompt"),
        ("prompt", json!([1, "a"]), 400, "prompt"),
        ("prompt", json!([1.5]), 400, "prompt"),
        ("prompt", json!([-1]), 400, "prompt"),
        ("prompt", json!([384]), 400, "prompt"),
        ("prompt", json!({"text": "x"}), 400, "prompt"),
        ("prompt", json!(vec!["a"; 1000]), 400, "prompt"),
        ("model", json!("gpt-9"), 404, "model"),
        ("model", json!(1), 400, "model"),
        ("n", json!(0), 400, "n"),
        ("n", json!(100_000), 400, "n"),
        ("temperature", json!(-0.1), 400, "temperature"),
        ("temperature", json!("hot"), 400, "temperature"),
        ("top_p", json!(1.1), 400, "top_p"),
        ("max_tokens", json!(-1), 400, "max_tokens"),
        ("max_tokens", json!(2.5), 400, "max_tokens"),
        ("stop", json!(many_stops), 400, "stop"),
        ("stop", json!("x".repeat(2000)), 400, "stop"),
        ("stop", json!([1]), 400, "stop"),
        ("stream", json!("yes"), 400, "stream"),
        (
            "stream_options",
            json!({"include_usage": true}),
            400,
            "stream_options",
        ),
        ("logit_bias", json!({"400": 1}), 400, "logit_bias"),
        ("logit_bias", json!({"x": 1}), 400, "logit_bias"),
        ("logit_bias", json!({"1": 1000}), 400, "logit_bias"),
        ("logit_bias", json!(many_biases), 400, "logit_bias"),
        ("logprobs", json!(21), 400, "logprobs"),
        ("seed", json!("x"), 400, "seed"),
        ("best_of", json!(2), 400, "best_of"),
        ("suffix", json!("x"), 400, "suffix"),
        ("grammar", json!("root ::= x"), 400, "grammar"),
        ("max_new_tokens", json!(1), 400, "max_new_tokens"),
        ("presence_penalty", json!(3), 400, "presence_penalty"),
        ("stop_token_ids", json!([9999]), 400, "stop_token_ids"),
    ] {
        let mut body = json!({"prompt": "the cat", "max_tokens": 1});
        body[field] = value;
        let answer = post(setup.address(), PATH, &body);
        assert_eq!(
            answer.error(),
            (status, json!(param)),
            "{field}: {}",
            answer.text()
        );
    }
    let fine = json!({"prompt": "the cat", "max_tokens": 1, "user": "x", "top_k": -1, "echo": null, "n": 1.0});
    assert_eq!(post(setup.address(), PATH, &fine).status, 200);
    setup.end();
}

#[test]
fn what_does_not_fit_is_said_before_it_is_tried() {
    let setup = Setup::new();
    let code = |body: &Value| {
        let answer = post(setup.address(), PATH, body);
        assert_eq!(answer.status, 400, "{}", answer.text());
        answer.json()["error"]["code"].clone()
    };
    let long = "context_length_exceeded";
    assert_eq!(code(&json!({"prompt": vec![5; 1025]})), long);
    assert_eq!(
        code(&json!({"prompt": vec![5; 1000], "max_tokens": 26})),
        long
    );
    assert_eq!(code(&json!({"prompt": "a b c d ".repeat(1000)})), long);
    // Seen from its length, without a look at its tokens.
    assert_eq!(code(&json!({"prompt": "x".repeat(5 << 20)})), long);
    let full = json!({"prompt": vec![5; 1000], "max_tokens": 25, "ignore_eos": true});
    let answer = post(setup.address(), PATH, &full).json();
    assert_eq!(answer["usage"]["completion_tokens"], 25);
    let large = json!({"prompt": "x".repeat(10 << 20)});
    let mut stream = crate::client::connect(setup.address());
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
        large.to_string().len()
    );
    std::io::Write::write_all(&mut stream, head.as_bytes()).unwrap();
    // Refused from the head alone.
    assert_eq!(crate::client::read(&mut stream).error().0, 413);
    setup.end();
}

#[test]
fn tokens_go_there_and_back() {
    let setup = Setup::new();
    let text = "the cat \u{fc}ber \u{20ac}";
    let ids = setup.tokenizer.encode(text).unwrap();
    let answer = post(
        setup.address(),
        "/tokenize",
        &json!({"prompt": text, "return_token_strs": true}),
    )
    .json();
    assert_eq!(answer["tokens"], json!(ids));
    assert_eq!(answer["count"], ids.len());
    assert_eq!(answer["max_model_len"], 1024);
    assert_eq!(answer["token_strs"].as_array().unwrap().len(), ids.len());
    let back = post(setup.address(), "/detokenize", &json!({"tokens": ids})).json();
    assert_eq!(back["prompt"], text);
    let plain = json!({"content": "<|endoftext|>", "parse_special": false});
    assert!(
        post(setup.address(), "/tokenize", &plain).json()["count"]
            .as_u64()
            .unwrap()
            > 1
    );
    let talk = json!({"messages": [{"role": "user", "content": "hi"}]});
    let rendered = setup.tokenizer.encode("[user] hi\n[assistant]").unwrap();
    assert_eq!(
        post(setup.address(), "/tokenize", &talk).json()["tokens"],
        json!(rendered)
    );
    let info = crate::client::get(setup.address(), "/tokenizer_info").json();
    assert_eq!(info["chat_template"], crate::setup::TEMPLATE);
    assert_eq!(info["model_max_length"], 1024);
    let both = json!({"prompt": "x", "messages": []});
    assert_eq!(
        post(setup.address(), "/tokenize", &both).error(),
        (400, json!("prompt"))
    );
    assert_eq!(
        post(setup.address(), "/detokenize", &json!({"tokens": "x"})).error(),
        (400, json!("tokens"))
    );
    setup.end();
}

/// What the document at `/openapi.json` says may be sent is read: a value of a wrong type is noticed.
#[test]
fn every_documented_field_is_read() {
    let setup = Setup::new();
    let document = crate::client::get(setup.address(), "/openapi.json").json();
    let user = json!([{"role": "user", "content": "x"}]);
    for (schema, path, base) in [
        (
            "CompletionRequest",
            PATH,
            json!({"prompt": "x", "max_tokens": 1}),
        ),
        (
            "ChatRequest",
            "/v1/chat/completions",
            json!({"messages": user, "max_tokens": 1}),
        ),
        ("TokenizeRequest", "/tokenize", json!({"prompt": "x"})),
        ("DetokenizeRequest", "/detokenize", json!({"tokens": [5]})),
        ("EmbeddingsRequest", "/v1/embeddings", json!({"input": "x"})),
    ] {
        let fields = document["components"]["schemas"][schema]["properties"]
            .as_object()
            .unwrap();
        assert!(fields.len() > 1);
        for field in fields.keys() {
            let mut body = base.clone();
            body[field] = json!({"no": [["such"]], "value": {}});
            let answer = post(setup.address(), path, &body);
            let wrong = answer.json()["error"]["code"].clone();
            // Objects whose own fields are named.
            let has_fields = ["stream_options", "cadre"].contains(&field.as_str());
            // Any object is a set of variables.
            if field != "chat_template_kwargs" {
                assert_eq!(answer.status, 400, "{schema} {field}: {}", answer.text());
            }
            let named = answer.text().contains(field.as_str());
            assert!(
                wrong != "unknown_parameter" || has_fields,
                "{schema} {field}"
            );
            assert!(
                named || answer.status == 200,
                "{schema} {field}: {}",
                answer.text()
            );
        }
    }
    setup.end();
}
