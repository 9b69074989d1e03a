//! `cadre serve`: it says where it listens, gives what `run` gives, and ends in good order.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{arg, cadre, failure, stdout, tiny};

/// A server that is killed when the test fails.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        let mut child = cadre(&[&["serve", "--port", "0"], args].concat())
            .env_remove("CADRE_API_KEY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .strip_prefix("http://")
            .unwrap_or_else(|| panic!("{line}"));
        Self {
            address: address.to_owned(),
            child,
        }
    }

    fn ask(&self, method: &str, path: &str, field: &str, body: &Value) -> (u16, Value) {
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{field}Content-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (
            head[9..12].parse().unwrap(),
            serde_json::from_str(body).unwrap(),
        )
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask("POST", path, "", body);
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Ends it with a signal; its exit and what it said.
    fn end(mut self, signal: &str) -> (ExitStatus, String) {
        let sent = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(20), "it ends");
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut errors = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut errors)
            .unwrap();
        (self.child.wait().unwrap(), errors)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

#[test]
fn a_completion_is_what_run_prints() {
    let server = Server::start(&[]);
    let prompt = "Once upon a time";
    let run = ["run", "-p", prompt, "-n", "24", "--temp", "0", "--no-echo"];
    let printed = stdout(&run);
    let body = json!({"model": "nano", "prompt": prompt, "max_tokens": 24, "temperature": 0});
    let answer = server.post("/v1/completions", &body);
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert_eq!(format!("{text}\n"), printed);
    // nano was not tuned for conversations.
    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    let (status, error) = server.ask("POST", "/v1/chat/completions", "", &chat);
    assert_eq!(
        (status, &error["error"]["code"]),
        (400, &json!("no_chat_template"))
    );
    let (exit, errors) = server.end("-TERM");
    assert!(exit.success(), "{errors}");
    assert!(
        errors.contains("serving `nano`") && errors.contains("ending"),
        "{errors}"
    );
}

