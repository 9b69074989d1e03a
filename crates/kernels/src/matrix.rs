//! A weight matrix in one of the formats that the kernels multiply by.
//!
//! The bytes stay as the file stores them, and where they lie if their address suits the format: a matrix over a
//! mapped file costs no memory of its own, and a slice of its rows none at all.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use half::bf16;

use crate::blocks::{self, BlockQ8_0, Pod};
use crate::format::Format;
use crate::interleave::Shape;
use crate::memory::Arena;
use crate::panel::PANEL_ROWS;
use crate::pool::ThreadPool;
use crate::product::ActFormat;
use crate::table::Kernels;

#[cfg(target_endian = "big")]
compile_error!("weights are used as files store them, which is little-endian");

/// Alignment that suits every format.
const ALIGN: usize = align_of::<f32>();

/// Why a matrix could not be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The values do not fill the shape.
    #[error("{n_values} values do not fill a matrix of [{n_out}, {n_in}]")]
    Shape {
        /// Rows wanted.
        n_out: usize,
        /// Columns wanted.
        n_in: usize,
        /// Values given.
        n_values: usize,
    },
    /// The bytes do not fill the shape.
    #[error("{n_bytes} bytes of {format} do not fill a matrix of [{n_out}, {n_in}]")]
    Bytes {
        /// How the bytes are to be read.
        format: Format,
        /// Rows wanted.
        n_out: usize,
        /// Columns wanted.
        n_in: usize,
        /// Bytes given.
        n_bytes: usize,
    },
    /// Rows are not whole blocks.
    #[error("rows of {n_in} values cannot be stored as {format}, which needs a multiple of {}", format.block_len())]
    Ragged {
        /// The format wanted.
        format: Format,
        /// Columns of the matrix.
        n_in: usize,
    },
    /// A value is NaN, infinite, or too large for the format's scale.
    #[error(
        "row {row} holds a value that {format} cannot store (NaN, infinite, or too large for its scale)"
    )]
    NotRepresentable {
        /// The format wanted.
        format: Format,
        /// The first such row.
        row: usize,
    },
    /// The format can be read and not written.
    #[error("weights cannot be stored as {0}; known: {known}", known = writable())]
    ReadOnly(Format),
    /// Raw bytes are no weights.
    #[error("{0} is not a format of weights; packed bytes must be unpacked first")]
    NotWeights(Format),
    /// The scales of blocks do not fill the shape.
    #[error(
        "{n_scales} scales do not fill a matrix of [{n_out}, {n_in}] in blocks of [{}, {}]", block[0], block[1]
    )]
    Scales {
        /// Rows of the matrix.
        n_out: usize,
        /// Columns of the matrix.
        n_in: usize,
        /// Rows and columns that share a scale.
        block: [usize; 2],
        /// Scales given.
        n_scales: usize,
    },
}

fn writable() -> String {
    let names: Vec<&str> = Format::all()
        .filter(|format| format.can_encode())
        .map(Format::name)
        .collect();
    names.join(", ")
}

/// A weight matrix of `[n_out, n_in]`, row-major. Clones and slices of rows share the weights.
#[derive(Clone)]
pub struct Matrix {
    n_out: usize,
    n_in: usize,
    format: Format,
    /// `n_out` rows, at an address that suits the format.
    bytes: Bytes,
    scales: Option<BlockScales>,
    /// Whether activations stay f32 although the weights are blocks.
    float_activations: bool,
    /// Whether the rows of a panel lie side by side.
    interleaved: bool,
}

/// One factor per rectangle of weights.
#[derive(Clone)]
struct BlockScales {
    /// Row-major, for the whole matrix that this one was cut from.
    values: Arc<[f32]>,
    /// Rows and columns of a rectangle; the last ones may be smaller.
    block: [usize; 2],
    /// Row of the whole matrix that row 0 of this one is.
    first_row: usize,
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("Matrix[{}, {}]", self.n_out, self.n_in);
        f.debug_tuple(&name).field(&self.format).finish()
    }
}

/// Numbers whose bytes a matrix keeps.
struct Owned<T>(Vec<T>);

impl<T: Pod> AsRef<[u8]> for Owned<T> {
    fn as_ref(&self) -> &[u8] {
        blocks::bytes_of(&self.0)
    }
}

