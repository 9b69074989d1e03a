//! Lossy routing: edits picks by the rules of [`Lossy`] about experts in memory, before any expert is asked for.

use cadre_checkpoint::Score;
use cadre_routing::Routing;

use crate::lossy::{Lossy, PreferCached, Weighing};

/// The rules of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LossyRules {
    pub(crate) lossy: Lossy,
    pub(crate) weighing: Weighing,
}

/// Memory to edit in; grows to what is asked for.
#[derive(Debug, Default)]
pub(crate) struct LossyScratch {
    /// Whether each expert of the layer is in memory.
    pub(crate) is_cached: Vec<bool>,
    edited: Routing,
    picks: Vec<Pick>,
    /// Experts that were not picked, best first.
    others: Vec<u16>,
}

/// An expert and its weight.
type Pick = (u16, f32);

impl LossyRules {
    /// Edits `routing`, which `logits` led to, `[tokens, n_experts]`. The scratch must say of each expert whether it is in
    /// memory. Ids from `n_experts` on are copies in fewer bits.
    pub(crate) fn edit(&self, logits: &[f32], routing: &mut Routing, scratch: &mut LossyScratch) {
        let n_experts = logits.len() / routing.n_tokens().max(1);
        let LossyScratch {
            is_cached,
            edited,
            picks,
            others,
        } = scratch;
        edited.clear();
        for ((experts, weights), logits) in routing.iter().zip(logits.chunks(n_experts.max(1))) {
            picks.clear();
            picks.extend(experts.iter().copied().zip(weights.iter().copied()));
            if let Some(prefer) = self.lossy.prefer_cached {
                self.prefer(prefer, logits, (picks, others), is_cached);
            }
            if let Some(share) = self.lossy.drop_cold {
                drop_cold(share, picks, is_cached);
            }
            let is_same = picks.iter().map(|pick| pick.0).eq(experts.iter().copied());
            if !is_same && self.weighing.has_fixed_sum {
                scale(picks, weights.iter().sum());
            }
            if let Some(share) = self.lossy.low_bit {
                use_copies(share, picks, (is_cached, n_experts));
            }
            for (expert, weight) in &*picks {
                edited.push_pair(*expert, *weight);
            }
            edited.end_token();
        }
        std::mem::swap(routing, edited);
    }

    /// Replaces picks that are not in memory by the next best experts that are.
    fn prefer(
        &self,
        prefer: PreferCached,
        logits: &[f32],
        (picks, others): (&mut Vec<Pick>, &mut Vec<u16>),
        is_cached: &[bool],
    ) {
        let keep = prefer.keep.min(picks.len());
        let cached = |expert: u16| is_cached.get(usize::from(expert)) == Some(&true);
        if picks[keep..].iter().all(|(expert, _)| cached(*expert)) {
            return;
        }
        let logit = |expert: u16| logits[usize::from(expert)];
        others.clear();
        others.extend((0..logits.len() as u16).filter(|e| picks.iter().all(|pick| pick.0 != *e)));
        others.sort_unstable_by(|a, b| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b)));
        others.truncate(prefer.among.saturating_sub(picks.len()));

        // Cold picks go, the last first, as long as there is something to take their place.
        let (first, n_picks) = (picks[0], picks.len());
        let mut found = others.iter().copied().filter(|expert| cached(*expert));
        let n_cold = picks[keep..].iter().filter(|pick| !cached(pick.0)).count();
        let n_found = found.clone().count().min(n_cold);
        let mut n_kept_cold = n_cold - n_found;
        let mut at = 0;
        picks.retain(|(expert, _)| {
            at += 1;
            let stays = at <= keep || cached(*expert) || n_kept_cold > 0;
            if at > keep && !cached(*expert) {
                n_kept_cold = n_kept_cold.saturating_sub(1);
            }
            stays
        });
        while picks.len() < n_picks {
            let Some(expert) = found.next() else { break };
            let weight = first.1 * self.ratio(logit(expert), logit(first.0));
            picks.push((expert, weight));
        }
    }

    /// Weight of an expert as a multiple of another's, by their logits; 0 where scores are too small for numbers.
    fn ratio(&self, logit: f32, other: f32) -> f32 {
        let ratio = match self.weighing.score {
            Score::Softmax => (logit - other).exp(),
            Score::Sigmoid => (1.0 + (-other).exp()) / (1.0 + (-logit).exp()),
        };
        if ratio.is_finite() { ratio } else { 0.0 }
    }
}

/// Leaves out picks that are not in memory and have little weight.
fn drop_cold(share: f32, picks: &mut Vec<Pick>, is_cached: &[bool]) {
    let goes = cold_and_light(share, picks, is_cached);
    let mut at = 0;
    picks.retain(|pick| {
        at += 1;
        !goes(at - 1, pick)
    });
}

/// Puts the copies in fewer bits, whose ids follow those of the `n_experts`, in the place of picks that are not in memory
/// and have little weight.
fn use_copies(share: f32, picks: &mut [Pick], (is_cached, n_experts): (&[bool], usize)) {
    let goes = cold_and_light(share, picks, is_cached);
    for (at, pick) in picks.iter_mut().enumerate() {
        if goes(at, pick) {
            pick.0 += n_experts as u16;
        }
    }
}

