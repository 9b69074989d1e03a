//! Many at a time: nobody's answer depends on the others, whoever leaves makes room, and trouble stays where it is.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cadre_engine::{
    Logits, Model, ModelInfo, Observer, Result, Score, Sequence, Session, SessionOptions, Steering,
    StoreStats, Workspace,
};
use cadre_kernels::{Compute, Matrix};
use serde_json::{Value, json};

use crate::client::{Answer, connect, get, post, request, send};
use crate::setup::{Setup, checkpoint, drawn, model};

const PATH: &str = "/v1/completions";

fn text(answer: &Answer) -> String {
    let texts = answer.events();
    let texts = texts
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap());
    texts.collect()
}

/// Gauges or counters of `/metrics`, all at one time.
pub(crate) fn metrics<const N: usize>(address: SocketAddr, names: [&str; N]) -> [f64; N] {
    let page = get(address, "/metrics");
    names.map(|name| {
        let mut lines = page.text().lines();
        let line = lines.find(|line| line.starts_with(&format!("{name}{{")));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    })
}

pub(crate) fn metric(address: SocketAddr, name: &str) -> f64 {
    metrics(address, [name])[0]
}

#[track_caller]
pub(crate) fn wait_until(what: &str, within: Duration, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < within, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn sixty_four_clients_each_get_what_they_would_get_alone() {
    let setup = Setup::with(|options| options.parallel = 8);
    let words = [
        "the", "cat", "miller", "fn", "Es war", "12 + 30", "king", "mill",
    ];
    // Mixed lengths, prompts that begin alike and that do not, and streams among whole answers.
    let wanted = |i: usize| {
        let prompt: Vec<&str> = (0..1 + i * 7 % 40)
            .map(|k| words[(i / 8 + k) % 8])
            .collect();
        (prompt.join(" "), 1 + i * 5 % 33, i as u64)
    };
    let expected: Vec<String> = (0..64)
        .map(|i| {
            let (prompt, n, seed) = wanted(i);
            setup.said(&prompt, n, drawn(seed))
        })
        .collect();
    let address = setup.address();
    let ask = |i: usize| {
        let (prompt, n, seed) = wanted(i);
        let streams = !i.is_multiple_of(3);
        let body = json!({"prompt": prompt, "max_tokens": n, "seed": seed, "ignore_eos": true, "stream": streams});
        let answer = post(address, PATH, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        match streams {
            true => text(&answer),
            false => answer.json()["choices"][0]["text"]
                .as_str()
                .unwrap()
                .to_owned(),
        }
    };
    let got: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..64).map(|i| scope.spawn(move || ask(i))).collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect()
    });
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        assert_eq!(got, expected, "client {i}");
    }
    assert_eq!(metric(address, "vllm:num_requests_running"), 0.0);
    setup.end();
}

/// Begins a stream and reads its first bytes.
fn begin(address: SocketAddr, n: usize) -> std::net::TcpStream {
    let body = json!({"prompt": "the cat", "max_tokens": n, "ignore_eos": true, "stream": true});
    let mut stream = connect(address);
    stream
        .write_all(&request("POST", PATH, &[], body.to_string().as_bytes()))
        .unwrap();
    stream.read_exact(&mut [0; 300]).unwrap();
    stream
}

