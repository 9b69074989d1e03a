//! One file per command: its arguments, and a thin `run` that calls the libraries and prints.

pub(crate) mod apply;
mod apply_quality;
pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod fit;
pub(crate) mod inspect;
mod inspect_text;
pub(crate) mod logits;
pub(crate) mod plan;
mod plan_bits;
mod plan_bits_work;
pub(crate) mod plan_steer;
pub(crate) mod pull;
pub(crate) mod quantize;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod split;
pub(crate) mod trace;
mod trace_replay;
#[cfg(feature = "train")]
pub(crate) mod train;
#[cfg(feature = "train")]
mod train_compare;
#[cfg(feature = "train")]
pub(crate) mod tune;
pub(crate) mod upcycle;
