//! A weight matrix in one of the formats that the kernels multiply by.

use half::bf16;

use crate::blocks::{BlockQ8_0, Q8_BLOCK, dequantize_q8_0, quantize_q8_0};
use crate::format::Format;

/// Why a matrix could not be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The data does not fill the shape.
    #[error("{n_values} values do not fill a matrix of [{n_out}, {n_in}]")]
    Shape {
        /// Rows wanted.
        n_out: usize,
        /// Columns wanted.
        n_in: usize,
        /// Values given.
        n_values: usize,
    },
    /// Rows are not whole blocks.
    #[error("rows of {n_in} values cannot be stored as q8_0, which needs a multiple of 32")]
    Ragged {
        /// Columns of the matrix.
        n_in: usize,
    },
    /// A value is NaN, infinite, or too large for the format's scale.
    #[error("row {row} holds a value that q8_0 cannot store (NaN, infinite or above 8e6)")]
    NotRepresentable {
        /// The first such row.
        row: usize,
    },
}

/// A weight matrix of `[n_out, n_in]`, row-major.
#[derive(Clone, Debug)]
pub struct Matrix {
    n_out: usize,
    n_in: usize,
    data: Data,
}

#[derive(Clone, Debug)]
pub(crate) enum Data {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Q8_0(Vec<BlockQ8_0>),
}

impl Matrix {
    /// A matrix of f32. Errors when `values` does not fill the shape.
    pub fn from_f32(n_out: usize, n_in: usize, values: Vec<f32>) -> Result<Self, MatrixError> {
        check_shape(n_out, n_in, values.len())?;
        Ok(Self {
            n_out,
            n_in,
            data: Data::F32(values),
        })
    }

    /// A matrix of bf16. Errors when `values` does not fill the shape.
    pub fn from_bf16(n_out: usize, n_in: usize, values: Vec<bf16>) -> Result<Self, MatrixError> {
        check_shape(n_out, n_in, values.len())?;
        Ok(Self {
            n_out,
            n_in,
            data: Data::Bf16(values),
        })
    }

    /// A matrix of Q8_0 blocks, `n_in / 32` per row. Errors when they do not fill the shape.
    pub fn from_q8_0(
        n_out: usize,
        n_in: usize,
        blocks: Vec<BlockQ8_0>,
    ) -> Result<Self, MatrixError> {
        if !n_in.is_multiple_of(Q8_BLOCK) {
            return Err(MatrixError::Ragged { n_in });
        }
        check_shape(n_out, n_in, blocks.len() * Q8_BLOCK)?;
        Ok(Self {
            n_out,
            n_in,
            data: Data::Q8_0(blocks),
        })
    }

    /// The same matrix quantised to Q8_0 (lossy). Errors when a row is not whole blocks or holds a value
    /// that the format cannot store.
    pub fn to_q8_0(&self) -> Result<Self, MatrixError> {
        let n_in = self.n_in;
        if !n_in.is_multiple_of(Q8_BLOCK) {
            return Err(MatrixError::Ragged { n_in });
        }
        let n_blocks = n_in / Q8_BLOCK;
        let mut blocks = vec![BlockQ8_0::ZERO; self.n_out * n_blocks];
        let mut values = vec![0.0; n_in];
        for row in 0..self.n_out {
            self.row(row, &mut values);
            if !quantize_q8_0(&values, &mut blocks[row * n_blocks..][..n_blocks]) {
                return Err(MatrixError::NotRepresentable { row });
            }
        }
        Self::from_q8_0(self.n_out, n_in, blocks)
    }

    /// Rows: the size of an output.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Columns: the size of an input.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        match self.data {
            Data::F32(_) => Format::F32,
            Data::Bf16(_) => Format::Bf16,
            Data::Q8_0(_) => Format::Q8_0,
        }
    }

    /// Bytes that the weights occupy.
    pub fn n_bytes(&self) -> usize {
        match &self.data {
            Data::F32(values) => size_of_val(values.as_slice()),
            Data::Bf16(values) => size_of_val(values.as_slice()),
            Data::Q8_0(blocks) => size_of_val(blocks.as_slice()),
        }
    }

    /// Writes row `row` as f32 to `out` (`[n_in]`). Panics when out of range.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.n_in, "a row of the matrix");
        match &self.data {
            Data::F32(values) => out.copy_from_slice(&values[row * self.n_in..][..self.n_in]),
            Data::Bf16(values) => {
                for (out, value) in out.iter_mut().zip(&values[row * self.n_in..][..self.n_in]) {
                    *out = value.to_f32();
                }
            }
            Data::Q8_0(blocks) => {
                let n_blocks = self.n_in / Q8_BLOCK;
                dequantize_q8_0(&blocks[row * n_blocks..][..n_blocks], out);
            }
        }
    }

    /// The first row and column whose value is NaN or infinite, if any.
    pub fn first_non_finite(&self) -> Option<(usize, usize)> {
        let index = match &self.data {
            Data::F32(values) => values.iter().position(|v| !v.is_finite()),
            Data::Bf16(values) => values.iter().position(|v| !v.is_finite()),
            Data::Q8_0(blocks) => blocks
                .iter()
                .position(|b| !b.d.is_finite())
                .map(|block| block * Q8_BLOCK),
        };
        index.map(|i| (i / self.n_in, i % self.n_in))
    }

    pub(crate) fn data(&self) -> &Data {
        &self.data
    }
}

fn check_shape(n_out: usize, n_in: usize, n_values: usize) -> Result<(), MatrixError> {
    if n_out.checked_mul(n_in) == Some(n_values) {
        Ok(())
    } else {
        Err(MatrixError::Shape {
            n_out,
            n_in,
            n_values,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_in_every_format() {
        let values: Vec<f32> = (0..64).map(|i| (i as f32 - 32.0) / 16.0).collect();
        let f32s = Matrix::from_f32(2, 32, values.clone()).unwrap();
        let bf16s =
            Matrix::from_bf16(2, 32, values.iter().map(|v| bf16::from_f32(*v)).collect()).unwrap();
        let q8 = f32s.to_q8_0().unwrap();
        let mut row = vec![0.0; 32];
        for (matrix, tolerance) in [(&f32s, 0.0), (&bf16s, 0.0), (&q8, 0.01)] {
            matrix.row(1, &mut row);
            for (a, b) in row.iter().zip(&values[32..]) {
                assert!((a - b).abs() <= tolerance, "{:?}: {a} {b}", matrix.format());
            }
        }
        assert_eq!(
            (f32s.n_bytes(), bf16s.n_bytes(), q8.n_bytes()),
            (256, 128, 68)
        );
    }

    #[test]
    fn wrong_sizes_and_values_are_refused() {
        assert!(matches!(
            Matrix::from_f32(2, 3, vec![0.0; 5]),
            Err(MatrixError::Shape { n_values: 5, .. })
        ));
        let ragged = Matrix::from_f32(1, 33, vec![0.0; 33]).unwrap();
        assert_eq!(
            ragged.to_q8_0().unwrap_err(),
            MatrixError::Ragged { n_in: 33 }
        );
        let mut values = vec![0.0; 96];
        values[70] = f32::NAN;
        let nan = Matrix::from_f32(3, 32, values).unwrap();
        assert_eq!(nan.first_non_finite(), Some((2, 6)));
        assert_eq!(
            nan.to_q8_0().unwrap_err(),
            MatrixError::NotRepresentable { row: 2 }
        );
    }
}
