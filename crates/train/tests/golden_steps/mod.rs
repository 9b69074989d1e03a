//! What the goldens of whole training steps have in common.

use serde::Deserialize;

/// How the reference trained.
#[derive(Clone, Copy, Deserialize)]
pub(crate) struct Settings {
    pub(crate) lr: f64,
    pub(crate) betas: [f32; 2],
    pub(crate) eps: f32,
    pub(crate) weight_decay: f32,
    pub(crate) clip_norm: f64,
    pub(crate) balance_coef: f64,
    pub(crate) z_coef: f64,
}

/// One step of the reference, or of ours.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Step {
    pub(crate) loss: f64,
    pub(crate) ce: f64,
    pub(crate) balance: f64,
    pub(crate) z: f64,
    pub(crate) grad_norm: f64,
}
