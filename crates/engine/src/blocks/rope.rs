//! Rotary position embedding: pairs of a head's values turned by an angle that grows with the position.
//!
//! Frequencies come from `cadre_checkpoint::RopeConfig`. A pair is `(i, i + half)`, or `(2 i, 2 i + 1)` when the
//! checkpoint interleaves; values beyond the rotated part stay as they are.

use std::ops::Range;

use cadre_checkpoint::RopeConfig;
use cadre_kernels::Compute;

use crate::batch::{Span, n_rows, span_of};

/// The rotary frequencies of a head.
#[derive(Debug)]
pub(crate) struct Rope {
    interleaved: bool,
    /// For contexts up to the limit of `long`.
    usual: Frequencies,
    /// For longer contexts, where the model has others for them: the limit, and the frequencies beyond.
    long: Option<(usize, Frequencies)>,
}

#[derive(Debug)]
struct Frequencies {
    /// `[rotated values / 2]`, rounded to f32 as the models were trained with.
    values: Vec<f32>,
    /// Factor on sines and cosines.
    scale: f32,
}

/// Cosines and sines for the positions of the rows of a pass.
#[derive(Debug, Default)]
pub(crate) struct RopeAngles {
    /// `[n_rows, 2, half]`: cosines, then sines.
    values: Vec<f32>,
    half: usize,
    interleaved: bool,
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig) -> Self {
        let frequencies = |n_positions| {
            let (values, scale) = config.frequencies(n_positions);
            Frequencies { values, scale }
        };
        Self {
            interleaved: config.interleaved,
            usual: frequencies(1),
            long: config
                .changes_beyond()
                .map(|limit| (limit, frequencies(limit.saturating_add(1)))),
        }
    }

    /// Fills `angles` for the positions of `spans`.
    ///
    /// The size of a session, not the tokens seen so far, chooses between usual and long frequencies: keys that are
    /// already stored cannot be turned again when a limit is crossed.
    pub(crate) fn angles(&self, compute: &Compute, spans: &[Span], angles: &mut RopeAngles) {
        let half = self.usual.values.len();
        angles.half = half;
        angles.interleaved = self.interleaved;
        angles.values.clear();
        angles.values.resize(n_rows(spans) * 2 * half, 0.0);
        if half == 0 {
            return;
        }
        // A sine and a cosine in f64 take about as long as a hundred multiplications.
        let work = 100 * half;
        compute.for_each_chunk(&mut angles.values, 2 * half, work, |row, values| {
            let (_, span) = span_of(spans, row);
            let frequencies = match &self.long {
                Some((limit, long)) if span.n_ctx > *limit => long,
                _ => &self.usual,
            };
            let position = span.position_of(row) as f32;
            let (cos_row, sin_row) = values.split_at_mut(half);
            let turns = cos_row.iter_mut().zip(sin_row);
            for ((cos, sin), frequency) in turns.zip(&frequencies.values) {
                // The product is rounded to f32 like in the reference implementation, which matters at
                // large positions; sine and cosine are then exact to the last bit of f32.
                let (s, c) = f64::from(position * frequency).sin_cos();
                *cos = c as f32 * frequencies.scale;
                *sin = s as f32 * frequencies.scale;
            }
        });
    }
}

impl RopeAngles {
    /// Rotates one head of row `row`.
    pub(crate) fn rotate(&self, row: usize, head: &mut [f32]) {
        let (cos, sin) = self.values[row * 2 * self.half..][..2 * self.half].split_at(self.half);
        let turn = |a: f32, b: f32, cos: f32, sin: f32| (a * cos - b * sin, b * cos + a * sin);
        if self.interleaved {
            let pairs = head.as_chunks_mut::<2>().0.iter_mut();
            for (([a, b], cos), sin) in pairs.zip(cos).zip(sin) {
                (*a, *b) = turn(*a, *b, *cos, *sin);
            }
        } else {
            let (low, high) = head.split_at_mut(self.half);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*a, *b) = turn(*a, *b, *cos, *sin);
            }
        }
    }

    /// Makes rows from `to` on those that `rows` were.
    pub(crate) fn move_rows(&mut self, rows: Range<usize>, to: usize) {
        let width = 2 * self.half;
        self.values
            .copy_within(rows.start * width..rows.end * width, to * width);
    }
}

#[cfg(test)]
mod tests {
    use cadre_kernels::Kernels;

    use super::*;

    fn angles(rope: &Rope, spans: &[Span]) -> RopeAngles {
        let compute = Compute::new(Kernels::detect(), 1);
        let mut angles = RopeAngles::default();
        rope.angles(&compute, spans, &mut angles);
        angles
    }

    fn span(first_row: usize, n_rows: usize, position: usize, n_ctx: usize) -> Span {
        Span {
            first_row,
            n_rows,
            position,
            n_ctx,
        }
    }

    fn rotated(config: &RopeConfig, position: usize, head: &mut [f32]) {
        angles(&Rope::new(config), &[span(0, 1, position, 16)]).rotate(0, head);
    }

    fn assert_near(got: &[f32], expected: &[f32]) {
        for (a, b) in got.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{got:?} {expected:?}");
        }
    }

    #[test]
    fn pairs_are_half_a_head_apart_and_turn_by_their_frequency() {
        // Four values, theta 100: frequencies 1 and 0.1.
        let config = RopeConfig::plain(100.0, 4);
        let mut head = [1.0, 0.0, 0.0, 1.0];
        rotated(&config, 2, &mut head);
        assert_near(
            &head,
            &[2f32.cos(), -0.2f32.sin(), 2f32.sin(), 0.2f32.cos()],
        );
    }

    #[test]
    fn interleaved_pairs_are_neighbours_and_the_rest_stays() {
        let config = RopeConfig {
            interleaved: true,
            ..RopeConfig::plain(100.0, 4)
        };
        let mut head = [1.0, 0.0, 0.0, 1.0, 7.0, 8.0];
        rotated(&config, 2, &mut head);
        let expected = [
            2f32.cos(),
            2f32.sin(),
            -0.2f32.sin(),
            0.2f32.cos(),
            7.0,
            8.0,
        ];
        assert_near(&head, &expected);
    }

    #[test]
    fn position_zero_changes_nothing() {
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        rotated(&RopeConfig::plain(10_000.0, 8), 0, &mut head);
        assert_eq!(head, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    }

    #[test]
    fn the_size_of_the_session_chooses_the_frequencies() {
        let config = RopeConfig {
            scaling: cadre_checkpoint::RopeScaling::LongRope {
                short: vec![1.0],
                long: vec![4.0],
                original: 8,
                short_mscale: 1.0,
                long_mscale: 2.0,
            },
            ..RopeConfig::plain(100.0, 2)
        };
        let rope = Rope::new(&config);
        // Sessions of both kinds in one pass.
        let mut angles = angles(&rope, &[span(0, 1, 2, 8), span(1, 1, 2, 9)]);
        let check = |angles: &RopeAngles, row, angle: f32, scale: f32| {
            let mut head = [1.0, 0.0];
            angles.rotate(row, &mut head);
            assert_near(&head, &[scale * angle.cos(), scale * angle.sin()]);
        };
        check(&angles, 0, 2.0, 1.0);
        check(&angles, 1, 0.5, 2.0);
        angles.move_rows(1..2, 0);
        check(&angles, 0, 0.5, 2.0);
    }
}
