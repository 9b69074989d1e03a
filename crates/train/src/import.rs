//! From a checkpoint folder to a training model, whose experts are stacked.

use crate::architecture::Architecture;
use crate::error::{Result, TrainError};
use crate::export::LAYOUTS;
use crate::init::Init;
use crate::layers::attention::SelfAttention;
use crate::layers::decoupled::DecoupledRouter;
use crate::layers::factored::Factored;
use crate::layers::moe::Moe;
use crate::lm::{FeedForward, LanguageModel, Layer};
use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData as Data};
use cadre_checkpoint::{Checkpoint, ModelConfig, QkNorm, RopeScaling};
use std::path::Path;

/// A training model with the weights of a checkpoint; [`Architecture::of`] its configuration says what else it is.
///
/// # Errors
/// An architecture that the trainer does not compute; a missing, unexpected or misshapen tensor.
pub fn import(checkpoint: &Checkpoint, device: &Device) -> Result<LanguageModel> {
    let config = checkpoint.config();
    check_trainable(config)?;
    checkpoint.expect_exactly(&cadre_checkpoint::tensor_specs(config))?;
    let init = Init {
        seed: 0,
        std: 0.0,
        device: device.clone(),
    };
    let architecture = Architecture::of(config)?;
    let mut model = LanguageModel::init(&architecture, &init);
    let load = |name: &str, shape: &[usize]| checkpoint.tensor_f32(name, shape);
    set(&mut model.embed_tokens, |shape| {
        load("model.embed_tokens.weight", shape)
    })?;
    for (i, layer) in model.layers.iter_mut().enumerate() {
        import_layer(layer, &format!("model.layers.{i}"), &load)?;
    }
    if let Some(gru) = &mut model.router_gru {
        set(&mut gru.weight_ih, |s| {
            load("model.router_gru.weight_ih", s)
        })?;
        set(&mut gru.weight_hh, |s| {
            load("model.router_gru.weight_hh", s)
        })?;
        set(&mut gru.bias_ih, |s| load("model.router_gru.bias_ih", s))?;
        set(&mut gru.bias_hh, |s| load("model.router_gru.bias_hh", s))?;
    }
    if let Some(router) = &mut model.router {
        import_router(router, &load)?;
    }
    set(&mut model.norm, |shape| load("model.norm.weight", shape))?;
    if let Some(head) = &mut model.lm_head {
        set(head, |shape| load("lm_head.weight", shape))?;
    }
    Ok(model)
}

/// A checkpoint folder as the trainer has models.
#[derive(Debug)]
pub struct Opened {
    /// The model without its parameters.
    pub architecture: Architecture,
    /// The parameters.
    pub model: LanguageModel,
    /// Selection-only biases, one per MoE layer; empty when there are none.
    pub biases: Vec<Vec<f32>>,
}

/// Opens a Hugging Face folder as a training model.
///
/// # Errors
/// A folder that is no checkpoint, and as [`import`].
pub fn open(folder: &Path, device: &Device) -> Result<Opened> {
    let checkpoint = Checkpoint::open(folder)?;
    Ok(Opened {
        architecture: Architecture::of(checkpoint.config())?,
        model: import(&checkpoint, device)?,
        biases: import_biases(&checkpoint)?,
    })
}

/// The selection-only biases of a checkpoint's MoE layers; empty when it has none.
///
/// # Errors
/// A missing or misshapen tensor.
pub fn import_biases(checkpoint: &Checkpoint) -> Result<Vec<Vec<f32>>> {
    let config = checkpoint.config();
    let specs = cadre_checkpoint::tensor_specs(config);
    let biases = specs
        .iter()
        .filter(|(name, _)| name.ends_with(".mlp.gate.e_score_correction_bias"))
        .map(|(name, shape)| Ok(checkpoint.tensor_f32(name, shape)?));
    biases.collect()
}

