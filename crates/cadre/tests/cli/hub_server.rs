//! A tiny HTTP server that plays the part of the hub which `-m org/name` needs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use sha2::{Digest, Sha256};

/// Name of the one model on the hub.
pub(crate) const MODEL: &str = "org/tiny";
/// Its commit.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Files of at least so many bytes are stored elsewhere, under their SHA-256.
const LARGE: usize = 32 << 10;

/// How the hub behaves, and what it was asked. Tests change it between runs.
#[derive(Default)]
pub(crate) struct State {
    /// Content by name.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// Every request so far.
    pub(crate) requests: Vec<Request>,
    /// Close the connection after so many bytes of a large file, once.
    pub(crate) cut_after: Option<usize>,
    /// Go silent after so many bytes of a large file, once.
    pub(crate) stall_after: Option<usize>,
    /// Files only with this token.
    pub(crate) gate: Option<String>,
    /// Large files arrive with one wrong byte.
    pub(crate) damage: bool,
    /// The listing has names only.
    pub(crate) names_only: bool,
    /// Ranges are ignored.
    pub(crate) no_ranges: bool,
    /// The listing says that large files are this much larger.
    pub(crate) exaggerate: u64,
    /// Every answer is this status.
    pub(crate) broken: Option<u16>,
}

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) token: Option<String>,
}

/// A running server; it ends with the test process.
pub(crate) struct Hub {
    state: Arc<Mutex<State>>,
    port: u16,
}

impl Hub {
    /// Starts to serve some files.
    pub(crate) fn serve(files: &[(&str, &[u8])]) -> Self {
        let files = files
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        Self::start(files.collect())
    }

    /// Starts to serve a folder.
    pub(crate) fn serve_folder(folder: &Path) -> Self {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
        let files = entries.map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        });
        Self::start(files.collect())
    }

    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = State {
            files,
            ..State::default()
        };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // A client that went away is not the test's concern.
                std::thread::spawn(move || {
                    let _ = answer(stream, &state, port);
                });
            }
        });
        Self { state, port }
    }

    /// Value for `HF_ENDPOINT`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The requests since the last call.
    pub(crate) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a content: SHA-256 of large files; otherwise 40 digits, as Git's names have.
pub(crate) fn etag(bytes: &[u8]) -> String {
    let hash = sha256(bytes);
    if bytes.len() >= LARGE {
        hash
    } else {
        hash[..40].to_owned()
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ');
    let mut request = Request {
        method: words.next()?.to_owned(),
        path: words.next()?.to_owned(),
        range: None,
        token: None,
    };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value.to_owned()),
            "authorization" => request.token = Some(value.replace("Bearer ", "")),
            _ => {}
        }
    }
    Some(request)
}

fn answer(stream: TcpStream, state: &Mutex<State>, port: u16) -> Option<()> {
    let request = read_request(&stream)?;
    let mut state = state.lock().unwrap();
    state.requests.push(request.clone());
    if let Some(status) = state.broken {
        return head(&stream, status, &[], 0);
    }
    let path = request.path.as_str();
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{MODEL}/revision/")) {
        if !revision.starts_with("main?") {
            return head(&stream, 404, &[("X-Error-Code", "RevisionNotFound")], 0);
        }
        let text = listing(&state).to_string();
        head(&stream, 200, &[], text.len())?;
        return (&stream).write_all(text.as_bytes()).ok();
    }
    if let Some(hash) = path.strip_prefix("/cdn/") {
        let bytes = state
            .files
            .values()
            .find(|bytes| etag(bytes) == hash)?
            .clone();
        return send(stream, &request, &mut state, bytes);
    }
    let Some(file) = path.strip_prefix(&format!("/{MODEL}/resolve/{COMMIT}/")) else {
        return head(&stream, 404, &[("X-Error-Code", "RepoNotFound")], 0);
    };
    if state.gate.is_some() && state.gate != request.token {
        return head(&stream, 403, &[("X-Error-Code", "GatedRepo")], 0);
    }
    let Some(bytes) = state.files.get(file).cloned() else {
        return head(&stream, 404, &[("X-Error-Code", "EntryNotFound")], 0);
    };
    let (name, size) = (format!("\"{}\"", etag(&bytes)), bytes.len().to_string());
    if bytes.len() >= LARGE {
        let elsewhere = format!("http://localhost:{port}/cdn/{}", etag(&bytes));
        let headers = [
            ("Location", elsewhere.as_str()),
            ("X-Linked-Etag", &name),
            ("X-Linked-Size", &size),
            ("X-Repo-Commit", COMMIT),
            ("ETag", "\"something-else\""),
        ];
        return head(&stream, 302, &headers, 0);
    }
    if request.method == "HEAD" {
        let headers = [("ETag", name.as_str()), ("X-Repo-Commit", COMMIT)];
        return head(&stream, 200, &headers, bytes.len());
    }
    send(stream, &request, &mut state, bytes)
}

fn listing(state: &State) -> serde_json::Value {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let mut sibling = serde_json::json!({"rfilename": name});
        if !state.names_only {
            sibling["size"] = bytes.len().into();
            sibling["blobId"] = sha256(bytes)[..40].into();
            if bytes.len() >= LARGE {
                let size = bytes.len() as u64 + state.exaggerate;
                sibling["lfs"] = serde_json::json!({"sha256": sha256(bytes), "size": size});
            }
        }
        sibling
    };
    let siblings: Vec<_> = state.files.iter().map(sibling).collect();
    serde_json::json!({"id": MODEL, "sha": COMMIT, "siblings": siblings})
}

/// Sends a file, or what is left of it, with the misbehaviour that is asked for.
fn send(
    mut stream: TcpStream,
    request: &Request,
    state: &mut State,
    mut bytes: Vec<u8>,
) -> Option<()> {
    let size = bytes.len();
    let is_large = size >= LARGE;
    if is_large && state.damage {
        bytes[size / 2] ^= 1;
    }
    let range = request.range.as_deref().filter(|_| !state.no_ranges);
    let (from, to): (usize, usize) = match range {
        Some(range) => {
            let (from, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            let last = last.parse().unwrap_or(size - 1).min(size - 1);
            (from.parse().ok()?, last + 1)
        }
        None => (0, size),
    };
    let rest = &bytes[from..to];
    let content_range = format!("bytes {from}-{}/{size}", to - 1);
    match range {
        Some(_) => head(
            &stream,
            206,
            &[("Content-Range", &content_range)],
            rest.len(),
        )?,
        None => head(&stream, 200, &[], rest.len())?,
    }
    if let Some(n) = state.cut_after.take_if(|_| is_large) {
        return stream.write_all(&rest[..n]).ok();
    }
    if let Some(n) = state.stall_after.take_if(|_| is_large) {
        stream.write_all(&rest[..n]).ok()?;
        // Nobody waits for this thread; the connection stays open as long as it sleeps.
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(60));
            drop(stream);
        });
        return Some(());
    }
    stream.write_all(rest).ok()
}

fn head(
    mut stream: &TcpStream,
    status: u16,
    headers: &[(&str, &str)],
    length: usize,
) -> Option<()> {
    let mut text =
        format!("HTTP/1.1 {status} Some\r\nConnection: close\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    stream.write_all((text + "\r\n").as_bytes()).ok()
}
