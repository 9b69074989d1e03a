//! Number formats by expert: the fewest bits with which a model is still good enough on the user's text.
//!
//! Paper: EdgeMoE: Empowering Sparse Large Language Models on Mobile Devices, Yi et al., 2023, arXiv 2308.14352 (expert-wise
//! bitwidth adaptation).
//! Rule: measure the loss with all experts in each format; take the two neighbouring formats between which the tolerated
//! loss lies; rank experts by the loss with one of them alone in the lower format; put as many of the least sensitive ones
//! into it as the tolerated loss bears, found by bisection over measured losses.
//! Differs from paper: the loss is the increase of perplexity (an accuracy there); formats are GGUF's blocks (channel-wise
//! integers there); the last step looks two experts further, because losses need not be monotone; and a recording can stand
//! in for the one measurement per expert ([`Sensitivity::Recorded`]).
//! Check: `tests/bits.rs`.

mod apply;
mod remembered;
mod trial;

use std::collections::BTreeMap;

use cadre_checkpoint::Dtype;
use cadre_routing::plan::{ModelShape, Plan, PlanExpert};

use crate::error::Result;

pub(crate) use apply::apply;
pub use remembered::Remembered;
pub use trial::{Trials, relative_error};

/// How many experts past the one that bisection ends at are tried.
const FURTHER: usize = 2;

/// What has one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Each expert; a layer's experts may differ.
    Expert,
    /// All experts of a layer, so that other programs load the result.
    Layer,
}

/// How experts are ranked.
#[derive(Debug, Clone)]
pub enum Sensitivity {
    /// By the loss with one of them alone in the lower format: one measurement for every unit.
    Measured,
    /// By these numbers, per layer and expert: what each adds to its layer's output, of which the part that the lower
    /// format changes is not measured but reckoned from its weights.
    Recorded(Vec<Vec<f64>>),
}

/// Options of [`choose`].
#[derive(Debug, Clone)]
pub struct BitsOptions {
    /// The part by which the perplexity may rise.
    pub max_increase: f64,
    /// What has one format.
    pub unit: Unit,
    /// How experts are ranked.
    pub sensitivity: Sensitivity,
}

/// For every layer with experts and every expert, the index of its format; 0 stands for what is stored.
pub type Formats = Vec<Vec<usize>>;

/// Measures what a choice of formats costs.
pub trait Trial {
    /// Mean negative log likelihood of the text, nats per token.
    ///
    /// # Errors
    /// The model cannot be run.
    fn nll(&mut self, formats: &Formats) -> Result<f64>;

    /// How much of an expert's weights, at `layer` in the list of layers with experts, a format changes, relative to another.
    ///
    /// # Errors
    /// Its weights cannot be read.
    fn change(&mut self, layer: usize, expert: usize, formats: [usize; 2]) -> Result<f64>;
}

/// What was chosen, and what was seen on the way.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// The choice.
    pub formats: Formats,
    /// Nats per token of the text as the model is.
    pub nll_before: f64,
    /// Nats per token with the choice.
    pub nll_after: f64,
    /// The increase of perplexity with all experts in each format, the stored one first (0).
    pub uniform: Vec<f64>,
    /// The two formats between which the choice was made; the same where one does for all.
    pub between: [usize; 2],
    /// Units in the lower of them, and all.
    pub lowered: [usize; 2],
    /// Sensitivities of the units, in the order of the model; empty where they were not needed.
    pub sensitivities: Vec<f64>,
    /// Measurements that were made.
    pub n_trials: usize,
}

impl Chosen {
    /// The part by which the perplexity rises.
    #[must_use]
    pub fn increase(&self) -> f64 {
        (self.nll_after - self.nll_before).exp() - 1.0
    }
}

/// Chooses among `n_formats` formats, the stored one first and each with fewer bits than the one before.
///
/// # Errors
/// A measurement fails.
pub fn choose(
    shape: &ModelShape,
    n_formats: usize,
    options: &BitsOptions,
    trial: &mut dyn Trial,
) -> Result<Chosen> {
    let mut search = Search {
        shape,
        units: units(shape, options.unit),
        trial,
        n_trials: 0,
    };
    let increase = |nll: f64, before: f64| (nll - before).exp() - 1.0;
    let mut nlls = Vec::with_capacity(n_formats);
    for format in 0..n_formats {
        nlls.push(search.nll(&search.uniform(format))?);
    }
    let before = nlls[0];
    let bears = |nll: f64| increase(nll, before) <= options.max_increase;
    let high = nlls.iter().rposition(|nll| bears(*nll)).unwrap_or(0);
    let low = (high + 1).min(n_formats - 1);
    let mut chosen = Chosen {
        formats: search.uniform(high),
        nll_before: before,
        nll_after: nlls[high],
        uniform: nlls.iter().map(|nll| increase(*nll, before)).collect(),
        between: [high, low],
        lowered: [0, search.units.len()],
        sensitivities: Vec::new(),
        n_trials: 0,
    };
    if low > high {
        chosen.sensitivities = search.sensitivities([high, low], nlls[high], options)?;
        let order = ascending(&chosen.sensitivities);
        let (n, nll) = search.most([high, low], &order, (nlls[high], &bears))?;
        chosen.formats = search.lowered([high, low], &order[..n]);
        (chosen.nll_after, chosen.lowered[0]) = (nll, n);
    }
    chosen.n_trials = search.n_trials;
    Ok(chosen)
}

