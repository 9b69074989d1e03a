//! Matrix products over the threads: the one entry through which models multiply by weights.

use half::bf16;

use crate::arch::Rows;
use crate::blocks::{ActQ8, BlockQ8_0, Q8_BLOCK};
use crate::format::Format;
use crate::matrix::Matrix;
use crate::pool::{SendPtr, ThreadPool};
use crate::table::Kernels;

/// Below this many multiplications a product is cheaper on one thread than shared.
const MIN_SHARED_PRODUCTS: usize = 1 << 16;
/// Bytes of activations that a block of weight rows is multiplied by before the next block: they stay in
/// the second-level cache, and a weight row is read once for all of them.
const TOKEN_BLOCK_BYTES: usize = 256 << 10;
/// Tokens and rows of every tile divide this, so that blocks are made of whole tiles.
const TILE: usize = 8;

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
}

impl MatmulScratch {
    /// Scratch that is large enough for inputs of `n_values` activations, so that it need not grow.
    pub fn with_capacity(n_values: usize) -> Self {
        Self {
            q8: vec![ActQ8::ZERO; n_values.div_ceil(Q8_BLOCK)],
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
        let any_q8 = (0..n_groups).any(|g| weight(g).format() == Format::Q8_0);
        let q8: &[ActQ8] = if any_q8 {
            self.quantize(x, scratch)
        } else {
            &[]
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
            self.part(weight(group), x, q8, &part);
        };
        if shared {
            self.pool.run(n_groups * n_blocks, &task);
        } else {
            (0..n_groups).for_each(task);
        }
    }

    fn quantize<'s>(&self, x: &[f32], scratch: &'s mut MatmulScratch) -> &'s [ActQ8] {
        // Enough values per task to be worth a task.
        const BLOCKS_PER_TASK: usize = 256;
        let n_blocks = x.len() / Q8_BLOCK;
        if scratch.q8.len() < n_blocks {
            scratch.q8.resize(n_blocks, ActQ8::ZERO);
        }
        let q8 = &mut scratch.q8[..n_blocks];
        self.pool.for_each_chunk(q8, BLOCKS_PER_TASK, |i, out| {
            let from = i * BLOCKS_PER_TASK * Q8_BLOCK;
            self.kernels
                .quantize_act(&x[from..][..out.len() * Q8_BLOCK], out);
        });
        q8
    }

    fn part(&self, w: &Matrix, x: &[f32], q8: &[ActQ8], part: &Part) {
        let n_in = w.n_in();
        let table = self.kernels.table();
        let step = (TOKEN_BLOCK_BYTES / (n_in * size_of::<f32>()))
            .next_multiple_of(TILE)
            .max(TILE);
        for from in (part.from..part.to).step_by(step) {
            let n_tokens = step.min(part.to - from);
            // SAFETY: row `from` of the part's outputs.
            let y = unsafe { part.y.add((from - part.from) * part.n_out) };
            let n_blocks = n_in / Q8_BLOCK;
            // SAFETY, for the calls below: `kernels` proves the instruction set; slicing checked that the
            // operands hold the part's rows; the caller checked the outputs.
            match w.format() {
                Format::F32 => {
                    let w = &w.units::<f32>()[part.first_row * n_in..];
                    let args = part.args(w, &x[from * n_in..], (n_tokens, n_in, y));
                    // SAFETY: see above.
                    unsafe { (table.rows_f32)(&args) }
                }
                Format::Bf16 => {
                    let w = &w.units::<bf16>()[part.first_row * n_in..];
                    let args = part.args(w, &x[from * n_in..], (n_tokens, n_in, y));
                    // SAFETY: see above.
                    unsafe { (table.rows_bf16)(&args) }
                }
                Format::Q8_0 => {
                    let w = &w.units::<BlockQ8_0>()[part.first_row * n_blocks..];
                    let args = part.args(w, &q8[from * n_blocks..], (n_tokens, n_blocks, y));
                    // SAFETY: see above.
                    unsafe { (table.rows_q8_0)(&args) }
                }
                _ => {
                    let mut values = vec![0.0; n_in];
                    for r in 0..part.n_rows {
                        w.row(part.first_row + r, &mut values);
                        let args = Rows {
                            w: values.as_ptr(),
                            n_rows: 1,
                            x: x[from * n_in..][..n_tokens * n_in].as_ptr(),
                            n_tokens,
                            n_units: n_in,
                            // SAFETY: column `r` of the part's outputs.
                            y: unsafe { y.add(r) },
                            y_stride: part.n_out,
                        };
                        // SAFETY: see above.
                        unsafe { (table.rows_f32)(&args) }
                    }
                }
            }
        }
    }
}

