//! How a command fails: exit code, message, and what to do about it.

use std::fmt;
use std::io::{ErrorKind, Write};

use crate::interrupt;

/// A failure with its own exit code or hint. Everything else exits with 1.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// The command was called wrongly; exit code 2.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            code: 2,
        }
    }

    /// The command could not do its work; exit code 1.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            code: 1,
        }
    }

    /// What was to be checked is not so; exit code 3.
    pub(crate) fn check(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            code: 3,
        }
    }

    /// Ctrl-C; exit code 130.
    pub(crate) fn interrupted() -> Self {
        Self {
            message: "interrupted".to_owned(),
            hint: None,
            code: interrupt::EXIT,
        }
    }

    /// The message and the hint, for a command that goes on after it.
    pub(crate) fn advice(&self) -> String {
        match &self.hint {
            Some(hint) => format!("{}; {hint}", self.message),
            None => self.message.clone(),
        }
    }

    /// Adds what the user can do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Prints `error` once on standard error, unless the reader of our output went away or the user
/// interrupted, and gives the exit code.
pub(crate) fn report(error: &anyhow::Error) -> u8 {
    if is_broken_pipe(error) {
        return 0;
    }
    let failure = error.downcast_ref::<Failure>();
    let code = failure.map_or(1, |failure| failure.code);
    if code == interrupt::EXIT {
        return code;
    }
    // Nowhere is left to complain when standard error itself fails.
    let _ = std::io::stderr().write_all(render(error).as_bytes());
    code
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.into_iter()
        .any(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// `error: ...`, then the causes that say something new, then the hint.
fn render(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}\n");
    let mut before = error.to_string();
    for cause in error.chain().skip(1) {
        let message = cause.to_string();
        if !before.contains(&message) {
            text += &format!("  caused by: {message}\n");
        }
        before = message;
    }
    if let Some(Failure {
        hint: Some(hint), ..
    }) = error.downcast_ref()
    {
        text += &format!("hint: {hint}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn causes_and_hints_are_printed_once() {
        let failure = Failure::new("no such expert").hint("pass 0 to 15");
        let error = anyhow::Error::from(failure).context("cannot steer: no such expert");
        assert_eq!(
            render(&error),
            "error: cannot steer: no such expert\nhint: pass 0 to 15\n"
        );
        let error: anyhow::Error = Failure::usage("b").into();
        let error = error.context("a");
        assert_eq!(render(&error), "error: a\n  caused by: b\n");
        let error = anyhow::anyhow!("b").context(Failure::new("a").hint("c"));
        assert_eq!(render(&error), "error: a\n  caused by: b\nhint: c\n");
    }

    #[test]
    fn codes_follow_the_contract() {
        assert_eq!(report(&Failure::interrupted().into()), 130);
        let pipe = std::io::Error::from(ErrorKind::BrokenPipe);
        let error = Err::<(), _>(pipe).context("writing").unwrap_err();
        assert_eq!(report(&error), 0);
    }
}
