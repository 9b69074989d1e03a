//! The run's log: one JSON line per step, per evaluation and per warning.
//!
//! A resumed run first drops the lines after its snapshot, so the file always reads as one uninterrupted run.

use crate::error::{Result, TrainError};
use crate::files;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// One optimizer step.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer step, from 1.
    pub step: u64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Sum of the parts below with their coefficients.
    pub loss: f64,
    /// Next-token cross-entropy, nats per token.
    pub cross_entropy: f64,
    /// Load-balance loss, mean over layers; 1 at perfect balance.
    pub balance: f64,
    /// Router z-loss, mean over layers.
    pub z: f64,
    /// Further parts by name, each without its coefficient; only those that the recipe asks for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parts: BTreeMap<String, f64>,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Speed of this step.
    pub tokens_per_second: f64,
    /// Duration of this step.
    pub seconds: f64,
    /// Of them, those in which the next batch was waited for; 0 in logs of earlier versions, as is the next.
    #[serde(default)]
    pub data_seconds: f64,
    /// Of them, those in which a thread had nothing to do or no processor, as a mean over the threads. A thread that looks
    /// for work is not idle; 0 where the system does not count processor time.
    #[serde(default)]
    pub idle_seconds: f64,
    /// Each MoE layer's routing.
    pub layers: Vec<LayerRecord>,
    /// The routing of each layer's attention, where it has experts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attention: Vec<LayerRecord>,
}

/// The routing of one MoE layer, or of one layer's attention, in one step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Layer index.
    pub layer: usize,
    /// Standard deviation over mean of the expert loads.
    pub cv: f64,
    /// Largest load over mean load, minus 1.
    pub max_vio: f64,
    /// Experts without a token.
    pub dead: usize,
    /// Mean entropy of the router's probabilities, nats.
    pub entropy: f64,
    /// Mean real experts per token, before dropping.
    #[serde(default)]
    pub picks: f64,
    /// Share of the picks that a capacity filter dropped.
    #[serde(default)]
    pub dropped: f64,
    /// Experts of the layer, null experts included; 0 in logs of earlier versions, as are the next two.
    #[serde(default)]
    pub experts: usize,
    /// Mean picks per token, null picks included.
    #[serde(default)]
    pub slots: f64,
    /// The expert with most picks.
    #[serde(default)]
    pub fullest: usize,
}

/// Something that whoever watches the run should look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarningRecord {
    /// Step after which it was noticed.
    pub step: u64,
    /// The layer it is about.
    pub layer: usize,
    /// What is wrong, and what to do.
    pub warning: String,
}

/// One evaluation on held-out text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps taken before it.
    pub step: u64,
    /// By domain.
    pub eval: BTreeMap<String, Score>,
}

/// Held-out quality of one domain.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Score {
    /// Predicted tokens.
    pub tokens: usize,
    /// Mean nats per token.
    pub nll: f64,
    /// `exp(nll)`
    pub perplexity: f64,
}

/// The evaluations in the log at `path`, in their order.
///
/// # Errors
/// A file that cannot be read.
pub fn evaluations(path: &Path) -> Result<Vec<EvalRecord>> {
    let text = std::fs::read_to_string(path).map_err(|e| TrainError::io("read", path, e))?;
    let lines = text.lines();
    Ok(lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

/// The log file, open for appending.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

#[derive(Deserialize)]
struct Stepped {
    step: u64,
}

impl Log {
    /// Opens `path`, keeping only whole lines of steps up to `step`; returns the steps that were kept, too.
    pub(crate) fn open(path: &Path, step: u64) -> Result<(Self, Vec<StepRecord>)> {
        let old = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(TrainError::io("read", path, e)),
        };
        let kept: String = old
            .lines()
            .filter(|line| serde_json::from_str::<Stepped>(line).is_ok_and(|s| s.step <= step))
            .flat_map(|line| [line, "\n"])
            .collect();
        files::write_atomic(path, kept.as_bytes())?;
        let file = File::options()
            .append(true)
            .open(path)
            .map_err(|e| TrainError::io("open", path, e))?;
        let log = Self {
            path: path.to_owned(),
            file,
        };
        let steps = kept
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        Ok((log, steps.collect()))
    }

    /// Whether held-out text was scored after `step` steps.
    pub(crate) fn has_evaluation(&self, step: u64) -> Result<bool> {
        Ok(evaluations(&self.path)?
            .iter()
            .any(|record| record.step == step))
    }

    pub(crate) fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record).expect("plain data");
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(|e| TrainError::io("write", &self.path, e))
    }
}
