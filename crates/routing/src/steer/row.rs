//! Steering at work: the rules of one layer, and what a token's logits become under them.

use super::SteerError;
use crate::Routing;
use crate::stages::{Reach, Stages};

/// The rules of one layer while they are gathered. Vectors are empty where no expert has the rule.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rules {
    n_experts: usize,
    reach: Reach,
    /// The most picks of a token.
    limit: usize,
    /// From 1; none means the first ones.
    ranks: Vec<usize>,
    /// The least part of the largest weight, and how many stay in any case.
    min_weight: Option<(f32, usize)>,
    /// Whether what is above differs from what the policy does.
    is_changed: bool,
    is_masked: Vec<bool>,
    is_forced: Vec<bool>,
    is_muted: Vec<bool>,
    damp: Vec<Option<f32>>,
    bias: Vec<Option<f32>>,
    gain: Vec<Option<f32>>,
}

fn set<T: Clone>(all: &mut Vec<T>, n: usize, (at, value): (usize, T), rest: T) {
    if all.is_empty() {
        all.resize(n, rest);
    }
    all[at] = value;
}

/// Gives an expert a number; whether it had none.
fn first(all: &mut Vec<Option<f32>>, n: usize, (at, number): (usize, f32)) -> bool {
    let is_first = !matches!(all.get(at), Some(Some(_)));
    set(all, n, (at, Some(number)), None);
    is_first
}

fn count(flags: &[bool]) -> usize {
    flags.iter().filter(|flag| **flag).count()
}

impl Rules {
    pub(super) fn new(
        n_experts: usize,
        (reach, limit, ranks): (Reach, usize, Vec<usize>),
        min_weight: Option<(f32, usize)>,
        is_changed: bool,
    ) -> Self {
        Self {
            n_experts,
            reach,
            limit: if ranks.is_empty() { limit } else { ranks.len() },
            ranks,
            min_weight,
            is_changed,
            is_masked: Vec::new(),
            is_forced: Vec::new(),
            is_muted: Vec::new(),
            damp: Vec::new(),
            bias: Vec::new(),
            gain: Vec::new(),
        }
    }

    pub(super) fn mask(&mut self, expert: usize) {
        set(&mut self.is_masked, self.n_experts, (expert, true), false);
    }

    pub(super) fn force(&mut self, expert: usize) {
        set(&mut self.is_forced, self.n_experts, (expert, true), false);
    }

    pub(super) fn mute(&mut self, expert: usize) {
        set(&mut self.is_muted, self.n_experts, (expert, true), false);
    }

    /// Whether the expert had none.
    pub(super) fn damp(&mut self, expert: usize, part: f32) -> bool {
        first(&mut self.damp, self.n_experts, (expert, part))
    }

    /// Whether the expert had none.
    pub(super) fn bias(&mut self, expert: usize, bias: f32) -> bool {
        first(&mut self.bias, self.n_experts, (expert, bias))
    }

    /// Whether the expert had none.
    pub(super) fn gain(&mut self, expert: usize, gain: f32) -> bool {
        first(&mut self.gain, self.n_experts, (expert, gain))
    }

    /// Checks the rules of `layer` against each other; `None` when there are none.
    pub(super) fn ready(self, layer: usize) -> Result<Option<SteeredLayer>, SteerError> {
        let flags = [
            ("mask", &self.is_masked),
            ("force", &self.is_forced),
            ("mute", &self.is_muted),
        ];
        for (at, (one, first)) in flags.iter().enumerate() {
            for (other, second) in &flags[at + 1..] {
                let both = first.iter().zip(second.iter()).position(|(a, b)| *a && *b);
                if let Some(expert) = both {
                    return Err(SteerError::Contradiction {
                        layer,
                        expert: expert as u16,
                        rules: [*one, *other],
                    });
                }
            }
        }
        let left = self.n_experts - count(&self.is_masked);
        let needed = match (self.ranks.iter().max(), self.reach) {
            (Some(rank), _) => *rank,
            (None, Reach::Fixed(k)) => k,
            (None, Reach::Mass(_) | Reach::Above(_)) => 1,
        };
        if left < needed {
            return Err(SteerError::TooFewLeft {
                layer,
                left,
                needed,
            });
        }
        let (forced, most) = (count(&self.is_forced), self.limit);
        if forced > most {
            return Err(SteerError::TooManyForced {
                layer,
                forced,
                most,
            });
        }
        let is_none = !self.is_changed
            && [&self.is_masked, &self.is_forced, &self.is_muted]
                .iter()
                .all(|flags| flags.is_empty())
            && [&self.damp, &self.bias, &self.gain]
                .iter()
                .all(|one| one.is_empty());
        let or = |numbers: &[Option<f32>], none: f32| -> Vec<f32> {
            numbers.iter().map(|one| one.unwrap_or(none)).collect()
        };
        Ok((!is_none).then(|| SteeredLayer {
            damp: or(&self.damp, 0.0),
            bias: or(&self.bias, 0.0),
            gain: or(&self.gain, 1.0),
            rules: Self {
                damp: Vec::new(),
                bias: Vec::new(),
                gain: Vec::new(),
                ..self
            },
        }))
    }
}

