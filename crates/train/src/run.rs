//! A run in memory: one optimizer step, one evaluation, and what a snapshot has to hold.

use crate::architecture::Architecture;
use crate::data::{self, Corpus};
use crate::error::{LargestGradient, Result, TrainError};
use crate::init::Init;
use crate::lm::{Batch, LanguageModel, Pass};
use crate::log::{EvalRecord, LayerRecord, Score, StepRecord};
use crate::methods::balance_bias;
use crate::methods::balance_scope::{Scope, ScopedLoads, merge};
use crate::methods::cut;
use crate::methods::distill::Teacher;
use crate::methods::prune_rows;
use crate::methods::router_distill::Guide;
use crate::methods::start;
use crate::objective::{Objective, value};
use crate::ops::{Numerics, Recompute};
use crate::optimizer::{AdamW, GradientSum};
use crate::recipe::Recipe;
use crate::snapshot;
use burn::module::Module;
use cadre_checkpoint::{Factors, ModelConfig};
use cadre_kernels::doctor::processor_time;
use cadre_routing::{Loads, RoutingError};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A run in memory.
pub(crate) struct Run<'a> {
    recipe: &'a Recipe,
    pub(crate) architecture: Architecture,
    /// Absent only while the optimizer has it.
    model: Option<LanguageModel>,
    optimizer: AdamW,
    /// Selection-only biases by MoE layer; empty without `[balance_bias]` and without any where the run starts from.
    biases: Vec<Vec<f32>>,
    /// Importances of the rows of experts in factors, by matrix; empty without `[prune_rows]`.
    importance: Vec<Vec<f32>>,
    teacher: Option<Teacher>,
    guide: Option<Guide>,
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
    further: BTreeMap<String, f64>,
    loads: Vec<Loads>,
    attention: Vec<Loads>,
    /// Waited for batches.
    data_seconds: f64,
}

impl<'a> Run<'a> {
    /// The first step of `recipe` is next. What is cut from a dense model is cut by what `corpus` makes it do.
    pub(crate) fn new(recipe: &'a Recipe, corpus: Option<&Corpus>) -> Result<Self> {
        let mut architecture = recipe.architecture()?;
        let asked = recipe.train.precision;
        if asked.here() != asked {
            tracing::warn!(
                "this CPU does not multiply {}; training in {}",
                asked.name(),
                asked.here().name()
            );
        }
        let device = recipe.train.device.open()?.autodiff();
        let init = Init {
            seed: recipe.seed,
            std: recipe.model.initializer_range,
            device: device.clone(),
        };
        let mut model = LanguageModel::init(&architecture, &init);
        let mut biases = Vec::new();
        if let Some(folder) = recipe.start.as_ref().and_then(|s| s.from.as_ref()) {
            let opened = start::load(folder, &architecture, &model, &device)?;
            (model, biases) = (opened.model, opened.biases);
            take_special_tokens(&mut architecture.config, opened.architecture.config);
        }
        if biases.is_empty() && recipe.balance_bias.is_some() {
            biases = balance_bias::zeros(&architecture);
        }
        let teacher = recipe.distill.as_ref();
        let teacher = teacher.map(|options| {
            Teacher::open(
                options,
                recipe.model.vocab_size,
                &device.clone().without_autodiff(),
            )
        });
        let mut neurons = None;
        if let (Some(options), Some(corpus)) = (&recipe.cut, corpus) {
            let around = cut::Around {
                corpus,
                seq_len: recipe.train.seq_len,
                seed: recipe.seed,
                device: &device,
            };
            let made = cut::load(options, &architecture, &model, around)?;
            model = made.model;
            take_special_tokens(&mut architecture.config, made.dense);
            neurons = Some((made.neurons, options.sharpness));
        }
        // Without text nothing is cut, and nobody can be followed.
        let taught = recipe.router_distill.as_ref();
        let taught = taught.filter(|_| recipe.cut.is_none() || neurons.is_some());
        let guide = taught.map(|options| {
            let plain = device.clone().without_autodiff();
            Guide::open(options, &architecture, neurons, &plain)
        });
        let importance = recipe.prune_rows.map(|_| prune_rows::zeros(&model));
        Ok(Self {
            importance: importance.unwrap_or_default(),
            model: Some(model),
            optimizer: AdamW::new(recipe.optimizer),
            biases,
            teacher: teacher.transpose()?,
            guide: guide.transpose()?,
            largest: None,
            recipe,
            architecture,
        })
    }

    /// Steps taken.
    pub(crate) fn steps(&self) -> u64 {
        self.optimizer.step
    }

    pub(crate) fn model(&self) -> &LanguageModel {
        self.model.as_ref().expect("a model between steps")
    }

    /// Selection-only biases by MoE layer; empty when there are none.
    pub(crate) fn biases(&self) -> &[Vec<f32>] {
        &self.biases
    }

