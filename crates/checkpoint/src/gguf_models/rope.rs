//! Rotary positions of GGUF files: the keys `rope.*`, and factors that are stored as tensors.
//!
//! llama.cpp derives YaRN's factor on sines and cosines by itself and reads its betas for none of the architectures
//! here: 32 and 1 hold. Its correction range is rounded to whole dimensions.

use super::meta::Meta;
use crate::error::Result;
use crate::rope::{RopeConfig, RopeScaling};

/// One divisor per frequency, for the whole model.
const FACTORS: &str = "rope_freqs.weight";

/// The same in two lists, for texts up to the original context and beyond.
const SHORT: &str = "rope_factors_short.weight";
const LONG: &str = "rope_factors_long.weight";

/// Names of the tensors that are part of the rope.
pub(crate) const TENSORS: &[&str] = &[FACTORS, SHORT, LONG];

const KNOWN: &str = "known rope scaling types: none, linear, yarn, longrope";

/// The rope of the layers that see everything.
pub(super) fn read(meta: &Meta<'_>, dim: usize, interleaved: bool) -> Result<RopeConfig> {
    Ok(RopeConfig {
        theta: meta.number_opt("rope.freq_base")?.unwrap_or(10_000.0),
        dim,
        interleaved,
        scaling: scaling(meta)?,
    })
}

fn scaling(meta: &Meta<'_>) -> Result<RopeScaling> {
    let kind = meta.text_opt("rope.scaling.type")?.unwrap_or("linear");
    if kind == "longrope" || meta.tensor(LONG).is_some() {
        return long_rope(meta);
    }
    let factor = factor(meta)?;
    let scaling = match kind {
        "none" => RopeScaling::None,
        "linear" if factor == 1.0 => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "yarn" => RopeScaling::Yarn {
            factor,
            original: original(meta)? as f64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: yarn_attention_factor(meta, factor)?,
            truncate: true,
        },
        other => return Err(meta.unsupported("rope.scaling.type", other, KNOWN)),
    };
    let attn_factor = attention_factor(meta)?;
    if attn_factor != 1.0 && !matches!(scaling, RopeScaling::Yarn { .. }) {
        let reason = "a factor on sines and cosines is read with yarn and longrope only";
        return Err(meta.unsupported("rope.scaling.attn_factor", attn_factor, reason));
    }
    match (meta.values(FACTORS), &scaling) {
        (None, _) => Ok(scaling),
        (Some(factors), RopeScaling::None) => Ok(RopeScaling::Factors(factors)),
        (Some(_), _) => {
            let reason = format!("`{FACTORS}` stretches the frequencies already");
            Err(meta.unsupported("rope.scaling.type", kind, &reason))
        }
    }
}

/// How far the context is stretched, under its newer or older name.
fn factor(meta: &Meta<'_>) -> Result<f64> {
    let name = match meta.has("rope.scaling.factor") {
        true => "rope.scaling.factor",
        false => "rope.scale_linear",
    };
    let factor = meta.factor(name)?;
    if factor > 0.0 {
        return Ok(factor);
    }
    Err(meta.problem(name, format!("is {factor}, expected a positive number")))
}

/// Context of pre-training.
fn original(meta: &Meta<'_>) -> Result<usize> {
    match meta.size_opt("rope.scaling.original_context_length")? {
        Some(length) => Ok(length),
        None => meta.size("context_length"),
    }
}

fn attention_factor(meta: &Meta<'_>) -> Result<f64> {
    meta.factor("rope.scaling.attn_factor")
}

fn long_rope(meta: &Meta<'_>) -> Result<RopeScaling> {
    let list = |name: &str| meta.values(name).ok_or_else(|| meta.missing_tensor(name));
    let mscale = attention_factor(meta)?;
    Ok(RopeScaling::LongRope {
        short: list(SHORT)?,
        long: list(LONG)?,
        original: original(meta)?,
        short_mscale: mscale,
        long_mscale: mscale,
    })
}

/// The factor on sines and cosines.
fn yarn_attention_factor(meta: &Meta<'_>, factor: f64) -> Result<f64> {
    let derived = match log_multiplier(meta)? {
        // The published factors for sines and for scores are the same, so they cancel.
        Some(_) => 1.0,
        None => mscale(factor, 1.0),
    };
    Ok(derived * attention_factor(meta)?)
}

/// `mscale_all_dim` of DeepSeek, which files hold divided by ten. Only that architecture has it.
fn log_multiplier(meta: &Meta<'_>) -> Result<Option<f64>> {
    let stored = meta.number_opt("rope.scaling.yarn_log_multiplier")?;
    Ok(stored
        .filter(|value| *value != 0.0)
        .map(|value| value * 10.0))
}

/// What the scores of DeepSeek are multiplied by besides `1 / sqrt(head width)`.
pub(super) fn deepseek_score_factor(meta: &Meta<'_>) -> Result<f64> {
    let (kind, factor) = (meta.text_opt("rope.scaling.type")?, factor(meta)?);
    let outer = match kind {
        Some("none") => return Ok(1.0),
        Some("yarn") => yarn_attention_factor(meta, factor)?,
        _ => 1.0,
    };
    let all = outer * mscale(factor, log_multiplier(meta)?.unwrap_or(0.0));
    Ok(all * all)
}

/// The published scale of attention for a stretched context.
fn mscale(factor: f64, mscale: f64) -> f64 {
    match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * mscale * factor.ln() + 1.0,
    }
}
