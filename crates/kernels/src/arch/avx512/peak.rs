//! The multipliers at their best: products of registers, which wait for nothing.

use std::arch::x86_64::*;

/// Products that do not wait for each other.
const CHAINS: usize = 12;

/// Keeps a value from being computed ahead, or not at all.
#[target_feature(enable = "avx512f")]
#[inline]
fn opaque(v: &mut __m512i) {
    // SAFETY: no instructions.
    unsafe {
        std::arch::asm!(
            "/* {0} */",
            inout(zmm_reg) * v,
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// `n` rounds of products of 8-bit integers; returns the operations, two per product.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn int8(n: u64) -> u64 {
    let x = _mm512_set1_epi8(1);
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..n {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, x, x);
            opaque(sum);
        }
    }
    n * CHAINS as u64 * 2 * 64
}

/// As [`int8`], of bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn bf16(n: u64) -> u64 {
    // SAFETY: registers of one size, any bits are a value.
    let ones = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(0x3f80)) };
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..n {
        for sum in &mut sums {
            let product = _mm512_dpbf16_ps(_mm512_castsi512_ps(*sum), ones, ones);
            *sum = _mm512_castps_si512(product);
            opaque(sum);
        }
    }
    n * CHAINS as u64 * 2 * 32
}
