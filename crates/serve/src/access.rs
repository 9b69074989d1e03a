//! Who may ask: keys, web pages of other origins, and names that a local server is not called by.

use std::net::IpAddr;

use axum::body::Body;
use axum::response::Response;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS, AUTHORIZATION, HOST, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, StatusCode};

use crate::api::error::{ApiError, Result};
use crate::schedule::Client;

/// The rules.
pub(crate) struct Access {
    /// None lets everybody in.
    keys: Vec<String>,
    /// Origins whose pages may ask; `*` for all.
    origins: Vec<String>,
    /// Only this machine can reach the server, so a name from the network is somebody's trick.
    is_local: bool,
}

impl Access {
    pub(crate) fn new(keys: Vec<String>, origins: Vec<String>, address: IpAddr) -> Self {
        Self {
            keys,
            origins,
            is_local: address.is_loopback(),
        }
    }

    /// Refuses web pages that may not ask. A browser tells where a page is from, and sends simple requests of any page,
    /// to any address; without this check every page that is open somewhere could use a local server.
    pub(crate) fn check_origin(&self, headers: &HeaderMap) -> Result<()> {
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        if self.is_local
            && let Some(host) = host
            && !is_local_name(host)
            && !self.knows(host)
        {
            let message = format!(
                "the server listens for this machine alone, but was asked for as `{}`; use localhost, or start it with --host, or with --cors-origin and that name",
                host.chars().take(100).collect::<String>()
            );
            return Err(ApiError::new(StatusCode::FORBIDDEN, message));
        }
        let Some(origin) = headers.get(ORIGIN) else {
            return Ok(());
        };
        let origin = origin.to_str().unwrap_or_default();
        let is_own =
            host.is_some_and(|host| origin.split_once("://").is_some_and(|(_, own)| own == host));
        if is_own || self.allows(origin) {
            return Ok(());
        }
        let shown: String = origin.chars().take(100).collect();
        let message =
            format!("pages of {shown} may not ask; start the server with --cors-origin {shown}");
        Err(ApiError::new(StatusCode::FORBIDDEN, message))
    }

    /// Whether an origin that is allowed has this name.
    fn knows(&self, host: &str) -> bool {
        let has = |allowed: &String| {
            allowed == "*"
                || allowed
                    .split_once("://")
                    .is_some_and(|(_, name)| name == host)
        };
        self.origins.iter().any(has)
    }

    fn allows(&self, origin: &str) -> bool {
        let is_it = |allowed: &String| allowed == "*" || allowed == origin;
        self.origins.iter().any(is_it)
    }

    /// Finds whose key it is.
    pub(crate) fn check_key(&self, headers: &HeaderMap) -> Result<Option<usize>> {
        if self.keys.is_empty() {
            return Ok(None);
        }
        let bearer = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        });
        let plain = || headers.get("x-api-key").and_then(|key| key.to_str().ok());
        let Some(key) = bearer.or_else(plain) else {
            let message = "this server wants a key: send `Authorization: Bearer KEY`";
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, message));
        };
        // All are compared, whichever it is.
        let same = |known: &String| is_same(known.as_bytes(), key.as_bytes());
        let matches: Vec<bool> = self.keys.iter().map(same).collect();
        match matches.iter().position(|same| *same) {
            Some(index) => Ok(Some(index)),
            None => {
                let error = ApiError::new(StatusCode::UNAUTHORIZED, "the key is not known here");
                Err(error.code("invalid_api_key"))
            }
        }
    }

    /// For whom a request is done.
    pub(crate) fn client(&self, headers: &HeaderMap, address: IpAddr) -> Client {
        match self.check_key(headers) {
            Ok(Some(index)) => Client::Key(index),
            Ok(None) | Err(_) => Client::Address(address),
        }
    }

    /// Lets pages of allowed origins read the answer.
    pub(crate) fn share(&self, origin: Option<&HeaderValue>, response: &mut Response) {
        if self.origins.is_empty() {
            return;
        }
        let headers = response.headers_mut();
        headers.append(VARY, HeaderValue::from_static("origin"));
        let allowed = origin.filter(|origin| origin.to_str().is_ok_and(|text| self.allows(text)));
        if let Some(origin) = allowed {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        }
    }

    /// The answer to a browser that asks whether a page may ask.
    pub(crate) fn preflight(&self, headers: &HeaderMap) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let wanted = headers.get(ACCESS_CONTROL_REQUEST_HEADERS).cloned();
        let out = response.headers_mut();
        let methods = HeaderValue::from_static("GET, POST");
        out.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        out.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        if let Some(wanted) = wanted {
            out.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted);
        }
        response
    }
}

