//! Staged distillation: a student follows a teacher's predictions, and stops doing so before the end.
//!
//! Paper: DeepSpeed-MoE (Mixture-of-Students), Rajbhandari et al., 2022, arXiv 2201.05596.
//! Rule: `L += beta temperature^2 mean_t KL(softmax(teacher / temperature) || softmax(student / temperature))` up to and
//! including `until_step`; without one, to the end. No gradient reaches the teacher.
//! Recipe: `[distill] teacher = FOLDER, beta = 1.0, temperature = 1.0, until_step = N`. The student's tokens are those of
//! the teacher's tokenizer, whose size has to be `model.vocab_size`.
//! State: none. Cost: one forward pass of the teacher per micro-batch, none after `until_step`.
//! Differs from paper: the teacher runs as in evaluation (no noise, no dropping).
//! Check: tests/methods.rs, losses::distillation.

use crate::error::Result;
use crate::export::{self, Opened};
use crate::lm::{Batch, Pass};
use crate::losses::distillation;
use crate::ops;
use burn::tensor::{Device, Tensor};
use cadre_routing::RoutingError;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[distill]` of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distill {
    /// Hugging Face folder of the teacher.
    pub teacher: PathBuf,
    /// Coefficient.
    #[serde(default = "one")]
    pub beta: f32,
    /// Softens both distributions.
    #[serde(default = "softly")]
    pub temperature: f64,
    /// The last step with a teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_step: Option<u64>,
}

fn one() -> f32 {
    1.0
}
fn softly() -> f64 {
    1.0
}

impl Distill {
    /// Refuses numbers that are no coefficient and no temperature.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self) -> Result<(), String> {
        let numbers = [
            ("beta", f64::from(self.beta)),
            ("temperature", self.temperature),
        ];
        match numbers.iter().find(|(_, x)| !(*x > 0.0 && x.is_finite())) {
            Some((key, x)) => Err(format!("`distill.{key}` = {x}, expected more than 0")),
            None => Ok(()),
        }
    }

    /// Whether step `step` has a teacher.
    #[must_use]
    pub fn active(&self, step: u64) -> bool {
        self.until_step.is_none_or(|last| step <= last)
    }
}

/// The teacher: a model that is only read.
#[derive(Debug)]
pub struct Teacher {
    options: Distill,
    opened: Opened,
}

impl Teacher {
    /// Opens the teacher of `options` for a student with `vocab_size` tokens, on a device without gradients.
    ///
    /// # Errors
    /// A folder that is no checkpoint, a layout that the trainer does not know, another vocabulary.
    pub fn open(options: &Distill, vocab_size: usize, device: &Device) -> Result<Self> {
        let opened = export::open(&options.teacher, device)?;
        let theirs = opened.architecture.config.vocab_size;
        if theirs != vocab_size {
            return Err(crate::TrainError::DoesNotFit {
                path: options.teacher.clone(),
                differences: vec![format!(
                    "vocab_size is {theirs} there, {vocab_size} in [model]"
                )],
            });
        }
        Ok(Self {
            options: options.clone(),
            opened,
        })
    }

    /// The teacher's part of the loss without its coefficient, from the student's hidden states and head; `None` when
    /// the step has no teacher.
    ///
    /// # Errors
    /// Router logits of the teacher that are not finite.
    pub fn loss(
        &self,
        hidden: Tensor<2>,
        head: Tensor<2>,
        batch: &Batch,
        step: u64,
    ) -> Result<Option<Tensor<1>>, RoutingError> {
        if !self.options.active(step) {
            return Ok(None);
        }
        let Opened {
            architecture,
            model,
            biases,
        } = &self.opened;
        let pass = Pass {
            biases,
            ..Pass::default()
        };
        let forward = model.forward(architecture, batch, &pass)?;
        let teacher = ops::linear(forward.hidden, model.head()).autodiff();
        let student = ops::linear(hidden, head);
        Ok(Some(distillation(
            student,
            teacher,
            self.options.temperature,
        )))
    }

    /// Coefficient of [`Teacher::loss`].
    #[must_use]
    pub fn beta(&self) -> f32 {
        self.options.beta
    }
}
