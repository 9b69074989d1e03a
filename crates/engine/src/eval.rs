//! Evaluation over token sequences: how well a model predicts text, and how likely one text is after another.
//!
//! **Windows.** A document of `n` tokens has `n - 1` predictions: every token but the first. They are cut
//! into windows that read at most `window` tokens; a window starts `stride` tokens after the one before
//! it and counts only the predictions that earlier windows have not. With `stride = window` (the default)
//! each token is read once and sees up to `window` tokens before it; a smaller stride costs
//! `window / stride` times as much and gives every counted token at least `window - stride` tokens of
//! context (except at the start of a document). Every prediction is counted exactly once either way. A document's last window
//! may begin earlier than that, so that its few predictions get as much context as others.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use cadre_kernels::{Kernels, KvFormats};

use crate::error::{EngineError, Result};
use crate::model::{Logits, Model, NoObserver};
use crate::session::{Session, SessionOptions};

/// Logits that are in memory at once, 128 MiB of them: they limit the chunk where the vocabulary is large.
const MAX_LOGITS: usize = 32 << 20;

/// A tokenised text and the domain that its score counts for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Name of the domain.
    pub domain: String,
    /// The text as tokens, with a leading begin token if the model wants one.
    pub tokens: Vec<u32>,
}

/// How documents are cut; see the module's description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Windows {
    /// Most tokens that one window reads.
    pub window: usize,
    /// Tokens between the starts of two windows, 1 to `window`.
    pub stride: usize,
    /// The last window of a document begins so early that it reads `window` tokens too, as lm_eval's rolling likelihood does.
    pub fills_last: bool,
}

/// Predictions and what they cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Number of predicted tokens.
    pub n_tokens: u64,
    /// Sum of the negative log likelihoods, in nats.
    pub nll_sum: f64,
}

impl Score {
    /// Mean nats per token; NaN for no tokens.
    pub fn nll(&self) -> f64 {
        self.nll_sum / self.n_tokens as f64
    }

    /// `exp(nll)`; NaN for no tokens.
    pub fn perplexity(&self) -> f64 {
        self.nll().exp()
    }

    fn add(&mut self, other: Score) {
        self.n_tokens += other.n_tokens;
        self.nll_sum += other.nll_sum;
    }
}

/// Scores in all and by domain.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Perplexity {
    /// Over all documents.
    pub total: Score,
    /// By domain. A domain whose documents are all shorter than two tokens has no predictions.
    pub domains: BTreeMap<String, Score>,
}

/// Scores `documents`, with keys and values stored as `kv` says. `progress` hears of every window: predictions so far and in all; when it breaks,
/// the scores so far are returned.
///
/// # Errors
/// A window longer than the model's context, a stride out of range, or any error of the model.
pub fn perplexity(
    model: &dyn Model,
    documents: &[Document],
    windows: Windows,
    kv: KvFormats,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Perplexity> {
    check(windows)?;
    let vocab = model.info().vocab_size;
    let defaults = SessionOptions::default();
    let options = SessionOptions {
        n_ctx: Some(windows.window),
        chunk: model
            .info()
            .lossy
            .chunk(defaults.chunk.min((MAX_LOGITS / vocab.max(1)).max(1))),
        kv,
    };
    let mut session = model.session(&options)?;
    let chunk = session.chunk();
    let kernels = model.compute().kernels();
    let n_total = documents
        .iter()
        .map(|d| d.tokens.len().saturating_sub(1) as u64)
        .sum();
    let mut result = Perplexity::default();
    for document in documents {
        let domain = result.domains.entry(document.domain.clone()).or_default();
        for window in cut(document.tokens.len(), windows) {
            session.rewind(0);
            let mut score = Score::default();
            // By chunks, so that only the logits of one chunk are in memory.
            for from in (window.from..window.to).step_by(chunk) {
                let to = window.to.min(from + chunk);
                // Context that is not counted needs no logits.
                let want = if to > window.counted_from {
                    Logits::All
                } else {
                    Logits::None
                };
                let inputs = &document.tokens[from..to];
                let logits = model.forward(&mut session, inputs, want, &mut NoObserver)?;
                for (i, row) in logits.chunks_exact_mut(vocab).enumerate() {
                    if from + i >= window.counted_from {
                        let target = document.tokens[from + i + 1];
                        score.add(prediction(kernels, model, row, target)?);
                    }
                }
            }
            domain.add(score);
            result.total.add(score);
            if progress(result.total.n_tokens, n_total).is_break() {
                return Ok(result);
            }
        }
    }
    Ok(result)
}

/// Reads inputs `from..to`; the predictions made at `counted_from..to` count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    from: usize,
    to: usize,
    counted_from: usize,
}

fn cut(n_tokens: usize, windows: Windows) -> impl Iterator<Item = Window> {
    let n_inputs = n_tokens.saturating_sub(1);
    let mut from = 0;
    let mut counted = 0;
    std::iter::from_fn(move || {
        if counted >= n_inputs {
            return None;
        }
        let to = n_inputs.min(from + windows.window);
        let reaches_back = windows.fills_last && to == n_inputs;
        let window = Window {
            from: match reaches_back {
                true => from.min(to.saturating_sub(windows.window)),
                false => from,
            },
            to,
            counted_from: counted,
        };
        counted = to;
        from += windows.stride;
        Some(window)
    })
}

