//! Every environment variable that Cadre reads, and the state of the terminal.

use std::io::IsTerminal;

/// The environment, read once at the start.
#[derive(Debug, Clone)]
pub(crate) struct Env {
    /// `RUST_LOG`: filter of log lines; overrides `-v`.
    pub(crate) rust_log: Option<String>,
    /// Whether colour may be used at all: `NO_COLOR` is unset or empty, and `TERM` is not `dumb`.
    pub(crate) allows_color: bool,
    /// `COLORTERM` promises 24-bit colour.
    pub(crate) true_color: bool,
    /// Columns of the terminal; 80 when it is none.
    pub(crate) width: usize,
    /// Whether standard output is a terminal.
    pub(crate) stdout_is_terminal: bool,
    /// Whether standard error is a terminal.
    pub(crate) stderr_is_terminal: bool,
    /// Whether standard input is a terminal.
    pub(crate) stdin_is_terminal: bool,
}

impl Env {
    /// Reads the environment of the process.
    pub(crate) fn read() -> Self {
        Self {
            rust_log: var("RUST_LOG"),
            allows_color: var("NO_COLOR").is_none() && var("TERM").as_deref() != Some("dumb"),
            true_color: matches!(var("COLORTERM").as_deref(), Some("truecolor" | "24bit")),
            width: terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0)),
            stdout_is_terminal: std::io::stdout().is_terminal(),
            stderr_is_terminal: std::io::stderr().is_terminal(),
            stdin_is_terminal: std::io::stdin().is_terminal(),
        }
    }
}

/// A variable that is set and not empty.
fn var(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "this file is the one place")]
    let value = std::env::var(name);
    value.ok().filter(|value| !value.is_empty())
}
