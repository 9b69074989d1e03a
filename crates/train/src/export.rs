//! From the training model, whose experts are stacked, to the tensors of a checkpoint folder.

use crate::architecture::{Architecture, Residual};
use crate::error::{Result, TrainError};
use crate::layers::attention::SelfAttention;
use crate::layers::decoupled::DecoupledRouter;
use crate::layers::factored::Factored;
use crate::layers::moe::Moe;
use crate::lm::{FeedForward, LanguageModel, Layer};
use crate::params::values;
use crate::routers::{Route, RouterOptions, RouterSizes};
use burn::module::Param;
use burn::tensor::Tensor;
use cadre_checkpoint::{
    Dtype, FolderContents, ModelConfig, MoeConfig, ResidualMlp, RouterConfig, Score, SharedExpert,
    TensorData, write_folder,
};
use cadre_routing::policies::{GroupScore, ScoreFn, Stage};
use std::borrow::Cow;
use std::path::Path;

pub use crate::import::{Opened, import, import_biases, open};

/// What a checkpoint says beside the parameters.
#[derive(Clone, Copy, Debug)]
pub struct Exported<'a> {
    /// The model without its parameters.
    pub architecture: &'a Architecture,
    /// Selection-only biases, one `[n_experts]` per MoE layer; empty when there are none.
    pub biases: &'a [Vec<f32>],
    /// Optimizer step that the parameters are of: schedules of the router stop there.
    pub step: u64,
}

/// Writes a Hugging Face folder, complete or not at all. transformers loads it unchanged where a published architecture
/// computes the model; otherwise its `model_type` is `cadre_moe`.
///
/// # Errors
/// [`TrainError::Unexportable`], values that are not finite, and failures of the file system.
pub fn export(
    model: &LanguageModel,
    exported: Exported<'_>,
    tokenizer_json: &str,
    dtype: Dtype,
    folder: &Path,
) -> Result<()> {
    let config = &stored_config(exported)?;
    write_folder(
        folder,
        &FolderContents {
            config,
            tensors: &tensors(model, exported.biases),
            dtype,
            tokenizer_json: Some(tokenizer_json),
        },
    )?;
    Ok(())
}

/// The layouts that the trainer reads and writes, in order of preference.
pub(crate) const LAYOUTS: [&str; 6] = [
    "qwen3",
    "qwen3_moe",
    "glm4_moe",
    "llama",
    "mixtral",
    "cadre_moe",
];

/// The description of the checkpoint that computes what the model was trained to compute: the first of the known layouts
/// that says all of it.
///
/// # Errors
/// [`TrainError::Unexportable`] for what no known layout holds.
pub fn stored_config(exported: Exported<'_>) -> Result<ModelConfig> {
    let rule = exported.architecture.attention.as_ref();
    if rule.is_some_and(|rule| !rule.causal()) {
        // No text can be generated token by token.
        let what = "attention experts that keep a share of a sequence".to_owned();
        return Err(TrainError::Unexportable { what });
    }
    let mut config = exported.architecture.config.clone();
    config.moe = stored_moe(exported)?;
    for layout in LAYOUTS {
        config.model_type = layout.to_owned();
        if layout == "mixtral" && config.moe.layers.len() == config.n_layers {
            // It has one width for both, and nothing is dense.
            config.intermediate_size = config.moe.intermediate_size;
        }
        // transformers makes a shared expert of GLM-4 in any case.
        let missing = layout == "glm4_moe" && config.moe.shared.is_none();
        if !missing && says_all(&config) {
            return Ok(config);
        }
    }
    let name = &exported.architecture.router.name;
    let what = format!("router `{name}` and {:?}", exported.architecture.parts);
    Err(TrainError::Unexportable { what })
}

/// Whether the written configuration reads back as the same description.
fn says_all(config: &ModelConfig) -> bool {
    let Ok(text) = config.to_config_json(Dtype::F32) else {
        return false;
    };
    ModelConfig::parse("export", &text, None).is_ok_and(|read| {
        read.moe == config.moe
            && read.attention == config.attention
            && read.rope == config.rope
            && read.intermediate_size == config.intermediate_size
            && read.norm_eps == config.norm_eps
    })
}