/// Tells which picks are not in memory and have less than `share / picks` of the weight; never the one of most weight.
fn cold_and_light<'a>(
    share: f32,
    picks: &[Pick],
    is_cached: &'a [bool],
) -> impl Fn(usize, &Pick) -> bool + use<'a> {
    let total: f32 = picks.iter().map(|pick| pick.1).sum();
    let least = share * total / picks.len().max(1) as f32;
    let mut most = 0;
    for (at, pick) in picks.iter().enumerate() {
        if pick.1 > picks[most].1 {
            most = at;
        }
    }
    move |at, (expert, weight)| {
        let is_cached = is_cached.get(usize::from(*expert)) == Some(&true);
        at != most && *weight < least && !is_cached
    }
}

/// Scales weights to `sum`.
fn scale(picks: &mut [Pick], sum: f32) {
    let factor = sum / picks.iter().map(|pick| pick.1).sum::<f32>();
    if factor.is_finite() {
        picks.iter_mut().for_each(|pick| pick.1 *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of 0, 1, 2, ... 5, and the three best picked.
    const LOGITS: [f32; 6] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
    const PICKS: ([u16; 3], [f32; 3]) = ([5, 4, 3], [0.6, 0.3, 0.1]);

    fn edited(lossy: Lossy, has_fixed_sum: bool, cached: &[u16]) -> (Vec<u16>, Vec<f32>) {
        let rules = LossyRules {
            lossy,
            weighing: Weighing {
                has_fixed_sum,
                score: Score::Softmax,
            },
        };
        let mut scratch = LossyScratch {
            is_cached: (0..6).map(|expert| cached.contains(&expert)).collect(),
            ..LossyScratch::default()
        };
        let mut routing = Routing::new();
        // Twice, so that nothing of one token is left for the next.
        routing.push_token(&PICKS.0, &PICKS.1);
        routing.push_token(&PICKS.0, &PICKS.1);
        let logits = [LOGITS, LOGITS].concat();
        rules.edit(&logits, &mut routing, &mut scratch);
        assert_eq!(routing.token(0), routing.token(1));
        let (experts, weights) = routing.token(0);
        (experts.to_vec(), weights.to_vec())
    }

    fn close(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
        assert!(got.iter().zip(want).all(near), "{got:?} {want:?}");
    }

    #[test]
    fn cold_light_picks_are_dropped_and_the_top_one_never() {
        let lossy = |share| Lossy {
            drop_cold: Some(share),
            ..Lossy::default()
        };
        // 0.75 / 3 = 0.25: only the last is lighter.
        let (experts, weights) = edited(lossy(0.75), true, &[]);
        assert_eq!(experts, [5, 4]);
        close(&weights, &[2.0 / 3.0, 1.0 / 3.0]);
        assert_eq!(edited(lossy(0.75), true, &[3]).0, PICKS.0);
        assert_eq!(edited(lossy(3000.0), true, &[3]).0, [5, 3]);
        assert_eq!(edited(lossy(3000.0), true, &[]).0, [5]);
        let same = (PICKS.0.to_vec(), PICKS.1.to_vec());
        assert_eq!(edited(lossy(0.0), true, &[]), same);
    }

    #[test]
    fn cold_light_picks_are_taken_from_copies_at_the_same_weight() {
        let lossy = |share| Lossy {
            low_bit: Some(share),
            ..Lossy::default()
        };
        let weights = PICKS.1.to_vec();
        for has_fixed_sum in [true, false] {
            let edited = |share, cached| edited(lossy(share), has_fixed_sum, cached);
            // 0.75 / 3 = 0.25: only the last is lighter. Copies of 6 experts begin at 6.
            assert_eq!(edited(0.75, &[]), (vec![5, 4, 3 + 6], weights.clone()));
            assert_eq!(edited(0.75, &[3]), (vec![5, 4, 3], weights.clone()));
            assert_eq!(
                edited(3000.0, &[]),
                (vec![5, 4 + 6, 3 + 6], weights.clone())
            );
        }
    }

    #[test]
    fn slots_are_filled_from_memory() {
        let lossy = |keep, among| Lossy {
            prefer_cached: Some(PreferCached { keep, among }),
            ..Lossy::default()
        };
        let e = |n: i32| (n as f32).exp();
        let (experts, weights) = edited(lossy(1, 6), false, &[3, 1, 0]);
        assert_eq!(experts, [5, 3, 1], "4 is cold, 1 is the best that is there");
        close(&weights, &[0.6, 0.1, 0.6 * e(-4)]);
        // Weights with a fixed sum keep it.
        let (_, weights) = edited(lossy(1, 6), true, &[3, 1, 0]);
        close(&[weights.iter().sum()], &[1.0]);
        // 1 is the fifth best: not among four.
        assert_eq!(edited(lossy(1, 4), true, &[3, 1, 0]).0, PICKS.0);
        // One place to fill, and two cold picks: the better one stays.
        assert_eq!(edited(lossy(1, 6), true, &[0]).0, [5, 4, 0]);
        // All true picks stay, or are there.
        let same = (PICKS.0.to_vec(), PICKS.1.to_vec());
        assert_eq!(edited(lossy(3, 6), true, &[0, 1]), same);
        assert_eq!(edited(lossy(1, 6), true, &[3, 4]), same);
        assert_eq!(edited(lossy(1, 6), true, &[]), same);
    }

    #[test]
    fn sigmoid_scores_have_their_own_ratio() {
        let rules = LossyRules {
            lossy: Lossy::default(),
            weighing: Weighing {
                has_fixed_sum: true,
                score: Score::Sigmoid,
            },
        };
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        assert!((rules.ratio(-1.0, 2.0) - sigmoid(-1.0) / sigmoid(2.0)).abs() < 1e-6);
        assert_eq!(rules.ratio(-200.0, -100.0), 0.0);
    }
}
