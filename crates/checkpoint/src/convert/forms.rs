//! The two forms in which files hold the same model, and what remains different when a form cannot say everything.

use crate::config::{ModelConfig, NormKind, RouterConfig};
use crate::error::{CheckpointError, Result};
use crate::gguf_models::Target;
use crate::rope::{RopeConfig, RopeScaling};

/// Relative difference up to which numbers count as equal: files of GGUF hold them in 32 bits.
const TOLERANCE: f64 = 1e-6;

/// `config` as a GGUF file holds it: rope pairs and halves of latent attention as llama.cpp has them, norms plain.
///
/// # Errors
/// Latent attention whose rope pairs would have to be permuted.
pub(crate) fn gguf_form(
    origin: &str,
    target: &Target,
    config: &ModelConfig,
) -> Result<ModelConfig> {
    let mut form = config.clone();
    form.rope.interleaved = target.interleaved;
    if let Some(mla) = &mut form.attention.mla {
        if config.rope.interleaved != target.interleaved {
            return Err(CheckpointError::Unsupported {
                file: origin.to_owned(),
                key: "rope_interleave".to_owned(),
                value: "false".to_owned(),
                reason: "GGUF holds latent attention with neighbours rotated".to_owned(),
            });
        }
        mla.split_kv_b = true;
    }
    if form.norm == NormKind::RmsPlusOne {
        form.norm = NormKind::Rms;
    }
    if target.needs_output {
        form.tie_word_embeddings = false;
    }
    Ok(form)
}

/// `config` as a Hugging Face folder holds it.
pub(super) fn folder_form(config: &ModelConfig) -> ModelConfig {
    let mut form = config.clone();
    match &mut form.attention.mla {
        Some(mla) => mla.split_kv_b = false,
        None => form.rope.interleaved = false,
    }
    if form.model_type == "gemma3_text" {
        form.norm = NormKind::RmsPlusOne;
    }
    if let RopeScaling::Factors(factors) = &form.rope.scaling
        && let Some(llama3) = fit_llama3(&form.rope, factors)
    {
        form.rope.scaling = llama3;
    }
    form
}

/// Everything that `theirs` computes otherwise than `ours`, in words.
pub(super) fn differences(ours: &ModelConfig, theirs: &ModelConfig) -> Vec<String> {
    // Names every field, so that the compiler asks about a new one.
    let ModelConfig {
        model_type: _,
        vocab_size: _,
        hidden_size: _,
        n_layers: _,
        max_position_embeddings: _,
        tie_word_embeddings: _,
        lm_head_bias: _,
        norm: _,
        norm_eps: _,
        post_norms: _,
        n_heads: _,
        n_kv_heads: _,
        head_dim: _,
        attention: _,
        rope: _,
        local_rope: _,
        intermediate_size: _,
        mlp_bias: _,
        activation: _,
        moe: _,
        scales: _,
        eos_token_ids: _,
        bos_token_id: _,
        pad_token_id: _,
        dtype: _,
    } = ours;
    let mut list = Differences(Vec::new());
    list.rope("rope", &ours.rope, &theirs.rope);
    match (&ours.local_rope, &theirs.local_rope) {
        (Some(ours), Some(theirs)) => list.rope("rope of windows", ours, theirs),
        (Some(local), None) => list.rope("rope of windows", local, &theirs.rope),
        (None, Some(local)) => list.rope("rope of windows", &ours.rope, local),
        (None, None) => {}
    }
    let (a, b) = (&ours.attention, &theirs.attention);
    list.same("windows of attention", &a.windows, &b.windows);
    list.number("attention.scale", a.scale, b.scale);
    list.same("clip_qkv", &a.clip_qkv, &b.clip_qkv);
    list.same(
        "biases of attention",
        &(a.qkv_bias, a.o_bias),
        &(b.qkv_bias, b.o_bias),
    );
    list.same("norms of queries and keys", &a.qk_norm, &b.qk_norm);
    list.same("attention sinks", &a.sinks, &b.sinks);
    list.same("latent attention", &a.mla, &b.mla);
    list.same("experts of attention", &a.experts, &b.experts);
    list.same(
        "norm",
        &(ours.norm, ours.post_norms),
        &(theirs.norm, theirs.post_norms),
    );
    list.number("norm epsilon", ours.norm_eps, theirs.norm_eps);
    list.same("activation", &ours.activation, &theirs.activation);
    let (a, b) = (&ours.scales, &theirs.scales);
    list.number("embedding scale", a.embedding, b.embedding);
    list.number("residual scale", a.residual, b.residual);
    list.number("divisor of the logits", a.logits_divisor, b.logits_divisor);
    let sizes = |c: &ModelConfig| {
        [
            c.vocab_size,
            c.hidden_size,
            c.n_layers,
            c.n_heads,
            c.n_kv_heads,
            c.head_dim,
        ]
    };
    list.same("sizes", &sizes(ours), &sizes(theirs));
    list.same(
        "context length",
        &ours.max_position_embeddings,
        &theirs.max_position_embeddings,
    );
    if ours.has_dense_layers() || theirs.has_dense_layers() {
        list.same(
            "dense width",
            &ours.intermediate_size,
            &theirs.intermediate_size,
        );
    }
    list.same("biases of dense parts", &ours.mlp_bias, &theirs.mlp_bias);
    let head = |c: &ModelConfig| (c.tie_word_embeddings, c.lm_head_bias);
    list.same("output head", &head(ours), &head(theirs));
    let (a, b) = (&ours.moe, &theirs.moe);
    list.same("layers with experts", &a.layers, &b.layers);
    if !a.layers.is_empty() {
        let sizes = |m: &crate::MoeConfig| (m.n_experts, m.top_k, m.intermediate_size);
        list.same("experts", &sizes(a), &sizes(b));
        list.same("experts per layer", &a.uneven, &b.uneven);
        list.same("null experts", &a.n_null, &b.n_null);
        list.same("routing", &settled(a.router), &settled(b.router));
        list.same(
            "biases of experts",
            &(a.router_bias, a.expert_bias),
            &(b.router_bias, b.expert_bias),
        );
        list.same("shared expert", &a.shared, &b.shared);
        list.same("feed-forward beside experts", &a.residual, &b.residual);
        list.same("recurrent router", &a.recurrent_router, &b.recurrent_router);
        list.same(
            "router before the model",
            &a.decoupled_router,
            &b.decoupled_router,
        );
    }
    list.0
}

