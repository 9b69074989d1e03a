//! Reading a checkpoint's tensors into the formats that the kernels multiply by.

use std::sync::atomic::{AtomicUsize, Ordering};

use cadre_checkpoint::{Checkpoint, Dtype};
use cadre_kernels::{Matrix, MatrixError, bf16};

use crate::error::{EngineError, Result};
use crate::load::Quant;

/// Reads tensors of one checkpoint, checked for shape and for NaN and infinities.
pub(crate) struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    quant: Quant,
    /// Matrices that the wanted format cannot hold.
    n_kept: AtomicUsize,
}

impl<'a> Weights<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, quant: Quant) -> Self {
        Self {
            checkpoint,
            quant,
            n_kept: AtomicUsize::new(0),
        }
    }

    /// A vector of `n` values.
    pub(crate) fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        Ok(self.checkpoint.tensor_f32(name, &[n])?)
    }

    /// A matrix in f32 whatever the wanted format; for what is small and sensitive.
    pub(crate) fn matrix_f32(&self, name: &str, n_out: usize, n_in: usize) -> Result<Matrix> {
        let values = self.checkpoint.tensor_f32(name, &[n_out, n_in])?;
        Matrix::from_f32(n_out, n_in, values).map_err(|source| weight_error(name, source))
    }

    /// A matrix as stored (f16 is widened to f32), or quantised if that was asked for.
    pub(crate) fn matrix(&self, name: &str, n_out: usize, n_in: usize) -> Result<Matrix> {
        let stored = self.stored(name, n_out, n_in)?;
        match self.quant {
            Quant::AsStored => Ok(stored),
            Quant::Q8_0 => match stored.to_q8_0() {
                // Keeping such a matrix as it is loses nothing; the caller reports how many there are.
                Err(MatrixError::Ragged { .. }) => {
                    self.n_kept.fetch_add(1, Ordering::Relaxed);
                    Ok(stored)
                }
                result => result.map_err(|source| weight_error(name, source)),
            },
        }
    }

    /// Matrices that were kept as stored because their rows are not whole blocks.
    pub(crate) fn n_kept(&self) -> usize {
        self.n_kept.load(Ordering::Relaxed)
    }

    fn stored(&self, name: &str, n_out: usize, n_in: usize) -> Result<Matrix> {
        let view = self.checkpoint.tensor_shaped(name, &[n_out, n_in])?;
        if view.dtype != Dtype::Bf16 {
            return self.matrix_f32(name, n_out, n_in);
        }
        let values = view
            .bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| bf16::from_le_bytes(*b));
        let matrix = Matrix::from_bf16(n_out, n_in, values.collect())
            .map_err(|source| weight_error(name, source))?;
        if matrix.first_non_finite().is_some() {
            // Slower, but it words the error.
            self.checkpoint.check_finite(name)?;
        }
        Ok(matrix)
    }
}

fn weight_error(name: &str, source: MatrixError) -> EngineError {
    EngineError::Weight {
        tensor: name.to_owned(),
        source,
    }
}
