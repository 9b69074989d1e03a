//! A client that does nothing behind the back of a test.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// A field of the head, by its name in lower case.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let prefix = format!("{name}: ");
        self.head
            .lines()
            .find_map(|line| line.strip_prefix(&prefix))
    }

    /// The JSON of all events before `[DONE]`, which must be the last.
    pub(crate) fn events(&self) -> Vec<Value> {
        let text = self.text().strip_suffix("data: [DONE]\n\n").unwrap();
        let events = text.split("\n\n").filter(|event| !event.is_empty());
        let events = events.filter(|event| !event.starts_with(':'));
        events
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }

    /// Status and `param` of an error in OpenAI's form.
    #[track_caller]
    pub(crate) fn error(&self) -> (u16, Value) {
        let json = self.json();
        let error = &json["error"];
        let text = |name: &str| {
            error[name]
                .as_str()
                .unwrap_or_else(|| panic!("{json}"))
                .to_owned()
        };
        assert!(!text("message").is_empty() && !text("type").is_empty());
        assert!(error.get("code").is_some(), "{json}");
        (self.status, error["param"].clone())
    }
}

/// A request with a body, on a connection of its own.
pub(crate) fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    send(address, "POST", path, &[], body.to_string().as_bytes())
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Answer {
    send(address, "GET", path, &[], b"")
}

/// A request with further fields in its head.
pub(crate) fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    fields: &[&str],
    body: &[u8],
) -> Answer {
    let mut stream = connect(address);
    stream
        .write_all(&request(method, path, fields, body))
        .unwrap();
    read(&mut stream)
}

/// The bytes of a request that ends its connection.
pub(crate) fn request(method: &str, path: &str, fields: &[&str], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !fields.iter().any(|field| field.starts_with("Host:")) {
        head += "Host: localhost\r\n";
    }
    for field in fields {
        head += &format!("{field}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    // A test fails rather than waits.
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream
}

/// Reads an answer until the connection ends.
pub(crate) fn read(stream: &mut TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    parse(&bytes)
}

pub(crate) fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no head: {:?}", String::from_utf8_lossy(bytes)));
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head[9..12].parse().unwrap();
    let rest = &bytes[end + 4..];
    let body = match head.contains("transfer-encoding: chunked") {
        true => unchunked(rest),
        false => rest.to_vec(),
    };
    Answer { status, head, body }
}

fn unchunked(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        rest = &rest[end + 2..];
        if size == 0 {
            assert_eq!(rest, b"\r\n", "nothing after the last chunk");
            return body;
        }
        body.extend_from_slice(&rest[..size]);
        assert_eq!(&rest[size..size + 2], b"\r\n");
        rest = &rest[size + 2..];
    }
}
