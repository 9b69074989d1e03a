//! Which experts tell two sets of prompts apart: activation per prompt, its difference between the sets, and how well that
//! holds on other prompts and against experts taken at random.
//!
//! Paper: Mixture of Tunable Experts, Dahlke et al., 2025, arXiv 2502.11096 (functional token resonance imaging).
//! Rule: `a_p[l, e]` is the number of tokens of prompt `p` whose picks in layer `l` have expert `e`, divided by the tokens
//! of the prompt; `delta[l, e]` is its mean over the positive prompts less that over the negative ones. Experts are ranked
//! by delta over all layers together.
//! Differs from paper: divided by the length of the prompt, so that prompts need not be equally long. The control takes
//! the place of single random experts: most experts are rarely picked, and to leave out what is hardly there changes
//! little, so that each random expert is one of those in the same layer that are picked about as often.

use cadre_routing::Routing;

/// An expert of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Decoder layer, dense ones counted.
    pub layer: usize,
    /// Expert of the layer.
    pub expert: u16,
}

/// Candidates for a random expert: those of the layer that are picked most nearly as often.
const N_ALIKE: usize = 4;

/// How often each expert is picked by the tokens of one prompt, 0 to 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Activation {
    /// `[layer][expert]`, grown to what is seen.
    counts: Vec<Vec<u32>>,
    /// Tokens of each layer.
    n_tokens: Vec<u32>,
}

impl Activation {
    /// Adds tokens of the prompt in one layer.
    pub fn add(&mut self, layer: usize, routing: &Routing) {
        if self.counts.len() <= layer {
            self.counts.resize(layer + 1, Vec::new());
            self.n_tokens.resize(layer + 1, 0);
        }
        let counts = &mut self.counts[layer];
        for expert in routing.experts() {
            let expert = usize::from(*expert);
            if counts.len() <= expert {
                counts.resize(expert + 1, 0);
            }
            counts[expert] += 1;
        }
        self.n_tokens[layer] += u32::try_from(routing.n_tokens()).unwrap_or(u32::MAX);
    }

    /// The share of the tokens that pick the expert; 0 for what was never seen.
    #[must_use]
    pub fn of(&self, place: Place) -> f64 {
        let count = self.counts.get(place.layer);
        let count = count.and_then(|counts| counts.get(usize::from(place.expert)));
        match (count, self.n_tokens.get(place.layer)) {
            (Some(count), Some(n)) if *n > 0 => f64::from(*count) / f64::from(*n),
            _ => 0.0,
        }
    }

    /// How much of `places` the prompt has: the sum of their shares.
    #[must_use]
    pub fn score(&self, places: &[Place]) -> f64 {
        places.iter().map(|place| self.of(*place)).sum()
    }
}

/// The mean over prompts; 0 for none.
fn mean(prompts: &[Activation], place: Place) -> f64 {
    let sum: f64 = prompts.iter().map(|one| one.of(place)).sum();
    sum / prompts.len().max(1) as f64
}

/// An expert, and how differently the two sets pick it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranked {
    /// The expert.
    pub place: Place,
    /// Its mean share of the positive prompts less that of the negative ones.
    pub delta: f64,
    /// Its mean share over both sets, each set counting half.
    pub share: f64,
}

/// All experts of `layers` (each with its number of experts), the most positive first. Equal ones in the order of layers
/// and experts.
#[must_use]
pub fn rank(
    layers: &[(usize, usize)],
    positive: &[Activation],
    negative: &[Activation],
) -> Vec<Ranked> {
    let mut all = Vec::new();
    for &(layer, n_experts) in layers {
        for expert in 0..u16::try_from(n_experts).unwrap_or(u16::MAX) {
            let place = Place { layer, expert };
            let (a, b) = (mean(positive, place), mean(negative, place));
            all.push(Ranked {
                place,
                delta: a - b,
                share: (a + b) / 2.0,
            });
        }
    }
    all.sort_by(|a, b| b.delta.total_cmp(&a.delta).then(a.place.cmp(&b.place)));
    all
}

/// Random experts in place of `chosen`: for each, one of its layer that is not chosen or taken already and is picked about
/// as often. Where a layer has no such expert left, none is taken for it.
#[must_use]
pub fn control(ranked: &[Ranked], chosen: &[Place], seed: u64) -> Vec<Place> {
    let share = |place: &Place| ranked.iter().find(|one| one.place == *place);
    let mut taken: Vec<Place> = Vec::with_capacity(chosen.len());
    let mut state = seed;
    for place in chosen {
        let Some(wanted) = share(place) else { continue };
        let is_free = |one: &&Ranked| {
            one.place.layer == place.layer
                && !chosen.contains(&one.place)
                && !taken.contains(&one.place)
        };
        let mut alike: Vec<&Ranked> = ranked.iter().filter(is_free).collect();
        let distance = |one: &Ranked| (one.share - wanted.share).abs();
        alike.sort_by(|a, b| {
            let nearest = distance(a).total_cmp(&distance(b));
            nearest.then(a.place.cmp(&b.place))
        });
        alike.truncate(N_ALIKE);
        if let Some(n) = u64::try_from(alike.len()).ok().filter(|n| *n > 0) {
            state = next(state);
            let at = usize::try_from((state >> 33) % n).unwrap_or(0);
            taken.push(alike[at].place);
        }
    }
    taken
}

