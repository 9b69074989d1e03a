//! How many experts stay and which, by scores: a share or a budget of bytes, layer by layer or over the whole model, with
//! groups of experts kept equal and no layer left with fewer than its router picks.

use cadre_checkpoint::Checkpoint;
use cadre_routing::plan::ModelShape;

use crate::error::{ReshapeError, Result};

/// How much of a model stays.
#[derive(Debug, Clone, PartialEq)]
pub enum Amount {
    /// This part of the experts, above 0 and up to 1.
    Share(f64),
    /// As many as make an output of at most so many bytes.
    Bytes {
        /// The most bytes of tensor data.
        budget: u64,
        /// What the model takes.
        sizes: Sizes,
    },
}

/// Bytes of a model's tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// Everything but experts.
    pub fixed: u64,
    /// One expert in each of the layers that have some.
    pub expert: Vec<u64>,
}

/// Among which experts the choice is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Those of a layer: all layers keep the same number.
    Layer,
    /// Those of the model: layers keep different numbers.
    Global,
}

impl Sizes {
    /// The bytes of `checkpoint`.
    #[must_use]
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let moe = &checkpoint.config().moe;
        let mut experts = vec![0u64; moe.layers.len()];
        for (name, dtype, shape) in checkpoint.tensor_infos() {
            let place = name.strip_prefix("model.layers.").and_then(|rest| {
                let (layer, rest) = rest.split_once('.')?;
                rest.strip_prefix("mlp.experts.")?;
                moe.layers.binary_search(&layer.parse().ok()?).ok()
            });
            if let Some(at) = place {
                let n_values = shape.iter().product();
                experts[at] += dtype.n_bytes(n_values).unwrap_or(0) as u64;
            }
        }
        let fixed = checkpoint
            .data_bytes()
            .saturating_sub(experts.iter().sum::<u64>());
        let expert = experts
            .iter()
            .zip(moe.counts())
            .map(|(bytes, n)| bytes / n.max(1) as u64);
        Self {
            fixed,
            expert: expert.collect(),
        }
    }
}

/// What is kept or dropped together: the next best expert of every group of a layer.
struct Unit {
    layer: usize,
    score: f64,
    experts: Vec<u16>,
}

/// The experts to keep in each layer of `shape`, ascending, by their `scores` (per layer, per expert; the larger the
/// better, ties to the lower id).
///
/// # Errors
/// A share that is none, or so little that a layer would keep fewer experts than it needs, or that cannot be kept within
/// the budget.
pub(crate) fn keep(
    shape: &ModelShape,
    scores: &[Vec<f64>],
    (amount, scope): (&Amount, Scope),
) -> Result<Vec<Vec<u16>>> {
    if let Amount::Share(share) = amount
        && !(*share > 0.0 && *share <= 1.0)
    {
        return Err(ReshapeError::Option {
            name: "keep",
            problem: format!("is {share}, expected a part above 0 and up to 1, such as 0.5"),
        });
    }
    if shape.same_picks && scope == Scope::Global {
        return Err(ReshapeError::Option {
            name: "scope",
            problem: "is global, which keeps other experts in every layer, but one router picks the same ones in all: use `layer`"
                .to_owned(),
        });
    }
    let of_all = shape.same_picks.then(|| summed(scores));
    let units: Vec<Vec<Unit>> = (0..shape.layers.len())
        .map(|at| units(shape, at, of_all.as_ref().unwrap_or(&scores[at])))
        .collect();
    let least = shape.least() / shape.groups.n.max(1);
    let counts = match scope {
        Scope::Layer => even_counts(shape, &units, amount, least)?,
        Scope::Global => global_counts(shape, &units, amount, least)?,
    };
    let kept = units.iter().zip(counts).map(|(units, n)| {
        let mut ids: Vec<u16> = units[..n]
            .iter()
            .flat_map(|unit| unit.experts.clone())
            .collect();
        ids.sort_unstable();
        ids
    });
    Ok(kept.collect())
}

/// The scores of all layers as one layer's, each as its part of the layer's sum.
fn summed(scores: &[Vec<f64>]) -> Vec<f64> {
    let mut result = vec![0.0; scores.first().map_or(0, Vec::len)];
    for layer in scores {
        let sum: f64 = layer.iter().sum();
        for (all, score) in result.iter_mut().zip(layer) {
            *all += if sum > 0.0 { score / sum } else { 0.0 };
        }
    }
    result
}