/// How one layer is steered.
#[derive(Clone, Debug, PartialEq)]
pub struct SteeredLayer {
    rules: Rules,
    /// `[n_experts]`, or empty where none has one.
    damp: Vec<f32>,
    bias: Vec<f32>,
    gain: Vec<f32>,
}

/// Memory to steer in; grows to what is asked for.
#[derive(Debug, Default)]
pub struct SteerScratch {
    /// With minus infinity for what is masked, `[n_experts]`.
    logits: Vec<f32>,
    keys: Vec<f32>,
    shares: Vec<f32>,
    is_outside: Vec<bool>,
    is_picked: Vec<bool>,
    /// What is not masked, best first.
    order: Vec<u16>,
    ids: Vec<u16>,
    weights: Vec<f32>,
}

impl SteeredLayer {
    /// Appends to `routing` the picks of every row of `logits`, `[T, n_experts]`, all finite. `stages` are those of the
    /// policy that the steering was prepared with.
    pub fn route(
        &self,
        stages: &dyn Stages,
        logits: &[f32],
        routing: &mut Routing,
        scratch: &mut SteerScratch,
    ) {
        for row in logits.chunks_exact(self.rules.n_experts) {
            self.rank(stages, row, scratch);
            self.pick(stages, scratch);
            self.weigh(stages, scratch);
            for (id, weight) in scratch.ids.iter().zip(&scratch.weights) {
                routing.push_pair(*id, *weight);
            }
            routing.end_token();
        }
    }

    /// The most picks of a token.
    #[must_use]
    pub fn max_picks(&self) -> usize {
        self.rules.limit
    }

    /// Orders the experts that are not masked.
    fn rank(&self, stages: &dyn Stages, row: &[f32], scratch: &mut SteerScratch) {
        let SteerScratch {
            logits,
            keys,
            is_outside,
            order,
            ..
        } = scratch;
        logits.clear();
        logits.extend_from_slice(row);
        for (logit, _) in logits
            .iter_mut()
            .zip(&self.rules.is_masked)
            .filter(|(_, is_masked)| **is_masked)
        {
            *logit = f32::NEG_INFINITY;
        }
        keys.clear();
        keys.extend_from_slice(logits);
        for (key, bias) in keys.iter_mut().zip(&self.bias) {
            *key += bias;
        }
        is_outside.clear();
        is_outside.resize(row.len(), false);
        stages.rank(logits, keys, is_outside);
        order.clear();
        let is_there = |id: &u16| logits[usize::from(*id)] > f32::NEG_INFINITY;
        order.extend((0..row.len() as u16).filter(is_there));
        // Adding 0 makes one zero of two, which are equal where policies compare them.
        let key = |id: &u16| keys[usize::from(*id)] + 0.0;
        let outside = |id: &u16| is_outside[usize::from(*id)];
        order.sort_unstable_by(|a, b| {
            let groups = outside(a).cmp(&outside(b));
            groups.then(key(b).total_cmp(&key(a))).then(a.cmp(b))
        });
    }

