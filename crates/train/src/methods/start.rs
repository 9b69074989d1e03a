//! Where a run starts and what of it moves: from a checkpoint, with parts held still.
//!
//! Paper: none; what continued pre-training, router-only and experts-only tuning need (for example AdaMoE, Zeng et al.,
//! 2024, arXiv 2406.13233, which trains routers and experts of a trained model).
//! Rule: parameters come from the checkpoint, AdamW's moments start at zero; frozen parts get no gradient, no weight decay
//! and no moments, and do not move by a bit.
//! Recipe: `[start] from = FOLDER, freeze = ["router", "experts", "dense"]`; either key may be left out. The tokens are
//! those of the checkpoint's tokenizer.
//! State: none; a resumed run takes everything from its snapshot.
//! Check: methods::start::tests, tests/methods.rs.

use crate::architecture::Architecture;
use crate::error::{Result, TrainError};
use crate::export::{self, Opened};
use crate::lm::LanguageModel;
use crate::params;
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use cadre_checkpoint::ModelConfig;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};

/// `[start]` of a recipe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Start {
    /// Hugging Face folder with the first parameters; random ones without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// What does not move.
    pub freeze: Vec<Part>,
}

/// Parameters by path.
type Parameters = BTreeMap<String, params::Values>;

/// A part of a model; every parameter is in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// What makes the routers' logits.
    Router,
    /// Routed experts.
    Experts,
    /// Everything that all tokens pass: attention, norms, embeddings, dense and shared feed-forward.
    Dense,
}

impl Part {
    /// The part that a parameter of the training model belongs to.
    #[must_use]
    pub fn of(path: &str) -> Self {
        let name = path.rsplit('.').next().unwrap_or_default();
        if path.starts_with("router_gru")
            || path.starts_with("router.")
            || path.ends_with(".self_attn.gate")
        {
            return Self::Router;
        }
        match name {
            "gate" | "router_in" if path.contains(".Moe.") => Self::Router,
            _ if path.contains(".Moe.thin.") => Self::Experts,
            "gate_up" | "down" if path.ends_with(&format!(".Moe.{name}")) => Self::Experts,
            _ => Self::Dense,
        }
    }
}

impl Start {
    /// Refuses to hold everything still.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self) -> Result<(), String> {
        let all = [Part::Router, Part::Experts, Part::Dense];
        if all.iter().all(|part| self.freeze.contains(part)) {
            return Err("`start.freeze` names every part, nothing would be trained".to_owned());
        }
        Ok(())
    }

    /// Whether a parameter does not move.
    #[must_use]
    pub fn is_frozen(&self, path: &str) -> bool {
        self.freeze.contains(&Part::of(path))
    }

    /// `model`, whose frozen parameters have no gradient: what only leads to them is not computed.
    #[must_use]
    pub(crate) fn held_still(&self, model: LanguageModel) -> LanguageModel {
        model.map(&mut Still {
            path: Vec::new(),
            start: self,
        })
    }
}

struct Still<'a> {
    path: Vec<String>,
    start: &'a Start,
}

impl ModuleMapper for Still<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.start.is_frozen(&self.path.join(".")) {
            true => param.set_require_grad(false),
            false => param,
        }
    }
}

/// The checkpoint in `folder`, for a run of `architecture` whose random parameters are `fresh`. Where the run has a router
/// before its layers and the checkpoint none, that one is new, but for its embedding, which is made of the first columns of
/// the model's; the checkpoint's own routers are left behind.
///
/// # Errors
/// A folder that is no checkpoint, a layout that the trainer does not know, or sizes other than the recipe's, all of which
/// are named.
pub fn load(
    folder: &Path,
    architecture: &Architecture,
    fresh: &LanguageModel,
    device: &Device,
) -> Result<Opened> {
    let mut opened = export::open(folder, device)?;
    let mut differences = compare(&opened.architecture.config, &architecture.config);
    let (mut found, mut wanted) = (params::collect(&opened.model), params::collect(fresh));
    let has_router = |a: &Architecture| a.parts.decoupled.is_some();
    let router_is_new = has_router(architecture) && !has_router(&opened.architecture);
    if router_is_new {
        let stays = |path: &str| Part::of(path) != Part::Router || path.contains(".self_attn.");
        found.retain(|path, _| stays(path));
        wanted.retain(|path, _| stays(path) && !path.starts_with("router."));
    }
    differences.extend(different_shapes(&found, &wanted));
    if differences.is_empty() {
        if router_is_new {
            opened.model = with_new_router(fresh, &found);
            // They moved the selection of routers that are gone.
            opened.biases.clear();
        }
        return Ok(opened);
    }
    Err(TrainError::DoesNotFit {
        path: folder.to_owned(),
        differences,
    })
}

