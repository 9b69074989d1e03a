//! Group-limited top-k of DeepSeek V2 and V3, with the selection-only bias of loss-free balancing.
//!
//! Paper: DeepSeek-V2, DeepSeek-AI, 2024, arXiv 2405.04434; DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437;
//! Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, Wang et al., 2024, arXiv 2408.15664.
//! Rule: `a = softmax(l)` (V2) or `sigmoid(l)` (V3); sorting key `c = a + b`; a group scores its largest c (V2) or the
//! sum of its two largest (V3); outside of the best groups c is minus infinity; take the k largest c. Weights come
//! from a, never from b: raw (head A) or divided by their sum (heads B and C), times `scale`.
//! Shapes: logits [T, E], groups of E / n_groups consecutive experts, ids [T, k].
//! Aux: V2 expert, device and communication balance; V3 the sequence loss and [`update_bias`].
//! Differs from paper: 1e-20 is added to the sum, so that sigmoids that all underflow give 0 and not NaN.
//! Masks: transformers sets the keys outside of the kept groups to 0 in V2 and to minus infinity in V3. V2's keys are
//! softmax values without a bias, all above 0, so that both masks pick the same experts; only keys that underflow to 0
//! could tie with masked ones, and then the weight is 0 either way.
//! Check: policies::group_limited::tests, tests/golden.rs with golden/routing/section.json.

use serde::{Deserialize, Serialize};

use crate::policy::{self, Policy};
use crate::scores::{Softmax, sigmoid};
use crate::select;
use crate::stages::{self, Reach, Stages};
use crate::{Routing, RoutingError};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreFn {
    /// Softmax over all experts (V2).
    Softmax,
    /// Sigmoid of each logit (V3).
    Sigmoid,
}

/// How the keys of a group's experts become the score of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The largest key (V2).
    Max,
    /// The sum of the two largest keys (V3).
    SumOfBestTwo,
}

/// Sizes and flags of [`GroupLimited`], as a checkpoint's config gives them.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupLimitedOptions {
    /// Number of experts; a multiple of `n_groups`.
    pub n_experts: usize,
    /// Picks per token.
    pub top_k: usize,
    /// Number of groups, 1 to 64; 1 is plain top-k.
    pub n_groups: usize,
    /// Groups that stay in the race.
    pub keep_groups: usize,
    /// How logits become scores.
    pub score: ScoreFn,
    /// How groups are compared.
    pub group_score: GroupScore,
    /// Whether the weights of a token are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor on every weight.
    pub scale: f32,
}

/// Top-k within the best groups. Does not allocate once `routing` has grown to its working size.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupLimited {
    options: GroupLimitedOptions,
    /// `[E]`, zeros when the checkpoint has none.
    bias: Vec<f32>,
}

/// Groups are marked in the bits of a `u64`.
const MAX_GROUPS: usize = 64;

impl GroupLimited {
    /// Checks the sizes; `bias` is `[n_experts]` and moves the selection only (`None` when there is none).
    ///
    /// # Errors
    /// [`RoutingError::BadOption`] or [`RoutingError::TopKTooLarge`] for sizes that do not fit together, a bias of
    /// another length or with non-finite values.
    pub fn new(options: GroupLimitedOptions, bias: Option<Vec<f32>>) -> Result<Self, RoutingError> {
        const NAME: &str = "group_limited";
        let GroupLimitedOptions {
            n_experts,
            top_k,
            n_groups,
            keep_groups,
            scale,
            ..
        } = options;
        policy::check_sizes(NAME, n_experts, top_k)?;
        let divides = (1..=MAX_GROUPS).contains(&n_groups) && n_experts.is_multiple_of(n_groups);
        policy::check_option(
            NAME,
            "n_groups",
            n_groups,
            divides,
            "1 to 64 and a divisor of n_experts",
        )?;
        let enough =
            (1..=n_groups).contains(&keep_groups) && keep_groups * (n_experts / n_groups) >= top_k;
        let expected = "1 to n_groups, with at least top_k experts in the kept groups";
        policy::check_option(NAME, "keep_groups", keep_groups, enough, expected)?;
        policy::check_option(NAME, "scale", scale, scale.is_finite(), "a finite number")?;
        let bias = bias.unwrap_or_else(|| vec![0.0; n_experts]);
        policy::check_option(
            NAME,
            "length of bias",
            bias.len(),
            bias.len() == n_experts,
            "n_experts values",
        )?;
        if let Some(bad) = bias.iter().find(|b| !b.is_finite()) {
            policy::check_option(NAME, "bias", bad, false, "finite numbers")?;
        }
        Ok(Self { options, bias })
    }

