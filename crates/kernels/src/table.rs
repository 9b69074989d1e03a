//! The kernel table: chosen once, safe to call, the same operations on every instruction set.

use std::fmt;

use half::bf16;

use crate::arch::{self, Rows, Table};
use crate::blocks::{ActQ8, ActQ8K, Q8_BLOCK, SUPER_BLOCK};
use crate::interleave::Shape;
use crate::isa::Isa;
use crate::panel::PANEL_ROWS;

/// The kernels of one instruction set. Holding the value proves that the CPU has it.
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: Isa,
    table: &'static Table,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kernels").field(&self.isa).finish()
    }
}

impl Kernels {
    /// The best kernels that this CPU can run.
    pub fn detect() -> Self {
        Self::for_isa(Isa::detect()).expect("a detected set has kernels")
    }

    /// The kernels of `isa`, or `None` when this CPU cannot run them.
    pub fn for_isa(isa: Isa) -> Option<Self> {
        if !isa.is_available() {
            return None;
        }
        Some(Self {
            isa,
            table: arch::table(isa)?,
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub(crate) fn table(&self) -> &'static Table {
        self.table
    }

    /// `a . b`. Panics when the lengths differ.
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        let mut y = [0.0];
        self.matvec(a, b, &mut y);
        y[0]
    }

    /// `w . x` with bf16 weights. Panics when the lengths differ.
    pub fn dot_bf16(&self, w: &[bf16], x: &[f32]) -> f32 {
        assert_eq!(w.len(), x.len(), "vectors of one length");
        let mut y = 0.0;
        let args = Rows {
            w: w.as_ptr(),
            n_rows: 1,
            x: x.as_ptr(),
            n_tokens: 1,
            n_units: w.len(),
            y: &raw mut y,
            y_stride: 1,
        };
        // SAFETY: `self` proves the instruction set; the lengths were compared; one output is written.
        unsafe { (self.table.rows_bf16)(&args) };
        y
    }

    /// `y[r] = w row r . x`, with `w: [y.len(), x.len()]`. Panics when the shapes do not match.
    pub fn matvec(&self, w: &[f32], x: &[f32], y: &mut [f32]) {
        assert_eq!(w.len(), x.len() * y.len(), "a matrix of [outputs, inputs]");
        let args = Rows {
            w: w.as_ptr(),
            n_rows: y.len(),
            x: x.as_ptr(),
            n_tokens: 1,
            n_units: x.len(),
            y: y.as_mut_ptr(),
            y_stride: y.len(),
        };
        // SAFETY: `self` proves the instruction set; the shapes were compared; y has n_rows values.
        unsafe { (self.table.rows_f32)(&args) };
    }

    /// `y += sum of weights[j] * rows[j]`, with `rows: [weights.len(), y.len()]`, in the order of `j`.
    /// Panics when the shapes do not match.
    pub fn add_weighted_rows(&self, weights: &[f32], rows: &[f32], y: &mut [f32]) {
        assert_eq!(rows.len(), weights.len() * y.len(), "a row per weight");
        // SAFETY: `self` proves the instruction set; the shapes were compared.
        unsafe { (self.table.add_weighted_rows)(weights, rows, y) };
    }

    /// `y += a * x`. Panics when the lengths differ.
    pub fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        self.add_weighted_rows(&[a], x, y);
    }

    /// The largest value; minus infinity for none. With a NaN inside, the result is unspecified.
    pub fn max(&self, x: &[f32]) -> f32 {
        // SAFETY: `self` proves the instruction set.
        unsafe { (self.table.max)(x) }
    }

    /// `x = exp(x - shift)`; returns the sum. A NaN stays one and reaches the sum.
    pub fn exp_sum(&self, x: &mut [f32], shift: f32) -> f32 {
        // SAFETY: `self` proves the instruction set.
        unsafe { (self.table.exp_sum)(x, shift) }
    }

    /// Softmax in place. A NaN or plus infinity inside makes every value NaN.
    pub fn softmax(&self, x: &mut [f32]) {
        let shift = self.max(x);
        let scale = 1.0 / self.exp_sum(x, shift);
        for v in x {
            *v *= scale;
        }
    }

