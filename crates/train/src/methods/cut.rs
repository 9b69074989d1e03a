//! A dense model cut into experts by what its neurons do: one expert for every domain of the data.
//!
//! Paper: Read-ME, Cai et al., 2024, arXiv 2410.19123.
//! Rule: in every layer the expert of domain i has the `model.moe_intermediate_size` neurons whose `|silu(gate x) * up x|` is
//! largest in the mean over text of that domain, with their weights as they are. Neurons that all domains want are in all
//! experts. A token's expert has the weight 1 (`top_k = 1`, renormalised). Taught by `[router_distill]` with the dense model as
//! its teacher, a router before the layers follows how much of what a token uses each expert has: `u_i` is the share
//! of the half of the neurons that are largest on this token which expert i has too, and `q = softmax(sharpness (u - mean
//! u))`.
//! Recipe: `[cut] dense = FOLDER, tokens = 8192, sharpness = 10.0`, with as many experts as `data.sources`, in that order.
//! `by = "random"` takes any neurons, for comparisons.
//! State: none; the same text gives the same experts. Cost: a pass over `tokens` tokens of every domain at the start.
//! Differs from paper: u counts neurons by |v| (its code grades by the signed v); neurons wanted by all are not kept apart as
//! a shared expert, which computes the same with one expert per token; rounds of router and experts are runs of their own,
//! with `start.freeze`.
//! Check: methods::cut::tests, tests/decoupled.rs (one domain and all neurons are the dense model).

