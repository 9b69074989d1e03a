//! The hub's HTTP interface, as far as reading models needs it.

use std::fs;
use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::Body;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response};
use ureq::tls::{RootCerts, TlsConfig};

use super::reference::{HubRef, is_path};
use crate::env::{HubEnv, Secret};
use crate::failure::Failure;

/// A server that is silent for this long is gone.
const SILENCE: Duration = Duration::from_secs(30);
/// More text than any list of files has.
const MAX_LISTING: u64 = 64 << 20;
const MAX_REDIRECTS: usize = 5;

/// Talks to one hub.
pub(super) struct Client {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<Secret>,
}

/// A request that did not give what was asked for.
#[derive(Debug)]
pub(super) enum Fault {
    /// Trying again may help: the connection broke, or the server is busy.
    Transient(String),
    /// It will not.
    Final(Failure),
}

/// The files of one commit.
#[derive(Debug)]
pub(super) struct Listing {
    /// The commit.
    pub(super) commit: String,
    /// All files.
    pub(super) files: Vec<Remote>,
}

/// One file on the hub.
#[derive(Debug, Clone)]
pub(super) struct Remote {
    /// Path in the repository.
    pub(super) name: String,
    /// Size and name of the content, when the listing has them.
    pub(super) content: Option<Content>,
}

/// What a file contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    /// Bytes.
    pub(super) size: u64,
    /// SHA-256 of large files, otherwise Git's name for the content.
    pub(super) etag: String,
}

impl Content {
    /// The SHA-256 that the bytes must have, when it is known.
    pub(super) fn sha256(&self) -> Option<&str> {
        (self.etag.len() == 64).then_some(self.etag.as_str())
    }
}