fn stored_moe(exported: Exported<'_>) -> Result<MoeConfig> {
    let Exported { architecture, .. } = exported;
    let Some(first) = architecture.moe.first() else {
        return Ok(MoeConfig::default());
    };
    if architecture.parts.recurrent_restarts && architecture.recurrent_router().is_some() {
        let what = "a recurrent router that starts anew in every layer".to_owned();
        return Err(TrainError::Unexportable { what });
    }
    let base = &architecture.config.moe;
    let counts = architecture.moe.iter();
    let counts: Vec<usize> = counts.map(|moe| moe.router.n_real_experts()).collect();
    let mut moe = MoeConfig {
        layers: base.layers.clone(),
        n_null: first.router.n_experts() - first.router.n_real_experts(),
        intermediate_size: base.intermediate_size,
        shared: architecture
            .parts
            .shared
            .map(|intermediate_size| SharedExpert {
                intermediate_size,
                gated: false,
            }),
        residual: architecture
            .parts
            .residual
            .map(|(kind, width)| ResidualMlp {
                intermediate_size: width,
                learned: kind == Residual::Learned,
            }),
        recurrent_router: architecture.recurrent_router(),
        decoupled_router: architecture.parts.decoupled,
        factors: base.factors.clone(),
        shared_weights: base.shared_weights.clone(),
        ..MoeConfig::default()
    };
    moe.set_counts(counts);
    let sizes = RouterSizes {
        n_experts: moe.n_experts,
        top_k: base.top_k,
        norm_topk_prob: base.norm_topk_prob(),
    };
    (moe.top_k, moe.router) = stored_router(exported, sizes)?;
    let nulls = architecture.moe.iter();
    let mut nulls = nulls.map(|moe| moe.router.n_experts() - moe.router.n_real_experts());
    if nulls.any(|n| n != moe.n_null) {
        let what = "different numbers of null experts per layer (set `router.n_null`)".to_owned();
        return Err(TrainError::Unexportable { what });
    }
    Ok(moe)
}

/// Picks per token and the rule, in the words of published architectures where they have them.
fn stored_router(exported: Exported<'_>, sizes: RouterSizes) -> Result<(usize, RouterConfig)> {
    let options: &RouterOptions = &exported.architecture.router;
    let (all, top_k) = (sizes.n_experts, sizes.top_k);
    let gate = options.gate(exported.step);
    Ok(match options.name.as_str() {
        "top_k" => (
            top_k,
            RouterConfig::TopK {
                norm: sizes.norm_topk_prob,
            },
        ),
        "switch" => (1, RouterConfig::TopK { norm: false }),
        "top_2" => (2, RouterConfig::TopK { norm: true }),
        "top_p" => {
            let mass = f64::from(options.top_p());
            (all, RouterConfig::TopP { mass })
        }
        "null_experts" => (top_k, RouterConfig::NullExperts),
        "uniform" => {
            let seed = options.seed();
            (top_k, RouterConfig::Uniform { seed })
        }
        // Evaluated as Switch.
        "dense_to_sparse" if gate.is_none() => (1, RouterConfig::TopK { norm: false }),
        "dense_to_sparse" => {
            let (temperature, stage) = gate.unwrap_or((1.0, Stage::Hard));
            let hard = stage == Stage::Hard;
            let router = RouterConfig::DenseToSparse {
                temperature: f64::from(temperature),
                threshold: f64::from(options.dense_to_sparse().threshold),
                hard,
            };
            (if hard { 1 } else { all }, router)
        }
        "group_limited" => (top_k, stored_groups(exported, sizes)),
        "sparse_mixer" => {
            let eps = f64::from(options.eps());
            (2, RouterConfig::SparseMixer { eps })
        }
        // Where experts keep a share of a sequence, no text can be generated token by token.
        "union" if options.keep.unwrap_or(1.0) >= 1.0 => {
            let eps = f64::from(options.eps.unwrap_or(1.0));
            (top_k, RouterConfig::Union { eps })
        }
        name => {
            let what = format!("router `{name}`");
            return Err(TrainError::Unexportable { what });
        }
    })
}

