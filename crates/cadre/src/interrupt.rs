//! Ctrl-C: at once when there is nothing to clean up, else at the next safe point.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};

use crate::failure::Failure;

/// Exit code of an interrupted program.
pub(crate) const EXIT: u8 = 130;

/// Shared between the signal handler and the commands.
#[derive(Clone)]
pub(crate) struct Interrupt {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    requested: AtomicBool,
    guards: AtomicUsize,
}

impl Interrupt {
    /// Installs the handler. Without a guard Ctrl-C ends the process; under a guard the first
    /// Ctrl-C only asks, and the second ends it.
    pub(crate) fn install() -> Result<Self> {
        let state = Arc::new(State::default());
        let seen = Arc::clone(&state);
        ctrlc::set_handler(move || {
            let again = seen.requested.swap(true, Ordering::SeqCst);
            if again || seen.guards.load(Ordering::SeqCst) == 0 {
                restore_terminal();
                std::process::exit(i32::from(EXIT));
            }
        })
        .context("cannot install the Ctrl-C handler")?;
        Ok(Self { state })
    }

    /// While the guard lives, the command polls [`Interrupt::check`] and cleans up by itself.
    pub(crate) fn guard(&self) -> Guard {
        self.state.guards.fetch_add(1, Ordering::SeqCst);
        Guard {
            state: Arc::clone(&self.state),
        }
    }

    /// Whether Ctrl-C was pressed.
    pub(crate) fn requested(&self) -> bool {
        self.state.requested.load(Ordering::SeqCst)
    }

    /// Whether Ctrl-C was pressed; forgets it, for a command that goes on after it.
    pub(crate) fn take(&self) -> bool {
        self.state.requested.swap(false, Ordering::SeqCst)
    }

    /// An error that leads to exit code 130 once Ctrl-C was pressed.
    pub(crate) fn check(&self) -> Result<()> {
        if self.requested() {
            Err(Failure::interrupted().into())
        } else {
            Ok(())
        }
    }
}

/// See [`Interrupt::guard`].
pub(crate) struct Guard {
    state: Arc<State>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.state.guards.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Ends colours on both streams. Failure is not worth a message on the way out.
fn restore_terminal() {
    const RESET: &[u8] = b"\x1b[0m\x1b[?25h\n";
    if std::io::stdout().is_terminal() {
        let _ = std::io::stdout()
            .write_all(RESET)
            .and_then(|()| std::io::stdout().flush());
    } else if std::io::stderr().is_terminal() {
        let _ = std::io::stderr().write_all(RESET);
    }
}
