//! Policies taken apart into ranking, reach and weights, so that a token's choice can be steered in between.

/// How far down its ranking a policy picks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reach {
    /// So many experts.
    Fixed(usize),
    /// The fewest whose shares add up to more than this; all of them when none do.
    Mass(f32),
    /// The best one, and those after it whose share is above this.
    Above(f32),
}

/// The stages of a policy that looks at one token at a time. Ranked, cut off and weighed by them, a token gets what
/// [`crate::Policy::route`] gives it, bit for bit; [`crate::steer`] changes what happens in between.
///
/// Rows are `[n_experts]`. An expert that is to be left out of everything has a logit of minus infinity, which takes it
/// out of every softmax, as if the router had no row for it; one expert at least has a finite logit.
pub trait Stages {
    /// How many are picked.
    fn reach(&self) -> Reach;

    /// Turns `keys` from logits to rank by into what experts are ranked by, larger first. They are `logits`, or differ
    /// from them by what moves the choice and not the weights. Experts marked in `is_outside` come after all others.
    fn rank(&self, logits: &[f32], keys: &mut [f32], is_outside: &mut [bool]) {
        let _ = (logits, keys, is_outside);
    }

    /// Each expert's part of the token's total score, 0 to 1.
    fn shares(&self, logits: &[f32], shares: &mut [f32]) {
        let softmax = crate::scores::Softmax::of(logits);
        for (share, logit) in shares.iter_mut().zip(logits) {
            *share = softmax.p(*logit);
        }
    }

    /// The weights of the picks `ids`, best first.
    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]);
}

/// The logits of the picks `ids`.
pub(crate) fn gather(logits: &[f32], ids: &[u16], picked: &mut [f32]) {
    for (picked, id) in picked.iter_mut().zip(ids) {
        *picked = logits[usize::from(*id)];
    }
}
