//! One file per instruction set, each with the same functions; [`Table`] lists them.
//!
//! Nothing here is called except through a table, and a table is only handed out when the CPU has its
//! instruction set (`crate::Kernels`).

pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_quants;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod bf16_gemm;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod interleave;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
mod scalar_bf16;
mod scalar_panel;

use half::{bf16, f16};

use crate::blocks::{
    ActQ8, ActQ8K, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1,
    BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K,
};
use crate::format::Format;
use crate::interleave::Shape;
use crate::isa::Isa;
use crate::panel::{FewFn, MultiplyFn, N_FEW, PackFn};

/// Arguments of a block of matrix product: `y[t * y_stride + r] = dot(w row r, x row t)`.
///
/// A row of `w` and a row of `x` are each `n_units` consecutive units (values or blocks).
pub(crate) struct Rows<W, X> {
    pub(crate) w: *const W,
    pub(crate) n_rows: usize,
    pub(crate) x: *const X,
    pub(crate) n_tokens: usize,
    pub(crate) n_units: usize,
    pub(crate) y: *mut f32,
    pub(crate) y_stride: usize,
}

/// # Safety
/// The CPU has the table's instruction set. `w` holds `n_rows * n_units` units, `x` holds
/// `n_tokens * n_units`, and `y[t * y_stride + r]` may be written for every `t < n_tokens`, `r < n_rows`.
type RowsFn<W, X> = unsafe fn(&Rows<W, X>);

/// The kernels of one instruction set.
///
/// Every function needs the CPU to have that set; those over slices need nothing else, except that
/// lengths match as their comment says (checked by the safe callers in `table.rs`).
pub(crate) struct Table {
    pub(crate) rows_f32: RowsFn<f32, f32>,
    pub(crate) rows_f16: RowsFn<f16, f32>,
    pub(crate) rows_bf16: RowsFn<bf16, f32>,
    pub(crate) products: Products,
    /// [`Shape::interleave`], of 1 to 32 rows of whole blocks; `out` has room for 32.
    pub(crate) interleave: unsafe fn(shape: &Shape, rows: &[u8], row_bytes: usize, out: &mut [u8]),
    /// Rounds of integer products at their fastest, and of bf16: for measuring what products are held against. They
    /// return how many operations they were.
    pub(crate) peak_int8: Option<unsafe fn(n: u64) -> u64>,
    pub(crate) peak_bf16: Option<unsafe fn(n: u64) -> u64>,
    /// Products of bf16 with f32 sums, for training.
    pub(crate) bf16: &'static bf16_gemm::Bf16,
    pub(crate) attention: &'static attention::AttentionTable,
    /// `y += sum over j of weights[j] * rows[j]`, with `rows: [weights.len(), y.len()]`.
    pub(crate) add_weighted_rows: unsafe fn(weights: &[f32], rows: &[f32], y: &mut [f32]),
    /// The largest value; any NaN gives an unspecified value. An empty slice gives minus infinity.
    pub(crate) max: unsafe fn(x: &[f32]) -> f32,
    /// `x = exp(x - shift)`; returns the sum.
    pub(crate) exp_sum: unsafe fn(x: &mut [f32], shift: f32) -> f32,
    /// `gate = gate * sigmoid(gate) * up`, equal lengths.
    pub(crate) silu_mul: unsafe fn(gate: &mut [f32], up: &[f32]),
    /// 8-bit floats to f32, as many as both slices hold.
    pub(crate) decode_f8: unsafe fn(bytes: &[u8], out: &mut [f32]),
    /// Activations to 8-bit blocks, 32 values each.
    pub(crate) quantize_act: unsafe fn(x: &[f32], out: &mut [ActQ8]),
    /// Activations to super-blocks, 256 values each.
    pub(crate) quantize_act_k: unsafe fn(x: &[f32], out: &mut [ActQ8K]),
}

/// How an instruction set multiplies by weights.
pub(crate) enum Products {
    /// Dot products of rows where they lie.
    #[allow(dead_code, reason = "AVX2 alone does")]
    Rows(Quants),
    /// Rows unpacked into panels first; the second argument says whether they are interleaved.
    Panels(fn(Format, bool) -> PanelKernels),
}

/// How the weights of a format become panels, and what they are multiplied by.
pub(crate) enum PanelKernels {
    Q8(Kernel<ActQ8>),
    Q8K(Kernel<ActQ8K>),
    /// Weights of any float format, activations as they come.
    F32(Kernel<f32>),
    /// Weights in bf16: for activations as they come, and for those in bf16.
    #[allow(dead_code, reason = "AVX-512 alone does")]
    Bf16(Kernel<f32>, Kernel<bf16>),
    /// The format has to be expanded to f32 first.
    Expand,
}

/// Products of a format with activations of type `X`.
pub(crate) struct Kernel<X> {
    pub(crate) pack: PackFn,
    pub(crate) multiply: MultiplyFn<X>,
    /// The same bits without a panel, where that may be faster.
    pub(crate) few: Option<Few<X>>,
}

/// Products that unpack the rows again for every few tokens.
#[allow(dead_code, reason = "AVX-512 alone does")]
#[derive(Clone, Copy)]
pub(crate) struct Few<X> {
    /// For 1, 2, 4 and 8 tokens.
    pub(crate) of: [FewFn<X>; N_FEW],
    /// Up to how many tokens that is faster than packing.
    pub(crate) up_to: usize,
}