/// A router without settings that play no part.
fn settled(router: RouterConfig) -> RouterConfig {
    match router {
        RouterConfig::GroupLimited {
            score,
            n_groups: 1,
            norm,
            scale,
            correction_bias,
            ..
        } => RouterConfig::GroupLimited {
            score,
            n_groups: 1,
            keep_groups: 1,
            sum_of_best_two: false,
            norm,
            scale,
            correction_bias,
        },
        other => other,
    }
}

struct Differences(Vec<String>);

impl Differences {
    fn same<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, ours: &T, theirs: &T) {
        if ours != theirs {
            self.0
                .push(format!("{what}: {ours:?} here, {theirs:?} there"));
        }
    }

    fn number(&mut self, what: &str, ours: f64, theirs: f64) {
        if (ours - theirs).abs() > TOLERANCE * ours.abs() {
            self.0.push(format!("{what}: {ours} here, {theirs} there"));
        }
    }

    /// Ropes are the same when they rotate by the same angles.
    fn rope(&mut self, what: &str, ours: &RopeConfig, theirs: &RopeConfig) {
        let layout = |rope: &RopeConfig| (rope.dim, rope.interleaved, rope.changes_beyond());
        let mut same = layout(ours) == layout(theirs);
        let beyond = ours.changes_beyond().unwrap_or(0);
        for length in [1, beyond + 1] {
            let (ours, our_factor) = ours.frequencies(length);
            let (theirs, their_factor) = theirs.frequencies(length);
            let close = |a: f32, b: f32| {
                (f64::from(a) - f64::from(b)).abs() <= TOLERANCE * f64::from(a.abs())
            };
            same &= close(our_factor, their_factor)
                && ours.len() == theirs.len()
                && ours.iter().zip(&theirs).all(|(a, b)| close(*a, *b));
        }
        if !same {
            self.0
                .push(format!("{what}: {ours:?} here, {theirs:?} there"));
        }
    }
}

/// Llama 3.1's rule behind stored factors, if they follow it. The rule has the same result for all multiples of its
/// context and bounds together; the one with `low_freq_factor` 1 is given, as in all published models.
fn fit_llama3(rope: &RopeConfig, factors: &[f64]) -> Option<RopeScaling> {
    let largest = factors.iter().copied().fold(1.0, f64::max);
    let (plain, _) = RopeConfig::plain(rope.theta, rope.dim).frequencies(1);
    // Between the bounds, 1 / factor = (1 - s) / largest + s, where s is linear in the frequency.
    let blended: Vec<(f64, f64)> = factors
        .iter()
        .zip(&plain)
        .filter(|(factor, _)| **factor > 1.0001 && **factor < largest * 0.9999)
        .map(|(factor, plain)| {
            let s = (1.0 / factor - 1.0 / largest) / (1.0 - 1.0 / largest);
            (f64::from(*plain) / (2.0 * std::f64::consts::PI), s)
        })
        .collect();
    let candidate = match blended.as_slice() {
        // Nothing between the bounds: any bound between the last kept and the first divided frequency does.
        [] => {
            let kept = factors
                .iter()
                .zip(&plain)
                .filter(|(factor, _)| **factor < 1.0001);
            let kept = kept
                .map(|(_, plain)| f64::from(*plain))
                .fold(f64::INFINITY, f64::min);
            let divided = factors
                .iter()
                .zip(&plain)
                .filter(|(factor, _)| **factor >= 1.0001);
            let divided = divided
                .map(|(_, plain)| f64::from(*plain))
                .fold(0.0, f64::max);
            (
                1.001,
                (2.0 * std::f64::consts::PI / (kept * divided).sqrt()).round(),
            )
        }
        // One point leaves a choice; published models have 4.
        [(frequency, s)] => (4.0, ((3.0 * s + 1.0) / frequency).round()),
        [first, .., last] => {
            let slope = (first.1 - last.1) / (first.0 - last.0);
            let high = 1.0 + 1.0 / (slope * last.0 - last.1);
            ((high * 1e3).round() / 1e3, (slope * (high - 1.0)).round())
        }
    };
    let (high, original) = candidate;
    let scaling = RopeScaling::Llama3 {
        factor: largest,
        low_freq_factor: 1.0,
        high_freq_factor: high,
        original,
    };
    let fitted = RopeConfig {
        scaling: scaling.clone(),
        ..rope.clone()
    };
    if fitted.check().is_err() {
        return None;
    }
    let (fitted, _) = fitted.frequencies(1);
    let close = |((plain, fitted), factor): ((&f32, f32), &f64)| {
        (f64::from(*plain) / factor / f64::from(fitted) - 1.0).abs() < 1e-5
    };
    let mut pairs = plain.iter().zip(fitted).zip(factors);
    pairs.all(close).then_some(scaling)
}
