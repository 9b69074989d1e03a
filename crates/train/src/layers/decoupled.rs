//! The decoupled router: a small decoder over token ids that makes the router logits of all layers before the first runs.
//!
//! Paper: Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design, Cai et al., 2024, arXiv
//! 2410.19123.
//! Rule: `l = W norm(G(x_1 .. x_t))` with G a causal transformer of its own (embedding, attention with rotary positions,
//! SwiGLU); all layers pick by the same l, or each by its own part. The rule from logits to picks is that of `[router]`; the
//! paper's, the best expert with weight 1, is top-k with `top_k = 1`.
//! Shapes: tokens `[T]`, stream `[T, r]`, logits `[T, n]`, with n the experts of one layer or of all.
//! Recipe: `model.decoupled_router = { hidden_size = r, n_heads = H, head_dim = D, intermediate_size = I }`; how it is taught
//! by routers that look at layers: `methods/router_distill.rs`.
//! Differs from paper: norms on queries and keys in place of a chosen divisor of the scores, no biases.
//! Check: layers::decoupled::tests (plain torch), tests/layers.rs, tests/reference_models.rs.

use super::attention::SelfAttention;
use super::mlp::Mlp;
use crate::architecture::Architecture;
use crate::init::Init;
use crate::methods::start::Part;
use crate::ops::{self, AttentionShape, Numerics, Precision, Recompute};
use crate::recipe::Recipe;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use cadre_checkpoint::{DecoupledRouter as Sizes, ModelConfig, QkNorm};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// `model.decoupled_router` of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Width of its stream.
    pub hidden_size: usize,
    /// Its layers.
    #[serde(default = "one")]
    pub n_layers: usize,
    /// Its heads.
    pub n_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of its feed-forwards.
    pub intermediate_size: usize,
    /// Whether every layer of the model has picks of its own.
    #[serde(default)]
    pub per_layer: bool,
}

fn one() -> usize {
    1
}

impl Options {
    /// What a checkpoint says of it.
    #[must_use]
    pub fn stored(&self) -> Sizes {
        Sizes {
            hidden_size: self.hidden_size,
            n_layers: self.n_layers,
            n_heads: self.n_heads,
            head_dim: self.head_dim,
            intermediate_size: self.intermediate_size,
            per_layer: self.per_layer,
        }
    }
}

/// Refuses what such a router cannot go together with.
///
/// # Errors
/// One sentence that names the keys.
pub(crate) fn check(recipe: &Recipe, architecture: &Architecture) -> Result<(), String> {
    let Some(sizes) = architecture.parts.decoupled else {
        return Ok(());
    };
    let key = "`model.decoupled_router`";
    if architecture.parts.recurrent_router.is_some() {
        return Err(format!(
            "{key} and `model.recurrent_router` both make logits; keep one"
        ));
    }
    if let Some(moe) = architecture.moe.iter().find(|moe| !moe.router.has_gate()) {
        let name = moe.router.name();
        return Err(format!(
            "{key} makes logits, which router `{name}` does not look at"
        ));
    }
    let counts: Vec<usize> = architecture
        .moe
        .iter()
        .map(|moe| moe.router.n_experts())
        .collect();
    if !sizes.per_layer && counts.iter().any(|n| *n != counts[0]) {
        return Err(format!(
            "{key} gives all layers the same picks, but they have {counts:?} experts; set `per_layer = true` in it"
        ));
    }
    let m = &recipe.model;
    let weights_are_1 = architecture.router.name == "top_k" && m.top_k == 1 && m.norm_topk_prob;
    let start = recipe.start.as_ref();
    let is_still = start.is_some_and(|start| start.freeze.contains(&Part::Router));
    let is_told = recipe.router_distill.is_some();
    if weights_are_1 && counts.iter().any(|n| *n > 1) && !is_still && !is_told {
        return Err(format!(
            "{key} does not learn from the text where its one pick has the weight 1; add `[router_distill]`, freeze it, or set \
             `model.norm_topk_prob = false`"
        ));
    }
    if recipe.train.recompute == Recompute::Layer {
        return Err(format!(
            "{key} does not go with `train.recompute = \"layer\"`; `\"experts\"` does"
        ));
    }
    if recipe.evolve.is_some() {
        return Err(format!("{key} does not go with `[evolve]`"));
    }
    Ok(())
}

/// One layer.
#[derive(Module, Debug)]
pub struct RouterLayer {
    /// `[r]`
    pub input_layernorm: Param<Tensor<1>>,
    /// Attention, with as many key and value heads as query heads
    pub self_attn: SelfAttention,
    /// `[r]`
    pub post_attention_layernorm: Param<Tensor<1>>,
    /// Feed-forward
    pub mlp: Mlp,
}

/// The parameters.
#[derive(Module, Debug)]
pub struct DecoupledRouter {
    /// `[vocab, r]`
    pub embed_tokens: Param<Tensor<2>>,
    /// Its layers
    pub layers: Vec<RouterLayer>,
    /// `[r]`
    pub norm: Param<Tensor<1>>,
    /// `[n, r]`
    pub head: Param<Tensor<2>>,
}

