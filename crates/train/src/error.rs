//! The errors of training: each names the file, key or step, and says what to do.

use cadre_checkpoint::CheckpointError;
use cadre_routing::RoutingError;
use std::path::{Path, PathBuf};

/// Result with a [`TrainError`].
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

/// Everything that can go wrong in a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A checkpoint that the training model cannot continue.
    #[error(
        "training continues plain qwen3, qwen3_moe, glm4_moe, llama, mixtral and cadre_moe checkpoints (no biases, windows, partial rotation or rope scaling); this one is {model_type}"
    )]
    Untrainable {
        /// Architecture of the checkpoint.
        model_type: String,
    },
    /// Experts in factors whose rows belong nowhere.
    #[error(
        "tensor `{tensor}` holds {value} at {at}, expected rows below {n_out}; write the checkpoint again"
    )]
    NoRow {
        /// Its name.
        tensor: String,
        /// Place in it.
        at: usize,
        /// What is there.
        value: f32,
        /// Rows of the matrix.
        n_out: usize,
    },
    /// A trained model that no known checkpoint layout holds.
    #[error(
        "a model with {what} cannot be written as a checkpoint, because nothing that generates could compute it; the run's log and snapshots are complete"
    )]
    Unexportable {
        /// What does not fit.
        what: String,
    },
    /// A file or folder cannot be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// Verb: `read`, `write`, ...
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Reason from the operating system.
        source: std::io::Error,
    },
    /// The device is full.
    #[error("no space left on the device while writing {}; free some space or set another [output] dir (nothing half-written was left behind)", path.display())]
    NoSpace {
        /// The file that was being written.
        path: PathBuf,
    },
    /// The recipe does not parse, has an unknown key, or a value of the wrong type.
    #[error("recipe {}: {message}", path.display())]
    Recipe {
        /// The recipe.
        path: PathBuf,
        /// Position, key and expectation.
        message: String,
    },
    /// A data file has a line that is not a document.
    #[error("{} line {line}: {problem}; expected {{\"domain\": .., \"text\": ..}} on every line", path.display())]
    Document {
        /// The data file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A file of token ids does not hold the batches of the run.
    #[error("{}: {problem}", path.display())]
    Tokens {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// A data source is too small to train on.
    #[error("{}: {n_tokens} tokens, expected more than seq_len = {seq_len}; add text or lower seq_len", path.display())]
    TooLittleData {
        /// The data file.
        path: PathBuf,
        /// Tokens found.
        n_tokens: usize,
        /// Tokens needed.
        seq_len: usize,
    },
    /// All the text is less than one step takes.
    #[error(
        "the training text has {n_tokens} tokens, one step takes {n_wanted} (batch_size * seq_len * accumulate); add text, or lower one of the three"
    )]
    LessThanBatch {
        /// Tokens of all domains.
        n_tokens: usize,
        /// Tokens of a step.
        n_wanted: usize,
    },
    /// A checkpoint that a run starts from or follows is not what the recipe describes.
    #[error("{} does not fit the recipe: {}", path.display(), differences.join("; "))]
    DoesNotFit {
        /// The checkpoint.
        path: PathBuf,
        /// What differs, with both values.
        differences: Vec<String>,
    },
    /// The output folder belongs to another recipe.
    #[error("{} holds a run of a different recipe:{}\nchoose another output folder, or pass --fresh to delete that run and start over", path.display(), listed(differences))]
    OtherRun {
        /// The output folder.
        path: PathBuf,
        /// Every key that differs.
        differences: Vec<Difference>,
    },
    /// A snapshot is damaged.
    #[error("snapshot {} is damaged: {problem}", path.display())]
    Snapshot {
        /// The snapshot.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Loss, gradient, a parameter or router logits are not finite.
    #[error("step {step}: {what} is not finite, the run has diverged{}{}; lower train.lr, or raise train.warmup_steps", where_largest(largest.as_ref()), what_is_kept(kept.as_deref()))]
    Diverged {
        /// The optimizer step.
        step: u64,
        /// What is not finite.
        what: String,
        /// The largest gradient that is known.
        largest: Option<LargestGradient>,
        /// The newest snapshot, from before the divergence.
        kept: Option<PathBuf>,
    },
    /// The device of a recipe cannot be used.
    #[error("train.device = \"{device}\": {problem}")]
    Device {
        /// As the recipe names it.
        device: &'static str,
        /// Why, and what to do.
        problem: String,
    },
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Routing failed.
    #[error(transparent)]
    Routing(#[from] RoutingError),
}

/// A key of a recipe with two values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// `section.key`
    pub key: String,
    /// JSON of the value that the run was started with; `None` when it had no such key.
    pub run: Option<String>,
    /// JSON of the value in the recipe; `None` when it has no such key.
    pub recipe: Option<String>,
}

/// The part of the model with the largest gradient of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct LargestGradient {
    /// The step of the gradient.
    pub step: u64,
    /// `layer 3`, `embed_tokens`, ...
    pub part: String,
    /// Its Euclidean norm; NaN or infinite when it is not finite.
    pub norm: f64,
}

fn listed(differences: &[Difference]) -> String {
    let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
    differences
        .iter()
        .map(|d| {
            let (run, recipe) = (value(&d.run), value(&d.recipe));
            format!("\n  {}: {run} in the run, {recipe} in the recipe", d.key)
        })
        .collect()
}

fn where_largest(largest: Option<&LargestGradient>) -> String {
    match largest {
        None => String::new(),
        Some(LargestGradient { step, part, norm }) if norm.is_finite() => {
            format!("; the largest gradient of step {step} is in {part} (norm {norm:.3e})")
        }
        Some(LargestGradient { part, .. }) => format!("; it begins in {part}"),
    }
}

fn what_is_kept(kept: Option<&Path>) -> String {
    kept.map_or_else(String::new, |path| {
        format!("; the last good snapshot is {}", path.display())
    })
}

impl TrainError {
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            std::io::ErrorKind::StorageFull => Self::NoSpace { path },
            _ => Self::Io {
                action,
                path,
                source,
            },
        }
    }
}
