//! A task's share of a matrix product, handed to the kernel of the weight's format.

use std::cell::RefCell;

use half::{bf16, f16};

use crate::arch::Rows;
use crate::blocks::{
    ActQ8, ActQ8K, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1,
    BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K,
};
use crate::format::Format;
use crate::matrix::Matrix;
use crate::table::Kernels;

/// Bytes of activations that a block of weight rows is multiplied by before the next block: they stay in
/// the second-level cache, and a weight row is read once for all of them.
const TOKEN_BLOCK_BYTES: usize = 256 << 10;
/// Tokens and rows of every tile divide this, so that blocks are made of whole tiles.
pub(crate) const TILE: usize = 8;

thread_local! {
    /// A row of weights in f32.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What activations a format is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ActFormat {
    /// As they come.
    F32,
    /// [`ActQ8`].
    Q8,
    /// [`ActQ8K`].
    Q8K,
}

impl ActFormat {
    /// The one for weights of `format`.
    pub(crate) fn of(format: Format) -> Self {
        match format {
            Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4M3 | Format::U8 => Self::F32,
            Format::Q8_0
            | Format::Q4_0
            | Format::Q4_1
            | Format::Q5_0
            | Format::Q5_1
            | Format::Iq4Nl
            | Format::Mxfp4 => Self::Q8,
            Format::Q2K
            | Format::Q3K
            | Format::Q4K
            | Format::Q5K
            | Format::Q6K
            | Format::Q8K
            | Format::Iq4Xs => Self::Q8K,
        }
    }
}

/// The activations of a product in every form that its weights need; the others are empty.
#[derive(Clone, Copy)]
pub(crate) struct Acts<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) q8: &'a [ActQ8],
    pub(crate) q8_k: &'a [ActQ8K],
}

/// A task's share of a product: some rows of the weight, the tokens of one group.
pub(crate) struct Part {
    pub(crate) first_row: usize,
    pub(crate) n_rows: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Outputs per token.
    pub(crate) n_out: usize,
    /// Output `first_row` of token `from`.
    pub(crate) y: *mut f32,
}

impl Part {
    /// Computes the part's outputs.
    ///
    /// # Safety
    /// Columns `first_row..first_row + n_rows` of the outputs of tokens `from..to` may be written through `y`.
    pub(crate) unsafe fn compute(&self, kernels: Kernels, w: &Matrix, acts: Acts<'_>) {
        let step = (TOKEN_BLOCK_BYTES / (w.n_in() * size_of::<f32>()))
            .next_multiple_of(TILE)
            .max(TILE);
        for from in (self.from..self.to).step_by(step) {
            let tokens = Tokens {
                from,
                n: step.min(self.to - from),
                // SAFETY: row `from` of the part's outputs.
                y: unsafe { self.y.add((from - self.from) * self.n_out) },
            };
            // SAFETY: the caller's promise, for the tokens of this step.
            unsafe { self.step(kernels, w, acts, &tokens) };
        }
    }

