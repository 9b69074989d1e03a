//! What a plan costs: the model before and after on the same text, token by token.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use cadre_engine::eval::Document;
use cadre_engine::{Logits, Model, Observer, RoutingEvent, SessionOptions};
use cadre_routing::Routing;
use serde::Serialize;

use crate::apply::Sources;
use crate::error::{ReshapeError, Result};

/// Logits of each model that are in memory at once, 64 MiB of them.
const MAX_LOGITS: usize = 16 << 20;

/// Sums over predicted tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Number of predicted tokens.
    pub tokens: u64,
    /// Negative log likelihoods before, nats.
    pub nll_before: f64,
    /// The same after.
    pub nll_after: f64,
    /// Divergence of the predictions after from those before, `KL(before || after)`, nats.
    pub kl: f64,
    /// Tokens for which both models have the same best guess.
    pub agree: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.nll_before += other.nll_before;
        self.nll_after += other.nll_after;
        self.kl += other.kl;
        self.agree += other.agree;
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }

    /// Perplexity before and after.
    #[must_use]
    pub fn perplexity(&self) -> [f64; 2] {
        [self.nll_before, self.nll_after].map(|sum| self.mean(sum).exp())
    }

    /// How much of the perplexity before is added.
    #[must_use]
    pub fn increase(&self) -> f64 {
        self.mean(self.nll_after - self.nll_before).exp() - 1.0
    }

    /// Mean divergence, nats per token.
    #[must_use]
    pub fn mean_kl(&self) -> f64 {
        self.mean(self.kl)
    }

    /// The part of the tokens with the same best guess.
    #[must_use]
    pub fn agreement(&self) -> f64 {
        self.mean(self.agree as f64)
    }
}

/// How the routing of a layer changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Overlap {
    /// Picks before.
    pub picks: u64,
    /// Those of experts that are there after, by themselves or in a merge.
    pub kept: u64,
    /// Those of experts that are also picked after, for the same token.
    pub same: u64,
}

/// What was measured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Quality {
    /// Over all text.
    pub total: Tally,
    /// By domain.
    pub domains: BTreeMap<String, Tally>,
    /// By decoder layer.
    pub layers: BTreeMap<usize, Overlap>,
    /// Seconds of passes before and after.
    pub seconds: [f64; 2],
    /// Tokens that were read by each model.
    pub tokens_read: u64,
}

