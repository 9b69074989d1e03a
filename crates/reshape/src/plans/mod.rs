//! Plan makers: the list of methods by name, and what they share. One file per method; each gives scores, or clusters.

mod frequency;
mod random;
mod reap;
mod router_mass;
mod uncurl;

use std::collections::BTreeMap;

use cadre_routing::plan::{ModelShape, Plan, PlanExpert};

use crate::error::{ReshapeError, Result};
use crate::select::{Amount, Scope, keep};
use crate::usage::Usage;

/// How experts to drop are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The least picked go.
    Frequency,
    /// Those go whose picks have the least weight in all.
    RouterMass,
    /// Those go whose weighted outputs are smallest where they are picked (REAP).
    Reap,
    /// Any go; the baseline for all others.
    Random,
    /// Experts whose router logits go together are one cluster, of which the one with most weight stays (UNCURL).
    Uncurl,
}

/// How merged experts are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeMethod {
    /// By usage, neurons aligned (M-SMoE).
    MSmoe,
    /// All the same, neurons as they are; the baseline.
    Mean,
    /// What most of them agree in beside their mean, neurons as they are (TIES-Merging, Yadav et al., 2023, arXiv
    /// 2306.01708): another baseline. Experts have no common ancestor that differences could be taken to; their mean stands
    /// in for it.
    Ties,
}

/// The part of differences that TIES keeps, as in its paper.
const TIES_PART: f32 = 0.2;

/// What makes two experts alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Similarity {
    /// The cosine of their router logits over the tokens.
    Cosine,
    /// Their correlation, which leaves out what is common to all tokens.
    Pearson,
}

/// Options of [`prune()`].
#[derive(Debug, Clone)]
pub struct PruneOptions {
    /// How much stays.
    pub amount: Amount,
    /// Among which the choice is made.
    pub scope: Scope,
    /// Of [`Method::Random`].
    pub seed: u64,
    /// Of [`Method::Uncurl`].
    pub similarity: Similarity,
}

/// Options of [`merge()`].
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// How much stays.
    pub amount: Amount,
    /// Among which the experts that others join are chosen: with [`Scope::Global`] layers get different numbers.
    pub scope: Scope,
    /// Which experts are joined.
    pub similarity: Similarity,
    /// Whether routers keep all of their rows, each for the expert that its own was merged into (M-SMoE); otherwise each
    /// merged expert has the row of the most used one.
    pub keep_rows: bool,
    /// Whether neurons are aligned before experts are averaged; absent: as the method does.
    pub align: Option<bool>,
}

/// Every method and its name.
const METHODS: &[(Method, &str)] = &[
    (Method::Frequency, "frequency"),
    (Method::RouterMass, "router-mass"),
    (Method::Reap, "reap"),
    (Method::Random, "random"),
    (Method::Uncurl, "uncurl"),
];

/// Every method of merging and its name.
const MERGES: &[(MergeMethod, &str)] = &[
    (MergeMethod::MSmoe, "m-smoe"),
    (MergeMethod::Mean, "mean"),
    (MergeMethod::Ties, "ties"),
];

fn parse<T: Copy>(known: &[(T, &'static str)], text: &str) -> Result<T, String> {
    let found = known.iter().find(|(_, name)| *name == text);
    found.map(|(method, _)| *method).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(_, name)| *name).collect();
        format!("`{text}` is no method; known: {}", names.join(", "))
    })
}

fn name<T: PartialEq>(known: &[(T, &'static str)], method: &T) -> &'static str {
    let found = known.iter().find(|(one, _)| one == method);
    found.map_or("", |(_, name)| name)
}

impl Method {
    /// The method of this name.
    ///
    /// # Errors
    /// There is none; the text lists those that there are.
    pub fn parse(text: &str) -> Result<Self, String> {
        parse(METHODS, text)
    }

    /// Its name in plans and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        name(METHODS, &self)
    }

    /// Whether it looks at router logits, which a trace must then hold.
    #[must_use]
    pub fn wants_similarity(self) -> bool {
        self == Self::Uncurl
    }
}

impl MergeMethod {
    /// The method of this name.
    ///
    /// # Errors
    /// There is none; the text lists those that there are.
    pub fn parse(text: &str) -> Result<Self, String> {
        parse(MERGES, text)
    }

    /// Its name in plans and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        name(MERGES, &self)
    }
}

impl Similarity {
    /// The similarity of this name.
    ///
    /// # Errors
    /// There is none; the text lists those that there are.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "cosine" => Ok(Self::Cosine),
            "pearson" => Ok(Self::Pearson),
            _ => Err(format!("`{text}` is no similarity; known: cosine, pearson")),
        }
    }
}

/// A plan that drops experts of the model of this `shape`.
///
/// # Errors
/// The usage is of another model, lacks what the method needs, or would leave a layer with too few experts.
pub fn prune(
    shape: &ModelShape,
    usage: &Usage,
    method: Method,
    options: &PruneOptions,
) -> Result<Plan> {
    usage.check(shape)?;
    let how = (&options.amount, options.scope);
    let kept = match method {
        Method::Uncurl => uncurl::kept(shape, usage, options)?,
        Method::Frequency => keep(shape, &frequency::scores(usage), how)?,
        Method::RouterMass => keep(shape, &router_mass::scores(usage), how)?,
        Method::Reap => keep(shape, &reap::scores(usage)?, how)?,
        Method::Random => keep(shape, &random::scores(shape, options.seed), how)?,
    };
    let mut notes = described(usage, &options.amount, options.scope);
    if method == Method::Random {
        notes.insert("seed".to_owned(), options.seed.to_string());
    }
    let layers = kept.into_iter().map(|ids| {
        let experts = ids.into_iter().map(PlanExpert::kept);
        experts.collect()
    });
    made(shape, (method.name(), false), notes, layers.collect())
}

