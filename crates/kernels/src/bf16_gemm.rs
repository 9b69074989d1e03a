//! Matrix products for training with operands rounded to bf16 and sums in f32.
//!
//! Operands are packed first and multiplied as often as needed: the left one as [`Rows`], or as [`Panels`] when it is a
//! transpose, the right one as [`Panels`]. Packing takes strided views ([`Mat`]) of f32 either way round, and rows by
//! index, so that activations are gathered while they are rounded. Any two matrices of a training step (forward, input
//! gradient, weight gradient) fit together without another copy:
//!
//! | product | left | right |
//! |---|---|---|
//! | `y = x w^T` | rows of `x` | panels of `w^T` (packed across) |
//! | `dx = dy w` | rows of `dy` | panels of `w` (packed down) |
//! | `dw = dy^T x` | panels of `dy` | panels of `x` |
//!
//! [`Bf16Gemm::multiply`] writes or adds to what is there, [`Bf16Gemm::fill`] to memory that nobody has cleared.
//!
//! [`Panels::corner`] is the beginning of panels, for causal attention.
//!
//! A sum runs over `k` in order, from what the destination holds: neither threads nor a product cut along `k` into
//! several with [`Write::Add`] change a bit. Rounding is to nearest, halves to even; numbers below the normal ones of
//! bf16 count as zero.

mod operands;

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use crate::arch::bf16_gemm::{LINE, Line, Strip, View};
use crate::gemm::{Mat, MatMut, Write};
use crate::isa::Isa;
use crate::memory::rewrite;
use crate::room::{Piece, Room};
use crate::table::Kernels;

use operands::Of;
pub use operands::{Left, Panels, Right, Rows};

/// Words of `k` that are multiplied before the next tile: a panel's share stays in the first cache.
const WORDS: usize = 128;
/// Rows of the left operand that are multiplied by all panels, and given to one thread.
const ROWS: usize = 192;
/// Columns that are finished before the next: their sums stay in the second cache while `k` is walked.
const COLS: usize = 512;
/// Panels that one thread packs side by side, and words of them that it packs at a time.
const TOGETHER: usize = 4;
const DEEP: usize = 16;
/// Rows that one thread packs at a time.
const PACKED: usize = 64;

/// The kernels of one instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Bf16Gemm {
    kernels: Kernels,
}

impl Bf16Gemm {
    /// With the given kernels; where the CPU has no products of bf16, with their scalar twin, which is slow.
    #[must_use]
    pub fn new(kernels: Kernels) -> Self {
        Self { kernels }
    }

    /// The CPU's, or `None` where it has none.
    #[must_use]
    pub fn native() -> Option<Self> {
        let best = Self::new(Kernels::for_isa(Isa::detect())?);
        best.kernels.table().bf16.native.then_some(best)
    }

    /// Packs the rows of `mat`, or those that `index` names, as a left operand.
    ///
    /// `threads` is the most threads to use (of the current rayon pool).
    ///
    /// # Panics
    /// When the values of a row do not lie side by side, or an index is beyond the rows.
    pub fn rows(&self, into: &mut Rows, mat: Mat<'_>, index: Option<&[u32]>, threads: usize) {
        let view = View::new(mat, index);
        let (m, k) = (index.map_or(mat.rows, <[u32]>::len), mat.cols);
        let per_row = Rows::row_lines(k);
        (into.m, into.k) = (m, k);
        let pack_row = self.kernels.table().bf16.pack_row;
        let pack = |(block, lines): (usize, &mut [MaybeUninit<Line>])| {
            for (i, lines) in lines.chunks_exact_mut(per_row).enumerate() {
                let (words, rest) = as_words_mut(lines).split_at_mut(k.div_ceil(2));
                // SAFETY: `self` proves the instruction set; there is a word for every two values.
                unsafe { pack_row(view.part(block * PACKED + i, 0, k), words) };
                rest.fill(MaybeUninit::new(0));
            }
        };
        // SAFETY: every row writes its words and the rest of its lines.
        unsafe {
            rewrite(&mut into.lines, m * per_row, |lines| {
                for_each_chunk(lines, PACKED * per_row, threads, pack);
            });
        }
    }

