//! What is trained besides parameters: the model's description, the routing rule of every MoE layer, and what stands
//! beside the experts.

use crate::routers::{Order, Route, Routed, RouterOptions, RouterSizes, TopK, Union};
use burn::tensor::Tensor;
use cadre_checkpoint::{DecoupledRouter, ModelConfig, MoeConfig, RouterConfig, Score};
use cadre_routing::filters::Capacity;
use cadre_routing::policies::{GroupScore, ScoreFn};
use cadre_routing::{Loads, RoutingError};
use serde::{Deserialize, Serialize};

/// A model without its parameters.
#[derive(Debug)]
pub struct Architecture {
    /// Sizes, attention, and which layers have experts.
    pub config: ModelConfig,
    /// The options of the rule.
    pub router: RouterOptions,
    /// What MoE layers have beside routed experts.
    pub parts: MoeParts,
    /// The MoE layers, in order.
    pub moe: Vec<MoeLayer>,
    /// The rule by which tokens pick experts of every layer's attention; `None` where all use all heads.
    pub attention: Option<Union>,
}

/// One MoE layer without its parameters.
#[derive(Debug)]
pub struct MoeLayer {
    /// Decoder layer.
    pub layer: usize,
    /// The rule.
    pub router: Box<dyn Route>,
    /// How many pairs an expert takes in training, and whose; `None` for all.
    pub capacity: Option<(Capacity, Order)>,
    /// For each expert the one whose weights it has, as they are stored; `None` where all have their own.
    pub shared_weights: Option<Vec<u16>>,
}

/// What MoE layers have beside routed experts; the same in all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MoeParts {
    /// Width of the experts that every token uses, fused into one.
    pub shared: Option<usize>,
    /// How a dense feed-forward joins the experts, and its width (PR-MoE).
    pub residual: Option<(Residual, usize)>,
    /// Width of the state of the recurrent router (RMoE).
    pub recurrent_router: Option<usize>,
    /// Whether that state starts anew in every layer.
    pub recurrent_restarts: bool,
    /// Sizes of the router that runs before the layers and makes the logits of all (Read-ME).
    pub decoupled: Option<DecoupledRouter>,
}

/// How a dense feed-forward joins the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// Both are added.
    Sum,
    /// Both are weighted by a learned softmax.
    Learned,
}

impl Architecture {
    /// The architecture of `config` with the rule that `router` describes in every MoE layer, and nothing beside it.
    ///
    /// # Errors
    /// Options that the router cannot work with.
    pub fn new(config: ModelConfig, router: &RouterOptions) -> Result<Self, RoutingError> {
        let counts = vec![config.moe.n_experts; config.moe.layers.len()];
        Self::with_parts(config, router, &counts, MoeParts::default())
    }

    /// The architecture of a checkpoint.
    ///
    /// # Errors
    /// A rule that the trainer does not have, or options that it cannot work with.
    pub fn of(config: &ModelConfig) -> Result<Self, RoutingError> {
        let moe = &config.moe;
        let parts = MoeParts {
            shared: moe.shared.map(|shared| shared.intermediate_size),
            residual: moe.residual.map(|residual| {
                let kind = match residual.learned {
                    true => Residual::Learned,
                    false => Residual::Sum,
                };
                (kind, residual.intermediate_size)
            }),
            recurrent_router: moe.recurrent_router,
            recurrent_restarts: false,
            decoupled: moe.decoupled_router,
        };
        let counts: Vec<usize> = moe.counts().collect();
        let mut config = config.clone();
        let router = router_of(&config.moe);
        if router.name != "top_k" {
            // What rules with a number of picks of their own are built with.
            config.moe.top_k = match config.moe.router.may_pick_all() {
                true => 1,
                false => config.moe.top_k,
            };
        }
        Self::with_parts(config, &router, &counts, parts)
    }

    /// As [`Architecture::new`], with a number of experts for each MoE layer, and other parts.
    ///
    /// # Errors
    /// Options that the router cannot work with.
    pub fn with_parts(
        config: ModelConfig,
        router: &RouterOptions,
        counts: &[usize],
        parts: MoeParts,
    ) -> Result<Self, RoutingError> {
        let (top_k, norm_topk_prob) = (config.moe.top_k, config.moe.norm_topk_prob());
        let layers = config.moe.layers.iter().zip(counts).enumerate();
        let moe = layers.map(|(at, (&layer, &n_experts))| {
            let sizes = RouterSizes {
                n_experts,
                top_k,
                norm_topk_prob,
            };
            // Who runs before the layers may be taught, and then needs no weights to learn by.
            let may_be_taught = parts.decoupled.is_some() && router.name == "top_k";
            Ok(MoeLayer {
                layer,
                router: match may_be_taught {
                    true => Box::new(TopK::taught(n_experts, top_k, norm_topk_prob)?),
                    false => router.build(sizes)?,
                },
                capacity: router.capacity(),
                shared_weights: config.moe.shared_weights.get(at).cloned(),
            })
        });
        let attention = config.attention.experts;
        let attention = attention.map(|e| Union::new(e.n_experts, e.top_k, 1.0, e.eps as f32));
        Ok(Self {
            moe: moe.collect::<Result<_, RoutingError>>()?,
            attention: attention.transpose()?,
            router: router.clone(),
            parts,
            config,
        })
    }

    /// The picks that the balance loss of each MoE layer counts.
    #[must_use]
    pub fn balance_loads(&self, routed: &[Routed]) -> Vec<Loads> {
        let layers = self.moe.iter().zip(routed);
        layers
            .map(|(layer, decided)| layer.router.balance_loads(decided))
            .collect()
    }

