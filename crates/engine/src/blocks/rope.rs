//! Rotary position embedding: pairs of a head's values turned by an angle that grows with the position.
//!
//! Frequencies come from `cadre_checkpoint::RopeConfig`. A pair is `(i, i + half)`, or `(2 i, 2 i + 1)` when the
//! checkpoint interleaves; values beyond the rotated part stay as they are.

use cadre_checkpoint::RopeConfig;

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

/// Cosines and sines for the positions of one chunk, `[n_tokens, half]` each.
#[derive(Debug, Default)]
pub(crate) struct RopeAngles {
    cos: Vec<f32>,
    sin: Vec<f32>,
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

    /// Fills `angles` for `n_tokens` positions from `position` of a session that can hold `n_ctx` tokens.
    ///
    /// The size of the session, not the tokens seen so far, chooses between usual and long frequencies: keys that are
    /// already stored cannot be turned again when a limit is crossed.
    pub(crate) fn angles(
        &self,
        position: usize,
        n_tokens: usize,
        n_ctx: usize,
        angles: &mut RopeAngles,
    ) {
        let frequencies = match &self.long {
            Some((limit, long)) if n_ctx > *limit => long,
            _ => &self.usual,
        };
        angles.half = frequencies.values.len();
        angles.interleaved = self.interleaved;
        angles.cos.clear();
        angles.sin.clear();
        for position in position..position + n_tokens {
            for frequency in &frequencies.values {
                // The product is rounded to f32 like in the reference implementation, which matters at
                // large positions; sine and cosine are then exact to the last bit of f32.
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                angles.cos.push(cos as f32 * frequencies.scale);
                angles.sin.push(sin as f32 * frequencies.scale);
            }
        }
    }
}

impl RopeAngles {
    /// Rotates one head of token `t` of the chunk.
    pub(crate) fn rotate(&self, t: usize, head: &mut [f32]) {
        let cos = &self.cos[t * self.half..][..self.half];
        let sin = &self.sin[t * self.half..][..self.half];
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotated(config: &RopeConfig, position: usize, head: &mut [f32]) {
        let mut angles = RopeAngles::default();
        Rope::new(config).angles(position, 1, 16, &mut angles);
        angles.rotate(0, head);
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
        let mut angles = RopeAngles::default();
        let rope = Rope::new(&config);
        for (n_ctx, angle, scale) in [(8, 2.0f32, 1.0), (9, 0.5, 2.0)] {
            rope.angles(2, 1, n_ctx, &mut angles);
            let mut head = [1.0, 0.0];
            angles.rotate(0, &mut head);
            assert_near(&head, &[scale * angle.cos(), scale * angle.sin()]);
        }
    }
}
