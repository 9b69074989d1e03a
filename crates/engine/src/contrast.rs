//! Self-contrast: each token is drawn from what a model says, pushed away from what it says with other experts.
//!
//! Paper: Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast (SCMoE), Shi et al., NeurIPS
//! 2024, arXiv 2405.14507.
//! Rule: the same text is read twice, with a strong choice of experts (usually the model's own) and a weak one (for
//! Mixtral the expert of rank 2 alone). With the logits `z_s` and `z_w` of the next token, those with
//! `z_s(i) >= ln(alpha) + max z_s` stay, and become `(1 + beta) z_s(i) - beta z_w(i)`; all others are banned.
//! Each choice has keys and values of its own: hidden states part ways in the first layer with experts.
//! Cost: two tokens of a batch where there was one; experts that both want are read once.

use cadre_routing::Steering;

use crate::batch::Sequence;
use crate::error::{EngineError, Result};
use crate::generate::{GenerateOptions, Generated, Hooks, Reader, check_prompt, generate_with};
use crate::model::{Logits, Model, Observer, RoutingEvent};
use crate::session::{Session, SessionOptions};
use crate::workspace::Workspace;

/// How a strong and a weak choice of experts are contrasted.
#[derive(Clone, Debug, PartialEq)]
pub struct Contrast {
    /// The strong choice.
    pub strong: Steering,
    /// The weak choice.
    pub weak: Steering,
    /// How far tokens are pushed away; 0 is not at all. The paper tries 0.1 to 0.9 per task.
    pub beta: f32,
    /// Tokens less probable than this part of the most probable one, by the strong choice, are banned; above 0, up to 1.
    /// The paper has 0.1.
    pub alpha: f32,
}

impl Contrast {
    /// The contrast of `strong` with the experts at `ranks` (from 1, the best) in place of its picks; what else is said
    /// of experts holds for both.
    #[must_use]
    pub fn with_ranks(strong: Steering, ranks: Vec<usize>, beta: f32, alpha: f32) -> Self {
        let weak = Steering {
            top_k: None,
            top_p: None,
            min_weight: None,
            min_experts: None,
            ranks: Some(ranks),
            ..strong.clone()
        };
        Self {
            strong,
            weak,
            beta,
            alpha,
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`EngineError::BadOption`] for one out of its range.
    pub fn check(&self) -> Result<()> {
        let beta = (
            "beta of the contrast",
            self.beta,
            self.beta >= 0.0,
            "0 or more",
        );
        let in_range = self.alpha > 0.0 && self.alpha <= 1.0;
        let alpha = (
            "alpha of the contrast",
            self.alpha,
            in_range,
            "above 0, up to 1",
        );
        for (name, value, in_range, expected) in [beta, alpha] {
            if !(in_range && value.is_finite()) {
                return Err(EngineError::BadOption {
                    name,
                    value: value.to_string(),
                    expected: expected.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Turns the `strong` logits of one position into those to draw from, given the `weak` ones. Banned tokens get minus
    /// infinity; the most probable token of the strong choice is never banned.
    ///
    /// # Panics
    /// When the two differ in length.
    pub fn mix(&self, strong: &mut [f32], weak: &[f32]) {
        assert_eq!(strong.len(), weak.len(), "two rows of one vocabulary");
        let best = strong.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // ln 1 is 0, so that only the best ones stay then.
        let least = self.alpha.ln() + best;
        for (strong, weak) in strong.iter_mut().zip(weak) {
            *strong = if *strong >= least {
                // Without a contrast, and where both agree, the logits stay what they are to the last bit.
                *strong + self.beta * (*strong - weak)
            } else {
                f32::NEG_INFINITY
            };
        }
    }
}

/// Two sessions that hold one text, read with a strong and with a weak choice of experts.
#[derive(Debug)]
pub struct ContrastSessions {
    contrast: Contrast,
    strong: Session,
    weak: Session,
    workspace: Workspace,
}

impl ContrastSessions {
    /// Two new, empty sessions of `model`. They take the memory of two, and a workspace for two chunks.
    ///
    /// # Errors
    /// A number out of its range, a steering that does not fit the model, or what [`Model::session`] refuses.
    pub fn new(model: &dyn Model, options: &SessionOptions, contrast: Contrast) -> Result<Self> {
        contrast.check()?;
        let steered = |steering: &Steering| {
            let mut session = model.session(options)?;
            model.steer(&mut session, steering)?;
            Ok::<_, EngineError>(session)
        };
        let (strong, weak) = (steered(&contrast.strong)?, steered(&contrast.weak)?);
        Ok(Self {
            workspace: model.workspace(2 * strong.chunk())?,
            contrast,
            strong,
            weak,
        })
    }

    /// The session of the strong choice, whose positions are those of the text.
    #[must_use]
    pub fn strong(&self) -> &Session {
        &self.strong
    }

    /// Forgets the tokens from `position` on; does nothing when there are none.
    pub fn rewind(&mut self, position: usize) {
        self.strong.rewind(position);
        self.weak.rewind(position);
    }
}

/// Reads `prompt` after what `sessions` hold, then draws up to `max_new_tokens` tokens, as [`crate::generate()`] does, by
/// contrasted logits. `hooks` observe the routing of the strong choice.
///
/// # Errors
/// As [`crate::generate()`]. After an error both sessions hold the same tokens.
pub fn generate_contrasted(
    model: &dyn Model,
    sessions: &mut ContrastSessions,
    prompt: &[u32],
    options: &GenerateOptions,
    hooks: &mut dyn Hooks,
) -> Result<Generated> {
    check_prompt(model, &sessions.strong, prompt)?;
    generate_with(&mut Pair { model, sessions }, prompt, options, hooks)
}

struct Pair<'a> {
    model: &'a dyn Model,
    sessions: &'a mut ContrastSessions,
}

impl Reader for Pair<'_> {
    fn read(&mut self, tokens: &[u32], want: Logits, hooks: &mut dyn Hooks) -> Result<&mut [f32]> {
        let ContrastSessions {
            contrast,
            strong,
            weak,
            workspace,
        } = &mut *self.sessions;
        let mut batch = [strong, weak].map(|session| Sequence {
            session,
            tokens,
            want,
        });
        let logits = self
            .model
            .forward_batch(&mut batch, workspace, &mut OfStrong(hooks));
        let logits = logits.map_err(|error| match error {
            EngineError::InBatch { source, .. } => *source,
            error => error,
        })?;
        let vocab = self.model.info().vocab_size;
        let (strong, weak) = logits.split_at_mut(logits.len() / 2);
        for (strong, weak) in strong.chunks_exact_mut(vocab).zip(weak.chunks_exact(vocab)) {
            contrast.mix(strong, weak);
        }
        Ok(strong)
    }

    fn session(&self) -> &Session {
        &self.sessions.strong
    }
}

/// Passes on what is about the first sequence.
struct OfStrong<'a>(&'a mut dyn Hooks);

impl Observer for OfStrong<'_> {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        if event.sequence == 0 {
            self.0.routed(event);
        }
    }

