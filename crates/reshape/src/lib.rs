//! Plans for a model's experts: making them from traces, reading and writing them, and applying them to checkpoints.
//!
//! ```text
//! trace -> Usage (counts, masses, similarities) -> prune / merge -> Plan -> JSON, edited by hand -> apply -> checkpoint
//! ```
//!
//! - [`Usage`] is what a trace says about every expert; [`Method`] ranks experts by it, one file per method in `plans/`.
//! - [`prune()`] and [`merge()`] are pure functions from usage to a [`Plan`](cadre_routing::plan::Plan).
//! - [`bits`] chooses number formats by expert.
//! - [`read_plan`] and [`plan_json`] are the plan as a file.
//! - [`apply()`] plans the output: a folder stays a folder, a GGUF file a GGUF file, and what is kept is copied byte for byte.
//! - [`bake()`] writes a steering into a checkpoint, as far as a checkpoint can say it.
//! - [`split()`] and [`upcycle()`] make experts out of a dense model's feed-forwards.
//! - [`measure()`] runs both models over text, and a [`Report`] says what the plan cost.
#![forbid(unsafe_code)]

mod align;
mod apply;
mod assignment;
mod bake;
pub mod bits;
mod cluster;
mod dense;
mod error;
mod factor;
mod file;
mod imatrix;
mod mix;
mod plans;
mod quality;
mod report;
mod same;
mod select;
mod shape;
mod show;
mod ties;
mod usage;

pub use apply::{Applying, LayerSources, Sources, apply, sources};
pub use bake::{Baked, bake};
pub use dense::{
    Activity, ActivityRecorder, FromDense, Importance, MergekitExpert, MergekitInput, MergekitMoe,
    Partition, PartitionBy, SplitOptions, UpcycleOptions, domain_experts, split, upcycle,
};
pub use error::{ReshapeError, Result};
pub use file::{parse_plan, plan_json, read_plan};
pub use plans::{MergeMethod, MergeOptions, Method, PruneOptions, Similarity, merge, prune};
pub use quality::{Overlap, Quality, Tally, measure};
pub use report::{Comparison, LayerReport, Limits, Report, Side};
pub use same::{Sameness, same_model};
pub use select::{Amount, Scope, Sizes};
pub use shape::{shape_of, shape_of_trace};
pub use show::{LayerSummary, summary as plan_summary, text as plan_text};
pub use usage::{Coverage, LayerUsage, Usage, UsageOptions};
