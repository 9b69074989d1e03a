//! Products with block formats under AVX2, which AVX-512 machines use too.
//!
//! Blocks of 32 are unpacked into a register and keep one 8-lane accumulator per output element. Super-blocks are
//! unpacked into memory once per tile of tokens and summed in integers.

#![expect(
    clippy::needless_range_loop,
    reason = "tiles are indexed by row and token, which unrolls into registers"
)]

use std::arch::x86_64::*;

use half::f16;

use super::avx2::reduce;
use super::scalar::share;
use super::{Quants, rows_by_tiles};
use crate::blocks::{
    ActQ8, ActQ8K, Block32, Block256, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K,
    BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K,
    IQ4_VALUES, MXFP4_VALUES, Q8_BLOCK, Quants256, SUPER_BLOCK,
};
use crate::format;

pub(super) const QUANTS: Quants = Quants {
    rows_q8_0,
    rows_q4_0,
    rows_q4_1,
    rows_q5_0,
    rows_q5_1,
    rows_iq4_nl,
    rows_mxfp4,
    rows_q2_k,
    rows_q3_k,
    rows_q4_k,
    rows_q5_k,
    rows_q6_k,
    rows_q8_k,
    rows_iq4_xs,
};

macro_rules! rows_32 {
    ($name:ident, $block:ty) => {
        rows_by_tiles!($name, tile_32<$block>, $block, ActQ8, "avx2,fma,f16c", 4 x 2, 4);
    };
}

macro_rules! rows_256 {
    ($name:ident, $block:ty) => {
        rows_by_tiles!($name, tile_256<$block>, $block, ActQ8K, "avx2,fma,f16c", 1 x 8, 1);
    };
}

rows_32!(rows_q8_0, BlockQ8_0);
rows_32!(rows_q4_0, BlockQ4_0);
rows_32!(rows_q4_1, BlockQ4_1);
rows_32!(rows_q5_0, BlockQ5_0);
rows_32!(rows_q5_1, BlockQ5_1);
rows_32!(rows_iq4_nl, BlockIq4Nl);
rows_32!(rows_mxfp4, BlockMxfp4);
rows_256!(rows_q2_k, BlockQ2K);
rows_256!(rows_q3_k, BlockQ3K);
rows_256!(rows_q4_k, BlockQ4K);
rows_256!(rows_q5_k, BlockQ5K);
rows_256!(rows_q6_k, BlockQ6K);
rows_256!(rows_q8_k, BlockQ8K);
rows_256!(rows_iq4_xs, BlockIq4Xs);

/// A block of 32 in registers: quants, scale, minimum.
type Loaded = (__m256i, f32, f32);

/// How a block of 32 gets into registers; the same numbers as [`Block32::unpack`].
trait Load32: Block32 {
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn load(&self) -> Loaded;
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn widen(d: f16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(d.to_bits()))))
}

/// Low nibbles in the low half, high nibbles in the high half.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn nibbles(qs: &[u8; 16]) -> __m256i {
    // SAFETY: 16 bytes.
    let bytes = unsafe { _mm_loadu_si128(qs.as_ptr().cast()) };
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// 16 in every lane whose bit is set.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fifth_bits(qh: [u8; 4]) -> __m256i {
    // Byte j of the word to lanes 8j..8j+8, then a different bit of it in each of them.
    let spread = _mm256_set_epi64x(
        0x0303_0303_0303_0303,
        0x0202_0202_0202_0202,
        0x0101_0101_0101_0101,
        0,
    );
    let bits = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(qh)), spread);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

/// `table[code]` in every lane; codes are below 16.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn look_up(table: &[i8; 16], codes: __m256i) -> __m256i {
    // SAFETY: 16 bytes.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes)
}

