//! Why a server cannot start.

use std::net::SocketAddr;

use cadre_checkpoint::CheckpointError;
use cadre_engine::EngineError;

/// Result with a [`ServeError`].
pub type Result<T, E = ServeError> = std::result::Result<T, E>;

/// An error of this crate. What is wrong with a request is told to the client, and never one of these.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened at.
    #[error("cannot listen at {address}; choose another --port or --host")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The reason.
        source: std::io::Error,
    },
    /// The system gives no thread or no way to wait for connections.
    #[error("cannot start the server")]
    Runtime(#[source] std::io::Error),
    /// The model's text side cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Sessions cannot be made as asked.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A plan does not fit the model.
    #[error("plan `{name}` does not fit the model")]
    Plan {
        /// Its name.
        name: String,
        /// The reason.
        source: Box<EngineError>,
    },
    /// One context does not fit into the memory for keys and values.
    #[error(
        "{limit} bytes of memory for keys and values, but one context of {n_ctx} tokens takes {needed}; allow more, or serve a smaller context"
    )]
    KvMemory {
        /// What is allowed.
        limit: usize,
        /// What one context takes.
        needed: usize,
        /// Its tokens.
        n_ctx: usize,
    },
    /// An option has a value that makes no sense.
    #[error("{name} = {value}: expected {expected}")]
    BadOption {
        /// Name of the option.
        name: &'static str,
        /// Its value.
        value: usize,
        /// What is accepted.
        expected: &'static str,
    },
}
