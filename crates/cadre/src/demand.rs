//! What running a model takes of memory, and what decoding takes of bandwidth.

use cadre_checkpoint::{ModelConfig, kv_bytes_per_token, scratch_bytes};
use cadre_engine::{KvFormats, SessionOptions};
use serde::Serialize;

/// The program itself: code, threads, buffers of input and output.
const PROGRAM: u64 = 64 << 20;

/// A parsed tokenizer, per token of its vocabulary: spellings, merges and the tables over them.
const TOKENIZER_PER_TOKEN: u64 = 1024;

/// Memory of a model with one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Demand {
    /// Tokens of context.
    pub(crate) n_ctx: usize,
    /// All weights.
    pub(crate) weights_bytes: u64,
    /// Key and value cache of the whole context.
    pub(crate) kv_bytes: u64,
    /// Buffers of a session.
    pub(crate) scratch_bytes: u64,
    /// The program and the tokenizer, estimated.
    pub(crate) program_bytes: u64,
    /// The sum.
    pub(crate) needed_bytes: u64,
}

impl Demand {
    /// Of a model whose weights take `weights_bytes`, with a session of `n_ctx` tokens whose cache is `kv`.
    pub(crate) fn new(
        config: &ModelConfig,
        weights_bytes: u64,
        n_ctx: usize,
        kv: KvFormats,
    ) -> Self {
        let kv_bytes = kv_bytes_per_token(config, kv).saturating_mul(n_ctx as u64);
        let scratch_bytes = scratch_bytes(config, n_ctx, SessionOptions::default().chunk);
        let program_bytes = PROGRAM + TOKENIZER_PER_TOKEN * config.vocab_size as u64;
        let parts = [kv_bytes, scratch_bytes, program_bytes];
        Self {
            n_ctx,
            weights_bytes,
            kv_bytes,
            scratch_bytes,
            program_bytes,
            needed_bytes: parts.into_iter().fold(weights_bytes, u64::saturating_add),
        }
    }

    /// The longest context, up to the limit of the model, with which the demand is at most `budget`.
    pub(crate) fn longest_context(
        config: &ModelConfig,
        weights_bytes: u64,
        budget: u64,
        kv: KvFormats,
    ) -> Option<usize> {
        let fits = |n_ctx| Self::new(config, weights_bytes, n_ctx, kv).needed_bytes <= budget;
        // The demand grows with the context, so halving finds the border.
        let (mut fitting, mut limit) = (0, config.max_position_embeddings);
        while fitting < limit {
            let middle = limit - (limit - fitting) / 2;
            if fits(middle) {
                fitting = middle;
            } else {
                limit = middle - 1;
            }
        }
        (fitting > 0).then_some(fitting)
    }
}

/// The context that a session gets: what was asked for, or the usual one.
pub(crate) fn context(config: &ModelConfig, wanted: Option<usize>) -> usize {
    let options = SessionOptions {
        n_ctx: wanted,
        ..SessionOptions::default()
    };
    options.context(config.max_position_embeddings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;

    #[test]
    fn the_longest_context_is_the_last_that_fits() {
        let checkpoint = embedded::open().unwrap();
        let config = checkpoint.config();
        let kv = KvFormats::default();
        let needed = |n_ctx| Demand::new(config, 1 << 20, n_ctx, kv).needed_bytes;
        let longest = |budget| Demand::longest_context(config, 1 << 20, budget, kv);
        assert_eq!(longest(needed(300)), Some(300));
        assert_eq!(longest(needed(300) - 1), Some(299));
        assert_eq!(longest(u64::MAX), Some(config.max_position_embeddings));
        assert_eq!(longest(needed(1) - 1), None);
        let parts = Demand::new(config, 1 << 20, 10, kv);
        let sum = parts.weights_bytes + parts.kv_bytes + parts.scratch_bytes + parts.program_bytes;
        assert_eq!(parts.needed_bytes, sum);
    }
}