    /// The sorting keys `c` of one group.
    fn keys<'a>(
        &'a self,
        scorer: Scorer,
        row: &'a [f32],
        group: usize,
    ) -> impl Iterator<Item = (u16, f32)> + 'a {
        let members = self.members(group);
        let first = members.start as u16;
        (first..)
            .zip(row[members.clone()].iter().zip(&self.bias[members]))
            .map(move |(id, (&l, b))| (id, scorer.a(l) + b))
    }

    /// The experts of one group.
    fn members(&self, group: usize) -> std::ops::Range<usize> {
        let size = self.options.n_experts / self.options.n_groups;
        group * size..(group + 1) * size
    }

    /// The kept groups of a token, one bit each, by the keys of a group's experts.
    fn kept_groups<K: Iterator<Item = f32>>(&self, keys_of: impl Fn(usize) -> K) -> u64 {
        let (mut ids, mut scores) = ([0; MAX_GROUPS], [0.0; MAX_GROUPS]);
        let group_scores = (0..self.options.n_groups).map(|group| {
            let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for key in keys_of(group) {
                if key > best {
                    (best, second) = (key, best);
                } else if key > second {
                    second = key;
                }
            }
            let score = match self.options.group_score {
                GroupScore::SumOfBestTwo if second.is_finite() => best + second,
                _ => best,
            };
            (group as u16, score)
        });
        let keep = self.options.keep_groups;
        let found = select::top_k(group_scores, &mut ids[..keep], &mut scores[..keep]);
        ids[..found].iter().fold(0, |bits, group| bits | 1 << group)
    }

    /// Turns the logits of a token's picks into their weights.
    fn finish(&self, scorer: Scorer, weights: &mut [f32]) {
        weights.iter_mut().for_each(|w| *w = scorer.a(*w));
        let sum = if self.options.norm_topk_prob {
            weights.iter().sum::<f32>() + 1e-20
        } else {
            1.0
        };
        let scale = self.options.scale;
        weights.iter_mut().for_each(|w| *w = *w / sum * scale);
    }
}

/// From logit to score for one token.
#[derive(Clone, Copy)]
enum Scorer {
    Softmax(Softmax),
    Sigmoid,
}

impl Scorer {
    fn of(score: ScoreFn, row: &[f32]) -> Self {
        match score {
            ScoreFn::Softmax => Self::Softmax(Softmax::of(row)),
            ScoreFn::Sigmoid => Self::Sigmoid,
        }
    }

    fn a(self, logit: f32) -> f32 {
        match self {
            Self::Softmax(softmax) => softmax.p(logit),
            Self::Sigmoid => sigmoid(logit),
        }
    }
}

impl Policy for GroupLimited {
    fn name(&self) -> &'static str {
        "group_limited"
    }

    fn n_experts(&self) -> usize {
        self.options.n_experts
    }

    fn max_picks(&self) -> usize {
        self.options.top_k
    }

    fn causal(&self) -> bool {
        true
    }

    fn batch_invariant(&self) -> bool {
        true
    }

    fn stages(&self) -> Option<&dyn Stages> {
        Some(self)
    }

    fn route(&self, logits: &[f32], routing: &mut Routing) -> Result<(), RoutingError> {
        let GroupLimitedOptions {
            n_experts,
            top_k,
            n_groups,
            score,
            ..
        } = self.options;
        policy::begin(logits, n_experts, top_k, routing)?;
        for row in logits.chunks_exact(n_experts) {
            let scorer = Scorer::of(score, row);
            let keys_of = |group| self.keys(scorer, row, group).map(|(_, key)| key);
            let kept = self.kept_groups(keys_of);
            let candidates = (0..n_groups)
                .filter(|group| kept >> group & 1 == 1)
                .flat_map(|group| self.keys(scorer, row, group));
            let (ids, weights) = routing.push_slots(top_k);
            select::top_k(candidates, ids, weights);
            stages::gather(row, ids, weights);
            self.finish(scorer, weights);
        }
        Ok(())
    }
}

