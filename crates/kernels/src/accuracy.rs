//! How far products may be from exact ones: the bound that every kernel keeps.
//!
//! Two things are rounded. Activations become 8 bits, or bf16, where the format of the weights asks for that; the constants
//! for that are with the formats (`Block::PRODUCT_ERROR` in `blocks/`). And sums are f32.

use crate::blocks::{ActQ8, Q8_BLOCK};
use crate::format::Format;
use crate::matrix::Matrix;
use crate::product::ActFormat;

/// Half of the last digit of an f32, as a share of the number.
const F32_ROUNDING: f64 = 1.0 / (1u32 << 24) as f64;
/// The same of a bf16: what an activation may be off by when weights are bf16.
const BF16_ROUNDING: f64 = 1.0 / (1u32 << 9) as f64;
/// Roundings of an output beside those of adding up: scales, and the last steps from lanes to one number.
const FEW_ROUNDINGS: usize = 16;
/// Values whose products are added up exactly, as integers, before an f32 is rounded: in no kernel fewer.
const EXACT_VALUES: usize = 16;
/// Largest f16.
const F16_MAX: f64 = 65_504.0;

impl Matrix {
    /// How far the product of row `row` with the activations `x` (`[n_in]`) may be from the exact product of that row's
    /// weights in f32 ([`Matrix::row`]) with `x`, whatever the instruction set, the threads and the other tokens.
    ///
    /// This is the worst case; errors mostly cancel. It is infinite where a product itself may be: when activations are so
    /// large that the scale of a block, or the sum that a minimum is multiplied by, is no f16.
    ///
    /// # Panics
    /// When `row` is out of range or `x` is of another length.
    #[must_use]
    pub fn error_bound(&self, row: usize, x: &[f32]) -> f64 {
        assert_eq!(x.len(), self.n_in(), "a row of activations");
        let (n_in, acts) = (self.n_in(), self.acts());
        let sums = |n: usize| F32_ROUNDING * (n + FEW_ROUNDINGS) as f64;
        match acts {
            ActFormat::F32 => sums(n_in) * self.magnitude(row, x),
            ActFormat::Bf16 => (BF16_ROUNDING + sums(n_in)) * self.magnitude(row, x),
            ActFormat::Q8 | ActFormat::Q8K => {
                // A scaled sum and a minimum for each.
                let sums = sums(2 * n_in / EXACT_VALUES);
                let is_q8 = acts == ActFormat::Q8;
                self.by_block(row, x, sums, is_q8)
            }
        }
    }

    /// Sum of the magnitudes of all products.
    fn magnitude(&self, row: usize, x: &[f32]) -> f64 {
        let mut weights = vec![0.0; self.n_in()];
        self.row(row, &mut weights);
        let products = weights.iter().zip(x);
        products
            .map(|(w, x)| (f64::from(*w) * f64::from(*x)).abs())
            .sum()
    }

