//! A tensor that is read from its file past the map, as often as it is wanted.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::Dtype;
use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{CheckpointError, Result};
use crate::tensors::{BlockScales, Data, Entry};

/// A contiguous piece of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRange {
    /// The file.
    pub path: Arc<Path>,
    /// Bytes of it.
    pub range: Range<u64>,
}

/// Where a tensor lies on disk, and how its bytes are put together from what is read there.
#[derive(Debug, Clone)]
pub struct TensorOnDisk {
    stored: String,
    dtype: Dtype,
    shape: Vec<usize>,
    layout: Layout,
    scales: Option<BlockScales>,
    sources: Vec<FileRange>,
}

/// [`Data`] without its bytes.
#[derive(Debug, Clone, Copy)]
enum Layout {
    Plain,
    Strided {
        first: usize,
        row_step: usize,
        col_step: usize,
    },
    Mxfp4 {
        first: usize,
        step: usize,
    },
}

impl Checkpoint {
    /// Where tensor `name` lies on disk.
    ///
    /// # Errors
    /// There is no such tensor, or it is a part of the program and in no file.
    pub fn tensor_on_disk(&self, name: &str) -> Result<TensorOnDisk> {
        // The same error as for every reader of a missing tensor.
        let Some(entry) = self.entry(name) else {
            return Err(self.tensor(name).err().unwrap_or_else(|| self.no_file()));
        };
        let (layout, data) = match &entry.data {
            Data::Plain(bytes) => (Layout::Plain, vec![bytes]),
            Data::Strided {
                source,
                first,
                row_step,
                col_step,
            } => {
                let layout = Layout::Strided {
                    first: *first,
                    row_step: *row_step,
                    col_step: *col_step,
                };
                (layout, vec![source])
            }
            Data::Mxfp4 {
                blocks,
                scales,
                first,
                step,
            } => {
                let (first, step) = (*first, *step);
                (Layout::Mxfp4 { first, step }, vec![blocks, scales])
            }
        };
        let sources: Option<Vec<FileRange>> = data
            .into_iter()
            .map(|bytes| self.file_range(bytes))
            .collect();
        Ok(TensorOnDisk {
            stored: entry.stored.clone(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            layout,
            scales: entry.scales.clone(),
            sources: sources.ok_or_else(|| self.no_file())?,
        })
    }

    /// The files that tensors are read from; none for a checkpoint that is a part of the program.
    #[must_use]
    pub fn files(&self) -> Vec<&Path> {
        self.maps().map(|map| &**map.path()).collect()
    }

    fn file_range(&self, bytes: &Bytes) -> Option<FileRange> {
        self.maps().find_map(|map| {
            let range = map.range_of(bytes)?;
            Some(FileRange {
                path: Arc::clone(map.path()),
                range: range.start as u64..range.end as u64,
            })
        })
    }

    fn no_file(&self) -> CheckpointError {
        CheckpointError::NotInFile {
            origin: self.origin().to_owned(),
        }
    }
}

impl TensorOnDisk {
    /// What the file calls it, or the tensor that it is a piece of.
    #[must_use]
    pub fn stored_name(&self) -> &str {
        &self.stored
    }

    /// Number format.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Whether its bytes lie one after the other as its format has them, nothing but these.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        matches!(self.layout, Layout::Plain) && self.scales.is_none()
    }

    /// Dimensions, slowest first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// What must be read for it.
    #[must_use]
    pub fn sources(&self) -> &[FileRange] {
        &self.sources
    }

    /// The tensor, from what was read: the bytes of each of [`TensorOnDisk::sources`].
    ///
    /// # Panics
    /// When these are not as many, or not as long.
    #[must_use]
    pub fn view(&self, read: &[Bytes]) -> TensorView<'_> {
        let lengths = self
            .sources
            .iter()
            .map(|source| source.range.end - source.range.start);
        assert!(
            lengths.eq(read.iter().map(|bytes| bytes.len() as u64)),
            "the bytes of `{}`",
            self.stored
        );
        let data = match self.layout {
            Layout::Plain => Data::Plain(read[0].clone()),
            Layout::Strided {
                first,
                row_step,
                col_step,
            } => Data::Strided {
                source: read[0].clone(),
                first,
                row_step,
                col_step,
            },
            Layout::Mxfp4 { first, step } => Data::Mxfp4 {
                blocks: read[0].clone(),
                scales: read[1].clone(),
                first,
                step,
            },
        };
        TensorView {
            dtype: self.dtype,
            shape: &self.shape,
            bytes: Entry::assemble(&data, self.dtype, &self.shape),
            scales: self.scales.as_ref(),
        }
    }
}
