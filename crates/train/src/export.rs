//! Between the training model, whose experts are stacked, and the tensors of a checkpoint folder.

use crate::architecture::Architecture;
use crate::error::{Result, TrainError};
use crate::init::Init;
use crate::lm::{FeedForward, LanguageModel, Layer};
use crate::params::values;
use crate::routers::RouterOptions;
use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData as Data};
use cadre_checkpoint::{
    Checkpoint, Dtype, FolderContents, ModelConfig, RopeScaling, TensorData, write_folder,
};
use std::borrow::Cow;
use std::path::Path;

/// Writes a Hugging Face folder that transformers loads unchanged, complete or not at all.
///
/// # Errors
/// Values that are not finite, and failures of the file system.
pub fn export(
    model: &LanguageModel,
    config: &ModelConfig,
    tokenizer_json: &str,
    dtype: Dtype,
    folder: &Path,
) -> Result<()> {
    write_folder(
        folder,
        &FolderContents {
            config,
            tensors: &tensors(model),
            dtype,
            tokenizer_json: Some(tokenizer_json),
        },
    )?;
    Ok(())
}

/// The model's tensors under their checkpoint names.
#[must_use]
pub fn tensors(model: &LanguageModel) -> Vec<TensorData<'static>> {
    let mut out = Vec::new();
    push(
        &mut out,
        "model.embed_tokens".to_owned(),
        &model.embed_tokens,
    );
    for (i, layer) in model.layers.iter().enumerate() {
        push_layer(&mut out, &format!("model.layers.{i}"), layer);
    }
    push(&mut out, "model.norm".to_owned(), &model.norm);
    if let Some(head) = &model.lm_head {
        push(&mut out, "lm_head".to_owned(), head);
    }
    out
}

fn push<const D: usize>(out: &mut Vec<TensorData<'_>>, name: String, param: &Param<Tensor<D>>) {
    let tensor = param.val();
    out.push(TensorData {
        name: format!("{name}.weight"),
        shape: tensor.dims().to_vec(),
        values: Cow::Owned(values(&tensor)),
    });
}

fn push_layer(out: &mut Vec<TensorData<'_>>, name: &str, layer: &Layer) {
    push(
        out,
        format!("{name}.input_layernorm"),
        &layer.input_layernorm,
    );
    let attention = &layer.self_attn;
    for (part, param) in [
        ("q_proj", &attention.q_proj),
        ("k_proj", &attention.k_proj),
        ("v_proj", &attention.v_proj),
        ("o_proj", &attention.o_proj),
    ] {
        push(out, format!("{name}.self_attn.{part}"), param);
    }
    push(out, format!("{name}.self_attn.q_norm"), &attention.q_norm);
    push(out, format!("{name}.self_attn.k_norm"), &attention.k_norm);
    let norm = &layer.post_attention_layernorm;
    push(out, format!("{name}.post_attention_layernorm"), norm);
    match &layer.mlp {
        FeedForward::Moe(moe) => {
            push(out, format!("{name}.mlp.gate"), &moe.gate);
            push_experts(out, &moe.gate_up, &moe.down, |e| {
                format!("{name}.mlp.experts.{e}")
            });
        }
        FeedForward::Dense(mlp) => {
            push_experts(out, &mlp.gate_up, &mlp.down, |_| format!("{name}.mlp"));
        }
    }
}

/// Splits stacked experts: `gate_up [E, 2 I, D]` and `down [E, D, I]`.
fn push_experts(
    out: &mut Vec<TensorData<'_>>,
    gate_up: &Param<Tensor<3>>,
    down: &Param<Tensor<3>>,
    prefix: impl Fn(usize) -> String,
) {
    let [n_experts, d, width] = down.val().dims();
    let (gate_up, down) = (values(&gate_up.val()), values(&down.val()));
    let size = width * d;
    for e in 0..n_experts {
        let parts = [
            (
                "gate_proj",
                [width, d],
                &gate_up[2 * e * size..(2 * e + 1) * size],
            ),
            (
                "up_proj",
                [width, d],
                &gate_up[(2 * e + 1) * size..(2 * e + 2) * size],
            ),
            ("down_proj", [d, width], &down[e * size..(e + 1) * size]),
        ];
        for (part, shape, values) in parts {
            out.push(TensorData {
                name: format!("{}.{part}.weight", prefix(e)),
                shape: shape.to_vec(),
                values: Cow::Owned(values.to_vec()),
            });
        }
    }
}

