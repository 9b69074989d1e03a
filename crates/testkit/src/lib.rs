//! Tiny checkpoints, golden files and tolerances for tests (dev-dependency only).
//!
//! - [`TinyMoe`] builds a random `qwen3_moe` checkpoint with a real tokenizer, in a temporary
//!   folder that disappears with the value.
//! - [`Golden`] reads the small reference files under `golden/`.
//! - [`assert_close`] compares values and names the worst one.
//!
//! The tidy test (`tests/tidy.rs`) checks the house rules of ARCHITECTURE.md.
#![forbid(unsafe_code)]

mod close;
mod golden;
mod random;
mod text;
mod tiny;

pub use close::assert_close;
pub use golden::{Golden, golden_dir};
pub use random::Random;
pub use text::{SAMPLE_TEXT, tiny_tokenizer_json};
pub use tiny::{TinyFolder, TinyMoe};