impl Stages for GroupLimited {
    fn reach(&self) -> Reach {
        Reach::Fixed(self.options.top_k)
    }

    fn rank(&self, logits: &[f32], keys: &mut [f32], is_outside: &mut [bool]) {
        let scorer = Scorer::of(self.options.score, logits);
        for ((key, logit), bias) in keys.iter_mut().zip(logits).zip(&self.bias) {
            // A score is never below 0, so that what is left out needs a key of its own.
            *key = match logit.is_finite() {
                true => scorer.a(*key) + bias,
                false => f32::NEG_INFINITY,
            };
        }
        let ranked: &[f32] = keys;
        let kept = self.kept_groups(|group| ranked[self.members(group)].iter().copied());
        for group in 0..self.options.n_groups {
            is_outside[self.members(group)].fill(kept >> group & 1 == 0);
        }
    }

    fn shares(&self, logits: &[f32], shares: &mut [f32]) {
        let scorer = Scorer::of(self.options.score, logits);
        shares.copy_from_slice(logits);
        shares.iter_mut().for_each(|a| *a = scorer.a(*a));
        let sum = shares.iter().sum::<f32>() + 1e-20;
        shares.iter_mut().for_each(|a| *a /= sum);
    }

    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        stages::gather(logits, ids, weights);
        self.finish(Scorer::of(self.options.score, logits), weights);
    }
}

