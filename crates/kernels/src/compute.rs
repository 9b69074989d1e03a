//! Matrix products over the threads: the one entry through which models multiply by weights.

use crate::activations::MatmulScratch;
use crate::arch::Products;
use crate::matrix::Matrix;
use crate::memory::Arena;
use crate::panel::PANEL_ROWS;
use crate::pool::{SendPtr, ThreadPool};
use crate::product::{Finish, Part, Weights};
use crate::table::Kernels;

/// Below this many multiplications a product is cheaper on one thread than shared.
const MIN_SHARED_PRODUCTS: usize = 1 << 16;
/// Tasks per thread of a shared product: they even out threads of unequal speed.
const TASKS_PER_THREAD: usize = 32;

/// Kernels and threads together.
#[derive(Debug)]
pub struct Compute {
    kernels: Kernels,
    pool: ThreadPool,
    arena: Arena,
}

/// Inputs of products by groups: the tokens of a mixture of experts, sorted by expert.
#[derive(Clone, Copy, Debug)]
pub struct Grouped<'a> {
    /// Group `g` owns outputs `offsets[g]..offsets[g + 1]`; ascends from 0.
    pub offsets: &'a [usize],
    /// Rows of inputs.
    pub x: &'a [f32],
    /// The row of `x` that each output comes from; absent where they are the same.
    pub index: Option<&'a [u32]>,
    /// Whether `x` is what the last call with the same scratch was given: it is then not quantised again.
    pub is_same: bool,
}

impl<'a> Grouped<'a> {
    /// All rows of `x` in one group.
    fn one(offsets: &'a [usize; 2], x: &'a [f32]) -> Self {
        Self {
            offsets,
            x,
            index: None,
            is_same: false,
        }
    }

    fn n_groups(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    fn n_outputs(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// Panics when this is not what [`Grouped`] says, for weights of `n_in` columns.
    fn check(&self, n_in: usize) {
        assert!(n_in > 0, "a matrix of at least one column");
        assert!(
            self.offsets.first() == Some(&0) && self.offsets.is_sorted(),
            "offsets ascend from 0"
        );
        assert!(
            self.x.len().is_multiple_of(n_in),
            "rows of {n_in} inputs, not {} values",
            self.x.len()
        );
        let n_rows = self.x.len() / n_in;
        match self.index {
            None => assert_eq!(n_rows, self.n_outputs(), "a row of inputs per output"),
            Some(index) => {
                assert_eq!(index.len(), self.n_outputs(), "an index per output");
                assert!(
                    index.iter().all(|row| (*row as usize) < n_rows),
                    "indices of {n_rows} rows"
                );
            }
        }
    }
}

/// One product of a call: its weights, and where its outputs go.
struct Job<'a> {
    weights: Weights<'a>,
    y: SendPtr<f32>,
}

impl Compute {
    /// Kernels with a pool of `n_threads` (zero counts as one).
    pub fn new(kernels: Kernels, n_threads: usize) -> Self {
        Self {
            kernels,
            pool: ThreadPool::new(n_threads),
            arena: Arena::default(),
        }
    }

    /// The kernel table.
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// The threads.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Where memory for weights comes from.
    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Whether these kernels read interleaved rows.
    pub(crate) fn interleaves(&self) -> bool {
        matches!(self.kernels.table().products, Products::Panels(_))
    }

    /// The same matrix with its rows interleaved in memory of its own, which these kernels read fastest: as it is when
    /// they do not, or when its format or shape does not allow it. Products have the same bits.
    #[must_use]
    pub fn interleaved(&self, w: &Matrix) -> Matrix {
        match self.interleaves() {
            false => w.clone(),
            true => w
                .interleave(self.kernels, &self.pool, &self.arena)
                .unwrap_or_else(|| w.clone()),
        }
    }

    /// Calls `task(i, chunk i)` for the chunks of `data` (`chunk_len` values each, the last may be
    /// shorter), on the threads when the whole is worth it: `work` is about how many multiplications
    /// one chunk takes.
    ///
    /// # Panics
    /// When `chunk_len` is 0.
    pub fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        work: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(chunk_len > 0, "chunks of at least one value");
        if data.len().div_ceil(chunk_len).saturating_mul(work) < MIN_SHARED_PRODUCTS {
            for (i, chunk) in data.chunks_mut(chunk_len).enumerate() {
                task(i, chunk);
            }
        } else {
            self.pool.for_each_chunk(data, chunk_len, task);
        }
    }

