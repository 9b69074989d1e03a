//! Recorded routing in memory: which experts every token picked in every layer, and the passes a store would see.

use crate::expert::{ExpertId, Now};

/// The picks of some sequences, layer by layer in the order of tokens.
#[derive(Clone, Debug)]
pub struct Recording {
    n_experts: usize,
    layers: Vec<LayerPicks>,
    /// Tokens of every sequence.
    sequences: Vec<usize>,
}

#[derive(Clone, Debug, Default)]
struct LayerPicks {
    experts: Vec<u16>,
    /// Where the picks of each token end.
    ends: Vec<usize>,
}

impl LayerPicks {
    fn token(&self, token: usize) -> &[u16] {
        let start = token.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.experts[start..self.ends[token]]
    }
}

/// How sequences went through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passing {
    /// Tokens at the start of every sequence that were read as a prompt.
    pub n_prompt: usize,
    /// Prompt tokens of a pass, at least 1. The others come one by one.
    pub chunk: usize,
}

impl Default for Passing {
    fn default() -> Self {
        Self {
            n_prompt: 0,
            chunk: 512,
        }
    }
}

/// One layer's part of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// When it is.
    pub now: Now,
    /// Tokens of the pass.
    pub n_tokens: u32,
    /// Whether these are a prompt's.
    pub is_prompt: bool,
    /// Experts that are used, ascending, each with the number of its tokens.
    pub uses: &'a [(u16, u32)],
}

impl Recording {
    /// Without tokens, of a model of `n_layers` layers that have `n_experts` experts each.
    pub fn new(n_layers: usize, n_experts: usize) -> Self {
        Self {
            n_experts,
            layers: vec![LayerPicks::default(); n_layers],
            sequences: Vec::new(),
        }
    }

    /// Adds a sequence: for every layer the picks of its tokens, which must be as many in each. Returns whether they
    /// were, and all experts below the number of experts; otherwise nothing is added.
    #[must_use]
    pub fn push_sequence(&mut self, picks: &[Vec<&[u16]>]) -> bool {
        let n_tokens = picks.first().map_or(0, Vec::len);
        let is_known = |&expert: &u16| usize::from(expert) < self.n_experts;
        let fits = |tokens: &Vec<&[u16]>| {
            tokens.len() == n_tokens && tokens.iter().all(|token| token.iter().all(is_known))
        };
        if picks.len() != self.layers.len() || !picks.iter().all(fits) {
            return false;
        }
        for (layer, tokens) in self.layers.iter_mut().zip(picks) {
            for token in tokens {
                layer.experts.extend_from_slice(token);
                layer.ends.push(layer.experts.len());
            }
        }
        self.sequences.push(n_tokens);
        true
    }

    /// Layers that have experts.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Experts of a layer.
    pub fn n_experts(&self) -> usize {
        self.n_experts
    }

    /// Tokens of every sequence.
    pub fn sequences(&self) -> &[usize] {
        &self.sequences
    }

    /// Tokens over all sequences.
    pub fn n_tokens(&self) -> usize {
        self.sequences.iter().sum()
    }

    /// What a token picked in a layer, in the order of the record. Tokens are counted over all sequences.
    pub fn picks(&self, layer: usize, token: usize) -> &[u16] {
        self.layers[layer].token(token)
    }

    /// Calls `each` with every step of every pass, in order.
    pub fn steps(&self, passing: Passing, mut each: impl FnMut(Step<'_>)) {
        let mut n_uses = vec![0_u32; self.n_experts];
        let mut uses = Vec::with_capacity(self.n_experts);
        self.passes(passing, |first, n_tokens, is_prompt| {
            for (layer, picks) in self.layers.iter().enumerate() {
                for token in first..first + n_tokens {
                    for &expert in picks.token(token) {
                        n_uses[usize::from(expert)] += 1;
                    }
                }
                let used = |(expert, n): (usize, &mut u32)| {
                    let n = std::mem::take(n);
                    (n > 0).then_some((expert as u16, n))
                };
                uses.clear();
                uses.extend(n_uses.iter_mut().enumerate().filter_map(used));
                let now = Now {
                    token: first as u64,
                    layer: layer as u16,
                };
                each(Step {
                    now,
                    n_tokens: n_tokens as u32,
                    is_prompt,
                    uses: &uses,
                });
            }
        });
    }

    /// Every use of every expert, in order.
    pub fn uses(&self, passing: Passing, mut each: impl FnMut(ExpertId, Now)) {
        self.steps(passing, |step| {
            for &(expert, _) in step.uses {
                let layer = step.now.layer;
                each(ExpertId { layer, expert }, step.now);
            }
        });
    }

    /// Calls `each` with first token, number of tokens, and whether it is a prompt's, of every pass.
    fn passes(&self, passing: Passing, mut each: impl FnMut(usize, usize, bool)) {
        let mut first = 0;
        for &n_tokens in &self.sequences {
            let (end, mut next) = (first + n_tokens, first);
            let prompt = first + passing.n_prompt.min(n_tokens);
            while next < prompt {
                let n = passing.chunk.max(1).min(prompt - next);
                each(next, n, true);
                next += n;
            }
            while next < end {
                each(next, 1, false);
                next += 1;
            }
            first = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers; sequences of three tokens and of one.
    fn recording() -> Recording {
        let mut recording = Recording::new(2, 4);
        let first = [vec![&[3, 0][..], &[0, 1], &[2, 1]], vec![&[1], &[1], &[0]]];
        assert!(recording.push_sequence(&first));
        assert!(recording.push_sequence(&[vec![&[1, 2]], vec![&[3]]]));
        recording
    }

    #[test]
    fn prompts_are_sets_and_decoding_is_token_by_token() {
        let mut found = Vec::new();
        let passing = Passing {
            n_prompt: 2,
            chunk: 512,
        };
        recording().steps(passing, |step| {
            found.push((
                step.now.token,
                step.now.layer,
                step.is_prompt,
                step.uses.to_vec(),
            ));
        });
        let expected = [
            (0, 0, true, vec![(0, 2), (1, 1), (3, 1)]),
            (0, 1, true, vec![(1, 2)]),
            (2, 0, false, vec![(1, 1), (2, 1)]),
            (2, 1, false, vec![(0, 1)]),
            (3, 0, true, vec![(1, 1), (2, 1)]),
            (3, 1, true, vec![(3, 1)]),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn tokens_are_counted_over_sequences() {
        let recording = recording();
        assert_eq!(recording.n_tokens(), 4);
        assert_eq!(recording.picks(0, 1), [0, 1]);
        assert_eq!(recording.picks(1, 3), [3]);
        let mut passes = Vec::new();
        let passing = Passing {
            n_prompt: 9,
            chunk: 2,
        };
        recording.passes(passing, |first, n, is_prompt| {
            passes.push((first, n, is_prompt))
        });
        assert_eq!(passes, [(0, 2, true), (2, 1, true), (3, 1, true)]);
    }

    #[test]
    fn what_does_not_fit_is_not_added() {
        let mut recording = Recording::new(2, 4);
        assert!(!recording.push_sequence(&[vec![&[1]]]));
        assert!(!recording.push_sequence(&[vec![&[1]], vec![&[1], &[2]]]));
        assert!(!recording.push_sequence(&[vec![&[1]], vec![&[4]]]));
        assert_eq!((recording.n_tokens(), recording.n_layers()), (0, 2));
    }
}
