//! What an instruction set offers to products of bf16 with f32 sums: packing and tiles.
//!
//! Two values that follow each other along `k` are one word, the earlier in its low half. A sum runs over the words in
//! order and adds the later value of a word first, as `vdpbf16ps` does; it goes on from what the destination holds.
//! So cutting `k` changes no bit.

use std::mem::MaybeUninit;

use crate::gemm::Mat;

/// Words in a line; columns of a panel.
pub(crate) const LINE: usize = 32;

/// Words that lie in one piece of memory: two lines of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(128))]
pub(crate) struct Line(pub(crate) [u32; LINE]);

/// Rows of a matrix, by index or all of them.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) cols: usize,
    /// Rows before the first.
    pub(crate) skipped: usize,
    pub(crate) index: Option<&'a [u32]>,
}

impl<'a> View<'a> {
    /// The rows of `mat`, or those that `index` names. A row's values must lie side by side.
    pub(crate) fn new(mat: Mat<'a>, index: Option<&'a [u32]>) -> Self {
        assert!(
            mat.col_stride == 1 || mat.cols == 1,
            "rows whose values lie side by side"
        );
        Self {
            data: mat.data,
            stride: mat.row_stride,
            cols: mat.cols,
            skipped: 0,
            index,
        }
    }

    /// Without the first `n` rows.
    pub(crate) fn below(self, n: usize) -> Self {
        Self {
            skipped: self.skipped + n,
            ..self
        }
    }

    /// `n` columns of row `i`, from column `from`.
    #[inline(always)]
    pub(crate) fn part(&self, i: usize, from: usize, n: usize) -> &'a [f32] {
        let i = self.skipped + i;
        let row = self.index.map_or(i, |index| index[i] as usize);
        &self.data[row * self.stride + from..][..n]
    }
}

/// A product `c[i, j] += sum over p of a[i, p] . b[p, j]` of words, for at most [`LINE`] columns.
pub(crate) struct Strip {
    /// Word `p` of row `i` is `a[i * a_row + p]` for `rows`, `a[i + p * LINE]` for `panels`.
    pub(crate) a: *const u32,
    pub(crate) a_row: usize,
    /// `n_words` lines.
    pub(crate) b: *const Line,
    pub(crate) n_words: usize,
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    pub(crate) n_rows: usize,
    pub(crate) n_cols: usize,
    /// Whether the sums go on from what `c` holds, or start at zero.
    pub(crate) add: bool,
}

/// The functions of one instruction set; the scalar twin says what they mean.
pub(crate) struct Bf16 {
    /// Whether the CPU multiplies bf16 itself.
    pub(crate) native: bool,
    /// A row to words: two values side by side are one. `out` is as long as needed; an odd end is followed by zero. As the
    /// others that pack, it writes all of `out`.
    pub(crate) pack_row: unsafe fn(x: &[f32], out: &mut [MaybeUninit<u32>]),
    /// Columns `from..from + n` of `2 * out.len()` rows (or one less) to lines: two values one above the other are one
    /// word. Zeros fill the last line's lower row and the columns after `n`.
    pub(crate) pack_down: unsafe fn(
        x: &View<'_>,
        n_rows: usize,
        from: usize,
        n: usize,
        out: &mut [MaybeUninit<Line>],
    ),
    /// At most [`LINE`] rows to the columns of lines: two values side by side are one word. Zeros fill the rest.
    pub(crate) pack_across:
        unsafe fn(x: &View<'_>, from: usize, n: usize, out: &mut [MaybeUninit<Line>]),
    /// # Safety
    /// The CPU has the instruction set; `a`, `b` and `c` are valid for what [`Strip`] says, `c` for writing.
    pub(crate) rows: unsafe fn(&Strip),
    /// As `rows`, with `a` in a panel: at most [`LINE`] rows.
    pub(crate) panels: unsafe fn(&Strip),
}
