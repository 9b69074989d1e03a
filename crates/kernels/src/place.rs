//! Making matrices in memory that is used again and again: where experts that are read from disk are put.
//!
//! What is made is the same as at load ([`Compute::interleaved`]): rows interleaved where these kernels want them so, and
//! copied as they are elsewhere.

use std::sync::Arc;

use bytes::Bytes;

use crate::compute::Compute;
use crate::format::Format;
use crate::interleave::Shape;
use crate::matrix::Matrix;
use crate::memory::Part;
use crate::panel::PANEL_ROWS;
use crate::table::Kernels;

/// Where a matrix begins: a line of the cache.
const ALIGN: usize = 64;

/// Memory for a few matrices at a time, made by [`Compute::memory`] and filled by [`Compute::place`].
#[derive(Debug)]
pub struct PlacedMemory(Arc<Part>);

/// The memory as the matrices in it hold it.
struct Shared(Arc<Part>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        Part::as_ref(&self.0)
    }
}

impl PlacedMemory {
    /// Its size.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        Part::as_ref(&self.0).len()
    }
}

impl Compute {
    /// Bytes that [`Compute::place`] uses for a matrix of `n_out` rows of `n_in` values.
    #[must_use]
    pub fn placed_bytes(&self, format: Format, [n_out, n_in]: [usize; 2]) -> usize {
        let row_bytes = format.n_bytes(n_in).unwrap_or(0);
        let rows = match self.interleaves() && Shape::of(format, row_bytes).is_some() {
            true => n_out.next_multiple_of(PANEL_ROWS),
            false => n_out,
        };
        (rows * row_bytes).next_multiple_of(ALIGN)
    }

    /// `n_bytes` of memory to make matrices in; `None` when the system has none left. Pages of it are taken from the
    /// system when they are first written.
    #[must_use]
    pub fn memory(&self, n_bytes: usize) -> Option<PlacedMemory> {
        let part = self.arena().take(n_bytes.max(1))?;
        Some(PlacedMemory(Arc::new(part)))
    }

    /// The same matrices in `memory`, in the order that these kernels read fastest; products have the same bits.
    ///
    /// `None` when matrices that were made there before are still alive, or the memory is too small.
    pub fn place<const N: usize>(
        &self,
        memory: &mut PlacedMemory,
        matrices: [&Matrix; N],
    ) -> Option<[Matrix; N]> {
        let interleaves = self.interleaves();
        let mut rest = Part::as_mut(Arc::get_mut(&mut memory.0)?);
        let mut slabs = Vec::new();
        let mut ranges = [(0, 0); N];
        let mut from = 0;
        for (matrix, range) in matrices.iter().zip(&mut ranges) {
            let shape = matrix.interleaved_shape().filter(|_| interleaves);
            let n_bytes = match shape {
                Some(_) => matrix.n_out().next_multiple_of(PANEL_ROWS) * matrix.row_bytes(),
                None => matrix.bytes().len(),
            };
            let (out, after) = rest.split_at_mut_checked(n_bytes)?;
            slabs.extend(Slab::all(matrix, shape, out));
            *range = (from, from + n_bytes);
            let padding = (n_bytes.next_multiple_of(ALIGN) - n_bytes).min(after.len());
            rest = &mut after[padding..];
            from += n_bytes + padding;
        }
        // One call for all of them: a thread that was woken is used until the last one is done.
        let kernels = self.kernels();
        self.pool().for_each_chunk(&mut slabs, 1, |_, slabs| {
            for slab in slabs {
                slab.write(kernels);
            }
        });
        let bytes = Bytes::from_owner(Shared(Arc::clone(&memory.0)));
        let mut ranges = ranges.into_iter();
        Some(matrices.map(|matrix| {
            let (from, to) = ranges.next().unwrap_or((0, 0));
            let is_interleaved = interleaves && matrix.interleaved_shape().is_some();
            matrix.over(bytes.slice(from..to), is_interleaved)
        }))
    }
}

/// A matrix of which only some rows have come, made where it will stay: see [`Compute::growing`].
#[derive(Debug)]
pub struct GrowingMatrix<'a> {
    compute: &'a Compute,
    part: Part,
    /// Size and format of all rows.
    n_out: usize,
    /// Rows that are there, and one of the matrices that they came in.
    n_rows: usize,
    last: Option<Matrix>,
}

impl Compute {
    /// Memory for a matrix of `n_out` rows of `n_in` values that comes in pieces and is interleaved as they come, so that it
    /// is not in memory twice; `None` where these kernels use rows as they are, or the system has no memory left.
    #[must_use]
    pub fn growing(&self, format: Format, [n_out, n_in]: [usize; 2]) -> Option<GrowingMatrix<'_>> {
        let row_bytes = format.n_bytes(n_in)?;
        Shape::of(format, row_bytes).filter(|shape| self.interleaves() && shape.fits(row_bytes))?;
        let part = self
            .arena()
            .take(n_out.next_multiple_of(PANEL_ROWS) * row_bytes)?;
        Some(GrowingMatrix {
            compute: self,
            part,
            n_out,
            n_rows: 0,
            last: None,
        })
    }
}