use crate::architecture::Architecture;
use crate::data::{self, Corpus};
use crate::device::read;
use crate::error::{Result, TrainError};
use crate::export::{self, Opened};
use crate::init::stream;
use crate::lm::{Batch, FeedForward, LanguageModel, Pass, Walk};
use crate::methods::start;
use crate::params;
use crate::recipe::{Experts, Recipe};
use burn::tensor::Device;
use cadre_checkpoint::ModelConfig;
use cadre_routing::RoutingError;
use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[cut]` of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// Hugging Face folder of the dense model.
    pub dense: PathBuf,
    /// Tokens of each domain that neurons are counted on.
    #[serde(default = "some_tokens")]
    pub tokens: usize,
    /// Which neurons an expert gets: `"activity"`, those that its domain uses most, or `"random"`.
    #[serde(default)]
    pub by: By,
    /// How clearly the router is told which expert a token wants.
    #[serde(default = "ten")]
    pub sharpness: f32,
}

/// Which neurons an expert gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Those that are most active on its domain.
    #[default]
    Activity,
    /// Any, drawn from the run's seed.
    Random,
}

fn some_tokens() -> usize {
    8192
}
fn ten() -> f32 {
    10.0
}

impl Cut {
    /// Refuses what would not be experts of a dense model.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self, recipe: &Recipe) -> Result<(), String> {
        let m = &recipe.model;
        let n_domains = recipe.data.as_ref().map_or(0, |data| data.sources.len());
        if m.n_experts != Experts::Same(n_domains) {
            return Err(format!(
                "`[cut]` makes an expert for each of the {n_domains} domains of `data.sources`, so that `model.n_experts` has \
                 to be {n_domains}"
            ));
        }
        let rule = recipe
            .router
            .as_ref()
            .map_or("top_k", |router| router.name.as_str());
        if rule != "top_k" || m.top_k != 1 || !m.norm_topk_prob {
            return Err("`[cut]` needs the router `top_k` with `model.top_k` = 1 and `model.norm_topk_prob` = true".to_owned());
        }
        if !m.mlp_only_layers.is_empty()
            || m.residual.is_some()
            || m.shared_intermediate_size.is_some()
        {
            return Err("`[cut]` makes all of every layer's feed-forward into experts; nothing may be dense beside them".to_owned());
        }
        if recipe
            .start
            .as_ref()
            .is_some_and(|start| start.from.is_some())
        {
            return Err(
                "`[cut]` says where the run starts, and so does `start.from`; keep one".to_owned(),
            );
        }
        if m.decoupled_router.is_none() {
            return Err(
                "`[cut]` needs `model.decoupled_router`, which picks among the experts".to_owned(),
            );
        }
        if self.tokens == 0 {
            return Err("`cut.tokens` = 0, expected at least 1".to_owned());
        }
        if self.sharpness > 0.0 && self.sharpness.is_finite() {
            return Ok(());
        }
        Err(format!(
            "`cut.sharpness` = {}, expected more than 0",
            self.sharpness
        ))
    }
}

/// What a cut needs of its run.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// The domains, in the order of the experts.
    pub corpus: &'a Corpus,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Seed of the run.
    pub seed: u64,
    /// Where parameters live.
    pub device: &'a Device,
}

/// Which neurons experts have, by layer, then expert; ascending.
pub type Neurons = Vec<Vec<Vec<usize>>>;

/// Where a run begins that cuts a dense model.
#[derive(Debug)]
pub struct CutModel {
    /// Its parameters.
    pub model: LanguageModel,
    /// Which neurons its experts have.
    pub neurons: Neurons,
    /// The description of the dense model.
    pub dense: ModelConfig,
}

/// Where a run begins with the experts of `cut`; `fresh` are random parameters.
///
/// # Errors
/// A folder that is no dense checkpoint of the recipe's sizes, and a domain with too little text.
pub fn load(
    cut: &Cut,
    architecture: &Architecture,
    fresh: &LanguageModel,
    around: Around<'_>,
) -> Result<CutModel> {
    let plain = around.device.clone().without_autodiff();
    let opened = export::open(&cut.dense, &plain)?;
    let misfit = |differences: Vec<String>| TrainError::DoesNotFit {
        path: cut.dense.clone(),
        differences,
    };
    let mut differences = start::compare(&opened.architecture.config, &architecture.config);
    if !opened.architecture.moe.is_empty() {
        differences.push("it has experts already".to_owned());
    }
    let (width, wanted) = (
        opened.architecture.config.intermediate_size,
        architecture.config.moe.intermediate_size,
    );
    if wanted > width {
        differences.push(format!(
            "moe_intermediate_size is {wanted}, of {width} neurons there"
        ));
    }
    if !differences.is_empty() {
        return Err(misfit(differences));
    }
    let mut neurons: Neurons = vec![Vec::new(); architecture.config.n_layers];
    for domain in &around.corpus.domains {
        let Some(text) = data::windows(&domain.train, around.seq_len, cut.tokens) else {
            let problem = format!(
                "domain `{}` has too little text to see its neurons",
                domain.name
            );
            return Err(misfit(vec![problem]));
        };
        let importance = match cut.by {
            By::Activity => importance(&opened, &text)?,
            By::Random => {
                let mut rng = stream(around.seed, &format!("cut.{}", domain.name));
                let mut draw = || (0..width).map(|_| rng.random::<f32>()).collect();
                (0..neurons.len()).map(|_| draw()).collect()
            }
        };
        for (layer, importance) in neurons.iter_mut().zip(importance) {
            layer.push(largest(&importance, wanted));
        }
    }
    let mut found = params::collect(&opened.model);
    let d = architecture.config.hidden_size;
    for (layer, experts) in neurons.iter().enumerate() {
        let path = |kind: &str, part: &str| format!("layers.{layer}.mlp.{kind}.{part}");
        let mut take = |part: &str| found.remove(&path("Dense", part));
        let (Some((_, gate_up)), Some((_, down))) = (take("gate_up"), take("down")) else {
            return Err(misfit(vec![format!(
                "layer {layer} has no dense feed-forward"
            )]));
        };
        let (mut of_gate_up, mut of_down) = (Vec::new(), Vec::new());
        for expert in experts {
            for first in [0, width] {
                let rows = expert.iter().map(|neuron| (first + neuron) * d);
                of_gate_up.extend(rows.flat_map(|row| gate_up[row..row + d].iter().copied()));
            }
            for row in down.chunks_exact(width) {
                of_down.extend(expert.iter().map(|neuron| row[*neuron]));
            }
        }
        let n = experts.len();
        found.insert(path("Moe", "gate_up"), (vec![n, 2 * wanted, d], of_gate_up));
        found.insert(path("Moe", "down"), (vec![n, d, wanted], of_down));
    }
    let differences = start::misshapen(&found, &params::collect(fresh));
    if !differences.is_empty() {
        return Err(misfit(differences));
    }
    Ok(CutModel {
        model: start::with_new_router(fresh, &found),
        neurons,
        dense: opened.architecture.config,
    })
}

/// Mean magnitude of every neuron over the tokens of `text`, by layer.
fn importance(opened: &Opened, text: &Batch) -> Result<Vec<Vec<f32>>, RoutingError> {
    let mut sums: Vec<Vec<f64>> = Vec::new();
    // One sequence at a time, which bounds memory.
    for tokens in text.tokens.chunks(text.seq_len) {
        let batch = Batch {
            tokens: std::sync::Arc::new(tokens.to_vec()),
            targets: std::sync::Arc::new(tokens.to_vec()),
            seq_len: text.seq_len,
        };
        for (layer, (width, values)) in inner(opened, &batch)?.into_iter().enumerate() {
            if sums.len() == layer {
                sums.push(vec![0.0; width]);
            }
            for row in values.chunks_exact(width) {
                let cells = sums[layer].iter_mut().zip(row);
                cells.for_each(|(sum, value)| *sum += f64::from(value.abs()));
            }
        }
    }
    let n = text.tokens.len() as f64;
    let mean = |layer: Vec<f64>| layer.into_iter().map(|sum| (sum / n) as f32).collect();
    Ok(sums.into_iter().map(mean).collect())
}

/// What the feed-forward of every layer multiplies by its last matrix, `[T, I]`, with `I`.
fn inner(opened: &Opened, batch: &Batch) -> Result<Vec<(usize, Vec<f32>)>, RoutingError> {
    let pass = Pass::default();
    let model = &opened.model;
    let walk = Walk::new(model, &opened.architecture, batch, &pass);
    let mut x = model.embedded(batch);
    let mut all = Vec::with_capacity(model.layers.len());
    for (index, layer) in model.layers.iter().enumerate() {
        let FeedForward::Dense(mlp) = &layer.mlp else {
            unreachable!("a model with experts has been refused");
        };
        let values = mlp.inner(walk.feed_forward_input(index, x.clone())?);
        let width = values.dims()[1];
        all.push((width, read(values)?));
        x = walk.layer(index, x, None)?.0;
    }
    Ok(all)
}

/// The `n` largest, ascending; of equals the first.
fn largest(values: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    if n < order.len() {
        order.select_nth_unstable_by(n, |a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
        order.truncate(n);
        order.sort_unstable();
    }
    order
}

/// Of every token and layer, by how much each expert has what the token uses: `q`, `[T, E]` row by row.
///
/// # Errors
/// Values of the dense model that are not finite.
pub(crate) fn wanted(
    opened: &Opened,
    neurons: &Neurons,
    batch: &Batch,
    sharpness: f32,
) -> Result<Vec<Vec<f32>>, RoutingError> {
    let layers = inner(opened, batch)?.into_iter().zip(neurons);
    Ok(layers
        .map(|((width, values), experts)| {
            let rows = values.par_chunks_exact(width);
            rows.flat_map_iter(|row| probabilities(row, experts, sharpness))
                .collect()
        })
        .collect())
}

/// `softmax(sharpness (u - mean u))` of one token.
fn probabilities(values: &[f32], experts: &[Vec<usize>], sharpness: f32) -> Vec<f32> {
    let magnitudes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
    let half = (values.len() / 2).max(1);
    let mut is_used = vec![false; values.len()];
    for neuron in largest(&magnitudes, half) {
        is_used[neuron] = true;
    }
    let share = |expert: &Vec<usize>| {
        expert.iter().filter(|neuron| is_used[**neuron]).count() as f32 / half as f32
    };
    let shares: Vec<f32> = experts.iter().map(share).collect();
    let most = shares.iter().copied().fold(0.0, f32::max);
    // The mean cancels.
    let powers: Vec<f32> = shares
        .iter()
        .map(|share| (sharpness * (share - most)).exp())
        .collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_neurons_are_taken_and_ties_go_to_the_first() {
        assert_eq!(largest(&[0.5, 2.0, 0.5, 3.0], 3), [0, 1, 3]);
        assert_eq!(largest(&[1.0, 1.0, 1.0], 2), [0, 1]);
        assert!(largest(&[1.0], 0).is_empty());
    }

    #[test]
    fn a_token_wants_the_expert_that_has_what_it_uses() {
        let experts = [vec![0, 1], vec![2, 3], vec![0, 3]];
        // Neurons 0 and 1 are the larger half, whatever their sign.
        let q = probabilities(&[-3.0, 2.0, 0.5, -0.1], &experts, 2.0);
        let weights = [1.0, (-2.0_f32).exp(), (-1.0_f32).exp()];
        let sum: f32 = weights.iter().sum();
        for (q, weight) in q.iter().zip(weights) {
            assert!((q - weight / sum).abs() < 1e-6, "{q}");
        }
    }
}