    /// `y = x w^T`, with `x: [n_tokens, n_in]`, `y: [n_tokens, n_out]`. Zero tokens are fine.
    ///
    /// # Panics
    /// When the shapes do not match.
    pub fn matmul(&self, w: &Matrix, x: &[f32], y: &mut [f32], scratch: &mut MatmulScratch) {
        self.matmuls(x, [(w, y)], scratch);
    }

    /// Products of the same `x: [n_tokens, n_in]` with several weights, into `[n_tokens, n_out]` each.
    ///
    /// # Panics
    /// When the shapes do not match.
    pub fn matmuls<const N: usize>(
        &self,
        x: &[f32],
        products: [(&Matrix, &mut [f32]); N],
        scratch: &mut MatmulScratch,
    ) {
        let Some((first, _)) = products.first() else {
            return;
        };
        let n_in = first.n_in();
        let offsets = [0, x.len() / n_in.max(1)];
        let rows = Grouped::one(&offsets, x);
        let jobs = products.map(|(w, y)| {
            assert_eq!(w.n_in(), n_in, "weights of as many columns");
            let expected = offsets[1] * w.n_out();
            assert_eq!(
                y.len(),
                expected,
                "outputs of [{}, {}]",
                offsets[1],
                w.n_out()
            );
            Job {
                weights: Weights::One(w),
                y: SendPtr(y.as_mut_ptr()),
            }
        });
        // SAFETY: every job's outputs are its own slice, of the right size.
        unsafe { self.run(rows, N, &|_, job| jobs[job].share(), scratch) };
    }

    /// One product per group of rows: output rows of group `g` are inputs times `weight(g)`, all of one shape, into
    /// `y: [n_outputs, n_out]`. This is the product of a mixture of experts.
    ///
    /// # Panics
    /// When the shapes do not match.
    pub fn grouped_matmul<'w>(
        &self,
        rows: Grouped<'_>,
        weight: &(dyn Fn(usize) -> &'w Matrix + Sync),
        y: &mut [f32],
        scratch: &mut MatmulScratch,
    ) {
        if rows.n_outputs() == 0 {
            return;
        }
        check_groups(rows, weight, y);
        let y = SendPtr(y.as_mut_ptr());
        let job = |group, _| Job {
            weights: Weights::One(weight(group)),
            y: SendPtr(y.get()),
        };
        // SAFETY: `y` holds the outputs of all groups, as was checked.
        unsafe { self.run(rows, 1, &job, scratch) };
    }

