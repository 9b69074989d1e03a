//! The loop: batches -> losses -> gradients -> update, with log, evaluation, snapshots and resumption.

use crate::collapse::CollapseWatch;
use crate::data::{self, Corpus, GivenTokens};
use crate::error::{Result, TrainError};
use crate::export::{Exported, export};
use crate::files;
use crate::log::{EvalRecord, Log, StepRecord, WarningRecord};
use crate::recipe::Recipe;
use crate::run::Run;
use crate::snapshot;
use cadre_checkpoint::Dtype;
use std::path::{Path, PathBuf};

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
    /// So many of all tokens of the held-out text are scored.
    fn scored(&mut self, _done: usize, _total: usize) {}
    /// Held-out text was scored.
    fn evaluated(&mut self, _record: &EvalRecord) {}
    /// Whether to save a snapshot and stop before the next step, or while all held-out text is scored.
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
    let mut run = Run::new(recipe, Some(&corpus))?;
    let snapshots = folder.join("snapshots");
    let refused = run.resume(&snapshots)?;
    progress.begin(run.steps(), recipe.train.steps, &refused);
    let (mut log, before) = Log::open(&folder.join("log.jsonl"), run.steps())?;
    let mut watch = CollapseWatch::default();
    for record in &before {
        // Told already; a resumed run only has to know how long a spell has lasted.
        observe(&mut watch, recipe, record);
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
    if recipe.output.eval_first && run.steps() == 0 && !log.has_evaluation(0)? {
        progress.stage("held-out text");
        let Some(record) = run
            .evaluate(&corpus, usize::MAX, &mut heard(progress))
            .map_err(kept)?
        else {
            return Ok(Outcome::Stopped { step: 0 });
        };
        log.write(&record)?;
        progress.evaluated(&record);
    }
    while run.steps() < recipe.train.steps {
        if progress.stop() {
            run.save(&snapshots)?;
            let step = run.steps();
            return Ok(Outcome::Stopped { step });
        }
        let record = run
            .step(|step, micro| corpus.batch(recipe, step, micro))
            .map_err(kept)?;
        log.write(&record)?;
        progress.step(&record);
        for warning in observe(&mut watch, recipe, &record) {
            log.write(&warning)?;
            progress.warning(&warning);
        }
        let step = record.step;
        let every = recipe.output.eval_every;
        if every > 0 && step.is_multiple_of(every) && step < recipe.train.steps {
            // A stop waits for it, so that the log is that of a run without one.
            let record = run.evaluate(&corpus, data.eval_tokens, &mut |_, _| true);
            if let Some(record) = record.map_err(kept)? {
                log.write(&record)?;
                progress.evaluated(&record);
            }
        }
        if step.is_multiple_of(recipe.output.snapshot_every) || step == recipe.train.steps {
            run.save(&snapshots)?;
        }
    }
    progress.stage("held-out text");
    let eval = run.evaluate(&corpus, usize::MAX, &mut heard(progress));
    let Some(eval) = eval.map_err(kept)? else {
        let step = run.steps();
        return Ok(Outcome::Stopped { step });
    };
    log.write(&eval)?;
    progress.evaluated(&eval);
    let model = folder.join("model");
    run.finish();
    let exported = Exported {
        architecture: &run.architecture,
        biases: run.biases(),
        // The schedules of a router that waits for its phase count from there.
        step: run.steps() - recipe.evolve.map_or(0, |evolve| evolve.dense_steps),
    };
    let tokenizer = &corpus.tokenizer_json;
    let model = match export(run.model(), exported, tokenizer, Dtype::Bf16, &model) {
        Ok(()) => Ok(model),
        Err(error @ TrainError::Unexportable { .. }) => Err(error),
        Err(error) => return Err(error),
    };
    Ok(Outcome::Finished { model, eval })
}

/// Tells how much of the held-out text is scored, until it is to stop.
fn heard(progress: &mut dyn Progress) -> impl FnMut(usize, usize) -> bool {
    |done, total| {
        progress.scored(done, total);
        !progress.stop()
    }
}

fn observe(watch: &mut CollapseWatch, recipe: &Recipe, record: &StepRecord) -> Vec<WarningRecord> {
    // All tokens go to one expert on purpose there.
    if recipe.evolve.is_some_and(|e| record.step <= e.dense_steps) {
        return Vec::new();
    }
    watch.observe(recipe.tokens_per_step(), record)
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

/// Speed and losses of some steps on random tokens, or on those of a file ([`GivenTokens`]), for comparisons.
///
/// # Errors
/// Divergence, and a file that does not hold the tokens of so many steps.
pub fn bench(recipe: &Recipe, steps: u64, tokens: Option<&Path>) -> Result<Vec<StepRecord>> {
    let given = tokens.map(|path| GivenTokens::read(path, recipe, steps));
    let given = given.transpose()?;
    let mut run = Run::new(recipe, None)?;
    let batch = |step, micro| match &given {
        Some(given) => given.batch(recipe, step, micro),
        None => data::random_batch(recipe, step, micro),
    };
    (0..steps).map(|_| run.step(batch)).collect()
}

/// Number of parameters of a recipe's model.
///
/// # Errors
/// Router options that cannot work, which reading a recipe has already refused.
pub fn n_parameters(recipe: &Recipe) -> Result<usize> {
    Ok(recipe.architecture()?.n_parameters())
}
