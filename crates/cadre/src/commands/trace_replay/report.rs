//! The result of `cadre trace replay`, as programs get it.

use cadre_store::predictors::Score;
use cadre_store::replay::Tally;
use serde::Serialize;

/// The document behind `-o json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) architecture: String,
    pub(super) digest: String,
    /// Layers that have experts.
    pub(super) n_layers: usize,
    pub(super) n_experts: usize,
    pub(super) top_k: usize,
    pub(super) n_tokens: usize,
    pub(super) n_sequences: usize,
    /// Of these, tokens of prompts.
    pub(super) n_prompt_tokens: u64,
    /// What bytes are: `bytes`, or `experts` where no model says how large they are.
    pub(super) unit: &'static str,
    /// Size of an expert and number of experts of that size.
    pub(super) sizes: Vec<(usize, usize)>,
    pub(super) total_bytes: u64,
    /// What a token reads without any cache.
    pub(super) bytes_per_token: f64,
    pub(super) results: Vec<Row>,
    pub(super) predictors: Vec<PredictorRow>,
    /// The policy of `ahead`.
    pub(super) ahead_policy: &'static str,
    /// Experts per layer in `ahead` at most.
    pub(super) read_ahead: usize,
    pub(super) ahead: Vec<AheadRow>,
}

/// One policy with one budget.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// A policy; `belady` for the bound, `ahead-N` for a router that knows N tokens.
    pub(super) policy: String,
    /// Of all experts, 0 to 1.
    pub(super) share: f64,
    pub(super) budget_bytes: u64,
    pub(super) n_slots: usize,
    pub(super) decode: Side,
    pub(super) prompt: Side,
    pub(super) evictions: u64,
    pub(super) refused: u64,
    /// Decoding: hit rate over that of the bound.
    pub(super) of_bound: f64,
}

/// Decoding, or prompts.
#[derive(Debug, Serialize)]
pub(super) struct Side {
    pub(super) hit_rate: f64,
    pub(super) bytes_read_per_token: f64,
    lookups: u64,
    hits: u64,
    bytes_read: u64,
}

impl From<&Tally> for Side {
    fn from(tally: &Tally) -> Self {
        Self {
            hit_rate: tally.hit_rate(),
            bytes_read_per_token: tally.bytes_per_token(),
            lookups: tally.lookups,
            hits: tally.hits,
            bytes_read: tally.bytes_read,
        }
    }
}

/// How good a way of guessing is.
#[derive(Debug, Serialize)]
pub(super) struct PredictorRow {
    pub(super) predictor: &'static str,
    /// Share of the picks.
    pub(super) overlap: f64,
    /// Share of the tokens whose picks in a layer were all guessed.
    pub(super) whole_sets: f64,
    /// `overlap` of every layer.
    pub(super) layers: Vec<f64>,
}

impl From<&Score> for PredictorRow {
    fn from(score: &Score) -> Self {
        let overall = score.overall();
        Self {
            predictor: score.name,
            overlap: overall.overlap(),
            whole_sets: overall.whole_sets(),
            layers: score.layers.iter().map(|layer| layer.overlap()).collect(),
        }
    }
}

/// What reading ahead brings with one budget.
#[derive(Debug, Serialize)]
pub(super) struct AheadRow {
    pub(super) predictor: &'static str,
    /// Of all experts, 0 to 1.
    pub(super) share: f64,
    /// Share of the misses that had been read ahead.
    pub(super) misses_covered: f64,
    /// Bytes that were read for nothing, over those of the misses.
    pub(super) more_bytes: f64,
    pub(super) reads: u64,
    pub(super) useful: u64,
    pub(super) bytes_wasted: u64,
}