    /// [`Compute::grouped_matmul`] with two weights per group, whose outputs `finish` makes one of: it gets the index of
    /// an output, the first of a few columns, the outputs of the first weight there (which it changes, and which are
    /// stored), and those of the second.
    ///
    /// # Panics
    /// When the shapes do not match.
    pub fn grouped_gated<'w>(
        &self,
        rows: Grouped<'_>,
        weights: &(dyn Fn(usize) -> [&'w Matrix; 2] + Sync),
        finish: Finish<'_>,
        y: &mut [f32],
        scratch: &mut MatmulScratch,
    ) {
        if rows.n_outputs() == 0 {
            return;
        }
        check_groups(rows, &|g| weights(g)[0], y);
        check_groups(rows, &|g| weights(g)[1], y);
        let y = SendPtr(y.as_mut_ptr());
        let job = |group, _| {
            let [a, b] = weights(group);
            Job {
                weights: Weights::Two(a, b, finish),
                y: SendPtr(y.get()),
            }
        };
        // SAFETY: `y` holds the outputs of all groups, as was checked.
        unsafe { self.run(rows, 1, &job, scratch) };
    }

    /// Runs `n_jobs` products per group, cut into tasks.
    ///
    /// # Safety
    /// `job(g, j).y` holds all outputs of job `j` and belongs to nobody else; weights have as many columns as `rows`
    /// was checked for.
    unsafe fn run<'j>(
        &self,
        rows: Grouped<'_>,
        n_jobs: usize,
        job: &(dyn Fn(usize, usize) -> Job<'j> + Sync),
        scratch: &mut MatmulScratch,
    ) {
        let n_groups = rows.n_groups();
        if rows.n_outputs() == 0 || n_groups == 0 {
            return;
        }
        let n_in = job(0, 0).weights.first().n_in();
        rows.check(n_in);
        let needs = |acts| (0..n_groups).any(|g| (0..n_jobs).any(|j| job(g, j).weights.has(acts)));
        let (acts, index) = scratch.fill(self, rows, n_in, &needs);

        let n_out: usize = (0..n_jobs).map(|j| job(0, j).weights.first().n_out()).sum();
        let n_threads = self.pool.n_threads();
        let shared = n_threads > 1 && rows.n_outputs() * n_in * n_out >= MIN_SHARED_PRODUCTS;
        let per_task = match shared {
            true => (n_groups * n_out).div_ceil(n_threads * TASKS_PER_THREAD),
            false => n_out.max(1),
        };
        let per_task = per_task.next_multiple_of(PANEL_ROWS);
        let tasks_of = |j: usize| job(0, j).weights.first().n_out().div_ceil(per_task);
        let n_tasks: usize = (0..n_jobs).map(tasks_of).sum();
        let task = |i: usize| {
            let (group, mut i) = (i / n_tasks, i % n_tasks);
            let mut j = 0;
            while i >= tasks_of(j) {
                i -= tasks_of(j);
                j += 1;
            }
            let Job { weights, y } = job(group, j);
            let n_out = weights.first().n_out();
            let first_row = i * per_task;
            let part = Part {
                weights,
                first_row,
                n_rows: per_task.min(n_out - first_row),
                from: rows.offsets[group],
                to: rows.offsets[group + 1],
                index,
                y: y.get(),
                n_out,
            };
            // SAFETY: no two tasks share a job, an output and a column; the caller promised the outputs.
            unsafe { part.compute(self.kernels, acts) };
        };
        if shared {
            self.pool.run(n_groups * n_tasks, &task);
        } else {
            (0..n_groups * n_tasks).for_each(task);
        }
    }
}

impl Job<'_> {
    fn share(&self) -> Job<'_> {
        Job {
            weights: self.weights,
            y: SendPtr(self.y.get()),
        }
    }
}

