//! The decoder-only language model in the Qwen3-MoE layout, and its loss.

use crate::architecture::Architecture;
use crate::init::Init;
use crate::layers::attention::SelfAttention;
use crate::layers::attention_experts;
use crate::layers::decoupled::DecoupledRouter;
use crate::layers::mlp::Mlp;
use crate::layers::moe::{Logits, Moe};
use crate::layers::recurrent::RouterGru;
use crate::losses;
use crate::ops::{self, AttentionShape, Numerics, Precision};
use crate::routers::{Route, RouteContext, Routed};
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use cadre_routing::{Loads, RoutingError};
use std::sync::Arc;

/// Feed-forward part of a layer.
#[derive(Module, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "one per layer, and the derive knows no boxes"
)]
pub enum FeedForward {
    /// Routed experts.
    Moe(Moe),
    /// One dense feed-forward.
    Dense(Mlp),
}

/// One decoder layer.
#[derive(Module, Debug)]
pub struct Layer {
    /// Norm before attention, `[d_model]`
    pub input_layernorm: Param<Tensor<1>>,
    /// Attention
    pub self_attn: SelfAttention,
    /// Norm before the feed-forward, `[d_model]`
    pub post_attention_layernorm: Param<Tensor<1>>,
    /// Feed-forward
    pub mlp: FeedForward,
}

/// All parameters.
#[derive(Module, Debug)]
pub struct LanguageModel {
    /// `[vocab, d_model]`
    pub embed_tokens: Param<Tensor<2>>,
    /// Decoder layers
    pub layers: Vec<Layer>,
    /// Final norm, `[d_model]`
    pub norm: Param<Tensor<1>>,
    /// `[vocab, d_model]`; absent when tied to the embedding
    pub lm_head: Option<Param<Tensor<2>>>,
    /// The recurrence of the routers, where they have one
    pub router_gru: Option<RouterGru>,
    /// The router that runs before the layers, where there is one
    pub router: Option<DecoupledRouter>,
}

/// Token ids of some sequences of equal length, and the tokens that follow each.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `n_sequences * seq_len` ids, sequence by sequence.
    pub tokens: Arc<Vec<u32>>,
    /// The next token of each.
    pub targets: Arc<Vec<u32>>,
    /// Tokens per sequence.
    pub seq_len: usize,
}

/// Which forward pass of a run this is; the default is one outside of training.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step, from 1; 0 outside of a run.
    pub step: u64,
    /// Index of the pass within the step: micro-batches, and repeated passes over one.
    pub index: usize,
    /// Whether this is a training pass: noise, random experts and dropping belong to training.
    pub training: bool,
    /// Selection-only biases, one `[n_experts]` per MoE layer; empty when there are none.
    pub biases: &'a [Vec<f32>],
    /// What the large products are made of, and what is computed again.
    pub numerics: Numerics,
    /// Whether no loss reaches a router before the layers through what they do with its logits.
    pub detached: bool,
}

/// What a forward pass leaves behind.
#[derive(Debug)]
pub struct Forward {
    /// `[T, d_model]`, after the final norm.
    pub hidden: Tensor<2>,
    /// What the router of each MoE layer decided, in order.
    pub routed: Vec<Routed>,
    /// What the router of each layer's attention decided, in order; empty where attention has no experts.
    pub attention: Vec<Routed>,
    /// `[T, n]`: the logits of a router before the layers, where there is one.
    pub foretold: Option<Tensor<2>>,
    /// What the large products were made of.
    pub precision: Precision,
}

/// Loss parts of one batch; the router losses are means over the MoE layers (zero without any).
#[derive(Debug)]
pub struct Losses {
    /// Mean next-token cross-entropy, nats.
    pub cross_entropy: Tensor<1>,
    /// Load-balance loss, 1 when perfectly even.
    pub balance: Tensor<1>,
    /// Router z-loss.
    pub z: Tensor<1>,
    /// What the router of each MoE layer decided, in order.
    pub routed: Vec<Routed>,
    /// What the router of each layer's attention decided, in order; empty where attention has no experts.
    pub attention: Vec<Routed>,
}

impl LanguageModel {
    /// Random parameters for `architecture`.
    #[must_use]
    pub fn init(architecture: &Architecture, init: &Init) -> Self {
        let config = &architecture.config;
        // Keeps the variance of the residual stream independent of the depth (GPT-2, Radford et al. 2019).
        let residual_scale = 1.0 / (2.0 * config.n_layers as f32).sqrt();
        let (v, d) = (config.vocab_size, config.hidden_size);
        let norm = || Param::from_tensor(init.ones(d));
        let layers = (0..config.n_layers).map(|layer| {
            let name = |part: &str| format!("layers.{layer}.{part}");
            let mlp = if let Some(moe) = architecture.moe_layer(layer) {
                let name = name("mlp");
                FeedForward::Moe(Moe::init(architecture, moe, init, &name, residual_scale))
            } else {
                let width = config.intermediate_size;
                FeedForward::Dense(Mlp::init(d, width, init, &name("mlp"), residual_scale))
            };
            Layer {
                input_layernorm: norm(),
                self_attn: SelfAttention::init(config, init, &name("self_attn"), residual_scale),
                post_attention_layernorm: norm(),
                mlp,
            }
        });
        Self {
            embed_tokens: Param::from_tensor(init.normal("embed_tokens", [v, d], 1.0)),
            layers: layers.collect(),
            norm: norm(),
            lm_head: (!config.tie_word_embeddings)
                .then(|| Param::from_tensor(init.normal("lm_head", [v, d], 1.0))),
            router_gru: architecture
                .recurrent_router()
                .map(|width| RouterGru::init(width, init, "router_gru")),
            router: architecture
                .parts
                .decoupled
                .map(|sizes| DecoupledRouter::init(sizes, config, architecture.n_foretold(), init)),
        }
    }

