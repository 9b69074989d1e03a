//! Attention with NEON: a panel's step is four registers.

use std::arch::aarch64::*;

use super::{
    AttentionTable, F16, F32, KEY_BLOCK, PANEL, PanelProduct, Panels, Q8Keys, Q8Values, SoftRow,
    Turn, products,
};
use crate::arch::neon::{exp, half_to_f32, sum_lanes};

pub(in crate::arch) static TABLE: AttentionTable = AttentionTable {
    product_f32: product::<F32>,
    product_f16: product::<F16>,
    product_q8_keys: product::<Q8Keys>,
    product_q8_values: product::<Q8Values>,
    turn_f32: turn::<F32>,
    turn_f16: turn::<F16>,
    turn_q8: turn::<Q8Values>,
    soften,
};

// Sixteen sums hide the latency of the additions; with what they are made of, they fit 32 registers.
products!("neon", [4, 2, 1, 1, 1, 1, 1, 1]);

const LANES: usize = 4;
/// Registers of a step.
const STEP: usize = PANEL / LANES;

/// How a quarter of a step of a panel is read.
trait Load {
    /// # Safety
    /// The CPU has NEON; panel and step are inside of `b`, `quarter` is below 4.
    unsafe fn load(b: &Panels, panel: usize, step: usize, quarter: usize) -> float32x4_t;

    /// A whole step.
    ///
    /// # Safety
    /// As for [`Self::load`].
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn step(b: &Panels, panel: usize, step: usize) -> [float32x4_t; STEP] {
        // SAFETY: the caller's promise.
        [0, 1, 2, 3].map(|quarter| unsafe { Self::load(b, panel, step, quarter) })
    }
}

impl Load for F32 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize, quarter: usize) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe { vld1q_f32(b.step::<f32>(panel, step).add(quarter * LANES)) }
    }
}

impl Load for F16 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize, quarter: usize) -> float32x4_t {
        // SAFETY: the caller's promise.
        half_to_f32(unsafe { vld1_u16(b.step::<u16>(panel, step).add(quarter * LANES)) })
    }
}

impl Load for Q8Keys {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize, quarter: usize) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe {
            let scales = vld1_u16(b.key_scales(panel, step).add(quarter * LANES));
            vmulq_f32(quants(b, panel, step, quarter), half_to_f32(scales))
        }
    }
}

impl Load for Q8Values {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize, quarter: usize) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = vdup_n_u16(*b.value_scale(panel, step));
            vmulq_f32(quants(b, panel, step, quarter), half_to_f32(scale))
        }
    }
}

/// # Safety
/// As for [`Load::load`].
#[target_feature(enable = "neon")]
#[inline]
unsafe fn quants(b: &Panels, panel: usize, step: usize, quarter: usize) -> float32x4_t {
    // SAFETY: the caller's promise: four quants.
    let four = unsafe {
        let four = b.step::<i8>(panel, step).add(quarter * LANES);
        four.cast::<u32>().read_unaligned()
    };
    let wide = vmovl_s8(vcreate_s8(u64::from(four)));
    vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))
}

/// Rows of one pass over a panel: the sums of more would not fit the registers.
const PASS: usize = 4;

/// # Safety
/// See `ProductFn`; `R` rows, and `V` panels from `panel`.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn tile<L: Load, const R: usize, const V: usize>(args: &PanelProduct, panel: usize) {
    // SAFETY: the passes cover the rows.
    unsafe {
        match R {
            1 => pass::<L, 1, V>(args, panel, 0),
            2 => pass::<L, 2, V>(args, panel, 0),
            3 => pass::<L, 3, V>(args, panel, 0),
            _ => pass::<L, PASS, V>(args, panel, 0),
        }
        match R {
            5 => pass::<L, 1, V>(args, panel, PASS),
            6 => pass::<L, 2, V>(args, panel, PASS),
            7 => pass::<L, 3, V>(args, panel, PASS),
            8 => pass::<L, 4, V>(args, panel, PASS),
            _ => {}
        }
    }
}

/// # Safety
/// As for [`tile`], with `R` rows from `first`.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn pass<L: Load, const R: usize, const V: usize>(
    args: &PanelProduct,
    panel: usize,
    first: usize,
) {
    let mut sums = [[[vdupq_n_f32(0.0); STEP]; V]; R];
    let c = |r: usize, v: usize, quarter: usize| {
        let row = (first + r) * args.c_stride;
        let panel = (panel + v) * PANEL;
        args.c.wrapping_add(row + panel + quarter * LANES)
    };
    if args.add {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, sums) in sums.iter_mut().enumerate() {
                for (quarter, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: the sums of a row and a panel.
                    *sum = unsafe { vld1q_f32(c(r, v, quarter)) };
                }
            }
        }
    }
    for step in args.steps.clone() {
        let mut b = [[vdupq_n_f32(0.0); STEP]; V];
        for (v, b) in b.iter_mut().enumerate() {
            // SAFETY: a step of a panel.
            *b = unsafe { L::step(&args.b, panel + v, step) };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: a step of a row.
            let a = unsafe { *args.a.add((first + r) * args.a_stride + step) };
            for (sums, b) in sums.iter_mut().zip(&b) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = vfmaq_n_f32(*sum, *b, a);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, sums) in sums.iter().enumerate() {
            for (quarter, sum) in sums.iter().enumerate() {
                // SAFETY: as above.
                unsafe { vst1q_f32(c(r, v, quarter), *sum) };
            }
        }
    }
}