impl Matrix {
    /// A matrix over `bytes` as a file stores them, little-endian.
    ///
    /// They are used where they lie unless their address does not suit the format, and copied then: f32 wants a
    /// multiple of 4, most others of 2. Values are not looked at; see [`Matrix::first_non_finite`].
    ///
    /// # Errors
    /// When rows are not whole blocks, when the bytes do not fill the shape, and for raw bytes ([`Format::U8`]).
    pub fn new(
        format: Format,
        n_out: usize,
        n_in: usize,
        bytes: Bytes,
    ) -> Result<Self, MatrixError> {
        if format == Format::U8 {
            return Err(MatrixError::NotWeights(format));
        }
        let Some(row_bytes) = format.n_bytes(n_in) else {
            return Err(MatrixError::Ragged { format, n_in });
        };
        if row_bytes.checked_mul(n_out) != Some(bytes.len()) {
            return Err(MatrixError::Bytes {
                format,
                n_out,
                n_in,
                n_bytes: bytes.len(),
            });
        }
        let suits = bytes.as_ptr().addr().is_multiple_of(alignment(format));
        Ok(Self {
            n_out,
            n_in,
            format,
            bytes: if suits { bytes } else { aligned(&bytes) },
            scales: None,
            float_activations: false,
            interleaved: false,
        })
    }

    /// A matrix of 8-bit floats (`e4m3fn`, a byte each) in which every `block` of rows and columns has a scale:
    /// a weight is its float times `scales[row / block[0], column / block[1]]`. The last blocks may be smaller.
    ///
    /// # Errors
    /// When bytes or scales do not fill the shape.
    pub fn with_block_scales(
        n_out: usize,
        n_in: usize,
        bytes: Bytes,
        scales: Vec<f32>,
        block: [usize; 2],
    ) -> Result<Self, MatrixError> {
        let fits = block[0] > 0
            && block[1] > 0
            && n_out
                .div_ceil(block[0])
                .checked_mul(n_in.div_ceil(block[1]))
                == Some(scales.len());
        if !fits {
            return Err(MatrixError::Scales {
                n_out,
                n_in,
                block,
                n_scales: scales.len(),
            });
        }
        let mut matrix = Self::new(Format::F8E4M3, n_out, n_in, bytes)?;
        matrix.scales = Some(BlockScales {
            values: scales.into(),
            block,
            first_row: 0,
        });
        Ok(matrix)
    }

    /// A matrix of f32. Errors when `values` does not fill the shape.
    pub fn from_f32(n_out: usize, n_in: usize, values: Vec<f32>) -> Result<Self, MatrixError> {
        check_shape(n_out, n_in, values.len())?;
        Self::new(Format::F32, n_out, n_in, owned(values))
    }

    /// A matrix of bf16. Errors when `values` does not fill the shape.
    pub fn from_bf16(n_out: usize, n_in: usize, values: Vec<bf16>) -> Result<Self, MatrixError> {
        check_shape(n_out, n_in, values.len())?;
        Self::new(Format::Bf16, n_out, n_in, owned(values))
    }

    /// A matrix of Q8_0 blocks, `n_in / 32` per row. Errors when they do not fill the shape.
    pub fn from_q8_0(
        n_out: usize,
        n_in: usize,
        blocks: Vec<BlockQ8_0>,
    ) -> Result<Self, MatrixError> {
        Self::new(Format::Q8_0, n_out, n_in, owned(blocks))
    }

    /// The same matrix quantised to Q8_0 (lossy); see [`Matrix::to_format`].
    pub fn to_q8_0(&self) -> Result<Self, MatrixError> {
        self.to_format(Format::Q8_0)
    }

    /// The same matrix in another format, in general with a loss. Costs nothing when it is in that format already.
    ///
    /// # Errors
    /// When the format cannot be written, when a row is not whole blocks or holds a value that cannot be stored.
    pub fn to_format(&self, format: Format) -> Result<Self, MatrixError> {
        if format == self.format && self.scales.is_none() {
            return Ok(self.clone());
        }
        if !format.can_encode() {
            return Err(MatrixError::ReadOnly(format));
        }
        let n_in = self.n_in;
        let Some(row_bytes) = format.n_bytes(n_in) else {
            return Err(MatrixError::Ragged { format, n_in });
        };
        let mut bytes = vec![0; row_bytes * self.n_out];
        let mut values = vec![0.0; n_in];
        if row_bytes > 0 {
            for (row, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
                self.row(row, &mut values);
                if !format.encode_into(&values, out) {
                    return Err(MatrixError::NotRepresentable { format, row });
                }
            }
        }
        Self::new(format, self.n_out, n_in, bytes.into())
    }

