//! Kernels for 64-bit ARM: NEON, and NEON with the dot products of 8-bit integers.
//!
//! Products go by panels as with AVX-512: a panel's 32 rows are eight vectors. Panels hold signed bytes here, since the
//! instructions multiply signed by signed, so no bias has to be taken off.

#![expect(
    clippy::needless_range_loop,
    reason = "tiles are indexed by row and token, which unrolls into registers"
)]

mod floats;
mod interleave;
mod multiply;
mod pack;
mod peak;

use super::{Kernel, PanelKernels, Products, Rows, Table, rows_by_tiles};
use crate::blocks::{
    ActQ8, ActQ8K, BlockIq4Nl, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, SUPER_BLOCK,
};
use crate::format::{self, Format};
use crate::interleave::{InPlace, Interleaved};
use crate::panel::{MultiplyFn, PackFn};
use multiply::multiply_f32;
use pack::Wide;

pub(super) use floats::{exp, half_to_f32, sum_lanes};

pub(super) static TABLE: Table = table(panels::<Plain>, None);
pub(super) static TABLE_DOTPROD: Table = table(panels::<DotProd>, Some(peak::int8));

const fn table(
    panels: fn(Format, bool) -> PanelKernels,
    peak_int8: Option<unsafe fn(u64) -> u64>,
) -> Table {
    Table {
        rows_f32: floats::rows_f32,
        rows_f16: floats::rows_f16,
        rows_bf16: floats::rows_bf16,
        products: Products::Panels(panels),
        interleave: interleave::interleave,
        peak_int8,
        peak_bf16: None,
        bf16: &super::scalar_bf16::TABLE,
        attention: &super::attention::neon::TABLE,
        add_weighted_rows: floats::add_weighted_rows,
        max: floats::max,
        exp_sum: floats::exp_sum,
        silu_mul: floats::silu_mul,
        decode_f8,
        quantize_act: floats::quantize_act,
        quantize_act_k,
    }
}

/// Products of integers, for each family of formats.
trait Integers {
    /// Blocks of 32 without and with a minimum.
    const BLOCKS: MultiplyFn<ActQ8>;
    const BLOCKS_MIN: MultiplyFn<ActQ8>;
    /// Super-blocks with a scale per 32: signed weights, and those with a minimum.
    const SUPER_8: MultiplyFn<ActQ8K>;
    const SUPER_8_MIN: MultiplyFn<ActQ8K>;
    /// Super-blocks with a scale per 16: those with an offset, and those with a minimum.
    const SUPER_16: MultiplyFn<ActQ8K>;
    const SUPER_16_MIN: MultiplyFn<ActQ8K>;
}

/// What every 64-bit ARM CPU has.
struct Plain;
/// CPUs that sum products of bytes by fours.
struct DotProd;

macro_rules! integers {
    ($type:ty, $module:ident) => {
        impl Integers for $type {
            const BLOCKS: MultiplyFn<ActQ8> = multiply::$module::multiply_32::<false>;
            const BLOCKS_MIN: MultiplyFn<ActQ8> = multiply::$module::multiply_32::<true>;
            const SUPER_8: MultiplyFn<ActQ8K> = multiply::$module::multiply_256::<8, false, false>;
            const SUPER_8_MIN: MultiplyFn<ActQ8K> =
                multiply::$module::multiply_256::<8, true, true>;
            const SUPER_16: MultiplyFn<ActQ8K> = multiply::$module::multiply_256::<16, true, false>;
            const SUPER_16_MIN: MultiplyFn<ActQ8K> =
                multiply::$module::multiply_256::<16, true, true>;
        }
    };
}
integers!(Plain, plain);
integers!(DotProd, dotprod);

/// The panels of `format`.
fn panels<I: Integers>(format: Format, interleaved: bool) -> PanelKernels {
    match interleaved {
        true => panels_of::<I, Interleaved>(format),
        false => panels_of::<I, InPlace>(format),
    }
}

fn panels_of<I: Integers, S: Wide>(format: Format) -> PanelKernels {
    use pack::{blocks, supers};
    let float = |pack: PackFn| PanelKernels::F32(kernel(pack, multiply_f32));
    let q8 = |pack: PackFn, multiply| PanelKernels::Q8(kernel(pack, multiply));
    let q8_k = |pack: PackFn, multiply| PanelKernels::Q8K(kernel(pack, multiply));
    match format {
        Format::F32 => float(pack::pack_f32::<S>),
        Format::F16 => float(pack::pack_f16::<S>),
        Format::Bf16 => float(pack::pack_bf16::<S>),
        Format::Q8_0 => q8(blocks::pack_q8_0::<S>, I::BLOCKS),
        Format::Q4_0 => q8(blocks::pack_nibbles::<S, BlockQ4_0>, I::BLOCKS),
        Format::Iq4Nl => q8(blocks::pack_nibbles::<S, BlockIq4Nl>, I::BLOCKS),
        Format::Mxfp4 => q8(blocks::pack_nibbles::<S, BlockMxfp4>, I::BLOCKS),
        Format::Q4_1 => q8(blocks::pack_q4_1::<S>, I::BLOCKS_MIN),
        Format::Q5_0 => q8(blocks::pack_q5_0::<S>, I::BLOCKS),
        Format::Q5_1 => q8(blocks::pack_q5_1::<S>, I::BLOCKS_MIN),
        Format::Q2K => q8_k(supers::pack_by_twin::<S, BlockQ2K>, I::SUPER_16_MIN),
        Format::Q3K => q8_k(supers::pack_by_twin::<S, BlockQ3K>, I::SUPER_16),
        Format::Q4K => q8_k(supers::pack_q4_k::<S>, I::SUPER_8_MIN),
        Format::Q5K => q8_k(supers::pack_q5_k::<S>, I::SUPER_8_MIN),
        Format::Q6K => q8_k(supers::pack_q6_k::<S>, I::SUPER_16),
        Format::Q8K => q8_k(supers::pack_q8_k::<S>, I::SUPER_8),
        Format::Iq4Xs => q8_k(supers::pack_iq4_xs::<S>, I::SUPER_8),
        Format::F8E4M3 | Format::U8 => PanelKernels::Expand,
    }
}

fn kernel<X>(pack: PackFn, multiply: MultiplyFn<X>) -> Kernel<X> {
    Kernel {
        pack,
        multiply,
        few: None,
    }
}

/// The twin's arithmetic, which vectorises as it is.
#[target_feature(enable = "neon")]
fn quantize_act_k(x: &[f32], out: &mut [ActQ8K]) {
    for (x, out) in x.as_chunks::<SUPER_BLOCK>().0.iter().zip(out) {
        *out = ActQ8K::quantize(x);
    }
}

/// The twin's arithmetic, which vectorises as it is.
#[target_feature(enable = "neon")]
fn decode_f8(bytes: &[u8], out: &mut [f32]) {
    format::decode_f8(bytes, out);
}