/// The next number of a linear congruential generator (Knuth's MMIX constants).
fn next(state: u64) -> u64 {
    state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407)
}

/// How well scores tell two sets apart: the chance that a positive prompt has the higher one, ties counting half. 0.5 is
/// no better than a guess; `None` when a set is empty.
#[must_use]
pub fn separation(positive: &[f64], negative: &[f64]) -> Option<f64> {
    if positive.is_empty() || negative.is_empty() {
        return None;
    }
    let mut wins = 0.0;
    for a in positive {
        for b in negative {
            wins += match a.total_cmp(b) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            };
        }
    }
    Some(wins / (positive.len() * negative.len()) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prompt whose tokens pick these experts in layer 1.
    fn prompt(picks: &[[u16; 2]]) -> Activation {
        let mut routing = Routing::new();
        picks
            .iter()
            .for_each(|ids| routing.push_token(ids, &[0.5, 0.5]));
        let mut activation = Activation::default();
        activation.add(1, &routing);
        activation
    }

    fn place(expert: u16) -> Place {
        Place { layer: 1, expert }
    }

    #[test]
    fn shares_of_a_layer_sum_to_its_picks() {
        let mut one = prompt(&[[0, 1], [0, 2]]);
        let mut more = Routing::new();
        more.push_token(&[3, 0], &[1.0, 0.0]);
        one.add(1, &more);
        assert!((one.of(place(0)) - 1.0).abs() < 1e-12);
        assert!((one.of(place(2)) - 1.0 / 3.0).abs() < 1e-12);
        let all: Vec<Place> = (0..8).map(place).collect();
        assert!((one.score(&all) - 2.0).abs() < 1e-12);
        assert_eq!(
            one.of(Place {
                layer: 0,
                expert: 0
            }) + one.of(Place {
                layer: 7,
                expert: 0
            }),
            0.0
        );
    }

    #[test]
    fn the_planted_expert_is_first_and_tells_others_apart() {
        let positive = [prompt(&[[0, 3], [1, 3]]), prompt(&[[2, 3]])];
        let negative = [prompt(&[[0, 1]]), prompt(&[[1, 2], [0, 2]])];
        let ranked = rank(&[(1, 4)], &positive, &negative);
        assert_eq!(ranked[0].place, place(3));
        assert!((ranked[0].delta - 1.0).abs() < 1e-12 && (ranked[0].share - 0.5).abs() < 1e-12);
        let sum: f64 = ranked.iter().map(|one| one.delta).sum();
        assert!(sum.abs() < 1e-12, "both sets have as many picks");
        let scores = |set: &[Activation], places: &[Place]| -> Vec<f64> {
            set.iter().map(|one| one.score(places)).collect()
        };
        let apart = |places: &[Place]| {
            separation(&scores(&positive, places), &scores(&negative, places)).unwrap()
        };
        assert_eq!(apart(&[place(3)]), 1.0);
        assert_eq!(apart(&[]), 0.5);
        assert_eq!(separation(&[], &[1.0]), None);
    }

    #[test]
    fn the_control_is_of_the_same_layers_and_picked_about_as_often() {
        let layers = [(0, 64), (2, 64)];
        let ranked: Vec<Ranked> = layers
            .iter()
            .flat_map(|(layer, n)| (0..*n as u16).map(|expert| (*layer, expert)))
            .map(|(layer, expert)| Ranked {
                place: Place { layer, expert },
                delta: 0.0,
                share: f64::from(expert) / 64.0,
            })
            .collect();
        let chosen = [5, 6, 60].map(|expert| Place { layer: 2, expert });
        for seed in 0..20 {
            let control = control(&ranked, &chosen, seed);
            assert_eq!(control.len(), 3);
            for (taken, chosen_one) in control.iter().zip(&chosen) {
                assert_eq!(taken.layer, 2);
                assert!(!chosen.contains(taken));
                assert!(taken.expert.abs_diff(chosen_one.expert) <= 5, "{taken:?}");
            }
            assert!(control[0] != control[1]);
        }
        assert_ne!(control(&ranked, &chosen, 1), control(&ranked, &chosen, 2));
        let all: Vec<Place> = (0..64).map(|expert| Place { layer: 0, expert }).collect();
        assert!(
            control(&ranked, &all, 1).is_empty(),
            "nothing is left to take"
        );
    }
}