    fn attention_routed(&mut self, event: &RoutingEvent<'_>) {
        if event.sequence == 0 {
            self.0.attention_routed(event);
        }
    }

    fn watches(&self) -> bool {
        self.0.watches()
    }

    fn wants_norms(&self) -> bool {
        self.0.wants_norms()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contrast(beta: f32, alpha: f32) -> Contrast {
        Contrast::with_ranks(Steering::default(), vec![2], beta, alpha)
    }

    #[test]
    fn logits_are_those_of_the_equations() {
        let weak = [1.0, 3.0, 0.0, 9.0];
        let mut strong = [2.0, 1.5, 1.0, -1.0];
        // ln 0.3 is -1.204: all within 1.204 of 2 stay.
        contrast(0.5, 0.3).mix(&mut strong, &weak);
        assert_eq!(strong, [2.5, 0.75, 1.5, f32::NEG_INFINITY]);
    }

    #[test]
    fn without_beta_or_difference_nothing_moves_and_alpha_1_leaves_the_best() {
        let row = [0.1, 0.7, 0.3];
        let mut strong = row;
        contrast(0.0, 1e-9).mix(&mut strong, &[5.0, -5.0, 1.0]);
        assert_eq!(strong, row);
        contrast(0.9, 1e-9).mix(&mut strong, &row);
        assert_eq!(strong, row);
        contrast(0.9, 1.0).mix(&mut strong, &[-9.0, 9.0, -9.0]);
        assert_eq!([strong[0], strong[2]], [f32::NEG_INFINITY; 2]);
        assert!(strong[1].is_finite());
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        for (beta, alpha, said) in [
            (-0.1, 0.1, "beta of the contrast = -0.1"),
            (f32::NAN, 0.1, "beta"),
            (0.5, 0.0, "alpha of the contrast = 0"),
            (0.5, 1.5, "above 0, up to 1"),
        ] {
            let error = contrast(beta, alpha).check().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn masks_hold_for_both_and_the_number_of_picks_for_the_strong_choice() {
        let strong = Steering {
            top_k: Some(3),
            mask: "*:4".parse().unwrap(),
            ..Steering::default()
        };
        let contrast = Contrast::with_ranks(strong.clone(), vec![2, 3], 0.5, 0.1);
        assert_eq!(contrast.strong, strong);
        assert_eq!(
            contrast.weak.to_string(),
            "rank-experts=2,3 mask-experts=*:4"
        );
    }
}