    /// `gate = silu(gate) * up`, in place. Panics when the lengths differ.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up of one length");
        // SAFETY: `self` proves the instruction set; the lengths were compared.
        unsafe { (self.table.silu_mul)(gate, up) };
    }

    /// Interleaves `rows` of `row_bytes`, 1 to [`PANEL_ROWS`] of them, as [`Shape::interleave`] does. Panics when they are
    /// not whole blocks, or `out` is not as long as [`PANEL_ROWS`] rows.
    pub(crate) fn interleave(&self, shape: &Shape, rows: &[u8], row_bytes: usize, out: &mut [u8]) {
        assert!(
            row_bytes > 0 && shape.fits(row_bytes),
            "rows of whole blocks"
        );
        let n_rows = rows.len() / row_bytes;
        assert!(
            rows.len().is_multiple_of(row_bytes) && (1..=PANEL_ROWS).contains(&n_rows),
            "whole rows for one panel"
        );
        assert_eq!(out.len(), PANEL_ROWS * row_bytes, "room for a panel");
        // SAFETY: `self` proves the instruction set; the lengths were compared.
        unsafe { (self.table.interleave)(shape, rows, row_bytes, out) };
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight`. Panics when the lengths differ.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(
            x.len() == weight.len() && x.len() == out.len(),
            "input, weight and output of one length"
        );
        let scale = self.inverse_rms(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }

    /// [`Self::rms_norm`] in place.
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        assert_eq!(x.len(), weight.len(), "input and weight of one length");
        let scale = self.inverse_rms(x, eps);
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }

    fn inverse_rms(&self, x: &[f32], eps: f32) -> f32 {
        1.0 / (self.dot(x, x) / x.len() as f32 + eps).sqrt()
    }

    /// Activations to 8-bit blocks, rounding halves to even. Panics unless there is a block per 32 values.
    pub fn quantize_act(&self, x: &[f32], out: &mut [ActQ8]) {
        assert_eq!(x.len(), out.len() * Q8_BLOCK, "one block per 32 values");
        // SAFETY: `self` proves the instruction set; the lengths were compared.
        unsafe { (self.table.quantize_act)(x, out) };
    }

    /// Activations to super-blocks. Panics unless there is a block per 256 values.
    pub fn quantize_act_k(&self, x: &[f32], out: &mut [ActQ8K]) {
        assert_eq!(x.len(), out.len() * SUPER_BLOCK, "one block per 256 values");
        // SAFETY: `self` proves the instruction set; the lengths were compared.
        unsafe { (self.table.quantize_act_k)(x, out) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Largest relative error of the vector `exp` against the standard library's.
    const EXP_ERROR: f32 = 3e-7;

    fn twin() -> Kernels {
        Kernels::for_isa(Isa::Scalar).unwrap()
    }

    /// Every set of kernels of this machine but the twin.
    fn others() -> Vec<Kernels> {
        Isa::available()
            .into_iter()
            .filter(|isa| *isa != Isa::Scalar)
            .map(|isa| Kernels::for_isa(isa).unwrap())
            .collect()
    }

    fn values(n: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-4.0f32..4.0, n)
    }

    /// Two vectors of one odd length.
    fn pair() -> impl Strategy<Value = (Vec<f32>, Vec<f32>)> {
        (0usize..200).prop_flat_map(|n| (values(n), values(n)))
    }

    /// The error that summing `n` products in f32 may make in any order, over the sum of magnitudes.
    fn sum_error(a: &[f32], b: &[f32]) -> f32 {
        let magnitude: f32 = a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum();
        f32::EPSILON * (a.len() as f32 + 1.0) * magnitude
    }

    fn exact(a: &[f32], b: &[f32]) -> f32 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>() as f32
    }

    fn close(a: f32, b: f32, relative: f32) -> bool {
        (a.is_nan() && b.is_nan())
            || a == b
            || (a - b).abs() <= relative * a.abs().max(b.abs()) + 1e-37
    }

    proptest! {
        #[test]
        fn dot_products_agree_with_the_exact_sum((a, b) in pair()) {
            for kernels in others().into_iter().chain([twin()]) {
                let error = (kernels.dot(&a, &b) - exact(&a, &b)).abs();
                prop_assert!(error <= sum_error(&a, &b), "{kernels:?}: off by {error}");
                let w: Vec<bf16> = a.iter().map(|v| bf16::from_f32(*v)).collect();
                let a: Vec<f32> = w.iter().map(|v| v.to_f32()).collect();
                let error = (kernels.dot_bf16(&w, &b) - exact(&a, &b)).abs();
                prop_assert!(error <= sum_error(&a, &b), "{kernels:?} bf16: off by {error}");
            }
        }

        #[test]
        fn a_row_of_a_matrix_is_a_dot_product_bit_for_bit(
            (n_rows, x, seed) in (1usize..20, 1usize..70).prop_flat_map(|(r, n)| (Just(r), values(n), values(r * n)))
        ) {
            for kernels in others().into_iter().chain([twin()]) {
                let mut y = vec![0.0; n_rows];
                kernels.matvec(&seed, &x, &mut y);
                for (row, y) in seed.chunks_exact(x.len()).zip(&y) {
                    prop_assert_eq!(kernels.dot(row, &x).to_bits(), y.to_bits());
                }
            }
        }

        #[test]
        fn quantised_activations_are_the_twins(
            x in (1usize..5).prop_flat_map(|n| values(n * Q8_BLOCK)), scale in -60i32..60
        ) {
            let x: Vec<f32> = x.iter().map(|v| v * 2.0f32.powi(scale)).collect();
            let mut expected = vec![ActQ8::ZERO; x.len() / Q8_BLOCK];
            twin().quantize_act(&x, &mut expected);
            for kernels in others() {
                let mut got = vec![ActQ8::ZERO; expected.len()];
                kernels.quantize_act(&x, &mut got);
                prop_assert_eq!(&got, &expected, "{:?}", kernels);
            }
        }

        #[test]
        fn quantised_super_blocks_are_the_twins(
            x in (1usize..3).prop_flat_map(|n| values(n * SUPER_BLOCK)), scale in -60i32..60
        ) {
            let x: Vec<f32> = x.iter().map(|v| v * 2.0f32.powi(scale)).collect();
            let mut expected = vec![ActQ8K::ZERO; x.len() / SUPER_BLOCK];
            twin().quantize_act_k(&x, &mut expected);
            for kernels in others() {
                let mut got = vec![ActQ8K::ZERO; expected.len()];
                kernels.quantize_act_k(&x, &mut got);
                prop_assert_eq!(&got, &expected, "{:?}", kernels);
            }
        }

        #[test]
        fn weighted_rows_agree(
            (weights, y, rows) in (0usize..9, 1usize..50).prop_flat_map(|(k, n)| (values(k), values(n), values(k * n)))
        ) {
            let mut expected = y.clone();
            twin().add_weighted_rows(&weights, &rows, &mut expected);
            for kernels in others() {
                let mut got = y.clone();
                kernels.add_weighted_rows(&weights, &rows, &mut got);
                for (a, b) in got.iter().zip(&expected) {
                    prop_assert!((a - b).abs() <= 1e-4, "{kernels:?}: {a} {b}");
                }
            }
        }

        #[test]
        fn activations_and_softmax_agree((gate, up) in pair(), scale in 0.1f32..30.0) {
            let gate: Vec<f32> = gate.iter().map(|v| v * scale).collect();
            let mut expected = gate.clone();
            twin().silu_mul(&mut expected, &up);
            let mut expected_softmax = gate.clone();
            twin().softmax(&mut expected_softmax);
            for kernels in others() {
                prop_assert_eq!(kernels.max(&gate), twin().max(&gate));
                let mut got = gate.clone();
                kernels.silu_mul(&mut got, &up);
                for (a, b) in got.iter().zip(&expected) {
                    prop_assert!(close(*a, *b, 2.0 * EXP_ERROR), "{kernels:?} silu: {a} {b}");
                }
                let mut got = gate.clone();
                kernels.softmax(&mut got);
                for (a, b) in got.iter().zip(&expected_softmax) {
                    prop_assert!(close(*a, *b, 1e-5), "{kernels:?} softmax: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn exp_is_accurate_over_its_whole_range() {
        for kernels in others() {
            let mut x: Vec<f32> = (-8700..8870).map(|i| i as f32 * 0.01).collect();
            let expected: Vec<f32> = x.iter().map(|v| v.exp()).collect();
            kernels.exp_sum(&mut x, 0.0);
            for (got, expected) in x.iter().zip(&expected) {
                assert!(
                    close(*got, *expected, EXP_ERROR),
                    "{kernels:?}: {got} {expected}"
                );
            }
        }
    }

    #[test]
    fn extremes_and_nan_pass_through() {
        for kernels in others().into_iter().chain([twin()]) {
            let mut x = vec![f32::NEG_INFINITY, -200.0, 0.0, 200.0, f32::INFINITY];
            kernels.exp_sum(&mut x, 0.0);
            assert_eq!(
                x,
                [0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY],
                "{kernels:?}"
            );
            for (position, n) in [(0, 5), (4, 5), (7, 19), (18, 19)] {
                let mut x = vec![1.0; n];
                x[position] = f32::NAN;
                assert!(kernels.exp_sum(&mut x.clone(), 1.0).is_nan(), "{kernels:?}");
                kernels.softmax(&mut x);
                assert!(x.iter().all(|v| v.is_nan()), "{kernels:?}");
                let mut gate = vec![1.0; n];
                gate[position] = f32::NAN;
                kernels.silu_mul(&mut gate, &vec![1.0; n]);
                assert!(gate[position].is_nan(), "{kernels:?}");
            }
            let mut masked = vec![0.0, f32::NEG_INFINITY, 0.0];
            kernels.softmax(&mut masked);
            assert_eq!(masked, [0.5, 0.0, 0.5]);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![1.0; 64];
                x[40] = bad;
                let mut acts = [ActQ8::ZERO; 2];
                kernels.quantize_act(&x, &mut acts);
                assert!(
                    acts[0].d.is_finite() && acts[1].d.is_nan() && acts[1].sum.is_nan(),
                    "{kernels:?} {bad}"
                );
                let mut x = vec![1.0; 512];
                x[300] = bad;
                let mut acts = [ActQ8K::ZERO; 2];
                kernels.quantize_act_k(&x, &mut acts);
                assert!(
                    acts[0].d.is_finite() && acts[1].d.is_nan(),
                    "{kernels:?} {bad}"
                );
            }
        }
    }

    #[test]
    fn the_norm_is_the_formula() {
        // mean(x^2) = (9 + 16) / 2 = 12.5; with eps 0 the output is x / 3.5355.
        for kernels in others().into_iter().chain([twin()]) {
            let mut out = [0.0; 2];
            kernels.rms_norm(&[3.0, 4.0], &[1.0, 2.0], 0.0, &mut out);
            assert!(
                close(out[0], 0.848_528_1, 1e-6) && close(out[1], 2.262_741_7, 1e-6),
                "{out:?}"
            );
        }
    }
}
