//! `/v1/completions`, against the engine.

use cadre_engine::{Logits, NoObserver, SamplingOptions, eval::log_sum_exp};
use serde_json::{Value, json};

use crate::client::{get, post};
use crate::setup::{Setup, drawn, greedy};

const PATH: &str = "/v1/completions";

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices
        .iter()
        .map(|choice| choice["text"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn an_answer_is_what_the_engine_generates() {
    let setup = Setup::new();
    let prompt = "the cat sat";
    let ids = setup.tokenizer.encode(prompt).unwrap();
    let sharp = SamplingOptions {
        temperature: 0.5,
        top_k: 20,
        top_p: 0.9,
        min_p: 0.01,
        repetition_penalty: 1.3,
        seed: u64::MAX,
    };
    for (fields, sampling) in [
        (json!({"temperature": 0}), greedy()),
        (json!({"seed": 7}), drawn(7)),
        (
            json!({"temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": -1}),
            sharp,
        ),
        // Nothing is left but the most probable token.
        (json!({"top_p": 0}), greedy()),
    ] {
        let mut body =
            json!({"model": "tiny", "prompt": prompt, "max_tokens": 24, "ignore_eos": true});
        body.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        let answer = post(setup.address(), PATH, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let json = answer.json();
        assert_eq!(texts(&json), [setup.said(prompt, 24, sampling)], "{fields}");
        assert_eq!(json["object"], "text_completion");
        assert_eq!(json["choices"][0]["finish_reason"], "length");
        assert_eq!(json["choices"][0]["logprobs"], Value::Null);
        assert_eq!(json["usage"]["prompt_tokens"], ids.len());
        assert_eq!(json["usage"]["completion_tokens"], 24);
        body["prompt"] = json!(ids);
        assert_eq!(
            texts(&post(setup.address(), PATH, &body).json()),
            texts(&json)
        );
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let events = post(setup.address(), PATH, &body).events();
        let (usage, chunks) = events.split_last().unwrap();
        let streamed: String = chunks.iter().flat_map(texts).collect();
        assert_eq!(vec![streamed], texts(&json));
        assert_eq!(usage["choices"], json!([]));
        assert_eq!(usage["usage"]["total_tokens"], ids.len() + 24);
        assert!(
            chunks
                .iter()
                .all(|chunk| chunk["usage"].is_null() && chunk["id"] == usage["id"])
        );
    }
    setup.end();
}

#[test]
fn prompts_and_choices_come_in_their_order() {
    let setup = Setup::new();
    let prompts = ["the cat", "fn main", "Es war"];
    let body = json!({"prompt": prompts, "n": 2, "seed": 3, "max_tokens": 9, "ignore_eos": true});
    let answer = post(setup.address(), PATH, &body).json();
    let expected: Vec<String> = prompts
        .iter()
        .flat_map(|prompt| [3, 4].map(|seed| setup.said(prompt, 9, drawn(seed))))
        .collect();
    assert_eq!(texts(&answer), expected);
    let indices: Vec<_> = (0..6)
        .map(|i| answer["choices"][i]["index"].clone())
        .collect();
    assert_eq!(json!(indices), json!([0, 1, 2, 3, 4, 5]));
    // As they grow, mixed.
    let mut streamed = vec![String::new(); 6];
    let mut body = body;
    body["stream"] = json!(true);
    for event in post(setup.address(), PATH, &body).events() {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        streamed[index] += choice["text"].as_str().unwrap();
    }
    assert_eq!(streamed, expected);
    setup.end();
}

/// lm_eval leaves the score of the last token out, as that of one that was drawn.
#[test]
fn an_echo_has_the_score_of_the_token_that_ends_it() {
    let setup = Setup::new();
    let prompt = [3, 141, 59];
    let body = json!({"prompt": prompt, "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0,
        "logit_bias": {"26": 100}, "stop_token_ids": [26]});
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let answer = post(setup.address(), PATH, &body).json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["text"], setup.tokenizer.decode(&prompt));
    let scores = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(scores.len(), 4);
    assert!(
        scores[0].is_null()
            && scores[1..]
                .iter()
                .all(|score| score.as_f64().unwrap() < 0.0)
    );
    assert_eq!(
        choice["logprobs"]["tokens"][3],
        setup.tokenizer.token_str(26).into_owned()
    );
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let events = post(setup.address(), PATH, &streamed).events();
    let in_events = events.iter().flat_map(|event| {
        let scores = &event["choices"][0]["logprobs"]["token_logprobs"];
        scores.as_array().cloned().unwrap_or_default()
    });
    assert_eq!(in_events.collect::<Vec<_>>(), *scores);
    // Without an echo it is no part of the answer.
    let mut alone = body;
    alone["echo"] = json!(false);
    let alone = post(setup.address(), PATH, &alone).json();
    assert_eq!(alone["choices"][0]["logprobs"]["token_logprobs"], json!([]));
    setup.end();
}

/// What lm_eval asks: how probable a continuation is, token by token.
#[test]
fn an_echo_carries_the_scores_of_the_prompt() {
    let setup = Setup::new();
    let ids = setup
        .tokenizer
        .encode("the miller and the cat went home to the mill")
        .unwrap();
    let mut session = setup.model.session(&setup.session).unwrap();
    let logits = setup
        .model
        .forward(&mut session, &ids, Logits::All, &mut NoObserver)
        .unwrap();
    let vocab = setup.model.info().vocab_size;
    let mut expected = vec![Value::Null];
    let mut best = vec![Value::Null];
    for (i, row) in logits.chunks_exact_mut(vocab).enumerate() {
        let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let target = ids.get(i + 1).map(|token| row[*token as usize]);
        let log_sum = log_sum_exp(&*setup.model, row);
        expected.push(json!(f64::from(target.unwrap_or(highest)) - log_sum));
        best.push(json!(f64::from(highest) - log_sum));
    }
    let body = json!({"model": "tiny", "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": true, "ignore_eos": true});
    let answer = post(setup.address(), PATH, &body).json();
    let scores = &answer["choices"][0]["logprobs"];
    // Equal to the last bit, as JSON writes it.
    assert_eq!(scores["token_logprobs"], json!(expected));
    let tops = scores["top_logprobs"].as_array().unwrap();
    assert_eq!(tops.len(), ids.len() + 1);
    assert!(tops[0].is_null());
    for (top, best) in tops.iter().zip(&best).skip(1) {
        let top = top.as_object().unwrap();
        assert!(top.len() <= 2 && top.values().any(|value| value == best));
    }
    for name in ["tokens", "text_offset"] {
        assert_eq!(
            scores[name].as_array().unwrap().len(),
            ids.len() + 1,
            "{name}"
        );
    }
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("the miller and the cat went home to the mill"));
    assert_eq!(scores["text_offset"][0], 0);
    // Without new tokens, too; and as text, and in a stream.
    let mut body = body;
    body["max_tokens"] = json!(0);
    let short = post(setup.address(), PATH, &body).json();
    let short = &short["choices"][0]["logprobs"]["token_logprobs"];
    assert_eq!(*short, json!(expected[..ids.len()]));
    body["prompt"] = json!("the miller and the cat went home to the mill");
    body["stream"] = json!(true);
    let events = post(setup.address(), PATH, &body).events();
    assert_eq!(
        events[0]["choices"][0]["logprobs"]["token_logprobs"],
        *short
    );
    setup.end();
}

#[test]
fn stop_strings_end_a_text_before_them() {
    let setup = Setup::new();
    let whole = setup.said("the cat", 40, drawn(5));
    let at = whole.char_indices().nth(12).unwrap().0;
    let stop: String = whole[at..].chars().take(3).collect();
    let expected = &whole[..whole.find(&stop).unwrap()];
    let mut body = json!({"prompt": "the cat", "max_tokens": 40, "seed": 5, "ignore_eos": true,
        "stop": [stop, "never seen"], "logprobs": 0});
    let answer = post(setup.address(), PATH, &body).json();
    assert_eq!(texts(&answer), [expected]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let offsets = answer["choices"][0]["logprobs"]["text_offset"]
        .as_array()
        .unwrap();
    let n_chars = expected.chars().count() as u64;
    assert!(
        offsets
            .iter()
            .all(|offset| offset.as_u64().unwrap() < n_chars)
    );
    assert!(answer["choices"][0]["logprobs"]["top_logprobs"].is_null());
    body["stream"] = json!(true);
    let events = post(setup.address(), PATH, &body).events();
    assert_eq!(events.iter().flat_map(texts).collect::<String>(), expected);
    // A token that stops is not told.
    let ids = setup.tokenizer.encode("the cat").unwrap();
    let tokens = setup.alone(&ids, 40, drawn(5));
    let last = tokens.iter().position(|token| *token == tokens[6]).unwrap();
    let body = json!({"prompt": ids, "max_tokens": 40, "seed": 5, "ignore_eos": true, "stop_token_ids": [tokens[6]]});
    let answer = post(setup.address(), PATH, &body).json();
    assert_eq!(texts(&answer), [setup.text(&ids, &tokens[..last])]);
    assert_eq!(answer["usage"]["completion_tokens"], last);
    setup.end();
}

#[test]
fn biases_and_penalties_change_what_is_drawn() {
    let setup = Setup::new();
    let body =
        json!({"prompt": "the cat", "max_tokens": 3, "temperature": 0, "logit_bias": {"104": 100}});
    let answer = post(setup.address(), PATH, &body).json();
    let forced = setup.tokenizer.decode(&[104, 104, 104]);
    assert_eq!(texts(&answer), [forced.as_str()]);
    let body = json!({"prompt": "the cat", "max_tokens": 2, "temperature": 0, "frequency_penalty": 2,
        "presence_penalty": 2, "logit_bias": {"104": 3.9}, "ignore_eos": true});
    assert_eq!(post(setup.address(), PATH, &body).status, 200);
    setup.end();
}

#[test]
fn what_was_read_before_is_not_read_again() {
    let setup = Setup::new();
    let prompt = "the miller and the cat went home to the mill";
    let n = setup.tokenizer.encode(prompt).unwrap().len();
    let body =
        |text: &str| json!({"prompt": text, "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let first = post(setup.address(), PATH, &body(prompt)).json();
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let again = post(setup.address(), PATH, &body(prompt)).json();
    assert_eq!(
        again["usage"]["prompt_tokens_details"]["cached_tokens"],
        n - 1
    );
    assert_eq!(texts(&again), texts(&first));
    let longer = format!("{prompt}{}", texts(&first)[0]);
    let more = post(setup.address(), PATH, &body(&longer)).json();
    assert!(
        more["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
            >= n as u64 - 1
    );
    assert_eq!(texts(&more), [setup.said(&longer, 8, greedy())]);
    let page = get(setup.address(), "/metrics");
    let has = |line: &str| page.text().lines().any(|found| found.starts_with(line));
    assert!(has("vllm:prefix_cache_hits_total{model_name=\"tiny\"} "));
    // Every token picks two experts; of both layers.
    for layer in ["0", "1"] {
        assert!(has(&format!(
            "cadre:moe_load_entropy{{model_name=\"tiny\",layer=\"{layer}\"}} 0."
        )));
    }
    setup.end();
}
