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
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
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
    /// Where the panels of the block begin that is read after this one, for hints.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "hints are given on x86 only")
    )]
    pub(crate) next: *const u8,
    /// Panels of the block.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "hints are given on x86 only")
    )]
    pub(crate) n_panels: usize,
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

    /// Address of a step of a panel, for hints: of panels beyond this block's, in the block that is read next.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn ahead(&self, panel: usize, step: usize, size: usize) -> *const i8 {
        let (data, panel) = match panel.checked_sub(self.n_panels) {
            None => (self.data, panel),
            Some(beyond) => (self.next, beyond),
        };
        let at = (panel * self.n_steps + step) * PANEL * size;
        data.wrapping_add(at).cast()
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
/// For 1 to 8 rows, the panels that are taken together.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! products {
    ($features:literal, [$v1:literal, $v2:literal, $v3:literal, $v4:literal, $v5:literal, $v6:literal, $v7:literal, $v8:literal]) => {
        /// # Safety
        /// See `ProductFn`.
        #[target_feature(enable = $features)]
        unsafe fn product<L: Load>(args: &PanelProduct) {
            // SAFETY: the same contract; the number of rows is the one that the arguments name.
            unsafe {
                match args.n_rows {
                    0 => {}
                    1 => rows::<L, 1, $v1>(args),
                    2 => rows::<L, 2, $v2>(args),
                    3 => rows::<L, 3, $v3>(args),
                    4 => rows::<L, 4, $v4>(args),
                    5 => rows::<L, 5, $v5>(args),
                    6 => rows::<L, 6, $v6>(args),
                    7 => rows::<L, 7, $v7>(args),
                    _ => rows::<L, 8, $v8>(args),
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
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use products;

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::*;
    use crate::isa::Isa;

    /// Largest error of a sum of products against the twin's, over the sum of magnitudes and the number of products:
    /// the twin rounds every product, the others only sums.
    const SUM_ERROR: f32 = 2.0 * f32::EPSILON;
    /// Largest relative error of a weight or a total against the twin's: `exp`, and 64 sums in another order.
    const SOFT_ERROR: f32 = 1e-5;

    /// A block in one format.
    struct Block {
        data: Vec<u8>,
        scales: Vec<u16>,
        n_steps: usize,
    }

    impl Block {
        /// From numbers in -1..1 `[panel, step, 16]`; scales are large enough for keys and for values.
        fn new(size: usize, n_steps: usize, numbers: &[f32]) -> Self {
            let data = numbers.iter().flat_map(|v| match size {
                4 => v.to_le_bytes().to_vec(),
                2 => f16::from_f32(*v).to_le_bytes().to_vec(),
                _ => vec![((v * 127.0) as i8).cast_unsigned()],
            });
            let scales = numbers.iter().map(|v| f16::from_f32(v * 0.01).to_bits());
            Self {
                data: data.collect(),
                scales: scales.collect(),
                n_steps,
            }
        }

        fn panels(&self) -> Panels {
            Panels {
                data: self.data.as_ptr(),
                scales: self.scales.as_ptr(),
                n_steps: self.n_steps,
                next: self.data.as_ptr(),
                n_panels: usize::MAX,
            }
        }
    }

    fn tables() -> impl Iterator<Item = (Isa, &'static AttentionTable)> {
        let isas = Isa::available().into_iter();
        isas.map(|isa| (isa, crate::arch::table(isa).unwrap().attention))
    }

    fn twin() -> &'static AttentionTable {
        crate::arch::table(Isa::Scalar).unwrap().attention
    }

    fn numbers(n: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-1.0f32..1.0, n)
    }

    /// Which of a table's products reads which numbers.
    fn products(table: &AttentionTable) -> [(usize, ProductFn); 4] {
        [
            (4, table.product_f32),
            (2, table.product_f16),
            (1, table.product_q8_keys),
            (1, table.product_q8_values),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn products_agree_with_the_twin(
            (n_rows, n_panels, n_steps, a, b, c) in (1usize..=8, 1usize..=7, 1usize..70).prop_flat_map(|(r, p, s)| {
                (Just(r), Just(p), Just(s), numbers(r * s), numbers(p * s * PANEL), numbers(r * p * PANEL))
            }),
            cut in 0.0f32..1.0, add: bool,
        ) {
            let from = (cut * n_steps as f32) as usize;
            let first = (cut * n_panels as f32) as usize;
            let run = |product: ProductFn, block: &Block, steps: Range<usize>, panels: Range<usize>, add, c: &mut [f32]| {
                let args = PanelProduct {
                    a: a.as_ptr(),
                    a_stride: n_steps,
                    n_rows,
                    b: block.panels(),
                    panels,
                    steps,
                    c: c.as_mut_ptr(),
                    c_stride: n_panels * PANEL,
                    add,
                };
                // SAFETY: the table is the CPU's, and the operands have the sizes that the arguments name.
                unsafe { product(&args) };
            };
            for (isa, table) in tables() {
                for ((size, product), (_, twin)) in products(table).into_iter().zip(products(twin())) {
                    let block = Block::new(size, n_steps, &b);
                    let (mut got, mut expected) = (c.clone(), c.clone());
                    run(product, &block, from..n_steps, first..n_panels, add, &mut got);
                    run(twin, &block, from..n_steps, first..n_panels, add, &mut expected);
                    let bound = SUM_ERROR * (n_steps + 1) as f32 * (n_steps + 1) as f32;
                    for (got, expected) in got.iter().zip(&expected) {
                        prop_assert!((got - expected).abs() <= bound, "{isa} {size}: {got} {expected}");
                    }
                    // In two goes, and panel by panel, the same bits.
                    let mut pieces = c.clone();
                    for panel in first..n_panels {
                        let middle = from + (n_steps - from) / 2;
                        run(product, &block, from..middle, panel..panel + 1, add, &mut pieces);
                        run(product, &block, middle..n_steps, panel..panel + 1, true, &mut pieces);
                    }
                    prop_assert_eq!(&pieces, &got, "{} {}", isa, size);
                }
            }
        }

        #[test]
        fn turned_values_are_the_twins(
            (n_dims, b) in (1usize..40).prop_flat_map(|n| (Just(n), numbers(n.div_ceil(PANEL) * KEY_BLOCK * PANEL))),
            first in 0usize..4, last in 0usize..4,
        ) {
            let key_panels = first.min(last)..first.max(last) + 1;
            for (isa, table) in tables() {
                let turns = |table: &AttentionTable| [(4, table.turn_f32), (2, table.turn_f16), (1, table.turn_q8)];
                for ((size, turn), (_, twin)) in turns(table).into_iter().zip(turns(twin())) {
                    let block = Block::new(size, KEY_BLOCK, &b);
                    let run = |turn: TurnFn| {
                        let mut out = vec![9.0f32; KEY_BLOCK * n_dims];
                        let args = Turn {
                            b: block.panels(),
                            n_dims,
                            key_panels: key_panels.clone(),
                            out: out.as_mut_ptr(),
                        };
                        // SAFETY: the table is the CPU's, and the operands have the sizes that the arguments name.
                        unsafe { turn(&args) };
                        out
                    };
                    prop_assert_eq!(run(turn), run(twin), "{} {}", isa, size);
                }
            }
        }

        #[test]
        fn softmax_steps_agree_with_the_twin(
            scores in numbers(2 * KEY_BLOCK), ends in prop::collection::vec(0usize..=KEY_BLOCK, 2), sharp in 0.0f32..40.0,
        ) {
            let (from, to) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
            let run = |table: &AttentionTable| {
                let mut blocks = scores.as_chunks::<KEY_BLOCK>().0.to_vec();
                let start = SoftRow { from, to, ..SoftRow::START };
                let mut rows = [start, SoftRow { highest: 20.0, total: 3.0, ..start }];
                // SAFETY: the table is the CPU's, ranges end at 64, and there are as many rows as scores.
                unsafe { (table.soften)(&mut blocks, &mut rows, sharp) };
                (blocks, rows)
            };
            let close = |a: f32, b: f32| (a - b).abs() <= SOFT_ERROR * a.abs().max(b.abs()) + 1e-30;
            let (expected, expected_rows) = run(twin());
            for (isa, table) in tables() {
                let (got, rows) = run(table);
                for (row, expected) in rows.iter().zip(&expected_rows) {
                    prop_assert_eq!(row.highest, expected.highest, "{}", isa);
                    prop_assert!(close(row.total, expected.total), "{isa}: {row:?} {expected:?}");
                    prop_assert_eq!(row.shrink, expected.shrink, "{}", isa);
                }
                for (at, (a, b)) in got.iter().flatten().zip(expected.iter().flatten()).enumerate() {
                    prop_assert!(close(*a, *b), "{isa}, {at} of {from}..{to}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn a_nan_score_that_is_seen_reaches_the_total_and_no_other_does() {
        for (isa, table) in tables() {
            for at in 0..KEY_BLOCK {
                let mut scores = [[0.5f32; KEY_BLOCK]];
                scores[0][at] = f32::NAN;
                let mut rows = [SoftRow {
                    from: 5,
                    to: 41,
                    ..SoftRow::START
                }];
                // SAFETY: the table is the CPU's, ranges end at 64, and there are as many rows as scores.
                unsafe { (table.soften)(&mut scores, &mut rows, 1.0) };
                let seen = (5..41).contains(&at);
                assert_eq!(rows[0].total.is_nan(), seen, "{isa} {at}");
                assert_eq!(scores[0][at].is_nan(), seen, "{isa} {at}");
                if !seen {
                    assert_eq!((rows[0].highest, rows[0].total), (0.5, 36.0));
                }
            }
        }
    }
}
