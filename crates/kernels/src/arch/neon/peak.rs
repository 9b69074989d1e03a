//! The multipliers at their best: products of registers, which wait for nothing.

use std::arch::aarch64::*;

use super::multiply::dotprod;

/// Products that do not wait for each other.
const CHAINS: usize = 16;

/// `n` rounds of products of 8-bit integers; returns the operations, two per product.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn int8(n: u64) -> u64 {
    let x = vdupq_n_s8(1);
    // Different numbers: chains that are alike could become one.
    let mut sums: [int32x4_t; CHAINS] = std::array::from_fn(|i| vdupq_n_s32(i as i32));
    for _ in 0..n {
        for sum in &mut sums {
            // Assembly, which the compiler cannot compute ahead.
            *sum = dotprod::dot::<0>(*sum, x, x);
        }
    }
    // Nothing is left out either: the sums count.
    for sum in sums {
        std::hint::black_box(sum);
    }
    n * CHAINS as u64 * 2 * 16
}
