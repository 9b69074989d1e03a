//! Flags for lossy routing, which are off by default, and how outputs say that they are on.

use std::fmt;
use std::path::PathBuf;

use cadre_engine::{Lossy, ModelInfo, PreferCached};
use serde::{Serialize, Serializer};

/// Rules that trade the model's own results for speed.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Lossy (other results than the model's own; all off by default)")]
#[group(id = "lossy", multiple = true)]
pub(crate) struct LossyArgs {
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

/// What outputs say of rules that make results others than the model's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Said(Option<String>);

impl Said {
    /// What is on in a model.
    pub(crate) fn of(info: &ModelInfo) -> Self {
        let (steering, lossy) = (&info.steering, &info.lossy);
        let steering = (!steering.is_empty()).then(|| steering.to_string());
        Self(steering).and((!lossy.is_none()).then(|| lossy.to_string()))
    }

    /// And what else is.
    pub(crate) fn and(self, more: Option<String>) -> Self {
        let all: Vec<String> = [self.0, more].into_iter().flatten().collect();
        Self((!all.is_empty()).then(|| all.join(" ")))
    }

    /// The rules, if any are on.
    pub(crate) fn rules(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

/// `no`, or the rules as in `top-k-experts=4 drop-cold=0.75`.
impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rules().unwrap_or("no"))
    }
}

/// `false`, or the rules as text.
impl Serialize for Said {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.rules() {
            None => serializer.serialize_bool(false),
            Some(rules) => serializer.serialize_str(rules),
        }
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
        let json = |said: &Said| serde_json::to_value(said).unwrap();
        assert_eq!(json(&Said::default()), false);
        assert_eq!(Said::default().to_string(), "no");
        let said = Said::default()
            .and(None)
            .and(Some("top-k-experts=4".to_owned()));
        assert_eq!(json(&said), "top-k-experts=4");
        let said = said.and(Some("drop-cold=1".to_owned()));
        assert_eq!(said.to_string(), "top-k-experts=4 drop-cold=1");
    }
}
