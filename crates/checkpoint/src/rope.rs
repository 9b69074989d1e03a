//! Rotary positions: the keys that configure them, and the frequencies that follow.
//!
//! Rules: YaRN, Peng et al. 2023, arXiv 2309.00071; LongRoPE, Ding et al. 2024, arXiv 2402.13753; Llama 3.1's as
//! published with its code. Numbers follow transformers, which computes frequencies in f32.

use serde_json::Value;

use crate::error::Result;
use crate::keys::Keys;

/// The rotation of one kind of layer.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Values of a head that are rotated: its first ones.
    pub dim: usize,
    /// Pairs are neighbours `(2 i, 2 i + 1)`; otherwise `(i, i + dim / 2)`.
    pub interleaved: bool,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched beyond the context of pre-training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Long waves divided, short ones kept, those between blended.
    Llama3 {
        /// Divisor of long waves.
        factor: f64,
        /// Waves longer than `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Waves shorter than `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context of pre-training.
        original: f64,
    },
    /// A ramp between divided and kept frequencies.
    Yarn {
        /// Divisor of the interpolated frequencies.
        factor: f64,
        /// Context of pre-training.
        original: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Factor on sines and cosines.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// One divisor per frequency, another list beyond the original context.
    LongRope {
        /// Divisors up to `original` positions.
        short: Vec<f64>,
        /// Divisors beyond.
        long: Vec<f64>,
        /// Context of pre-training.
        original: usize,
        /// Factor on sines and cosines up to `original` positions.
        short_mscale: f64,
        /// Factor beyond.
        long_mscale: f64,
    },
    /// One stored divisor per frequency (GGUF `rope_freqs`).
    Factors(Vec<f64>),
}

/// Names of the scalings, as `rope_type` spells them.
const KNOWN: &str = "default, linear, llama3, yarn, longrope";

impl RopeConfig {
    /// The plain rotation of `dim` values in halves.
    #[must_use]
    pub fn plain(theta: f64, dim: usize) -> Self {
        Self {
            theta,
            dim,
            interleaved: false,
            scaling: RopeScaling::None,
        }
    }

    /// Reads `rope_parameters` (v5) or `rope_theta` and `rope_scaling` (v4). `head_dim` is the part of a head that
    /// can be rotated; `partial_rotary_factor` rotates its first part only.
    pub(crate) fn from_json(keys: &Keys, head_dim: usize) -> Result<Self> {
        let theta = rope_theta(keys)?;
        let nested = rope_map(keys)?;
        let partial = nested
            .as_ref()
            .and_then(|map| map.get("partial_rotary_factor"))
            .or_else(|| keys.get("partial_rotary_factor"));
        let dim = match partial.map(|value| (value, value.as_f64())) {
            None => head_dim,
            Some((_, Some(factor))) if factor > 0.0 && factor <= 1.0 => {
                (head_dim as f64 * factor) as usize
            }
            Some((value, _)) => {
                let problem = format!("is {value}, expected a number above 0 and at most 1");
                return Err(keys.problem("partial_rotary_factor", problem));
            }
        };
        let scaling = match &nested {
            Some(map) => RopeScaling::from_json(keys, map)?,
            None => RopeScaling::None,
        };
        if let Some(v4) = keys.object("rope_scaling")?
            && RopeScaling::from_json(keys, &v4)? != scaling
        {
            let problem = "does not say the same as rope_parameters".to_owned();
            return Err(keys.problem("rope_scaling", problem));
        }
        Ok(Self {
            theta,
            dim,
            interleaved: false,
            scaling,
        })
    }