impl DecoupledRouter {
    /// Random parameters for the model of `config` and `n_logits` logits per token.
    #[must_use]
    pub fn init(sizes: Sizes, config: &ModelConfig, n_logits: usize, init: &Init) -> Self {
        let residual_scale = 1.0 / (2.0 * sizes.n_layers as f32).sqrt();
        let mut own = config.clone();
        own.hidden_size = sizes.hidden_size;
        (own.n_heads, own.n_kv_heads, own.head_dim) =
            (sizes.n_heads, sizes.n_heads, sizes.head_dim);
        own.attention.experts = None;
        own.attention.qk_norm = QkNorm::PerHead;
        let r = sizes.hidden_size;
        let norm = || Param::from_tensor(init.ones(r));
        let layers = (0..sizes.n_layers).map(|layer| {
            let name = |part: &str| format!("router.layers.{layer}.{part}");
            RouterLayer {
                input_layernorm: norm(),
                self_attn: SelfAttention::init(&own, init, &name("self_attn"), residual_scale),
                post_attention_layernorm: norm(),
                mlp: Mlp::init(
                    r,
                    sizes.intermediate_size,
                    init,
                    &name("mlp"),
                    residual_scale,
                ),
            }
        });
        let table = init.normal("router.embed_tokens", [config.vocab_size, r], 1.0);
        Self {
            embed_tokens: Param::from_tensor(table),
            layers: layers.collect(),
            norm: norm(),
            head: Param::from_tensor(init.normal("router.head", [n_logits, r], 1.0)),
        }
    }

    /// The logits `[T, n]` of `tokens`, which are sequences as those of `shape`, the model's attention. All in f32.
    #[must_use]
    pub fn logits(&self, sizes: Sizes, tokens: Arc<Vec<u32>>, shape: AttentionShape) -> Tensor<2> {
        let shape = AttentionShape {
            n_heads: sizes.n_heads,
            n_kv_heads: sizes.n_heads,
            head_dim: sizes.head_dim,
            precision: Precision::F32,
            ..shape
        };
        let mut x = ops::embedding(self.embed_tokens.val(), tokens);
        for layer in &self.layers {
            let normed = ops::rms_norm(x.clone(), layer.input_layernorm.val(), shape.eps);
            x = x + layer.self_attn.forward(normed, shape);
            let normed = ops::rms_norm(x.clone(), layer.post_attention_layernorm.val(), shape.eps);
            x = x + layer.mlp.forward(normed, Numerics::default());
        }
        let normed = ops::rms_norm(x, self.norm.val(), shape.eps);
        ops::linear(normed, self.head.val())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params;
    use burn::tensor::{Device, TensorData};
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Deserialize)]
    struct Golden {
        vocab_size: usize,
        n_logits: usize,
        seq_len: usize,
        rope_theta: f64,
        eps: f32,
        sizes: BTreeMap<String, usize>,
        tokens: Vec<u32>,
        coefficients: Vec<f32>,
        /// By the names of this module's parameters; gate and up stacked.
        values: BTreeMap<String, Vec<f32>>,
        output: Vec<f32>,
        gradients: BTreeMap<String, Vec<f32>>,
    }

    fn close(what: &str, got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len(), "{what}");
        let most = want.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        for (a, b) in got.iter().zip(want) {
            assert!(
                (a - b).abs() < 2e-5 * most.max(1.0),
                "{what}: {a} is not {b}"
            );
        }
    }

    /// Logits and all gradients against plain torch (`golden/make/decoupled_router.py`).
    #[test]
    fn logits_and_gradients_equal_torch() {
        let golden: Golden =
            serde_json::from_str(include_str!("../../../../golden/routing/decoupled.json"))
                .unwrap();
        let size = |name: &str| golden.sizes[name];
        let sizes = Sizes {
            hidden_size: size("hidden_size"),
            n_layers: size("n_layers"),
            n_heads: size("n_heads"),
            head_dim: size("head_dim"),
            intermediate_size: size("intermediate_size"),
            per_layer: false,
        };
        let device = Device::flex().autodiff();
        let recipe = crate::recipe::Recipe::parse(
            std::path::Path::new("tiny.toml"),
            "name = 'tiny'\n[model]\nvocab_size = 8\nhidden_size = 4\nn_layers = 1\nn_heads = 1\nn_kv_heads = 1\n\
             head_dim = 4\nn_experts = 2\ntop_k = 2\nmoe_intermediate_size = 4\nmax_position_embeddings = 8\n\
             [train]\nsteps = 9\nbatch_size = 1\nseq_len = 4\nlr = 1e-3\n[output]\ndir = 'x'\n",
        )
        .unwrap();
        let mut config = recipe.model_config();
        config.vocab_size = golden.vocab_size;
        let init = Init {
            seed: 1,
            std: 0.1,
            device: device.clone(),
        };
        let router = DecoupledRouter::init(sizes, &config, golden.n_logits, &init);
        let router = params::replace(router, |path, shape| {
            let values = golden.values.get(path).ok_or(path.to_owned())?;
            assert_eq!(values.len(), shape.iter().product::<usize>(), "{path}");
            Ok::<_, String>(values.clone())
        })
        .unwrap();
        let shape = AttentionShape {
            batch: golden.tokens.len() / golden.seq_len,
            seq_len: golden.seq_len,
            n_heads: 1,
            n_kv_heads: 1,
            head_dim: 2,
            rope_theta: golden.rope_theta,
            eps: golden.eps,
            precision: Precision::F32,
        };
        let out = router.logits(sizes, Arc::new(golden.tokens.clone()), shape);
        let values: Vec<f32> = out.clone().try_into_vec_as().unwrap();
        close("output", &values, &golden.output);
        let data = TensorData::new(golden.coefficients.clone(), out.dims());
        let mut gradients = (out * Tensor::from_data(data, &device)).sum().backward();
        let mut sum = crate::optimizer::GradientSum::default();
        sum.add(&router, &mut gradients, 1.0).unwrap();
        assert_eq!(golden.gradients.len(), golden.values.len());
        for (path, want) in &golden.gradients {
            close(path, sum.get(path).unwrap(), want);
        }
    }
}