impl GrowingMatrix<'_> {
    /// Pieces have a multiple of this many rows, but for the last one.
    pub const ROWS: usize = PANEL_ROWS;

    /// The next rows.
    ///
    /// # Panics
    /// When there are more rows than was said, or pieces that are not whole panels before the last one.
    pub fn push(&mut self, rows: &Matrix) {
        assert!(
            self.n_rows.is_multiple_of(Self::ROWS) && self.n_rows + rows.n_out() <= self.n_out,
            "{} rows behind {} of {}",
            rows.n_out(),
            self.n_rows,
            self.n_out
        );
        let out = &mut Part::as_mut(&mut self.part)[self.n_rows * rows.row_bytes()..];
        let mut slabs: Vec<Slab<'_>> = Slab::all(rows, rows.interleaved_shape(), out).collect();
        let kernels = self.compute.kernels();
        self.compute
            .pool()
            .for_each_chunk(&mut slabs, 1, |_, slabs| {
                for slab in slabs {
                    slab.write(kernels);
                }
            });
        self.n_rows += rows.n_out();
        self.last = Some(rows.rows(0..0));
    }

    /// The matrix; `None` while rows are missing.
    #[must_use]
    pub fn finish(self) -> Option<Matrix> {
        let last = self.last.filter(|_| self.n_rows == self.n_out)?;
        Some(last.with_rows(self.n_out, Bytes::from_owner(Shared(Arc::new(self.part)))))
    }
}

/// Rows that are written together.
struct Slab<'a> {
    /// `None` where they are copied as they are.
    shape: Option<Shape>,
    rows: &'a [u8],
    row_bytes: usize,
    out: &'a mut [u8],
}

impl<'a> Slab<'a> {
    fn all(
        matrix: &'a Matrix,
        shape: Option<Shape>,
        out: &'a mut [u8],
    ) -> impl Iterator<Item = Self> {
        let row_bytes = matrix.row_bytes();
        let n_bytes = (PANEL_ROWS * row_bytes).max(1);
        let slabs = matrix.bytes().chunks(n_bytes).zip(out.chunks_mut(n_bytes));
        slabs.map(move |(rows, out)| Self {
            shape,
            rows,
            row_bytes,
            out,
        })
    }

    fn write(&mut self, kernels: Kernels) {
        match &self.shape {
            Some(shape) => kernels.interleave(shape, self.rows, self.row_bytes, self.out),
            None => self.out.copy_from_slice(self.rows),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::MatmulScratch;
    use crate::isa::Isa;
    use crate::samples::noise;

    fn product(compute: &Compute, w: &Matrix, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / w.n_in() * w.n_out()];
        compute.matmul(w, x, &mut y, &mut MatmulScratch::default());
        y
    }

    #[test]
    fn a_growing_matrix_is_the_interleaved_one() {
        for isa in Isa::available() {
            let compute = Compute::new(Kernels::for_isa(isa).unwrap(), 2);
            for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q6K] {
                for n_out in [1, 32, 70, 160] {
                    let source = Matrix::from_f32(n_out, 256, noise(n_out * 256, 5)).unwrap();
                    let source = source.to_format(format).unwrap();
                    let Some(mut growing) = compute.growing(format, [n_out, 256]) else {
                        assert!(!compute.interleaves());
                        continue;
                    };
                    for from in (0..n_out).step_by(64) {
                        growing.push(&source.rows(from..n_out.min(from + 64)));
                    }
                    let grown = growing.finish().unwrap();
                    assert_eq!((grown.n_out(), grown.n_in()), (n_out, 256));
                    assert!(grown.bytes() == compute.interleaved(&source).bytes());
                    let x = noise(3 * 256, 9);
                    assert_eq!(
                        product(&compute, &source, &x),
                        product(&compute, &grown, &x)
                    );
                    let missing = compute.growing(format, [n_out, 256]).unwrap();
                    assert!(missing.finish().is_none());
                }
            }
        }
    }

    #[test]
    fn placed_matrices_have_the_same_products_each_time() {
        for isa in Isa::available() {
            let compute = Compute::new(Kernels::for_isa(isa).unwrap(), 2);
            for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0] {
                let shapes = [[70, 64], [33, 64], [1, 32]];
                let n_bytes = shapes.map(|shape| compute.placed_bytes(format, shape));
                let mut memory = compute.memory(n_bytes.iter().sum()).unwrap();
                for seed in 0..3 {
                    let sources = shapes.map(|[n_out, n_in]| {
                        let values = noise(n_out * n_in, seed);
                        let matrix = Matrix::from_f32(n_out, n_in, values).unwrap();
                        matrix.to_format(format).unwrap()
                    });
                    let [a, b, c] = &sources;
                    let placed = compute.place(&mut memory, [a, b, c]).unwrap();
                    for (source, placed) in sources.iter().zip(&placed) {
                        let x = noise(3 * source.n_in(), 9);
                        let expected = product(&compute, source, &x);
                        assert_eq!(product(&compute, placed, &x), expected, "{isa} {format}");
                    }
                    // What was made there before is still alive.
                    assert!(compute.place(&mut memory, [a]).is_none());
                }
            }
        }
    }

    #[test]
    fn too_small_a_memory_is_not_overrun() {
        let compute = Compute::new(Kernels::detect(), 1);
        let matrix = Matrix::from_f32(40, 16, noise(640, 1)).unwrap();
        let mut memory = compute.memory(40 * 16 * 4 - 1).unwrap();
        assert!(compute.place(&mut memory, [&matrix]).is_none());
        assert_eq!(memory.n_bytes(), 40 * 16 * 4 - 1);
    }
}
