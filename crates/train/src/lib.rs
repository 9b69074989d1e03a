//! Training on Burn: routers, losses, the language model, the loop.
//!
//! The way of a step: [`trainer`] -> `run` -> `objective` -> [`lm`] -> [`layers::moe`] -> routers, [`ops`] -> [`optimizer`].
#![forbid(unsafe_code)]

pub mod architecture;
pub mod collapse;
pub mod data;
pub mod device;
mod error;
pub mod export;
mod files;
mod import;
pub mod init;
pub mod layers;
mod layerwise;
pub mod lm;
pub mod log;
pub mod losses;
pub mod methods;
mod objective;
pub mod ops;
pub mod optimizer;
pub mod params;
pub mod plot;
pub mod recipe;
pub mod recover;
pub mod routers;
mod run;
mod snapshot;
pub mod trainer;
pub mod weight_heads;

pub use error::{Difference, LargestGradient, Result, TrainError};
