//! From tensors to routers: what makes a layer's logits, and the policy that picks by them.

use std::sync::Arc;

use cadre_checkpoint::{DecoupledRouter as DecoupledSizes, RopeConfig, RouterConfig, Score};
use cadre_routing::policies::{
    DenseToSparse, GroupLimited, GroupLimitedOptions, GroupScore, NullExperts, ScoreFn,
    SparseMixer, Stage, Switch, Top2, TopK, TopP, Uniform, Union,
};
use cadre_routing::{Policy, RoutingError};

use crate::blocks::{
    Attention, DecoupledRouter, Embedding, FeedForward, Foretold, GruCell, KvCache, Linear, Norm,
    Random, Recurrent, Rope, Router, RouterLayer,
};
use crate::builder::Builder;
use crate::decoder::session_shape;
use crate::error::{EngineError, Result};

impl Builder<'_> {
    /// What makes the router logits of `layer`.
    pub(crate) fn router(&self, layer: usize) -> Result<Router> {
        let (moe, d) = (&self.config.moe, self.config.hidden_size);
        let n_experts = self.config.n_experts_in(layer);
        let n_logits = n_experts + moe.n_null;
        let prefix = format!("model.layers.{layer}.mlp");
        if let RouterConfig::Uniform { seed } = moe.router {
            return Ok(Router::Random(Random {
                seed,
                layer,
                n_experts,
            }));
        }
        if let Some(router) = moe.decoupled_router {
            let at = moe.layers.iter().take_while(|l| **l < layer).count();
            return Ok(Router::Foretold(Foretold {
                first: router.first_logit(moe, at),
                n_logits,
            }));
        }
        let gate = |n_in| {
            let weight = format!("{prefix}.gate.weight");
            let bias = moe.router_bias.then(|| {
                self.weights
                    .vector(&format!("{prefix}.gate.bias"), n_logits)
            });
            Ok::<_, EngineError>(Linear {
                weight: self.weights.matrix_f32(&weight, [n_logits, n_in])?,
                bias: bias.transpose()?,
            })
        };
        let Some(width) = moe.recurrent_router else {
            return Ok(Router::Linear(gate(d)?));
        };
        let name = format!("{prefix}.router_in.weight");
        Ok(Router::Recurrent(Recurrent {
            input: self.weights.matrix_f32(&name, [width, d])?,
            cell: self.router_cell(width)?,
            gate: gate(width)?,
        }))
    }

    /// The recurrence of all routers, read once.
    fn router_cell(&self, width: usize) -> Result<Arc<GruCell>> {
        if let Some(cell) = self.router_cell.get() {
            return Ok(Arc::clone(cell));
        }
        let part = |part: &str| {
            let (weight, bias) = (
                format!("model.router_gru.weight_{part}"),
                format!("model.router_gru.bias_{part}"),
            );
            Ok::<_, EngineError>(Linear {
                weight: self.weights.matrix_f32(&weight, [3 * width, width])?,
                bias: Some(self.weights.vector(&bias, 3 * width)?),
            })
        };
        let cell = GruCell {
            input: part("ih")?,
            state: part("hh")?,
        };
        Ok(Arc::clone(self.router_cell.get_or_init(|| Arc::new(cell))))
    }

    /// The router that runs before the model, where it has one.
    pub(crate) fn decoupled_router(&self) -> Result<Option<DecoupledRouter>> {
        let Some(sizes) = self.config.moe.decoupled_router else {
            return Ok(None);
        };
        let (vocab, d) = (self.config.vocab_size, sizes.hidden_size);
        let layers: Result<Vec<RouterLayer>> = (0..sizes.n_layers)
            .map(|layer| self.router_layer(layer, sizes))
            .collect();
        let n_logits = sizes.n_logits(&self.config.moe);
        let rope = RopeConfig::plain(self.config.rope.theta, sizes.head_dim);
        Ok(Some(DecoupledRouter {
            table: Embedding::Resident(
                self.weights
                    .matrix("model.router.embed_tokens.weight", [vocab, d])?,
            ),
            layers: layers?,
            norm: self.router_norm("norm", d)?,
            head: self
                .weights
                .matrix_f32("model.router.head.weight", [n_logits, d])?,
            rope: Rope::new(&rope),
            first_cache: KvCache::first_of_router(&session_shape(self.config).kv),
        }))
    }

    fn router_norm(&self, name: &str, width: usize) -> Result<Norm> {
        let name = format!("model.router.{name}.weight");
        Ok(Norm::Rms {
            weight: self.weights.vector(&name, width)?,
            eps: self.config.norm_eps as f32,
        })
    }

    fn router_layer(&self, layer: usize, sizes: DecoupledSizes) -> Result<RouterLayer> {
        let (d, width, heads) = (
            sizes.hidden_size,
            sizes.intermediate_size,
            sizes.attention_width(),
        );
        let name = |part: &str| format!("layers.{layer}.{part}");
        let linear = |part: &str, shape| {
            let name = format!("model.router.{}.weight", name(part));
            let weight = self.weights.matrix_f32(&name, shape)?;
            Ok::<_, EngineError>(Linear { weight, bias: None })
        };
        Ok(RouterLayer {
            attention_norm: self.router_norm(&name("input_layernorm"), d)?,
            attention: Attention {
                n_heads: sizes.n_heads,
                n_kv_heads: sizes.n_heads,
                head_dim: sizes.head_dim,
                q_proj: linear("self_attn.q_proj", [heads, d])?,
                k_proj: linear("self_attn.k_proj", [heads, d])?,
                v_proj: linear("self_attn.v_proj", [heads, d])?,
                o_proj: linear("self_attn.o_proj", [d, heads])?,
                q_norm: Some(self.router_norm(&name("self_attn.q_norm"), sizes.head_dim)?),
                k_norm: Some(self.router_norm(&name("self_attn.k_norm"), sizes.head_dim)?),
                clip: None,
                scale: 1.0 / (sizes.head_dim as f32).sqrt(),
                sinks: None,
                window: None,
            },
            ffn_norm: self.router_norm(&name("post_attention_layernorm"), d)?,
            ffn: FeedForward {
                gate_proj: linear("mlp.gate_proj", [width, d])?,
                up_proj: linear("mlp.up_proj", [width, d])?,
                down_proj: linear("mlp.down_proj", [d, width])?,
                activation: self.config.activation,
            },
        })
    }

    /// The rule from the logits of `layer` to its picks.
    pub(crate) fn policy(&self, layer: usize) -> Result<Box<dyn Policy>> {
        let policy = self.make_policy(layer)?;
        policy.map_err(|source| EngineError::Routing {
            layer,
            position: 0,
            source,
        })
    }

    fn make_policy(&self, layer: usize) -> Result<Result<Box<dyn Policy>, RoutingError>> {
        let moe = &self.config.moe;
        let (n_experts, top_k) = (self.config.n_experts_in(layer), moe.top_k);
        Ok(match moe.router {
            RouterConfig::TopK { norm } => TopK::new(n_experts, top_k, norm).map(boxed),
            RouterConfig::Top2 => Top2::new(n_experts).map(boxed),
            RouterConfig::Switch => Switch::new(n_experts).map(boxed),
            RouterConfig::TopP { mass } => TopP::new(n_experts, mass as f32).map(boxed),
            RouterConfig::NullExperts => {
                NullExperts::new(n_experts + moe.n_null, moe.n_null, top_k).map(boxed)
            }
            RouterConfig::DenseToSparse {
                temperature,
                threshold,
                hard,
            } => {
                let stage = if hard { Stage::Hard } else { Stage::Soft };
                DenseToSparse::new(n_experts, temperature as f32, threshold as f32, stage)
                    .map(boxed)
            }
            RouterConfig::Uniform { .. } => Uniform::new(n_experts, top_k).map(boxed),
            RouterConfig::Union { eps } => Union::new(n_experts, top_k, 1.0, eps as f32).map(boxed),
            RouterConfig::SparseMixer { eps } => SparseMixer::new(n_experts, eps as f32).map(boxed),
            RouterConfig::GroupLimited {
                correction_bias, ..
            } => {
                let bias = correction_bias.then(|| {
                    let name = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
                    self.weights.vector(&name, n_experts)
                });
                GroupLimited::new(self.group_options(n_experts), bias.transpose()?).map(boxed)
            }
        })
    }

    fn group_options(&self, n_experts: usize) -> GroupLimitedOptions {
        let mut options = GroupLimitedOptions {
            n_experts,
            top_k: self.config.moe.top_k,
            n_groups: 1,
            keep_groups: 1,
            score: ScoreFn::Softmax,
            group_score: GroupScore::Max,
            norm_topk_prob: true,
            scale: 1.0,
        };
        if let RouterConfig::GroupLimited {
            score,
            n_groups,
            keep_groups,
            sum_of_best_two,
            norm,
            scale,
            ..
        } = self.config.moe.router
        {
            (options.n_groups, options.keep_groups) = (n_groups, keep_groups);
            (options.norm_topk_prob, options.scale) = (norm, scale as f32);
            if score == Score::Sigmoid {
                options.score = ScoreFn::Sigmoid;
            }
            if sum_of_best_two {
                options.group_score = GroupScore::SumOfBestTwo;
            }
        }
        options
    }
}

fn boxed(policy: impl Policy + 'static) -> Box<dyn Policy> {
    Box::new(policy)
}