    /// Hidden states and routing on `batch`.
    ///
    /// # Errors
    /// Router logits that are not finite (the run has diverged).
    pub fn forward(
        &self,
        architecture: &Architecture,
        batch: &Batch,
        pass: &Pass<'_>,
    ) -> Result<Forward, RoutingError> {
        let walk = Walk::new(self, architecture, batch, pass);
        let mut x = self.embedded(batch);
        let mut state = self.router_start(batch);
        let mut decided = Vec::with_capacity(self.layers.len());
        for index in 0..self.layers.len() {
            let (next, picks) = walk.layer(index, x, state.as_mut())?;
            x = next;
            decided.push(picks);
        }
        Ok(walk.finish(x, decided))
    }

    /// `[T, d_model]`, what the first layer reads.
    pub(crate) fn embedded(&self, batch: &Batch) -> Tensor<2> {
        ops::embedding(self.embed_tokens.val(), batch.tokens.clone())
    }

    /// The recurrent router's state `[T, p]` before the first layer.
    pub(crate) fn router_start(&self, batch: &Batch) -> Option<Tensor<2>> {
        let cell = self.router_gru.as_ref();
        cell.map(|cell| cell.start(batch.tokens.len()))
    }

    /// The matrix `[vocab, d_model]` that turns hidden states into logits.
    #[must_use]
    pub fn head(&self) -> Tensor<2> {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens).val()
    }

    /// The loss parts on `batch`, with the balance of this batch alone.
    ///
    /// # Errors
    /// Router logits that are not finite (the run has diverged).
    pub fn losses(
        &self,
        architecture: &Architecture,
        batch: &Batch,
        pass: &Pass<'_>,
    ) -> Result<Losses, RoutingError> {
        let forward = self.forward(architecture, batch, pass)?;
        let loads = architecture.balance_loads(&forward.routed);
        Ok(self.score(architecture, forward, batch, &loads))
    }

    /// The loss parts of a forward pass over `batch`, with the balance of `loads`: those of
    /// [`Architecture::balance_loads`], perhaps counted over more than the batch.
    #[must_use]
    pub fn score(
        &self,
        architecture: &Architecture,
        forward: Forward,
        batch: &Batch,
        loads: &[Loads],
    ) -> Losses {
        let Forward {
            hidden,
            routed,
            attention,
            precision,
            ..
        } = forward;
        let cross_entropy = precision.cross_entropy(hidden, self.head(), batch.targets.clone());
        let n = routed.len().max(1) as f32;
        let zero = Tensor::zeros([1], &cross_entropy.device());
        let (mut balance, mut z) = (zero.clone(), zero);
        for ((decided, layer), loads) in routed.iter().zip(&architecture.moe).zip(loads) {
            let even = layer.router.balance(decided, loads, false);
            balance = balance + even / n;
            z = z + losses::z_loss(decided.logits.clone()) / n;
        }
        Losses {
            cross_entropy,
            balance,
            z,
            routed,
            attention,
        }
    }
}

/// What the routers of one layer decided.
#[derive(Debug)]
pub(crate) struct Decided {
    /// Of its attention, where that has experts.
    pub(crate) attention: Option<Routed>,
    /// Of its feed-forward, where that has experts.
    pub(crate) moe: Option<Routed>,
}

