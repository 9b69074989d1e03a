//! Teaching a router that runs before the model: it follows the routers of a trained mixture, which look at its layers, or
//! what a dense model uses that its experts were cut from.
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
//! With `[cut]` the teacher is the dense model, and q follows from active neurons (`methods/cut.rs`); that is the paper's. A
//! mixture as the teacher is ours.
//! Differs from paper: KL in the direction of its equation 4; its code adds the cross-entropy with the best expert.
//! Check: tests/decoupled.rs.

use crate::architecture::Architecture;
use crate::error::{Result, TrainError};
use crate::export::{self, Opened};
use crate::lm::{Batch, Pass};
use crate::methods::cut::{self, Neurons};
use crate::recipe::Recipe;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Tensor, TensorData};
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
        if let Some(cut) = recipe.cut.as_ref().filter(|cut| cut.dense != self.teacher) {
            return Err(format!(
                "`router_distill.teacher` is {}, but the experts are cut from {}; with `[cut]` that is who teaches",
                self.teacher.display(),
                cut.dense.display()
            ));
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
    /// Of a dense teacher: which of its neurons the experts have, and how clearly that is told.
    cut: Option<(Neurons, f32)>,
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
        cut: Option<(Neurons, f32)>,
        device: &Device,
    ) -> Result<Self> {
        let opened = export::open(&options.teacher, device)?;
        if cut.is_some() {
            // The model that the experts were cut from, which has been looked at.
            return Ok(Self {
                beta: options.beta,
                opened,
                cut,
            });
        }
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
            cut: None,
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
        let targets = self.targets(batch)?;
        let n = targets.len().max(1);
        let shared = architecture
            .parts
            .decoupled
            .is_some_and(|sizes| !sizes.per_layer);
        let pairs: Vec<(Tensor<2>, Tensor<2>)> = match shared {
            true => {
                let sum = targets.into_iter().reduce(|sum, q| sum + q);
                sum.map(|sum| (logits.clone(), sum / n as f32))
                    .into_iter()
                    .collect()
            }
            false => {
                let part = |nth: usize| architecture.foretold_part(logits.clone(), nth);
                let targets = targets.into_iter().enumerate();
                targets.map(|(nth, q)| (part(nth), q)).collect()
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

    /// What every layer's picks should follow, `[T, n]`, without a graph.
    fn targets(&self, batch: &Batch) -> Result<Vec<Tensor<2>>, RoutingError> {
        if let Some((neurons, sharpness)) = &self.cut {
            let layers = cut::wanted(&self.opened, neurons, batch, *sharpness)?;
            let device = self.opened.model.norm.val().device();
            let n_tokens = batch.tokens.len();
            let tensor = |values: Vec<f32>| {
                let shape = [n_tokens, values.len() / n_tokens];
                Tensor::from_data(TensorData::new(values, shape), &device)
            };
            return Ok(layers.into_iter().map(tensor).collect());
        }
        let pass = Pass {
            biases: &self.opened.biases,
            ..Pass::default()
        };
        let Opened {
            architecture,
            model,
            ..
        } = &self.opened;
        let forward = model.forward(architecture, batch, &pass)?;
        let layers = forward.routed.into_iter();
        Ok(layers.map(|routed| softmax(routed.logits, 1)).collect())
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
