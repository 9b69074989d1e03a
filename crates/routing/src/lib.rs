//! Which expert: scores to picks and weights.
//!
//! The crate sits at the bottom of the workspace: everything that routes, records routing or plans around it speaks
//! in the types defined here. It holds no tensors and no model, and depends on nothing but `serde`.
//!
//! - [`Routing`]: the ragged result, for each token which experts with which weights.
//! - [`Policy`]: the rule from router logits to a [`Routing`]; one file per published rule in [`policies`].
//! - [`steer`]: changing the choice while a model runs, per layer and expert: leave out, force, favour.
//! - [`registry`]: the explicit list of policies by name.
//! - [`filters`]: capacity limits, a stage applied to a finished [`Routing`].
//! - [`loads`]: load statistics, one implementation for the trainer and the engine.
//! - [`plan`]: what is to become of a model's experts: the types of a plan and what must hold of them.
//!
//! Legend used in this crate: `T` tokens, `E` experts (`n_experts`), `k` picks per token (`top_k`).
#![forbid(unsafe_code)]

mod error;
pub mod filters;
pub mod loads;
pub mod plan;
pub mod policies;
mod policy;
pub mod registry;
mod routing;
mod scores;
mod select;
mod stages;
pub mod steer;

pub use error::RoutingError;
pub use loads::{LoadSummary, Loads};
pub use policy::Policy;
pub use routing::Routing;
pub use stages::{Reach, Stages};
pub use steer::{SteerError, Steered, Steering};