fn check(windows: Windows) -> Result<()> {
    if windows.stride == 0 || windows.stride > windows.window {
        return Err(EngineError::BadOption {
            name: "stride",
            value: windows.stride.to_string(),
            expected: format!("1 to the window of {}", windows.window),
        });
    }
    Ok(())
}

/// Negative log likelihood of `target` under the softmax of `row`, which is overwritten.
fn prediction(kernels: Kernels, model: &dyn Model, row: &mut [f32], target: u32) -> Result<Score> {
    let Some(logit) = row.get(target as usize).copied() else {
        return Err(EngineError::UnknownToken {
            token: target,
            vocab_size: model.info().vocab_size,
        });
    };
    let nll = log_sum(kernels, row) - f64::from(logit);
    Ok(Score {
        n_tokens: 1,
        nll_sum: nll,
    })
}

/// Log likelihood in nats of the tokens `continuation` after the tokens `context`. `read` are the tokens that the session
/// holds; it is brought up to date, and what a further call begins with alike is not read again.
///
/// # Errors
/// An empty context or continuation, more tokens than the session has room for, or any error of the model.
pub fn log_likelihood(
    model: &dyn Model,
    session: &mut Session,
    read: &mut Vec<u32>,
    context: &[u32],
    continuation: &[u32],
) -> Result<f64> {
    if context.is_empty() || continuation.is_empty() {
        return Err(EngineError::BadOption {
            name: "text to score",
            value: format!(
                "{} tokens after {} tokens",
                continuation.len(),
                context.len()
            ),
            expected: "at least one token after at least one token".to_owned(),
        });
    }
    let tokens = [context, continuation].concat();
    // The last one is predicted, and nothing after it.
    let (n_inputs, counted_from) = (tokens.len() - 1, context.len() - 1);
    let shared = read.iter().zip(&tokens).take_while(|(a, b)| a == b);
    // What is counted is read in any case, for its logits.
    let mut from = shared.count().min(counted_from);
    session.rewind(from);
    read.truncate(from);
    let vocab = model.info().vocab_size;
    let kernels = model.compute().kernels();
    let chunk = session.chunk();
    let mut sum = 0.0;
    while from < n_inputs {
        let (end, want) = match from < counted_from {
            true => (counted_from, Logits::None),
            false => (n_inputs, Logits::All),
        };
        let to = end.min(from + chunk);
        let logits = model.forward(session, &tokens[from..to], want, &mut NoObserver)?;
        for (row, target) in logits.chunks_exact_mut(vocab).zip(&tokens[from + 1..]) {
            sum -= prediction(kernels, model, row, *target)?.nll_sum;
        }
        read.extend_from_slice(&tokens[from..to]);
        from = to;
    }
    Ok(sum)
}

/// `ln(sum(exp(row)))` of a row of logits, which is overwritten. A token's log probability is its logit less this; scores
/// of [`perplexity`] are made of it.
pub fn log_sum_exp(model: &dyn Model, row: &mut [f32]) -> f64 {
    log_sum(model.compute().kernels(), row)
}

fn log_sum(kernels: Kernels, row: &mut [f32]) -> f64 {
    let highest = kernels.max(row);
    let sum = kernels.exp_sum(row, highest);
    f64::from(sum).ln() + f64::from(highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut_into(n_tokens: usize, windows: Windows) -> Vec<(usize, usize, usize)> {
        cut(n_tokens, windows)
            .map(|w| (w.from, w.to, w.counted_from))
            .collect()
    }

    fn windows(n_tokens: usize, window: usize, stride: usize) -> Vec<(usize, usize, usize)> {
        let windows = Windows {
            window,
            stride,
            fills_last: false,
        };
        cut_into(n_tokens, windows)
    }

    #[test]
    fn the_last_window_reaches_back() {
        let rolling = |n_tokens| {
            let windows = Windows {
                window: 4,
                stride: 4,
                fills_last: true,
            };
            cut_into(n_tokens, windows)
        };
        assert_eq!(rolling(11), [(0, 4, 0), (4, 8, 4), (6, 10, 8)]);
        assert_eq!(rolling(9), [(0, 4, 0), (4, 8, 4)]);
        assert_eq!(rolling(3), [(0, 2, 0)]);
    }

    #[test]
    fn every_prediction_is_counted_once() {
        assert_eq!(windows(10, 4, 4), [(0, 4, 0), (4, 8, 4), (8, 9, 8)]);
        assert_eq!(
            windows(10, 4, 2),
            [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 9, 8)]
        );
        assert_eq!(windows(5, 4, 4), [(0, 4, 0)]);
        assert_eq!(windows(1, 4, 4), []);
        assert_eq!(windows(0, 4, 4), []);
        for (n, window, stride) in [(100, 7, 3), (64, 8, 8), (3, 100, 1)] {
            let counted: usize = windows(n, window, stride)
                .iter()
                .map(|(_, to, from)| to - from)
                .sum();
            assert_eq!(counted, n - 1);
        }
    }

    #[test]
    fn scores_add_up() {
        let mut score = Score {
            n_tokens: 1,
            nll_sum: 1.0,
        };
        score.add(Score {
            n_tokens: 3,
            nll_sum: 3.0,
        });
        assert_eq!(score.nll(), 1.0);
        assert!((score.perplexity() - std::f64::consts::E).abs() < 1e-12);
        assert!(Score::default().nll().is_nan());
    }
}
