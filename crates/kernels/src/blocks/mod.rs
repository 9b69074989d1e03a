//! Quantised blocks: their memory layout, and how each expands to integers and to f32.
//!
//! Two families share everything after unpacking. Blocks of 32 weights ([`Block32`]) are `q * d`, or `q * d + m`;
//! super-blocks of 256 ([`Block256`]) are `d * scale * (q - offset) - dmin * min` with integer scales per 16 weights.
//! Layouts are those of GGUF; no type asks for an alignment above 2, so that data at any even address can be used
//! where it lies.

mod act;
mod iq4;
mod k_large;
mod k_small;
mod legacy;
mod mxfp4;
mod q8;

pub(crate) use act::ActScale;
pub use act::{ActQ8, ActQ8K};
#[allow(
    unused_imports,
    reason = "vector kernels look it up, and not every CPU has them"
)]
pub(crate) use iq4::IQ4_VALUES;
pub(crate) use iq4::{BlockIq4Nl, BlockIq4Xs};
pub(crate) use k_large::{BlockQ4K, BlockQ5K, BlockQ6K, scale_and_min_of};
pub(crate) use k_small::{BlockQ2K, BlockQ3K};
pub(crate) use legacy::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1};
pub(crate) use mxfp4::{BlockMxfp4, MXFP4_VALUES};
pub(crate) use q8::BlockQ8K;
pub use q8::{BlockQ8_0, dequantize_q8_0, quantize_q8_0};

/// Values per 8-bit block.
pub const Q8_BLOCK: usize = 32;
/// Values per super-block.
pub const SUPER_BLOCK: usize = 256;
/// Values that share an integer scale in a super-block.
pub(crate) const SUB_BLOCK: usize = 16;
/// Integer scales of a super-block.
pub(crate) const N_SCALES: usize = SUPER_BLOCK / SUB_BLOCK;

/// Data whose bytes may be read as `Self` and back.
///
/// # Safety
/// `Self` is `repr(C)` or a number, has no padding, and any bytes of its size are a valid value.
pub(crate) unsafe trait Pod: Copy + Send + Sync + 'static {}

// SAFETY: numbers; any bits are a value.
unsafe impl Pod for f32 {}
// SAFETY: as above.
unsafe impl Pod for u64 {}
// SAFETY: a wrapper around u16.
unsafe impl Pod for half::f16 {}
// SAFETY: a wrapper around u16.
unsafe impl Pod for half::bf16 {}

/// `bytes` as blocks where they lie; `None` when misaligned or not whole blocks.
pub(crate) fn cast<B: Pod>(bytes: &[u8]) -> Option<&[B]> {
    if bytes.is_empty() {
        return Some(&[]);
    }
    let whole = bytes.len().is_multiple_of(size_of::<B>());
    if !whole || !bytes.as_ptr().cast::<B>().is_aligned() {
        return None;
    }
    // SAFETY: aligned, whole and inside `bytes`; `Pod` allows any bits.
    Some(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<B>()) })
}

