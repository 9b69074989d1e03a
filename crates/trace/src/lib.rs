//! Recorded routing: who was picked, where, with what weight; as Parquet files, statistics and pictures.
//!
//! The flow is one way. A run produces [`Step`]s (one layer, several positions); a [`TraceWriter`] puts them in a
//! file (a [`Recording`] in parts, so that it can go on) and a [`StatsBuilder`] counts them. A [`TraceReader`] brings a file back as [`Row`]s, and [`Stats`] is
//! everything the pictures need:
//!
//! ```text
//! Step -> TraceWriter -> out.parquet -> TraceReader -> StatsBuilder -> Stats -> show::text      terminal report
//!    \______________________________________________________/                \-> serde_json     -o json
//!                    (live, without a file)                                  |-> html::page     one HTML page
//!                                                                            |-> picture::domain_svg
//!                                                                            \-> ansi::strip    run --experts
//! ```
//!
//! Nothing here prints, reads the environment, or knows text: tokens are ids, except in [`ansi`], which paints the
//! strings it is given.

#![forbid(unsafe_code)]

pub mod ansi;
mod colour;
mod counts;
pub mod curves;
pub mod error;
pub mod html;
mod measures;
pub mod meta;
pub mod picture;
pub mod profile;
pub mod reader;
pub mod recording;
pub mod replay;
pub mod resonance;
pub mod row;
pub mod schema;
pub mod show;
pub mod stats;
pub mod writer;

#[cfg(test)]
mod synthetic;

pub use error::TraceError;
pub use meta::{AttentionExperts, Part, TraceMeta};
pub use profile::{DomainTop, Profile, TopExpert};
pub use reader::{Block, Trace, TraceReader};
pub use recording::Recording;
pub use row::{Row, Step};
pub use schema::Columns;
pub use stats::{Stats, StatsBuilder, StatsOptions};
pub use writer::{TraceWriter, Written};
