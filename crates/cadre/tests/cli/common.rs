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

/// Logits of a few tokens.
pub(crate) fn logits(model: &Path, more: &[&str]) -> serde_json::Value {
    let tokens = "5,17,200,3,99,7,8";
    let args = ["logits", "-m", arg(model), "--tokens", tokens, "-o", "json"];
    json(&[&args[..], more].concat())
}

/// Records what `model` makes of `data`.
pub(crate) fn trace([model, data, output]: [&Path; 3], more: &[&str]) {
    let args = [
        "trace",
        "-m",
        arg(model),
        "--data",
        arg(data),
        "-o",
        arg(output),
    ];
    stdout(&[&args[..], more].concat());
}

/// Peak resident bytes of a run that must succeed, as the kernel accounts them at its end.
#[cfg(target_os = "linux")]
pub(crate) fn peak_rss(command: &mut Command) -> u64 {
    use std::io::Read;
    use std::process::Stdio;

    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // A process keeps its peak until it is waited for, but the file about it is gone with its memory. So the peak is
    // sampled while it runs, up to its end.
    let path = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes =
            line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        peak = peak.max(1024 * kilobytes.unwrap_or(0));
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(child.wait().unwrap().success());
    peak
}
