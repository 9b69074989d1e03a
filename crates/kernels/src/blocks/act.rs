//! Activations quantised to 8 bits, for integer products with quantised weights.

use super::{N_SCALES, Q8_BLOCK, SUPER_BLOCK};

/// Thirty-two activations quantised for an integer dot product with blocks of 32 weights.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct ActQ8 {
    /// Scale. NaN when an input was NaN or infinite, so that the product says so.
    pub d: f32,
    /// `-128 * sum(qs)`: what an unsigned product with `weight + 128` has to be corrected by.
    pub bias: i32,
    /// Quants in -127..=127; activation `j` is `qs[j] * d`.
    pub qs: [i8; Q8_BLOCK],
}

/// 256 activations quantised for an integer dot product with super-blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct ActQ8K {
    /// Scale. NaN when an input was NaN or infinite.
    pub d: f32,
    /// Quants in -127..=127; activation `j` is `qs[j] * d`.
    pub qs: [i8; SUPER_BLOCK],
    /// Sums of every 16 quants.
    pub sums: [i16; N_SCALES],
}

const _: () = assert!(size_of::<ActQ8>() == 40 && align_of::<ActQ8>() == 4);
const _: () = assert!(size_of::<ActQ8K>() == 292 && align_of::<ActQ8K>() == 4);

impl ActQ8 {
    /// A block of zeros.
    pub const ZERO: Self = Self {
        d: 0.0,
        bias: 0,
        qs: [0; Q8_BLOCK],
    };
}

impl ActQ8K {
    /// A block of zeros.
    pub const ZERO: Self = Self {
        d: 0.0,
        qs: [0; SUPER_BLOCK],
        sums: [0; N_SCALES],
    };
}