/// Implements [`Load32`]: quants, scale and minimum of `$block`.
macro_rules! load {
    ($type:ty, |$block:ident| $qs:expr, $d:expr, $m:expr) => {
        impl Load32 for $type {
            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline]
            unsafe fn load(&self) -> Loaded {
                let $block = self;
                ($qs, $d, $m)
            }
        }
    };
}

load!(
    BlockQ8_0,
    // SAFETY: the 32 quants.
    |block| unsafe { _mm256_loadu_si256(block.qs.as_ptr().cast()) },
    widen(block.d),
    0.0
);
load!(
    BlockQ4_0,
    |block| _mm256_sub_epi8(nibbles(&block.qs), _mm256_set1_epi8(8)),
    widen(block.d),
    0.0
);
load!(
    BlockQ4_1,
    |block| nibbles(&block.qs),
    widen(block.d),
    widen(block.m)
);
load!(
    BlockQ5_0,
    |block| {
        let qs = _mm256_or_si256(nibbles(&block.qs), fifth_bits(block.qh));
        _mm256_sub_epi8(qs, _mm256_set1_epi8(16))
    },
    widen(block.d),
    0.0
);
load!(
    BlockQ5_1,
    |block| _mm256_or_si256(nibbles(&block.qs), fifth_bits(block.qh)),
    widen(block.d),
    widen(block.m)
);
load!(
    BlockIq4Nl,
    |block| look_up(&IQ4_VALUES, nibbles(&block.qs)),
    widen(block.d),
    0.0
);
load!(
    BlockMxfp4,
    |block| look_up(&MXFP4_VALUES, nibbles(&block.qs)),
    BlockMxfp4::scale_of(block.e),
    0.0
);

/// # Safety
/// `w` and `x` hold `R` and `N` rows of `n` blocks.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn tile_32<B: Load32, const R: usize, const N: usize>(
    w: *const B,
    x: *const ActQ8,
    n: usize,
) -> [[f32; N]; R] {
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_ps(); N]; R];
    for i in 0..n {
        let mut ws = [_mm256_setzero_si256(); R];
        let (mut ds, mut ms) = ([0.0f32; R], [0.0f32; R]);
        for r in 0..R {
            // SAFETY: block i of row r; the instruction set is this function's.
            (ws[r], ds[r], ms[r]) = unsafe { (*w.add(r * n + i)).load() };
        }
        for t in 0..N {
            // SAFETY: block i of row t.
            let act = unsafe { &*x.add(t * n + i) };
            // SAFETY: the 32 quants of the block.
            let qs = unsafe { _mm256_loadu_si256(act.qs.as_ptr().cast()) };
            for r in 0..R {
                // |w| <= 128 and |x| <= 127, so a pair of products stays below 2^15 and nothing saturates.
                let pairs =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(ws[r]), _mm256_sign_epi8(qs, ws[r]));
                let sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                acc[r][t] = _mm256_fmadd_ps(sums, _mm256_set1_ps(ds[r] * act.d), acc[r][t]);
                if B::HAS_MIN {
                    let min = _mm256_zextps128_ps256(_mm_set_ss(ms[r] * act.sum));
                    acc[r][t] = _mm256_add_ps(acc[r][t], min);
                }
            }
        }
    }
    reduce(acc)
}

/// # Safety
/// `w` and `x` hold `R` and `N` rows of `n` super-blocks.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn tile_256<B: Unpack256, const R: usize, const N: usize>(
    w: *const B,
    x: *const ActQ8K,
    n: usize,
) -> [[f32; N]; R] {
    let mut sums = [[0.0; N]; R];
    let mut quants = Quants256::ZERO;
    for i in 0..n {
        for r in 0..R {
            // SAFETY: block i of row r; the instruction set is this function's.
            unsafe { (*w.add(r * n + i)).unpack_here(&mut quants) };
            for t in 0..N {
                // SAFETY: block i of row t.
                let act = unsafe { &*x.add(t * n + i) };
                sums[r][t] += product::<B>(&quants, act);
            }
        }
    }
    sums
}

