//! The scalar twins of attention's kernels.

use half::f16;

use super::{
    AttentionTable, F16, F32, KEY_BLOCK, PANEL, PanelProduct, Panels, Q8Keys, Q8Values, SoftRow,
    Turn,
};

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

/// How an element of a panel is read.
trait Load {
    /// # Safety
    /// Panel and step are inside of `b`, and `lane` is below 16.
    unsafe fn load(b: &Panels, panel: usize, step: usize, lane: usize) -> f32;
}

impl Load for F32 {
    #[inline(always)]
    unsafe fn load(b: &Panels, panel: usize, step: usize, lane: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *b.step::<f32>(panel, step).add(lane) }
    }
}

impl Load for F16 {
    #[inline(always)]
    unsafe fn load(b: &Panels, panel: usize, step: usize, lane: usize) -> f32 {
        // SAFETY: the caller's promise.
        widen(unsafe { *b.step::<u16>(panel, step).add(lane) })
    }
}

impl Load for Q8Keys {
    #[inline(always)]
    unsafe fn load(b: &Panels, panel: usize, step: usize, lane: usize) -> f32 {
        // SAFETY: the caller's promise.
        let (quant, scale) = unsafe {
            (
                *b.step::<i8>(panel, step).add(lane),
                *b.key_scales(panel, step).add(lane),
            )
        };
        f32::from(quant) * widen(scale)
    }
}

impl Load for Q8Values {
    #[inline(always)]
    unsafe fn load(b: &Panels, panel: usize, step: usize, lane: usize) -> f32 {
        // SAFETY: the caller's promise.
        let (quant, scale) = unsafe {
            (
                *b.step::<i8>(panel, step).add(lane),
                *b.value_scale(panel, step),
            )
        };
        f32::from(quant) * widen(scale)
    }
}

fn widen(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// # Safety
/// See `ProductFn`.
unsafe fn product<L: Load>(args: &PanelProduct) {
    for panel in args.panels.clone() {
        for r in 0..args.n_rows {
            let c = args.c.wrapping_add(r * args.c_stride + panel * PANEL);
            let mut sums = [0.0f32; PANEL];
            if args.add {
                // SAFETY: the 16 sums of a row and a panel.
                sums = unsafe { c.cast::<[f32; PANEL]>().read_unaligned() };
            }
            for step in args.steps.clone() {
                // SAFETY: a step of the row.
                let a = unsafe { *args.a.add(r * args.a_stride + step) };
                for (lane, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: a step of the panel.
                    *sum += a * unsafe { L::load(&args.b, panel, step, lane) };
                }
            }
            // SAFETY: as above.
            unsafe { c.cast::<[f32; PANEL]>().write_unaligned(sums) };
        }
    }
}

/// # Safety
/// See `TurnFn`.
unsafe fn turn<L: Load>(args: &Turn) {
    for key_panel in args.key_panels.clone() {
        for dim in 0..args.n_dims {
            for lane in 0..PANEL {
                let position = key_panel * PANEL + lane;
                // SAFETY: one of 64 positions and one of the dimensions.
                unsafe {
                    let value = L::load(&args.b, dim / PANEL, position, dim % PANEL);
                    *args.out.add((key_panel * args.n_dims + dim) * PANEL + lane) = value;
                }
            }
        }
    }
}

fn soften(scores: &mut [[f32; KEY_BLOCK]], rows: &mut [SoftRow], scale: f32) {
    for (scores, row) in scores.iter_mut().zip(rows) {
        if row.from >= row.to {
            row.shrink = 1.0;
            continue;
        }
        let mut highest = f32::NEG_INFINITY;
        for score in &mut scores[row.from..row.to] {
            *score *= scale;
            highest = highest.max(*score);
        }
        let shift = row.rise(highest);
        let mut sum = 0.0;
        for (position, score) in scores.iter_mut().enumerate() {
            let seen = position >= row.from && position < row.to;
            *score = if seen { (*score - shift).exp() } else { 0.0 };
            sum += *score;
        }
        row.total = row.total * row.shrink + sum;
    }
}