    /// All steps are done: what does not belong to the finished model goes.
    pub(crate) fn finish(&mut self) {
        let (Some(rule), Some(model)) = (self.recipe.prune_rows, &mut self.model) else {
            return;
        };
        let rows = rule.finish(self.recipe.train.steps, &self.importance, model);
        let factors = &mut self.architecture.config.moe.factors;
        *factors = factors.take().map(|old| Factors::uneven(old.rank, rows));
    }

    /// Saves a snapshot into `folder`.
    pub(crate) fn save(&self, folder: &Path) -> Result<PathBuf> {
        let state = snapshot::State {
            model: self.model(),
            optimizer: &self.optimizer,
            biases: &self.biases,
            importance: &self.importance,
        };
        snapshot::save(folder, self.recipe, &state)
    }

    /// Restores the newest whole snapshot; returns the damaged ones.
    pub(crate) fn resume(&mut self, snapshots: &Path) -> Result<Vec<TrainError>> {
        let (model, refused) = snapshot::restore(
            snapshots,
            self.recipe,
            self.model().clone(),
            &mut self.optimizer,
            (&mut self.biases, &mut self.importance),
        )?;
        self.model = Some(model);
        Ok(refused)
    }

    /// One optimizer step; `batch` gives micro-batches by step and index.
    pub(crate) fn step(&mut self, batch: impl Fn(u64, usize) -> Batch) -> Result<StepRecord> {
        let (start, busy) = (Instant::now(), processor_time());
        let step = self.optimizer.step + 1;
        if let Some(evolve) = self.recipe.evolve {
            let model = self.model.take().expect("a model between steps");
            let moments = &mut self.optimizer.moments;
            self.model = Some(evolve.spawn(step, self.recipe.seed, model, moments));
        }
        let (mut gradients, mut totals) = self.gradients(step, &batch)?;
        if let Some(start) = &self.recipe.start {
            gradients.retain(|path| !start.is_frozen(path));
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
        if self.recipe.prune_rows.is_some() {
            let model = self.model.as_ref().expect("a model between steps");
            prune_rows::observe(&mut self.importance, model, &gradients);
        }
        // The optimizer updates in place, which needs the only handle to each tensor: so the model moves.
        let model = self.model.take().expect("a model between steps");
        let mut model = self.optimizer.step(model, gradients, lr, scale);
        if let Some(rule) = self.recipe.prune_rows {
            let when = (step, self.recipe.train.steps);
            let left = rule.prune(when, &self.importance, &mut model);
            totals.further.insert("rows_left".to_owned(), left);
        }
        self.model = Some(model);
        if let Some(rule) = self.recipe.balance_bias {
            rule.update(step, &mut self.biases, &totals.loads);
        }
        let seconds = start.elapsed().as_secs_f64();
        let idle_seconds = idle(seconds, busy, rayon::current_num_threads());
        let tokens = self.recipe.tokens_per_step();
        Ok(StepRecord {
            step,
            tokens: step * tokens as u64,
            loss: totals.loss,
            cross_entropy: totals.cross_entropy,
            balance: totals.balance,
            z: totals.z,
            parts: totals.further,
            lr,
            grad_norm: norm,
            tokens_per_second: tokens as f64 / seconds,
            seconds,
            data_seconds: totals.data_seconds,
            idle_seconds,
            layers: self.layer_records(&totals.loads),
            attention: attention_records(&totals.attention),
        })
    }

    fn pass(&self, step: u64, index: usize) -> Pass<'_> {
        Pass {
            numerics: Numerics {
                precision: self.recipe.train.precision,
                recompute: self.recipe.train.recompute,
            },
            seed: self.recipe.seed,
            step,
            index,
            training: true,
            biases: &self.biases,
            detached: self.guide.is_some(),
        }
    }

