//! The one error type of the crate: what is wrong with a trace, where, and what to do about it.

use std::path::PathBuf;

/// Why a trace could not be written, read or counted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The operating system refused: no such file, no permission, no space.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was being done, as a verb: `open`, `create a temporary file beside`, ...
        action: &'static str,
        /// The file named by the caller.
        path: PathBuf,
        /// The reason given by the operating system.
        source: std::io::Error,
    },
    /// The file is not Parquet at all, or its footer is cut off.
    #[error(
        "{path} is not a readable Parquet file ({reason}); expected a trace written by `cadre trace`. \
         If it was cut off while copying, copy it again", path = path.display()
    )]
    NotParquet {
        /// The file.
        path: PathBuf,
        /// What the Parquet reader said.
        reason: String,
    },
    /// The footer was fine, but a page of the file cannot be decoded or written.
    #[error("{path}: damaged Parquet data ({reason}); record the trace again with `cadre trace`", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the Parquet reader said.
        reason: String,
    },
    /// The arrow or Parquet library refused to encode rows; disk full is the usual reason.
    #[error("cannot write trace rows to {path}: {reason}; nothing was left behind", path = path.display())]
    Write {
        /// The file that was being written.
        path: PathBuf,
        /// What the writer said.
        reason: String,
    },
    /// A metadata key of the trace format is absent: some other Parquet file, or one rewritten without its metadata.
    #[error(
        "{path} has no metadata key `{key}`, so it is not a Cadre trace or a tool rewrote it without its metadata; \
         record it again with `cadre trace`, or keep the file's key-value metadata when rewriting it", path = path.display()
    )]
    MissingMetadata {
        /// The file.
        path: PathBuf,
        /// The absent key.
        key: &'static str,
    },
    /// Attention experts were asked for, of a model that has none.
    #[error("{path} is of a model whose attention is not cut into experts", path = path.display())]
    NoAttention {
        /// The file.
        path: PathBuf,
    },
    /// A metadata key holds something that cannot be used.
    #[error("{path}: metadata key `{key}` is \"{value}\", expected {expected}", path = path.display())]
    BadMetadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What it holds.
        value: String,
        /// What it must hold.
        expected: String,
    },
    /// A column of the trace format is absent.
    #[error("{path} has no column `{column}` (expected {expected}); its columns are: {found}", path = path.display())]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// The absent column.
        column: &'static str,
        /// The type it must have.
        expected: &'static str,
        /// The columns that are there.
        found: String,
    },
    /// A column has another type than the format says.
    #[error("{path}: column `{column}` has type {found}, expected {expected}", path = path.display())]
    WrongType {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
        /// Its type in the file.
        found: String,
        /// The type it must have.
        expected: &'static str,
    },
    /// A column has empty cells; the format has none.
    #[error("{path}: column `{column}` has {nulls} empty cells, expected none", path = path.display())]
    Nulls {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
        /// How many cells are empty in the block that was read.
        nulls: usize,
    },
    /// One row contradicts the metadata or itself.
    #[error("{origin}row seq {seq}, pos {pos}, layer {layer}: {problem}")]
    Row {
        /// The file as `PATH: `, or nothing for rows that do not come from a file.
        origin: String,
        /// Sequence of the row.
        seq: u32,
        /// Position of the row.
        pos: u32,
        /// Layer of the row.
        layer: usize,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A step's slices do not fit together.
    #[error("layer {layer}: {what} has {found} entries, expected {expected}")]
    Shape {
        /// Layer of the step.
        layer: usize,
        /// Which slice.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length it must have.
        expected: usize,
    },
    /// The model description itself makes no sense.
    #[error("trace metadata: {what} is {value}, expected {expected}")]
    BadMeta {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: usize,
        /// What it must be.
        expected: String,
    },
    /// Nothing was recorded, so there is nothing to count.
    #[error("the trace has no rows; record one from a text that is not empty")]
    Empty,
    /// Two things made from different models were put together.
    #[error(
        "this {what} was made from model {found}, not from model {expected}; record it again with this model"
    )]
    OtherModel {
        /// `trace` or `profile`.
        what: &'static str,
        /// Digest found.
        found: String,
        /// Digest expected.
        expected: String,
    },
    /// An expert profile (JSON) cannot be used.
    #[error("expert profile: {problem}")]
    BadProfile {
        /// What is wrong and what was expected.
        problem: String,
    },
}
