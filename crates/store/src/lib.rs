//! Where experts live when they do not all fit into memory: a cache of some, and the rest on disk.
//!
//! [`Store`] is what a model asks for the experts of a layer. It keeps a [`Cache`] of the most useful ones, as its
//! [`Policy`] sees it, reads the others past the system's own cache ([`reader`]), and reads ahead what a predictor
//! expects while that helps. [`replay`] says from a recorded routing what each policy would have done.

mod ahead;
mod budget;
mod bulk;
mod cache;
mod error;
mod expert;
pub mod forecast;
mod foresight;
mod form;
mod inner;
mod pass;
mod per_expert;
pub mod policies;
mod policy;
pub mod predictors;
pub mod probe;
pub mod reader;
mod recording;
pub mod replay;
mod staging;
mod stats;
mod store;

pub use ahead::{AheadKind, Look};
pub use bulk::BulkReader;
pub use cache::{Cache, CacheCounts, Capacity, Placed};
pub use error::{Result, StoreError};
pub use expert::{ExpertId, Now};
pub use foresight::Foresight;
pub use form::{Form, Piece};
pub use pass::Pass;
pub use policies::PolicyKind;
pub use policy::Policy;
pub use recording::{Passing, Recording, Step};
pub use stats::StoreStats;
pub use store::{Store, StoreOptions};