/// A task's share of a product: some rows of the weight, the tokens of one group.
struct Part {
    first_row: usize,
    n_rows: usize,
    from: usize,
    to: usize,
    n_out: usize,
    y: *mut f32,
}

impl Part {
    fn args<W, X>(
        &self,
        w: &[W],
        x: &[X],
        (n_tokens, n_units, y): (usize, usize, *mut f32),
    ) -> Rows<W, X> {
        Rows {
            w: w[..self.n_rows * n_units].as_ptr(),
            n_rows: self.n_rows,
            x: x[..n_tokens * n_units].as_ptr(),
            n_tokens,
            n_units,
            y,
            y_stride: self.n_out,
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::isa::Isa;

    /// Reproducible values in -1..1.
    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 * 2.0 - 1.0
        };
        std::iter::repeat_with(next).take(n).collect()
    }

    fn formats(n_out: usize, n_in: usize) -> Vec<Matrix> {
        let values = noise(n_out * n_in, 7);
        let bf16s = values.iter().map(|v| bf16::from_f32(*v)).collect();
        let f32s = Matrix::from_f32(n_out, n_in, values).unwrap();
        let mut all = vec![Matrix::from_bf16(n_out, n_in, bf16s).unwrap()];
        all.extend(f32s.to_q8_0().ok());
        all.push(f32s);
        all
    }

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
        for (n_tokens, n_out, n_in) in [(1, 1, 1), (3, 5, 7), (5, 33, 64), (2, 19, 33), (9, 70, 96)]
        {
            let x = noise(n_tokens * n_in, 3);
            for w in formats(n_out, n_in) {
                // 8-bit activations are off by half of 1/127 each.
                let tolerance = if w.format() == Format::Q8_0 {
                    0.01 * (n_in as f32).sqrt()
                } else {
                    1e-4
                };
                for compute in computes() {
                    let mut y = vec![f32::NAN; n_tokens * n_out];
                    compute.matmul(&w, &x, &mut y, &mut MatmulScratch::default());
                    let mut row = vec![0.0; n_in];
                    for o in 0..n_out {
                        w.row(o, &mut row);
                        for t in 0..n_tokens {
                            let expected: f32 =
                                row.iter().zip(&x[t * n_in..]).map(|(a, b)| a * b).sum();
                            let got = y[t * n_out + o];
                            assert!(
                                (got - expected).abs() <= tolerance,
                                "{compute:?} {}: {got} {expected}",
                                w.format().name()
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn neither_threads_nor_batch_change_a_bit() {
        // Large enough to be shared among threads and to need several token blocks.
        let (n_tokens, n_out, n_in) = (150, 70, 544);
        let x = noise(n_tokens * n_in, 5);
        for w in formats(n_out, n_in) {
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
        let (n_out, n_in) = (40, 64);
        let offsets = [0, 3, 3, 10, 11];
        let x = noise(11 * n_in, 1);
        let weights: Vec<Vec<Matrix>> = (0..4).map(|_| formats(n_out, n_in)).collect();
        for compute in computes() {
            let mut scratch = MatmulScratch::default();
            let mut y = vec![0.0; 11 * n_out];
            // A different format in every group.
            let weight = |g: usize| &weights[g][g % 3];
            compute.grouped_matmul(4, &weight, &offsets, &x, &mut y, &mut scratch);
            for g in 0..4 {
                let (from, to) = (offsets[g], offsets[g + 1]);
                let mut expected = vec![0.0; (to - from) * n_out];
                compute.matmul(
                    weight(g),
                    &x[from * n_in..to * n_in],
                    &mut expected,
                    &mut scratch,
                );
                assert_eq!(&y[from * n_out..to * n_out], expected.as_slice());
            }
        }
    }

    #[test]
    fn zero_tokens_and_nan_inputs_are_handled() {
        let compute = Compute::new(Kernels::detect(), 2);
        for w in formats(3, 32) {
            let mut scratch = MatmulScratch::default();
            compute.matmul(&w, &[], &mut [], &mut scratch);
            let mut x = vec![1.0; 32];
            x[5] = f32::NAN;
            let mut y = [0.0; 3];
            compute.matmul(&w, &x, &mut y, &mut scratch);
            assert!(y.iter().all(|v| v.is_nan()), "{}", w.format().name());
        }
    }
}
