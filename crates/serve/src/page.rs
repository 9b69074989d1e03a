//! The page at `/`: its files, which are part of the program, and what browsers are told about them.

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderValue, StatusCode};

/// Nothing but this server's own files, and no page around this one.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) path: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

const fn file(path: &'static str, kind: &'static str, bytes: &'static [u8]) -> File {
    File { path, kind, bytes }
}

/// All of them, each at its path.
pub(crate) const FILES: &[File] = &[
    file("/", HTML, include_bytes!("../web/index.html")),
    file("/style.css", CSS, include_bytes!("../web/style.css")),
    file("/icon.svg", SVG, include_bytes!("../web/icon.svg")),
    file("/main.js", SCRIPT, include_bytes!("../web/main.js")),
    file("/api.js", SCRIPT, include_bytes!("../web/api.js")),
    file("/chat.js", SCRIPT, include_bytes!("../web/chat.js")),
    file("/colours.js", SCRIPT, include_bytes!("../web/colours.js")),
    file("/files.js", SCRIPT, include_bytes!("../web/files.js")),
    file("/map.js", SCRIPT, include_bytes!("../web/map.js")),
    file("/markdown.js", SCRIPT, include_bytes!("../web/markdown.js")),
    file("/routing.js", SCRIPT, include_bytes!("../web/routing.js")),
    file("/stats.js", SCRIPT, include_bytes!("../web/stats.js")),
    file("/steering.js", SCRIPT, include_bytes!("../web/steering.js")),
    file("/store.js", SCRIPT, include_bytes!("../web/store.js")),
];

impl File {
    /// The answer to a request for it: the file, or that the browser has it already.
    pub(crate) fn answer(&self, headers: &HeaderMap) -> Response {
        let tag = self.tag();
        let known = headers
            .get(IF_NONE_MATCH)
            .and_then(|known| known.to_str().ok());
        let is_known = known.is_some_and(|known| known.contains(&tag));
        let bytes = match is_known {
            true => Bytes::new(),
            false => Bytes::from_static(self.bytes),
        };
        let mut response = Response::new(Body::from(bytes));
        if is_known {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
        }
        let headers = response.headers_mut();
        for (name, value) in [
            (CONTENT_TYPE, self.kind),
            // A new program may bring a new page: browsers ask, and are told that nothing changed.
            (CACHE_CONTROL, "no-cache"),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (REFERRER_POLICY, "no-referrer"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if let Ok(tag) = HeaderValue::from_str(&tag) {
            headers.insert(ETAG, tag);
        }
        response
    }

    /// FNV-1a of what is in it: enough to tell one version from the next.
    fn tag(&self) -> String {
        let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        let hash = self.bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix);
        format!("\"{hash:016x}\"")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use axum::body::HttpBody;

    use super::*;

    #[test]
    fn every_file_of_the_folder_is_served_and_small() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("web");
        let names = std::fs::read_dir(folder).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let on_disk: BTreeSet<String> = names
            .map(|name| format!("/{name}").replace("/index.html", "/"))
            .collect();
        let served: BTreeSet<String> = FILES.iter().map(|file| file.path.to_owned()).collect();
        assert_eq!(served, on_disk);
        let all: usize = FILES.iter().map(|file| file.bytes.len()).sum();
        assert!(all < 128 << 10, "{all} bytes");
    }

    /// The policy would forbid it, and nobody would notice before opening the page without a network.
    #[test]
    fn nothing_is_inline_or_from_elsewhere() {
        for file in FILES {
            let text = std::str::from_utf8(file.bytes).unwrap();
            for forbidden in [
                "https://",
                "<style",
                " style=\"",
                " onclick",
                "eval(",
                "innerHTML",
            ] {
                assert!(!text.contains(forbidden), "{}: {forbidden}", file.path);
            }
        }
    }

    #[test]
    fn a_browser_that_has_it_is_sent_nothing() {
        let page = &FILES[0];
        let first = page.answer(&HeaderMap::new());
        assert_eq!(first.status(), StatusCode::OK);
        let mut headers = HeaderMap::new();
        headers.insert(IF_NONE_MATCH, first.headers()[ETAG].clone());
        let again = page.answer(&headers);
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        assert_eq!(again.body().size_hint().exact(), Some(0));
    }
}
