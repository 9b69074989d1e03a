//! An HTTP server for models: OpenAI's interface, continuous batching, fair queues.
//!
//! - [`Server::start`] serves a model; [`Server::end`] ends it in good order.
//! - `schedule` computes: token in, token out, all requests together, on one thread. No result depends on its neighbours.
//! - `api` turns requests into jobs and tokens into answers.
//! - `listen` is the connections, by `hyper`; `app` is what answers at each path, by `axum`, and joins them.
//!
//! What is wrong with a request is told to its client, in the form of OpenAI's errors, and disturbs nobody else.
#![forbid(unsafe_code)]

mod access;
mod api;
mod app;
mod document;
mod error;
mod grammar;
mod listen;
mod metrics;
mod page;
mod panics;
mod schedule;
mod served;
mod server;

pub use error::{Result, ServeError};
pub use listen::HttpLimits;
pub use schedule::{StepOptions, StepOrder};
pub use server::{ServeOptions, Server};
