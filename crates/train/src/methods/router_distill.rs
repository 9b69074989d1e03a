//! Teaching a router that runs before the model: it follows the routers of a trained mixture, which look at its layers.
//!
//! Paper: Read-ME, Cai et al., 2024, arXiv 2410.19123, whose router is taught by what its dense model would use, and never by
//! the text.
//! Rule: `L += beta mean_t KL(q_t || softmax(l_t))`; with picks for each layer, the mean over layers with q the softmax of the
//! teacher's logits there; with the same picks for all, q is the mean of these over layers. The loss of the text and the
//! balance losses do not reach the router. No gradient reaches the teacher.
//! Recipe: `[router_distill] teacher = FOLDER, beta = 1.0`, usually with `[start] from` the same folder: experts and the rest
//! come from there, routers of layers are left behind, and the new router's embedding is the first columns of the model's.
//! State: none. Cost: one forward pass of the teacher per micro-batch. `router_agreement` in the log is the share of tokens
//! (and layers) whose best expert is the teacher's.
//! Differs from paper: the teacher is a mixture, whose picks are known, where the paper counts active neurons of a dense
//! model that the experts are cut from.
//! Check: tests/decoupled.rs.

use crate::architecture::Architecture;
use crate::error::{Result, TrainError};
use crate::export::{self, Opened};
use crate::lm::{Batch, Pass};
use crate::recipe::Recipe;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Tensor};
use cadre_routing::RoutingError;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[router_distill]` of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterDistill {
    /// Hugging Face folder of the mixture.
    pub teacher: PathBuf,
    /// Coefficient.
    #[serde(default = "one")]
    pub beta: f32,
}

fn one() -> f32 {
    1.0
}

impl RouterDistill {
    /// Refuses a model without such a router, and numbers that are no coefficient.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self, recipe: &Recipe) -> Result<(), String> {
        if recipe.model.decoupled_router.is_none() {
            return Err(
                "`[router_distill]` needs `model.decoupled_router`, which it teaches".to_owned(),
            );
        }
        if self.beta > 0.0 && self.beta.is_finite() {
            return Ok(());
        }
        Err(format!(
            "`router_distill.beta` = {}, expected more than 0",
            self.beta
        ))
    }
}

/// What a router is taught with.
#[derive(Debug)]
pub struct Guide {
    beta: f32,
    opened: Opened,
}

/// What a micro-batch says about a router.
#[derive(Debug)]
pub struct Followed {
    /// Without its coefficient.
    pub loss: Tensor<1>,
    /// Share of tokens and layers whose best expert is the teacher's.
    pub agreement: f64,
}

impl Guide {
    /// Opens the teacher for a model of `architecture`, on a device without gradients.
    ///
    /// # Errors
    /// A folder that is no checkpoint, a layout that the trainer does not know, and every size by which it does not fit.
    pub fn open(
        options: &RouterDistill,
        architecture: &Architecture,
        device: &Device,
    ) -> Result<Self> {
        let opened = export::open(&options.teacher, device)?;
        let sizes = |a: &Architecture| {
            let layers: Vec<(usize, usize)> = a
                .moe
                .iter()
                .map(|moe| (moe.layer, moe.router.n_experts()))
                .collect();
            (a.config.vocab_size, layers)
        };
        let (theirs, ours) = (sizes(&opened.architecture), sizes(architecture));
        let mut differences = Vec::new();
        if theirs.0 != ours.0 {
            differences.push(format!(
                "vocab_size is {} there, {} by the recipe",
                theirs.0, ours.0
            ));
        }
        if theirs.1 != ours.1 {
            differences.push(format!(
                "layers with experts and logits in each are {:?} there, {:?} by the recipe",
                theirs.1, ours.1
            ));
        }
        if opened
            .architecture
            .moe
            .iter()
            .any(|moe| !moe.router.has_gate())
        {
            differences.push("its routers look at nothing, which cannot be followed".to_owned());
        }
        if !differences.is_empty() {
            return Err(TrainError::DoesNotFit {
                path: options.teacher.clone(),
                differences,
            });
        }
        Ok(Self {
            beta: options.beta,
            opened,
        })
    }

    /// Coefficient of the loss.
    #[must_use]
    pub fn beta(&self) -> f32 {
        self.beta
    }

    /// How far the logits `[T, n]` of the router of `architecture` are from what the teacher does with `batch`.
    ///
    /// # Errors
    /// Router logits of the teacher that are not finite.
    pub fn follow(
        &self,
        logits: &Tensor<2>,
        architecture: &Architecture,
        batch: &Batch,
    ) -> Result<Followed, RoutingError> {
        let pass = Pass {
            biases: &self.opened.biases,
            ..Pass::default()
        };
        let forward = self
            .opened
            .model
            .forward(&self.opened.architecture, batch, &pass)?;
        let teacher: Vec<Tensor<2>> = forward.routed.into_iter().map(|r| r.logits).collect();
        let n = teacher.len().max(1);
        let shared = architecture
            .parts
            .decoupled
            .is_some_and(|sizes| !sizes.per_layer);
        let pairs: Vec<(Tensor<2>, Tensor<2>)> = match shared {
            true => {
                let probs = teacher.into_iter().map(|l| softmax(l, 1));
                let sum = probs.reduce(|sum, p| sum + p);
                sum.map(|sum| (logits.clone(), sum / n as f32))
                    .into_iter()
                    .collect()
            }
            false => {
                let part = |nth: usize| architecture.foretold_part(logits.clone(), nth);
                let teacher = teacher.into_iter().enumerate();
                teacher.map(|(nth, l)| (part(nth), softmax(l, 1))).collect()
            }
        };
        let (mut agreed, mut n_compared) = (0, 0);
        let mut losses = Vec::with_capacity(pairs.len());
        for (ours, q) in pairs {
            let (a, b) = (best(&ours), best(&q));
            agreed += a.iter().zip(&b).filter(|(a, b)| a == b).count();
            n_compared += a.len();
            let q = q.autodiff();
            // Where q is 0 it counts for nothing, and its logarithm is kept finite.
            let log_q = q.clone().clamp_min(1e-30).log();
            let kl = (q * (log_q - log_softmax(ours, 1))).sum_dim(1);
            losses.push(kl.mean());
        }
        let n = losses.len().max(1) as f32;
        let loss = losses.into_iter().reduce(|sum, loss| sum + loss);
        Ok(Followed {
            loss: loss.expect("a model with a router has layers with experts") / n,
            agreement: agreed as f64 / n_compared.max(1) as f64,
        })
    }
}

/// The largest entry of every row of `[T, n]`; of equals the first.
fn best(values: &Tensor<2>) -> Vec<usize> {
    let n = values.dims()[1].max(1);
    let values = values
        .try_to_vec_as::<f32>()
        .expect("router logits can be read back from their device");
    let best_of = |row: &[f32]| {
        let better = |best: usize, at: usize| if row[at] > row[best] { at } else { best };
        (1..row.len()).fold(0, better)
    };
    values.chunks_exact(n).map(best_of).collect()
}