/// Refuses what the training model would compute otherwise than the checkpoint asks for.
pub(crate) fn check_trainable(config: &ModelConfig) -> Result<()> {
    let attention = &config.attention;
    // Mistral without a window is Llama.
    let known = LAYOUTS.contains(&config.model_type.as_str()) || config.model_type == "mistral";
    let plain = known
        && !(attention.qkv_bias || attention.o_bias || config.mlp_bias)
        && attention.qk_norm != QkNorm::WholeProjection
        && attention.windows.iter().all(Option::is_none)
        && config.rope.scaling == RopeScaling::None
        && config.rope.dim == config.head_dim
        // GGUF files of Llama have the rows of queries and keys in another order.
        && !config.rope.interleaved
        && attention.scale == 1.0 / (config.head_dim as f64).sqrt();
    if plain {
        return Ok(());
    }
    Err(TrainError::Untrainable {
        model_type: config.model_type.clone(),
    })
}

type Loaded = cadre_checkpoint::Result<Vec<f32>>;

fn set<const D: usize>(
    param: &mut Param<Tensor<D>>,
    load: impl FnOnce(&[usize]) -> Loaded,
) -> Result<()> {
    let old = param.val();
    let values = load(&old.dims())?;
    let new = Tensor::from_data(Data::new(values, old.dims()), &old.device());
    *param = Param::from_tensor(new);
    Ok(())
}

fn import_layer(
    layer: &mut Layer,
    name: &str,
    load: &impl Fn(&str, &[usize]) -> Loaded,
) -> Result<()> {
    import_attention(&mut layer.self_attn, name, load)?;
    let norms = [
        ("input_layernorm", &mut layer.input_layernorm),
        (
            "post_attention_layernorm",
            &mut layer.post_attention_layernorm,
        ),
    ];
    for (part, param) in norms {
        set(param, |shape| load(&format!("{name}.{part}.weight"), shape))?;
    }
    let prefix = format!("{name}.mlp");
    match &mut layer.mlp {
        FeedForward::Moe(moe) => import_moe(moe, &prefix, load),
        FeedForward::Dense(mlp) => {
            import_experts([&mut mlp.gate_up, &mut mlp.down], |_| prefix.clone(), load)
        }
    }
}

fn import_attention(
    attention: &mut SelfAttention,
    name: &str,
    load: &impl Fn(&str, &[usize]) -> Loaded,
) -> Result<()> {
    let named = |part: &str| format!("{name}.self_attn.{part}.weight");
    for (part, param) in [
        ("q_proj", &mut attention.q_proj),
        ("k_proj", &mut attention.k_proj),
        ("v_proj", &mut attention.v_proj),
        ("o_proj", &mut attention.o_proj),
    ] {
        set(param, |shape| load(&named(part), shape))?;
    }
    if let Some(gate) = &mut attention.gate {
        set(gate, |shape| load(&named("gate"), shape))?;
    }
    for (part, norm) in [
        ("q_norm", &mut attention.q_norm),
        ("k_norm", &mut attention.k_norm),
    ] {
        if let Some(norm) = norm {
            set(norm, |shape| load(&named(part), shape))?;
        }
    }
    Ok(())
}

/// The router that runs before the layers.
fn import_router(
    router: &mut DecoupledRouter,
    load: &impl Fn(&str, &[usize]) -> Loaded,
) -> Result<()> {
    let named = |part: &str| format!("model.router.{part}.weight");
    set(&mut router.embed_tokens, |s| {
        load(&named("embed_tokens"), s)
    })?;
    for (i, layer) in router.layers.iter_mut().enumerate() {
        let part = |part: &str| named(&format!("layers.{i}.{part}"));
        set(&mut layer.input_layernorm, |s| {
            load(&part("input_layernorm"), s)
        })?;
        import_attention(
            &mut layer.self_attn,
            &format!("model.router.layers.{i}"),
            load,
        )?;
        let norm = part("post_attention_layernorm");
        set(&mut layer.post_attention_layernorm, |s| load(&norm, s))?;
        let prefix = |_| format!("model.router.layers.{i}.mlp");
        import_experts([&mut layer.mlp.gate_up, &mut layer.mlp.down], prefix, load)?;
    }
    set(&mut router.norm, |s| load(&named("norm"), s))?;
    set(&mut router.head, |s| load(&named("head"), s))
}

