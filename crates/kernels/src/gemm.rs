//! Dense f32 matrix products for training: a checked, safe face on the `gemm` crate.
//!
//! Operands are strided views ([`Mat`], [`MatMut`]), so a transpose is a swap of strides and costs nothing.
//! Every output element is summed over `k` in an order that does not depend on the number of threads,
//! which keeps training runs reproducible.

use ::gemm::Parallelism;

/// A read-only `rows x cols` view of f32 with arbitrary non-negative strides (in elements).
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix: `data` holds exactly `rows * cols` values.
    ///
    /// # Panics
    /// If the length does not match.
    #[must_use]
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix");
        Self::strided(data, rows, cols, cols)
    }

    /// A matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the last row reaches past the end of `data`.
    #[must_use]
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_fits(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Rows and columns.
    #[must_use]
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The first `rows` rows.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn top(self, rows: usize) -> Self {
        assert!(rows <= self.rows, "the first {rows} of {} rows", self.rows);
        Self { rows, ..self }
    }

    /// The transpose, without moving anything.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A mutable `rows x cols` view of f32 whose rows are contiguous.
#[derive(Debug)]
pub struct MatMut<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A row-major matrix: `data` holds exactly `rows * cols` values.
    ///
    /// # Panics
    /// If the length does not match.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix");
        Self::strided(data, rows, cols, cols)
    }

    /// A matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the last row reaches past the end of `data`, or rows would overlap.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_fits(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
        }
    }
}

fn assert_fits(len: usize, rows: usize, cols: usize, row_stride: usize) {
    assert!(
        row_stride >= cols,
        "rows of {cols} overlap at stride {row_stride}"
    );
    let needed = if rows == 0 || cols == 0 {
        0
    } else {
        (rows - 1) * row_stride + cols
    };
    assert!(needed <= len, "a view of {needed} values into {len}");
}

/// What to do with the values already in the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// `c = a b`
    Set,
    /// `c += a b`
    Add,
}

/// `c = alpha a b` or `c += alpha a b`, with `a: [m, k]`, `b: [k, n]`, `c: [m, n]`.
///
/// `threads` is the most threads to use (of the current rayon pool); 1 computes on the calling thread.
///
/// # Panics
/// If the shapes do not fit together.
pub fn gemm(c: MatMut<'_>, write: Write, alpha: f32, a: Mat<'_>, b: Mat<'_>, threads: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    assert_eq!((c.rows, c.cols), (a.rows, b.cols), "output shape");
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    let parallelism = if threads <= 1 {
        Parallelism::None
    } else {
        Parallelism::Rayon(threads)
    };
    let stride = |s: usize| isize::try_from(s).expect("a slice's stride fits isize");
    // SAFETY: the views were checked on construction to lie inside their slices for all rows and columns,
    // the shapes were checked above, `c` is borrowed mutably and so overlaps neither `a` nor `b`, and its
    // rows do not overlap each other (row_stride >= cols).
    unsafe {
        ::gemm::gemm::<f32>(
            c.rows,
            c.cols,
            a.cols,
            c.data.as_mut_ptr(),
            1,
            stride(c.row_stride),
            write == Write::Add,
            a.data.as_ptr(),
            stride(a.col_stride),
            stride(a.row_stride),
            b.data.as_ptr(),
            stride(b.col_stride),
            stride(b.row_stride),
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    #[test]
    fn agrees_with_three_loops_for_every_transpose_and_write() {
        let (m, n, k) = (7, 5, 9);
        let (a, b) = (ramp(m * k), ramp(k * n));
        let a_t: Vec<f32> = (0..k * m).map(|i| a[(i % m) * k + i / m]).collect();
        let b_t: Vec<f32> = (0..n * k).map(|i| b[(i % k) * n + i / k]).collect();
        for threads in [1, 2] {
            for (va, vb) in [
                (Mat::new(&a, m, k), Mat::new(&b, k, n)),
                (Mat::new(&a_t, k, m).t(), Mat::new(&b, k, n)),
                (Mat::new(&a, m, k), Mat::new(&b_t, n, k).t()),
            ] {
                let mut c = vec![1.0; m * n];
                gemm(MatMut::new(&mut c, m, n), Write::Set, 2.0, va, vb, threads);
                gemm(MatMut::new(&mut c, m, n), Write::Add, 1.0, va, vb, threads);
                for i in 0..m {
                    for j in 0..n {
                        let want: f32 = (0..k).map(|p| a[i * k + p] * b[p * n + j]).sum();
                        assert!((c[i * n + j] - 3.0 * want).abs() < 1e-4);
                    }
                }
            }
        }
    }

    #[test]
    fn a_strided_destination_leaves_the_gaps_alone() {
        let (a, b) = (ramp(4), ramp(4));
        let mut c = vec![9.0; 6];
        gemm(
            MatMut::strided(&mut c, 2, 2, 4),
            Write::Set,
            1.0,
            Mat::new(&a, 2, 2),
            Mat::new(&b, 2, 2),
            1,
        );
        assert_eq!((c[2], c[3]), (9.0, 9.0));
    }
}
