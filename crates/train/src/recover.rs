//! Recovery after surgery: the recipe by which the routers and experts of a pruned or merged checkpoint follow the model that
//! it came from.
//!
//! Paper: the fine-tuning after pruning of UNCURL, Sarkar et al., 2024, arXiv 2409.01483, and the distillation after merging of
//! MC-SMoE, Li et al., 2024, arXiv 2310.01334.
//! Rule: `[start] from` the reshaped checkpoint with everything but routers and experts held still, `[distill] teacher` the
//! original, no loss for balance: what is left was chosen for the task, and need not be used evenly. Experts in factors may
//! give up rows meanwhile (`[prune_rows]`).
//! Differs from paper: no published learning rate fits all models; the default is a tenth of what such models are trained with.
//! Check: tests/recover.rs.

use crate::error::{Result, TrainError};
use crate::import::check_trainable;
use crate::losses::LossWeights;
use crate::methods::distill::Distill;
use crate::methods::prune_rows::PruneRows;
use crate::methods::start::{Part, Start};
use crate::optimizer::AdamWConfig;
use crate::recipe::{Data, Model, Output, Recipe, Source, Train};
use cadre_checkpoint::Checkpoint;
use std::path::PathBuf;

/// What is recovered, from what, and for how long.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// Hugging Face folder of the reshaped model.
    pub model: PathBuf,
    /// Folder of the model that it came from; `None` to learn from the text alone.
    pub teacher: Option<PathBuf>,
    /// The text of the task.
    pub sources: Vec<Source>,
    /// Folder of the run.
    pub output: PathBuf,
    /// What does not move.
    pub freeze: Vec<Part>,
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences per step.
    pub batch_size: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Coefficient of the teacher.
    pub beta: f32,
    /// Softens the predictions of both.
    pub temperature: f64,
    /// Part of the rows of experts in factors that is left at the end; `None` keeps those that there are.
    pub rest: Option<f64>,
    /// Tokens of held-out text that each evaluation on the way looks at, per domain.
    pub eval_tokens: usize,
    /// Seed of the order of the text.
    pub seed: u64,
}

impl Recovery {
    /// The recipe, checked as one that was read from a file.
    ///
    /// # Errors
    /// A folder that is no checkpoint, or one that the trainer cannot compute, and values that a recipe cannot have.
    pub fn recipe(&self) -> Result<Recipe> {
        let checkpoint = Checkpoint::open(&self.model)?;
        check_trainable(checkpoint.config())?;
        let fail = |message: String| TrainError::Recipe {
            path: self.model.clone(),
            message,
        };
        let (model, router) = Model::of(checkpoint.config()).map_err(fail)?;
        let distill = self.teacher.as_ref().map(|teacher| Distill {
            teacher: teacher.clone(),
            beta: self.beta,
            temperature: self.temperature,
            until_step: None,
        });
        let recipe = Recipe {
            name: "recover".to_owned(),
            seed: self.seed,
            model,
            router,
            data: Some(Data {
                sources: self.sources.clone(),
                eval_tokens: self.eval_tokens,
            }),
            train: Train {
                warmup_steps: (self.steps / 20).min(100),
                ..Train::plain(self.steps, self.batch_size, self.seq_len, self.lr)
            },
            losses: LossWeights {
                balance: 0.0,
                z: 0.0,
                ..LossWeights::default()
            },
            balance_bias: None,
            distill,
            router_distill: None,
            evolve: None,
            cut: None,
            prune_rows: self.rest.map(|rest| PruneRows::published(rest, self.steps)),
            start: Some(Start {
                from: Some(self.model.clone()),
                freeze: self.freeze.clone(),
            }),
            optimizer: AdamWConfig::default(),
            output: Output {
                dir: self.output.clone(),
                snapshot_every: (self.steps / 10).clamp(1, 100),
                keep: 2,
                eval_every: 0,
                eval_first: true,
            },
        };
        let text = toml::to_string(&recipe).map_err(|error| fail(error.to_string()))?;
        Recipe::parse(&self.model, &text)
    }
}