    /// Packs `mat` `[k, n]`, or the rows of it that `index` names, as panels.
    ///
    /// # Panics
    /// When neither the rows nor the columns of `mat` lie side by side, when there is an index and the rows do not, or
    /// when an index is beyond the rows.
    pub fn panels(&self, into: &mut Panels, mat: Mat<'_>, index: Option<&[u32]>, threads: usize) {
        let (k, n) = (index.map_or(mat.rows, <[u32]>::len), mat.cols);
        (into.k, into.n) = (k, n);
        let words = into.words();
        // SAFETY: whole panels are handed out, and packing writes all lines that it is given.
        unsafe {
            rewrite(&mut into.lines, n.div_ceil(LINE) * words, |lines| {
                self.pack_panels(lines, (mat, index), [k, n], threads);
            });
        }
    }

    /// Writes the panels of `mat` `[k, n]`, or of the rows of it that `index` names.
    fn pack_panels(
        &self,
        lines: &mut [MaybeUninit<Line>],
        (mat, index): (Mat<'_>, Option<&[u32]>),
        [k, n]: [usize; 2],
        threads: usize,
    ) {
        let (words, bf16) = (k.div_ceil(2), self.kernels.table().bf16);
        if mat.col_stride == 1 || index.is_some() {
            let view = View::new(mat, index);
            // Some panels side by side: what is fetched of a row is used before it is forgotten.
            let together = if threads <= 1 {
                usize::MAX / words.max(1)
            } else {
                TOGETHER
            };
            for_each_chunk(lines, together * words, threads, |(i, lines)| {
                for first in (0..words).step_by(DEEP) {
                    let (view, n_rows) = (view.below(2 * first), k - 2 * first);
                    for (j, lines) in lines.chunks_exact_mut(words).enumerate() {
                        let from = (i * together + j) * LINE;
                        let lines = &mut lines[first..words.min(first + DEEP)];
                        // SAFETY: `self` proves the instruction set; there is a line for every two rows.
                        unsafe { (bf16.pack_down)(&view, n_rows, from, LINE.min(n - from), lines) };
                    }
                }
            });
        } else {
            let view = View::new(mat.t(), None);
            for_each_chunk(lines, words, threads, |(panel, lines)| {
                let from = panel * LINE;
                // SAFETY: as above, for every two columns of the view.
                unsafe { (bf16.pack_across)(&view, from, LINE.min(n - from), lines) };
            });
        }
    }

    /// `c = a b` or `c += a b`, with `a: [m, k]`, `b: [k, n]`, `c: [m, n]`.
    ///
    /// # Panics
    /// If the shapes do not fit together.
    pub fn multiply<'b>(
        &self,
        c: MatMut<'_>,
        write: Write,
        a: Left<'_>,
        b: impl Into<Right<'b>>,
        threads: usize,
    ) {
        let b = b.into();
        assert_eq!((c.rows, c.cols), (a.m, b.n), "output shape");
        let stride = c.row_stride;
        let last = a.m.saturating_sub(1) * stride + b.n;
        if a.m > 0 && b.n > 0 {
            self.tasks(&mut c.data[..last], stride, write, (a, b), threads);
        }
    }

