//! From the logits of a position to its token and scores.

use std::collections::HashMap;
use std::sync::Arc;

use cadre_engine::{Model, Sampler, SamplingOptions, eval::log_sum_exp};

use super::job::{JobError, failed};

/// How a job's tokens are drawn. Biases and penalties change the logits first, then the sampler takes over.
#[derive(Clone, Debug)]
pub(crate) struct DrawOptions {
    pub(crate) sampling: SamplingOptions,
    /// What is added to the logits of tokens.
    pub(crate) bias: Arc<[(u32, f32)]>,
    /// What the logit of a generated token loses.
    pub(crate) presence_penalty: f32,
    /// What it loses for every time it was generated.
    pub(crate) frequency_penalty: f32,
    /// No stop token is drawn before there are so many tokens.
    pub(crate) min_new_tokens: usize,
}

/// How probable a token was: the model's own log probabilities, before temperature, biases and penalties.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scored {
    pub(crate) token: u32,
    pub(crate) log_prob: f64,
    /// The most probable tokens, best first.
    pub(crate) top: Vec<(u32, f64)>,
}

/// Holds a text to a form, token by token.
pub(crate) trait Constraint: Send {
    /// Bans, with minus infinity, the tokens that cannot follow.
    ///
    /// # Errors
    /// Why that cannot be said.
    fn allow(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Takes note of the token that follows, which ends no text. Whether the text is complete, and nothing can follow.
    ///
    /// # Errors
    /// The token cannot follow.
    fn accept(&mut self, token: u32) -> Result<bool, String>;
}

/// A token that was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Drawn {
    pub(crate) token: u32,
    /// Nothing can follow it.
    pub(crate) is_last: bool,
}

/// Draws the tokens of one job.
pub(crate) struct Draw {
    options: DrawOptions,
    stop_tokens: Arc<[u32]>,
    sampler: Sampler,
    constraint: Option<Box<dyn Constraint>>,
    /// How often each token was generated; kept only where it is punished.
    counts: HashMap<u32, u32>,
    n_drawn: usize,
}

impl Draw {
    /// # Errors
    /// An option out of its range.
    pub(crate) fn new(
        options: DrawOptions,
        prompt: &[u32],
        stop_tokens: Arc<[u32]>,
        constraint: Option<Box<dyn Constraint>>,
    ) -> cadre_engine::Result<Self> {
        let mut sampler = Sampler::new(options.sampling)?;
        sampler.observe(prompt);
        Ok(Self {
            options,
            stop_tokens,
            sampler,
            constraint,
            counts: HashMap::new(),
            n_drawn: 0,
        })
    }

    /// Draws from `logits`, which are changed.
    ///
    /// # Errors
    /// Nothing can be drawn: every token is banned; or the form is more than can be held to.
    pub(crate) fn draw(&mut self, logits: &mut [f32]) -> Result<Drawn, JobError> {
        let DrawOptions {
            presence_penalty,
            frequency_penalty,
            ..
        } = self.options;
        for (token, count) in &self.counts {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit -= presence_penalty + frequency_penalty * *count as f32;
            }
        }
        for (token, bias) in &*self.options.bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        if self.n_drawn < self.options.min_new_tokens {
            for token in &*self.stop_tokens {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.allow(logits).map_err(JobError::Form)?;
        }
        let token = self.sampler.sample(logits);
        let token = token.map_err(|error| failed(&error))?;
        self.sampler.observe(&[token]);
        self.n_drawn += 1;
        if presence_penalty != 0.0 || frequency_penalty != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
        let ends = self.is_stop(token);
        let is_last = match &mut self.constraint {
            Some(constraint) if !ends => constraint.accept(token).map_err(JobError::Form)?,
            _ => false,
        };
        Ok(Drawn { token, is_last })
    }

    pub(crate) fn is_stop(&self, token: u32) -> bool {
        self.stop_tokens.contains(&token)
    }
}

/// The score of `token` under `logits`, which are overwritten, with the `n` most probable tokens; equal ones are ordered by
/// the lower id. `None` for an id that has no logit.
pub(crate) fn score(model: &dyn Model, logits: &mut [f32], n: usize, token: u32) -> Option<Scored> {
    let logit = *logits.get(token as usize)?;
    let top = most_probable(logits, n);
    let log_sum = log_sum_exp(model, logits);
    let log_prob = |logit: f32| f64::from(logit) - log_sum;
    let top = top
        .into_iter()
        .map(|(token, logit)| (token, log_prob(logit)));
    Some(Scored {
        token,
        log_prob: log_prob(logit),
        top: top.collect(),
    })
}

/// The `n` highest logits with their tokens, highest first.
fn most_probable(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    if n == 0 {
        return top;
    }
    for (token, logit) in (0u32..).zip(logits) {
        if top.len() == n && top[n - 1].1 >= *logit {
            continue;
        }
        let at = top.partition_point(|(_, other)| *other >= *logit);
        top.insert(at, (token, *logit));
        top.truncate(n);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> DrawOptions {
        DrawOptions {
            sampling: SamplingOptions::default(),
            bias: Arc::new([]),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            min_new_tokens: 0,
        }
    }

    fn draw(options: DrawOptions) -> Draw {
        Draw::new(options, &[0], Arc::new([2]), None).unwrap()
    }

    const LOGITS: [f32; 4] = [0.5, 1.0, 2.0, 1.5];

    #[test]
    fn biases_and_bans_decide() {
        assert_eq!(draw(options()).draw(&mut LOGITS.clone()).unwrap().token, 2);
        let mut biased = draw(DrawOptions {
            bias: Arc::new([(0, 1.6), (2, -100.0), (9, 1.0)]),
            ..options()
        });
        assert_eq!(biased.draw(&mut LOGITS.clone()).unwrap().token, 0);
        let mut patient = draw(DrawOptions {
            min_new_tokens: 1,
            ..options()
        });
        let drawn = [(); 2].map(|()| patient.draw(&mut LOGITS.clone()).unwrap().token);
        assert_eq!(drawn, [3, 2]);
        assert!(patient.is_stop(2) && !patient.is_stop(3));
    }

    #[test]
    fn what_was_generated_is_punished() {
        let mut present = draw(DrawOptions {
            presence_penalty: 0.75,
            ..options()
        });
        let drawn = [(); 4].map(|()| present.draw(&mut LOGITS.clone()).unwrap().token);
        // 2.0, then 1.5 beats 1.25, then that beats 1.0; what occurred twice is punished once.
        assert_eq!(drawn, [2, 3, 2, 2]);
        let mut frequent = draw(DrawOptions {
            frequency_penalty: 0.75,
            ..options()
        });
        let drawn = [(); 4].map(|()| frequent.draw(&mut LOGITS.clone()).unwrap().token);
        assert_eq!(drawn, [2, 3, 2, 1]);
    }

    #[test]
    fn the_most_probable_come_first() {
        assert_eq!(most_probable(&LOGITS, 2), [(2, 2.0), (3, 1.5)]);
        assert_eq!(
            most_probable(&[1.0, 2.0, 2.0, 1.0], 3),
            [(1, 2.0), (2, 2.0), (0, 1.0)]
        );
        assert_eq!(most_probable(&LOGITS, 9).len(), 4);
        assert!(most_probable(&LOGITS, 0).is_empty());
    }
}