/// A training model with the weights of a checkpoint.
///
/// # Errors
/// A missing, unexpected or misshapen tensor.
pub fn import(checkpoint: &Checkpoint, device: &Device) -> Result<LanguageModel> {
    let config = checkpoint.config();
    check_trainable(config)?;
    checkpoint.expect_exactly(&cadre_checkpoint::tensor_specs(config))?;
    let init = Init {
        seed: 0,
        std: 0.0,
        device: device.clone(),
    };
    let architecture = Architecture::new(config.clone(), &RouterOptions::default())?;
    let mut model = LanguageModel::init(&architecture, &init);
    let load =
        |name: &str, shape: &[usize]| checkpoint.tensor_f32(&format!("{name}.weight"), shape);
    set(&mut model.embed_tokens, |shape| {
        load("model.embed_tokens", shape)
    })?;
    for (i, layer) in model.layers.iter_mut().enumerate() {
        import_layer(layer, &format!("model.layers.{i}"), &load)?;
    }
    set(&mut model.norm, |shape| load("model.norm", shape))?;
    if let Some(head) = &mut model.lm_head {
        set(head, |shape| load("lm_head", shape))?;
    }
    Ok(model)
}

/// Refuses what the training model would compute otherwise than the checkpoint asks for.
fn check_trainable(config: &ModelConfig) -> Result<()> {
    let attention = &config.attention;
    let plain = config.model_type == "qwen3_moe"
        && !attention.qkv_bias
        && attention.windows.iter().all(Option::is_none)
        && config.rope.scaling == RopeScaling::None;
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
    let named = |part: &str| format!("{name}.{part}");
    let attention = &mut layer.self_attn;
    for (part, param) in [
        ("q_proj", &mut attention.q_proj),
        ("k_proj", &mut attention.k_proj),
        ("v_proj", &mut attention.v_proj),
        ("o_proj", &mut attention.o_proj),
    ] {
        set(param, |shape| {
            load(&named(&format!("self_attn.{part}")), shape)
        })?;
    }
    for (part, param) in [
        ("input_layernorm", &mut layer.input_layernorm),
        ("self_attn.q_norm", &mut attention.q_norm),
        ("self_attn.k_norm", &mut attention.k_norm),
        (
            "post_attention_layernorm",
            &mut layer.post_attention_layernorm,
        ),
    ] {
        set(param, |shape| load(&named(part), shape))?;
    }
    let stack = |shape: &[usize], prefix: &dyn Fn(usize) -> String, parts: &[&str]| {
        let rows = shape[1] / parts.len();
        let mut values = Vec::with_capacity(shape.iter().product());
        for e in 0..shape[0] {
            for part in parts {
                values.extend(load(&format!("{}.{part}", prefix(e)), &[rows, shape[2]])?);
            }
        }
        Ok(values)
    };
    let (gate_up, down, prefix): (_, _, Box<dyn Fn(usize) -> String>) = match &mut layer.mlp {
        FeedForward::Moe(moe) => {
            set(&mut moe.gate, |shape| load(&named("mlp.gate"), shape))?;
            let prefix = named("mlp.experts");
            (
                &mut moe.gate_up,
                &mut moe.down,
                Box::new(move |e| format!("{prefix}.{e}")),
            )
        }
        FeedForward::Dense(mlp) => {
            let prefix = named("mlp");
            (
                &mut mlp.gate_up,
                &mut mlp.down,
                Box::new(move |_| prefix.clone()),
            )
        }
    };
    set(gate_up, |shape| {
        stack(shape, &prefix, &["gate_proj", "up_proj"])
    })?;
    set(down, |shape| stack(shape, &prefix, &["down_proj"]))
}
