//! Training on Burn: routers, losses, the language model, the loop.
//!
//! The way of a step: [`trainer`] -> [`lm`] -> [`layers::moe`] -> routers, [`ops`] -> [`optimizer`].
#![forbid(unsafe_code)]

pub mod init;
mod interim;
pub mod layers;
pub mod lm;
pub mod losses;
pub mod ops;
pub mod optimizer;
pub mod routers;
pub mod weight_heads;
