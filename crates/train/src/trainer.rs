//! The loop: batches -> losses -> gradients -> update, with log, evaluation, snapshots and resumption.

use crate::architecture::Architecture;
use crate::collapse::CollapseWatch;
use crate::data::{self, Corpus};
use crate::error::{LargestGradient, Result, TrainError};
use crate::export::{Exported, export};
use crate::files;
use crate::init::Init;
use crate::lm::{Batch, LanguageModel, Pass};
use crate::log::{EvalRecord, LayerRecord, Log, Score, StepRecord, WarningRecord};
use crate::optimizer::{AdamW, GradientSum};
use crate::recipe::Recipe;
use crate::snapshot;
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use cadre_checkpoint::Dtype;
use cadre_routing::{Loads, RoutingError};
use std::path::PathBuf;
use std::time::Instant;

/// What a run tells whoever watches it. All methods do nothing by default.
pub trait Progress {
    /// Preparation has reached a new stage (tokenizer, tokens, ...).
    fn stage(&mut self, _what: &str) {}
    /// The loop begins after `done` of `total` steps; `refused` are damaged snapshots that were passed over.
    fn begin(&mut self, _done: u64, _total: u64, _refused: &[TrainError]) {}
    /// A step is done.
    fn step(&mut self, _record: &StepRecord) {}
    /// Something is wrong that does not stop the run.
    fn warning(&mut self, _warning: &WarningRecord) {}
    /// Held-out text was scored.
    fn evaluated(&mut self, _record: &EvalRecord) {}
    /// Whether to save a snapshot and stop before the next step.
    fn stop(&mut self) -> bool {
        false
    }
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// All steps are done.
    Finished {
        /// Hugging Face folder with the model, or why no layout holds it ([`TrainError::Unexportable`]).
        model: Result<PathBuf, TrainError>,
        /// Held-out quality at the end.
        eval: EvalRecord,
    },
    /// Stopped on request after this many steps; running the recipe again goes on from there.
    Stopped {
        /// Steps done.
        step: u64,
    },
}

/// Trains `recipe`, going on from the newest whole snapshot of its output folder.
///
/// # Errors
/// Bad data, a full disk, an output folder of another recipe, divergence.
pub fn train(recipe: &Recipe, progress: &mut dyn Progress) -> Result<Outcome> {
    let Some(data) = &recipe.data else {
        return Err(TrainError::Recipe {
            path: PathBuf::from(&recipe.name),
            message: "[data] is missing; only `train --bench` runs without it".to_owned(),
        });
    };
    let folder = &recipe.output.dir;
    files::create_dir(folder)?;
    progress.stage("tokenizer and tokens");
    let corpus = Corpus::prepare(recipe, data, folder)?;
    let mut run = Run::new(recipe)?;
    let snapshots = folder.join("snapshots");
    let refused = run.resume(&snapshots)?;
    progress.begin(run.optimizer.step, recipe.train.steps, &refused);
    let (mut log, before) = Log::open(&folder.join("log.jsonl"), run.optimizer.step)?;
    let mut watch = CollapseWatch::default();
    for record in &before {
        // Told already; a resumed run only has to know how long a spell has lasted.
        watch.observe(recipe.tokens_per_step(), record);
    }
    let kept = |error| match error {
        TrainError::Diverged {
            step,
            what,
            largest,
            ..
        } => TrainError::Diverged {
            step,
            what,
            largest,
            kept: snapshot::newest(&snapshots),
        },
        other => other,
    };
    while run.optimizer.step < recipe.train.steps {
        if progress.stop() {
            snapshot::save(&snapshots, recipe, run.model(), &run.optimizer)?;
            let step = run.optimizer.step;
            return Ok(Outcome::Stopped { step });
        }
        let record = run
            .step(|step, micro| corpus.batch(recipe, step, micro))
            .map_err(kept)?;
        log.write(&record)?;
        progress.step(&record);
        for warning in watch.observe(recipe.tokens_per_step(), &record) {
            log.write(&warning)?;
            progress.warning(&warning);
        }
        let step = record.step;
        let every = recipe.output.eval_every;
        if every > 0 && step.is_multiple_of(every) && step < recipe.train.steps {
            let record = run.evaluate(&corpus, data.eval_tokens).map_err(kept)?;
            log.write(&record)?;
            progress.evaluated(&record);
        }
        if step.is_multiple_of(recipe.output.snapshot_every) || step == recipe.train.steps {
            snapshot::save(&snapshots, recipe, run.model(), &run.optimizer)?;
        }
    }
    progress.stage("held-out text");
    let eval = run.evaluate(&corpus, usize::MAX).map_err(kept)?;
    log.write(&eval)?;
    progress.evaluated(&eval);
    let model = folder.join("model");
    let exported = Exported {
        architecture: &run.architecture,
        biases: &[],
        step: run.optimizer.step,
    };
    let tokenizer = &corpus.tokenizer_json;
    let model = match export(run.model(), exported, tokenizer, Dtype::Bf16, &model) {
        Ok(()) => Ok(model),
        Err(error @ TrainError::Unexportable { .. }) => Err(error),
        Err(error) => return Err(error),
    };
    Ok(Outcome::Finished { model, eval })
}

