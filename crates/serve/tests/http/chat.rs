//! `/v1/chat/completions`, against the engine and the template.

use serde_json::{Value, json};

use crate::client::post;
use crate::setup::{Setup, drawn, greedy};

const PATH: &str = "/v1/chat/completions";

fn conversation(setup: &Setup) -> (Value, Vec<u32>) {
    let messages = json!([
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
    ]);
    let rendered = "[system] be brief\n[user] the cat\n[assistant]";
    let options = cadre_checkpoint::EncodeOptions::RENDERED;
    (
        messages,
        setup.tokenizer.encode_with(rendered, options).unwrap(),
    )
}

#[test]
fn an_answer_continues_the_rendered_conversation() {
    let setup = Setup::new();
    let (messages, ids) = conversation(&setup);
    let tokens = setup.alone(&ids, 20, drawn(9));
    let expected = setup.text(&[], &tokens);
    let mut body = json!({"model": "also", "messages": messages, "max_completion_tokens": 20, "seed": 9,
        "ignore_eos": true, "user": "me", "parallel_tool_calls": true, "response_format": {"type": "text"},
        "logprobs": true, "top_logprobs": 2});
    let answer = post(setup.address(), PATH, &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    let choice = &json["choices"][0];
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], "tiny", "whatever it was asked as");
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": expected, "refusal": null})
    );
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(json["usage"]["prompt_tokens"], ids.len());
    let scores = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(scores.len(), tokens.len());
    for (score, token) in scores.iter().zip(&tokens) {
        assert_eq!(score["bytes"], json!(setup.tokenizer.token_bytes(*token)));
        let tops = score["top_logprobs"].as_array().unwrap();
        assert!(tops.len() == 2 && tops[0]["logprob"].as_f64() >= tops[1]["logprob"].as_f64());
    }
    body["stream"] = json!(true);
    let events = post(setup.address(), PATH, &body).events();
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let text = |event: &Value| {
        event["choices"][0]["delta"]["content"]
            .as_str()
            .unwrap_or("")
            .to_owned()
    };
    assert_eq!(events.iter().map(text).collect::<String>(), expected);
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
    assert!(
        events
            .iter()
            .all(|event| event["object"] == "chat.completion.chunk")
    );
    let lists = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(lists.flatten().cloned().collect::<Vec<_>>(), *scores);
    setup.end();
}

#[test]
fn an_answer_may_fill_the_context() {
    let setup = Setup::with(|options| options.session.n_ctx = Some(64));
    let (messages, ids) = conversation(&setup);
    let body = json!({"messages": messages, "temperature": 0, "ignore_eos": true});
    let json = post(setup.address(), PATH, &body).json();
    // The last token is drawn and not read.
    assert_eq!(json["usage"]["total_tokens"], 65);
    let expected = setup.text(&[], &setup.alone(&ids, 65 - ids.len(), greedy()));
    assert_eq!(json["choices"][0]["message"]["content"], expected);
    setup.end();
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let setup = Setup::new();
    let user = json!([{"role": "user", "content": "the cat"}]);
    for (field, value, param) in [
        ("tools", json!([{"type": "function"}]), "tools[0]"),
        (
            "tools",
            json!([{"type": "function", "function": {"name": "f"}}]),
            "tools",
        ),
        ("functions", json!([{"name": "f"}]), "functions"),
        ("tool_choice", json!("required"), "tool_choice"),
        (
            "response_format",
            json!({"type": "xml"}),
            "response_format.type",
        ),
        ("top_logprobs", json!(3), "top_logprobs"),
        ("cadre", json!({"top_x": 1}), "cadre.top_x"),
        ("cadre", json!({"mask": {"9": [0]}}), "cadre.mask"),
        ("cadre", json!({"mask": {"0": [8]}}), "cadre.mask"),
        ("cadre", json!({"contrast": 1}), "cadre.contrast"),
        ("modalities", json!(["audio"]), "modalities"),
        ("messages", json!([]), "messages"),
        ("messages", json!({"role": "user"}), "messages"),
        ("messages", json!(["hi"]), "messages[0]"),
        (
            "messages",
            json!([{"role": "king", "content": "x"}]),
            "messages[0].role",
        ),
        ("messages", json!([{"role": "user"}]), "messages[0].content"),
        (
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[0].content[0]",
        ),
    ] {
        let mut body = json!({"messages": user, "max_tokens": 1});
        body[field] = value;
        let error = post(setup.address(), PATH, &body).error();
        assert_eq!(error, (400, json!(param)), "{body}");
    }
    let bare = Setup::with(|options| {
        options.template = Some(
            cadre_checkpoint::ChatTemplate::parse("t", "{{ raise_exception('no roles here') }}")
                .unwrap(),
        );
    });
    let answer = post(bare.address(), PATH, &json!({"messages": user}));
    assert_eq!(answer.error().0, 400);
    assert!(answer.text().contains("no roles here"), "{}", answer.text());
    bare.end();
    setup.end();
}

