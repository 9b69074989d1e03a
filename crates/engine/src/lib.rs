//! The engine: token in, token out. Models, sessions, sampling, generation and evaluation.
//!
//! - [`load`] turns a checkpoint into a [`Model`]: immutable, shared, the same for every caller.
//! - [`Session`] is what one sequence remembers.
//! - [`Model::forward`] reads tokens and gives logits; an [`Observer`] sees the routing of every layer.
//! - [`Model::forward_batch`] does so for several [`Sequence`]s together, in the memory of a [`Workspace`].
//! - [`Model::steer`] changes the choice of experts of one session; [`Contrast`] sets two such choices against each other.
//! - [`generate()`] runs the loop of prompt, sampling and stopping; [`eval`] measures.
//!
//! There is no text, clock, file format or printing here. The same tokens, seed and instruction set
//! give the same result whatever the chunk size, the number of threads, or the other sequences of a batch.
#![forbid(unsafe_code)]

mod batch;
mod blocks;
mod builder;
mod contrast;
mod decoder;
mod error;
pub mod eval;
mod foretell;
mod generate;
mod kv_block;
mod load;
mod lossy;
mod model;
mod models;
mod pass;
mod rng;
mod routers;
mod sampling;
mod session;
mod slices;
mod streaming;
mod weights;
mod workspace;

pub use batch::Sequence;
pub use cadre_kernels::{KvFormat, KvFormats, KvMemory};
pub use cadre_routing::{SteerError, Steering};
pub use cadre_store::predictors::Score;
pub use cadre_store::reader::ReaderKind;
pub use cadre_store::{AheadKind, PolicyKind, StoreError, StoreOptions, StoreStats};
pub use contrast::{Contrast, ContrastSessions, generate_contrasted};
pub use error::{EngineError, Result};
pub use generate::{Finish, GenerateOptions, Generated, Hooks, generate};
pub use kv_block::{KV_BLOCK, KvBlock};
pub use load::{
    LoadOptions, Progress, Quant, known_model_types, load, load_watched, load_with_low_bit,
};
pub use lossy::{Lossy, PreferCached};
pub use model::{Logits, Model, ModelInfo, NoObserver, Observer, RoutingEvent, RowsEvent};
pub use sampling::{Sampler, SamplingOptions};
pub use session::{Session, SessionOptions};
pub use streaming::{StreamOptions, dense_bytes};
pub use workspace::Workspace;
