//! From logits to the next token.
//!
//! Stages, in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p, draw.
//! A stage at its neutral value is skipped. Equal logits are ordered by the lower token id.

use std::cmp::Ordering;

use crate::error::{EngineError, Result};
use crate::rng::Rng;

/// How tokens are drawn. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most probable token and ignores the filters.
    pub temperature: f32,
    /// Keeps this many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most probable tokens that have this much probability together; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this probable relative to the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens seen before are divided (positive) or multiplied (negative) by it; 1 is off.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// [`EngineError::BadOption`] for the first value out of its range.
    pub fn check(&self) -> Result<()> {
        let checks = [
            (
                "temperature",
                self.temperature,
                self.temperature >= 0.0,
                "0 or more",
            ),
            (
                "top-p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0, up to 1",
            ),
            (
                "min-p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "0 to 1",
            ),
            (
                "repetition penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0,
                "above 0",
            ),
        ];
        for (name, value, in_range, expected) in checks {
            if !(in_range && value.is_finite()) {
                let (value, expected) = (value.to_string(), expected.to_owned());
                return Err(EngineError::BadOption {
                    name,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// Draws tokens for one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplingOptions,
    rng: Rng,
    /// Tokens seen, each once, and a flag per token id.
    seen: Vec<u32>,
    is_seen: Vec<bool>,
    candidates: Vec<Candidate>,
    n_sampled: usize,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    logit: f32,
    /// Proportional to the probability; the most probable candidate has 1.
    weight: f64,
}

impl Sampler {
    /// A sampler that has seen nothing.
    ///
    /// # Errors
    /// As [`SamplingOptions::check`].
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.check()?;
        Ok(Self {
            rng: Rng::new(options.seed),
            options,
            seen: Vec::new(),
            is_seen: Vec::new(),
            candidates: Vec::new(),
            n_sampled: 0,
        })
    }

    /// Notes tokens for the repetition penalty: the prompt, and then every token that is accepted.
    pub fn observe(&mut self, tokens: &[u32]) {
        if self.options.repetition_penalty == 1.0 {
            return;
        }
        for token in tokens {
            let id = *token as usize;
            if self.is_seen.len() <= id {
                self.is_seen.resize(id + 1, false);
            }
            if !std::mem::replace(&mut self.is_seen[id], true) {
                self.seen.push(*token);
            }
        }
    }

    /// Draws from `logits` (`[vocab_size]`), which it may change. Minus infinity bans a token.
    ///
    /// # Errors
    /// [`EngineError::Unsampleable`] when a logit is NaN or plus infinity, or every token is banned.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32> {
        let step = self.n_sampled;
        let unsampleable = |token: usize, value| EngineError::Unsampleable { step, token, value };
        let bad = |value: &f32| value.is_nan() || *value == f32::INFINITY;
        if let Some(token) = logits.iter().position(bad) {
            return Err(unsampleable(token, logits[token]));
        }
        self.penalise(logits);
        let best = argmax(logits).filter(|best| logits[*best].is_finite());
        let Some(best) = best else {
            return Err(unsampleable(0, f32::NEG_INFINITY));
        };
        self.n_sampled += 1;
        if self.options.temperature == 0.0 {
            return Ok(best as u32);
        }
        self.fill_candidates(logits, logits[best]);
        self.keep_top_k();
        self.keep_top_p();
        self.keep_min_p();
        Ok(self.draw())
    }

    fn penalise(&self, logits: &mut [f32]) {
        let penalty = self.options.repetition_penalty;
        for token in &self.seen {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
    }

    fn fill_candidates(&mut self, logits: &[f32], best: f32) {
        let temperature = f64::from(self.options.temperature);
        self.candidates.clear();
        self.candidates
            .extend((0u32..).zip(logits).map(|(token, logit)| Candidate {
                token,
                logit: *logit,
                weight: (f64::from(logit - best) / temperature).exp(),
            }));
    }

    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates
                .select_nth_unstable_by(k - 1, most_probable_first);
            self.candidates.truncate(k);
            // Back in a fixed order, so that sums below do not depend on how the selection went.
            self.candidates.sort_unstable_by(most_probable_first);
        }
    }

    fn keep_top_p(&mut self) {
        let p = f64::from(self.options.top_p);
        if p >= 1.0 {
            return;
        }
        let total = self.total();
        // Candidates below this have less than 1 - p together, so the rest reaches p without them; few
        // are left to sort.
        let negligible = (1.0 - p) * total / self.candidates.len() as f64;
        self.candidates
            .retain(|candidate| candidate.weight >= negligible);
        self.candidates.sort_unstable_by(most_probable_first);
        let mut sum = 0.0;
        let reached = self.candidates.iter().position(|candidate| {
            sum += candidate.weight;
            sum >= p * total
        });
        self.candidates
            .truncate(reached.map_or(usize::MAX, |last| last + 1));
    }

    fn keep_min_p(&mut self) {
        let min_p = f64::from(self.options.min_p);
        if min_p > 0.0 {
            // The most probable candidate has weight 1 and is never filtered out before.
            self.candidates
                .retain(|candidate| candidate.weight >= min_p);
        }
    }

    fn draw(&mut self) -> u32 {
        let mut target = self.rng.uniform() * self.total();
        let mut drawn = 0;
        for candidate in &self.candidates {
            if candidate.weight > 0.0 {
                drawn = candidate.token;
                target -= candidate.weight;
                if target < 0.0 {
                    break;
                }
            }
        }
        // Rounding may leave the target at 0 after the last one, which is then the draw.
        drawn
    }

    fn total(&self) -> f64 {
        self.candidates
            .iter()
            .map(|candidate| candidate.weight)
            .sum()
    }
}

fn most_probable_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// The lowest index of the largest value.
fn argmax(values: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, value) in values.iter().enumerate() {
        if best.is_none_or(|best| *value > values[best]) {
            best = Some(i);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of the probabilities 0.5, 0.25, 0.125, 0.125.
    fn logits() -> Vec<f32> {
        [0.5f32, 0.25, 0.125, 0.125]
            .iter()
            .map(|p| p.ln() + 3.0)
            .collect()
    }

    fn hot() -> SamplingOptions {
        SamplingOptions {
            temperature: 1.0,
            ..SamplingOptions::default()
        }
    }

    /// How often each token of `logits()` is drawn, in thousandths.
    fn shares(options: SamplingOptions) -> Vec<usize> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = [0; 4];
        for _ in 0..20_000 {
            counts[sampler.sample(&mut logits()).unwrap() as usize] += 1;
        }
        counts.iter().map(|count| (count + 10) / 20).collect()
    }

    #[track_caller]
    fn assert_shares(options: SamplingOptions, expected: [usize; 4]) {
        for (got, expected) in shares(options).iter().zip(expected) {
            assert!(
                got.abs_diff(expected) <= 12 && (expected > 0 || *got == 0),
                "{got} {expected}"
            );
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
        assert_eq!(sampler.sample(&mut [1.0, 3.0, 2.0, 3.0]).unwrap(), 1);
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, -5.0]).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        assert_shares(hot(), [500, 250, 125, 125]);
    }

    #[test]
    fn temperature_sharpens() {
        // Squares: 16, 4, 1, 1 of 22.
        assert_shares(
            SamplingOptions {
                temperature: 0.5,
                ..hot()
            },
            [727, 182, 45, 45],
        );
    }

    #[test]
    fn top_k_keeps_the_most_probable_and_the_lower_id_of_equals() {
        assert_shares(SamplingOptions { top_k: 2, ..hot() }, [667, 333, 0, 0]);
        assert_shares(SamplingOptions { top_k: 3, ..hot() }, [571, 286, 143, 0]);
        assert_shares(SamplingOptions { top_k: 99, ..hot() }, [500, 250, 125, 125]);
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        assert_shares(
            SamplingOptions {
                top_p: 0.4,
                ..hot()
            },
            [1000, 0, 0, 0],
        );
        assert_shares(
            SamplingOptions {
                top_p: 0.6,
                ..hot()
            },
            [667, 333, 0, 0],
        );
        assert_shares(
            SamplingOptions {
                top_p: 0.8,
                ..hot()
            },
            [571, 286, 143, 0],
        );
        // After top-k 2 the first token alone has 2/3.
        assert_shares(
            SamplingOptions {
                top_k: 2,
                top_p: 0.66,
                ..hot()
            },
            [1000, 0, 0, 0],
        );
    }

    #[test]
    fn min_p_is_relative_to_the_most_probable() {
        assert_shares(
            SamplingOptions {
                min_p: 0.3,
                ..hot()
            },
            [667, 333, 0, 0],
        );
        assert_shares(
            SamplingOptions {
                min_p: 1.0,
                ..hot()
            },
            [1000, 0, 0, 0],
        );
    }

    #[test]
    fn the_penalty_applies_once_per_token_and_by_sign() {
        let options = SamplingOptions {
            repetition_penalty: 2.0,
            ..SamplingOptions::default()
        };
        let mut sampler = Sampler::new(options).unwrap();
        sampler.observe(&[0, 2, 0, 9]);
        let mut logits = [4.0, 3.0, -1.0];
        assert_eq!(sampler.sample(&mut logits).unwrap(), 1);
        assert_eq!(logits, [2.0, 3.0, -2.0]);
    }

    #[test]
    fn seeds_repeat_and_differ() {
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplingOptions { seed, ..hot() }).unwrap();
            (0..64)
                .map(|_| sampler.sample(&mut logits()).unwrap())
                .collect::<Vec<u32>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn what_is_not_a_number_is_an_error_with_its_step() {
        let mut sampler = Sampler::new(hot()).unwrap();
        sampler.sample(&mut logits()).unwrap();
        let error = sampler
            .sample(&mut [0.0, f32::NAN])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("step 1") && error.contains("token 1 is NaN"),
            "{error}"
        );
        assert!(sampler.sample(&mut [f32::INFINITY, 0.0]).is_err());
        assert!(sampler.sample(&mut [f32::NEG_INFINITY; 3]).is_err());
        assert!(sampler.sample(&mut []).is_err());
    }

    #[test]
    fn options_out_of_range_are_named() {
        for (options, name) in [
            (
                SamplingOptions {
                    temperature: -1.0,
                    ..hot()
                },
                "temperature",
            ),
            (
                SamplingOptions {
                    temperature: f32::NAN,
                    ..hot()
                },
                "temperature",
            ),
            (
                SamplingOptions {
                    top_p: 0.0,
                    ..hot()
                },
                "top-p",
            ),
            (
                SamplingOptions {
                    min_p: 1.5,
                    ..hot()
                },
                "min-p",
            ),
            (
                SamplingOptions {
                    repetition_penalty: 0.0,
                    ..hot()
                },
                "repetition penalty",
            ),
        ] {
            let error = Sampler::new(options).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
