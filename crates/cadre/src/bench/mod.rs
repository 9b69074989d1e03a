//! Measuring the speed of a model: which tests there are, how one is timed, and the record that comes out.

mod measure;
mod plan;
mod record;

pub(crate) use measure::{Runner, Setting};
pub(crate) use plan::{Lists, Test};
#[cfg(feature = "train")]
pub(crate) use record::status_bytes;
pub(crate) use record::{
    Around, Machine, Record, Streaming, csv, markdown, median, most_used, rss_bytes,
};
