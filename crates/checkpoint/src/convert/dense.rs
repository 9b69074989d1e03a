//! Experts in place of a dense model's feed-forwards: the first layout that can say the whole of it, and its tensors.

use std::sync::Arc;

use super::experts::{MixedPart, Mixer, Piece};
use super::forms::{differences, folder_form};
use super::recipe::Recipe;
use super::{
    Conversion, ConvertOptions, ConvertTo, QuantizeOptions, TargetDtype, in_layer, to_folder,
};
use crate::Dtype;
use crate::checkpoint::Checkpoint;
use crate::config::{ModelConfig, MoeConfig};
use crate::error::{CheckpointError, Result};
use crate::specs::tensor_specs;

/// Layouts that are tried, in this order: those that other programs load before ours.
const LAYOUTS: &[&str] = &["mixtral", "qwen3_moe", "qwen2_moe", "cadre_moe"];

/// What takes the place of a dense model's feed-forwards.
#[derive(Debug, Clone)]
pub struct NewFeedForwards {
    /// The experts. Layers that [`MoeConfig::layers`] does not name keep their feed-forward.
    pub moe: MoeConfig,
    /// Makes the tensors of experts, `at` being the id of one; that of a shared expert follows those of the others.
    pub mixer: Arc<dyn Mixer>,
    /// The router of each of the layers with experts: `[n_experts, hidden_size]`, row-major.
    pub routers: Vec<Vec<f32>>,
    /// The gate of the shared expert of each of these layers, `[hidden_size]`; empty where there is no shared expert.
    pub shared_gates: Vec<Vec<f32>>,
}

/// The configuration of a folder with the experts `moe` in place of the feed-forwards of the dense model `source`.
///
/// # Errors
/// A model that has experts, and one whose attention, norms or activation no known layout has together with experts: the
/// text says of every layout what it lacks.
pub(super) fn layout(source: &Checkpoint, moe: &MoeConfig) -> Result<ModelConfig> {
    let dense = folder_form(source.config());
    if !dense.moe.layers.is_empty() {
        return Err(CheckpointError::experts(
            source.origin(),
            "it has experts already; a dense model is needed".to_owned(),
        ));
    }
    let mut reasons = Vec::new();
    for name in LAYOUTS {
        let mut form = ModelConfig {
            model_type: (*name).to_owned(),
            moe: moe.clone(),
            ..dense.clone()
        };
        if moe.layers.len() == form.n_layers {
            // Nothing has this width any more.
            form.intermediate_size = moe.intermediate_size;
        }
        match fits(source.origin(), &form) {
            Ok(()) => return Ok(form),
            Err(reason) => reasons.push(format!("{name}: {reason}")),
        }
    }
    let problem = format!(
        "no layout has both its `{}` and such experts ({})",
        dense.model_type,
        reasons.join("; ")
    );
    Err(CheckpointError::experts(source.origin(), problem))
}

/// Whether what is written for `form` is read as it is meant.
fn fits(origin: &str, form: &ModelConfig) -> std::result::Result<(), String> {
    let text = form
        .to_config_json(Dtype::F32)
        .map_err(|error| error.to_string())?;
    let theirs = ModelConfig::parse(origin, &text, None).map_err(|error| error.to_string())?;
    let differences = differences(form, &theirs);
    if !differences.is_empty() {
        return Err(differences.join(", "));
    }
    match tensor_specs(form) == tensor_specs(&theirs) {
        true => Ok(()),
        false => Err("it has other tensors".to_owned()),
    }
}

/// Plans to write `source` as a folder with `new` in place of its feed-forwards.
pub(super) fn plan<'a>(
    source: &'a Checkpoint,
    new: &NewFeedForwards,
    (dtype, max_shard_bytes): (TargetDtype, u64),
    settings: String,
) -> Result<Conversion<'a>> {
    let form = layout(source, &new.moe)?;
    check(source, &form, new)?;
    let options = ConvertOptions {
        target: ConvertTo::Folder { max_shard_bytes },
        dtype,
        allow_differences: false,
        quantize: QuantizeOptions::default(),
    };
    let layout = form.model_type.clone();
    let mut conversion = to_folder::plan_form(source, form, Some(new), &options)?;
    conversion.layout = Some(layout);
    conversion.settings = settings;
    Ok(conversion)
}

/// Routers and gates must be those of the layers.
fn check(source: &Checkpoint, form: &ModelConfig, new: &NewFeedForwards) -> Result<()> {
    let (n_layers, d) = (new.moe.layers.len(), form.hidden_size);
    let wrong = new
        .routers
        .iter()
        .zip(&new.moe.layers)
        .find(|(router, layer)| router.len() != form.n_experts_in(**layer) * d);
    if new.routers.len() != n_layers || wrong.is_some() {
        let problem =
            format!("routers have other shapes than [n_experts, {d}] for {n_layers} layers");
        return Err(CheckpointError::experts(source.origin(), problem));
    }
    let gates = match new.moe.shared {
        Some(shared) if shared.gated => n_layers,
        _ => 0,
    };
    if new.shared_gates.len() == gates && new.shared_gates.iter().all(|gate| gate.len() == d) {
        return Ok(());
    }
    let problem =
        format!("gates of shared experts have other shapes than [{d}] for {gates} layers");
    Err(CheckpointError::experts(source.origin(), problem))
}

/// How a tensor of a layer with experts is made, and the stored format that it follows; nothing for all other tensors.
pub(super) fn recipe(
    source: &Checkpoint,
    new: &NewFeedForwards,
    name: &str,
) -> Option<(Recipe, Dtype)> {
    let (layer, rest) = in_layer(name)?;
    let place = new.moe.layers.binary_search(&layer).ok()?;
    let rest = rest.strip_prefix("mlp.")?;
    match rest {
        "gate.weight" => return Some((Recipe::Values(new.routers[place].clone()), Dtype::F32)),
        "shared_expert_gate.weight" => {
            let gate = new.shared_gates.get(place)?;
            return Some((Recipe::Values(gate.clone()), Dtype::F32));
        }
        _ => {}
    }
    let (at, part) = match rest.strip_prefix("shared_experts.") {
        Some(part) => (new.moe.n_experts_at(place), part),
        None => {
            let (expert, part) = rest.strip_prefix("experts.")?.split_once('.')?;
            (expert.parse().ok()?, part)
        }
    };
    let of_dense = format!("model.layers.{layer}.mlp.{part}");
    let stored = source.tensor_info(&of_dense).map(|(dtype, _)| dtype);
    let made = Piece::Mixed(MixedPart {
        mixer: Arc::clone(&new.mixer),
        layer,
        at,
        part: part.to_owned(),
    });
    Some((Recipe::Pieces(vec![made]), stored.unwrap_or(Dtype::F32)))
}
