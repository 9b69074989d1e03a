//! Applying a plan to a checkpoint: the output is planned whole, then written by the machinery of conversions.

use std::collections::BTreeMap;
use std::sync::Arc;

use cadre_checkpoint::{Checkpoint, Conversion, ConvertTo, Factors, Mixer, NewExpert, NewExperts};
use cadre_routing::plan::{Groups, ModelShape, Plan, PlanExpert, PlanLayer};

use crate::bake::Written;
use crate::error::{ReshapeError, Result};
use crate::file::plan_json;
use crate::mix::{Averages, sizes};
use crate::shape::shape_of;

/// How a plan is applied.
#[derive(Debug, Clone, Copy)]
pub struct Applying {
    /// What is written: of the kind that the source is.
    pub target: ConvertTo,
    /// Writes what other programs can load: layers are filled up with experts that are never picked, so that all have the
    /// same number, and experts that share weights are written once for each.
    pub pad: bool,
}

/// Plans to write `source` as `plan` says. What it writes is of the kind of the source, but for plans of formats, which
/// become GGUF files.
///
/// # Errors
/// The plan does not fit the model, or the model's files have no place for what it says; nothing has been written then.
pub fn apply<'a>(source: &'a Checkpoint, plan: &Plan, options: Applying) -> Result<Conversion<'a>> {
    apply_with(source, plan, &Written::default(), options)
}

/// As [`apply`], with more of a steering than who stays.
pub(crate) fn apply_with<'a>(
    source: &'a Checkpoint,
    plan: &Plan,
    written: &Written,
    options: Applying,
) -> Result<Conversion<'a>> {
    let shape = shape_of(source);
    if shape.layers.is_empty() {
        return Err(ReshapeError::Option {
            name: "the model",
            problem: format!("{} has no layers with experts", source.origin()),
        });
    }
    plan.check(&shape)?;
    if plan.has_formats() {
        return crate::bits::apply(source, plan, options);
    }
    let mixed = plan
        .layers
        .iter()
        .any(|layer| layer.keep_rows != plan.layers[0].keep_rows);
    if mixed {
        return Err(ReshapeError::Option {
            name: "the plan",
            problem: "keeps the rows of some routers and not of others: set `keep_rows` for all layers or for none".to_owned(),
        });
    }
    let config = source.config();
    let sizes = [config.hidden_size, config.moe.intermediate_size];
    if let Some(factor) = plan.factor
        && factor.rank > sizes[0].min(sizes[1])
    {
        return Err(ReshapeError::Option {
            name: "rank",
            problem: format!(
                "is {}, expected at most {}: the matrices of experts are {} by {}",
                factor.rank,
                sizes[0].min(sizes[1]),
                sizes[1],
                sizes[0]
            ),
        });
    }
    let experts = new_experts(plan, (&shape, sizes), written, options.pad);
    // An unfinished output of another plan may have the same headers.
    let settings = match plan.is_identity() && written.is_empty() {
        true => String::new(),
        false => format!("{}{written}", plan_json(plan)),
    };
    Ok(Conversion::with_experts(
        source,
        &experts,
        options.target,
        settings,
    )?)
}

/// What the experts of an output are made of, by decoder layer.
pub type Sources = BTreeMap<usize, LayerSources>;

/// What the experts of a layer are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSources {
    /// Experts before.
    pub of: usize,
    /// For every expert of the output those that it is made of; nothing for one that is never picked.
    pub experts: Vec<Vec<u16>>,
}

/// What the experts of the output of `plan` are made of, `pad` as in [`Applying`].
#[must_use]
pub fn sources(plan: &Plan, shape: &ModelShape, pad: bool) -> Sources {
    let most = most(plan);
    let layers = plan.layers.iter().map(|layer| {
        let made: Vec<Vec<u16>> = match layer.keep_rows {
            // Routing is among the same experts as before.
            true => (0..layer.of as u16).map(|id| vec![id]).collect(),
            false => layer.experts.iter().map(|one| one.from.clone()).collect(),
        };
        let experts = match pad && !layer.keep_rows {
            true => filled(&made, most, shape.groups, &Vec::new()),
            false => made,
        };
        let of = layer.of;
        (layer.layer, LayerSources { of, experts })
    });
    layers.collect()
}