/// What a model makes of tools is its own business (`api/tools.rs` reads it); here, that it gets them.
#[test]
fn tools_and_their_results_reach_the_template() {
    let template = "{% for t in tools %}{{ t.function.name }} {% endfor %}\
        {% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments.a }}{% endfor %} {% endfor %}:";
    let setup = Setup::with(|options| {
        options.template = Some(cadre_checkpoint::ChatTemplate::parse("t", template).unwrap());
    });
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]);
    let call = json!({"id": "x", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 41}"}});
    let messages = json!([
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "42"},
    ]);
    let body = json!({"messages": messages, "tools": tools, "max_tokens": 4, "temperature": 0, "ignore_eos": true});
    let answer = post(setup.address(), PATH, &body).json();
    let options = cadre_checkpoint::EncodeOptions::RENDERED;
    let ids = setup
        .tokenizer
        .encode_with("add the cat 41 42 :", options)
        .unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], ids.len());
    let text = setup.text(&[], &setup.alone(&ids, 4, greedy()));
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["content"], text);
    assert!(message.get("tool_calls").is_none());
    let mut without = body;
    without["tool_choice"] = json!("none");
    let ids = setup
        .tokenizer
        .encode_with("the cat 41 42 :", options)
        .unwrap();
    let answer = post(setup.address(), PATH, &without).json();
    assert_eq!(answer["usage"]["prompt_tokens"], ids.len());
    setup.end();
}

#[test]
fn an_answer_is_held_to_its_schema() {
    let setup = Setup::new();
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["mood", "n", "names"],
    "properties": {
        "mood": {"enum": ["glad", "sad"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 1, "maxItems": 2},
    }});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}});
    let body = |seed: u64| {
        json!({"messages": [{"role": "user", "content": "the cat"}], "seed": seed, "n": 2, "max_tokens": 200,
            "response_format": format})
    };
    for seed in 0..4 {
        let answer = post(setup.address(), PATH, &body(seed)).json();
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "stop", "{answer}");
            let text = choice["message"]["content"].as_str().unwrap();
            let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!(value["mood"] == "glad" || value["mood"] == "sad", "{text}");
            assert!(value["n"].as_u64().unwrap() < 100, "{text}");
            assert!(
                (1..=2).contains(&value["names"].as_array().unwrap().len()),
                "{text}"
            );
            assert_eq!(value.as_object().unwrap().len(), 3, "{text}");
        }
        let mut streamed = body(seed);
        streamed["stream"] = json!(true);
        let events = post(setup.address(), PATH, &streamed).events();
        let first = events
            .iter()
            .filter(|event| event["choices"][0]["index"] == 0);
        let text = first.filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        let whole = &answer["choices"][0]["message"]["content"];
        assert_eq!(json!(text.collect::<String>()), *whole);
    }
    for schema in [
        json!({"type": "king"}),
        json!("object"),
        json!({"pattern": "(".repeat(1000)}),
    ] {
        let mut body = body(0);
        body["response_format"]["json_schema"]["schema"] = schema;
        assert_eq!(
            post(setup.address(), PATH, &body).error(),
            (400, json!("response_format"))
        );
    }
    // A bomb: a string of a length that has too many states, in too many nested choices.
    let mut bomb = json!({"type": "string", "minLength": 100_000, "maxLength": 1_000_000});
    for _ in 0..40 {
        bomb = json!({"anyOf": [bomb.clone(), {"type": "array", "items": bomb, "minItems": 1000, "maxItems": 100_000}]});
        if bomb.to_string().len() > 100_000 {
            break;
        }
    }
    let mut body = body(0);
    body["max_tokens"] = json!(2);
    body["response_format"]["json_schema"]["schema"] = bomb;
    let start = std::time::Instant::now();
    let answer = post(setup.address(), PATH, &body);
    assert!(
        answer.status == 200 || answer.status == 400,
        "{}",
        answer.text()
    );
    assert!(start.elapsed() < std::time::Duration::from_secs(30));
    setup.end();
}

#[test]
fn a_call_that_is_asked_for_is_made() {
    let setup = Setup::with(|options| {
        let template = "{% for t in tools %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}:";
        options.template = Some(cadre_checkpoint::ChatTemplate::parse("t", template).unwrap());
    });
    let tool = |name: &str, key: &str| {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object",
            "properties": {key: {"type": "integer", "minimum": 0, "maximum": 9}}, "required": [key], "additionalProperties": false}}})
    };
    let mut body = json!({"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 100, "seed": 1,
        "tools": [tool("add", "a"), tool("sub", "b")], "tool_choice": "required"});
    let answer = post(setup.address(), PATH, &body).json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0]["function"];
    let key = match call["name"].as_str() {
        Some("add") => "a",
        _ => "b",
    };
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments[key].as_u64().unwrap() < 10, "{answer}");
    body["tool_choice"] = json!({"type": "function", "function": {"name": "sub"}});
    body["stream"] = json!(true);
    let events = post(setup.address(), PATH, &body).events();
    let mut calls = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array());
    let call = &calls.next().unwrap()[0];
    assert_eq!(
        (&call["function"]["name"], &call["index"], &call["type"]),
        (&json!("sub"), &json!(0), &json!("function"))
    );
    assert!(calls.next().is_none());
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );
    body["tool_choice"] = json!({"type": "function", "function": {"name": "mul"}});
    assert_eq!(
        post(setup.address(), PATH, &body).error(),
        (400, json!("tool_choice"))
    );
    setup.end();
}
