//! What is trained besides parameters: the model's description, and the routing rule of every MoE layer.

use crate::routers::{Order, Route, RouterOptions, RouterSizes};
use cadre_checkpoint::ModelConfig;
use cadre_routing::RoutingError;
use cadre_routing::filters::Capacity;

/// A model without its parameters.
#[derive(Debug)]
pub struct Architecture {
    /// Sizes, attention, and which layers have experts.
    pub config: ModelConfig,
    /// The MoE layers, in order.
    pub moe: Vec<MoeLayer>,
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
}

impl Architecture {
    /// The architecture of `config` with the rule that `router` describes in every MoE layer.
    ///
    /// # Errors
    /// Options that the router cannot work with.
    pub fn new(config: ModelConfig, router: &RouterOptions) -> Result<Self, RoutingError> {
        let sizes = RouterSizes {
            n_experts: config.moe.n_experts,
            top_k: config.moe.top_k,
            norm_topk_prob: config.moe.norm_topk_prob(),
        };
        let moe = config.moe_layers().into_iter().map(|layer| {
            Ok(MoeLayer {
                layer,
                router: router.build(sizes)?,
                capacity: router.capacity(),
            })
        });
        Ok(Self {
            moe: moe.collect::<Result<_, RoutingError>>()?,
            config,
        })
    }

    /// The MoE part of decoder layer `layer`; `None` for dense layers.
    #[must_use]
    pub fn moe_layer(&self, layer: usize) -> Option<&MoeLayer> {
        self.moe.iter().find(|moe| moe.layer == layer)
    }
}
