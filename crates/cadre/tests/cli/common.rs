//! What the command-line tests share: running the built binary and reading what it says.

use std::path::Path;
use std::process::{Command, Output};

use cadre_testkit::{TinyFolder, TinyMoe};

/// The binary, without colours and without a network, whatever the environment of the test says.
pub(crate) fn cadre(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cadre"));
    command
        .args(args)
        .env("NO_COLOR", "1")
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HUB_CACHE", "/no/such/cache")
        .env_remove("RUST_LOG");
    command
}

/// Runs to the end with an empty standard input.
pub(crate) fn output(args: &[&str]) -> Output {
    cadre(args)
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a run that must succeed.
pub(crate) fn stdout(args: &[&str]) -> String {
    let output = output(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// JSON on standard output of a run that must succeed.
pub(crate) fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// Exit code and standard error of a run that must fail with exactly one error.
pub(crate) fn failure(args: &[&str]) -> (i32, String) {
    let output = output(args);
    let errors = String::from_utf8(output.stderr).unwrap();
    let n_errors = errors
        .lines()
        .filter(|line| line.starts_with("error: "))
        .count();
    assert_eq!(n_errors, 1, "{args:?}: {errors}");
    assert!(!errors.contains("panicked"), "{args:?}: {errors}");
    (output.status.code().unwrap(), errors)
}

/// A tiny checkpoint.
pub(crate) fn tiny() -> TinyFolder {
    TinyMoe::default().build().unwrap()
}

/// A path as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}