/// Without groups, bias and scale, softmax scores are plain top-k.
fn stored_groups(exported: Exported<'_>, sizes: RouterSizes) -> RouterConfig {
    let groups = exported.architecture.router.group_limited(sizes);
    let correction_bias = !exported.biases.is_empty();
    let plain = groups.score == ScoreFn::Softmax && groups.keep_groups == groups.n_groups;
    if plain && groups.scale == 1.0 && !correction_bias {
        let norm = groups.norm_topk_prob;
        return RouterConfig::TopK { norm };
    }
    RouterConfig::GroupLimited {
        score: match groups.score {
            ScoreFn::Softmax => Score::Softmax,
            ScoreFn::Sigmoid => Score::Sigmoid,
        },
        n_groups: groups.n_groups,
        keep_groups: groups.keep_groups,
        sum_of_best_two: groups.group_score == GroupScore::SumOfBestTwo,
        norm: groups.norm_topk_prob,
        scale: f64::from(groups.scale),
        correction_bias,
    }
}

/// The model's tensors under their checkpoint names; `biases` are the selection-only ones of its MoE layers, if any.
#[must_use]
pub fn tensors(model: &LanguageModel, biases: &[Vec<f32>]) -> Vec<TensorData<'static>> {
    let mut out = Vec::new();
    push(
        &mut out,
        "model.embed_tokens".to_owned(),
        &model.embed_tokens,
    );
    let mut biases = biases.iter();
    for (i, layer) in model.layers.iter().enumerate() {
        let name = format!("model.layers.{i}");
        push_layer(&mut out, &name, layer);
        let has_router = matches!(layer.mlp, FeedForward::Moe(_));
        if let Some(bias) = has_router.then(|| biases.next()).flatten() {
            out.push(TensorData {
                name: format!("{name}.mlp.gate.e_score_correction_bias"),
                shape: vec![bias.len()],
                values: Cow::Owned(bias.clone()),
            });
        }
    }
    if let Some(gru) = &model.router_gru {
        push_named(
            &mut out,
            "model.router_gru.weight_ih".to_owned(),
            &gru.weight_ih,
        );
        push_named(
            &mut out,
            "model.router_gru.weight_hh".to_owned(),
            &gru.weight_hh,
        );
        push_named(
            &mut out,
            "model.router_gru.bias_ih".to_owned(),
            &gru.bias_ih,
        );
        push_named(
            &mut out,
            "model.router_gru.bias_hh".to_owned(),
            &gru.bias_hh,
        );
    }
    if let Some(router) = &model.router {
        push_router(&mut out, router);
    }
    push(&mut out, "model.norm".to_owned(), &model.norm);
    if let Some(head) = &model.lm_head {
        push(&mut out, "lm_head".to_owned(), head);
    }
    out
}

fn push<const D: usize>(out: &mut Vec<TensorData<'_>>, name: String, param: &Param<Tensor<D>>) {
    push_named(out, format!("{name}.weight"), param);
}

fn push_named<const D: usize>(
    out: &mut Vec<TensorData<'_>>,
    name: String,
    param: &Param<Tensor<D>>,
) {
    let tensor = param.val();
    out.push(TensorData {
        name,
        shape: tensor.dims().to_vec(),
        values: Cow::Owned(values(&tensor)),
    });
}

/// The router that runs before the layers.
fn push_router(out: &mut Vec<TensorData<'_>>, router: &DecoupledRouter) {
    let name = |part: &str| format!("model.router.{part}");
    push(out, name("embed_tokens"), &router.embed_tokens);
    for (i, layer) in router.layers.iter().enumerate() {
        let name = name(&format!("layers.{i}"));
        let norm = &layer.input_layernorm;
        push(out, format!("{name}.input_layernorm"), norm);
        push_attention(out, &name, &layer.self_attn);
        let norm = &layer.post_attention_layernorm;
        push(out, format!("{name}.post_attention_layernorm"), norm);
        let (gate_up, down) = (&layer.mlp.gate_up, &layer.mlp.down);
        push_experts(out, gate_up, down, |_| format!("{name}.mlp"));
    }
    push(out, name("norm"), &router.norm);
    push(out, name("head"), &router.head);
}