/// One step of loss-free balancing: `b_e += rate * sign(mean(counts) - counts_e)`. Call it once per optimizer step
/// with the counts of the whole batch, and use the result from the next batch on.
///
/// # Panics
/// When the two slices differ in length.
pub fn update_bias(bias: &mut [f32], counts: &[u64], rate: f32) {
    assert_eq!(bias.len(), counts.len(), "one count per bias");
    let total: u64 = counts.iter().sum();
    for (b, &count) in bias.iter_mut().zip(counts) {
        // count and mean compared without division, so that equality is exact.
        *b += match (count * counts.len() as u64).cmp(&total) {
            std::cmp::Ordering::Less => rate,
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Greater => -rate,
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v3(n_groups: usize, keep_groups: usize) -> GroupLimitedOptions {
        GroupLimitedOptions {
            n_experts: 8,
            top_k: 2,
            n_groups,
            keep_groups,
            score: ScoreFn::Sigmoid,
            group_score: GroupScore::SumOfBestTwo,
            norm_topk_prob: true,
            scale: 2.5,
        }
    }

    fn route(options: &GroupLimitedOptions, bias: Option<Vec<f32>>, logits: &[f32]) -> Routing {
        let mut routing = Routing::new();
        GroupLimited::new(options.clone(), bias)
            .unwrap()
            .route(logits, &mut routing)
            .unwrap();
        routing
    }

    #[test]
    fn a_masked_group_stays_out_even_when_live_keys_are_negative() {
        // Experts 0 and 1 keep a positive group sum, experts 2 and 3 are pushed below any masked score of 0.
        let options = GroupLimitedOptions {
            n_experts: 4,
            n_groups: 2,
            keep_groups: 1,
            ..v3(2, 1)
        };
        let routing = route(&options, Some(vec![2.0, -1.5, -0.9, -0.9]), &[0.0; 4]);
        assert_eq!(routing.experts(), [0, 1]);
        assert!((routing.weights()[0] - 1.25).abs() < 1e-6);
    }

    #[test]
    fn the_bias_changes_picks_but_never_weights() {
        let logits = [0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0];
        let plain = route(&v3(1, 1), None, &logits);
        let moved = route(
            &v3(1, 1),
            Some(vec![0.0, 0.0, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0]),
            &logits,
        );
        assert_eq!(
            (plain.experts(), moved.experts()),
            (&[3, 2][..], &[2, 3][..])
        );
        assert_eq!(
            (plain.weights()[0], plain.weights()[1]),
            (moved.weights()[1], moved.weights()[0])
        );
    }

    #[test]
    fn underflowing_sigmoids_give_zero_weights() {
        assert_eq!(route(&v3(4, 2), None, &[-500.0; 8]).weights(), [0.0, 0.0]);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let err = |options| GroupLimited::new(options, None).unwrap_err().to_string();
        assert!(err(v3(3, 1)).contains("n_groups = 3"));
        assert!(err(v3(8, 1)).contains("keep_groups = 1"));
        assert!(
            GroupLimited::new(v3(4, 2), Some(vec![0.0; 7]))
                .unwrap_err()
                .to_string()
                .contains("7")
        );
        assert!(GroupLimited::new(v3(4, 2), Some(vec![f32::NAN; 8])).is_err());
    }

    #[test]
    fn the_bias_moves_against_the_load_and_stops_at_the_mean() {
        let mut bias = [0.0; 3];
        update_bias(&mut bias, &[1, 2, 3], 0.5);
        assert_eq!(bias, [0.5, 0.0, -0.5]);
    }

    proptest! {
        #[test]
        fn masking_softmax_keys_to_0_picks_the_same(logits in prop::collection::vec(-8f32..8.0, 12)) {
            let options = GroupLimitedOptions {
                n_experts: 12,
                top_k: 3,
                score: ScoreFn::Softmax,
                group_score: GroupScore::Max,
                norm_topk_prob: false,
                scale: 1.0,
                ..v3(4, 2)
            };
            let routing = route(&options, None, &logits);
            // As transformers has it for V2: the best of each group, two groups kept, the rest 0, the 3 best overall.
            let softmax = Softmax::of(&logits);
            let mut scores: Vec<f32> = logits.iter().map(|l| softmax.p(*l)).collect();
            let best = |group: &[f32]| group.iter().copied().fold(0.0, f32::max);
            let mut groups: Vec<(u16, f32)> = (0u16..).zip(scores.chunks(3).map(best)).collect();
            groups.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            for (group, _) in &groups[2..] {
                scores[usize::from(*group) * 3..][..3].fill(0.0);
            }
            let (mut ids, mut keys) = ([0; 3], [0.0; 3]);
            select::top_k(select::numbered(&scores), &mut ids, &mut keys);
            prop_assert_eq!(routing.experts(), ids);
        }

        #[test]
        fn picks_stay_in_the_kept_groups(logits in prop::collection::vec(-4f32..4.0, 16), shift in -2f32..2.0) {
            let routing = route(&v3(4, 2), None, &logits);
            for (ids, weights) in routing.iter() {
                prop_assert!((weights.iter().sum::<f32>() - 2.5).abs() < 1e-5);
                let mut groups: Vec<u16> = ids.iter().map(|id| id / 2).collect();
                groups.dedup();
                prop_assert!(groups.len() <= 2);
            }
            // The same constant on every bias changes nothing, up to ties made by rounding.
            let shifted = route(&v3(4, 2), Some(vec![shift; 8]), &logits);
            prop_assert_eq!(shifted.n_pairs(), routing.n_pairs());
        }

        #[test]
        fn one_group_is_plain_top_k(grid in prop::collection::vec(-8i8..8, 16)) {
            let logits: Vec<f32> = grid.into_iter().map(|l| f32::from(l) * 0.5).collect();
            let options = GroupLimitedOptions { score: ScoreFn::Softmax, scale: 1.0, ..v3(1, 1) };
            let routing = route(&options, None, &logits);
            let mut plain = Routing::new();
            crate::policies::TopK::new(8, 2, true).unwrap().route(&logits, &mut plain).unwrap();
            prop_assert_eq!(routing.experts(), plain.experts());
            for (a, b) in routing.weights().iter().zip(plain.weights()) {
                prop_assert!((a - b).abs() < 1e-6);
            }
        }
    }
}
