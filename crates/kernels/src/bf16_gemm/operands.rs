//! Operands of products of bf16, packed: what they are, and parts of them. [`Bf16Gemm`](super::Bf16Gemm) packs and multiplies them.

use std::ops::Range;

use crate::arch::bf16_gemm::{LINE, Line};

/// Rows `[m, k]` in bf16, `k` side by side.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    pub(super) lines: Vec<Line>,
    pub(super) m: usize,
    pub(super) k: usize,
}

/// A matrix `[k, n]` in bf16, as panels of some columns each, two values of `k` side by side.
#[derive(Clone, Debug, Default)]
pub struct Panels {
    pub(super) lines: Vec<Line>,
    pub(super) k: usize,
    pub(super) n: usize,
}

impl Rows {
    /// Lines of a row. Odd, so that rows do not all meet in the same few places of the cache.
    pub(super) fn row_lines(k: usize) -> usize {
        k.div_ceil(2 * LINE) | 1
    }

    /// Rows and columns.
    #[must_use]
    pub fn dims(&self) -> [usize; 2] {
        [self.m, self.k]
    }
}

impl Panels {
    /// Rows and columns.
    #[must_use]
    pub fn dims(&self) -> [usize; 2] {
        [self.k, self.n]
    }

    pub(super) fn words(&self) -> usize {
        self.k.div_ceil(2)
    }

    /// Columns `i * LINE` and on: a line for every two values of `k`.
    pub(super) fn panel(&self, i: usize) -> &[Line] {
        &self.lines[i * self.words()..][..self.words()]
    }
}

/// The left operand of a product, or some of its rows.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a> {
    pub(super) of: Of<'a>,
    pub(super) from: usize,
    pub(super) m: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Of<'a> {
    Rows(&'a Rows),
    Columns(&'a Panels),
}

impl<'a> Left<'a> {
    /// `[m, k]` as it was packed.
    #[must_use]
    pub fn rows(rows: &'a Rows) -> Self {
        let (of, from, m) = (Of::Rows(rows), 0, rows.m);
        Self { of, from, m }
    }

    /// The transpose `[m, k]` of panels of `[k, m]`.
    #[must_use]
    pub fn transposed(panels: &'a Panels) -> Self {
        let (of, from, m) = (Of::Columns(panels), 0, panels.n);
        Self { of, from, m }
    }

    /// Some rows of it, which are multiplied fastest when the first is a multiple of 32.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn part(self, rows: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.m,
            "some of the rows"
        );
        Self {
            from: self.from + rows.start,
            m: rows.len(),
            ..self
        }
    }

    pub(super) fn k(self) -> usize {
        match self.of {
            Of::Rows(rows) => rows.k,
            Of::Columns(panels) => panels.k,
        }
    }
}

/// The right operand of a product: panels, or the first rows and columns of them.
#[derive(Clone, Copy, Debug)]
pub struct Right<'a> {
    pub(super) panels: &'a Panels,
    pub(super) k: usize,
    pub(super) n: usize,
}

impl<'a> From<&'a Panels> for Right<'a> {
    fn from(panels: &'a Panels) -> Self {
        let [k, n] = panels.dims();
        Self { panels, k, n }
    }
}

impl Panels {
    /// The first `k` rows and `n` columns.
    ///
    /// # Panics
    /// When there are fewer, or `k` is odd and not all rows.
    #[must_use]
    pub fn corner(&self, k: usize, n: usize) -> Right<'_> {
        assert!(k <= self.k && n <= self.n, "a corner of the panels");
        assert!(k == self.k || k.is_multiple_of(2), "whole words");
        Right { panels: self, k, n }
    }
}