/// A plan that merges experts: the most used stay, and every other joins the one that its router logits are most like,
/// of its own group where there are groups.
///
/// # Errors
/// As [`prune()`].
pub fn merge(
    shape: &ModelShape,
    usage: &Usage,
    method: MergeMethod,
    options: &MergeOptions,
) -> Result<Plan> {
    usage.check(shape)?;
    let how = (&options.amount, options.scope);
    let dominant = keep(shape, &frequency::scores(usage), how)?;
    let align = options.align.unwrap_or(method == MergeMethod::MSmoe);
    let mut layers = Vec::with_capacity(dominant.len());
    for (at, dominant) in dominant.iter().enumerate() {
        layers.push(joined(
            shape,
            usage,
            (at, dominant),
            method,
            (align, options),
        )?);
    }
    let mut notes = described(usage, &options.amount, options.scope);
    notes.insert("align".to_owned(), align.to_string());
    notes.insert("keep-rows".to_owned(), options.keep_rows.to_string());
    made(shape, (method.name(), options.keep_rows), notes, layers)
}

/// The experts of a layer, each with those that join it.
fn joined(
    shape: &ModelShape,
    usage: &Usage,
    (at, dominant): (usize, &[u16]),
    method: MergeMethod,
    (align, options): (bool, &MergeOptions),
) -> Result<Vec<PlanExpert>> {
    let layer = &usage.layers[at];
    let n = layer.n_experts();
    let similarity = similarity(usage, at, options.similarity)?;
    let size = (n / shape.groups.n.max(1)).max(1);
    let mut members: Vec<Vec<u16>> = dominant.iter().map(|id| vec![*id]).collect();
    let mut others: Vec<u16> = (0..n as u16).filter(|id| !dominant.contains(id)).collect();
    others.sort_by_key(|id| (std::cmp::Reverse(layer.picks[usize::from(*id)]), *id));
    for id in others {
        let like = |other: u16| similarity[usize::from(id) * n + usize::from(other)];
        let own_group = |other: u16| usize::from(other) / size == usize::from(id) / size;
        let best = dominant
            .iter()
            .enumerate()
            .filter(|(_, other)| own_group(**other))
            .max_by(|(_, a), (_, b)| like(**a).total_cmp(&like(**b)).then(b.cmp(a)));
        if let Some((place, _)) = best {
            members[place].push(id);
        }
    }
    let made = members.into_iter().map(|from| {
        let picks: Vec<f32> = from
            .iter()
            .map(|id| layer.picks[usize::from(*id)] as f32)
            .collect();
        let is_used = picks.iter().any(|n| *n > 0.0);
        let is_merged = from.len() > 1;
        PlanExpert {
            weights: match method {
                // Nothing was seen of any of them: all count the same.
                MergeMethod::MSmoe if is_merged && is_used => picks,
                _ => Vec::new(),
            },
            align: align && is_merged,
            ties: (method == MergeMethod::Ties && is_merged).then_some(TIES_PART),
            from,
            format: None,
        }
    });
    Ok(made.collect())
}

/// Similarities of the experts of the `at`-th layer, `[n, n]`.
fn similarity(usage: &Usage, at: usize, kind: Similarity) -> Result<Vec<f64>> {
    let gram = usage.layers[at].gram.as_ref();
    let gram = gram.ok_or_else(|| ReshapeError::TraceLacks {
        origin: usage.origin.clone(),
        problem: "has no router logits, which similarities are made of".to_owned(),
        hint: "pass one that was recorded with `cadre trace --logits`".to_owned(),
    })?;
    Ok(gram.similarity(kind == Similarity::Pearson))
}

/// Options to be written into a plan.
fn described(usage: &Usage, amount: &Amount, scope: Scope) -> BTreeMap<String, String> {
    let amount = match amount {
        Amount::Share(share) => ("keep", share.to_string()),
        Amount::Bytes { budget, .. } => ("budget", budget.to_string()),
    };
    let scope = match scope {
        Scope::Layer => "layer",
        Scope::Global => "global",
    };
    let tokens = usage.layers.iter().map(|layer| layer.n_tokens).max();
    [
        amount,
        ("scope", scope.to_owned()),
        ("domains", usage.domains.join(", ")),
        ("tokens", tokens.unwrap_or(0).to_string()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// The plan, checked by the rules for plans of others.
fn made(
    shape: &ModelShape,
    (method, keep_rows): (&str, bool),
    options: BTreeMap<String, String>,
    layers: Vec<Vec<PlanExpert>>,
) -> Result<Plan> {
    let mut plan = Plan::of(shape, method, layers);
    plan.options = options;
    for layer in &mut plan.layers {
        layer.keep_rows = keep_rows;
    }
    plan.check(shape)?;
    Ok(plan)
}