    /// Rows `range` as a matrix of their own, over the same memory. Panics when out of range.
    #[must_use]
    pub fn rows(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.n_out,
            "rows {range:?} of {}",
            self.n_out
        );
        let aligned = |row: usize| row == self.n_out || row.is_multiple_of(PANEL_ROWS);
        assert!(
            !self.interleaved || (aligned(range.start) && aligned(range.end)),
            "interleaved rows {range:?} are not cut at multiples of {PANEL_ROWS}"
        );
        let row_bytes = self.row_bytes();
        let mut scales = self.scales.clone();
        if let Some(scales) = &mut scales {
            scales.first_row += range.start;
        }
        Self {
            n_out: range.len(),
            n_in: self.n_in,
            format: self.format,
            bytes: {
                // A panel's rows are whole, the last ones repeated.
                let end = match self.interleaved {
                    true => range.end.next_multiple_of(PANEL_ROWS),
                    false => range.end,
                };
                self.bytes.slice(range.start * row_bytes..end * row_bytes)
            },
            scales,
            float_activations: self.float_activations,
            interleaved: self.interleaved,
        }
    }

    /// How its rows are interleaved; `None` where they already are, or the format or shape does not allow it.
    pub(crate) fn interleaved_shape(&self) -> Option<Shape> {
        if self.scales.is_some() || self.interleaved || self.bytes.is_empty() {
            return None;
        }
        Shape::of(self.format, self.row_bytes())
    }

    /// The same matrix over other bytes, which hold the same values.
    pub(crate) fn over(&self, bytes: Bytes, interleaved: bool) -> Self {
        Self {
            bytes,
            interleaved,
            ..self.clone()
        }
    }

    /// A matrix of the same kind with `n_out` interleaved rows.
    pub(crate) fn with_rows(&self, n_out: usize, bytes: Bytes) -> Self {
        Self {
            n_out,
            bytes,
            interleaved: true,
            ..self.clone()
        }
    }

    /// The same matrix with interleaved rows; `None` where its format or shape does not allow it.
    pub(crate) fn interleave(
        &self,
        kernels: Kernels,
        pool: &ThreadPool,
        arena: &Arena,
    ) -> Option<Self> {
        let row_bytes = self.row_bytes();
        let shape = self.interleaved_shape()?;
        let slab = PANEL_ROWS * row_bytes;
        let mut bytes = arena.take(self.n_out.div_ceil(PANEL_ROWS) * slab)?;
        pool.for_each_chunk(bytes.as_mut(), slab, |at, out| {
            let from = at * slab;
            let rows = &self.bytes[from..self.bytes.len().min(from + slab)];
            kernels.interleave(&shape, rows, row_bytes, out);
        });
        Some(Self {
            bytes: Bytes::from_owner(bytes),
            interleaved: true,
            ..self.clone()
        })
    }

    pub(crate) fn is_interleaved(&self) -> bool {
        self.interleaved
    }

    /// The same matrix, multiplied by f32 activations whatever its format: slower for blocks and bf16, and free of
    /// the error of rounding activations to 8 bits or to bf16.
    #[must_use]
    pub fn with_float_activations(mut self) -> Self {
        self.float_activations = true;
        self
    }

    /// Whether [`Matrix::with_float_activations`] was asked for.
    pub fn has_float_activations(&self) -> bool {
        self.float_activations
    }

    /// What activations this matrix is multiplied by.
    pub(crate) fn acts(&self) -> ActFormat {
        if self.float_activations {
            ActFormat::F32
        } else {
            ActFormat::of(self.format)
        }
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
        self.format
    }

    /// The weights as they lie in memory, without the scales of blocks: the bytes that were given, unless they had to
    /// be copied to be aligned or interleaved.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes that the weights occupy, scales of blocks included.
    pub fn n_bytes(&self) -> usize {
        let scales = self.scales.as_ref().map_or(0, |scales| {
            self.n_out.div_ceil(scales.block[0]) * self.n_in.div_ceil(scales.block[1])
        });
        self.bytes.len() + scales * size_of::<f32>()
    }

    /// Writes row `row` as f32 to `out` (`[n_in]`). Panics when out of range.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.row_by(row, out, |bytes, out| self.format.decode_into(bytes, out));
    }

    /// [`Matrix::row`] with another way to decode the stored bytes.
    pub(crate) fn row_by(&self, row: usize, out: &mut [f32], decode: impl Fn(&[u8], &mut [f32])) {
        assert_eq!(out.len(), self.n_in, "a row of the matrix");
        let row_bytes = self.row_bytes();
        let shape = Shape::of(self.format, row_bytes).filter(|_| self.interleaved);
        match shape {
            None => decode(&self.bytes[row * row_bytes..][..row_bytes], out),
            Some(shape) => {
                let slab = PANEL_ROWS * row_bytes;
                let slab = &self.bytes[row / PANEL_ROWS * slab..][..slab];
                shape.row(slab, row % PANEL_ROWS, |at, bytes| {
                    let values = |bytes: usize| bytes * self.n_in / row_bytes;
                    decode(bytes, &mut out[values(at)..][..values(bytes.len())]);
                });
            }
        }
        if let Some(scales) = &self.scales {
            let [rows, columns] = scales.block;
            let n_columns = self.n_in.div_ceil(columns);
            let factors = &scales.values[(scales.first_row + row) / rows * n_columns..];
            for (out, factor) in out.chunks_mut(columns).zip(factors) {
                for value in out {
                    *value *= factor;
                }
            }
        }
    }

    /// The first row and column whose value is NaN or infinite, if any.
    pub fn first_non_finite(&self) -> Option<(usize, usize)> {
        // Products with scales within this bound cannot overflow: a float of 8 bits is at most 448.
        const SAFE_SCALE: f32 = 1e35;
        if let Some(scales) = &self.scales
            && !scales.values.iter().all(|scale| scale.abs() < SAFE_SCALE)
        {
            let mut values = vec![0.0; self.n_in];
            return (0..self.n_out).find_map(|row| {
                self.row(row, &mut values);
                let column = values.iter().position(|v| !v.is_finite())?;
                Some((row, column))
            });
        }
        if self.interleaved {
            return None;
        }
        let index = self.format.first_non_finite(&self.bytes)?;
        Some((index / self.n_in, index % self.n_in))
    }

    /// Bytes of row `row` and those behind it; of interleaved rows, `row` is a multiple of [`PANEL_ROWS`].
    pub(crate) fn row_bytes_from(&self, row: usize) -> &[u8] {
        &self.bytes[row * self.row_bytes()..]
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.format
            .n_bytes(self.n_in)
            .expect("rows were checked to be whole blocks")
    }

    /// All values or blocks. `T` is the type of the format.
    pub(crate) fn units<T: Pod>(&self) -> &[T] {
        debug_assert!(!self.interleaved, "rows where they lie");
        blocks::cast(&self.bytes).expect("bytes were aligned for their format")
    }
}