    /// Sums over the micro-batches of a step.
    fn gradients(
        &self,
        step: u64,
        batch: &impl Fn(u64, usize) -> Batch,
    ) -> Result<(GradientSum, Totals)> {
        let n_micro = self.recipe.train.accumulate;
        let share = 1.0 / n_micro as f32;
        let objective = Objective {
            architecture: &self.architecture,
            weights: self.recipe.losses,
            teacher: self.teacher.as_ref(),
            guide: self.guide.as_ref(),
        };
        // Over a single pass there is nothing to gather.
        let scope = match n_micro * objective.n_passes() {
            1 => Scope::Micro,
            _ => self.recipe.losses.scope,
        };
        let mut scoped = ScopedLoads::new(scope);
        let (mut totals, mut data_seconds) = (Totals::default(), 0.0);
        let mut next = |micro| {
            let start = Instant::now();
            let batch = batch(step, micro);
            data_seconds += start.elapsed().as_secs_f64();
            batch
        };
        if scope == Scope::Global {
            let valid = self.model().valid();
            for micro in 0..n_micro {
                let pass = self.pass(step, micro);
                let counted = objective.count(&valid, &next(micro), &pass, &mut scoped);
                counted.map_err(|e| self.routing_error(step, e))?;
            }
        }
        let model = self.model().clone();
        // Computing layers again begins at each of them, whoever learns.
        let all = self.recipe.train.recompute == Recompute::Layer;
        let model = match &self.recipe.start {
            Some(start) if !all => start.held_still(model),
            _ => model,
        };
        let mut gradients = GradientSum::default();
        for micro in 0..n_micro {
            let (batch, pass) = (next(micro), self.pass(step, micro));
            let parts = objective.of(&model, &batch, &pass, &mut scoped);
            let parts = parts.map_err(|e| self.routing_error(step, e))?;
            let loss = value(parts.loss.clone()).map_err(|e| self.routing_error(step, e))?;
            if !loss.is_finite() {
                return Err(self.diverged(step, "the loss"));
            }
            let share_of = |x: f64| x * f64::from(share);
            totals.loss += share_of(loss);
            totals.cross_entropy += share_of(parts.cross_entropy);
            totals.balance += share_of(parts.balance);
            totals.z += share_of(parts.z);
            for (name, x) in &parts.further {
                *totals.further.entry(name.clone()).or_default() += share_of(*x);
            }
            merge(&mut totals.loads, parts.loads.iter())?;
            merge(&mut totals.attention, parts.attention.iter())?;
            let of = (&model, &batch, &pass);
            let added = objective.add_gradients(of, parts, share, &mut gradients);
            added.map_err(|e| self.routing_error(step, e))?;
        }
        totals.data_seconds = data_seconds;
        Ok((gradients, totals))
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
            RoutingError::Device { problem } => TrainError::Device {
                device: self.recipe.train.device.name(),
                problem: format!(
                    "step {step}: {problem}; less memory is needed with a smaller `train.batch_size` (and more \
                     `train.accumulate`), a smaller `train.seq_len`, or `train.recompute` = \"layer\""
                ),
            },
            other => other.into(),
        }
    }

    fn layer_records(&self, loads: &[Loads]) -> Vec<LayerRecord> {
        let layers = self.architecture.moe.iter();
        layers
            .zip(loads)
            .filter_map(|(moe, loads)| record(moe.layer, moe.router.n_real_experts(), loads))
            .collect()
    }

    /// Scores at most `max_tokens` held-out tokens of every domain, without gradients. `scored` hears how many of all tokens are
    /// done, and ends it by saying no.
    pub(crate) fn evaluate(
        &self,
        corpus: &Corpus,
        max_tokens: usize,
        scored: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Option<EvalRecord>> {
        let model = self.model().valid();
        let pass = Pass {
            training: false,
            ..self.pass(self.steps(), 0)
        };
        let seq_len = self.recipe.train.seq_len;
        let mut record = EvalRecord {
            step: self.steps(),
            eval: BTreeMap::new(),
        };
        let domains = corpus.domains.iter();
        let texts: Vec<_> = domains
            .filter_map(|domain| {
                Some((domain, data::windows(&domain.heldout, seq_len, max_tokens)?))
            })
            .collect();
        let total = texts.iter().map(|(_, all)| all.tokens.len()).sum();
        let mut done = 0;
        for (domain, all) in texts {
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
                let mean =
                    value(losses.cross_entropy).map_err(|e| self.routing_error(record.step, e))?;
                sum += mean * tokens.len() as f64;
                n += tokens.len();
                done += tokens.len();
                if !scored(done, total) {
                    return Ok(None);
                }
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
        Ok(Some(record))
    }
}

/// Of `seconds`, those in which a thread did not run, as a mean over `n_threads`; `before` is the processor time at their
/// beginning.
fn idle(seconds: f64, before: Option<Duration>, n_threads: usize) -> f64 {
    let (Some(before), Some(now)) = (before, processor_time()) else {
        return 0.0;
    };
    let busy = now.saturating_sub(before).as_secs_f64();
    (seconds - busy / n_threads.max(1) as f64).max(0.0)
}

/// What begins and stops a text is a matter of the tokenizer, which is that of the checkpoint `theirs`.
fn take_special_tokens(ours: &mut ModelConfig, theirs: ModelConfig) {
    ours.eos_token_ids = theirs.eos_token_ids;
    ours.bos_token_id = theirs.bos_token_id;
    ours.pad_token_id = theirs.pad_token_id;
}

/// What the log says of the attention of each layer.
fn attention_records(loads: &[Loads]) -> Vec<LayerRecord> {
    let layers = loads.iter().enumerate();
    layers
        .filter_map(|(layer, loads)| record(layer, loads.counts().len(), loads))
        .collect()
}

/// What the log says of the picks of `layer`, whose first `n_real` experts are not null ones.
fn record(layer: usize, n_real: usize, loads: &Loads) -> Option<LayerRecord> {
    let summary = loads.summary()?;
    let counts = loads.counts();
    let real: u64 = counts[..n_real].iter().sum();
    let most = (0..counts.len()).rev().max_by_key(|&e| counts[e]);
    Some(LayerRecord {
        layer,
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