/// Whether a `Host` is an address or `localhost`, with a port or without.
fn is_local_name(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok()
}

/// Compares in a time that tells nothing about where they differ.
fn is_same(known: &[u8], given: &[u8]) -> bool {
    let differ = known
        .iter()
        .zip(given)
        .fold(0, |differ, (a, b)| differ | (a ^ b));
    known.len() == given.len() && std::hint::black_box(differ) == 0
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    fn access(keys: &[&str], origins: &[&str], address: [u8; 4]) -> Access {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Access::new(owned(keys), owned(origins), IpAddr::from(address))
    }

    #[test]
    fn keys_are_needed_where_there_are_some() {
        let open = access(&[], &[], [127, 0, 0, 1]);
        assert_eq!(open.check_key(&headers(&[])), Ok(None));
        let closed = access(&["alpha", "beta"], &[], [127, 0, 0, 1]);
        let key = |name, value| closed.check_key(&headers(&[(name, value)]));
        assert_eq!(key("authorization", "Bearer beta"), Ok(Some(1)));
        assert_eq!(key("authorization", "bearer  alpha"), Ok(Some(0)));
        assert_eq!(key("x-api-key", "alpha"), Ok(Some(0)));
        for (name, value) in [
            ("authorization", "Bearer alph"),
            ("authorization", "Bearer "),
            ("authorization", "Basic alpha"),
            ("x-api-key", "alphabeta"),
            ("accept", "*/*"),
        ] {
            assert_eq!(
                key(name, value).unwrap_err().status().as_u16(),
                401,
                "{value}"
            );
        }
    }

    #[test]
    fn pages_of_others_may_not_ask() {
        let closed = access(&[], &[], [127, 0, 0, 1]);
        let check = |fields: &[_]| closed.check_origin(&headers(fields)).is_ok();
        assert!(check(&[("host", "localhost:8080")]));
        assert!(check(&[("host", "[::1]:8080")]) && check(&[("host", "127.0.0.1")]));
        assert!(check(&[("host", "a:1"), ("origin", "http://a:1")]) == check(&[("host", "a:1")]));
        assert!(check(&[
            ("host", "localhost:1"),
            ("origin", "http://localhost:1")
        ]));
        assert!(!check(&[
            ("host", "localhost:1"),
            ("origin", "http://evil.example")
        ]));
        assert!(!check(&[("host", "localhost:1"), ("origin", "null")]));
        // A name that was made to lead here.
        assert!(!check(&[
            ("host", "evil.example"),
            ("origin", "http://evil.example")
        ]));
        // Behind a proxy that passes names on.
        let named = access(&[], &["https://app.example"], [127, 0, 0, 1]);
        assert!(
            named
                .check_origin(&headers(&[("host", "app.example")]))
                .is_ok()
        );
        assert!(
            named
                .check_origin(&headers(&[("host", "evil.example")]))
                .is_err()
        );
        let shared = access(&[], &["https://app.example"], [0, 0, 0, 0]);
        let check = |fields: &[_]| shared.check_origin(&headers(fields)).is_ok();
        assert!(check(&[
            ("host", "any.example"),
            ("origin", "https://app.example")
        ]));
        assert!(!check(&[
            ("host", "any.example"),
            ("origin", "http://app.example")
        ]));
        assert!(access(&[], &["*"], [0, 0, 0, 0]).allows("https://anything"));
    }
}
