//! The one binary: reads argv and the environment, runs one command, prints, and sets the exit code.
//!
//! Exit codes: 0 done, 1 failed, 2 called wrongly, 3 a check failed, 130 interrupted.
#![forbid(unsafe_code)]

mod bench;
mod cache;
mod chat;
mod cli;
mod commands;
mod contrast;
mod data;
mod demand;
mod dense;
mod describe;
mod disk;
mod embedded;
mod env;
mod experts;
mod failure;
mod forecast;
mod hub;
mod interrupt;
mod live;
mod lossy;
mod machine;
mod memory;
mod model;
mod output;
mod pace;
mod sampling;
mod steer;
mod streaming;
mod units;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(failure::report(&error)),
    }
}