    /// # Safety
    /// As for [`Part::compute`], for `tokens`.
    unsafe fn step(&self, kernels: Kernels, w: &Matrix, acts: Acts<'_>, tokens: &Tokens) {
        let table = kernels.table();
        let quants = &table.quants;
        macro_rules! rows {
            ($kernel:expr, $unit:ty, $x:expr) => {{
                let args = self.args(w.units::<$unit>(), $x, w, tokens);
                // SAFETY: `kernels` proves the instruction set; slicing in `args` checked that the operands hold
                // the part's rows; the caller checked the outputs.
                unsafe { ($kernel)(&args) }
            }};
        }
        if w.format().is_quantized() && w.acts() == ActFormat::F32 {
            // SAFETY: the caller's promise.
            return unsafe { self.expanded(kernels, w, acts.x, tokens) };
        }
        match w.format() {
            Format::F32 => rows!(table.rows_f32, f32, acts.x),
            Format::F16 => rows!(table.rows_f16, f16, acts.x),
            Format::Bf16 => rows!(table.rows_bf16, bf16, acts.x),
            Format::Q8_0 => rows!(table.rows_q8_0, BlockQ8_0, acts.q8),
            Format::Q4_0 => rows!(quants.rows_q4_0, BlockQ4_0, acts.q8),
            Format::Q4_1 => rows!(quants.rows_q4_1, BlockQ4_1, acts.q8),
            Format::Q5_0 => rows!(quants.rows_q5_0, BlockQ5_0, acts.q8),
            Format::Q5_1 => rows!(quants.rows_q5_1, BlockQ5_1, acts.q8),
            Format::Iq4Nl => rows!(quants.rows_iq4_nl, BlockIq4Nl, acts.q8),
            Format::Mxfp4 => rows!(quants.rows_mxfp4, BlockMxfp4, acts.q8),
            Format::Q2K => rows!(quants.rows_q2_k, BlockQ2K, acts.q8_k),
            Format::Q3K => rows!(quants.rows_q3_k, BlockQ3K, acts.q8_k),
            Format::Q4K => rows!(quants.rows_q4_k, BlockQ4K, acts.q8_k),
            Format::Q5K => rows!(quants.rows_q5_k, BlockQ5K, acts.q8_k),
            Format::Q6K => rows!(quants.rows_q6_k, BlockQ6K, acts.q8_k),
            Format::Q8K => rows!(quants.rows_q8_k, BlockQ8K, acts.q8_k),
            Format::Iq4Xs => rows!(quants.rows_iq4_xs, BlockIq4Xs, acts.q8_k),
            // SAFETY: the caller's promise.
            Format::F8E4M3 => unsafe { self.expanded(kernels, w, acts.x, tokens) },
            Format::U8 => unreachable!("a matrix of raw bytes cannot be made"),
        }
    }

    /// Expands one row after the other and multiplies in f32.
    ///
    /// # Safety
    /// As for [`Part::compute`], for `tokens`.
    unsafe fn expanded(&self, kernels: Kernels, w: &Matrix, x: &[f32], tokens: &Tokens) {
        let n_in = w.n_in();
        ROW.with_borrow_mut(|values| {
            values.resize(n_in, 0.0);
            for r in 0..self.n_rows {
                if w.format() == Format::F8E4M3 {
                    // SAFETY: `kernels` proves the instruction set.
                    let decode = |bytes: &[u8], out: &mut [f32]| unsafe {
                        (kernels.table().decode_f8)(bytes, out);
                    };
                    w.row_by(self.first_row + r, values, decode);
                } else {
                    w.row(self.first_row + r, values);
                }
                let args = Rows {
                    w: values.as_ptr(),
                    n_rows: 1,
                    x: x[tokens.from * n_in..][..tokens.n * n_in].as_ptr(),
                    n_tokens: tokens.n,
                    n_units: n_in,
                    // SAFETY: column `r` of the part's outputs.
                    y: unsafe { tokens.y.add(r) },
                    y_stride: self.n_out,
                };
                // SAFETY: `kernels` proves the instruction set; the row and the tokens were sliced; the caller
                // checked the outputs.
                unsafe { (kernels.table().rows_f32)(&args) };
            }
        });
    }

    fn args<W, X>(&self, units: &[W], x: &[X], w: &Matrix, tokens: &Tokens) -> Rows<W, X> {
        let n_units = w.n_in() / w.format().block_len();
        Rows {
            w: units[self.first_row * n_units..][..self.n_rows * n_units].as_ptr(),
            n_rows: self.n_rows,
            x: x[tokens.from * n_units..][..tokens.n * n_units].as_ptr(),
            n_tokens: tokens.n,
            n_units,
            y: tokens.y,
            y_stride: self.n_out,
        }
    }
}

/// Tokens whose activations stay in the cache.
struct Tokens {
    from: usize,
    n: usize,
    /// Output `Part::first_row` of token `from`.
    y: *mut f32,
}
