//! Matrix products over the threads: the one entry through which models multiply by weights.

use crate::blocks::{ActQ8, ActQ8K, Q8_BLOCK, SUPER_BLOCK};
use crate::matrix::Matrix;
use crate::pool::{SendPtr, ThreadPool};
use crate::product::{ActFormat, Acts, Part, TILE};
use crate::table::Kernels;

/// Below this many multiplications a product is cheaper on one thread than shared.
const MIN_SHARED_PRODUCTS: usize = 1 << 16;

/// Kernels and threads together.
#[derive(Debug)]
pub struct Compute {
    kernels: Kernels,
    pool: ThreadPool,
}

/// Buffers that products reuse. Grows to the largest product seen and never shrinks.
#[derive(Debug, Default)]
pub struct MatmulScratch {
    q8: Vec<ActQ8>,
    q8_k: Vec<ActQ8K>,
}

impl MatmulScratch {
    /// Scratch that is large enough for inputs of `n_values` activations, so that it need not grow.
    pub fn with_capacity(n_values: usize) -> Self {
        Self {
            q8: vec![ActQ8::ZERO; n_values.div_ceil(Q8_BLOCK)],
            q8_k: vec![ActQ8K::ZERO; n_values.div_ceil(SUPER_BLOCK)],
        }
    }
}

impl Compute {
    /// Kernels with a pool of `n_threads` (zero counts as one).
    pub fn new(kernels: Kernels, n_threads: usize) -> Self {
        Self {
            kernels,
            pool: ThreadPool::new(n_threads),
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
        assert!(
            w.n_in() > 0 && w.n_out() > 0,
            "a matrix of at least one value"
        );
        assert!(
            x.len().is_multiple_of(w.n_in()),
            "rows of {} inputs, not {} values",
            w.n_in(),
            x.len()
        );
        let n_tokens = x.len() / w.n_in();
        self.grouped_matmul(1, &|_| w, &[0, n_tokens], x, y, scratch);
    }

    /// One product per group of rows: rows `offsets[g]..offsets[g + 1]` of `x` times `weight(g)`.
    ///
    /// All weights have one shape, `x: [offsets[n_groups], n_in]`, `y: [offsets[n_groups], n_out]`.
    /// This is the product of a mixture of experts whose tokens are sorted by expert.
    ///
    /// # Panics
    /// When the shapes do not match or `offsets` is not ascending from 0.
    pub fn grouped_matmul<'w>(
        &self,
        n_groups: usize,
        weight: &(dyn Fn(usize) -> &'w Matrix + Sync),
        offsets: &[usize],
        x: &[f32],
        y: &mut [f32],
        scratch: &mut MatmulScratch,
    ) {
        assert_eq!(
            offsets.len(),
            n_groups + 1,
            "an offset per group and the end"
        );
        let n_tokens = offsets[n_groups];
        if n_tokens == 0 {
            return;
        }
        assert!(
            offsets[0] == 0 && offsets.is_sorted(),
            "offsets ascend from 0"
        );
        let (n_out, n_in) = (weight(0).n_out(), weight(0).n_in());
        assert_eq!(x.len(), n_tokens * n_in, "inputs of [{n_tokens}, {n_in}]");
        assert_eq!(
            y.len(),
            n_tokens * n_out,
            "outputs of [{n_tokens}, {n_out}]"
        );
        for g in 1..n_groups {
            assert_eq!(
                (weight(g).n_out(), weight(g).n_in()),
                (n_out, n_in),
                "weights of one shape"
            );
        }
        let needs = |acts| (0..n_groups).any(|g| weight(g).acts() == acts);
        if needs(ActFormat::Q8) {
            self.quantize(
                x,
                &mut scratch.q8,
                ActQ8::ZERO,
                Q8_BLOCK,
                Kernels::quantize_act,
            );
        }
        if needs(ActFormat::Q8K) {
            self.quantize(
                x,
                &mut scratch.q8_k,
                ActQ8K::ZERO,
                SUPER_BLOCK,
                Kernels::quantize_act_k,
            );
        }
        let acts = Acts {
            x,
            q8: &scratch.q8,
            q8_k: &scratch.q8_k,
        };

        let shared = n_tokens * n_in * n_out >= MIN_SHARED_PRODUCTS && self.pool.n_threads() > 1;
        // Four blocks per thread even out threads of unequal speed.
        let per_block = n_out
            .div_ceil(self.pool.n_threads() * 4)
            .next_multiple_of(TILE);
        let block = if shared {
            per_block.max(2 * TILE)
        } else {
            n_out
        };
        let n_blocks = n_out.div_ceil(block);
        let y = SendPtr(y.as_mut_ptr());
        let task = |i: usize| {
            let (group, first_row) = (i / n_blocks, i % n_blocks * block);
            let (from, to) = (offsets[group], offsets[group + 1]);
            let part = Part {
                first_row,
                n_rows: block.min(n_out - first_row),
                from,
                to,
                n_out,
                // SAFETY: the part writes columns first_row.. of rows from..to, which are inside y; y is
                // borrowed mutably until all tasks end, and no two tasks share a row and a column.
                y: unsafe { y.get().add(from * n_out + first_row) },
            };
            // SAFETY: the outputs of a part are its own, as said above.
            unsafe { part.compute(self.kernels, weight(group), acts) };
        };
        if shared {
            self.pool.run(n_groups * n_blocks, &task);
        } else {
            (0..n_groups).for_each(task);
        }
    }

    /// Fills the front of `out` with `x` in blocks of `block` values.
    fn quantize<T: Copy + Send>(
        &self,
        x: &[f32],
        out: &mut Vec<T>,
        zero: T,
        block: usize,
        quantize: impl Fn(&Kernels, &[f32], &mut [T]) + Sync,
    ) {
        // Enough values per task to be worth a task.
        const VALUES_PER_TASK: usize = 8192;
        let n_blocks = x.len() / block;
        if out.len() < n_blocks {
            out.resize(n_blocks, zero);
        }
        let per_task = VALUES_PER_TASK / block;
        let out = &mut out[..n_blocks];
        self.pool.for_each_chunk(out, per_task, |i, out| {
            let from = i * VALUES_PER_TASK;
            quantize(&self.kernels, &x[from..][..out.len() * block], out);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;
    use crate::isa::Isa;
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
                    assert_eq!(
                        together,
                        one_by_one,
                        "{isa} {} {n_threads}",
                        w.format().name()
                    );
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
            compute.grouped_matmul(4, &|g| &weights[g], &offsets, &x, &mut y, &mut scratch);
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
