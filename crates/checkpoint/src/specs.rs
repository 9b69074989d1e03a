//! Which tensors a model has: canonical names and shapes, from its configuration alone.
//!
//! Canonical names are those of the per-expert Hugging Face layout that most MoE checkpoints use; `crate::names`
//! translates the others. Linear weights are `[out, in]`.

use crate::config::{Factors, ModelConfig, QkNorm, RouterConfig};

/// Names and shapes of exactly the tensors of a model, layer by layer.
#[must_use]
pub fn tensor_specs(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let embedding = [config.vocab_size, hidden];
    let mut specs = Specs {
        config,
        prefix: String::new(),
        list: Vec::new(),
    };
    specs.push("model.embed_tokens.weight", &embedding);
    for layer in 0..config.n_layers {
        specs.prefix = format!("model.layers.{layer}.");
        specs.layer(layer);
    }
    specs.prefix.clear();
    if let Some(width) = config.moe.recurrent_router {
        specs.router_gru(width);
    }
    if let Some(router) = config.moe.decoupled_router {
        let own = router.specs(config.vocab_size, &config.moe);
        specs.list.extend(own);
    }
    specs.norm("model.norm");
    if !config.tie_word_embeddings {
        specs.push("lm_head.weight", &embedding);
    }
    if config.lm_head_bias {
        specs.push("lm_head.bias", &embedding[..1]);
    }
    specs.list
}

struct Specs<'a> {
    config: &'a ModelConfig,
    prefix: String,
    list: Vec<(String, Vec<usize>)>,
}

