//! How a download shows that it moves: a bar on a terminal, otherwise a line every few seconds.

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::env::Env;
use crate::output::bytes;

const EVERY: Duration = Duration::from_secs(5);

/// Progress of one download, over all its files.
pub(super) struct Progress {
    what: String,
    total: u64,
    /// What was here before counts as done, and not for the rate.
    before: u64,
    done: u64,
    start: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

/// Says something on standard error, terminal or not.
pub(super) fn say(text: &str) {
    // A message is not worth failing for.
    let _ = writeln!(std::io::stderr(), "{text}");
}

impl Progress {
    /// Starts to count to `total` bytes, `before` of which are here.
    pub(super) fn new(env: &Env, what: String, total: u64, before: u64) -> Self {
        let now = Instant::now();
        let bar = env.stderr_is_terminal.then(|| {
            let template =
                "{wide_bar} {percent} % of {binary_total_bytes} {binary_bytes_per_sec} ETA {eta}";
            let style = ProgressStyle::with_template(template);
            let bar = ProgressBar::new(total);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_position(before);
            bar.reset_eta();
            bar
        });
        Self {
            what,
            total,
            before,
            done: before,
            start: now,
            last_line: now,
            bar,
        }
    }

    /// `n` more bytes are here.
    pub(super) fn add(&mut self, n: u64) {
        self.done = (self.done + n).min(self.total);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        } else if self.last_line.elapsed() >= EVERY {
            self.last_line = Instant::now();
            say(&self.line(self.start.elapsed()));
        }
    }

    /// `n` bytes turned out to be of no use.
    pub(super) fn take_back(&mut self, n: u64) {
        self.done = self.done.saturating_sub(n);
        self.before = self.before.min(self.done);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        }
    }

    /// Says something without tearing the bar apart.
    pub(super) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(text)),
            None => say(text),
        }
    }

    fn line(&self, elapsed: Duration) -> String {
        let seconds = elapsed.as_secs_f64().max(1e-3);
        let rate = (self.done - self.before) as f64 / seconds;
        let percent = 100.0 * self.done as f64 / self.total.max(1) as f64;
        let left = self.total.saturating_sub(self.done) as f64 / rate.max(1.0);
        format!(
            "{}: {percent:.0} % of {}, {}/s, {} left",
            self.what,
            bytes(self.total),
            bytes(rate as u64),
            HumanDuration(Duration::from_secs(left as u64))
        )
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        let now = Instant::now();
        let progress = Progress {
            what: "a/b".to_owned(),
            total: 400 << 20,
            before: 100 << 20,
            done: 200 << 20,
            start: now,
            last_line: now,
            bar: None,
        };
        assert_eq!(
            progress.line(Duration::from_secs(10)),
            "a/b: 50 % of 400.00 MiB, 10.00 MiB/s, 20 seconds left"
        );
    }
}