/// What has another shape than by the recipe, or is there once only; the first few, since many tensors have a wrong size for
/// the same reason.
fn different_shapes(found: &Parameters, wanted: &Parameters) -> Vec<String> {
    let shape = |shape: Option<&params::Values>| {
        shape.map_or_else(|| "absent".to_owned(), |(shape, _)| format!("{shape:?}"))
    };
    let others = found.keys().filter(|path| !wanted.contains_key(*path));
    wanted
        .keys()
        .chain(others)
        .map(|path| (path, shape(found.get(path)), shape(wanted.get(path))))
        .filter(|(_, theirs, ours)| theirs != ours)
        .map(|(path, theirs, ours)| {
            format!("parameter {path} is {theirs} there, {ours} by the recipe")
        })
        .take(8)
        .collect()
}

/// As [`different_shapes`], for parameters without those of a router before the layers.
pub(super) fn misshapen(found: &Parameters, fresh: &Parameters) -> Vec<String> {
    let mut wanted = fresh.clone();
    wanted.retain(|path, _| !path.starts_with("router."));
    different_shapes(found, &wanted)
}

/// The parameters `found`, and what is missing there from `fresh`.
pub(super) fn with_new_router(fresh: &LanguageModel, found: &Parameters) -> LanguageModel {
    let own = params::collect(fresh);
    let columns = |shape: &[usize]| {
        let (table_shape, table) = found.get("embed_tokens")?;
        let (&[rows, width], &[_, d]) = (shape, table_shape.as_slice()) else {
            return None;
        };
        let row = |row: usize| table[row * d..row * d + width].iter().copied();
        (width <= d).then(|| (0..rows).flat_map(row).collect::<Vec<f32>>())
    };
    let take = |path: &str, shape: &[usize]| {
        let copied = match path {
            "router.embed_tokens" => columns(shape),
            _ => None,
        };
        let values = copied.or_else(|| found.get(path).map(|(_, values)| values.clone()));
        let values = values.or_else(|| own.get(path).map(|(_, values)| values.clone()));
        Ok::<_, Infallible>(values.expect("every parameter is in one of the two"))
    };
    match params::replace(fresh.clone(), take) {
        Ok(model) => model,
    }
}

/// What parameters do not show: numbers by which the same values would compute something else.
pub(super) fn compare(theirs: &ModelConfig, ours: &ModelConfig) -> Vec<String> {
    let numbers = |c: &ModelConfig| {
        [
            ("num_attention_heads", c.n_heads as f64),
            ("num_key_value_heads", c.n_kv_heads as f64),
            ("head_dim", c.head_dim as f64),
            ("num_hidden_layers", c.n_layers as f64),
            ("rope_theta", c.rope.theta),
            ("rms_norm_eps", c.norm_eps),
        ]
    };
    let pairs = numbers(theirs).into_iter().zip(numbers(ours));
    pairs
        .filter(|((_, a), (_, b))| a != b)
        .map(|((key, a), (_, b))| format!("{key} is {a} there, {b} by the recipe"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_is_in_one_part() {
        for (path, part) in [
            ("layers.0.mlp.Moe.gate", Part::Router),
            ("layers.3.mlp.Moe.router_in", Part::Router),
            ("router_gru.weight_ih", Part::Router),
            ("router.embed_tokens", Part::Router),
            ("router.layers.0.mlp.gate_up", Part::Router),
            ("layers.0.mlp.Moe.gate_up", Part::Experts),
            ("layers.0.mlp.Moe.down", Part::Experts),
            ("layers.0.mlp.Moe.thin.gate.inner", Part::Experts),
            ("layers.0.mlp.Moe.shared.gate_up", Part::Dense),
            ("layers.0.mlp.Dense.gate_up", Part::Dense),
            ("layers.0.self_attn.q_proj", Part::Dense),
            ("layers.0.self_attn.gate", Part::Router),
            ("embed_tokens", Part::Dense),
        ] {
            assert_eq!(Part::of(path), part, "{path}");
        }
    }

    #[test]
    fn nothing_left_to_train_is_refused() {
        let start = |freeze: Vec<Part>| Start { from: None, freeze };
        assert!(start(vec![Part::Router, Part::Dense]).check().is_ok());
        let all = vec![Part::Router, Part::Dense, Part::Experts];
        assert!(start(all).check().unwrap_err().contains("start.freeze"));
    }
}