/// Places of what has one format.
type Places = Vec<(usize, usize)>;

fn units(shape: &ModelShape, unit: Unit) -> Vec<Places> {
    let layers = shape.layers.iter().enumerate();
    let of_layer = |(at, (_, n)): (usize, &(usize, usize))| -> Vec<Places> {
        let places = (0..*n).map(|expert| (at, expert));
        match unit {
            Unit::Expert => places.map(|place| vec![place]).collect(),
            Unit::Layer => vec![places.collect()],
        }
    };
    layers.flat_map(of_layer).collect()
}

/// Indices of `values`, the least first; ties to the lower index.
fn ascending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    order
}

struct Search<'a> {
    shape: &'a ModelShape,
    units: Vec<Places>,
    trial: &'a mut dyn Trial,
    n_trials: usize,
}

impl Search<'_> {
    fn nll(&mut self, formats: &Formats) -> Result<f64> {
        self.n_trials += 1;
        self.trial.nll(formats)
    }

    /// All experts in one format.
    fn uniform(&self, format: usize) -> Formats {
        let layers = self.shape.layers.iter();
        layers.map(|(_, n)| vec![format; *n]).collect()
    }

    /// All experts in the first format but those of `units`.
    fn lowered(&self, [high, low]: [usize; 2], units: &[usize]) -> Formats {
        let mut formats = self.uniform(high);
        for (layer, expert) in units.iter().flat_map(|unit| &self.units[*unit]) {
            formats[*layer][*expert] = low;
        }
        formats
    }

    fn sensitivities(
        &mut self,
        formats: [usize; 2],
        nll: f64,
        options: &BitsOptions,
    ) -> Result<Vec<f64>> {
        let mut list = Vec::with_capacity(self.units.len());
        for unit in 0..self.units.len() {
            list.push(match &options.sensitivity {
                Sensitivity::Measured => self.nll(&self.lowered(formats, &[unit]))? - nll,
                Sensitivity::Recorded(outputs) => {
                    let mut sum = 0.0;
                    for (layer, expert) in self.units[unit].clone() {
                        let output = outputs[layer][expert];
                        sum += output * self.trial.change(layer, expert, formats)?;
                    }
                    sum
                }
            });
        }
        Ok(list)
    }

    /// How many units, the first of `order`, can be in the lower format, and what that costs. None can, and not all.
    fn most(
        &mut self,
        formats: [usize; 2],
        order: &[usize],
        (nll, bears): (f64, &dyn Fn(f64) -> bool),
    ) -> Result<(usize, f64)> {
        let (mut best, mut too_many) = ((0, nll), order.len());
        while too_many - best.0 > 1 {
            let n = best.0.midpoint(too_many);
            let nll = self.nll(&self.lowered(formats, &order[..n]))?;
            match bears(nll) {
                true => best = (n, nll),
                false => too_many = n,
            }
        }
        for n in too_many + 1..(too_many + 1 + FURTHER).min(order.len()) {
            let nll = self.nll(&self.lowered(formats, &order[..n]))?;
            if bears(nll) {
                best = (n, nll);
            }
        }
        Ok(best)
    }
}

/// The choice as a plan. `names` are those of the formats, the stored one first.
#[must_use]
pub fn plan(
    shape: &ModelShape,
    chosen: &Chosen,
    names: &[Dtype],
    options: BTreeMap<String, String>,
) -> Plan {
    let format = |index: &usize| match index {
        0 => None,
        index => names.get(*index).map(|dtype| dtype.name().to_lowercase()),
    };
    let experts = chosen.formats.iter().map(|formats| {
        (0..)
            .zip(formats)
            .map(|(id, index)| PlanExpert {
                format: format(index),
                ..PlanExpert::kept(id)
            })
            .collect()
    });
    Plan {
        options,
        ..Plan::of(shape, "bits", experts)
    }
}

#[cfg(test)]
mod tests {
    use cadre_routing::plan::Groups;

    use super::*;

    /// Costs that add up: `weight / 4^bits` of every expert.
    struct Additive {
        weights: Vec<Vec<f64>>,
        n: usize,
    }