/// Deletes the snapshots, log, tokenizer and tokens of a recipe's earlier run; its exported model stays.
///
/// # Errors
/// Failures of the file system.
pub fn forget(recipe: &Recipe) -> Result<()> {
    let folder = &recipe.output.dir;
    files::remove_dir(&folder.join("snapshots"))?;
    files::remove_dir(&folder.join("tokens"))?;
    files::remove_file(&folder.join("log.jsonl"))?;
    files::remove_file(&folder.join("tokenizer.json"))
}

/// Speed and losses of some steps on random tokens, for comparisons.
///
/// # Errors
/// Divergence.
pub fn bench(recipe: &Recipe, steps: u64) -> Result<Vec<StepRecord>> {
    let mut run = Run::new(recipe)?;
    (0..steps)
        .map(|_| run.step(|step, micro| data::random_batch(recipe, step, micro)))
        .collect()
}

/// Number of parameters of a recipe's model.
///
/// # Errors
/// Router options that cannot work, which reading a recipe has already refused.
pub fn n_parameters(recipe: &Recipe) -> Result<usize> {
    Ok(recipe.architecture()?.n_parameters())
}

/// A run in memory.
struct Run<'a> {
    recipe: &'a Recipe,
    architecture: Architecture,
    /// Absent only while the optimizer has it.
    model: Option<LanguageModel>,
    optimizer: AdamW,
    /// Of the newest step, to say where a divergence began.
    largest: Option<LargestGradient>,
}

/// Sums over the micro-batches of a step.
#[derive(Default)]
struct Totals {
    loss: f64,
    cross_entropy: f64,
    balance: f64,
    z: f64,
    loads: Vec<Loads>,
}

impl<'a> Run<'a> {
    fn new(recipe: &'a Recipe) -> Result<Self> {
        let architecture = recipe.architecture()?;
        let init = Init {
            seed: recipe.seed,
            std: recipe.model.initializer_range,
            device: Device::flex().autodiff(),
        };
        Ok(Self {
            model: Some(LanguageModel::init(&architecture, &init)),
            optimizer: AdamW::new(recipe.optimizer),
            largest: None,
            recipe,
            architecture,
        })
    }

    fn model(&self) -> &LanguageModel {
        self.model.as_ref().expect("a model between steps")
    }

    /// Restores the newest whole snapshot; returns the damaged ones.
    fn resume(&mut self, snapshots: &std::path::Path) -> Result<Vec<TrainError>> {
        let (model, refused) = snapshot::restore(
            snapshots,
            self.recipe,
            self.model().clone(),
            &mut self.optimizer,
        )?;
        self.model = Some(model);
        Ok(refused)
    }

