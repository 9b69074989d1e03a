//! HTTP itself: connections that stay, bodies in chunks, clients that are slow, and what is no HTTP at all.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{connect, get, post, read, send};
use crate::setup::{Setup, checkpoint};

/// Reads one answer with a length from a connection that stays.
fn next(stream: &mut std::net::TcpStream) -> (u16, Value) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).unwrap();
    (
        head[9..12].parse().unwrap(),
        serde_json::from_slice(&body).unwrap(),
    )
}

#[test]
fn paths_and_methods() {
    let setup = Setup::new();
    let address = setup.address();
    assert_eq!(get(address, "/health").json(), json!({"status": "ok"}));
    assert_eq!(get(address, "/v1/health?x=1").status, 200);
    let models = get(address, "/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][1]["id"], "also");
    assert_eq!(models["data"][0]["max_model_len"], 1024);
    let meta = &models["data"][0]["meta"];
    assert_eq!(meta["digest"], checkpoint().digest());
    let info = setup.model.info();
    assert_eq!(
        (&meta["n_params"], &meta["n_active_params"]),
        (&json!(info.n_params), &json!(info.n_active_params))
    );
    assert_eq!(meta["n_ctx_train"], info.max_context);
    assert_eq!(get(address, "/v1/models/also").json()["id"], "also");
    assert_eq!(
        get(address, "/v1/models/other").error(),
        (404, json!("model"))
    );
    assert_eq!(get(address, "/v1/nothing").error(), (404, Value::Null));
    let wrong = get(address, "/v1/completions");
    assert_eq!((wrong.error().0, wrong.field("allow")), (405, Some("POST")));
    let wrong = send(address, "DELETE", "/health", &[], b"");
    assert_eq!(
        (wrong.error().0, wrong.field("allow")),
        (405, Some("GET,HEAD"))
    );
    let head = send(address, "HEAD", "/health", &[], b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    let page = get(address, "/metrics");
    assert!(
        page.field("content-type")
            .unwrap()
            .starts_with("text/plain")
    );
    assert!(
        page.text().contains(
            "http_requests_total{model_name=\"tiny\",handler=\"models\",status=\"404\"} 1"
        )
    );
    setup.end();
}

#[test]
fn connections_stay_and_requests_may_come_ahead() {
    let setup = Setup::new();
    let mut stream = connect(setup.address());
    let body = json!({"prompt": "the cat", "max_tokens": 3, "temperature": 0}).to_string();
    let whole = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (first, second) = body.split_at(9);
    let chunked = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n\
         {:x};a=b\r\n{first}\r\n{:X}\r\n{second}\r\n0\r\nTrailer: x\r\n\r\n",
        first.len(),
        second.len()
    );
    stream
        .write_all(format!("{whole}{chunked}{whole}").as_bytes())
        .unwrap();
    let answers: Vec<_> = (0..3).map(|_| next(&mut stream)).collect();
    for (status, answer) in &answers {
        assert_eq!(
            (*status, &answer["choices"]),
            (200, &answers[0].1["choices"])
        );
    }
    // A client that asks first.
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).unwrap();
    assert_eq!(next(&mut stream).0, 200);
    setup.end();
}

