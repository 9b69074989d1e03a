//! Flags that say how tokens are drawn, shared by the commands that generate.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use anyhow::Result;
use cadre_engine::SamplingOptions;

use crate::failure::Failure;

/// How tokens are drawn.
#[derive(Debug, clap::Args)]
pub(crate) struct SamplingArgs {
    /// Temperature; 0 always takes the most probable token.
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.8,
        allow_negative_numbers = true
    )]
    temp: f32,
    /// Draw from this many of the most probable tokens; 0 turns it off.
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Draw from the most probable tokens that have this much probability together; 1 is off.
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.95,
        allow_negative_numbers = true
    )]
    top_p: f32,
    /// Draw from tokens at least this probable relative to the most probable one; 0 is off.
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.05,
        allow_negative_numbers = true
    )]
    min_p: f32,
    /// Make tokens that occurred less probable; 1 is off.
    #[arg(
        long,
        value_name = "R",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    repeat_penalty: f32,
    /// Seed of the draws; without it, every run differs.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The options.
    ///
    /// # Errors
    /// A value that makes no sense; exit code 2.
    pub(crate) fn options(&self) -> Result<SamplingOptions> {
        let options = SamplingOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            // A new hasher is seeded by the operating system.
            seed: self
                .seed
                .unwrap_or_else(|| RandomState::new().build_hasher().finish()),
        };
        options
            .check()
            .map_err(|error| Failure::usage(error.to_string()))?;
        Ok(options)
    }
}