/// Products of rows with the block formats.
///
/// A super-block's share of a dot product is exact in integers up to two multiplications by scales, and shares are
/// added in order: the products of 256-value formats have the same bits on every instruction set.
pub(crate) struct Quants {
    pub(crate) rows_q8_0: RowsFn<BlockQ8_0, ActQ8>,
    pub(crate) rows_q4_0: RowsFn<BlockQ4_0, ActQ8>,
    pub(crate) rows_q4_1: RowsFn<BlockQ4_1, ActQ8>,
    pub(crate) rows_q5_0: RowsFn<BlockQ5_0, ActQ8>,
    pub(crate) rows_q5_1: RowsFn<BlockQ5_1, ActQ8>,
    pub(crate) rows_iq4_nl: RowsFn<BlockIq4Nl, ActQ8>,
    pub(crate) rows_mxfp4: RowsFn<BlockMxfp4, ActQ8>,
    pub(crate) rows_q2_k: RowsFn<BlockQ2K, ActQ8K>,
    pub(crate) rows_q3_k: RowsFn<BlockQ3K, ActQ8K>,
    pub(crate) rows_q4_k: RowsFn<BlockQ4K, ActQ8K>,
    pub(crate) rows_q5_k: RowsFn<BlockQ5K, ActQ8K>,
    pub(crate) rows_q6_k: RowsFn<BlockQ6K, ActQ8K>,
    pub(crate) rows_q8_k: RowsFn<BlockQ8K, ActQ8K>,
    pub(crate) rows_iq4_xs: RowsFn<BlockIq4Xs, ActQ8K>,
}

/// The table for `isa`, or `None` when this build has no kernels for it.
pub(crate) fn table(isa: Isa) -> Option<&'static Table> {
    match isa {
        Isa::Scalar => Some(&scalar::TABLE),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Some(&avx2::TABLE),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => Some(&avx512::TABLE),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => Some(&avx512::TABLE_BF16),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Some(&neon::TABLE),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDotprod => Some(&neon::TABLE_DOTPROD),
        _ => None,
    }
}

/// Defines a `RowsFn` that covers its block with calls of `$tile::<ROWS, TOKENS>(w, x, n_units)`, or of
/// `$tile::<$block, ROWS, TOKENS>` when the tile is one for several types.
///
/// A tile computes each of its elements by the same sequence whatever its size, so the cut into tiles
/// changes speed and no bit of the result. `$r1` rows are taken together for a single token.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! rows_by_tiles {
    ($name:ident, $tile:ident $(<$block:ty>)?, $w:ty, $x:ty, $features:literal, $r:literal x $n:literal, $r1:literal) => {
        /// # Safety
        /// See `RowsFn`.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(args: &super::Rows<$w, $x>) {
            let n_units = args.n_units;
            let mut row = 0;
            while row < args.n_rows {
                let left = args.n_rows - row;
                let mut token = 0;
                let mut n_rows = 1;
                macro_rules! tile {
                    ($tile_rows:literal, $tile_tokens:literal) => {{
                        n_rows = $tile_rows;
                        // SAFETY: rows row..row+tile_rows and tokens token..token+tile_tokens are
                        // inside the operands, as the loop conditions check.
                        unsafe {
                            let w = args.w.add(row * n_units);
                            let x = args.x.add(token * n_units);
                            let y = args.y.add(token * args.y_stride + row);
                            let tile = $tile::<$($block,)? $tile_rows, $tile_tokens>(w, x, n_units);
                            for (r, tile_row) in tile.iter().enumerate() {
                                for (t, value) in tile_row.iter().enumerate() {
                                    *y.add(t * args.y_stride + r) = *value;
                                }
                            }
                        }
                        token += $tile_tokens;
                    }};
                }
                if args.n_tokens == 1 && left >= $r1 {
                    tile!($r1, 1);
                } else if left >= $r {
                    while token + $n <= args.n_tokens {
                        tile!($r, $n);
                    }
                    while token < args.n_tokens {
                        tile!($r, 1);
                    }
                } else {
                    while token + $n <= args.n_tokens {
                        tile!(1, $n);
                    }
                    while token < args.n_tokens {
                        tile!(1, 1);
                    }
                }
                debug_assert!(token >= args.n_tokens);
                row += n_rows;
            }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use rows_by_tiles;

/// `ln 2` to 9 bits, so that its product with a small integer is exact, and what is left of it.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const LN2_HIGH: f32 = 355.0 / 512.0;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const LN2_LOW: f32 = -2.121_944_4e-4;

/// The series of `exp`, highest power first: 1/7!, ..., 1/1!, 1. On |r| <= ln(2)/2 what follows it is
/// below 5e-9 relative.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[expect(
    clippy::excessive_precision,
    reason = "written as the decimals of the reciprocals"
)]
const EXP_TAYLOR: [f32; 8] = [
    1.984_126_98e-4,
    1.388_888_89e-3,
    8.333_333_33e-3,
    4.166_666_67e-2,
    1.666_666_67e-1,
    0.5,
    1.0,
    1.0,
];