/// How a super-block is unpacked; the same numbers as [`Block256::unpack`], which the compiler vectorises here unless
/// tables are in the way.
trait Unpack256: Block256 {
    /// # Safety
    /// The CPU has AVX2 and F16C.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn unpack_here(&self, out: &mut Quants256) {
        self.unpack(out);
    }
}

impl Unpack256 for BlockQ2K {}
impl Unpack256 for BlockQ3K {}
impl Unpack256 for BlockQ4K {}
impl Unpack256 for BlockQ5K {}
impl Unpack256 for BlockQ6K {}
impl Unpack256 for BlockQ8K {}

impl Unpack256 for BlockIq4Xs {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn unpack_here(&self, out: &mut Quants256) {
        out.d = widen(self.d);
        let (groups, _) = self.qs.as_chunks::<16>();
        let (quants, _) = out.qs.as_chunks_mut::<Q8_BLOCK>();
        for (group, (codes, quants)) in groups.iter().zip(quants).enumerate() {
            let values = look_up(&IQ4_VALUES, nibbles(codes));
            // SAFETY: 32 bytes.
            unsafe { _mm256_storeu_si256(quants.as_mut_ptr().cast(), values) };
            out.scales[2 * group] = self.scale(group);
            out.scales[2 * group + 1] = self.scale(group);
        }
    }
}

/// One super-block's share of a dot product.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn product<B: Block256>(w: &Quants256, x: &ActQ8K) -> f32 {
    let mut acc = _mm256_setzero_si256();
    let ws = w.qs.as_chunks::<32>().0;
    let xs = x.qs.as_chunks::<32>().0;
    let scales = w.scales.as_chunks::<2>().0;
    for ((ws, xs), [low, high]) in ws.iter().zip(xs).zip(scales) {
        // SAFETY: 32 bytes each.
        let (ws, xs) = unsafe {
            (
                _mm256_loadu_si256(ws.as_ptr().cast()),
                _mm256_loadu_si256(xs.as_ptr().cast()),
            )
        };
        // Pairs stay below 2^15: unsigned quants are at most 63, signed ones 128, activations 127.
        let pairs = if B::SIGNED {
            _mm256_maddubs_epi16(_mm256_abs_epi8(ws), _mm256_sign_epi8(xs, ws))
        } else {
            _mm256_maddubs_epi16(ws, xs)
        };
        let scales = _mm256_set_m128i(_mm_set1_epi16(*high), _mm_set1_epi16(*low));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, scales));
    }
    // SAFETY: 16 numbers of 16 bits in each array.
    let (scales, mins, sums) = unsafe {
        (
            _mm256_loadu_si256(w.scales.as_ptr().cast()),
            _mm256_loadu_si256(w.mins.as_ptr().cast()),
            _mm256_loadu_si256(x.sums.as_ptr().cast()),
        )
    };
    if B::OFFSET != 0 {
        let offset = _mm256_set1_epi32(i32::from(B::OFFSET));
        let sums = _mm256_mullo_epi32(_mm256_madd_epi16(scales, sums), offset);
        acc = _mm256_sub_epi32(acc, sums);
    }
    let mins = if B::HAS_MIN {
        sum_lanes(_mm256_madd_epi16(mins, sums))
    } else {
        0
    };
    share::<B>(w, x.d, sum_lanes(acc), mins)
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn sum_lanes(v: __m256i) -> i32 {
    let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
    _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v)))
}

/// The twin's arithmetic, which vectorises as it is.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_act_k(x: &[f32], out: &mut [ActQ8K]) {
    for (x, out) in x.as_chunks::<SUPER_BLOCK>().0.iter().zip(out) {
        *out = ActQ8K::quantize(x);
    }
}

/// The twin's arithmetic, which vectorises as it is.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode_f8(bytes: &[u8], out: &mut [f32]) {
    format::decode_f8(bytes, out);
}