/// The units of a layer, best first.
fn units(shape: &ModelShape, at: usize, scores: &[f64]) -> Vec<Unit> {
    let (n, n_groups) = (shape.layers[at].1, shape.groups.n.max(1));
    let size = n / n_groups;
    let sum: f64 = scores.iter().sum();
    // Scores of layers are compared by their part of the layer's sum.
    let scale = if sum > 0.0 { 1.0 / sum } else { 0.0 };
    let ranked: Vec<Vec<u16>> = (0..n_groups)
        .map(|group| {
            let mut ids: Vec<u16> = (group * size..(group + 1) * size)
                .map(|id| id as u16)
                .collect();
            let score = |id: &u16| scores[usize::from(*id)];
            ids.sort_by(|a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
            ids
        })
        .collect();
    let unit = |rank: usize| {
        let experts: Vec<u16> = ranked.iter().map(|group| group[rank]).collect();
        let score = experts
            .iter()
            .map(|id| scores[usize::from(*id)])
            .sum::<f64>()
            * scale;
        Unit {
            layer: at,
            score,
            experts,
        }
    };
    (0..size).map(unit).collect()
}

/// Units of every layer, the same number in all as far as they have them.
fn even_counts(
    shape: &ModelShape,
    units: &[Vec<Unit>],
    amount: &Amount,
    least: usize,
) -> Result<Vec<usize>> {
    let counts: Vec<usize> = match amount {
        Amount::Share(share) => units
            .iter()
            .map(|units| (share * units.len() as f64).round() as usize)
            .collect(),
        Amount::Bytes { budget, sizes } => {
            let most = units.iter().map(Vec::len).max().unwrap_or(0);
            let of =
                |n: usize| -> Vec<usize> { units.iter().map(|units| n.min(units.len())).collect() };
            let fits = |n: &usize| bytes(units, &of(*n), sizes) <= *budget;
            match (least..=most).rev().find(fits) {
                Some(n) => of(n),
                None => return Err(too_large(units, least, (*budget, sizes))),
            }
        }
    };
    expect_enough(shape, units, &counts, least)?;
    Ok(counts)
}

/// Units of every layer, the best of the whole model; every layer gets what it needs first.
fn global_counts(
    shape: &ModelShape,
    units: &[Vec<Unit>],
    amount: &Amount,
    least: usize,
) -> Result<Vec<usize>> {
    let needed: Vec<usize> = units.iter().map(|units| units.len().min(least)).collect();
    let mut counts = needed.clone();
    let all: usize = units.iter().map(Vec::len).sum();
    let mut left = all;
    if let Amount::Share(share) = amount {
        let wanted = (share * all as f64).round() as usize;
        let taken: usize = needed.iter().sum();
        if wanted < taken {
            // Said of layers that keep the same part each, since none of them is to blame.
            let even = units
                .iter()
                .map(|units| (share * units.len() as f64) as usize);
            expect_enough(shape, units, &even.collect::<Vec<_>>(), least)?;
        }
        left = wanted.saturating_sub(taken);
    }
    if let Amount::Bytes { budget, sizes } = amount
        && bytes(units, &counts, sizes) > *budget
    {
        return Err(too_large(units, least, (*budget, sizes)));
    }
    let mut rest: Vec<&Unit> = units
        .iter()
        .flat_map(|units| units.iter().skip(least))
        .collect();
    // Stable, so that ties go to lower layers, and units of a layer stay in their order.
    rest.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut is_full = vec![false; units.len()];
    for unit in rest {
        if left == 0 || is_full[unit.layer] {
            continue;
        }
        counts[unit.layer] += 1;
        if let Amount::Bytes { budget, sizes } = amount
            && bytes(units, &counts, sizes) > *budget
        {
            counts[unit.layer] -= 1;
            is_full[unit.layer] = true;
            continue;
        }
        left -= 1;
    }
    Ok(counts)
}

/// Bytes of the output with so many units in each layer.
fn bytes(units: &[Vec<Unit>], counts: &[usize], sizes: &Sizes) -> u64 {
    let experts = units.iter().zip(counts).zip(&sizes.expert);
    let of_experts = experts.map(|((units, n), size)| {
        let each = units.first().map_or(0, |unit| unit.experts.len());
        (n * each) as u64 * size
    });
    sizes.fixed + of_experts.sum::<u64>()
}

fn too_large(units: &[Vec<Unit>], least: usize, (budget, sizes): (u64, &Sizes)) -> ReshapeError {
    let fewest: Vec<usize> = units.iter().map(|units| units.len().min(least)).collect();
    ReshapeError::DoesNotFit {
        needed: bytes(units, &fewest, sizes),
        budget,
    }
}

fn expect_enough(
    shape: &ModelShape,
    units: &[Vec<Unit>],
    counts: &[usize],
    least: usize,
) -> Result<()> {
    let short = counts.iter().position(|n| *n < least);
    let Some(at) = short else {
        return Ok(());
    };
    let (layer, of) = shape.layers[at];
    let each = units[at].first().map_or(1, |unit| unit.experts.len());
    Err(ReshapeError::TooFew {
        layer,
        kept: counts[at] * each,
        of,
        least: shape.least(),
        top_k: shape.top_k,
    })
}

#[cfg(test)]
mod tests {
    use cadre_routing::plan::Groups;

    use super::*;

    fn shape(layers: &[usize], top_k: usize, groups: Groups) -> ModelShape {
        ModelShape {
            digest: "d".to_owned(),
            architecture: "a".to_owned(),
            layers: layers.iter().copied().enumerate().collect(),
            top_k,
            n_null: 0,
            groups,
            same_picks: false,
        }
    }

    fn share(
        shape: &ModelShape,
        scores: &[Vec<f64>],
        part: f64,
        scope: Scope,
    ) -> Result<Vec<Vec<u16>>> {
        keep(shape, scores, (&Amount::Share(part), scope))
    }

    fn scores() -> Vec<Vec<f64>> {
        vec![vec![1.0, 9.0, 5.0, 5.0], vec![40.0, 20.0, 20.0, 20.0]]
    }

    #[test]
    fn each_layer_keeps_its_best() {
        let shape = shape(&[4, 4], 1, Groups::NONE);
        let kept = share(&shape, &scores(), 0.5, Scope::Layer).unwrap();
        assert_eq!(kept, [vec![1, 2], vec![0, 1]]);
        let all = share(&shape, &scores(), 1.0, Scope::Layer).unwrap();
        assert_eq!(all, [vec![0, 1, 2, 3], vec![0, 1, 2, 3]]);
        let one = share(&shape, &scores(), 0.25, Scope::Layer).unwrap();
        assert_eq!(one, [vec![1], vec![0]]);
    }

    #[test]
    fn over_the_model_layers_differ_and_none_goes_short() {
        let shape = shape(&[4, 4], 1, Groups::NONE);
        // Parts of the sums: 0.05 0.45 0.25 0.25, and 0.4 0.2 0.2 0.2.
        let kept = share(&shape, &scores(), 0.5, Scope::Global).unwrap();
        assert_eq!(kept, [vec![1, 2, 3], vec![0]]);
        let lopsided = vec![vec![1.0, 1.0, 1.0, 1.0], vec![100.0, 0.0, 0.0, 0.0]];
        let kept = share(&shape, &lopsided, 0.5, Scope::Global).unwrap();
        assert_eq!(kept, [vec![0, 1, 2], vec![0]]);
    }

    #[test]
    fn groups_stay_equal() {
        let groups = Groups {
            n: 2,
            keep: 1,
            least: 1,
        };
        let shape = shape(&[4], 1, groups);
        // The best two of all are in one group.
        let kept = share(&shape, &[vec![9.0, 8.0, 1.0, 2.0]], 0.5, Scope::Layer).unwrap();
        assert_eq!(kept, [vec![0, 3]]);
    }

    #[test]
    fn too_little_is_refused_with_the_layer() {
        let shape = shape(&[8, 8], 4, Groups::NONE);
        let scores = vec![vec![1.0; 8]; 2];
        for scope in [Scope::Layer, Scope::Global] {
            let error = share(&shape, &scores, 0.25, scope).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("layer 0 would keep 2 of 8 experts, but needs 4"),
                "{text}"
            );
            assert!(share(&shape, &scores, 0.5, scope).is_ok());
        }
        for bad in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(share(&shape, &scores, bad, Scope::Layer).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_router_for_all_layers_has_one_choice() {
        let one = ModelShape {
            same_picks: true,
            ..shape(&[3, 3], 1, Groups::NONE)
        };
        // As parts of their sums: 0.5, 0.3, 0.2 and 0.1, 0.2, 0.7.
        let scores = [vec![50.0, 30.0, 20.0], vec![1.0, 2.0, 7.0]];
        let kept = share(&one, &scores, 0.67, Scope::Layer).unwrap();
        assert_eq!(kept, [vec![0, 2], vec![0, 2]]);
        let refused = share(&one, &scores, 0.67, Scope::Global).unwrap_err();
        assert!(
            refused.to_string().contains("picks the same ones"),
            "{refused}"
        );
    }

    #[test]
    fn budgets_are_filled_and_not_exceeded() {
        let shape = shape(&[4, 4], 1, Groups::NONE);
        let sizes = Sizes {
            fixed: 100,
            expert: vec![10, 20],
        };
        let within = |budget, scope| {
            let amount = Amount::Bytes {
                budget,
                sizes: sizes.clone(),
            };
            keep(&shape, &scores(), (&amount, scope))
        };
        let n = |kept: Vec<Vec<u16>>| kept.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(n(within(220, Scope::Layer).unwrap()), [4, 4]);
        assert_eq!(n(within(219, Scope::Layer).unwrap()), [3, 3]);
        assert_eq!(n(within(130, Scope::Layer).unwrap()), [1, 1]);
        // 130 are needed; the next best two are of layer 0, then one of layer 1 does not fit, then the last of layer 0.
        assert_eq!(n(within(160, Scope::Global).unwrap()), [4, 1]);
        for scope in [Scope::Layer, Scope::Global] {
            let text = within(129, scope).unwrap_err().to_string();
            assert!(
                text.contains("takes 130 bytes") && text.contains("129"),
                "{text}"
            );
        }
    }
}