impl Client {
    /// Prepares for requests; makes none.
    pub(super) fn new(env: &HubEnv) -> Self {
        let tls = TlsConfig::builder().root_certs(RootCerts::WebPki).build();
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("cadre/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .proxy(env.proxy.clone())
            .tls_config(tls)
            .build()
            .new_agent();
        let stored = || {
            let text = fs::read_to_string(env.token_file.as_ref()?).ok()?;
            let token = text.trim();
            (!token.is_empty()).then(|| Secret(token.to_owned()))
        };
        Self {
            agent,
            endpoint: env.endpoint.clone(),
            token: env.token.clone().or_else(stored),
        }
    }

    /// The files of a revision.
    pub(super) fn listing(&self, wanted: &HubRef) -> Result<Listing, Fault> {
        let revision = encoded(wanted.revision(), "");
        let (endpoint, repo) = (&self.endpoint, &wanted.repo);
        let url = format!("{endpoint}/api/models/{repo}/revision/{revision}?blobs=true");
        let mut response = self.call(self.agent.get(&url))?;
        if !response.status().is_success() {
            return Err(self.refusal(wanted, "", &response));
        }
        let body = response.body_mut().with_config().limit(MAX_LISTING);
        let text = body
            .read_to_string()
            .map_err(|error| transient(&url, &error))?;
        parse_listing(&text).map_err(|reason| {
            let message = format!("{url} does not answer like a Hugging Face hub: {reason}");
            Fault::Final(Failure::new(message).hint("check HF_ENDPOINT"))
        })
    }

    /// Size and name of a file's content, for hubs whose listing lacks them.
    pub(super) fn content(
        &self,
        wanted: &HubRef,
        commit: &str,
        file: &str,
    ) -> Result<Content, Fault> {
        let mut url = self.file_url(wanted, commit, file);
        for _ in 0..MAX_REDIRECTS {
            // The redirect to the storage knows less than the answer that redirects, so it is not
            // followed; one to another name of the repository is.
            let request = self.agent.head(&url).config().max_redirects(0).build();
            let response = self.call(request)?;
            let location = header(response.headers(), "location");
            match location.filter(|to| to.starts_with('/')) {
                Some(to) if response.status().is_redirection() => {
                    url = format!("{}{to}", origin(&url))
                }
                _ if response.status().is_client_error() || response.status().is_server_error() => {
                    return Err(self.refusal(wanted, file, &response));
                }
                _ => {
                    let found = content_of(response.headers());
                    return found.ok_or_else(|| {
                        let message = format!("{url} has no ETag or no size");
                        Fault::Final(Failure::new(message).hint("check HF_ENDPOINT"))
                    });
                }
            }
        }
        Err(Fault::Final(Failure::new(format!(
            "{url} redirects too often"
        ))))
    }

    /// Starts to read a file at `from`, up to `to` if that is given; says where the answer really starts.
    pub(super) fn read(
        &self,
        wanted: &HubRef,
        commit: &str,
        file: &str,
        (from, to): (u64, Option<u64>),
    ) -> Result<(u64, impl Read + use<>), Fault> {
        let url = self.file_url(wanted, commit, file);
        let mut request = self.agent.get(&url);
        let range = match to {
            Some(to) => Some(format!("bytes={from}-{}", to.saturating_sub(1))),
            None => (from > 0).then(|| format!("bytes={from}-")),
        };
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        let response = self.call(request)?;
        let start = match response.status().as_u16() {
            200 => 0,
            206 => range_start(response.headers()).unwrap_or(from),
            _ => return Err(self.refusal(wanted, file, &response)),
        };
        if start != 0 && start != from {
            let message = format!("{url}: asked for the bytes from {from}, got them from {start}");
            return Err(Fault::Final(Failure::new(message)));
        }
        Ok((start, response.into_body().into_reader()))
    }

    fn file_url(&self, wanted: &HubRef, commit: &str, file: &str) -> String {
        let file = encoded(file, "/");
        format!("{}/{}/resolve/{commit}/{file}", self.endpoint, wanted.repo)
    }

    fn call(
        &self,
        mut request: ureq::RequestBuilder<ureq::typestate::WithoutBody>,
    ) -> Result<Response<Body>, Fault> {
        if let Some(Secret(token)) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        request
            .call()
            .map_err(|error| transient(&self.endpoint, &error))
    }

    /// What an answer without the wanted content means.
    fn refusal(&self, wanted: &HubRef, file: &str, response: &Response<Body>) -> Fault {
        let code = header(response.headers(), "x-error-code").unwrap_or_default();
        let status = response.status();
        let (endpoint, repo) = (&self.endpoint, &wanted.repo);
        let failure = match (code, status.as_u16()) {
            ("GatedRepo", _) | (_, 403) => self.gated(repo),
            ("RevisionNotFound", _) => {
                Failure::new(format!("{repo} has no revision `{}`", wanted.revision()))
            }
            ("EntryNotFound", _) => Failure::new(format!("{repo} has no file `{file}`")),
            ("RepoNotFound", _) | (_, 401 | 404) => self.unknown(repo, status.as_u16()),
            (_, 408 | 429 | 500..) => {
                return Fault::Transient(format!("{endpoint} answers {status}"));
            }
            _ => {
                let more = header(response.headers(), "x-error-message").unwrap_or_default();
                Failure::new(format!("{endpoint} answers {status} for {repo} {more}"))
            }
        };
        Fault::Final(failure)
    }

    fn gated(&self, repo: &str) -> Failure {
        let (endpoint, token) = (&self.endpoint, self.about_token());
        Failure::new(format!(
            "{repo} is gated: only accounts that accepted its conditions may read it"
        ))
        .hint(format!(
            "accept them at {endpoint}/{repo}, then set HF_TOKEN to a token of that account{token}"
        ))
    }

    fn unknown(&self, repo: &str, status: u16) -> Failure {
        let (endpoint, token) = (&self.endpoint, self.about_token());
        Failure::new(format!(
            "{endpoint} answers {status} for {repo}: there is no such model, or it is private"
        ))
        .hint(format!(
            "check the spelling; for a private model set HF_TOKEN{token}"
        ))
    }

    fn about_token(&self) -> &'static str {
        if self.token.is_some() {
            " (the present token has no access)"
        } else {
            " (none is set)"
        }
    }
}

fn transient(url: &str, error: &ureq::Error) -> Fault {
    Fault::Transient(format!("cannot reach {url}: {error}"))
}