/// # Safety
/// See `TurnFn`.
#[target_feature(enable = "neon")]
unsafe fn turn<L: Load>(args: &Turn) {
    for first_lane in (args.key_panels.start * PANEL..args.key_panels.end * PANEL).step_by(LANES) {
        let (key_panel, lane) = (first_lane / PANEL, first_lane % PANEL);
        for first_dim in (0..args.n_dims).step_by(LANES) {
            let (panel, quarter) = (first_dim / PANEL, first_dim % PANEL / LANES);
            // SAFETY: four of 64 positions of one of the panels.
            let row = |i: usize| unsafe { L::load(&args.b, panel, first_lane + i, quarter) };
            let dims = transpose([row(0), row(1), row(2), row(3)]);
            for (at, dim) in dims.into_iter().enumerate().take(args.n_dims - first_dim) {
                let to = (key_panel * args.n_dims + first_dim + at) * PANEL + lane;
                // SAFETY: four positions of one of the dimensions of a key panel.
                unsafe { vst1q_f32(args.out.add(to), dim) };
            }
        }
    }
}

/// Rows to columns, by pairs and halves of a register.
#[target_feature(enable = "neon")]
#[inline]
fn transpose([a, b, c, d]: [float32x4_t; LANES]) -> [float32x4_t; LANES] {
    let wide = |v: float32x4_t| vreinterpretq_f64_f32(v);
    let (even_ab, odd_ab) = (wide(vtrn1q_f32(a, b)), wide(vtrn2q_f32(a, b)));
    let (even_cd, odd_cd) = (wide(vtrn1q_f32(c, d)), wide(vtrn2q_f32(c, d)));
    [
        vreinterpretq_f32_f64(vtrn1q_f64(even_ab, even_cd)),
        vreinterpretq_f32_f64(vtrn1q_f64(odd_ab, odd_cd)),
        vreinterpretq_f32_f64(vtrn2q_f64(even_ab, even_cd)),
        vreinterpretq_f32_f64(vtrn2q_f64(odd_ab, odd_cd)),
    ]
}

#[target_feature(enable = "neon")]
fn soften(scores: &mut [[f32; KEY_BLOCK]], rows: &mut [SoftRow], scale: f32) {
    const N: usize = KEY_BLOCK / LANES;
    let lowest = vdupq_n_f32(f32::NEG_INFINITY);
    for (scores, row) in scores.iter_mut().zip(rows) {
        if row.from >= row.to {
            row.shrink = 1.0;
            continue;
        }
        let mut values = [vdupq_n_f32(0.0); N];
        let mut highest = lowest;
        for (at, value) in values.iter_mut().enumerate() {
            // SAFETY: four of the 64 scores.
            let score = unsafe { vld1q_f32(scores.as_ptr().add(at * LANES)) };
            *value = vmulq_n_f32(score, scale);
            // The number, when the other operand is NaN.
            highest = vmaxnmq_f32(highest, vbslq_f32(seen(row, at * LANES), *value, lowest));
        }
        let shift = vdupq_n_f32(row.rise(vmaxnmvq_f32(highest)));
        let mut sum = vdupq_n_f32(0.0);
        for (at, value) in values.iter().enumerate() {
            let weight = vreinterpretq_u32_f32(exp(vsubq_f32(*value, shift)));
            let weight = vreinterpretq_f32_u32(vandq_u32(weight, seen(row, at * LANES)));
            sum = vaddq_f32(sum, weight);
            // SAFETY: as above.
            unsafe { vst1q_f32(scores.as_mut_ptr().add(at * LANES), weight) };
        }
        row.total = row.total * row.shrink + sum_lanes(sum);
    }
}

/// All bits of the lanes, of four positions from `first`, that the row sees.
#[target_feature(enable = "neon")]
#[inline]
fn seen(row: &SoftRow, first: usize) -> uint32x4_t {
    let lanes = [0, 1, 2, 3].map(|lane| (first + lane) as u32);
    // SAFETY: the array has four values.
    let position = unsafe { vld1q_u32(lanes.as_ptr()) };
    vandq_u32(
        vcgeq_u32(position, vdupq_n_u32(row.from as u32)),
        vcltq_u32(position, vdupq_n_u32(row.to as u32)),
    )
}