fn owned<T: Pod>(values: Vec<T>) -> Bytes {
    Bytes::from_owner(Owned(values))
}

/// What addresses of the format's blocks must be a multiple of.
fn alignment(format: Format) -> usize {
    match format {
        Format::F32 => ALIGN,
        Format::F8E4M3 | Format::Mxfp4 | Format::Q8K => 1,
        _ => 2,
    }
}

/// A copy of `bytes` that suits every format.
fn aligned(bytes: &Bytes) -> Bytes {
    let mut words = vec![0f32; bytes.len().div_ceil(ALIGN)];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(ALIGN)) {
        let mut padded = [0; ALIGN];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = f32::from_bits(u32::from_le_bytes(padded));
    }
    owned(words).slice(..bytes.len())
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
        let f16s = f32s.to_format(Format::F16).unwrap();
        let mut row = vec![0.0; 32];
        for (matrix, tolerance) in [(&f32s, 0.0), (&bf16s, 0.0), (&f16s, 0.0), (&q8, 0.01)] {
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
    fn bytes_are_used_where_they_lie_and_copied_only_when_misaligned() {
        for format in Format::all().filter(|format| *format != Format::U8) {
            let (n_out, n_in) = (3, format.block_len());
            let n_bytes = n_out * format.block_bytes();
            // Room to start at any address.
            let all = owned(vec![0f32; n_bytes / 4 + 8]);
            for offset in 0..4 {
                let bytes = all.slice(offset..offset + n_bytes);
                let address = bytes.as_ptr();
                let matrix = Matrix::new(format, n_out, n_in, bytes).unwrap();
                let here = matrix.bytes.as_ptr() == address;
                assert_eq!(
                    here,
                    offset % alignment(format) == 0,
                    "{format} at {offset}"
                );
                assert_eq!(matrix.n_bytes(), n_bytes);
                let last = matrix.rows(2..3);
                assert_eq!(
                    last.bytes.as_ptr().addr() - matrix.bytes.as_ptr().addr(),
                    2 * format.block_bytes()
                );
            }
        }
    }

    #[test]
    fn a_misaligned_copy_holds_the_same_values() {
        let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let mut bytes = vec![0];
        bytes.extend(Format::F32.encode(&values).unwrap());
        let matrix = Matrix::new(Format::F32, 2, 3, Bytes::from(bytes).slice(1..)).unwrap();
        assert_eq!(matrix.units::<f32>(), values);
        let mut row = [0.0; 3];
        matrix.rows(1..2).row(0, &mut row);
        assert_eq!(row, [3.0, 4.0, 5.0]);
    }

    #[test]
    fn blocks_of_eight_bit_floats_have_their_scales() {
        // Blocks of 2 x 2 over 3 x 3: the last row and column are blocks of their own. 0x38 is 1, 0x40 is 2.
        let bytes = Bytes::from(vec![0x38, 0x40, 0x38, 0x40, 0x38, 0x40, 0x38, 0x40, 0x38]);
        let scales = vec![1.0, 10.0, 100.0, 1000.0];
        let matrix =
            Matrix::with_block_scales(3, 3, bytes.clone(), scales.clone(), [2, 2]).unwrap();
        let mut row = [0.0; 3];
        matrix.row(1, &mut row);
        assert_eq!(row, [2.0, 1.0, 20.0]);
        matrix.rows(1..3).row(1, &mut row);
        assert_eq!(row, [100.0, 200.0, 1000.0]);
        assert_eq!(matrix.n_bytes(), 9 + 16);
        assert_eq!(matrix.rows(2..3).n_bytes(), 3 + 8);
        let wide = matrix.to_format(Format::F32).unwrap();
        assert_eq!(wide.units::<f32>()[6..], row);
        let error = Matrix::with_block_scales(3, 3, bytes.clone(), scales, [2, 3]).unwrap_err();
        assert!(error.to_string().contains("blocks of [2, 3]"), "{error}");
        let nan = vec![1.0, 1.0, f32::NAN, 1.0];
        let matrix = Matrix::with_block_scales(3, 3, bytes, nan, [2, 2]).unwrap();
        assert_eq!(matrix.first_non_finite(), Some((2, 0)));
    }

    #[test]
    fn wrong_sizes_and_values_are_refused() {
        assert!(matches!(
            Matrix::from_f32(2, 3, vec![0.0; 5]),
            Err(MatrixError::Shape { n_values: 5, .. })
        ));
        let ragged = Matrix::from_f32(1, 33, vec![0.0; 33]).unwrap();
        let format = Format::Q8_0;
        assert_eq!(
            ragged.to_q8_0().unwrap_err(),
            MatrixError::Ragged { format, n_in: 33 }
        );
        let mut values = vec![0.0; 96];
        values[70] = f32::NAN;
        let nan = Matrix::from_f32(3, 32, values).unwrap();
        assert_eq!(nan.first_non_finite(), Some((2, 6)));
        assert_eq!(
            nan.to_q8_0().unwrap_err(),
            MatrixError::NotRepresentable { format, row: 2 }
        );
        let error = nan.to_format(Format::F8E4M3).unwrap_err().to_string();
        assert!(
            error.contains("F8_E4M3") && error.contains("Q8_0"),
            "{error}"
        );
        let bytes = Bytes::from(vec![0; 143]);
        let error = Matrix::new(Format::Q4K, 1, 256, bytes.clone()).unwrap_err();
        assert!(matches!(error, MatrixError::Bytes { n_bytes: 143, .. }));
        let error = Matrix::new(Format::Q4K, 1, 128, bytes.clone()).unwrap_err();
        assert!(matches!(error, MatrixError::Ragged { n_in: 128, .. }));
        let error = Matrix::new(Format::U8, 11, 13, bytes).unwrap_err();
        assert_eq!(error, MatrixError::NotWeights(Format::U8));
    }

    #[test]
    fn broken_scales_of_blocks_are_found() {
        // The second of two blocks of a row has a scale that is NaN: f16 0x7e00 at its offset, E8M0 0xff.
        for (format, offset, scale) in [
            (Format::Q4_0, 0, &[0x00, 0x7e][..]),
            (Format::Q5_1, 2, &[0x00, 0x7c]),
            (Format::Q2K, 82, &[0x00, 0x7e]),
            (Format::Q6K, 208, &[0x00, 0xfc]),
            (Format::Q8K, 0, &[0x00, 0x00, 0x80, 0x7f]),
            (Format::Iq4Xs, 0, &[0x01, 0x7c]),
            (Format::Mxfp4, 0, &[0xff]),
        ] {
            let mut bytes = vec![0; 2 * format.block_bytes()];
            bytes[format.block_bytes() + offset..][..scale.len()].copy_from_slice(scale);
            let n_in = 2 * format.block_len();
            let matrix = Matrix::new(format, 1, n_in, bytes.into()).unwrap();
            assert_eq!(
                matrix.first_non_finite(),
                Some((0, format.block_len())),
                "{format}"
            );
        }
    }
}
