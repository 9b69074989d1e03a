//! The memory for keys and values: what one has read serves all that begin alike, and less than everybody wants is enough.

use std::io::{Read, Write};
use std::net::TcpStream;

use cadre_serve::{ServeError, Server};
use serde_json::{Value, json};

use crate::client::{connect, post, request};
use crate::contrast::tokens;
use crate::load::metric;
use crate::setup::{Setup, checkpoint, drawn, model, options};

const PATH: &str = "/v1/completions";
/// Tokens of a block.
const BLOCK: usize = cadre_engine::KV_BLOCK;

fn body(prompt: &[u32], n: usize, seed: u64) -> Value {
    json!({"prompt": prompt, "max_tokens": n, "seed": seed, "ignore_eos": true})
}

/// Begins a long answer, which holds its slot.
fn begin(setup: &Setup, prompt: &[u32]) -> TcpStream {
    let mut body = body(prompt, 800, 1);
    body["stream"] = true.into();
    let mut stream = connect(setup.address());
    stream
        .write_all(&request("POST", PATH, &[], body.to_string().as_bytes()))
        .unwrap();
    stream.read_exact(&mut [0; 600]).unwrap();
    stream
}

#[test]
fn what_one_has_read_serves_others_in_other_slots() {
    let setup = Setup::new();
    let start = tokens(200, 1);
    let stream = begin(&setup, &start);
    for (tail, n_same, cadre) in [
        (3, 200, json!({})),
        (4, 150, json!({})),
        (5, 60, json!({})),
        // Read with other experts, it is something else; the second time it is known.
        (6, 200, json!({"top_k": 1})),
        (7, 200, json!({"top_k": 1})),
    ] {
        let mut prompt = start[..n_same].to_vec();
        prompt.extend(tokens(20, tail));
        let mut body = body(&prompt, 10, tail as u64);
        body["cadre"] = cadre.clone();
        let answer = post(setup.address(), PATH, &body).json();
        let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
        if cadre == json!({}) {
            let expected = setup.alone(&prompt, 10, drawn(tail as u64));
            assert_eq!(answer["choices"][0]["text"], setup.text(&prompt, &expected));
            // The slot of the one before may hold some tokens more.
            let cached = cached.as_u64().unwrap() as usize;
            assert!(cached >= n_same / BLOCK * BLOCK, "{n_same}: {cached}");
        } else if tail == 6 {
            assert_eq!(*cached, 0);
        } else {
            assert_eq!(*cached, 200, "in its own slot, to the last token");
        }
    }
    drop(stream);
    setup.end();
}

#[test]
fn with_less_memory_than_all_want_everybody_gets_the_same() {
    let n_ctx = 4 * BLOCK;
    let mut session = crate::setup::session();
    session.n_ctx = Some(n_ctx);
    let full = model(&checkpoint()).session(&session).unwrap().kv_bytes();
    let setup = Setup::with(|options| {
        options.parallel = 8;
        options.session.n_ctx = Some(n_ctx);
        options.kv_memory = Some(2 * full + full / 4);
    });
    let address = setup.address();
    let wanted = |i: usize| (tokens(20 + i * 9 % 100, i / 5), 110 + i % 20, i as u64);
    let ask = |i: usize| {
        let (prompt, n, seed) = wanted(i);
        let mut body = body(&prompt, n, seed);
        if i % 4 == 3 {
            body["logprobs"] = 1.into();
            body["echo"] = true.into();
        }
        let answer = post(address, PATH, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let taken = metric(address, "cadre:kv_bytes");
        assert!(taken <= (2 * full + full / 4) as f64, "{taken} bytes");
        answer.json()["choices"][0].take()
    };
    let alone: Vec<Value> = (0..24).map(ask).collect();
    for (i, alone) in alone.iter().enumerate().filter(|(i, _)| i % 4 != 3) {
        let (prompt, n, seed) = wanted(i);
        let expected = setup.alone(&prompt, n, drawn(seed));
        assert_eq!(alone["text"], setup.text(&prompt, &expected), "{i}");
    }
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..24).map(|i| scope.spawn(move || ask(i))).collect();
        for (i, client) in clients.into_iter().enumerate() {
            assert_eq!(client.join().unwrap(), alone[i], "client {i}");
        }
    });
    let n = metric(address, "vllm:num_preemptions_total");
    assert!(n > 0.0, "somebody had to read again");
    setup.end();
}

#[test]
fn what_cannot_fit_is_refused_at_once() {
    let setup = Setup::new();
    let full = setup.model.session(&setup.session).unwrap().kv_bytes();
    let n_ctx = setup.session.n_ctx.unwrap();
    setup.end();
    let setup = Setup::with(|options| options.kv_memory = Some(full));
    let mut large = body(&tokens(n_ctx / 2, 1), n_ctx / 2, 1);
    assert_eq!(post(setup.address(), PATH, &large).status, 200);
    large["cadre"] = json!({"contrast": {}});
    let refused = post(setup.address(), PATH, &large);
    assert_eq!(refused.error(), (400, Value::Null));
    assert!(refused.text().contains("context_length_exceeded"));
    // Half of it fits, twice.
    large["prompt"] = json!(tokens(10, 1));
    large["max_tokens"] = (n_ctx / 2 - 10).into();
    assert_eq!(post(setup.address(), PATH, &large).status, 200);
    setup.end();
    let checkpoint = checkpoint();
    let mut options = options();
    options.kv_memory = Some(full - 1);
    let model = model(&checkpoint);
    let refused = Server::start(&checkpoint, model, options).err().unwrap();
    assert!(matches!(refused, ServeError::KvMemory { .. }), "{refused}");
}
