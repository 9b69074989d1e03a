//! The kernels of attention: a product with panels of 16 lanes, the softmax step, and turning values into keys.
//!
//! Both products of attention are one kernel. A *panel* is a `[steps, 16]` piece of keys or values: of keys, a step is
//! one of the dimensions and a lane one of 16 positions; of values, a step is one of the positions and a lane one of 16
//! dimensions. Row `r` of the result is the sum over steps, in their order, of `a[r, step] * panel[step]`, so no lane is
//! ever added to another, and an element has the same bits whatever other rows and panels are computed with it.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod scalar;

use std::ops::Range;

/// Lanes of a panel.
pub(crate) const PANEL: usize = 16;
/// Positions that are scored and mixed together; blocks are cut at multiples of it.
pub(crate) const KEY_BLOCK: usize = 64;
/// Most rows of one product.
pub(crate) const MAX_ROWS: usize = 8;
/// Dimensions that share a scale in the 8-bit format.
pub(crate) const SCALE_GROUP: usize = 32;

/// The panels of one block of 64 positions, one after the other.
///
/// Of keys in 8 bits, `scales` are `[panel, steps / 32, 16]`: one per position and 32 dimensions. Of values in 8 bits
/// they are `[panel / 2, steps]`, the same thing by position. Other formats have none.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    pub(crate) data: *const u8,
    /// Bits of f16 numbers.
    pub(crate) scales: *const u16,
    /// Steps of a whole panel.
    pub(crate) n_steps: usize,
}

/// `c[r, panel, lane] (+)= sum over steps of a[r, step] * panel[step, lane]`.
pub(crate) struct PanelProduct {
    /// `a[r * a_stride + step]`.
    pub(crate) a: *const f32,
    pub(crate) a_stride: usize,
    /// At most [`MAX_ROWS`].
    pub(crate) n_rows: usize,
    pub(crate) b: Panels,
    pub(crate) panels: Range<usize>,
    pub(crate) steps: Range<usize>,
    /// `c[r * c_stride + panel * 16 + lane]`.
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    /// Whether the sums go on from what `c` holds; otherwise they start at zero.
    pub(crate) add: bool,
}

/// # Safety
/// The CPU has the table's instruction set; `n_rows` is at most [`MAX_ROWS`]; `a`, the panels and `c` are valid for
/// the rows, panels and steps that the arguments name.
pub(crate) type ProductFn = unsafe fn(&PanelProduct);

/// Values of a block turned into panels of keys, in f32: `out[key_panel, dim, lane] = value(16 * key_panel + lane, dim)`.
pub(crate) struct Turn {
    /// Panels of values.
    pub(crate) b: Panels,
    pub(crate) n_dims: usize,
    pub(crate) key_panels: Range<usize>,
    /// `[4, n_dims, 16]`.
    pub(crate) out: *mut f32,
}

/// # Safety
/// The CPU has the table's instruction set; the panels hold `n_dims` dimensions of 64 positions, and `out` may be
/// written where the key panels are.
pub(crate) type TurnFn = unsafe fn(&Turn);

/// Where the softmax of one query stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SoftRow {
    /// Positions of the block that the query sees.
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// The largest score so far.
    pub(crate) highest: f32,
    /// Sum of `exp(score - highest)` so far.
    pub(crate) total: f32,
    /// What sums of earlier blocks have to be multiplied by.
    pub(crate) shrink: f32,
}

impl SoftRow {
    /// Before the first score.
    pub(crate) const START: Self = Self {
        from: 0,
        to: 0,
        highest: f32::NEG_INFINITY,
        total: 0.0,
        shrink: 1.0,
    };

    /// Takes in a block's largest score and returns the shift of its exponentials.
    #[inline]
    fn rise(&mut self, highest: f32) -> f32 {
        let new = self.highest.max(highest);
        self.shrink = if new == self.highest {
            1.0
        } else {
            (self.highest - new).exp()
        };
        self.highest = new;
        new
    }
}

