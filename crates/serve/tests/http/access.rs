//! Keys, and web pages of other origins.

use crate::client::{get, send};
use crate::setup::Setup;

#[test]
fn a_key_opens_everything_but_health() {
    let setup = Setup::with(|options| options.keys = vec!["secret".to_owned()]);
    let address = setup.address();
    assert_eq!(get(address, "/health").status, 200);
    let refused = get(address, "/v1/models");
    assert_eq!(refused.error().0, 401);
    assert_eq!(refused.field("www-authenticate"), Some("Bearer"));
    let with = |field: &str| send(address, "GET", "/v1/models", &[field], b"").status;
    assert_eq!(with("Authorization: Bearer secret"), 200);
    assert_eq!(with("x-api-key: secret"), 200);
    assert_eq!(with("Authorization: Bearer secre"), 401);
    // Refused before the body is sent.
    let slow = ["Content-Length: 1000"];
    assert_eq!(
        send(address, "GET", "/metrics", &slow, b"").status,
        400,
        "two lengths"
    );
    setup.end();
}

#[test]
fn pages_ask_only_from_where_they_may() {
    let setup = Setup::with(|options| options.origins = vec!["https://app.example".to_owned()]);
    let address = setup.address();
    let preflight = send(
        address,
        "OPTIONS",
        "/v1/chat/completions",
        &[
            "Origin: https://app.example",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: content-type, authorization",
        ],
        b"",
    );
    assert_eq!(preflight.status, 204);
    assert_eq!(
        preflight.field("access-control-allow-origin"),
        Some("https://app.example")
    );
    assert_eq!(
        preflight.field("access-control-allow-headers"),
        Some("content-type, authorization")
    );
    let answer = send(
        address,
        "GET",
        "/v1/models",
        &["Origin: https://app.example"],
        b"",
    );
    assert_eq!(
        answer.field("access-control-allow-origin"),
        Some("https://app.example")
    );
    // Its errors can be read, too.
    let error = send(
        address,
        "GET",
        "/nowhere",
        &["Origin: https://app.example"],
        b"",
    );
    assert_eq!(
        error.field("access-control-allow-origin"),
        Some("https://app.example")
    );
    let other = send(
        address,
        "GET",
        "/v1/models",
        &["Origin: https://evil.example"],
        b"",
    );
    assert_eq!(other.error().0, 403);
    assert_eq!(other.field("access-control-allow-origin"), None);
    // A name that was made to lead to this machine.
    let renamed = send(address, "GET", "/v1/models", &["Host: evil.example"], b"");
    assert_eq!(renamed.error().0, 403);
    setup.end();
    let closed = Setup::new();
    let answer = send(closed.address(), "GET", "/v1/models", &[], b"");
    assert_eq!((answer.status, answer.field("vary")), (200, None));
    closed.end();
}