    fn by_block(&self, row: usize, x: &[f32], sums: f64, is_q8: bool) -> f64 {
        let (format, len) = (self.format(), self.format().block_len());
        let mut masses = vec![0.0; self.n_in()];
        self.row_by(row, &mut masses, |bytes, out| format.masses(bytes, out));
        let limit = match format {
            Format::Q4_1 | Format::Q5_1 => F16_MAX / Q8_BLOCK as f64,
            _ => F16_MAX * 127.0,
        };
        let of_block = |(masses, x): (&[f32], &[f32])| {
            let largest = x.iter().fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
            let rounded = match is_q8 {
                true if largest > limit => f64::INFINITY,
                true => largest * format.product_error() + ActQ8::SMALLEST,
                false => largest * format.product_error(),
            };
            (rounded + sums * largest) * f64::from(masses[0])
        };
        let blocks = masses.chunks_exact(len).zip(x.chunks_exact(len));
        blocks.map(of_block).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::samples::{matrix, noise};
    use crate::{Compute, Isa, Kernels, MatmulScratch};

    fn computes() -> impl Iterator<Item = Compute> {
        let isas = Isa::available().into_iter();
        isas.map(|isa| Compute::new(Kernels::for_isa(isa).unwrap(), 2))
    }

    /// Products of every instruction set, rows as they are and interleaved, as shares of their bounds; the largest.
    fn largest_share(w: &Matrix, x: &[f32]) -> f64 {
        let (n_out, n_in) = (w.n_out(), w.n_in());
        let mut row = vec![0.0; n_in];
        let mut largest = 0.0f64;
        for compute in computes() {
            for w in [w.clone(), compute.interleaved(w)] {
                let mut y = vec![0.0; x.len() / n_in * n_out];
                compute.matmul(&w, x, &mut y, &mut MatmulScratch::default());
                for (x, y) in x.chunks_exact(n_in).zip(y.chunks_exact(n_out)) {
                    for (o, y) in y.iter().enumerate() {
                        w.row(o, &mut row);
                        let products = row.iter().zip(x);
                        let exact: f64 = products.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        let bound = w.error_bound(o, x);
                        if bound.is_infinite() {
                            continue;
                        }
                        let share = (f64::from(*y) - exact).abs() / bound;
                        let isa = compute.kernels().isa();
                        assert!(
                            share <= 1.0,
                            "{isa} {w:?} row {o}: {y}, {exact} within {bound}"
                        );
                        largest = largest.max(share);
                    }
                }
            }
        }
        largest
    }

    fn weights() -> impl Iterator<Item = Format> {
        Format::all().filter(|format| *format != Format::U8)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn every_kernel_keeps_its_bound(
            n_out in 1usize..70, n_blocks in 1usize..6, odd in 0usize..40, n_tokens in 1usize..8,
            seed in 0u32..1000, log_scale in -20i32..16,
        ) {
            for format in weights() {
                let plain = if format.is_quantized() { 0 } else { odd };
                let n_in = n_blocks * format.block_len().max(32) + plain;
                let w = matrix(format, n_out, n_in, seed).unwrap();
                let scale = 2f32.powi(log_scale);
                let x: Vec<f32> = noise(n_tokens * n_in, seed + 1).iter().map(|x| x * scale).collect();
                largest_share(&w, &x);
                largest_share(&w.with_float_activations(), &x);
            }
        }
    }

    /// Activations just below the middle of two quants, all off to the side that their weights make an error of.
    #[test]
    fn the_bound_of_8_bits_is_nearly_reached() {
        for format in weights().filter(|format| format.is_quantized()) {
            let (n_in, len) = (2 * format.block_len(), format.block_len());
            let w = matrix(format, 1, n_in, 3).unwrap();
            let mut row = vec![0.0; n_in];
            w.row(0, &mut row);
            let mut x: Vec<f32> = (0..n_in)
                .map(|i| ((i % 60) as f32 + 0.49).copysign(row[i]))
                .collect();
            x.iter_mut().step_by(len).for_each(|x| *x = 127.0);
            let share = largest_share(&w, &x);
            // The scale's share is not reached, nor the whole of a minimum and the quants that it is taken from.
            let least = match format {
                Format::Q4_1 | Format::Q5_1 | Format::Q2K | Format::Q4K | Format::Q5K => 0.1,
                _ => 0.7,
            };
            assert!(share > least, "{format}: {share}");
        }
    }

    #[test]
    fn a_bound_by_hand() {
        // One block of Q8_0: 31 quants of 1 and one of 33 are 64 scales of 1/2.
        let mut bytes = half::f16::from_f32(0.5).to_le_bytes().to_vec();
        bytes.extend([1; 31]);
        bytes.push(33);
        let w = Matrix::new(Format::Q8_0, 1, 32, bytes.into()).unwrap();
        let mut x = [0.25; 32];
        x[7] = -2.0;
        let roundings = (4.0 + 16.0) * 2f64.powi(-24);
        let expected =
            (2.0 * (0.5001 / 127.0 + 2f64.powi(-11) + roundings) + ActQ8::SMALLEST) * 32.0;
        assert!((w.error_bound(0, &x) - expected).abs() < 1e-12);
        let floats = w.clone().with_float_activations();
        let expected = (32.0 + 16.0) * 2f64.powi(-24) * (30.0 * 0.125 + 1.0 + 33.0 * 0.125);
        assert!((floats.error_bound(0, &x) - expected).abs() < 1e-12);
        x[0] = 1e7;
        assert_eq!(w.error_bound(0, &x), f64::INFINITY);
    }
}