    /// Marks the picks.
    fn pick(&self, stages: &dyn Stages, scratch: &mut SteerScratch) {
        let SteerScratch {
            logits,
            shares,
            is_picked,
            order,
            ids,
            ..
        } = scratch;
        let Rules {
            reach,
            limit,
            ranks,
            is_forced,
            ..
        } = &self.rules;
        is_picked.clear();
        is_picked.resize(logits.len(), false);
        let mut take = |id: &u16| is_picked[usize::from(*id)] = true;
        if let (Reach::Mass(_) | Reach::Above(_), true) = (reach, ranks.is_empty()) {
            shares.clear();
            shares.resize(logits.len(), 0.0);
            stages.shares(logits, shares);
        }
        let share = |id: &u16| shares[usize::from(*id)];
        match reach {
            _ if !ranks.is_empty() => {
                let at = ranks.iter().filter_map(|rank| order.get(rank - 1));
                at.for_each(&mut take);
            }
            Reach::Fixed(k) => order.iter().take(*k).for_each(&mut take),
            Reach::Mass(mass) => {
                let mut collected = 0.0;
                for id in order.iter().take(*limit) {
                    if collected > *mass {
                        break;
                    }
                    collected += share(id);
                    take(id);
                }
            }
            Reach::Above(least) => {
                let at_least = |(at, id): &(usize, &u16)| *at == 0 || share(id) > *least;
                let first = order.iter().take(*limit).enumerate();
                first.take_while(at_least).for_each(|(_, id)| take(id));
            }
        }
        for (picked, is_forced) in is_picked.iter_mut().zip(is_forced) {
            *picked |= is_forced;
        }
        let may_go = |id: &&u16| is_forced.get(usize::from(**id)) != Some(&true);
        let mut n_over = count(is_picked).saturating_sub(*limit);
        for id in order.iter().rev().filter(may_go) {
            if n_over == 0 {
                break;
            }
            if std::mem::take(&mut is_picked[usize::from(*id)]) {
                n_over -= 1;
            }
        }
        ids.clear();
        ids.extend(order.iter().filter(|id| is_picked[usize::from(**id)]));
    }

    /// Weighs the picks, and leaves out what has too little weight or is not to be heard.
    fn weigh(&self, stages: &dyn Stages, scratch: &mut SteerScratch) {
        let SteerScratch {
            logits,
            ids,
            weights,
            ..
        } = scratch;
        let weigh = |ids: &[u16], weights: &mut Vec<f32>| {
            weights.clear();
            weights.resize(ids.len(), 0.0);
            if !ids.is_empty() {
                stages.weigh(logits, ids, weights);
            }
        };
        weigh(ids, weights);
        let has = |flags: &[bool], id: u16| flags.get(usize::from(id)) == Some(&true);
        if let Some((share, n_kept)) = self.rules.min_weight {
            let least = share * weights.iter().copied().fold(0.0, f32::max);
            let n_picks = ids.len();
            let mut at = 0;
            ids.retain(|id| {
                at += 1;
                at <= n_kept || weights[at - 1] >= least || has(&self.rules.is_forced, *id)
            });
            if ids.len() < n_picks {
                weigh(ids, weights);
            }
        }
        // What is left of a pick's weight.
        let left = |id: u16| match has(&self.rules.is_muted, id) {
            true => 0.0,
            false => 1.0 - self.damp.get(usize::from(id)).unwrap_or(&0.0),
        };
        if ids.iter().any(|id| left(*id) < 1.0) {
            let whole: f32 = weights.iter().sum();
            leave_out(ids, weights, |id| left(id) == 0.0);
            for (id, weight) in ids.iter().zip(weights.iter_mut()) {
                *weight *= left(*id);
            }
            let factor = whole / weights.iter().sum::<f32>();
            if factor.is_finite() {
                weights.iter_mut().for_each(|weight| *weight *= factor);
            }
        }
        if !self.gain.is_empty() {
            let gain = |id: u16| self.gain[usize::from(id)];
            leave_out(ids, weights, |id| gain(id) == 0.0);
            for (id, weight) in ids.iter().zip(weights.iter_mut()) {
                *weight *= gain(*id);
            }
        }
    }
}

/// Removes the picks that `goes` says.
fn leave_out(ids: &mut Vec<u16>, weights: &mut Vec<f32>, goes: impl Fn(u16) -> bool) {
    let mut at = 0;
    for from in 0..ids.len() {
        if !goes(ids[from]) {
            (ids[at], weights[at]) = (ids[from], weights[from]);
            at += 1;
        }
    }
    ids.truncate(at);
    weights.truncate(at);
}