#[test]
fn who_leaves_makes_room_within_a_second() {
    let setup = Setup::with(|options| {
        options.parallel = 2;
        options.session.n_ctx = Some(16_384);
    });
    let address = setup.address();
    let streams = [begin(address, 16_000), begin(address, 16_000)];
    assert_eq!(metric(address, "vllm:num_requests_running"), 2.0);
    // One waits in the queue, and leaves it again; it wants the answer as a whole.
    let body = json!({"prompt": "the mill", "max_tokens": 5, "ignore_eos": true}).to_string();
    let mut waiting = connect(address);
    waiting
        .write_all(&request("POST", PATH, &[], body.as_bytes()))
        .unwrap();
    wait_until("one waits", Duration::from_secs(5), || {
        metric(address, "vllm:num_requests_waiting") == 1.0
    });
    drop(waiting);
    drop(streams);
    wait_until("slots are free", Duration::from_secs(1), || {
        metric(address, "vllm:num_requests_running") == 0.0
    });
    let page = get(address, "/metrics");
    assert!(
        page.text().contains("finished_reason=\"abort\"} 2"),
        "{}",
        page.text()
    );
    assert_eq!(
        send(address, "POST", PATH, &[], body.as_bytes()).status,
        200
    );
    setup.end();
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let setup = Setup::with(|options| {
        options.parallel = 1;
        options.queue = 1;
        options.session.n_ctx = Some(16_384);
    });
    let address = setup.address();
    let stream = begin(address, 16_000);
    let body = json!({"prompt": "the mill", "max_tokens": 5, "ignore_eos": true}).to_string();
    let mut waiting = connect(address);
    waiting
        .write_all(&request("POST", PATH, &[], body.as_bytes()))
        .unwrap();
    wait_until("one waits", Duration::from_secs(5), || {
        metric(address, "vllm:num_requests_waiting") == 1.0
    });
    let refused = send(address, "POST", PATH, &[], body.as_bytes());
    assert_eq!(refused.error(), (429, Value::Null));
    let seconds: u32 = refused.field("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    // What can never wait is not worth coming back for.
    let two = json!({"prompt": "the mill", "n": 2});
    assert_eq!(post(address, PATH, &two).status, 400);
    drop(stream);
    let answer = crate::client::read(&mut waiting);
    assert_eq!(answer.status, 200);
    setup.end();
}

#[test]
fn a_server_ends_when_what_runs_is_done() {
    let setup = Setup::new();
    let address = setup.address();
    let body = json!({"prompt": "the cat", "max_tokens": 300, "seed": 1, "ignore_eos": true, "stream": true});
    let expected = setup.said("the cat", 300, drawn(1));
    let mut stream = connect(address);
    stream
        .write_all(&request("POST", PATH, &[], body.to_string().as_bytes()))
        .unwrap();
    let mut start = vec![0; 300];
    stream.read_exact(&mut start).unwrap();
    let ended = std::thread::spawn(move || setup.server.end(Duration::from_secs(20)));
    let mut bytes = start;
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(text(&crate::client::parse(&bytes)), expected);
    assert!(ended.join().unwrap(), "nothing was broken off");
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn what_takes_too_long_at_the_end_is_broken_off_and_told() {
    let setup = Setup::with(|options| options.session.n_ctx = Some(2048));
    let mut stream = begin(setup.address(), 2000);
    assert!(!setup.server.end(Duration::ZERO));
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    let rest = String::from_utf8_lossy(&rest);
    assert!(
        rest.contains("unavailable_error") && !rest.contains("[DONE]"),
        "{rest}"
    );
}

/// A model that panics where token 13 is read.
#[derive(Debug)]
struct Superstitious(Arc<dyn Model>);

impl Model for Superstitious {
    fn info(&self) -> &ModelInfo {
        self.0.info()
    }
    fn compute(&self) -> &Compute {
        self.0.compute()
    }
    fn matrices(&self) -> Vec<&Matrix> {
        self.0.matrices()
    }
    fn store_stats(&self) -> Option<StoreStats> {
        None
    }
    fn preload(&self, _progress: &dyn Fn(usize)) -> Result<()> {
        Ok(())
    }
    fn predictor_scores(&self) -> Vec<Score> {
        Vec::new()
    }
    fn session(&self, options: &SessionOptions) -> Result<Session> {
        self.0.session(options)
    }
    fn steer(&self, session: &mut Session, steering: &Steering) -> Result<()> {
        self.0.steer(session, steering)
    }
    fn workspace(&self, capacity: usize) -> Result<Workspace> {
        self.0.workspace(capacity)
    }
    fn forward<'s>(
        &self,
        session: &'s mut Session,
        tokens: &[u32],
        want: Logits,
        observer: &mut dyn Observer,
    ) -> Result<&'s mut [f32]> {
        self.0.forward(session, tokens, want, observer)
    }
    fn forward_batch<'w>(
        &self,
        batch: &mut [Sequence<'_>],
        workspace: &'w mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<&'w mut [f32]> {
        assert!(
            batch.iter().all(|one| !one.tokens.contains(&13)),
            "as the test wants it"
        );
        self.0.forward_batch(batch, workspace, observer)
    }
}

#[test]
fn a_panic_is_an_error_of_its_own_request() {
    let checkpoint = checkpoint();
    let inner = model(&checkpoint);
    let setup = Setup::of(&checkpoint, Arc::new(Superstitious(inner)), |_| {});
    let address = setup.address();
    // Tokens that are drawn must not be 13 here.
    let fine = |seed: u64| json!({"prompt": [5, 6, 7], "max_tokens": 60, "seed": seed, "ignore_eos": true, "logit_bias": {"13": -100}});
    let bodies: Vec<Value> = (0..3).map(fine).collect();
    let alone: Vec<Value> = bodies
        .iter()
        .map(|body| post(address, PATH, body).json()["choices"].clone())
        .collect();
    let bad = json!({"prompt": [5, 6, 7, 13, 5], "max_tokens": 5});
    std::thread::scope(|scope| {
        let good: Vec<_> = bodies
            .iter()
            .map(|body| scope.spawn(move || post(address, PATH, body)))
            .collect();
        for _ in 0..3 {
            let answer = post(address, PATH, &bad);
            assert_eq!(answer.error(), (500, Value::Null), "{}", answer.text());
        }
        for (good, alone) in good.into_iter().zip(&alone) {
            assert_eq!(good.join().unwrap().json()["choices"], *alone);
        }
    });
    let mut streamed = bad;
    streamed["stream"] = json!(true);
    let answer = post(address, PATH, &streamed);
    assert!(answer.text().contains("server_error") && !answer.text().contains("[DONE]"));
    assert_eq!(get(address, "/health").status, 200);
    setup.end();
}

/// Requests that are steered each in their own way, together with some that are not, get what sessions steered so get alone.
#[test]
fn steering_is_each_requests_own() {
    let setup = Setup::with(|options| options.parallel = 3);
    let address = setup.address();
    let steerings = [
        json!({}),
        json!({"mask": {"*": [0, 1, 2]}}),
        json!({"top_k": 1}),
        json!({"force": {"1": [5]}, "bias": {"0": {"3": 2.5}}}),
        json!({"mute": {"0": [0, 1, 2, 3]}, "gain": {"*": {"4": 0.5}}}),
    ];
    let alone: Vec<String> = steerings
        .iter()
        .map(|steering| {
            let steering: Steering = serde_json::from_value(steering.clone()).unwrap();
            let mut session = setup.model.session(&setup.session).unwrap();
            setup.model.steer(&mut session, &steering).unwrap();
            let ids = setup.tokenizer.encode("the miller and the cat").unwrap();
            let options = cadre_engine::GenerateOptions {
                max_new_tokens: 30,
                stop_tokens: Vec::new(),
                sampling: drawn(2),
            };
            let generated = cadre_engine::generate(
                &*setup.model,
                &mut session,
                &ids,
                &options,
                &mut cadre_engine::NoObserver,
            );
            setup.text(&ids, &generated.unwrap().tokens)
        })
        .collect();
    assert!(
        alone[1..].iter().all(|text| *text != alone[0]),
        "steering is felt"
    );
    let ask = |i: usize| {
        let body = json!({"prompt": "the miller and the cat", "max_tokens": 30, "seed": 2, "ignore_eos": true,
            "cadre": steerings[i % 5]});
        post(address, PATH, &body).json()["choices"][0]["text"].clone()
    };
    let got: Vec<Value> = std::thread::scope(|scope| {
        let ask = &ask;
        let clients: Vec<_> = (0..20).map(|i| scope.spawn(move || ask(i))).collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect()
    });
    for (i, got) in got.iter().enumerate() {
        assert_eq!(*got, alone[i % 5], "client {i}");
    }
    setup.end();
}