    /// The MoE part of decoder layer `layer`; `None` for dense layers.
    #[must_use]
    pub fn moe_layer(&self, layer: usize) -> Option<&MoeLayer> {
        self.moe.iter().find(|moe| moe.layer == layer)
    }

    /// Width of the recurrent router's state; `None` without one.
    #[must_use]
    pub fn recurrent_router(&self) -> Option<usize> {
        let wanted = self.moe.iter().any(|moe| moe.router.has_gate());
        self.parts.recurrent_router.filter(|_| wanted)
    }

    /// Logits per token of the router that runs before the layers: those of one layer, or of all.
    #[must_use]
    pub fn n_foretold(&self) -> usize {
        let mut counts = self.moe.iter().map(|moe| moe.router.n_experts());
        match self.parts.decoupled {
            Some(sizes) if sizes.per_layer => counts.sum(),
            Some(_) => counts.next().unwrap_or(0),
            None => 0,
        }
    }

    /// Of the logits `[T, n]` of such a router, those of the `nth` layer with experts.
    #[must_use]
    pub fn foretold_part(&self, logits: Tensor<2>, nth: usize) -> Tensor<2> {
        if self.parts.decoupled.is_none_or(|sizes| !sizes.per_layer) {
            return logits;
        }
        let count = |moe: &MoeLayer| moe.router.n_experts();
        let first = self.moe[..nth].iter().map(count).sum();
        logits.narrow(1, first, count(&self.moe[nth]))
    }

    /// Number of parameters of the feed-forward part of MoE layer `moe`, its router included, the shared recurrence not.
    fn n_parameters_of(&self, moe: &MoeLayer) -> usize {
        let d = self.config.hidden_size;
        let feed_forward = |width: usize| 3 * d * width;
        let (n_logits, n_experts) = (moe.router.n_experts(), moe.router.n_real_experts());
        let has_gate = moe.router.has_gate() && self.parts.decoupled.is_none();
        let router = match (has_gate, self.parts.recurrent_router) {
            (false, _) => 0,
            (true, None) => n_logits * d,
            (true, Some(p)) => p * d + n_logits * p,
        };
        let residual = match self.parts.residual {
            None => 0,
            Some((Residual::Sum, width)) => feed_forward(width),
            Some((Residual::Learned, width)) => feed_forward(width) + 2 * d + 2,
        };
        let shared = self.parts.shared.map_or(0, feed_forward);
        let width = self.config.moe.intermediate_size;
        let n_stored = match &moe.shared_weights {
            None => n_experts,
            Some(map) => map.iter().max().map_or(0, |most| usize::from(*most) + 1),
        };
        let experts: usize = match &self.config.moe.factors {
            None => n_stored * feed_forward(width),
            Some(factors) => {
                let layers = self.config.moe.layers.iter();
                let at = layers.take_while(|layer| **layer < moe.layer).count();
                let size = |[gate, up, down]: [usize; 3]| {
                    3 * factors.rank * (d + width) + (gate + up) * d + down * width
                };
                (0..n_stored).map(|e| size(factors.rows_of(at, e))).sum()
            }
        };
        router + experts + shared + residual
    }

    /// Number of parameters.
    #[must_use]
    pub fn n_parameters(&self) -> usize {
        // Everything but the MoE parts is as in the dense model of the same sizes.
        let mut dense = self.config.clone();
        dense.moe.layers.clear();
        dense.moe.decoupled_router = None;
        let all: usize = cadre_checkpoint::tensor_specs(&dense)
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let replaced = self.moe.len() * 3 * self.config.hidden_size * self.config.intermediate_size;
        let moe: usize = self.moe.iter().map(|moe| self.n_parameters_of(moe)).sum();
        let gru = self.recurrent_router().map_or(0, |p| 6 * p * p + 6 * p);
        let decoupled = self.parts.decoupled.map_or(0, |sizes| {
            let (r, heads) = (sizes.hidden_size, sizes.attention_width());
            let layer =
                2 * r + 4 * r * heads + 2 * sizes.head_dim + 3 * r * sizes.intermediate_size;
            (self.config.vocab_size + self.n_foretold() + 1) * r + sizes.n_layers * layer
        });
        all - replaced + moe + gru + decoupled
    }
}

/// The rule of a checkpoint in the words of recipes.
fn router_of(moe: &MoeConfig) -> RouterOptions {
    let mut options = RouterOptions::named(moe.router.name());
    match moe.router {
        RouterConfig::TopP { mass } => options.top_p = Some(mass as f32),
        RouterConfig::NullExperts => options.n_null = Some(moe.n_null),
        RouterConfig::DenseToSparse {
            temperature,
            threshold,
            hard,
        } => {
            options.temperature = Some(temperature as f32);
            options.min_temperature = Some(temperature as f32);
            options.threshold = Some(threshold as f32);
            options.hard_from = hard.then_some(0);
            options.dense_eval = Some(true);
        }
        RouterConfig::Uniform { seed } => options.seed = Some(seed),
        RouterConfig::SparseMixer { eps } | RouterConfig::Union { eps } => {
            options.eps = Some(eps as f32)
        }
        RouterConfig::GroupLimited {
            score,
            n_groups,
            keep_groups,
            sum_of_best_two,
            scale,
            ..
        } => {
            options.n_groups = Some(n_groups);
            options.keep_groups = Some(keep_groups);
            options.scale = Some(scale as f32);
            options.score = Some(match score {
                Score::Softmax => ScoreFn::Softmax,
                Score::Sigmoid => ScoreFn::Sigmoid,
            });
            options.group_score = Some(match sum_of_best_two {
                true => GroupScore::SumOfBestTwo,
                false => GroupScore::Max,
            });
        }
        RouterConfig::TopK { .. } | RouterConfig::Switch | RouterConfig::Top2 => {}
    }
    options
}