/// One step of the softmax: `scores[r][from..to] = exp(scale * score - highest)`, zero elsewhere, and the rows' sums.
/// Rows that see nothing of the block are left alone.
///
/// # Safety
/// The CPU has the table's instruction set; `to` is at most 64 in every row, and `scores` has as many rows.
pub(crate) type SoftenFn =
    unsafe fn(scores: &mut [[f32; KEY_BLOCK]], rows: &mut [SoftRow], scale: f32);

/// The kernels of attention for one instruction set.
pub(crate) struct AttentionTable {
    pub(crate) product_f32: ProductFn,
    pub(crate) product_f16: ProductFn,
    pub(crate) product_q8_keys: ProductFn,
    pub(crate) product_q8_values: ProductFn,
    pub(crate) turn_f32: TurnFn,
    pub(crate) turn_f16: TurnFn,
    pub(crate) turn_q8: TurnFn,
    pub(crate) soften: SoftenFn,
}

/// Numbers of 32 bits.
struct F32;
/// Numbers of 16 bits.
struct F16;
/// Keys in 8 bits.
struct Q8Keys;
/// Values in 8 bits.
struct Q8Values;

impl Panels {
    /// Address of a step of a panel, for elements of type `T`.
    ///
    /// # Safety
    /// The step is inside the data.
    #[inline(always)]
    unsafe fn step<T>(&self, panel: usize, step: usize) -> *const T {
        // SAFETY: the caller's promise.
        unsafe {
            self.data
                .cast::<T>()
                .add((panel * self.n_steps + step) * PANEL)
        }
    }

    /// Address of the 16 scales of a step of a panel of keys.
    ///
    /// # Safety
    /// As for [`Self::step`].
    #[inline(always)]
    unsafe fn key_scales(&self, panel: usize, step: usize) -> *const u16 {
        let n_groups = self.n_steps.div_ceil(SCALE_GROUP);
        // SAFETY: the caller's promise.
        unsafe {
            self.scales
                .add((panel * n_groups + step / SCALE_GROUP) * PANEL)
        }
    }

    /// Address of the scale of a step of a panel of values.
    ///
    /// # Safety
    /// As for [`Self::step`].
    #[inline(always)]
    unsafe fn value_scale(&self, panel: usize, step: usize) -> *const u16 {
        let group = panel / (SCALE_GROUP / PANEL);
        // SAFETY: the caller's promise.
        unsafe { self.scales.add(group * self.n_steps + step) }
    }
}

/// Defines a [`ProductFn`] for each way to load a panel, with `tile::<Load, ROWS, PANELS>` covering the result.
///
/// `$few`, `$many`: panels taken together with at most `$border` rows, and with more.
#[cfg(target_arch = "x86_64")]
macro_rules! products {
    ($features:literal, $few:literal, $many:literal) => {
        /// # Safety
        /// See `ProductFn`.
        #[target_feature(enable = $features)]
        unsafe fn product<L: Load>(args: &PanelProduct) {
            // SAFETY: the same contract; the number of rows is the one that the arguments name.
            unsafe {
                match args.n_rows {
                    0 => {}
                    1 => rows::<L, 1, $few>(args),
                    2 => rows::<L, 2, $few>(args),
                    3 => rows::<L, 3, $few>(args),
                    4 => rows::<L, 4, $few>(args),
                    5 => rows::<L, 5, $many>(args),
                    6 => rows::<L, 6, $many>(args),
                    7 => rows::<L, 7, $many>(args),
                    _ => rows::<L, 8, $many>(args),
                }
            }
        }

        /// # Safety
        /// See `ProductFn`; there are `R` rows.
        #[target_feature(enable = $features)]
        unsafe fn rows<L: Load, const R: usize, const V: usize>(args: &PanelProduct) {
            let mut panel = args.panels.start;
            while panel + V <= args.panels.end {
                // SAFETY: panels below the end.
                unsafe { tile::<L, R, V>(args, panel) };
                panel += V;
            }
            while panel < args.panels.end {
                // SAFETY: a panel below the end.
                unsafe { tile::<L, R, 1>(args, panel) };
                panel += 1;
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
use products;
