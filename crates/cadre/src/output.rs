//! Standard output, colour, and progress on standard error.

use std::io::{self, BufWriter, StdoutLock, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::env::Env;

/// Form of the result on standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One JSON document for programs.
    Json,
}

/// When to use colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Even into a file or a pipe.
    Always,
    /// Not at all.
    Never,
}

impl ColorChoice {
    /// Whether standard output gets colour.
    pub(crate) fn on_stdout(self, env: &Env) -> bool {
        match self {
            Self::Auto => env.allows_color && env.stdout_is_terminal,
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// Buffered standard output. Errors say what failed; a broken pipe is recognised by `failure`.
pub(crate) struct Out {
    inner: BufWriter<StdoutLock<'static>>,
}

impl Out {
    /// Locks standard output.
    pub(crate) fn new() -> Self {
        Self {
            inner: BufWriter::new(io::stdout().lock()),
        }
    }

    /// Writes text as it is.
    pub(crate) fn write(&mut self, text: &str) -> Result<()> {
        self.inner
            .write_all(text.as_bytes())
            .context("cannot write to standard output")
    }

    /// Writes text and shows it at once.
    pub(crate) fn write_now(&mut self, text: &str) -> Result<()> {
        self.write(text)?;
        self.finish()
    }

    /// Writes one JSON document and a line end.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.inner, value)
            .map_err(io::Error::from)
            .context("cannot write to standard output")?;
        self.write("\n")
    }

    /// Flushes; must be the last call of a command, because dropping hides errors.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.inner
            .flush()
            .context("cannot write to standard output")
    }
}

/// Generated text without control characters, which could steer a terminal; line breaks and tabs
/// stay.
pub(crate) fn harmless(text: &str) -> String {
    let is_harmful = |c: char| c.is_control() && c != '\n' && c != '\t';
    text.replace(is_harmful, "\u{fffd}")
}

/// A bar over `n_steps` of `what`, on standard error and only on a terminal.
pub(crate) fn bar(env: &Env, what: &'static str, n_steps: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(n_steps), target(env));
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {per_sec} ETA {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what);
    bar
}

/// A bar over `n_bytes` of `what`, on standard error and only on a terminal.
pub(crate) fn bytes_bar(env: &Env, n_bytes: u64, what: String) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(n_bytes), target(env));
    let template =
        "{msg} {wide_bar} {percent} % of {binary_total_bytes} {binary_bytes_per_sec} ETA {eta}";
    let style = ProgressStyle::with_template(template);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what);
    bar
}

/// A spinner for work of unknown length.
pub(crate) fn spinner(env: &Env, what: String) -> ProgressBar {
    // Without a style of its own it would be drawn as a bar of no length, without the text.
    let spinner = ProgressBar::with_draw_target(None, target(env))
        .with_style(ProgressStyle::default_spinner());
    spinner.set_message(what);
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

/// Lines on standard error that were asked for.
pub(crate) fn say(text: &str) {
    // Nothing is left to tell about it where standard error is closed.
    let _ = writeln!(io::stderr(), "{text}");
}

/// A line for people on standard error; left out when nobody watches.
pub(crate) fn note(env: &Env, text: &str) {
    if env.stderr_is_terminal {
        // A note is not worth failing for.
        let _ = writeln!(io::stderr(), "{text}");
    }
}

fn target(env: &Env) -> ProgressDrawTarget {
    if env.stderr_is_terminal {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}

/// `1234567` as `1.23 M`, in steps of 1000.
pub(crate) fn count(n: u64) -> String {
    scaled(n as f64, 1000.0, &["", " k", " M", " G", " T"])
}

/// Bytes in steps of 1024.
pub(crate) fn bytes(n: u64) -> String {
    scaled(n as f64, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB"])
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    if unit == 0 {
        format!("{value}{}", units[0])
    } else {
        format!("{value:.2}{}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(count(999), "999");
        assert_eq!(count(3_300_000_000), "3.30 G");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(12), "12 B");
    }

    #[test]
    fn text_cannot_steer_the_terminal() {
        assert_eq!(harmless("a\tb\n\u{1b}[2J\u{e9}"), "a\tb\n\u{fffd}[2J\u{e9}");
    }
}
