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
        "training continues plain qwen3_moe checkpoints (no biases, windows or rope scaling); this one is {model_type}"
    )]
    Untrainable {
        /// Architecture of the checkpoint.
        model_type: String,
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
    /// The output folder belongs to another recipe.
    #[error("{} holds a run of a different recipe ({what} differs); set another [output] dir, or pass --fresh to delete that run and start over", path.display())]
    OtherRun {
        /// The output folder.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A snapshot is damaged.
    #[error("snapshot {} is damaged: {problem}", path.display())]
    Snapshot {
        /// The snapshot.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Loss or router logits are not finite.
    #[error(
        "step {step}: {what} is not finite, the run has diverged; lower train.lr, or raise train.warmup_steps"
    )]
    Diverged {
        /// The optimizer step.
        step: u64,
        /// What is not finite.
        what: String,
    },
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Routing failed.
    #[error(transparent)]
    Routing(#[from] RoutingError),
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
