//! What can go wrong while planning and applying: each error names the file, layer or option, and says what to do.

use std::path::PathBuf;

use cadre_checkpoint::CheckpointError;
use cadre_engine::EngineError;
use cadre_routing::plan::PlanError;
use cadre_trace::TraceError;

/// Result with a [`ReshapeError`].
pub type Result<T, E = ReshapeError> = std::result::Result<T, E>;

/// Everything that can be wrong with a plan, what it is made from, and what it is applied to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReshapeError {
    /// The checkpoint cannot be read, or not be written as planned.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A model cannot be run.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The trace cannot be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The plan does not fit the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A checkpoint has no place for what a steering says.
    #[error("`{rule}` of the steering cannot be written into a checkpoint: {problem}")]
    NotBaked {
        /// The rule.
        rule: &'static str,
        /// Why, and what to do.
        problem: String,
    },
    /// The plan file cannot be read.
    #[error("cannot read the plan {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Reason from the operating system.
        source: std::io::Error,
    },
    /// The file of measurements cannot be read or written.
    #[error("cannot keep measurements in {}", path.display())]
    Measurements {
        /// The file.
        path: PathBuf,
        /// Reason from the operating system.
        source: std::io::Error,
    },
    /// The plan file is no plan.
    #[error("{file} is not a plan: {problem}; make one with `cadre plan`")]
    NotAPlan {
        /// The file.
        file: String,
        /// Where and why.
        problem: String,
    },
    /// The trace lacks what the method needs.
    #[error("the trace {origin} {problem}; {hint}")]
    TraceLacks {
        /// The trace file.
        origin: String,
        /// What is missing.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// Two checkpoints that were said to be one model are not.
    #[error("{one} and {other} are not the same model: {problem}")]
    OtherModel {
        /// The one.
        one: String,
        /// The other.
        other: String,
        /// What differs.
        problem: String,
    },
    /// A configuration of mergekit-moe that cannot be followed.
    #[error("{file} is not a configuration of mergekit-moe that can be followed: {problem}")]
    Mergekit {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A method or option is not known or cannot be used here.
    #[error("{name} {problem}")]
    Option {
        /// The option.
        name: &'static str,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// Measuring was asked to stop.
    #[error("stopped before all was measured")]
    Stopped,
    /// Fewer experts are wanted than the model can be left with.
    #[error(
        "layer {layer} would keep {kept} of {of} experts, but needs {least}: a token is sent to {top_k}, and groups of experts stay equal; keep at least {least} of {of}"
    )]
    TooFew {
        /// Decoder layer.
        layer: usize,
        /// Experts that would stay.
        kept: usize,
        /// Experts that it has.
        of: usize,
        /// Experts that it needs.
        least: usize,
        /// Experts per token.
        top_k: usize,
    },
    /// Not even the fewest experts fit the budget.
    #[error(
        "the model takes {needed} bytes with the fewest experts that its routers can pick from, more than the budget of {budget}"
    )]
    DoesNotFit {
        /// Bytes of the smallest output.
        needed: u64,
        /// Bytes that were allowed.
        budget: u64,
    },
}