/// The bytes of `values`.
pub(crate) fn bytes_of<B: Pod>(values: &[B]) -> &[u8] {
    // SAFETY: `Pod` has no padding, so every byte is initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// A copy of the block at the start of `bytes`, at any alignment. Panics when `bytes` is too short.
pub(crate) fn read<B: Pod>(bytes: &[u8]) -> B {
    assert!(bytes.len() >= size_of::<B>(), "a whole block");
    // SAFETY: long enough; `Pod` allows any bits.
    unsafe { bytes.as_ptr().cast::<B>().read_unaligned() }
}

/// What every quantised block can do.
pub(crate) trait Block: Pod {
    /// Values per block.
    const LEN: usize;

    /// Whether every weight is sure to be finite, from the scales alone.
    fn is_surely_finite(&self) -> bool;

    /// How far a product with activations in 8 bits may be from the exact one of the expanded weights: this times the
    /// sum, over blocks, of the largest magnitude of an activation times [`Block::mass`]. Sums in f32 come on top; see
    /// [`crate::Matrix::error_bound`].
    const PRODUCT_ERROR: f64;

    /// Expands to `out` (`[LEN]`), by the operations and in the order that GGUF's definition gives.
    fn decode(&self, out: &mut [f32]);

    /// Sum of the magnitudes of scaled quants and minima: that of the weights where there is no minimum.
    fn mass(&self) -> f64;
}

/// A block of 32 weights, unpacked.
pub(crate) struct Quants32 {
    /// Quants: signed, or non-negative in formats with a minimum.
    pub(crate) qs: [i8; Q8_BLOCK],
    /// Scale.
    pub(crate) d: f32,
    /// What is added to every weight; 0 and unused unless [`Block32::HAS_MIN`].
    pub(crate) m: f32,
}

/// Blocks of 32 weights: `q * d`, or `q * d + m`.
pub(crate) trait Block32: Pod {
    /// Whether weights are `q * d + m`.
    const HAS_MIN: bool = false;
    /// See [`Block::PRODUCT_ERROR`].
    const PRODUCT_ERROR: f64;

    fn unpack(&self) -> Quants32;
}

/// A super-block, unpacked.
#[derive(Clone, Copy)]
pub(crate) struct Quants256 {
    /// Quants; unsigned unless [`Block256::SIGNED`].
    pub(crate) qs: [i8; SUPER_BLOCK],
    /// Integer scale of every 16 weights.
    pub(crate) scales: [i16; N_SCALES],
    /// Integer minimum of every 16 weights; unused unless [`Block256::HAS_MIN`].
    pub(crate) mins: [i16; N_SCALES],
    /// What a scale is worth.
    pub(crate) d: f32,
    /// What a minimum is worth.
    pub(crate) dmin: f32,
}

impl Quants256 {
    pub(crate) const ZERO: Self = Self {
        qs: [0; SUPER_BLOCK],
        scales: [0; N_SCALES],
        mins: [0; N_SCALES],
        d: 0.0,
        dmin: 0.0,
    };
}

/// Super-blocks of 256 weights: `d * scale * (q - OFFSET) - dmin * min`.
pub(crate) trait Block256: Pod {
    /// Whether the minimum is there.
    const HAS_MIN: bool = false;
    /// Whether quants may be below zero.
    #[allow(dead_code, reason = "vector kernels ask, and not every CPU has them")]
    const SIGNED: bool = false;
    /// What is taken off every quant.
    const OFFSET: i8 = 0;
    /// See [`Block::PRODUCT_ERROR`].
    const PRODUCT_ERROR: f64;

    /// Fills `out`, apart from fields that the constants above say are unused.
    fn unpack(&self, out: &mut Quants256);
}

/// Gives a block type `Pod`, a size check and `Block` by way of its family. The last argument is
/// [`Block::is_surely_finite`]; finite f16 scales suffice, since what they are multiplied by is small.
macro_rules! block {
    ($block:ty, $family:ident, $bytes:literal, |$self:ident| $finite:expr) => {
        const _: () = assert!(size_of::<$block>() == $bytes && align_of::<$block>() <= 2);

        // SAFETY: repr(C) without padding (the size is checked above), made of numbers only.
        unsafe impl crate::blocks::Pod for $block {}

        impl crate::blocks::Block for $block {
            const LEN: usize = crate::blocks::$family::LEN;
            const PRODUCT_ERROR: f64 = crate::blocks::$family::product_error::<Self>();

            #[inline]
            fn is_surely_finite(&self) -> bool {
                let $self = self;
                $finite
            }

            fn decode(&self, out: &mut [f32]) {
                crate::blocks::$family::decode(self, out);
            }

            fn mass(&self) -> f64 {
                crate::blocks::$family::mass(self)
            }
        }
    };
}
pub(crate) use block;

/// `Block` for the family of 32.
pub(crate) mod of_32 {
    use super::{Block32, Q8_BLOCK};

    pub(crate) const LEN: usize = Q8_BLOCK;

    pub(crate) const fn product_error<B: Block32>() -> f64 {
        B::PRODUCT_ERROR
    }

    pub(crate) fn mass<B: Block32>(block: &B) -> f64 {
        let quants = block.unpack();
        let sum: i32 = quants.qs.iter().map(|q| i32::from(*q).abs()).sum();
        let min = if B::HAS_MIN { quants.m.abs() } else { 0.0 };
        f64::from(quants.d.abs()) * f64::from(sum) + LEN as f64 * f64::from(min)
    }

    pub(crate) fn decode<B: Block32>(block: &B, out: &mut [f32]) {
        let quants = block.unpack();
        for (out, q) in out.iter_mut().zip(quants.qs) {
            // Adding a zero minimum would lose the sign of -0.
            *out = if B::HAS_MIN {
                f32::from(q) * quants.d + quants.m
            } else {
                f32::from(q) * quants.d
            };
        }
    }
}

/// `Block` for the family of 256.
pub(crate) mod of_256 {
    use super::{Block256, Quants256, SUB_BLOCK, SUPER_BLOCK};

    pub(crate) const LEN: usize = SUPER_BLOCK;

    pub(crate) const fn product_error<B: Block256>() -> f64 {
        B::PRODUCT_ERROR
    }

    pub(crate) fn mass<B: Block256>(block: &B) -> f64 {
        let mut quants = Quants256::ZERO;
        block.unpack(&mut quants);
        let (d, dmin) = (f64::from(quants.d), f64::from(quants.dmin));
        let groups = quants.qs.as_chunks::<SUB_BLOCK>().0.iter().enumerate();
        let of_group = |(at, qs): (usize, &[i8; SUB_BLOCK])| {
            let sum: i32 = qs.iter().map(|q| i32::from(q - B::OFFSET).abs()).sum();
            let min = match B::HAS_MIN {
                true => dmin * f64::from(quants.mins[at]) * SUB_BLOCK as f64,
                false => 0.0,
            };
            (d * f64::from(quants.scales[at]) * f64::from(sum)).abs() + min.abs()
        };
        groups.map(of_group).sum()
    }

    pub(crate) fn decode<B: Block256>(block: &B, out: &mut [f32]) {
        let mut quants = Quants256::ZERO;
        block.unpack(&mut quants);
        let groups = quants.qs.as_chunks::<SUB_BLOCK>().0;
        for (at, (qs, out)) in groups
            .iter()
            .zip(out.chunks_exact_mut(SUB_BLOCK))
            .enumerate()
        {
            let scale = quants.d * f32::from(quants.scales[at]);
            let min = quants.dmin * f32::from(quants.mins[at]);
            for (out, q) in out.iter_mut().zip(qs) {
                let scaled = scale * f32::from(q - B::OFFSET);
                *out = if B::HAS_MIN { scaled - min } else { scaled };
            }
        }
    }
}

/// Low nibbles, then high nibbles: the order of the blocks of 32.
#[inline(always)]
pub(crate) fn nibbles(qs: &[u8; 16]) -> [u8; Q8_BLOCK] {
    std::array::from_fn(|j| if j < 16 { qs[j] & 15 } else { qs[j - 16] >> 4 })
}