    /// Relations that do not depend on the file; the key to blame and what is wrong with it.
    pub(crate) fn check(&self) -> std::result::Result<(), (&'static str, String)> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            let problem = format!("is {}, expected a positive number", self.theta);
            return Err(("rope_theta", problem));
        }
        let lists: Vec<(&'static str, &[f64])> = match &self.scaling {
            RopeScaling::LongRope { short, long, .. } => {
                vec![("short_factor", short), ("long_factor", long)]
            }
            RopeScaling::Factors(factors) => vec![("rope_freqs", factors)],
            _ => Vec::new(),
        };
        for (key, list) in lists {
            if list.len() != self.dim / 2 {
                let problem = format!("has {} values, expected {}", list.len(), self.dim / 2);
                return Err((key, problem));
            }
        }
        Ok(())
    }

    /// Frequencies `[dim / 2]` and the factor on sines and cosines, for a sequence of `n_positions`.
    #[must_use]
    pub fn frequencies(&self, n_positions: usize) -> (Vec<f32>, f32) {
        let plain = |i: usize| self.theta.powf(2.0 * i as f64 / self.dim as f64);
        let waves: Vec<f64> = (0..self.dim / 2).map(plain).collect();
        let (inverse, factor): (Vec<f64>, f64) = match &self.scaling {
            RopeScaling::None => (waves.iter().map(|w| 1.0 / w).collect(), 1.0),
            RopeScaling::Linear { factor } => {
                (waves.iter().map(|w| 1.0 / w / factor).collect(), 1.0)
            }
            RopeScaling::Factors(factors) => {
                let divided = waves.iter().zip(factors).map(|(w, f)| 1.0 / (w * f));
                (divided.collect(), 1.0)
            }
            RopeScaling::LongRope {
                short,
                long,
                original,
                short_mscale,
                long_mscale,
            } => {
                let (factors, mscale) = if n_positions > *original {
                    (long, long_mscale)
                } else {
                    (short, short_mscale)
                };
                let divided = waves.iter().zip(factors).map(|(w, f)| 1.0 / (w * f));
                (divided.collect(), *mscale)
            }
            RopeScaling::Llama3 { .. } => (
                waves.iter().map(|w| self.scaling.llama3(1.0 / w)).collect(),
                1.0,
            ),
            RopeScaling::Yarn {
                attention_factor, ..
            } => (self.yarn(&waves), *attention_factor),
        };
        (inverse.iter().map(|f| *f as f32).collect(), factor as f32)
    }

    /// Whether the frequencies depend on the length of the sequence, and from which length on.
    #[must_use]
    pub fn changes_beyond(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::LongRope { original, .. } => Some(*original),
            _ => None,
        }
    }

    fn yarn(&self, waves: &[f64]) -> Vec<f64> {
        let RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } = self.scaling
        else {
            return Vec::new();
        };
        let dim = self.dim as f64;
        let correction = |rotations: f64| {
            dim * (original / (rotations * 2.0 * std::f64::consts::PI)).ln()
                / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001; // as the reference does, against a division by zero
        }
        let blend = |(i, wave): (usize, &f64)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            ramp / (factor * wave) + (1.0 - ramp) / wave
        };
        waves.iter().enumerate().map(blend).collect()
    }
}

impl RopeScaling {
    /// One frequency stretched by the rule of Llama 3.1.
    fn llama3(&self, frequency: f64) -> f64 {
        let &Self::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original,
        } = self
        else {
            return frequency;
        };
        let wave = 2.0 * std::f64::consts::PI / frequency;
        if wave < original / high_freq_factor {
            return frequency;
        }
        if wave > original / low_freq_factor {
            return frequency / factor;
        }
        let smooth = (original / wave - low_freq_factor) / (high_freq_factor - low_freq_factor);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }

    /// Reads the object `map`; `keys` is the whole file.
    pub(crate) fn from_json(keys: &Keys, map: &Keys) -> Result<Self> {
        let kind = match map.get("rope_type").or_else(|| map.get("type")) {
            None => "default",
            Some(value) => value.as_str().ok_or_else(|| {
                map.problem("rope_type", format!("is {value}, expected a string"))
            })?,
        };
        match kind {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear {
                factor: map.positive("factor")?,
            }),
            "llama3" => Ok(Self::Llama3 {
                factor: map.positive("factor")?,
                low_freq_factor: map.positive("low_freq_factor")?,
                high_freq_factor: map.positive("high_freq_factor")?,
                original: original(keys, map)?,
            }),
            "yarn" => yarn(keys, map),
            "longrope" | "su" => long_rope(keys, map),
            other => Err(map.unsupported(
                "rope_type",
                &Value::from(other),
                &format!("known rope types: {KNOWN}"),
            )),
        }
    }
}