    /// `c = a b` in memory that holds nothing yet, row after row; returns the values.
    ///
    /// # Panics
    /// If the shapes do not fit together.
    pub fn fill<'c, 'b>(
        &self,
        mut c: Piece<'c>,
        a: Left<'_>,
        b: impl Into<Right<'b>>,
        threads: usize,
    ) -> &'c mut [f32] {
        let b = b.into();
        assert_eq!(c.len(), a.m * b.n, "output shape");
        if !c.is_empty() {
            self.tasks(c.room(), b.n, Write::Set, (a, b), threads);
        }
        // SAFETY: tasks share the rows among them, and a block writes every column of its rows.
        unsafe { c.written() }
    }

    /// Shares the rows of a product among `threads`. `C` is an f32, or room for one where nothing is added to.
    fn tasks<C: Send>(
        &self,
        c: &mut [C],
        stride: usize,
        write: Write,
        (a, b): (Left<'_>, Right<'_>),
        threads: usize,
    ) {
        assert_eq!(size_of::<C>(), size_of::<f32>(), "room for f32");
        assert_eq!(a.k(), b.k, "inner dimensions");
        let per_task = rows_per_task(a.m, threads, a);
        for_each_chunk(c, per_task * stride, threads, |(i, c)| {
            let rows = a.from + i * per_task..a.from + a.m.min((i + 1) * per_task);
            assert!(c.len() >= (rows.len() - 1) * stride + b.n, "whole rows");
            let (base, c_row) = (c.as_mut_ptr().cast::<f32>(), stride);
            let to = Destination { base, c_row, write };
            // SAFETY: the inner dimensions were compared; the chunk holds these rows, and belongs to this task.
            unsafe { self.block(to, a, rows, b) };
        });
    }

    /// Packs `a` and `b` and multiplies them once.
    ///
    /// # Panics
    /// If the shapes do not fit together, or neither rows nor columns of an operand lie side by side.
    pub fn gemm(&self, c: MatMut<'_>, write: Write, a: Mat<'_>, b: Mat<'_>, threads: usize) {
        self.packed(a, b, threads, |left, right| {
            self.multiply(c, write, left, right, threads);
        });
    }

    /// `a b`, as [`Self::gemm`] makes it.
    ///
    /// # Panics
    /// As [`Self::gemm`].
    #[must_use]
    pub fn product(&self, a: Mat<'_>, b: Mat<'_>, threads: usize) -> Vec<f32> {
        let mut room = Room::new(a.rows * b.cols);
        let whole = room.whole();
        self.packed(a, b, threads, |left, right| {
            self.fill(whole, left, right, threads);
        });
        room.finish()
    }

    fn packed(
        &self,
        a: Mat<'_>,
        b: Mat<'_>,
        threads: usize,
        multiply: impl FnOnce(Left<'_>, &Panels),
    ) {
        let mut right = Panels::default();
        self.panels(&mut right, b, None, threads);
        if a.col_stride == 1 {
            let mut left = Rows::default();
            self.rows(&mut left, a, None, threads);
            multiply(Left::rows(&left), &right);
        } else {
            let mut left = Panels::default();
            self.panels(&mut left, a.t(), None, threads);
            multiply(Left::transposed(&left), &right);
        }
    }

    /// Some rows of a product, by one thread.
    ///
    /// # Safety
    /// `to` may be written for all of `rows` and the columns of `b`; they are rows of `a`, whose `k` is that of `b`.
    unsafe fn block(&self, to: Destination, a: Left<'_>, rows: Range<usize>, b: Right<'_>) {
        let words = b.k.div_ceil(2);
        for first in (0..b.n).step_by(COLS) {
            let cols = first..b.n.min(first + COLS);
            // One round even without words: it writes the zeros.
            for from in (0..words.max(1)).step_by(WORDS) {
                let words = from..words.min(from + WORDS);
                for col in cols.clone().step_by(LINE) {
                    // SAFETY: the caller's contract.
                    unsafe { self.strip(to, a, rows.clone(), (b, col, words.clone())) };
                }
            }
        }
    }

    /// What `words` of `k` add to one panel's columns of a block.
    ///
    /// # Safety
    /// As [`Self::block`].
    unsafe fn strip(
        &self,
        to: Destination,
        a: Left<'_>,
        rows: Range<usize>,
        (b, col, words): (Right<'_>, usize, Range<usize>),
    ) {
        let bf16 = self.kernels.table().bf16;
        let strip = |a: &[u32], a_row: usize, row: usize, n_rows: usize| Strip {
            a: a.as_ptr(),
            a_row,
            b: b.panels.panel(col / LINE)[words.clone()].as_ptr(),
            n_words: words.len(),
            c: to.base.wrapping_add((row - rows.start) * to.c_row + col),
            c_row: to.c_row,
            n_rows,
            n_cols: LINE.min(b.n - col),
            add: to.write == Write::Add || words.start > 0,
        };
        match a.of {
            Of::Rows(a) => {
                let per_row = Rows::row_lines(a.k);
                let a = as_words(&a.lines[rows.start * per_row..rows.end * per_row]);
                let a = &a[words.start..];
                let strip = strip(a, per_row * LINE, rows.start, rows.len());
                // SAFETY: `self` proves the instruction set. Each of these rows of `a` has a word for each line
                // of the panel from the first on; the caller says that `c` may be written.
                unsafe { (bf16.rows)(&strip) };
            }
            Of::Columns(a) => {
                let mut row = rows.start;
                while row < rows.end {
                    let n_rows = (LINE - row % LINE).min(rows.end - row);
                    let a = as_words(&a.panel(row / LINE)[words.clone()]);
                    let strip = strip(&a[(row % LINE).min(a.len())..], 1, row, n_rows);
                    // SAFETY: as above; these rows are columns of one panel of `a`.
                    unsafe { (bf16.panels)(&strip) };
                    row += n_rows;
                }
            }
        }
    }
}

/// Where a block of a product goes.
#[derive(Clone, Copy)]
struct Destination {
    base: *mut f32,
    c_row: usize,
    write: Write,
}

/// Nearly equal shares of at most [`ROWS`], several per thread where there is enough; whole panels of a transpose.
fn rows_per_task(m: usize, threads: usize, a: Left<'_>) -> usize {
    let threads = threads.max(1);
    let n_tasks = threads * m.div_ceil(threads * ROWS);
    let rows = m.div_ceil(n_tasks);
    match a.of {
        Of::Rows(_) => rows,
        Of::Columns(_) => rows.next_multiple_of(LINE),
    }
}

fn as_words(lines: &[Line]) -> &[u32] {
    // SAFETY: a line is its words and nothing else.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * LINE) }
}

fn as_words_mut(lines: &mut [MaybeUninit<Line>]) -> &mut [MaybeUninit<u32>] {
    // SAFETY: as above, of room for them.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LINE) }
}

/// Calls `body` with every chunk of `size` and its number, on at most `threads` threads.
fn for_each_chunk<T: Send>(
    data: &mut [T],
    size: usize,
    threads: usize,
    body: impl Fn((usize, &mut [T])) + Send + Sync,
) {
    let size = size.max(1);
    if threads <= 1 {
        data.chunks_mut(size).enumerate().for_each(body);
    } else {
        data.par_chunks_mut(size).enumerate().for_each(body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16;
    use proptest::prelude::*;

    /// A matrix of `rows x cols` values.
    fn values(seed: u64, n: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn all() -> Vec<Bf16Gemm> {
        let isas = Isa::available().into_iter();
        isas.map(|isa| Bf16Gemm::new(Kernels::for_isa(isa).unwrap()))
            .collect()
    }

    /// `[rows, cols]`, or the transpose of `[cols, rows]` that is the same matrix.
    fn either(data: &[f32], rows: usize, cols: usize, turned: bool) -> (Vec<f32>, bool) {
        if !turned {
            return (data.to_vec(), false);
        }
        let at = |i: usize| data[(i % rows) * cols + i / rows];
        ((0..rows * cols).map(at).collect(), true)
    }

    fn mat<'a>((data, turned): &'a (Vec<f32>, bool), rows: usize, cols: usize) -> Mat<'a> {
        match turned {
            true => Mat::new(data, cols, rows).t(),
            false => Mat::new(data, rows, cols),
        }
    }

    /// Sums in the order that is promised, of rounded operands.
    fn naive(c: &mut [f32], [m, n, k]: [usize; 3], write: Write, a: &[f32], b: &[f32]) {
        let round = |x: f32| bf16::from_f32(x).to_f32();
        for i in 0..m {
            for j in 0..n {
                let mut sum = if write == Write::Add {
                    c[i * n + j]
                } else {
                    0.0
                };
                for p in (0..k).step_by(2) {
                    for p in [p + 1, p] {
                        if p < k {
                            sum += round(a[i * k + p]) * round(b[p * n + j]);
                        }
                    }
                }
                c[i * n + j] = sum;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_instruction_set_sums_what_was_rounded_in_the_promised_order(
            (m, n, k) in (1usize..80, 1usize..80, 0usize..90),
            (turn_a, turn_b, add) in any::<(bool, bool, bool)>(),
            threads in 1usize..3,
            seed in any::<u64>(),
        ) {
            let (a, b, start) = (values(seed, m * k), values(seed + 1, k * n), values(seed + 2, m * n));
            let write = if add { Write::Add } else { Write::Set };
            let mut expected = start.clone();
            naive(&mut expected, [m, n, k], write, &a, &b);
            let (a, b) = (either(&a, m, k, turn_a), either(&b, k, n, turn_b));
            for gemm in all() {
                let mut c = start.clone();
                gemm.gemm(MatMut::new(&mut c, m, n), write, mat(&a, m, k), mat(&b, k, n), threads);
                prop_assert_eq!(&c, &expected, "{:?} {} x {} x {}", gemm, m, n, k);
                if !add {
                    let c = gemm.product(mat(&a, m, k), mat(&b, k, n), threads);
                    prop_assert_eq!(&c, &expected, "{:?} {} x {} x {}", gemm, m, n, k);
                }
            }
        }
    }

    #[test]
    fn more_columns_and_words_than_are_multiplied_at_a_time() {
        let [m, n, k] = [3, 2 * COLS + 5, 2 * 2 * WORDS + 3];
        let (a, b) = (values(1, m * k), values(2, k * n));
        let mut expected = vec![0.0; m * n];
        naive(&mut expected, [m, n, k], Write::Set, &a, &b);
        for gemm in all() {
            let c = gemm.product(Mat::new(&a, m, k), Mat::new(&b, k, n), 2);
            assert!(c == expected, "{gemm:?}");
        }
    }

    #[test]
    fn long_sums_and_cuts_along_k_change_no_bit() {
        let (m, n, k) = (45, 70, 2 * WORDS * 2 + 14);
        let (a, b) = (values(1, m * k), values(2, k * n));
        let mut expected = vec![0.0; m * n];
        naive(&mut expected, [m, n, k], Write::Set, &a, &b);
        for gemm in all() {
            let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, k, n));
            for threads in [1, 3] {
                let mut c = vec![9.0; m * n];
                gemm.gemm(MatMut::new(&mut c, m, n), Write::Set, a, b, threads);
                assert_eq!(c, expected, "{gemm:?}");
            }
            let (corner_k, corner_n) = (36, 33);
            let (mut left, mut right) = (Rows::default(), Panels::default());
            let first = Mat::strided(a.data, m, corner_k, k);
            gemm.rows(&mut left, first, None, 1);
            gemm.panels(&mut right, b, None, 1);
            let mut c = vec![9.0; m * corner_n];
            let into = MatMut::new(&mut c, m, corner_n);
            gemm.multiply(
                into,
                Write::Set,
                Left::rows(&left),
                right.corner(corner_k, corner_n),
                1,
            );
            let mut of_corner = vec![9.0; m * corner_n];
            let b_corner: Vec<f32> = (0..corner_k * corner_n)
                .map(|i| b.data[i / corner_n * n + i % corner_n])
                .collect();
            let into = MatMut::new(&mut of_corner, m, corner_n);
            gemm.gemm(
                into,
                Write::Set,
                first,
                Mat::new(&b_corner, corner_k, corner_n),
                1,
            );
            assert_eq!(c, of_corner, "{gemm:?}, corner");

            let mut part = vec![9.0; 7 * n];
            gemm.rows(&mut left, a, None, 1);
            let rows = Left::rows(&left).part(20..30).part(3..10);
            gemm.multiply(MatMut::new(&mut part, 7, n), Write::Set, rows, &right, 2);
            assert_eq!(part, expected[23 * n..30 * n], "{gemm:?}, part");
            let a_t: Vec<f32> = (0..m * k).map(|i| a.data[i % m * k + i / m]).collect();
            let mut turned = Panels::default();
            gemm.panels(&mut turned, Mat::new(&a_t, k, m), None, 1);
            let rows = Left::transposed(&turned).part(30..37);
            gemm.multiply(MatMut::new(&mut part, 7, n), Write::Set, rows, &right, 2);
            assert_eq!(
                part,
                expected[30 * n..37 * n],
                "{gemm:?}, part of a transpose"
            );

            let cut = 134;
            let mut c = vec![9.0; m * n];
            for (from, to, write) in [(0, cut, Write::Set), (cut, k, Write::Add)] {
                let a = Mat::strided(&a.data[from..], m, to - from, k);
                let b = Mat::new(&b.data[from * n..to * n], to - from, n);
                gemm.gemm(MatMut::new(&mut c, m, n), write, a, b, 2);
            }
            assert_eq!(c, expected, "{gemm:?}, cut");
        }
    }

    #[test]
    fn rows_by_index_are_the_rows_copied_before() {
        let (rows, k, n) = (9, 37, 50);
        let (x, w) = (values(1, rows * k), values(2, n * k));
        let index = [8, 0, 0, 3, 7];
        let copied: Vec<f32> = index
            .iter()
            .flat_map(|&i| &x[i as usize * k..][..k])
            .copied()
            .collect();
        let (x, copied) = (Mat::new(&x, rows, k), Mat::new(&copied, index.len(), k));
        for gemm in all() {
            let (mut right, mut left) = (Panels::default(), Rows::default());
            gemm.panels(&mut right, Mat::new(&w, n, k).t(), None, 1);
            gemm.rows(&mut left, x, Some(&index), 1);
            let (mut got, mut expected) = (vec![0.0; 5 * n], vec![1.0; 5 * n]);
            gemm.multiply(
                MatMut::new(&mut got, 5, n),
                Write::Set,
                Left::rows(&left),
                &right,
                1,
            );
            gemm.gemm(
                MatMut::new(&mut expected, 5, n),
                Write::Set,
                copied,
                Mat::new(&w, n, k).t(),
                1,
            );
            assert_eq!(got, expected);

            let dy = values(3, 5 * n);
            let (mut turned, mut gathered) = (Panels::default(), Panels::default());
            gemm.panels(&mut turned, Mat::new(&dy, 5, n), None, 2);
            gemm.panels(&mut gathered, x, Some(&index), 2);
            assert_eq!((turned.dims(), gathered.dims()), ([5, n], [5, k]));
            let (mut got, mut expected) = (vec![0.0; n * k], vec![1.0; n * k]);
            let left = Left::transposed(&turned);
            gemm.multiply(MatMut::new(&mut got, n, k), Write::Set, left, &gathered, 2);
            gemm.gemm(
                MatMut::new(&mut expected, n, k),
                Write::Set,
                Mat::new(&dy, 5, n).t(),
                copied,
                1,
            );
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn packed_memory_that_is_used_again_forgets_what_it_held() {
        for gemm in all() {
            let (mut used, mut fresh) = (Panels::default(), Panels::default());
            let (large, small) = (values(1, 40 * 70), values(2, 5 * 33));
            gemm.panels(&mut used, Mat::new(&large, 40, 70), None, 1);
            gemm.panels(&mut used, Mat::new(&small, 5, 33), None, 1);
            gemm.panels(&mut fresh, Mat::new(&small, 5, 33), None, 1);
            assert_eq!(used.lines, fresh.lines);
            gemm.panels(&mut used, Mat::new(&small, 33, 5).t(), None, 1);
            gemm.panels(&mut fresh, Mat::new(&small, 33, 5).t(), None, 1);
            assert_eq!(used.lines, fresh.lines);
        }
    }

    #[test]
    fn extremes_round_as_bf16_does_and_nan_stays() {
        let tiny = f32::MIN_POSITIVE / 2.0;
        let odd = f32::from_bits(0x3f80_8000); // halfway, to even: down
        let x = [
            f32::INFINITY,
            f32::NAN,
            tiny,
            -tiny,
            odd,
            f32::from_bits(0x3f81_8000),
            f32::MAX,
        ];
        let want = [
            f32::INFINITY,
            f32::NAN,
            0.0,
            0.0,
            1.0,
            f32::from_bits(0x3f82_0000),
            f32::INFINITY,
        ];
        for gemm in all() {
            let mut y = [0.0; 7];
            gemm.gemm(
                MatMut::new(&mut y, 7, 1),
                Write::Set,
                Mat::new(&x, 7, 1),
                Mat::new(&[1.0], 1, 1),
                1,
            );
            for (y, want) in y.iter().zip(want) {
                assert!(
                    *y == want || (y.is_nan() && want.is_nan()),
                    "{gemm:?}: {y} for {want}"
                );
            }
        }
    }

    #[test]
    fn nothing_in_gives_zeros_or_leaves_what_was_there() {
        for gemm in all() {
            let mut c = [1.0; 6];
            let (a, b) = (Mat::new(&[], 2, 0), Mat::new(&[], 0, 3));
            gemm.gemm(MatMut::new(&mut c, 2, 3), Write::Add, a, b, 1);
            assert_eq!(c, [1.0; 6]);
            gemm.gemm(MatMut::new(&mut c, 2, 3), Write::Set, a, b, 1);
            assert_eq!(c, [0.0; 6]);
            gemm.gemm(
                MatMut::new(&mut [], 0, 3),
                Write::Set,
                Mat::new(&[], 0, 2),
                Mat::new(&[0.0; 6], 2, 3),
                1,
            );
        }
    }
}
