//! How good predictors are: all of them on the same run, beside a control that is told the truth.

use super::Predictor;

/// How often a predictor was right in one layer, or in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerScore {
    /// Sets of picks that were predicted: tokens.
    pub n_sets: u64,
    /// Picks.
    pub n_picks: u64,
    /// Picks that were among as many of the first ranked.
    pub picks_right: u64,
    /// Sets all of which were.
    pub sets_right: u64,
}

impl LayerScore {
    /// Share of the picks that were predicted, 0 to 1.
    pub fn overlap(&self) -> f64 {
        self.picks_right as f64 / self.n_picks.max(1) as f64
    }

    /// Share of the sets that were predicted as a whole, 0 to 1.
    pub fn whole_sets(&self) -> f64 {
        self.sets_right as f64 / self.n_sets.max(1) as f64
    }

    fn count(&mut self, ranked: &[u16], truth: &[u16]) {
        let guessed = &ranked[..truth.len().min(ranked.len())];
        let n_right = truth.iter().filter(|pick| guessed.contains(pick)).count();
        self.n_sets += 1;
        self.n_picks += truth.len() as u64;
        self.picks_right += n_right as u64;
        self.sets_right += u64::from(n_right == truth.len());
    }

    fn add(&mut self, other: &Self) {
        self.n_sets += other.n_sets;
        self.n_picks += other.n_picks;
        self.picks_right += other.picks_right;
        self.sets_right += other.sets_right;
    }
}

/// What a predictor has reached so far.
#[derive(Clone, Debug)]
pub struct Score {
    /// The predictor's name.
    pub name: &'static str,
    /// By layer.
    pub layers: Vec<LayerScore>,
}

impl Score {
    fn new(name: &'static str, n_layers: usize) -> Self {
        Self {
            name,
            layers: vec![LayerScore::default(); n_layers],
        }
    }

    /// Over all layers.
    pub fn overall(&self) -> LayerScore {
        let mut sum = LayerScore::default();
        for layer in &self.layers {
            sum.add(layer);
        }
        sum
    }
}

/// Predictors on one run. Before a layer is observed, each of them is asked.
#[derive(Debug)]
pub struct Scoreboard {
    predictors: Vec<Box<dyn Predictor>>,
    /// One per predictor, and the control's.
    scores: Vec<Score>,
    ranked: Vec<u16>,
}

impl Scoreboard {
    /// For `n_layers` layers.
    pub fn new(n_layers: usize, predictors: Vec<Box<dyn Predictor>>) -> Self {
        let names = predictors.iter().map(|predictor| predictor.name());
        let scores = names
            .chain(["control"])
            .map(|name| Score::new(name, n_layers))
            .collect();
        Self {
            predictors,
            scores,
            ranked: Vec::new(),
        }
    }

    /// Passes on what is known about the current token; see [`Predictor::give`].
    pub fn give(&mut self, layer: u16, ranked: &[u16]) {
        for predictor in &mut self.predictors {
            predictor.give(layer, ranked);
        }
    }

    /// Counts what each would have said, then lets them see the truth.
    pub fn observe(&mut self, layer: u16, experts: &[u16]) {
        let at = usize::from(layer);
        for (predictor, score) in self.predictors.iter_mut().zip(&mut self.scores) {
            predictor.rank(layer, &mut self.ranked);
            score.layers[at].count(&self.ranked, experts);
            predictor.observe(layer, experts);
        }
        if let Some(control) = self.scores.last_mut() {
            control.layers[at].count(experts, experts);
        }
    }

    /// The scores, in the order of the predictors; the last is the control's, which shows that nothing is wrong with
    /// the counting: 1.
    pub fn scores(&self) -> &[Score] {
        &self.scores
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predictors::{Exact, Given, Popularity, Previous};

    #[test]
    fn overlap_and_whole_sets_are_counted() {
        let mut score = LayerScore::default();
        // Only as many guesses count as there are picks.
        score.count(&[1, 2, 3], &[3, 1]);
        score.count(&[4, 5], &[5, 4]);
        score.count(&[], &[5, 4]);
        assert_eq!((score.n_picks, score.picks_right), (6, 3));
        assert_eq!((score.n_sets, score.sets_right), (3, 1));
        assert_eq!(score.overlap(), 0.5);
        assert_eq!(LayerScore::default().overlap(), 0.0);
    }

    #[test]
    fn all_see_the_same_run() {
        let predictors: Vec<Box<dyn Predictor>> = vec![
            Box::new(Previous::new(2)),
            Box::new(Popularity::new(2, 4, 64.0)),
            Box::new(Given::new("gate", 2)),
        ];
        let mut board = Scoreboard::new(2, predictors);
        for token in 0..4_u16 {
            board.observe(0, &[token % 2]);
            board.give(1, &[3, 2]);
            board.observe(1, &[3]);
        }
        let overlaps: Vec<(&str, f64, f64)> = board
            .scores()
            .iter()
            .map(|score| {
                (
                    score.name,
                    score.layers[0].overlap(),
                    score.layers[1].overlap(),
                )
            })
            .collect();
        let expected = [
            ("previous", 0.0, 0.75),
            ("popularity", 0.0, 0.75),
            ("gate", 0.0, 1.0),
            ("control", 1.0, 1.0),
        ];
        assert_eq!(overlaps, expected);
        assert_eq!(board.scores()[3].overall().n_picks, 8);
    }

    #[test]
    fn a_router_that_does_not_wait_is_predicted_exactly() {
        let mut board = Scoreboard::new(3, vec![Box::new(Exact::new(3))]);
        let tokens = [[1, 2], [0, 3], [3, 1]];
        // One router for all layers, and it has read all tokens.
        for picks in &tokens {
            for layer in 0..3 {
                board.give(layer, picks);
            }
        }
        for picks in &tokens {
            for layer in 0..3 {
                board.observe(layer, picks);
            }
        }
        assert_eq!(board.scores()[0].overall().whole_sets(), 1.0);
    }
}
