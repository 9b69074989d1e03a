//! The router that runs before the model: a small causal network over token ids, whose logits all layers pick experts by.
//!
//! Source: Read-ME (Cai et al., 2024, arXiv 2410.19123). The network is a decoder of its own in the layout of Qwen3, with as many
//! key and value heads as query heads; what its tensors are called is here, what it computes is in `docs/guide/models.md`.

use crate::moe_config::MoeConfig;

/// Where its tensors are: `model.router.embed_tokens.weight`, `model.router.layers.0.self_attn.q_proj.weight`, ...
pub(crate) const PREFIX: &str = "model.router.";

/// Its table of tokens, of which a token reads one row.
pub(crate) const TABLE: &str = "model.router.embed_tokens.weight";

/// What makes the logits of its stream.
pub(crate) const HEAD: &str = "model.router.head.weight";

/// More layers than this would not be a small network.
const MAX_LAYERS: usize = 64;
/// Nor would wider attention.
const MAX_WIDTH: usize = 1 << 20;

/// Sizes of the network. Norms add `rms_norm_eps` and positions turn by `rope_theta`, without scaling, as in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoupledRouter {
    /// Width of its residual stream.
    pub hidden_size: usize,
    /// Its layers.
    pub n_layers: usize,
    /// Its heads, of queries and of keys and values.
    pub n_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of its feed-forwards.
    pub intermediate_size: usize,
    /// Whether every layer of the model has logits of its own. All layers otherwise pick by the same.
    pub per_layer: bool,
}

impl DecoupledRouter {
    /// Logits of a token: those of the first layer with experts, of the second, ..., or once those of all.
    #[must_use]
    pub fn n_logits(&self, moe: &MoeConfig) -> usize {
        match self.per_layer {
            true => moe.counts().map(|count| count + moe.n_null).sum(),
            false => moe.n_logits(),
        }
    }

    /// The first logit of the `at`-th layer with experts.
    #[must_use]
    pub fn first_logit(&self, moe: &MoeConfig, at: usize) -> usize {
        match self.per_layer {
            true => moe.counts().take(at).map(|count| count + moe.n_null).sum(),
            false => 0,
        }
    }

    /// Width of all of its heads together.
    #[must_use]
    pub fn attention_width(&self) -> usize {
        self.n_heads.saturating_mul(self.head_dim)
    }

    /// Names and shapes of its tensors in a model of `vocab_size` tokens.
    pub(crate) fn specs(&self, vocab_size: usize, moe: &MoeConfig) -> Vec<(String, Vec<usize>)> {
        let (d, width, heads) = (
            self.hidden_size,
            self.intermediate_size,
            self.attention_width(),
        );
        let mut list = vec![(TABLE.to_owned(), vec![vocab_size, d])];
        for layer in 0..self.n_layers {
            let parts: [(&str, &[usize]); 11] = [
                ("input_layernorm", &[d]),
                ("self_attn.q_proj", &[heads, d]),
                ("self_attn.k_proj", &[heads, d]),
                ("self_attn.v_proj", &[heads, d]),
                ("self_attn.o_proj", &[d, heads]),
                ("self_attn.q_norm", &[self.head_dim]),
                ("self_attn.k_norm", &[self.head_dim]),
                ("post_attention_layernorm", &[d]),
                ("mlp.gate_proj", &[width, d]),
                ("mlp.up_proj", &[width, d]),
                ("mlp.down_proj", &[d, width]),
            ];
            let name = |part: &str| format!("{PREFIX}layers.{layer}.{part}.weight");
            list.extend(parts.map(|(part, shape)| (name(part), shape.to_vec())));
        }
        list.push((format!("{PREFIX}norm.weight"), vec![d]));
        let head = vec![self.n_logits(moe), d];
        list.push((HEAD.to_owned(), head));
        list
    }