fn parse_listing(text: &str) -> Result<Listing, String> {
    #[derive(Deserialize)]
    struct Info {
        sha: String,
        siblings: Vec<Sibling>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Sibling {
        rfilename: String,
        size: Option<u64>,
        blob_id: Option<String>,
        lfs: Option<Lfs>,
    }
    #[derive(Deserialize)]
    struct Lfs {
        sha256: String,
        size: u64,
    }
    let info: Info = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if !super::cache::is_commit(&info.sha) {
        return Err(format!("`{}` is not a commit", info.sha));
    }
    let file = |sibling: Sibling| {
        if !is_path(&sibling.rfilename) {
            return Err(format!("`{}` is not the name of a file", sibling.rfilename));
        }
        let known = match (sibling.lfs, sibling.blob_id, sibling.size) {
            (Some(lfs), ..) => Some((lfs.size, lfs.sha256)),
            (None, Some(id), Some(size)) => Some((size, id)),
            _ => None,
        };
        let content = known.filter(|(_, etag)| is_etag(etag));
        Ok(Remote {
            name: sibling.rfilename,
            content: content.map(|(size, etag)| Content { size, etag }),
        })
    };
    Ok(Listing {
        commit: info.sha,
        files: info
            .siblings
            .into_iter()
            .map(file)
            .collect::<Result<_, _>>()?,
    })
}

fn content_of(headers: &HeaderMap) -> Option<Content> {
    let either = |name: &str, other: &str| header(headers, name).or_else(|| header(headers, other));
    let etag = either("x-linked-etag", "etag")?;
    let etag = etag.trim_start_matches("W/").trim_matches('"');
    let size = either("x-linked-size", "content-length")?.parse().ok()?;
    is_etag(etag).then(|| Content {
        size,
        etag: etag.to_owned(),
    })
}

/// Whether this can be the name of a file in the cache.
fn is_etag(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (8..=128).contains(&text.len()) && text.bytes().all(is_plain)
}

/// First byte of `bytes 5-9/10`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let range = header(headers, "content-range")?.strip_prefix("bytes ")?;
    range.split_once('-')?.0.trim().parse().ok()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// `https://host/a/b` without the path.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find('/').map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Percent-encodes all but letters, digits, `-._~` and what is in `also`.
fn encoded(text: &str, also: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) || also.contains(c) {
            out.push(c);
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_carry_sizes_and_names_of_contents() {
        let sha = "a".repeat(40);
        let text = format!(
            r#"{{"sha":"{sha}","private":false,"siblings":[
            {{"rfilename":"config.json","size":10,"blobId":"{sha}"}},
            {{"rfilename":"m.gguf","size":7,"blobId":"{sha}","lfs":{{"sha256":"{}","size":99,"pointerSize":7}}}},
            {{"rfilename":"x/y.txt"}}]}}"#,
            "b".repeat(64)
        );
        let listing = parse_listing(&text).unwrap();
        let content = |at: usize| listing.files[at].content.clone();
        assert_eq!(listing.commit, sha);
        assert_eq!(content(0).unwrap().size, 10);
        assert_eq!(content(0).unwrap().sha256(), None);
        let large = content(1).unwrap();
        assert_eq!((large.size, large.sha256()), (99, Some(&*"b".repeat(64))));
        assert_eq!(content(2), None);
    }

    #[test]
    fn hostile_listings_are_refused() {
        let sha = "a".repeat(40);
        for text in [
            "<html>".to_owned(),
            r#"{"sha":"../x","siblings":[]}"#.to_owned(),
            format!(r#"{{"sha":"{sha}","siblings":[{{"rfilename":"../../x"}}]}}"#),
            format!(r#"{{"sha":"{sha}","siblings":[{{"rfilename":"/etc/x"}}]}}"#),
        ] {
            assert!(parse_listing(&text).is_err(), "{text}");
        }
        let text = format!(
            r#"{{"sha":"{sha}","siblings":[{{"rfilename":"a","size":1,"blobId":"../../../evil"}}]}}"#
        );
        assert_eq!(parse_listing(&text).unwrap().files[0].content, None);
    }

    #[test]
    fn headers_are_understood() {
        let mut headers = HeaderMap::new();
        assert_eq!(content_of(&headers), None);
        let set = |headers: &mut HeaderMap, name: &'static str, value: &str| {
            headers.insert(name, value.parse().unwrap());
        };
        set(&mut headers, "etag", "W/\"0123456789\"");
        set(&mut headers, "content-length", "5");
        let etag = "0123456789".to_owned();
        assert_eq!(content_of(&headers), Some(Content { size: 5, etag }));
        set(&mut headers, "x-linked-etag", "\"abcdefghij\"");
        set(&mut headers, "x-linked-size", "50");
        let etag = "abcdefghij".to_owned();
        assert_eq!(content_of(&headers), Some(Content { size: 50, etag }));
        set(&mut headers, "content-range", "bytes 7-9/10");
        assert_eq!(range_start(&headers), Some(7));
    }

    #[test]
    fn addresses_are_taken_apart_and_encoded() {
        assert_eq!(origin("https://host:1/a/b"), "https://host:1");
        assert_eq!(origin("https://host"), "https://host");
        assert_eq!(encoded("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(encoded("a b/\u{e9}#.json", "/"), "a%20b/%C3%A9%23.json");
    }
}