fn import_moe(moe: &mut Moe, name: &str, load: &impl Fn(&str, &[usize]) -> Loaded) -> Result<()> {
    if let Some(gate) = &mut moe.gate {
        set(gate, |shape| load(&format!("{name}.gate.weight"), shape))?;
    }
    if let Some(router_in) = &mut moe.router_in {
        let part = format!("{name}.router_in.weight");
        set(router_in, |shape| load(&part, shape))?;
    }
    let prefix = |e: usize| format!("{name}.experts.{e}");
    if let (Some(gate_up), Some(down)) = (&mut moe.gate_up, &mut moe.down) {
        import_experts([gate_up, down], prefix, load)?;
    }
    if let Some(thin) = &mut moe.thin {
        for (part, matrix) in thin.parts_mut() {
            import_factored(
                matrix,
                |expert, what| format!("{}.{part}.{what}", prefix(expert)),
                load,
            )?;
        }
    }
    if let Some(shared) = &mut moe.shared {
        let prefix = |_| format!("{name}.shared_experts");
        import_experts([&mut shared.gate_up, &mut shared.down], prefix, load)?;
    }
    let Some(residual) = &mut moe.residual else {
        return Ok(());
    };
    let mlp = &mut residual.mlp;
    let prefix = |_| format!("{name}.residual_mlp");
    import_experts([&mut mlp.gate_up, &mut mlp.down], prefix, load)?;
    if let Some(coefficient) = &mut residual.coefficient {
        let part = |part: &str| format!("{name}.residual_coefficient.{part}");
        set(&mut coefficient.weight, |shape| {
            load(&part("weight"), shape)
        })?;
        set(&mut coefficient.bias, |shape| load(&part("bias"), shape))?;
    }
    Ok(())
}

/// Stacks the factors of a matrix of every expert; `name` is told the expert and `inner.weight`, `outer.weight` or `rows`.
fn import_factored(
    matrix: &mut Factored,
    name: impl Fn(usize, &str) -> String,
    load: &impl Fn(&str, &[usize]) -> Loaded,
) -> Result<()> {
    let [n_experts, n_out, rank] = matrix.outer.val().dims();
    let rows: Vec<usize> = matrix.rows.iter().map(Vec::len).collect();
    set(&mut matrix.inner, |shape| {
        let (most, n_in) = (shape[1], shape[2]);
        let mut values = Vec::with_capacity(n_experts * most * n_in);
        for (expert, rows) in rows.iter().enumerate() {
            values.extend(load(&name(expert, "inner.weight"), &[rank + rows, n_in])?);
            values.resize((expert + 1) * most * n_in, 0.0);
        }
        Ok(values)
    })?;
    set(&mut matrix.outer, |shape| {
        let mut values = Vec::with_capacity(shape.iter().product());
        for expert in 0..n_experts {
            values.extend(load(&name(expert, "outer.weight"), &shape[1..])?);
        }
        Ok(values)
    })?;
    for (expert, rows) in matrix.rows.iter_mut().enumerate() {
        if rows.is_empty() {
            continue;
        }
        let name = name(expert, "rows");
        let found = load(&name, &[rows.len()])?;
        let is_row = |row: &f32| *row >= 0.0 && row.fract() == 0.0 && (*row as usize) < n_out;
        if let Some(at) = found.iter().position(|row| !is_row(row)) {
            return Err(TrainError::NoRow {
                tensor: name,
                at,
                value: found[at],
                n_out,
            });
        }
        *rows = found.into_iter().map(|row| row as usize).collect();
    }
    Ok(())
}

/// Stacks `gate_up [E, 2 I, D]` and `down [E, D, I]` from the three matrices of each expert.
fn import_experts(
    [gate_up, down]: [&mut Param<Tensor<3>>; 2],
    prefix: impl Fn(usize) -> String,
    load: &impl Fn(&str, &[usize]) -> Loaded,
) -> Result<()> {
    let stack = |shape: &[usize], parts: &[&str]| {
        let rows = shape[1] / parts.len();
        let mut values = Vec::with_capacity(shape.iter().product());
        for e in 0..shape[0] {
            for part in parts {
                let name = format!("{}.{part}.weight", prefix(e));
                values.extend(load(&name, &[rows, shape[2]])?);
            }
        }
        Ok(values)
    };
    set(gate_up, |shape| stack(shape, &["gate_proj", "up_proj"]))?;
    set(down, |shape| stack(shape, &["down_proj"]))
}
