//! `/v1/messages`: the same answers as `/v1/chat/completions`, in other words.

use serde_json::{Value, json};

use crate::client::{Answer, post};
use crate::setup::Setup;

const PATH: &str = "/v1/messages";

/// Names and data of the events of a stream.
fn events(answer: &Answer) -> Vec<(String, Value)> {
    let blocks = answer.text().split_terminator("\n\n");
    blocks
        .map(|block| {
            let (name, data) = block.split_once('\n').unwrap();
            let name = name.strip_prefix("event: ").unwrap().to_owned();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(data["type"], *name);
            (name, data)
        })
        .collect()
}

/// The answer of the other interface, drawn alike: the most probable token.
fn chat(setup: &Setup, messages: &Value, n: usize) -> Value {
    let body = json!({"messages": messages, "max_tokens": n, "top_k": 1});
    post(setup.address(), "/v1/chat/completions", &body).json()
}

#[test]
fn an_answer_is_that_of_the_other_interface() {
    let setup = Setup::new();
    let body = json!({
        "model": "tiny", "max_tokens": 20, "top_k": 1, "metadata": {"user_id": "me"},
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "sat"}]},
            {"role": "user", "content": [{"type": "text", "text": "where?"}]},
        ],
    });
    let messages = json!([
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "where?"},
    ]);
    let expected = chat(&setup, &messages, 20);
    let text = expected["choices"][0]["message"]["content"].clone();
    let answer = post(setup.address(), PATH, &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    assert_eq!(answer["content"], json!([{"type": "text", "text": text}]));
    assert_eq!(
        (&answer["type"], &answer["role"]),
        (&json!("message"), &json!("assistant"))
    );
    let read = &answer["usage"];
    let n_read =
        read["input_tokens"].as_u64().unwrap() + read["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(n_read, expected["usage"]["prompt_tokens"].as_u64().unwrap());
    assert_eq!(
        read["output_tokens"],
        expected["usage"]["completion_tokens"]
    );
    let reason = match expected["choices"][0]["finish_reason"].as_str() {
        Some("length") => "max_tokens",
        _ => "end_turn",
    };
    assert_eq!(answer["stop_reason"], reason);

    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = events(&post(setup.address(), PATH, &streamed));
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..2], ["message_start", "content_block_start"]);
    assert_eq!(
        names[names.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    let deltas = events
        .iter()
        .filter(|(name, _)| name == "content_block_delta");
    let told: String = deltas
        .map(|(_, data)| data["delta"]["text"].as_str().unwrap())
        .collect();
    assert_eq!(json!(told), text);
    let (_, end) = &events[events.len() - 2];
    assert_eq!(end["delta"]["stop_reason"], reason);
    assert_eq!(end["usage"]["output_tokens"], read["output_tokens"]);
    setup.end();
}

#[test]
fn stop_sequences_are_named() {
    let setup = Setup::new();
    let messages = json!([{"role": "user", "content": "the cat"}]);
    let whole = chat(&setup, &messages, 40);
    let whole = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let at = whole.char_indices().nth(6).unwrap().0;
    let stop: String = whole[at..].chars().take(2).collect();
    let body = json!({"max_tokens": 40, "top_k": 1, "messages": messages, "stop_sequences": ["never", stop]});
    let answer = post(setup.address(), PATH, &body).json();
    assert_eq!(answer["stop_reason"], "stop_sequence");
    assert_eq!(answer["stop_sequence"], stop);
    assert_eq!(
        answer["content"][0]["text"],
        whole[..whole.find(&stop).unwrap()]
    );
    setup.end();
}

#[test]
fn results_of_tools_become_messages_and_errors_have_their_own_form() {
    let template = "{% for t in tools %}{{ t.function.name }}{{ t.function.parameters.type }} {% endfor %}\
        {% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments.a }}{% endfor %} {% endfor %}:";
    let setup = Setup::with(|options| {
        options.template = Some(cadre_checkpoint::ChatTemplate::parse("t", template).unwrap());
    });
    let body = json!({
        "max_tokens": 1,
        "tools": [{"name": "add", "description": "adds", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "messages": [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "add", "input": {"a": 41}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "42"}]}]},
        ],
    });
    let answer = post(setup.address(), PATH, &body).json();
    let options = cadre_checkpoint::EncodeOptions::RENDERED;
    let rendered = "addobject [user]the cat [assistant]41 [tool]42 :";
    let ids = setup.tokenizer.encode_with(rendered, options).unwrap();
    assert_eq!(answer["usage"]["input_tokens"], ids.len());
    for (field, value) in [
        ("max_tokens", json!(null)),
        ("max_tokens", json!(0)),
        ("messages", json!([])),
        ("messages", json!([{"role": "system", "content": "x"}])),
        (
            "messages",
            json!([{"role": "user", "content": [{"type": "image"}]}]),
        ),
        (
            "thinking",
            json!({"type": "enabled", "budget_tokens": 1024}),
        ),
        ("tool_choice", json!({"type": "tool", "name": "mul"})),
        ("gramar", json!("x")),
    ] {
        let mut body = body.clone();
        body[field] = value;
        let answer = post(setup.address(), PATH, &body);
        let error = answer.json();
        assert_eq!(
            (answer.status, &error["type"]),
            (400, &json!("error")),
            "{error}"
        );
        assert_eq!(error["error"]["type"], "invalid_request_error");
        assert!(
            error["error"]["message"].as_str().unwrap().contains(field),
            "{error}"
        );
    }
    setup.end();
}
