//! The built binary on tiny checkpoints: what commands print, how they fail, and how they stop.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests")]

mod bad_input;
mod bench;
mod cadre_moe;
mod chat;
#[cfg(feature = "train")]
mod claims;
mod commands;
mod common;
mod dense;
mod eval;
mod factor;
mod fit;
mod hub;
mod hub_server;
mod inspect;
#[cfg(unix)]
mod interrupt;
#[cfg(target_os = "linux")]
mod limits;
mod lossy;
mod nano;
mod other_format;
mod plan_steer;
mod quantize;
mod reshape;
#[cfg(unix)]
mod serve;
mod steer;
mod streaming;
#[cfg(feature = "train")]
mod train;
