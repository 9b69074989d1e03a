//! The parts of a decoder layer, each with its parameters and forward pass.

pub mod attention;
pub mod attention_experts;
pub mod decoupled;
pub mod factored;
pub mod mlp;
pub mod moe;
pub mod recurrent;
pub mod residual;
