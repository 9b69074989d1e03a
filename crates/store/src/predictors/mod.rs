//! Which experts a layer will want, guessed before its router has said so: one small file per way of guessing. Files
//! here do not import each other.

mod edgemoe;
mod exact;
mod given;
mod popularity;
mod previous;
mod scoreboard;

use std::fmt::Debug;

pub use edgemoe::EdgeMoe;
pub use exact::Exact;
pub use given::Given;
pub use popularity::Popularity;
pub use previous::Previous;
pub use scoreboard::{LayerScore, Score, Scoreboard};

/// A way of guessing. Tokens come one after the other, each through the layers in order; a layer is ranked, if at all,
/// before it is observed.
pub trait Predictor: Send + Debug {
    /// `previous`, `popularity`, ...
    fn name(&self) -> &'static str;

    /// A token picked `experts` in `layer`, those of most weight first.
    fn observe(&mut self, layer: u16, experts: &[u16]);

    /// Replaces `ranked` by the experts that the current token may pick in `layer`, the most likely first. Experts that
    /// are left out are not expected at all; it is empty when nothing is known yet.
    fn rank(&mut self, layer: u16, ranked: &mut Vec<u16>);

    /// What somebody who sees more than picks, such as the next layer's router, says about the current token in
    /// `layer`, the most likely first. Only those who pass it on listen.
    fn give(&mut self, layer: u16, ranked: &[u16]) {
        let _ = (layer, ranked);
    }
}

/// Replaces `ranked` by the experts whose score is above `none`, the highest first; of equals the lower number.
fn rank_by(scores: &[f32], none: f32, ranked: &mut Vec<u16>) {
    ranked.clear();
    let known = scores
        .iter()
        .enumerate()
        .filter(|(_, score)| **score > none);
    ranked.extend(known.map(|(expert, _)| expert as u16));
    ranked.sort_unstable_by(|&a, &b| {
        let score = |expert: u16| scores[usize::from(expert)];
        score(b).total_cmp(&score(a)).then(a.cmp(&b))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_stable() {
        let mut ranked = vec![9];
        rank_by(&[0.5, 0.0, 2.0, 0.5], 0.0, &mut ranked);
        assert_eq!(ranked, [2, 0, 3]);
    }
}