/// Panics unless weights and outputs match the rows. Returns the columns of the outputs.
fn check_groups<'w>(rows: Grouped<'_>, weight: &dyn Fn(usize) -> &'w Matrix, y: &[f32]) -> usize {
    let (n_out, n_in) = (weight(0).n_out(), weight(0).n_in());
    assert_eq!(
        y.len(),
        rows.n_outputs() * n_out,
        "outputs of [{}, {n_out}]",
        rows.n_outputs()
    );
    for g in 1..rows.n_groups() {
        let shape = (weight(g).n_out(), weight(g).n_in());
        assert_eq!(shape, (n_out, n_in), "weights of one shape");
    }
    n_out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::BlockQ8_0;
    use crate::format::Format;
    use crate::isa::Isa;
    use crate::product::ActFormat;
    use crate::samples::{matrices, matrix, noise};

    fn computes() -> Vec<Compute> {
        let kernels = Isa::available()
            .into_iter()
            .map(|isa| Kernels::for_isa(isa).unwrap());
        kernels
            .flat_map(|k| [Compute::new(k, 1), Compute::new(k, 3)])
            .collect()
    }

    #[test]
    fn products_agree_with_a_double_loop() {
        let shapes = [
            (1, 1, 1),
            (3, 5, 7),
            (5, 33, 64),
            (2, 19, 33),
            (9, 30, 96),
            (1, 9, 512),
            (11, 6, 256),
        ];
        for (n_tokens, n_out, n_in) in shapes {
            let x = noise(n_tokens * n_in, 3);
            for w in matrices(n_out, n_in) {
                for compute in computes() {
                    let mut y = vec![f32::NAN; n_tokens * n_out];
                    compute.matmul(&w, &x, &mut y, &mut MatmulScratch::default());
                    let mut row = vec![0.0; n_in];
                    for o in 0..n_out {
                        w.row(o, &mut row);
                        let magnitude: f32 = row.iter().map(|v| v.abs()).sum();
                        // 8-bit activations are off by up to half of 1/127 each, and their scale by 2^-11.
                        let tolerance = match ActFormat::of(w.format()) {
                            ActFormat::F32 => 1e-5 * magnitude,
                            _ => 0.0045 * magnitude,
                        };
                        for t in 0..n_tokens {
                            let expected: f32 =
                                row.iter().zip(&x[t * n_in..]).map(|(a, b)| a * b).sum();
                            let got = y[t * n_out + o];
                            assert!(
                                (got - expected).abs() <= tolerance,
                                "{compute:?} {w:?}: {got} {expected}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn inputs_that_are_the_same_are_not_made_again() {
        let (n_out, n_in) = (40, 512);
        let (x, other) = (noise(3 * n_in, 3), noise(3 * n_in, 4));
        for compute in computes() {
            let weights = matrices(n_out, n_in);
            let mut scratch = MatmulScratch::default();
            let product = |w: &Matrix, x: &[f32], is_same, scratch: &mut MatmulScratch| {
                let mut y = vec![0.0; 2 * n_out];
                let rows = Grouped {
                    offsets: &[0, 2],
                    x,
                    index: Some(&[2, 0]),
                    is_same,
                };
                compute.grouped_matmul(rows, &|_| w, &mut y, scratch);
                y
            };
            // Formats change between calls about the same inputs, and each makes what it needs.
            for round in [&x, &other] {
                for (at, w) in weights.iter().enumerate() {
                    let expected = product(w, round, false, &mut MatmulScratch::default());
                    let got = product(w, round, at > 0, &mut scratch);
                    assert_eq!(got, expected, "{compute:?} {w:?}");
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_computes_what_the_twin_does() {
        let (n_tokens, n_out, n_in) = (11, 13, 1024);
        let x = noise(n_tokens * n_in, 9);
        let product = |isa, w: &Matrix| {
            let mut y = vec![0.0; n_tokens * n_out];
            let compute = Compute::new(Kernels::for_isa(isa).unwrap(), 1);
            compute.matmul(w, &x, &mut y, &mut MatmulScratch::default());
            y
        };
        for w in matrices(n_out, n_in) {
            let expected = product(Isa::Scalar, &w);
            for isa in Isa::available() {
                let got = product(isa, &w);
                if ActFormat::of(w.format()) == ActFormat::Q8K {
                    assert_eq!(got, expected, "{isa} {w:?}");
                }
                for (a, b) in got.iter().zip(&expected) {
                    // Sums of about 1000 products of magnitude near one, in another order.
                    assert!((a - b).abs() <= 2e-4, "{isa} {w:?}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn neither_threads_nor_batch_change_a_bit() {
        // Large enough to be shared among threads and to need several token blocks.
        let (n_tokens, n_out, n_in) = (150, 70, 512);
        let x = noise(n_tokens * n_in, 5);
        for w in matrices(n_out, n_in) {
            for isa in Isa::available() {
                let kernels = Kernels::for_isa(isa).unwrap();
                let mut scratch = MatmulScratch::with_capacity(x.len());
                let mut one_by_one = vec![0.0; n_tokens * n_out];
                let single = Compute::new(kernels, 1);
                for (x, y) in x.chunks_exact(n_in).zip(one_by_one.chunks_exact_mut(n_out)) {
                    single.matmul(&w, x, y, &mut scratch);
                }
                for n_threads in [1, 2, 5] {
                    let mut together = vec![0.0; n_tokens * n_out];
                    Compute::new(kernels, n_threads).matmul(&w, &x, &mut together, &mut scratch);
                    assert!(
                        together == one_by_one,
                        "{isa} {} {n_threads}",
                        w.format().name()
                    );
                }
            }
        }
    }

    #[test]
    fn interleaved_rows_give_the_same_bits() {
        for (n_out, n_in) in [(70, 512), (32, 256), (1, 1280), (33, 64)] {
            let x = noise(9 * n_in, 4);
            for w in matrices(n_out, n_in) {
                for compute in computes() {
                    let moved = compute.interleaved(&w);
                    let (mut row, mut expected) = (vec![0.0; n_in], vec![0.0; n_in]);
                    for r in 0..n_out {
                        w.row(r, &mut expected);
                        moved.row(r, &mut row);
                        assert!(row == expected, "{w:?} row {r}");
                    }
                    for n_tokens in [1, 2, 3, 9] {
                        let x = &x[..n_tokens * n_in];
                        let mut scratch = MatmulScratch::default();
                        let mut expected = vec![0.0; n_tokens * n_out];
                        compute.matmul(&w, x, &mut expected, &mut scratch);
                        let mut got = vec![0.0; n_tokens * n_out];
                        compute.matmul(&moved, x, &mut got, &mut scratch);
                        assert!(got == expected, "{compute:?} {w:?} {n_tokens}");
                    }
                }
            }
        }
    }

    #[test]
    fn pairs_of_weights_share_their_inputs() {
        let (n_out, n_in) = (70, 256);
        let offsets = [0, 2, 2, 7];
        let index = [3, 0, 1, 1, 2, 0, 3];
        let x = noise(4 * n_in, 1);
        let gathered: Vec<f32> = index
            .iter()
            .flat_map(|i| x[*i as usize * n_in..][..n_in].to_vec())
            .collect();
        let of = |format, seed: u32| -> Vec<Matrix> {
            (0..3)
                .map(|g| matrix(format, n_out, n_in, seed + g).unwrap())
                .collect()
        };
        let (gate, up) = (of(Format::Q4K, 1), of(Format::Q8_0, 9));
        for compute in computes() {
            let mut scratch = MatmulScratch::default();
            let rows = Grouped {
                offsets: &offsets,
                x: &gathered,
                index: None,
                is_same: false,
            };
            let [mut a, mut b] = [const { Vec::new() }; 2];
            for (weights, y) in [(&gate, &mut a), (&up, &mut b)] {
                *y = vec![0.0; 7 * n_out];
                compute.grouped_matmul(rows, &|g| &weights[g], y, &mut scratch);
            }
            let expected: Vec<f32> = a
                .iter()
                .zip(&b)
                .enumerate()
                .map(|(i, (a, b))| a + b * (i / n_out) as f32 + (i % n_out) as f32)
                .collect();
            let rows = Grouped {
                index: Some(&index),
                x: &x,
                ..rows
            };
            let finish = |row: usize, from: usize, a: &mut [f32], b: &mut [f32]| {
                for (column, (a, b)) in a.iter_mut().zip(b).enumerate() {
                    *a = *a + *b * row as f32 + (from + column) as f32;
                }
            };
            let mut got = vec![0.0; 7 * n_out];
            let weights = |g: usize| [&gate[g], &up[g]];
            compute.grouped_gated(rows, &weights, &finish, &mut got, &mut scratch);
            assert!(got == expected, "{compute:?}");
        }
    }

    #[test]
    fn blocks_are_multiplied_as_the_twin_does() {
        let (n_tokens, n_out, n_in) = (7, 45, 1024);
        let x = noise(n_tokens * n_in, 9);
        let product = |isa, w: &Matrix| {
            let mut y = vec![0.0; n_tokens * n_out];
            let compute = Compute::new(Kernels::for_isa(isa).unwrap(), 1);
            compute.matmul(w, &x, &mut y, &mut MatmulScratch::default());
            y
        };
        let wide = Isa::available()
            .into_iter()
            .filter(|isa| *isa >= Isa::Avx512);
        for isa in wide {
            for w in matrices(n_out, n_in) {
                if !matches!(w.acts(), ActFormat::F32 | ActFormat::Bf16) {
                    assert!(product(isa, &w) == product(Isa::Scalar, &w), "{isa} {w:?}");
                }
            }
        }
    }

    #[test]
    fn groups_are_separate_products() {
        let (n_out, n_in) = (40, 256);
        let offsets = [0, 3, 3, 10, 11];
        let x = noise(11 * n_in, 1);
        let formats = [Format::Q4K, Format::F32, Format::Q5_1, Format::Q6K];
        let weights = formats.map(|format| matrix(format, n_out, n_in, 2).unwrap());
        for compute in computes() {
            let mut scratch = MatmulScratch::default();
            let mut y = vec![0.0; 11 * n_out];
            // A different format in every group.
            let rows = Grouped {
                offsets: &offsets,
                x: &x,
                index: None,
                is_same: false,
            };
            compute.grouped_matmul(rows, &|g| &weights[g], &mut y, &mut scratch);
            for g in 0..4 {
                let (from, to) = (offsets[g], offsets[g + 1]);
                let mut expected = vec![0.0; (to - from) * n_out];
                compute.matmul(
                    &weights[g],
                    &x[from * n_in..to * n_in],
                    &mut expected,
                    &mut scratch,
                );
                assert_eq!(&y[from * n_out..to * n_out], expected.as_slice());
            }
        }
    }

    #[test]
    fn slices_of_rows_multiply_like_the_rows_they_are() {
        let (n_out, n_in) = (40, 256);
        let x = noise(2 * n_in, 1);
        let bytes = matrix(Format::F8E4M3, n_out, n_in, 5).unwrap();
        let mut all = matrices(n_out, n_in);
        let mut codes = Vec::new();
        for row in 0..n_out {
            let mut values = vec![0.0; n_in];
            bytes.row(row, &mut values);
            codes.extend(values.iter().map(|v| if *v < 0.0 { 0xb8 } else { 0x38 }));
        }
        let scales = noise(40_usize.div_ceil(16) * 3, 8);
        all.push(Matrix::with_block_scales(n_out, n_in, codes.into(), scales, [16, 100]).unwrap());
        for w in all {
            for compute in computes() {
                let mut scratch = MatmulScratch::default();
                let mut whole = vec![0.0; 2 * n_out];
                compute.matmul(&w, &x, &mut whole, &mut scratch);
                let mut part = vec![0.0; 2 * 21];
                compute.matmul(&w.rows(11..32), &x, &mut part, &mut scratch);
                assert_eq!(part[..21], whole[11..32], "{w:?}");
                assert_eq!(part[21..], whole[n_out + 11..n_out + 32], "{w:?}");
            }
        }
    }

    #[test]
    fn blocks_times_f32_activations_are_exact() {
        let compute = Compute::new(Kernels::detect(), 2);
        let mut scratch = MatmulScratch::default();
        for format in [Format::Q4K, Format::Mxfp4, Format::Q8_0] {
            let w = matrix(format, 5, 256, 3).unwrap().with_float_activations();
            let x: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut y = vec![0.0; 10];
            compute.matmul(&w, &x, &mut y, &mut scratch);
            let mut row = vec![0.0; 256];
            for (i, y) in y.iter().enumerate() {
                w.row(i % 5, &mut row);
                let products = row.iter().zip(&x[i / 5 * 256..]).map(|(a, b)| a * b);
                let magnitude: f32 = products.clone().map(f32::abs).sum();
                let expected: f32 = products.sum();
                assert!(
                    (y - expected).abs() <= 1e-5 * magnitude,
                    "{format}: {y} {expected}"
                );
            }
        }
    }

    #[test]
    fn lowest_quants_do_not_overflow() {
        // A file may hold -128, which our own quantiser never writes.
        let block = BlockQ8_0 {
            d: half::f16::ONE,
            qs: [-128; 32],
        };
        let w = Matrix::from_q8_0(1, 32, vec![block]).unwrap();
        for compute in computes() {
            let mut y = [0.0];
            compute.matmul(&w, &[-127.0; 32], &mut y, &mut MatmulScratch::default());
            assert_eq!(y, [128.0 * 127.0 * 32.0], "{compute:?}");
        }
    }

    #[test]
    fn zero_tokens_and_nan_inputs_are_handled() {
        let compute = Compute::new(Kernels::detect(), 2);
        for w in matrices(3, 256) {
            let mut scratch = MatmulScratch::default();
            compute.matmul(&w, &[], &mut [], &mut scratch);
            let mut x = vec![1.0; 256];
            x[5] = f32::NAN;
            let mut y = [0.0; 3];
            compute.matmul(&w, &x, &mut y, &mut scratch);
            assert!(y.iter().all(|v| v.is_nan()), "{w:?}");
        }
    }
}
