//! Rotary position embedding, "half-split": value `i` of a head is paired with value `i + half`.

/// The rotary frequencies of a head.
#[derive(Debug)]
pub(crate) struct Rope {
    /// `[head_dim / 2]`, rounded to f32 as the models were trained with.
    frequencies: Vec<f32>,
}

/// Cosines and sines for the positions of one chunk, `[n_tokens, head_dim / 2]` each.
#[derive(Debug, Default)]
pub(crate) struct RopeAngles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rope {
    /// `frequency_i = theta^(-2 i / head_dim)`; `head_dim` is even.
    pub(crate) fn new(head_dim: usize, theta: f64) -> Self {
        let frequency = |i: usize| theta.powf(-2.0 * i as f64 / head_dim as f64) as f32;
        Self {
            frequencies: (0..head_dim / 2).map(frequency).collect(),
        }
    }

    /// Fills `angles` for `n_tokens` positions from `position`.
    pub(crate) fn angles(&self, position: usize, n_tokens: usize, angles: &mut RopeAngles) {
        angles.half = self.frequencies.len();
        angles.cos.clear();
        angles.sin.clear();
        for position in position..position + n_tokens {
            for frequency in &self.frequencies {
                // The product is rounded to f32 like in the reference implementation, which matters at
                // large positions; sine and cosine are then exact to the last bit of f32.
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                angles.cos.push(cos as f32);
                angles.sin.push(sin as f32);
            }
        }
    }
}

impl RopeAngles {
    pub(crate) fn with_capacity(n_tokens: usize, head_dim: usize) -> Self {
        let n = n_tokens * head_dim / 2;
        Self {
            cos: Vec::with_capacity(n),
            sin: Vec::with_capacity(n),
            half: head_dim / 2,
        }
    }

    /// Rotates one head of token `t` of the chunk.
    pub(crate) fn rotate(&self, t: usize, head: &mut [f32]) {
        let (low, high) = head.split_at_mut(self.half);
        let cos = &self.cos[t * self.half..][..self.half];
        let sin = &self.sin[t * self.half..][..self.half];
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_half_a_head_apart_and_turn_by_their_frequency() {
        // head_dim 4, theta 100: frequencies 1 and 0.1.
        let rope = Rope::new(4, 100.0);
        let mut angles = RopeAngles::with_capacity(2, 4);
        rope.angles(1, 2, &mut angles);
        let mut head = [1.0, 0.0, 0.0, 1.0];
        angles.rotate(1, &mut head); // position 2
        let expected = [2f32.cos(), -0.2f32.sin(), 2f32.sin(), 0.2f32.cos()];
        for (got, expected) in head.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{head:?}");
        }
    }

    #[test]
    fn position_zero_changes_nothing() {
        let mut angles = RopeAngles::default();
        Rope::new(8, 10_000.0).angles(0, 1, &mut angles);
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        angles.rotate(0, &mut head);
        assert_eq!(head, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    }
}
