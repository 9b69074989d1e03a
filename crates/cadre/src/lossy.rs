//! Flags for lossy routing, which are off by default, and how outputs say that they are on.

use std::path::PathBuf;

use cadre_engine::{Lossy, MinWeight, PreferCached};
use serde::Serializer;

/// Rules that trade the model's own results for speed.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Lossy (other results than the model's own; all off by default)")]
#[group(id = "lossy", multiple = true)]
pub(crate) struct LossyArgs {
    /// Use only the best K experts per token.
    #[arg(long, value_name = "K")]
    top_k_experts: Option<usize>,
    /// Leave out experts whose weight is below T times the token's largest, T from 0 to 1.
    #[arg(long, value_name = "T")]
    min_expert_weight: Option<f32>,
    /// Keep at least so many of them.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        requires = "min_expert_weight"
    )]
    min_experts: usize,
    /// While generating, leave out an expert that is not in memory and has less than F / k of the token's weight, k
    /// being the experts per token; never the top one. Results then depend on what was read before.
    #[arg(long, value_name = "F", requires = "mem_budget")]
    drop_cold: Option<f32>,
    /// While generating, keep the best J experts, and replace others that are not in memory by the best that are among
    /// the router's first M. Results then depend on what was read before.
    #[arg(long, value_name = "J,M", value_parser = keep_among, requires = "mem_budget")]
    prefer_cached: Option<PreferCached>,
    /// While generating, compute an expert that is not in memory by its copy in this model, the same one in fewer bits,
    /// where it has little of the token's weight. Results then depend on what was read before.
    #[arg(long, value_name = "MODEL", requires = "mem_budget")]
    low_bit: Option<PathBuf>,
    /// How little: less than F / k, k being the experts per token; never the top one.
    #[arg(long, value_name = "F", default_value_t = 1.0, requires = "low_bit")]
    low_bit_below: f32,
}

fn keep_among(text: &str) -> Result<PreferCached, String> {
    let numbers = text.split_once(',').and_then(|(keep, among)| {
        Some(PreferCached {
            keep: keep.trim().parse().ok()?,
            among: among.trim().parse().ok()?,
        })
    });
    numbers.ok_or_else(|| "expected two whole numbers, such as 2,12".to_owned())
}

impl LossyArgs {
    /// What is asked for; of a model that is not streamed every expert is in memory, so that none is cold.
    pub(crate) fn options(&self, is_streamed: bool) -> Lossy {
        Lossy {
            top_k: self.top_k_experts,
            min_weight: self.min_expert_weight.map(|share| MinWeight {
                share,
                keep: self.min_experts,
            }),
            prefer_cached: self.prefer_cached.filter(|_| is_streamed),
            drop_cold: self.drop_cold.filter(|_| is_streamed),
            low_bit: self.low_bit(is_streamed).map(|_| self.low_bit_below),
        }
    }

    /// The model that has the copies in fewer bits, where there is use for them.
    pub(crate) fn low_bit(&self, is_streamed: bool) -> Option<&PathBuf> {
        self.low_bit.as_ref().filter(|_| is_streamed)
    }
}

/// `false`, or which rules are on, as in `"drop-cold=0.75"`.
pub(crate) fn serialize<S: Serializer>(lossy: &Lossy, serializer: S) -> Result<S::Ok, S::Error> {
    match lossy.is_none() {
        true => serializer.serialize_bool(false),
        false => serializer.collect_str(lossy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_numbers_are_read() {
        let wanted = PreferCached { keep: 2, among: 12 };
        assert_eq!(keep_among("2,12"), Ok(wanted));
        assert_eq!(keep_among("2, 12"), Ok(wanted));
        for text in ["2", "2,", "a,b", "-1,4"] {
            assert!(keep_among(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nothing_is_cold_in_memory() {
        let args = LossyArgs {
            drop_cold: Some(0.5),
            prefer_cached: keep_among("1,4").ok(),
            ..LossyArgs::default()
        };
        assert!(args.options(false).is_none());
        assert_eq!(
            args.options(true).to_string(),
            "prefer-cached=1,4 drop-cold=0.5"
        );
    }

    #[test]
    fn json_says_no_or_what() {
        let json = |lossy: &Lossy| serialize(lossy, serde_json::value::Serializer).unwrap();
        assert_eq!(json(&Lossy::default()), false);
        let lossy = Lossy {
            top_k: Some(4),
            ..Lossy::default()
        };
        assert_eq!(json(&lossy), "top-k-experts=4");
    }
}
