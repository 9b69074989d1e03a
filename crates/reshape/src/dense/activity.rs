//! Which neurons of a dense model's feed-forwards work together: for every neuron the tokens on which it is among the most
//! active ones. A bit for every neuron and token, so memory is known before anything runs.

use std::collections::BTreeMap;

use cadre_engine::{Observer, RoutingEvent, RowsEvent};

use crate::error::{ReshapeError, Result};

/// The part of a token's neurons that count as active.
const ACTIVE: f64 = 0.1;

/// For every layer and neuron the tokens on which it is active.
#[derive(Debug, Clone, Default)]
pub struct Activity {
    n_tokens: usize,
    layers: BTreeMap<usize, Bits>,
}

/// Neurons of a layer: `[width, words]`, a bit for each token.
#[derive(Debug, Clone)]
pub(super) struct Bits {
    pub(super) width: usize,
    words: usize,
    bits: Vec<u64>,
}

impl Bits {
    pub(super) fn new(width: usize, n_tokens: usize) -> Self {
        let words = n_tokens.div_ceil(64);
        Self {
            width,
            words,
            bits: vec![0; width * words],
        }
    }

    pub(super) fn set(&mut self, neuron: usize, token: usize) {
        self.bits[neuron * self.words + token / 64] |= 1 << (token % 64);
    }

    fn row(&self, neuron: usize) -> &[u64] {
        &self.bits[neuron * self.words..][..self.words]
    }

    /// Tokens on which `neuron` is active.
    pub(super) fn count(&self, neuron: usize) -> u32 {
        self.row(neuron).iter().map(|word| word.count_ones()).sum()
    }

    /// Those tokens, ascending.
    pub(super) fn tokens(&self, neuron: usize) -> impl Iterator<Item = usize> + '_ {
        let words = self.row(neuron).iter().enumerate();
        words.flat_map(|(at, word)| {
            let mut word = *word;
            std::iter::from_fn(move || {
                (word != 0).then(|| {
                    let bit = word.trailing_zeros() as usize;
                    word &= word - 1;
                    at * 64 + bit
                })
            })
        })
    }

    /// Room for tokens, some of which may have been unused.
    pub(super) fn n_tokens(&self) -> usize {
        self.words * 64
    }
}

impl Activity {
    /// Tokens that were seen.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&Bits> {
        self.layers.get(&layer).ok_or_else(|| ReshapeError::Option {
            name: "the activity",
            problem: format!("has nothing of layer {layer}; record it with this model"),
        })
    }
}

/// Watches a model read text; the sequences one after the other, each from its beginning.
#[derive(Debug)]
pub struct ActivityRecorder {
    /// Most tokens that are recorded.
    room: usize,
    /// Tokens of the sequences before this one.
    before: usize,
    activity: Activity,
    order: Vec<(f32, usize)>,
}

impl ActivityRecorder {
    /// Records at most `room` tokens; more are not looked at.
    #[must_use]
    pub fn new(room: usize) -> Self {
        Self {
            room,
            before: 0,
            activity: Activity::default(),
            order: Vec::new(),
        }
    }

    /// Says that a sequence of `n_tokens` has been read.
    pub fn end_sequence(&mut self, n_tokens: usize) {
        self.before = (self.before + n_tokens).min(self.room);
        self.activity.n_tokens = self.before;
    }

    /// What was seen.
    #[must_use]
    pub fn finish(self) -> Activity {
        self.activity
    }
}

impl Observer for ActivityRecorder {
    fn routed(&mut self, _event: &RoutingEvent<'_>) {}

    fn wants_neurons(&self) -> bool {
        true
    }

    fn activated(&mut self, event: &RowsEvent<'_>) {
        let first = self.before + event.first_position;
        let room = self.room.saturating_sub(first);
        let width = event.width;
        let bits = self.activity.layers.entry(event.layer);
        let bits = bits.or_insert_with(|| Bits::new(width, self.room));
        let n_active = ((width as f64 * ACTIVE) as usize).max(1);
        for (at, row) in event.rows.chunks_exact(width).take(room).enumerate() {
            self.order.clear();
            let pairs = row.iter().enumerate();
            self.order
                .extend(pairs.map(|(neuron, value)| (value.abs(), neuron)));
            let largest =
                |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            if n_active < width {
                self.order.select_nth_unstable_by(n_active, largest);
            }
            for (value, neuron) in &self.order[..n_active] {
                if *value > 0.0 {
                    bits.set(*neuron, first + at);
                }
            }
        }
    }
}
