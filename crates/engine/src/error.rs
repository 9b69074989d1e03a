//! What can go wrong while a model is loaded or run; every message says what to do.

use cadre_checkpoint::CheckpointError;
use cadre_kernels::{Isa, MatrixError};
use cadre_routing::{RoutingError, SteerError};
use cadre_store::StoreError;

/// Result with an [`EngineError`].
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The configuration lacks what the architecture's blocks are made of.
    #[error("a {model_type} model cannot be built: {problem}")]
    Configuration {
        /// Architecture.
        model_type: String,
        /// What is missing.
        problem: String,
    },
    /// The checkpoint is not what its configuration says.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No model is written for this architecture.
    #[error(
        "model_type \"{found}\" is not known to the engine; known model types: {}",
        known.join(", ")
    )]
    UnknownModelType {
        /// What the configuration says.
        found: String,
        /// What could be loaded.
        known: Vec<&'static str>,
    },
    /// A weight cannot be held in the format that was asked for.
    #[error("tensor `{tensor}` cannot be loaded as asked; load it without quantisation")]
    Weight {
        /// Name of the tensor.
        tensor: String,
        /// The reason.
        source: MatrixError,
    },
    /// A weight that was read while the model ran is NaN or infinite.
    #[error(
        "tensor `{tensor}`: row {row}, column {column} is NaN or infinite; the file is damaged, get it again"
    )]
    NonFiniteWeight {
        /// What the file calls it.
        tensor: String,
        /// Row of the matrix.
        row: usize,
        /// Column of the matrix.
        column: usize,
    },
    /// Experts could not be brought in from disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The budget is too small for the weights that every token uses.
    #[error(
        "a budget of {} for weights is too small: at least {} are needed, {} for what every token uses and the rest to \
         bring in experts; raise the budget or use a smaller format",
        mib(*budget, f64::floor), mib(*needed, f64::ceil), mib(*dense, f64::round)
    )]
    BudgetTooSmall {
        /// Bytes that may be taken.
        budget: u64,
        /// Bytes that are needed at least.
        needed: u64,
        /// Of those, the ones that every token uses.
        dense: u64,
    },
    /// What was to lend its experts is another model.
    #[error(
        "{found} cannot stand in for experts of {wanted}: they differ in architecture, layers, experts or widths; \
         it must be the same model in another format"
    )]
    OtherModel {
        /// What was to lend them.
        found: String,
        /// The model.
        wanted: String,
    },
    /// The instruction set that was asked for is not there.
    #[error("this CPU has no {wanted}; it has: {}", names(available))]
    IsaUnavailable {
        /// What was asked for.
        wanted: Isa,
        /// What there is.
        available: Vec<Isa>,
    },
    /// An option has a value that makes no sense.
    #[error("{name} = {value}: expected {expected}")]
    BadOption {
        /// Name of the option.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// The choice of experts cannot be changed so.
    #[error("steering: {0}")]
    Steering(#[from] SteerError),
    /// The prompt has no tokens.
    #[error("the prompt is empty: there is nothing to continue; pass at least one token")]
    EmptyPrompt,
    /// The prompt does not fit.
    #[error(
        "the prompt has {n_tokens} tokens, more than the {free} free of a context of {n_ctx}; \
         shorten it or raise the context size (the model's limit is {limit})"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        n_tokens: usize,
        /// Positions that are free.
        free: usize,
        /// Positions of the session.
        n_ctx: usize,
        /// The longest context of the model.
        limit: usize,
    },
    /// More tokens were given than there are free positions.
    #[error(
        "the context is full: {n_tokens} more tokens at position {position} do not fit in {n_ctx}; \
         raise the context size or start a new session"
    )]
    ContextFull {
        /// Positions in use.
        position: usize,
        /// Tokens that were given.
        n_tokens: usize,
        /// Positions of the session.
        n_ctx: usize,
    },
    /// A token id that the model does not have.
    #[error(
        "token {token} is not in the vocabulary of {vocab_size}; use this model's own tokenizer"
    )]
    UnknownToken {
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// A session is used with a model that it was not made for.
    #[error(
        "the session was made for a model of another shape; make it with this model's `session`"
    )]
    ForeignSession,
    /// A workspace is used with a model that it was not made for.
    #[error(
        "the workspace was made for a model of another shape; make it with this model's `workspace`"
    )]
    ForeignWorkspace,
    /// A batch has more tokens than its workspace can take.
    #[error(
        "the batch has {n_tokens} tokens in all, more than the {capacity} of its workspace; \
         make a larger one or read long prompts in pieces"
    )]
    BatchTooLarge {
        /// Tokens of all sequences.
        n_tokens: usize,
        /// Capacity of the workspace.
        capacity: usize,
    },
    /// One sequence of a batch cannot be computed.
    #[error(
        "sequence {sequence} of the batch cannot be computed; leave it out to compute the rest"
    )]
    InBatch {
        /// Its index in the batch.
        sequence: usize,
        /// The reason.
        source: Box<EngineError>,
    },
    /// A layer could not route.
    #[error("layer {layer}, tokens from position {position}: routing failed")]
    Routing {
        /// The layer.
        layer: usize,
        /// Position of the first token that the layer routed, to which the source's token index adds.
        position: usize,
        /// The reason.
        source: RoutingError,
    },
    /// The model's output is not a number.
    #[error(
        "the logit of token {token} at position {position} is {value} (after the last of {n_layers} \
         layers); the weights are damaged or the activations overflow: check the checkpoint, or load \
         it without quantisation"
    )]
    NonFiniteLogits {
        /// Position of the row.
        position: usize,
        /// Token id of the value.
        token: usize,
        /// The value.
        value: f32,
        /// Layers of the model.
        n_layers: usize,
    },
    /// Logits given to the sampler cannot be sampled from.
    #[error("step {step}: cannot sample, the logit of token {token} is {value}")]
    Unsampleable {
        /// Tokens sampled before.
        step: usize,
        /// Token id of the value.
        token: usize,
        /// NaN, plus infinity, or minus infinity when nothing else is left.
        value: f32,
    },
}

/// Tenths of MiB, rounded so that a budget that is too small never looks like what is needed.
fn mib(bytes: u64, round: fn(f64) -> f64) -> String {
    format!("{:.1} MiB", round(bytes as f64 / 1048576.0 * 10.0) / 10.0)
}

fn names(isas: &[Isa]) -> String {
    let names: Vec<&str> = isas.iter().map(|isa| isa.name()).collect();
    names.join(", ")
}