    /// One optimizer step; `batch` gives micro-batches by step and index.
    fn step(&mut self, batch: impl Fn(u64, usize) -> Batch) -> Result<StepRecord> {
        let start = Instant::now();
        let step = self.optimizer.step + 1;
        let n_micro = self.recipe.train.accumulate;
        let share = 1.0 / n_micro as f32;
        let mut gradients = GradientSum::default();
        let mut totals = Totals::default();
        for micro in 0..n_micro {
            let batch = batch(step, micro);
            let pass = Pass {
                seed: self.recipe.seed,
                step,
                index: micro,
                training: true,
                biases: &[],
            };
            self.backward(&pass, &batch, share, &mut gradients, &mut totals)?;
        }
        let (norm, parts) = gradients.norms();
        self.largest = largest(step, parts).or(self.largest.take());
        if !norm.is_finite() {
            return Err(self.diverged(step, "the gradient"));
        }
        let lr = self.recipe.learning_rate(step);
        let clip = self.recipe.train.grad_clip;
        let scale = if clip > 0.0 {
            (clip / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        // The optimizer updates in place, which needs the only handle to each tensor: so the model moves.
        let model = self.model.take().expect("a model between steps");
        self.model = Some(self.optimizer.step(model, gradients, lr, scale));
        let seconds = start.elapsed().as_secs_f64();
        let tokens = self.recipe.tokens_per_step();
        Ok(StepRecord {
            step,
            tokens: step * tokens as u64,
            loss: totals.loss,
            cross_entropy: totals.cross_entropy,
            balance: totals.balance,
            z: totals.z,
            parts: std::collections::BTreeMap::new(),
            lr,
            grad_norm: norm,
            tokens_per_second: tokens as f64 / seconds,
            seconds,
            layers: self.layer_records(&totals.loads),
        })
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        batch: &Batch,
        share: f32,
        gradients: &mut GradientSum,
        totals: &mut Totals,
    ) -> Result<()> {
        let step = pass.step;
        let losses = self.model().losses(&self.architecture, batch, pass);
        let losses = losses.map_err(|e| self.routing_error(step, e))?;
        let weights = self.recipe.losses;
        let loss = losses.cross_entropy.clone()
            + losses.balance.clone() * weights.balance
            + losses.z.clone() * weights.z;
        let add = |total: &mut f64, tensor: Tensor<1>| -> f64 {
            let value = f64::from(tensor.into_scalar::<f32>());
            *total += value * f64::from(share);
            value
        };
        let value = add(&mut totals.loss, loss.clone());
        if !value.is_finite() {
            return Err(self.diverged(step, "the loss"));
        }
        add(&mut totals.cross_entropy, losses.cross_entropy);
        add(&mut totals.balance, losses.balance);
        add(&mut totals.z, losses.z);
        if totals.loads.is_empty() {
            totals.loads = losses.routed.into_iter().map(|r| r.loads).collect();
        } else {
            for (total, routed) in totals.loads.iter_mut().zip(&losses.routed) {
                total.merge(&routed.loads)?;
            }
        }
        gradients.add(self.model(), &mut loss.backward(), share);
        Ok(())
    }

    fn diverged(&self, step: u64, what: &str) -> TrainError {
        TrainError::Diverged {
            step,
            what: what.to_owned(),
            largest: self.largest.clone(),
            kept: None,
        }
    }

    fn routing_error(&self, step: u64, error: RoutingError) -> TrainError {
        match error {
            RoutingError::NonFinite { token, expert, .. } => self.diverged(
                step,
                &format!("the router logit of token {token} and expert {expert}"),
            ),
            other => other.into(),
        }
    }

    fn layer_records(&self, loads: &[Loads]) -> Vec<LayerRecord> {
        let layers = self.architecture.moe.iter();
        layers
            .zip(loads)
            .filter_map(|(moe, loads)| {
                let summary = loads.summary()?;
                let real: u64 = loads.counts()[..moe.router.n_real_experts()].iter().sum();
                let counts = loads.counts();
                let most = (0..counts.len()).rev().max_by_key(|&e| counts[e]);
                Some(LayerRecord {
                    layer: moe.layer,
                    cv: summary.cv,
                    max_vio: summary.max_vio,
                    dead: summary.n_dead,
                    entropy: summary.mean_entropy.unwrap_or_default(),
                    picks: real as f64 / summary.n_tokens as f64,
                    dropped: summary.dropped,
                    experts: counts.len(),
                    slots: summary.mean_picks,
                    fullest: most.unwrap_or_default(),
                })
            })
            .collect()
    }

    /// Scores at most `max_tokens` held-out tokens of every domain, without gradients.
    fn evaluate(&self, corpus: &Corpus, max_tokens: usize) -> Result<EvalRecord> {
        let model = self.model().valid();
        let pass = Pass {
            seed: self.recipe.seed,
            step: self.optimizer.step,
            ..Pass::default()
        };
        let seq_len = self.recipe.train.seq_len;
        let mut record = EvalRecord {
            step: self.optimizer.step,
            eval: std::collections::BTreeMap::new(),
        };
        for domain in &corpus.domains {
            let Some(all) = data::windows(&domain.heldout, seq_len, max_tokens) else {
                continue;
            };
            let size = self.recipe.train.batch_size * seq_len;
            let (mut sum, mut n) = (0.0, 0);
            for (tokens, targets) in all.tokens.chunks(size).zip(all.targets.chunks(size)) {
                let batch = Batch {
                    tokens: std::sync::Arc::new(tokens.to_vec()),
                    targets: std::sync::Arc::new(targets.to_vec()),
                    seq_len,
                };
                let losses = model.losses(&self.architecture, &batch, &pass);
                let losses = losses.map_err(|e| self.routing_error(record.step, e))?;
                let nll = f64::from(losses.cross_entropy.into_scalar::<f32>());
                sum += nll * tokens.len() as f64;
                n += tokens.len();
            }
            let nll = sum / n as f64;
            if !nll.is_finite() {
                let what = format!("the held-out loss of {}", domain.name);
                return Err(self.diverged(record.step, &what));
            }
            let score = Score {
                tokens: n,
                nll,
                perplexity: nll.exp(),
            };
            record.eval.insert(domain.name.clone(), score);
        }
        Ok(record)
    }
}

/// The part with the largest gradient. Not finite beats finite, and there the last part in the order of the forward
/// pass: gradients flow downwards from it, and what is not finite spreads with them.
fn largest(step: u64, parts: Vec<(String, f64)>) -> Option<LargestGradient> {
    let all = parts.iter().all(|(_, norm)| !norm.is_finite());
    let worst = if all {
        // Says nothing about where it began.
        None
    } else if let Some(bad) = parts.iter().rev().find(|(_, norm)| !norm.is_finite()) {
        Some(bad)
    } else {
        parts.iter().max_by(|a, b| a.1.total_cmp(&b.1))
    };
    worst.map(|(part, norm)| LargestGradient {
        step,
        part: part.clone(),
        norm: *norm,
    })
}
