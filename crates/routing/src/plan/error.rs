//! Why a plan is refused.

use std::fmt;

use super::PLAN_VERSION;

/// Why a plan cannot be used, with the layer and expert.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanError {
    /// Another version of the format.
    Version {
        /// The version of the plan.
        found: u32,
    },
    /// The plan was made for another model.
    OtherModel {
        /// Architecture and digest that the plan names.
        planned: String,
        /// Those of the model.
        found: String,
    },
    /// A layer is missing, not known, there twice, or left with too little.
    Layer {
        /// The layer.
        layer: usize,
        /// What is wrong with it, and what was expected.
        problem: String,
    },
    /// An expert of the output is made of what is not there, or of what others are made of.
    Expert {
        /// The layer.
        layer: usize,
        /// Place in the list of the layer, from 0.
        at: usize,
        /// What is wrong with it, and what was expected.
        problem: String,
    },
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version { found } => write!(
                f,
                "the plan has version {found}, expected {PLAN_VERSION}; make it again with `cadre plan`"
            ),
            Self::OtherModel { planned, found } => write!(
                f,
                "the plan was made for another model: {planned} there, {found} here; make one from a trace of this model"
            ),
            Self::Layer { layer, problem } => write!(f, "plan, layer {layer}: {problem}"),
            Self::Expert { layer, at, problem } => {
                write!(f, "plan, layer {layer}, entry {at}: {problem}")
            }
        }
    }
}

impl std::error::Error for PlanError {}