/// `golden/embeddings/`, by transformers.
#[test]
fn vectors_are_those_of_transformers() {
    let golden = cadre_testkit::golden_dir().join("embeddings/expected.json");
    let golden: Value = serde_json::from_slice(&fs::read(golden).unwrap()).unwrap();
    let numbers = |value: &Value| -> Vec<f64> {
        let values = value.as_array().unwrap();
        values.iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let server = Server::start(&[]);
    let mut worst = 0.0f64;
    for case in golden["cases"].as_array().unwrap() {
        for pooling in ["mean", "last"] {
            let body = json!({"input": case["text"], "pooling": pooling});
            let answer = server.post("/v1/embeddings", &body);
            let got = numbers(&answer["data"][0]["embedding"]);
            let expected = numbers(&case[pooling]);
            assert_eq!(got.len(), expected.len());
            for (got, expected) in got.iter().zip(&expected) {
                worst = worst.max((got - expected).abs());
            }
            let n_tokens = case["tokens"].as_array().unwrap().len();
            assert_eq!(answer["usage"]["prompt_tokens"], n_tokens);
        }
    }
    assert!(worst < 2e-6, "{worst:e}");
    assert!(server.end("-TERM").0.success());
}

/// From disk, with room for a few experts, eight at a time, and a cache in 8 bits: the same as `run` with these flags.
#[test]
fn a_streamed_model_is_served_alike() {
    let folder = tiny();
    let model = arg(folder.path());
    let flags = [
        "-m",
        model,
        "--mem-budget",
        "8MiB",
        "-c",
        "64",
        "-ctk",
        "q8_0",
        "-ctv",
        "q8_0",
    ];
    let server = Server::start(&[&flags[..], &["-np", "2", "-a", "mine"]].concat());
    let prompts = ["the cat", "the miller and the", "fn main"];
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let asked: Vec<_> = prompts
            .iter()
            .map(|prompt| {
                let body =
                    json!({"model": "mine", "prompt": prompt, "max_tokens": 12, "temperature": 0});
                let server = &server;
                scope.spawn(move || server.post("/v1/completions", &body))
            })
            .collect();
        asked.into_iter().map(|one| one.join().unwrap()).collect()
    });
    for (prompt, answer) in prompts.iter().zip(&answers) {
        let run = [
            &["run", "-p", prompt, "-n", "12", "--temp", "0", "--no-echo"],
            &flags[..],
        ]
        .concat();
        let text = answer["choices"][0]["text"].as_str().unwrap();
        assert_eq!(format!("{text}\n"), stdout(&run), "{prompt}");
    }
    let (status, error) = server.ask(
        "POST",
        "/v1/completions",
        "",
        &json!({"model": "nano", "prompt": "x"}),
    );
    assert_eq!(
        (status, &error["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    let (exit, errors) = server.end("-INT");
    assert!(exit.success(), "{errors}");
}

/// Plans by name and contrasts, in steps of one, with memory for one context: the same as `run` with these flags.
#[test]
fn plans_and_contrasts_are_served_as_run_does_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("steer.json");
    fs::write(&file, r#"{"mute": {"*": [0, 3, 7]}}"#).unwrap();
    let plan = format!("calm={}", file.display());
    let server = Server::start(&[
        "--steer-plan",
        &plan,
        "--kv-memory",
        "8MiB",
        "--step-requests",
        "1",
        "-c",
        "128",
    ]);
    let prompt = "Once upon a time";
    let run = ["run", "-p", prompt, "-n", "16", "--temp", "0", "--no-echo"];
    for (cadre, flags) in [
        (json!({"plan": "calm"}), &["--steer", arg(&file)][..]),
        (
            json!({"plan": {"name": "calm", "scale": 0.5}}),
            &["--steer", arg(&file), "--steer-scale", "0.5"],
        ),
        (json!({"contrast": {"beta": 0.7}}), &["--contrast", "0.7"]),
    ] {
        let body = json!({"prompt": prompt, "max_tokens": 16, "temperature": 0, "cadre": cadre});
        let answer = server.post("/v1/completions", &body);
        let text = answer["choices"][0]["text"].as_str().unwrap();
        assert_eq!(
            format!("{text}\n"),
            stdout(&[&run[..], flags].concat()),
            "{cadre}"
        );
    }
    drop(server);
    for (flags, code, said) in [
        (&["--kv-memory", "1KiB"][..], 1, "one context of"),
        (&["--steer-plan", "calm"], 2, "calm=steer.json"),
        (
            &["--steer-plan", &plan, "--steer-plan", &plan],
            2,
            "two plans",
        ),
        (&["--steer-plan", "calm=/no/such/file"], 1, "/no/such/file"),
        (&["--step-order", "turns"], 2, "--step-requests"),
    ] {
        let (found, errors) = failure(&[&["serve", "--port", "0"][..], flags].concat());
        assert!(
            found == code && errors.contains(said),
            "{flags:?}: {errors}"
        );
    }
    fs::write(&file, r#"{"mute": {"99": [0]}}"#).unwrap();
    let (code, errors) = failure(&["serve", "--port", "0", "--steer-plan", &plan]);
    assert!(
        code == 1 && errors.contains("`calm`") && errors.contains("layer 99"),
        "{errors}"
    );
}

#[test]
fn keys_come_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    fs::write(&file, "alpha\n\n  beta \n").unwrap();
    let server = Server::start(&["--api-key-file", arg(&file), "--api-key", "gamma"]);
    for (field, status) in [
        ("", 401),
        ("Authorization: Bearer delta\r\n", 401),
        ("Authorization: Bearer beta\r\n", 200),
        ("x-api-key: gamma\r\n", 200),
    ] {
        assert_eq!(
            server.ask("GET", "/v1/models", field, &json!({})).0,
            status,
            "{field}"
        );
    }
    drop(server);
    fs::write(&file, "\n").unwrap();
    let (code, errors) = failure(&["serve", "--api-key-file", arg(&file)]);
    assert!(code == 2 && errors.contains("has no key"), "{errors}");
}

#[test]
fn what_cannot_be_served_is_said_at_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, errors) = failure(&["serve", "--port", &port]);
    assert!(
        code == 1 && errors.contains("cannot listen") && errors.contains("--port"),
        "{errors}"
    );
    let (code, errors) = failure(&["serve", "--host", "no.such.host.invalid"]);
    assert!(code == 2 && errors.contains("no.such.host"), "{errors}");
    let (code, errors) = failure(&["serve", "--port", "0", "-c", "100000"]);
    assert!(code == 1 && errors.contains("512"), "{errors}");
    for flag in [
        "--parallel",
        "--batch-size",
        "--prompt-batch-size",
        "--max-queue",
    ] {
        let (code, errors) = failure(&["serve", "--port", "0", flag, "0"]);
        assert!(code == 2, "{errors}");
    }
}