/// Experts of the layer that keeps most.
fn most(plan: &Plan) -> usize {
    let counts = plan.layers.iter().map(|layer| match layer.keep_rows {
        true => layer.of,
        false => layer.experts.len(),
    });
    counts.max().unwrap_or(0)
}

/// The plan in the words of the checkpoint's writer. Plans that merge or factor have no gains.
fn new_experts(
    plan: &Plan,
    (shape, [hidden, width]): (&ModelShape, [usize; 2]),
    written: &Written,
    pad: bool,
) -> NewExperts {
    let gains = &written.gains;
    let most = most(plan);
    let layers = plan.layers.iter().map(|layer| {
        let whole = plan.factor.is_none();
        if pad && layer.keep_rows {
            return copies(layer, whole);
        }
        let expert = |one| match new_expert(one, whole) {
            NewExpert::Kept(id) if gains.has(layer.layer, id) => NewExpert::Mixed(id),
            other => other,
        };
        let experts: Vec<NewExpert> = layer.experts.iter().map(expert).collect();
        match pad {
            true => filled(&experts, most, shape.groups, &NewExpert::Never),
            false => experts,
        }
    });
    let layers: Vec<Vec<NewExpert>> = layers.collect();
    let shares = !pad && !plan.is_identity() && plan.layers.iter().any(|layer| layer.keep_rows);
    let rows = plan.layers.iter().filter(|_| shares).map(|layer| {
        let entries = layer.entries().into_iter().flatten();
        entries.map(|at| at as u16).collect()
    });
    let rows = rows.collect();
    let mixes = plan.merges() || plan.factor.is_some();
    let mixer: Option<Arc<dyn Mixer>> = match (mixes, gains.is_empty()) {
        (true, _) => Some(Arc::new(Averages::new(plan.clone(), pad))),
        (false, true) => None,
        (false, false) => {
            let numbers = plan.layers.iter().map(|layer| layer.layer);
            Some(Arc::new(gains.of_places(numbers.zip(&layers))))
        }
    };
    let factors = plan.factor.filter(|_| !pad).map(|factor| {
        let (rank, up_rows) = sizes(&factor, width);
        let (_, down_rows) = sizes(&factor, hidden);
        Factors::even(rank, up_rows, down_rows)
    });
    NewExperts {
        layers,
        rows,
        factors,
        mixer,
        top_k: written.top_k,
        corrections: written.corrections.clone(),
    }
}

/// Every expert of a layer whose router keeps its rows, merged or not, under its own row.
fn copies(layer: &PlanLayer, whole: bool) -> Vec<NewExpert> {
    let entries = layer.entries().into_iter().enumerate();
    let copy = |(id, at): (usize, Option<usize>)| {
        let entry = layer.experts.get(at?)?;
        Some(match entry.from.len() {
            1 if whole => NewExpert::Kept(id),
            _ => NewExpert::Mixed(id),
        })
    };
    entries.filter_map(copy).collect()
}

/// `whole` unless matrices are factored, which makes new ones of all.
fn new_expert(expert: &PlanExpert, whole: bool) -> NewExpert {
    let first = usize::from(expert.from[0]);
    match expert.from.len() {
        1 if whole => NewExpert::Kept(first),
        _ => NewExpert::Mixed(first),
    }
}

/// `experts` with each group filled up to its part of `most`.
fn filled<T: Clone>(experts: &[T], most: usize, groups: Groups, with: &T) -> Vec<T> {
    let n_groups = groups.n.max(1);
    let (has, wants) = (experts.len() / n_groups, most / n_groups);
    let mut list = Vec::with_capacity(most);
    for group in experts.chunks(has.max(1)) {
        list.extend_from_slice(group);
        list.extend((has..wants).map(|_| with.clone()));
    }
    list
}