#[test]
fn slow_clients_are_left_and_disturb_nobody() {
    let setup = Setup::with(|options| {
        options.http.head_time = Duration::from_millis(300);
        options.http.body_time = Duration::from_millis(300);
        options.http.idle_time = Duration::from_millis(300);
    });
    let address = setup.address();
    let start = Instant::now();
    let mut slow_head = connect(address);
    slow_head
        .write_all(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
        .unwrap();
    let mut slow_body = connect(address);
    let head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{\"prompt\"";
    slow_body.write_all(head).unwrap();
    let mut idle = connect(address);
    let answer = post(
        address,
        "/v1/completions",
        &json!({"prompt": "the cat", "max_tokens": 2}),
    );
    assert_eq!(answer.status, 200);
    assert_eq!(read(&mut slow_head).error().0, 408);
    assert_eq!(read(&mut slow_body).error().0, 408);
    assert_eq!(idle.read(&mut [0; 1]).unwrap(), 0, "closed without a word");
    assert!(start.elapsed() < Duration::from_secs(5));
    setup.end();
}

/// What `/openapi.json` says is the method of a path is the one that is taken there.
#[test]
fn documented_methods_are_the_ones_that_are_taken() {
    let setup = Setup::new();
    let document = get(setup.address(), "/openapi.json").json();
    let paths = document["paths"].as_object().unwrap();
    for (path, methods) in paths {
        let methods = methods.as_object().unwrap();
        let documented: Vec<&String> = methods.keys().filter(|key| *key != "parameters").collect();
        let other = send(setup.address(), "PATCH", path, &[], b"");
        assert_eq!(other.status, 405, "{path}");
        let taken = match other.field("allow").unwrap() {
            "GET,HEAD" => "get",
            "POST" => "post",
            taken => taken,
        };
        assert_eq!(documented, [taken], "{path}");
        // In the words of the interface that the path belongs to.
        let in_anthropics = other.json()["type"] == "error";
        assert_eq!(in_anthropics, path == "/v1/messages", "{path}");
    }
    setup.end();
}

#[test]
fn names_of_models_may_be_percent_encoded() {
    let setup = Setup::with(|options| options.names = vec!["org/tiny".to_owned()]);
    for path in ["/v1/models/org/tiny", "/v1/models/org%2Ftiny"] {
        assert_eq!(get(setup.address(), path).json()["id"], "org/tiny");
    }
    let broken = get(setup.address(), "/v1/models/%ff");
    assert_eq!(broken.error(), (400, Value::Null));
    setup.end();
}

#[test]
fn bodies_that_are_broken_or_too_large() {
    let setup = Setup::with(|options| options.http.body_bytes = 1000);
    let chunked = |chunks: &str| {
        format!(
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"
        )
    };
    let large = format!("1f4\r\n{}\r\n", "x".repeat(500));
    for (request, status) in [
        (chunked("zz\r\n"), 400),
        (chunked("2\r\n{}}\r\n0\r\n\r\n"), 400),
        // Nothing of it is ever larger than it may be.
        (chunked(&large.repeat(3)), 413),
        (
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n".to_owned(),
            413,
        ),
    ] {
        let request = request.replace("Host: a", "Host: localhost");
        let mut stream = connect(setup.address());
        stream.write_all(request.as_bytes()).unwrap();
        let answer = read(&mut stream);
        assert_eq!(answer.error().0, status, "{request}");
    }
    // Anthropic's interface has its own words for it.
    let body = json!({"model": "tiny", "max_tokens": 1, "messages": [], "metadata": {"user_id": "x".repeat(2000)}});
    let answer = post(setup.address(), "/v1/messages", &body);
    let told = answer.json();
    assert_eq!(
        (answer.status, &told["error"]["type"]),
        (413, &json!("request_too_large"))
    );
    assert_eq!(told["type"], "error");
    setup.end();
}

#[test]
fn what_is_not_http_is_refused() {
    let setup = Setup::new();
    for (bytes, status) in [
        (&b"\x16\x03\x01\x02\x00\x01\x00\x01"[..], 400),
        (b"hello\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
            400,
        ),
        (
            b"POST /health HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
        ),
    ] {
        let mut stream = connect(setup.address());
        stream.write_all(bytes).unwrap();
        assert_eq!(
            read(&mut stream).status,
            status,
            "{:?}",
            String::from_utf8_lossy(bytes)
        );
    }
    let mut stream = connect(setup.address());
    stream.write_all(&vec![b'a'; 100_000]).unwrap();
    assert_eq!(read(&mut stream).status, 431);
    let fields = format!("GET /health HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(65));
    let mut stream = connect(setup.address());
    stream.write_all(fields.as_bytes()).unwrap();
    assert_eq!(read(&mut stream).status, 431);
    setup.end();
}

#[test]
fn too_many_connections_are_told_to_come_back() {
    let setup = Setup::with(|options| options.http.connections = 1);
    let held = connect(setup.address());
    // It has been accepted when the next one is.
    let refused = loop {
        let answer = get(setup.address(), "/health");
        if answer.status == 503 {
            break answer;
        }
    };
    assert_eq!(refused.field("retry-after"), Some("1"));
    refused.error();
    drop(held);
    setup.end();
}
