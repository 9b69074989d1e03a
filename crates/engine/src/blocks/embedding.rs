//! The embedding: a row per token, in memory, or on disk where a token needs one row and memory is short.

use std::sync::{Arc, Mutex, PoisonError};

use cadre_checkpoint::TensorOnDisk;
use cadre_kernels::{Compute, Matrix};
use cadre_store::BulkReader;

use crate::error::{EngineError, Result};
use crate::weights::{matrix_of_rows, weight_error};

/// `[vocab, d]`.
#[derive(Debug)]
pub(crate) enum Embedding {
    Resident(Matrix),
    OnDisk {
        tensor: TensorOnDisk,
        reader: Arc<Mutex<BulkReader>>,
    },
}

impl Embedding {
    /// The matrix, if it is in memory.
    pub(crate) fn matrix(&self) -> Option<&Matrix> {
        match self {
            Self::Resident(matrix) => Some(matrix),
            Self::OnDisk { .. } => None,
        }
    }

    /// The rows of `tokens` times `scale`, into `out_td`.
    pub(crate) fn rows(
        &self,
        compute: &Compute,
        tokens: &[u32],
        scale: f32,
        out_td: &mut [f32],
    ) -> Result<()> {
        let d = out_td.len() / tokens.len().max(1);
        let (matrix, is_gathered) = match self {
            Self::Resident(matrix) => (matrix.clone(), false),
            Self::OnDisk { tensor, reader } => (gather(tensor, reader, tokens)?, true),
        };
        compute.for_each_chunk(out_td, d.max(1), d, |at, out| {
            let row = if is_gathered { at } else { tokens[at] as usize };
            matrix.row(row, out);
            if scale != 1.0 {
                out.iter_mut().for_each(|value| *value *= scale);
            }
        });
        Ok(())
    }
}

/// The rows of `tokens` as a matrix.
fn gather(tensor: &TensorOnDisk, reader: &Mutex<BulkReader>, tokens: &[u32]) -> Result<Matrix> {
    let &[_, n_in] = tensor.shape() else {
        unreachable!("an embedding is a matrix");
    };
    let row_bytes = tensor.dtype().n_bytes(n_in).unwrap_or(0) as u64;
    let source = &tensor.sources()[0];
    let range = |token: &u32| {
        let from = source.range.start + u64::from(*token) * row_bytes;
        from..from + row_bytes
    };
    let ranges: Vec<_> = tokens.iter().map(range).collect();
    let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
    let rows = reader.read_all(&source.path, &ranges)?;
    let matrix = matrix_of_rows(tensor.dtype(), n_in, &rows)
        .map_err(|source| weight_error(tensor.stored_name(), source))?;
    match matrix.first_non_finite() {
        None => Ok(matrix),
        Some((row, column)) => Err(EngineError::NonFiniteWeight {
            tensor: tensor.stored_name().to_owned(),
            row: tokens[row] as usize,
            column,
        }),
    }
}