/// Runs both models over `documents`, in windows of `window` tokens that do not overlap. `progress` hears of the predictions
/// so far and in all; when it breaks, what there is so far is returned.
///
/// # Errors
/// Models of different vocabularies, tokens that they do not know, or any error of theirs.
pub fn measure(
    [before, after]: [&dyn Model; 2],
    sources: &Sources,
    documents: &[Document],
    window: usize,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Quality> {
    let vocab = before.info().vocab_size;
    if after.info().vocab_size != vocab {
        return Err(ReshapeError::Option {
            name: "the models",
            problem: format!(
                "have vocabularies of {vocab} and {} tokens",
                after.info().vocab_size
            ),
        });
    }
    let defaults = SessionOptions::default();
    let options = SessionOptions {
        n_ctx: Some(window),
        chunk: defaults.chunk.min((MAX_LOGITS / vocab.max(1)).max(1)),
        ..defaults
    };
    let mut sessions = [before.session(&options)?, after.session(&options)?];
    let chunk = sessions[0].chunk().min(sessions[1].chunk());
    let predictions = |one: &Document| one.tokens.len().saturating_sub(1);
    let n_total = documents.iter().map(|one| predictions(one) as u64).sum();
    let mut quality = Quality::default();
    let mut first = Vec::new();
    for document in documents {
        let n_inputs = predictions(document);
        for from in (0..n_inputs).step_by(window) {
            sessions.iter_mut().for_each(|session| session.rewind(0));
            let to = n_inputs.min(from + window);
            let mut tally = Tally::default();
            for from in (from..to).step_by(chunk) {
                let to = to.min(from + chunk);
                let inputs = &document.tokens[from..to];
                let targets = &document.tokens[from + 1..=to];
                let [session_before, session_after] = &mut sessions;
                let (mut was, mut is) = (Picks::default(), Picks::default());
                let start = Instant::now();
                let logits = before.forward(session_before, inputs, Logits::All, &mut was)?;
                first.clear();
                first.extend_from_slice(logits);
                let middle = Instant::now();
                let logits = after.forward(session_after, inputs, Logits::All, &mut is)?;
                quality.seconds[1] += middle.elapsed().as_secs_f64();
                quality.seconds[0] += (middle - start).as_secs_f64();
                quality.tokens_read += inputs.len() as u64;
                let rows = first.chunks_exact(vocab).zip(logits.chunks_exact(vocab));
                for ((before, after), target) in rows.zip(targets) {
                    tally.add(compared(before, after, *target as usize));
                }
                overlap(&was, &is, sources, &mut quality.layers);
            }
            quality.total.add(tally);
            let domain = quality.domains.entry(document.domain.clone());
            domain.or_default().add(tally);
            if progress(quality.total.tokens, n_total).is_break() {
                return Ok(quality);
            }
        }
    }
    Ok(quality)
}

/// The two models' predictions of one token.
fn compared(before: &[f32], after: &[f32], target: usize) -> Tally {
    let [(best_before, norm_before), (best_after, norm_after)] = [before, after].map(|row| {
        let best = |best: usize, at: usize| if row[at] > row[best] { at } else { best };
        let best = (0..row.len()).fold(0, best);
        let highest = f64::from(row[best]);
        let sum: f64 = row.iter().map(|v| (f64::from(*v) - highest).exp()).sum();
        (best, highest + sum.ln())
    });
    let pairs = before.iter().zip(after);
    let kl: f64 = pairs
        .map(|(p, q)| {
            let (p, q) = (f64::from(*p) - norm_before, f64::from(*q) - norm_after);
            p.exp() * (p - q)
        })
        .sum();
    // The engine refuses tokens that are outside of the vocabulary.
    let nll = |row: &[f32], norm: f64| norm - row.get(target).map_or(0.0, |v| f64::from(*v));
    Tally {
        tokens: 1,
        nll_before: nll(before, norm_before),
        nll_after: nll(after, norm_after),
        // Rounding may leave a little less than nothing.
        kl: kl.max(0.0),
        agree: u64::from(best_before == best_after),
    }
}

/// The routing of one chunk, by layer.
#[derive(Default)]
struct Picks(BTreeMap<usize, Routing>);

impl Observer for Picks {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let routing = self.0.entry(event.layer).or_default();
        for (experts, weights) in event.routing.iter() {
            routing.push_token(experts, weights);
        }
    }
}

fn overlap(was: &Picks, is: &Picks, sources: &Sources, layers: &mut BTreeMap<usize, Overlap>) {
    for (layer, before) in &was.0 {
        let (Some(after), Some(sources)) = (is.0.get(layer), sources.get(layer)) else {
            continue;
        };
        let sum = layers.entry(*layer).or_default();
        for ((old, _), (new, _)) in before.iter().zip(after.iter()) {
            let made_of = |id: &u16| sources.experts.get(usize::from(*id));
            // What is beyond the experts is a null expert, which computes nothing.
            for id in old.iter().filter(|id| usize::from(**id) < sources.of) {
                sum.picks += 1;
                let is_in = |from: &Vec<u16>| from.contains(id);
                sum.kept += u64::from(sources.experts.iter().any(is_in));
                sum.same += u64::from(new.iter().filter_map(made_of).any(is_in));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_are_compared_as_by_hand() {
        let same = compared(&[1.0, 2.0, 0.5], &[1.0, 2.0, 0.5], 0);
        assert!(same.kl < 1e-12 && same.agree == 1);
        assert_eq!(same.nll_before, same.nll_after);
        // Logits are logarithms of 1/2 1/4 1/4 and 1/4 1/2 1/4, and 3 and 7 more.
        let (half, quarter) = (0.5f32.ln(), 0.25f32.ln());
        let before = [half + 3.0, quarter + 3.0, quarter + 3.0];
        let after = [quarter + 7.0, half + 7.0, quarter + 7.0];
        let other = compared(&before, &after, 1);
        let kl = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!(
            (other.kl - kl).abs() < 1e-6 && other.agree == 0,
            "{other:?}"
        );
        assert!((other.nll_before - 4f64.ln()).abs() < 1e-6);
        assert!((other.nll_after - 2f64.ln()).abs() < 1e-6);
        assert!((other.increase() + 0.5).abs() < 1e-6);
        let [was, is] = other.perplexity();
        assert!((was - 4.0).abs() < 1e-5 && (is - 2.0).abs() < 1e-5);
    }
}