    impl Trial for Additive {
        fn nll(&mut self, formats: &Formats) -> Result<f64> {
            self.n += 1;
            let pairs = self.weights.iter().zip(formats);
            let costs = pairs.flat_map(|(weights, formats)| weights.iter().zip(formats));
            Ok(1.0 + costs.map(|(w, f)| w * cost(*f)).sum::<f64>())
        }

        fn change(&mut self, _: usize, _: usize, [_, low]: [usize; 2]) -> Result<f64> {
            Ok(cost(low))
        }
    }

    fn cost(format: usize) -> f64 {
        [0.0, 0.001, 0.01, 0.1][format]
    }

    fn shape(n: usize) -> ModelShape {
        ModelShape {
            digest: "d".to_owned(),
            architecture: "a".to_owned(),
            layers: vec![(0, n), (2, n)],
            top_k: 1,
            n_null: 0,
            groups: Groups::NONE,
            same_picks: false,
        }
    }

    fn options(max_increase: f64, unit: Unit) -> BitsOptions {
        BitsOptions {
            max_increase,
            unit,
            sensitivity: Sensitivity::Measured,
        }
    }

    fn weights() -> Vec<Vec<f64>> {
        vec![vec![1.0, 0.0, 3.0, 0.5], vec![0.25, 8.0, 0.1, 2.0]]
    }

    fn chosen(max_increase: f64, unit: Unit) -> Chosen {
        let mut trial = Additive {
            weights: weights(),
            n: 0,
        };
        let options = options(max_increase, unit);
        let chosen = choose(&shape(4), 4, &options, &mut trial).unwrap();
        assert_eq!(chosen.n_trials, trial.n);
        assert!(chosen.increase() <= max_increase, "{chosen:?}");
        chosen
    }

    #[test]
    fn as_many_of_the_least_sensitive_as_the_limit_bears() {
        // All 14.85 at 0.001 cost 0.015 nats, at 0.01 0.16, at 0.1 4.4 times the perplexity.
        let chosen = chosen(0.05, Unit::Expert);
        assert_eq!(chosen.between, [1, 2]);
        // ln 1.05 = 0.0488: each in the lower format adds 0.009 of its weight to 0.01485. Sorted: 0, 0.1, 0.25, 0.5, 1, 2,
        // 3, 8: the sum up to 2 is 3.85, which adds 0.0347 (0.0495 > 0.0488); up to 1 it is 1.85.
        assert_eq!(chosen.formats, [[2, 2, 1, 2], [2, 1, 2, 1]]);
        assert_eq!(chosen.lowered, [5, 8]);
        assert!(chosen.sensitivities[1].abs() < 1e-12);
    }

    #[test]
    fn the_ends_need_no_ranking() {
        let nothing = chosen(0.0, Unit::Expert);
        // Only the expert that costs nothing.
        assert_eq!(nothing.between, [0, 1]);
        assert_eq!(nothing.formats, [[0, 1, 0, 0], [0, 0, 0, 0]]);
        let all = chosen(10.0, Unit::Expert);
        assert_eq!(all.formats, [[3; 4], [3; 4]]);
        assert_eq!((all.n_trials, all.sensitivities.len()), (4, 0));
    }

    #[test]
    fn layers_are_lowered_whole() {
        let chosen = chosen(0.07, Unit::Layer);
        // Layer 0 weighs 4.5 and adds 0.0405 to 0.01485; ln 1.07 = 0.0677.
        assert_eq!(chosen.formats, [[2; 4], [1; 4]]);
        assert_eq!(chosen.lowered, [1, 2]);
    }

    #[test]
    fn recorded_outputs_rank_without_measuring() {
        let mut trial = Additive {
            weights: weights(),
            n: 0,
        };
        let options = BitsOptions {
            sensitivity: Sensitivity::Recorded(weights()),
            ..options(0.05, Unit::Expert)
        };
        let recorded = choose(&shape(4), 4, &options, &mut trial).unwrap();
        assert_eq!(recorded.formats, chosen(0.05, Unit::Expert).formats);
        assert!(trial.n <= 4 + 4, "{}", trial.n);
    }

    #[test]
    fn a_plan_names_the_formats() {
        let chosen = chosen(0.05, Unit::Expert);
        let names = [Dtype::Bf16, Dtype::Q8_0, Dtype::Q4_0, Dtype::Q2K];
        let plan = plan(&shape(4), &chosen, &names, BTreeMap::new());
        assert_eq!(plan.check(&shape(4)), Ok(()));
        let format = |at: usize| plan.layers[0].experts[at].format.as_deref();
        assert_eq!((format(0), format(2)), (Some("q4_0"), Some("q8_0")));
        assert!(plan.has_formats());
    }
}