impl Specs<'_> {
    fn push(&mut self, name: &str, shape: &[usize]) {
        self.part(name, "", shape);
    }

    /// The weight or the bias of `name`.
    fn part(&mut self, name: &str, part: &str, shape: &[usize]) {
        let name = [&self.prefix, name, part].concat();
        self.list.push((name, shape.to_vec()));
    }

    /// A norm over the residual stream.
    fn norm(&mut self, name: &str) {
        let hidden = self.config.hidden_size;
        self.part(name, ".weight", &[hidden]);
        if self.config.norm.has_bias() {
            self.part(name, ".bias", &[hidden]);
        }
    }

    fn linear(&mut self, name: &str, [n_out, n_in]: [usize; 2], bias: bool) {
        self.part(name, ".weight", &[n_out, n_in]);
        if bias {
            self.part(name, ".bias", &[n_out]);
        }
    }

    fn layer(&mut self, layer: usize) {
        self.norm("input_layernorm");
        if self.config.attention.mla.is_some() {
            self.latent_attention();
        } else {
            self.attention();
        }
        self.norm("post_attention_layernorm");
        if self.config.post_norms {
            self.norm("pre_feedforward_layernorm");
            self.norm("post_feedforward_layernorm");
        }
        match self.config.moe.layers.binary_search(&layer) {
            Ok(at) => self.moe(at),
            Err(_) => {
                let width = self.config.intermediate_size;
                self.feed_forward("mlp", width, self.config.mlp_bias);
            }
        }
    }

    fn attention(&mut self) {
        let (config, attention) = (self.config, &self.config.attention);
        let hidden = config.hidden_size;
        let q_dim = config.n_heads * config.head_dim;
        let kv_dim = config.n_kv_heads * config.head_dim;
        self.linear("self_attn.q_proj", [q_dim, hidden], attention.qkv_bias);
        self.linear("self_attn.k_proj", [kv_dim, hidden], attention.qkv_bias);
        self.linear("self_attn.v_proj", [kv_dim, hidden], attention.qkv_bias);
        self.linear("self_attn.o_proj", [hidden, q_dim], attention.o_bias);
        let widths = match attention.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some((config.head_dim, config.head_dim)),
            QkNorm::WholeProjection => Some((q_dim, kv_dim)),
        };
        if let Some((q, k)) = widths {
            self.push("self_attn.q_norm.weight", &[q]);
            self.push("self_attn.k_norm.weight", &[k]);
        }
        if let Some(experts) = attention.experts {
            self.linear("self_attn.gate", [experts.n_experts, hidden], false);
        }
        if attention.sinks {
            self.push("self_attn.sinks", &[config.n_heads]);
        }
    }

    fn latent_attention(&mut self) {
        let (config, attention) = (self.config, &self.config.attention);
        let Some(mla) = attention.mla else {
            return;
        };
        let (hidden, n_heads) = (config.hidden_size, config.n_heads);
        let q_dim = n_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim);
        let latent = mla.kv_lora_rank;
        match mla.q_lora_rank {
            None => self.linear("self_attn.q_proj", [q_dim, hidden], false),
            Some(rank) => {
                self.linear("self_attn.q_a_proj", [rank, hidden], attention.qkv_bias);
                self.push("self_attn.q_a_layernorm.weight", &[rank]);
                self.linear("self_attn.q_b_proj", [q_dim, rank], false);
            }
        }
        self.linear(
            "self_attn.kv_a_proj_with_mqa",
            [latent + mla.qk_rope_head_dim, hidden],
            attention.qkv_bias,
        );
        self.push("self_attn.kv_a_layernorm.weight", &[latent]);
        if mla.split_kv_b {
            let (nope, v) = (mla.qk_nope_head_dim, mla.v_head_dim);
            self.push("self_attn.k_b_proj.weight", &[n_heads, latent, nope]);
            self.push("self_attn.v_b_proj.weight", &[n_heads, v, latent]);
        } else {
            let rows = n_heads * (mla.qk_nope_head_dim + mla.v_head_dim);
            self.linear("self_attn.kv_b_proj", [rows, latent], false);
        }
        let values = n_heads * mla.v_head_dim;
        self.linear("self_attn.o_proj", [hidden, values], attention.o_bias);
    }

    fn feed_forward(&mut self, prefix: &str, width: usize, bias: bool) {
        let hidden = self.config.hidden_size;
        let n_outside = self.prefix.len();
        self.prefix.push_str(prefix);
        self.linear(".gate_proj", [width, hidden], bias);
        self.linear(".up_proj", [width, hidden], bias);
        self.linear(".down_proj", [hidden, width], bias);
        self.prefix.truncate(n_outside);
    }

    /// An expert in factors.
    fn factored(&mut self, prefix: &str, factors: &Factors, rows: [usize; 3]) {
        let (hidden, width) = (self.config.hidden_size, self.config.moe.intermediate_size);
        for (part, n_rows) in Factors::PARTS.into_iter().zip(rows) {
            let (n_out, n_in) = match part {
                "down_proj" => (hidden, width),
                _ => (width, hidden),
            };
            self.push(
                &format!("{prefix}.{part}.inner.weight"),
                &[factors.rank + n_rows, n_in],
            );
            self.push(
                &format!("{prefix}.{part}.outer.weight"),
                &[n_out, factors.rank],
            );
            if n_rows > 0 {
                self.push(&format!("{prefix}.{part}.rows"), &[n_rows]);
            }
        }
    }

    /// The `at`-th layer with experts.
    fn moe(&mut self, at: usize) {
        let moe = &self.config.moe;
        let (n_experts, n_stored) = (moe.n_experts_at(at), moe.n_stored_at(at));
        let hidden = self.config.hidden_size;
        for expert in 0..n_stored {
            let prefix = format!("mlp.experts.{expert}");
            if let Some(factors) = &moe.factors {
                self.factored(&prefix, factors, factors.rows_of(at, expert));
                continue;
            }
            self.feed_forward(&prefix, moe.intermediate_size, moe.expert_bias);
        }
        if moe.has_gate() {
            let n_in = moe.recurrent_router.unwrap_or(hidden);
            self.linear("mlp.gate", [n_experts + moe.n_null, n_in], moe.router_bias);
        }
        if let Some(width) = moe.recurrent_router {
            self.linear("mlp.router_in", [width, hidden], false);
        }
        if let RouterConfig::GroupLimited {
            correction_bias: true,
            ..
        } = moe.router
        {
            self.push("mlp.gate.e_score_correction_bias", &[n_experts]);
        }
        if let Some(shared) = moe.shared {
            self.feed_forward("mlp.shared_experts", shared.intermediate_size, false);
            if shared.gated {
                self.push("mlp.shared_expert_gate.weight", &[1, hidden]);
            }
        }
        if let Some(residual) = moe.residual {
            self.feed_forward("mlp.residual_mlp", residual.intermediate_size, false);
            if residual.learned {
                self.linear("mlp.residual_coefficient", [2, hidden], true);
            }
        }
    }

    /// The recurrence that the routers of all layers share, in the layout of `torch.nn.GRUCell`.
    fn router_gru(&mut self, width: usize) {
        self.push("model.router_gru.weight_ih", &[3 * width, width]);
        self.push("model.router_gru.weight_hh", &[3 * width, width]);
        self.push("model.router_gru.bias_ih", &[3 * width]);
        self.push("model.router_gru.bias_hh", &[3 * width]);
    }
}