/// Context of pre-training: in the rope's own keys, at the top level, or the model's whole context.
fn original(keys: &Keys, map: &Keys) -> Result<f64> {
    const KEY: &str = "original_max_position_embeddings";
    if map.get(KEY).is_some() {
        // Implementations disagree on which of the two wins.
        if keys.get(KEY).is_some() && keys.number(KEY)? != map.number(KEY)? {
            let problem = format!("is {}, another value than {KEY} inside", keys.number(KEY)?);
            return Err(keys.problem(KEY, problem));
        }
        return map.positive(KEY);
    }
    if keys.get(KEY).is_some() {
        return keys.positive(KEY);
    }
    keys.positive("max_position_embeddings")
}

/// The published scale of attention for a stretched context.
pub(crate) fn mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

fn yarn(keys: &Keys, map: &Keys) -> Result<RopeScaling> {
    let original = original(keys, map)?;
    let factor = match map.get("factor") {
        Some(_) => map.positive("factor")?,
        None => keys.positive("max_position_embeddings")? / original,
    };
    let optional = |key: &str| {
        map.number_or(key, 0.0)
            .map(|value| (value != 0.0).then_some(value))
    };
    let attention_factor = match map.get("attention_factor") {
        Some(_) => map.positive("attention_factor")?,
        None => match (optional("mscale")?, optional("mscale_all_dim")?) {
            (Some(one), Some(all)) => mscale(factor, one) / mscale(factor, all),
            _ => mscale(factor, 1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        original,
        beta_fast: optional("beta_fast")?.unwrap_or(32.0),
        beta_slow: optional("beta_slow")?.unwrap_or(1.0),
        attention_factor,
        truncate: map.flag_or("truncate", true)?,
    })
}

fn long_rope(keys: &Keys, map: &Keys) -> Result<RopeScaling> {
    let original = original(keys, map)?;
    let factor = match map.get("factor") {
        Some(_) => map.positive("factor")?,
        None => keys.positive("max_position_embeddings")? / original,
    };
    let derived = if factor <= 1.0 {
        1.0
    } else {
        (1.0 + factor.ln() / original.ln()).sqrt()
    };
    let attention_factor = map.number_or("attention_factor", derived)?;
    Ok(RopeScaling::LongRope {
        short: map.numbers("short_factor")?,
        long: map.numbers("long_factor")?,
        original: original as usize,
        short_mscale: map.number_or("short_mscale", attention_factor)?,
        long_mscale: map.number_or("long_mscale", attention_factor)?,
    })
}

/// The nested object of either spelling; both may be there when they say the same.
fn rope_map(keys: &Keys) -> Result<Option<Keys>> {
    match keys.object("rope_parameters")? {
        Some(map) => Ok(Some(map)),
        None => keys.object("rope_scaling"),
    }
}

fn rope_theta(keys: &Keys) -> Result<f64> {
    let nested = ["rope_parameters", "rope_scaling"]
        .into_iter()
        .find_map(|key| keys.get(key)?.get("rope_theta"));
    match (nested, keys.get("rope_theta")) {
        (Some(nested), Some(flat)) if nested.as_f64() != flat.as_f64() => {
            let problem =
                format!("is {flat}, but inside of rope_parameters or rope_scaling it is {nested}");
            Err(keys.problem("rope_theta", problem))
        }
        (Some(value), _) | (None, Some(value)) => value
            .as_f64()
            .ok_or_else(|| keys.problem("rope_theta", format!("is {value}, expected a number"))),
        (None, None) => Err(keys.problem("rope_theta", "is missing".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<RopeConfig> {
        RopeConfig::from_json(&Keys::parse("c".to_owned(), json).unwrap(), 8)
    }

    #[test]
    fn plain_frequencies_and_both_spellings() {
        let v4 = parse(r#"{"rope_theta":10000,"rope_scaling":null}"#).unwrap();
        let v5 = parse(r#"{"rope_parameters":{"rope_theta":1e4,"rope_type":"default"}}"#).unwrap();
        assert_eq!(v4, v5);
        assert_eq!(v4.frequencies(10), (vec![1.0, 0.1, 0.01, 0.001], 1.0));
        let half = parse(r#"{"rope_theta":1e4,"partial_rotary_factor":0.5}"#).unwrap();
        assert_eq!(half.frequencies(10).0, [1.0, 0.01]);
    }

    #[test]
    fn linear_divides_and_llama3_keeps_short_waves() {
        let linear = parse(r#"{"rope_theta":1e4,"rope_scaling":{"type":"linear","factor":2}}"#);
        assert_eq!(linear.unwrap().frequencies(1).0, [0.5, 0.05, 0.005, 0.0005]);
        let llama = parse(
            r#"{"rope_theta":1e4,"max_position_embeddings":64,"rope_scaling":{"rope_type":"llama3","factor":4,
                "low_freq_factor":1,"high_freq_factor":4,"original_max_position_embeddings":100}}"#,
        )
        .unwrap();
        // Waves of 6.3, 62.8, 628 and 6283 positions; short below 25, long above 100, smooth = (100/62.8 - 1) / 3.
        let (f, _) = llama.frequencies(1);
        assert_eq!((f[0], f[2], f[3]), (1.0, 0.0025, 0.00025));
        let smooth = (100.0 / (20.0 * std::f64::consts::PI) - 1.0) / 3.0;
        let expected = (1.0 - smooth) * 0.025 + smooth * 0.1;
        assert!((f64::from(f[1]) - expected).abs() < 1e-7);
    }

    #[test]
    fn yarn_scales_attention_by_its_published_rule() {
        let yarn = parse(
            r#"{"rope_theta":1e4,"max_position_embeddings":400,"rope_scaling":{"rope_type":"yarn","factor":4,
                "original_max_position_embeddings":100}}"#,
        )
        .unwrap();
        let (_, factor) = yarn.frequencies(1);
        assert!((factor - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
        let deepseek = parse(
            r#"{"rope_theta":1e4,"max_position_embeddings":400,"rope_scaling":{"type":"yarn","factor":4,"mscale":1.0,
                "mscale_all_dim":1.0,"original_max_position_embeddings":100}}"#,
        )
        .unwrap();
        assert_eq!(deepseek.frequencies(1).1, 1.0);
    }

    #[test]
    fn long_rope_changes_beyond_its_original_context() {
        let text = r#"{"rope_theta":1e4,"max_position_embeddings":64,"original_max_position_embeddings":16,
            "rope_scaling":{"type":"longrope","short_factor":[1,1,1,1],"long_factor":[2,2,2,2],
            "short_mscale":1.5,"long_mscale":1.25}}"#;
        let rope = parse(text).unwrap();
        assert_eq!(rope.changes_beyond(), Some(16));
        assert_eq!(rope.frequencies(16), (vec![1.0, 0.1, 0.01, 0.001], 1.5));
        assert_eq!(rope.frequencies(17), (vec![0.5, 0.05, 0.005, 0.0005], 1.25));
    }

    #[test]
    fn unknown_types_list_the_known_ones() {
        let text = parse(r#"{"rope_theta":1,"rope_scaling":{"type":"dynamic","factor":2}}"#)
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("dynamic") && text.contains("longrope"),
            "{text}"
        );
        assert!(parse(r#"{"rope_theta":1,"rope_scaling":7}"#).is_err());
        assert!(parse("{}").unwrap_err().to_string().contains("rope_theta"));
    }
}