/// A forward pass, layer by layer.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    model: &'a LanguageModel,
    architecture: &'a Architecture,
    pass: &'a Pass<'a>,
    shape: AttentionShape,
    /// The logits of a router before the layers.
    foretold: Option<Tensor<2>>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(
        model: &'a LanguageModel,
        architecture: &'a Architecture,
        batch: &Batch,
        pass: &'a Pass<'a>,
    ) -> Self {
        let config = &architecture.config;
        let shape = AttentionShape {
            batch: batch.tokens.len() / batch.seq_len,
            seq_len: batch.seq_len,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            rope_theta: config.rope.theta,
            eps: config.norm_eps as f32,
            precision: pass.numerics.precision,
        };
        let router = model.router.as_ref().zip(architecture.parts.decoupled);
        let foretold =
            router.map(|(router, sizes)| router.logits(sizes, batch.tokens.clone(), shape));
        Self {
            model,
            architecture,
            pass,
            shape,
            foretold,
        }
    }

    /// Where the router logits of the `nth` layer with experts come from.
    fn logits<'s>(&'s self, nth: usize, state: Option<&'s mut Tensor<2>>) -> Logits<'s> {
        if let Some(logits) = &self.foretold {
            let logits = match self.pass.detached {
                true => logits.clone().detach(),
                false => logits.clone(),
            };
            return Logits::Foretold(self.architecture.foretold_part(logits, nth));
        }
        match (&self.model.router_gru, state) {
            (Some(cell), Some(state)) => {
                if self.architecture.parts.recurrent_restarts {
                    *state = cell.start(self.shape.batch * self.shape.seq_len);
                }
                Logits::Recurrent(cell, state)
            }
            _ => Logits::Gate,
        }
    }

    /// What the feed-forward of layer `index` is given, `[T, d_model]`, for `x`, what the layer is given.
    ///
    /// # Errors
    /// Logits of attention's router that are not finite.
    pub(crate) fn feed_forward_input(
        &self,
        index: usize,
        x: Tensor<2>,
    ) -> Result<Tensor<2>, RoutingError> {
        let layer = &self.model.layers[index];
        let rule = self
            .pass
            .attention_rule(self.architecture, index, self.shape.seq_len);
        let (x, _) = layer.attend(x, self.shape, rule)?;
        Ok(ops::rms_norm(
            x,
            layer.post_attention_layernorm.val(),
            self.shape.eps,
        ))
    }

    /// `x [T, d_model]` through layer `index`, and what its routers decided. `state`, the recurrent router's, is moved
    /// on.
    ///
    /// # Errors
    /// Router logits that are not finite.
    pub(crate) fn layer(
        &self,
        index: usize,
        x: Tensor<2>,
        state: Option<&mut Tensor<2>>,
    ) -> Result<(Tensor<2>, Decided), RoutingError> {
        let (layer, pass) = (&self.model.layers[index], self.pass);
        let rule = pass.attention_rule(self.architecture, index, self.shape.seq_len);
        let (x, attention) = layer.attend(x, self.shape, rule)?;
        let norm = layer.post_attention_layernorm.val();
        let normed = ops::rms_norm(x.clone(), norm, self.shape.eps);
        let (y, moe) = match &layer.mlp {
            FeedForward::Moe(moe) => {
                let mut rules = self.architecture.moe.iter().enumerate();
                let rule = rules.find(|(_, rule)| rule.layer == index);
                let (nth, rule) = rule.expect("a rule for every MoE layer");
                let context = pass.context(index, Some(nth), self.shape.seq_len);
                let from = self.logits(nth, state);
                let (y, decided) = moe.forward(normed, rule, &context, from, pass.numerics)?;
                (y, Some(decided))
            }
            FeedForward::Dense(mlp) => (mlp.forward(normed, pass.numerics), None),
        };
        Ok((x + y, Decided { attention, moe }))
    }

    /// What is left of the pass when `x` has come out of the last layer.
    pub(crate) fn finish(&self, x: Tensor<2>, decided: Vec<Decided>) -> Forward {
        let (mut routed, mut attention) = (Vec::new(), Vec::new());
        for layer in decided {
            routed.extend(layer.moe);
            attention.extend(layer.attention);
        }
        Forward {
            hidden: ops::rms_norm(x, self.model.norm.val(), self.shape.eps),
            routed,
            attention,
            foretold: self.foretold.clone(),
            precision: self.pass.numerics.precision,
        }
    }
}

impl<'a> Pass<'a> {
    /// What a router of decoder layer `layer` is told; the `nth` layer with experts may have a bias.
    fn context(&self, layer: usize, nth: Option<usize>, seq_len: usize) -> RouteContext<'a> {
        let bias = nth.and_then(|nth| self.biases.get(nth));
        RouteContext {
            seed: self.seed,
            step: self.step,
            layer,
            pass: self.index,
            training: self.training,
            seq_len,
            bias: bias.map(Vec::as_slice),
        }
    }

    /// The rule by which decoder layer `layer` picks experts of its attention, and what it is told.
    fn attention_rule<'b>(
        &self,
        architecture: &'b Architecture,
        layer: usize,
        seq_len: usize,
    ) -> Option<(&'b dyn Route, RouteContext<'a>)> {
        let rule: &dyn Route = architecture.attention.as_ref()?;
        let context = self.context(layer, None, seq_len);
        Some((rule, context))
    }
}

impl Layer {
    /// Attention, added to the stream, and what its router decided where it has one.
    fn attend(
        &self,
        x: Tensor<2>,
        shape: AttentionShape,
        rule: Option<(&dyn Route, RouteContext<'_>)>,
    ) -> Result<(Tensor<2>, Option<Routed>), RoutingError> {
        let normed = ops::rms_norm(x.clone(), self.input_layernorm.val(), shape.eps);
        let Some((rule, context)) = rule else {
            return Ok((x + self.self_attn.forward(normed, shape), None));
        };
        let rule = (rule, &context);
        let (y, routed) = attention_experts::forward(&self.self_attn, normed, shape, rule)?;
        Ok((x + y, Some(routed)))
    }
}