    /// Checks the sizes, and what the router cannot go together with. The error is a key and what is wrong with it.
    pub(crate) fn check(&self, moe: &MoeConfig) -> Result<(), (&'static str, String)> {
        let sizes = [
            ("decoupled_router.hidden_size", self.hidden_size),
            ("decoupled_router.n_layers", self.n_layers),
            ("decoupled_router.n_heads", self.n_heads),
            ("decoupled_router.head_dim", self.head_dim),
            ("decoupled_router.intermediate_size", self.intermediate_size),
        ];
        if let Some((key, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err((key, "is 0, expected at least 1".to_owned()));
        }
        if self.n_layers > MAX_LAYERS {
            let problem = format!("is {}, expected at most {MAX_LAYERS}", self.n_layers);
            return Err(("decoupled_router.n_layers", problem));
        }
        if self.attention_width() > MAX_WIDTH {
            let problem = format!(
                "is {}, which times head_dim = {} is more than {MAX_WIDTH}",
                self.n_heads, self.head_dim
            );
            return Err(("decoupled_router.n_heads", problem));
        }
        if !self.head_dim.is_multiple_of(2) {
            let problem = format!("is {}, expected an even number", self.head_dim);
            return Err(("decoupled_router.head_dim", problem));
        }
        if moe.layers.is_empty() {
            let problem = "has no layer with experts to pick for";
            return Err(("decoupled_router", problem.to_owned()));
        }
        if !self.per_layer && !moe.uneven.is_empty() {
            let problem = format!(
                "is false, which gives all layers the same picks, but they have {:?} experts",
                moe.uneven
            );
            return Err(("decoupled_router.per_layer", problem));
        }
        if !moe.looks_at_logits() {
            let problem = format!("`{}` picks without logits", moe.router.name());
            return Err(("decoupled_router", problem));
        }
        if moe.recurrent_router.is_some() {
            let problem = "is there already; only one of the two makes the logits".to_owned();
            return Err(("decoupled_router", format!("`recurrent_router` {problem}")));
        }
        Ok(())
    }
}

/// Whether the tensor of this name is a matrix of such a router; these are f32 in memory, except for the table.
pub(crate) fn is_matrix_of_router(name: &str) -> bool {
    name.starts_with(PREFIX) && name != TABLE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe_config::RouterConfig;

    fn router(per_layer: bool) -> DecoupledRouter {
        DecoupledRouter {
            hidden_size: 12,
            n_layers: 2,
            n_heads: 3,
            head_dim: 4,
            intermediate_size: 20,
            per_layer,
        }
    }

    fn moe(counts: Vec<usize>) -> MoeConfig {
        let mut moe = MoeConfig {
            layers: (0..counts.len()).collect(),
            top_k: 2,
            intermediate_size: 8,
            ..MoeConfig::default()
        };
        moe.set_counts(counts);
        moe
    }

    #[test]
    fn logits_are_those_of_one_layer_or_of_all() {
        let moe = MoeConfig {
            n_null: 1,
            ..moe(vec![4, 6, 4])
        };
        let own = router(true);
        assert_eq!(own.n_logits(&moe), 5 + 7 + 5);
        let firsts: Vec<usize> = (0..3).map(|at| own.first_logit(&moe, at)).collect();
        assert_eq!(firsts, [0, 5, 12]);
        assert_eq!(router(false).n_logits(&moe), 7);
        assert_eq!(router(false).first_logit(&moe, 2), 0);
    }

    #[test]
    fn tensors_are_those_of_a_small_decoder() {
        let specs = router(true).specs(50, &moe(vec![4, 6]));
        let shape = |name: &str| {
            let found = specs.iter().find(|(known, _)| known == name);
            found.unwrap_or_else(|| panic!("{name}")).1.clone()
        };
        assert_eq!(specs.len(), 1 + 2 * 11 + 2);
        assert_eq!(shape("model.router.embed_tokens.weight"), [50, 12]);
        assert_eq!(
            shape("model.router.layers.1.mlp.down_proj.weight"),
            [12, 20]
        );
        assert_eq!(shape("model.router.layers.0.self_attn.k_norm.weight"), [4]);
        assert_eq!(shape("model.router.head.weight"), [10, 12]);
        assert!(is_matrix_of_router("model.router.norm.weight"));
        assert!(!is_matrix_of_router("model.router.embed_tokens.weight"));
        assert!(!is_matrix_of_router("model.router_gru.weight_ih"));
    }

    #[test]
    fn contradictions_are_named() {
        let even = moe(vec![4, 4]);
        assert!(router(false).check(&even).is_ok() && router(true).check(&even).is_ok());
        let said = |router: DecoupledRouter, moe: &MoeConfig| router.check(moe).unwrap_err();
        let (key, _) = said(router(false), &moe(vec![4, 6]));
        assert_eq!(key, "decoupled_router.per_layer");
        let odd = DecoupledRouter {
            head_dim: 3,
            ..router(true)
        };
        assert_eq!(said(odd, &even).0, "decoupled_router.head_dim");
        let empty = DecoupledRouter {
            n_layers: 0,
            ..router(true)
        };
        assert_eq!(said(empty, &even).0, "decoupled_router.n_layers");
        let recurrent = MoeConfig {
            recurrent_router: Some(8),
            ..even.clone()
        };
        assert!(
            said(router(true), &recurrent)
                .1
                .contains("recurrent_router")
        );
        let uniform = MoeConfig {
            router: RouterConfig::Uniform { seed: 1 },
            ..even
        };
        assert!(said(router(true), &uniform).1.contains("uniform"));
        assert!(
            said(router(true), &MoeConfig::default())
                .1
                .contains("no layer")
        );
    }
}