fn push_layer(out: &mut Vec<TensorData<'_>>, name: &str, layer: &Layer) {
    push(
        out,
        format!("{name}.input_layernorm"),
        &layer.input_layernorm,
    );
    push_attention(out, name, &layer.self_attn);
    let norm = &layer.post_attention_layernorm;
    push(out, format!("{name}.post_attention_layernorm"), norm);
    match &layer.mlp {
        FeedForward::Moe(moe) => push_moe(out, &format!("{name}.mlp"), moe),
        FeedForward::Dense(mlp) => {
            push_experts(out, &mlp.gate_up, &mlp.down, |_| format!("{name}.mlp"));
        }
    }
}

fn push_attention(out: &mut Vec<TensorData<'_>>, name: &str, attention: &SelfAttention) {
    for (part, param) in [
        ("q_proj", &attention.q_proj),
        ("k_proj", &attention.k_proj),
        ("v_proj", &attention.v_proj),
        ("o_proj", &attention.o_proj),
    ] {
        push(out, format!("{name}.self_attn.{part}"), param);
    }
    if let Some(gate) = &attention.gate {
        push(out, format!("{name}.self_attn.gate"), gate);
    }
    for (part, norm) in [("q_norm", &attention.q_norm), ("k_norm", &attention.k_norm)] {
        if let Some(norm) = norm {
            push(out, format!("{name}.self_attn.{part}"), norm);
        }
    }
}

fn push_moe(out: &mut Vec<TensorData<'_>>, name: &str, moe: &Moe) {
    if let Some(gate) = &moe.gate {
        push(out, format!("{name}.gate"), gate);
    }
    if let Some(router_in) = &moe.router_in {
        push(out, format!("{name}.router_in"), router_in);
    }
    if let (Some(gate_up), Some(down)) = (&moe.gate_up, &moe.down) {
        push_experts(out, gate_up, down, |e| format!("{name}.experts.{e}"));
    }
    if let Some(thin) = &moe.thin {
        for (part, matrix) in thin.parts() {
            push_factored(out, matrix, |e| format!("{name}.experts.{e}.{part}"));
        }
    }
    if let Some(shared) = &moe.shared {
        let prefix = format!("{name}.shared_experts");
        push_experts(out, &shared.gate_up, &shared.down, |_| prefix.clone());
    }
    if let Some(residual) = &moe.residual {
        let prefix = format!("{name}.residual_mlp");
        push_experts(out, &residual.mlp.gate_up, &residual.mlp.down, |_| {
            prefix.clone()
        });
        if let Some(coefficient) = &residual.coefficient {
            push(
                out,
                format!("{name}.residual_coefficient"),
                &coefficient.weight,
            );
            push_named(
                out,
                format!("{name}.residual_coefficient.bias"),
                &coefficient.bias,
            );
        }
    }
}

/// Splits the factors of a matrix of every expert.
fn push_factored(
    out: &mut Vec<TensorData<'_>>,
    matrix: &Factored,
    prefix: impl Fn(usize) -> String,
) {
    let (inner, outer) = (matrix.inner.val(), matrix.outer.val());
    let rank = outer.dims()[2];
    for (part, tensor, is_inner) in [("inner", inner, true), ("outer", outer, false)] {
        let [_, rows, cols] = tensor.dims();
        for (e, values) in values(&tensor).chunks_exact(rows * cols).enumerate() {
            // What is behind the rows of an expert is not of it.
            let rows = if is_inner {
                rank + matrix.rows[e].len()
            } else {
                rows
            };
            out.push(TensorData {
                name: format!("{}.{part}.weight", prefix(e)),
                shape: vec![rows, cols],
                values: Cow::Owned(values[..rows * cols].to_vec()),
            });
        }
    }
    for (e, rows) in matrix
        .rows
        .iter()
        .enumerate()
        .filter(|(_, rows)| !rows.is_empty())
    {
        out.push(TensorData {
            name: format!("{}.rows", prefix(e)),
            shape: vec![rows.len()],
            values: Cow::Owned(rows.iter().map(|row| *row as f32).collect()),
        });
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
