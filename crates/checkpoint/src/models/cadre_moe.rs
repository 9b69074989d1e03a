//! `cadre_moe`: what Cadre's trainer makes and no published architecture can hold; Qwen3's or Llama's attention, and under the key
//! `cadre_moe` any router, uneven layers, null experts, shared experts, a feed-forward beside them, a recurrent router, a
//! router before the model, experts of attention.
//!
//! The format is described in `docs/guide/models.md`. Inside `cadre_moe` every key must be known.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{
    AttentionExperts, DecoupledRouter, ModelConfig, MoeConfig, QkNorm, ResidualMlp, RouterConfig,
    Score, SharedExpert,
};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "cadre_moe",
    class: "CadreMoeForCausalLM",
    defaults,
    from_json,
    to_json,
};

/// The object that says what is special.
const KEY: &str = "cadre_moe";

/// Keys inside of it.
const KEYS: &[&str] = &[
    "layers",
    "n_experts",
    "n_null",
    "top_k",
    "intermediate_size",
    "router",
    "shared_intermediate_size",
    "residual",
    "residual_intermediate_size",
    "recurrent_router",
    DECOUPLED,
    ATTENTION,
    QK_NORM,
];

/// Inside of it, the router that runs before the model.
const DECOUPLED: &str = "decoupled_router";

/// Inside of it, the experts of attention.
const ATTENTION: &str = "attention_experts";

/// Inside of it, whether queries and keys have norms; as in Qwen3 they have where nothing is said.
const QK_NORM: &str = "qk_norm";

/// Rules and their options, beside `name`.
const ROUTERS: &[(&str, &[&str])] = &[
    ("top_k", &["norm_topk_prob"]),
    ("switch", &[]),
    ("top_2", &[]),
    ("top_p", &["top_p"]),
    ("null_experts", &[]),
    ("dense_to_sparse", &["temperature", "threshold", "stage"]),
    ("uniform", &["seed"]),
    ("union", &["eps"]),
    ("sparse_mixer", &["eps"]),
    (
        "group_limited",
        &[
            "score",
            "n_groups",
            "keep_groups",
            "group_score",
            "norm_topk_prob",
            "scale",
            "bias",
        ],
    ),
];

fn defaults() -> Value {
    json!({"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0})
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    common::attention_bias(keys, &mut config, false)?;
    let window = common::switched_window(keys)?;
    config.attention.windows = common::windows(keys, config.n_layers, window, |_| true)?;
    let Some(ours) = keys.object(KEY)? else {
        return Err(keys.problem(KEY, "is missing".to_owned()));
    };
    config.attention.qk_norm = match ours.flag_or(QK_NORM, true)? {
        true => QkNorm::PerHead,
        false => QkNorm::None,
    };
    config.attention.experts = attention_experts(&ours)?;
    config.moe = match config.attention.experts {
        // The experts may be those of attention alone.
        Some(_) if ours.sizes("layers")?.is_empty() => no_moe(&ours)?,
        _ => moe(&ours)?,
    };
    // Said again here in the words of this file.
    config
        .moe
        .check(config.n_layers)
        .map_err(|(key, problem)| {
            let key = match key {
                "num_experts" => "n_experts",
                "num_experts_per_tok" => "top_k",
                "n_group" => "router.n_groups",
                "topk_group" => "router.keep_groups",
                key if key.starts_with(DECOUPLED) => key,
                _ => "layers",
            };
            ours.problem(key, problem)
        })?;
    Ok(config)
}

/// Sizes are checked against those of the model when all of it is read.
fn attention_experts(keys: &Keys) -> Result<Option<AttentionExperts>> {
    let Some(keys) = keys.object(ATTENTION)? else {
        return Ok(None);
    };
    keys.refuse_others(&["n_experts", "top_k", "eps"])?;
    Ok(Some(AttentionExperts {
        n_experts: keys.size("n_experts")?,
        top_k: keys.size("top_k")?,
        eps: within(&keys, "eps", 0.0..=f64::from(f32::MAX))?,
    }))
}

/// Dense feed-forwards everywhere, so that nothing can be said about others.
fn no_moe(keys: &Keys) -> Result<MoeConfig> {
    keys.refuse_others(KEYS)?;
    let empty = [json!([]), json!(0)];
    for key in KEYS
        .iter()
        .filter(|key| ![ATTENTION, QK_NORM].contains(key))
    {
        keys.only(key, &empty, "`layers` names no layer with experts")?;
    }
    Ok(MoeConfig::default())
}

fn moe(keys: &Keys) -> Result<MoeConfig> {
    keys.refuse_others(KEYS)?;
    let mut moe = MoeConfig {
        layers: keys.sizes("layers")?,
        n_null: keys.count_or("n_null", 0)?,
        intermediate_size: keys.size("intermediate_size")?,
        recurrent_router: keys.size_maybe("recurrent_router")?,
        residual: residual(keys)?,
        decoupled_router: decoupled_router(keys)?,
        ..MoeConfig::default()
    };
    let counts = keys.sizes("n_experts")?;
    if counts.len() != moe.layers.len() || counts.is_empty() {
        let problem = format!(
            "has {} numbers for {} layers with experts, expected one for each, and at least one",
            counts.len(),
            moe.layers.len()
        );
        return Err(keys.problem("n_experts", problem));
    }
    moe.set_counts(counts);
    let shared = keys.size_maybe("shared_intermediate_size")?;
    moe.shared = shared.map(|intermediate_size| SharedExpert {
        intermediate_size,
        gated: false,
    });
    let Some(of_router) = keys.object("router")? else {
        return Err(keys.problem("router", "is missing".to_owned()));
    };
    moe.router = router(&of_router)?;
    moe.top_k = top_k(keys, &moe)?;
    check_parts(keys, &moe)?;
    Ok(moe)
}

/// What it cannot go together with is checked with the rest of the experts.
fn decoupled_router(keys: &Keys) -> Result<Option<DecoupledRouter>> {
    let Some(keys) = keys.object(DECOUPLED)? else {
        return Ok(None);
    };
    const SIZES: [&str; 5] = [
        "hidden_size",
        "n_layers",
        "n_heads",
        "head_dim",
        "intermediate_size",
    ];
    keys.refuse_others(&[&SIZES[..], &["per_layer"]].concat())?;
    let [hidden_size, n_layers, n_heads, head_dim, intermediate_size] =
        SIZES.map(|key| keys.size(key));
    Ok(Some(DecoupledRouter {
        hidden_size: hidden_size?,
        n_layers: n_layers?,
        n_heads: n_heads?,
        head_dim: head_dim?,
        intermediate_size: intermediate_size?,
        per_layer: keys.flag("per_layer")?,
    }))
}

fn residual(keys: &Keys) -> Result<Option<ResidualMlp>> {
    const WIDTH: &str = "residual_intermediate_size";
    if keys.get("residual").is_none() {
        let reason = "there is no `residual` that it could be the width of";
        keys.only(WIDTH, &[], reason)?;
        return Ok(None);
    }
    let learned = match keys.text("residual")? {
        "sum" => false,
        "learned" => true,
        other => {
            let reason = "known: sum, learned, null";
            return Err(keys.unsupported("residual", &json!(other), reason));
        }
    };
    Ok(Some(ResidualMlp {
        intermediate_size: keys.size(WIDTH)?,
        learned,
    }))
}

/// The rule and its options; those of other rules are refused.
fn router(keys: &Keys) -> Result<RouterConfig> {
    let name = keys.text("name")?;
    if name == "expert_choice" {
        let reason = "experts that choose their tokens look at tokens that come later, so that a text cannot be \
                      generated token by token; train with another router";
        return Err(keys.unsupported("name", &json!(name), reason));
    }
    let Some((_, options)) = ROUTERS.iter().find(|(known, _)| *known == name) else {
        let known: Vec<&str> = ROUTERS.iter().map(|(known, _)| *known).collect();
        let reason = format!("known routers: {}", known.join(", "));
        return Err(keys.unsupported("name", &json!(name), &reason));
    };
    keys.refuse_others(&[&["name"], *options].concat())?;
    Ok(match name {
        "switch" => RouterConfig::Switch,
        "top_2" => RouterConfig::Top2,
        "null_experts" => RouterConfig::NullExperts,
        "top_p" => RouterConfig::TopP {
            mass: within(keys, "top_p", 0.0..=1.0)?,
        },
        "dense_to_sparse" => RouterConfig::DenseToSparse {
            temperature: keys.positive("temperature")?,
            threshold: within(keys, "threshold", 0.0..=1.0)?,
            hard: choice(keys, "stage", ["soft", "hard"])?,
        },
        "uniform" => RouterConfig::Uniform {
            seed: keys.whole("seed")?,
        },
        "union" => RouterConfig::Union {
            eps: within(keys, "eps", 0.0..=f64::from(f32::MAX))?,
        },
        "sparse_mixer" => RouterConfig::SparseMixer {
            eps: within(keys, "eps", 0.0..=1.0)?,
        },
        "group_limited" => group_limited(keys)?,
        _ => RouterConfig::TopK {
            norm: keys.flag("norm_topk_prob")?,
        },
    })
}

fn group_limited(keys: &Keys) -> Result<RouterConfig> {
    let score = match choice(keys, "score", ["softmax", "sigmoid"])? {
        false => Score::Softmax,
        true => Score::Sigmoid,
    };
    Ok(RouterConfig::GroupLimited {
        score,
        n_groups: keys.size("n_groups")?,
        keep_groups: keys.size("keep_groups")?,
        sum_of_best_two: choice(keys, "group_score", ["max", "sum_of_best_two"])?,
        norm: keys.flag("norm_topk_prob")?,
        scale: keys.positive("scale")?,
        correction_bias: keys.flag("bias")?,
    })
}

/// A number within `range`.
fn within(keys: &Keys, key: &str, range: std::ops::RangeInclusive<f64>) -> Result<f64> {
    let value = keys.number(key)?;
    if range.contains(&value) {
        return Ok(value);
    }
    let (least, most) = range.into_inner();
    Err(keys.problem(key, format!("is {value}, expected {least} to {most}")))
}

/// Whether `key` is the second of two words.
fn choice(keys: &Keys, key: &str, words: [&str; 2]) -> Result<bool> {
    let word = keys.text(key)?;
    match words.iter().position(|known| *known == word) {
        Some(at) => Ok(at == 1),
        None => {
            let reason = format!("known: {}", words.join(", "));
            Err(keys.unsupported(key, &json!(word), &reason))
        }
    }
}

/// The number of picks. Rules that leave no choice may leave it out; rules that may pick all experts have none.
fn top_k(keys: &Keys, moe: &MoeConfig) -> Result<usize> {
    let fixed = match moe.router {
        RouterConfig::Switch | RouterConfig::DenseToSparse { hard: true, .. } => 1,
        RouterConfig::Top2 | RouterConfig::SparseMixer { .. } => 2,
        router if router.may_pick_all() => {
            let reason = format!("`{}` has no number of picks; leave it out", router.name());
            keys.only("top_k", &[], &reason)?;
            return Ok(moe.n_experts);
        }
        _ => return keys.size("top_k"),
    };
    let reason = format!("`{}` picks {fixed}", moe.router.name());
    keys.only("top_k", &[json!(fixed)], &reason)?;
    Ok(fixed)
}

/// Parts that must go together, or cannot.
fn check_parts(keys: &Keys, moe: &MoeConfig) -> Result<()> {
    let name = moe.router.name();
    let has_null = matches!(moe.router, RouterConfig::NullExperts);
    if has_null != (moe.n_null > 0) {
        let problem = match has_null {
            true => "is 0, expected at least 1 for the router `null_experts`".to_owned(),
            false => format!(
                "is {}, but the router `{name}` has no null experts",
                moe.n_null
            ),
        };
        return Err(keys.problem("n_null", problem));
    }
    if let (Some(width), false) = (moe.recurrent_router, moe.looks_at_logits()) {
        let reason = format!("`{name}` picks without logits, which the recurrence would make");
        return Err(keys.unsupported("recurrent_router", &json!(width), &reason));
    }
    Ok(())
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let moe = &config.moe;
    let counts: Vec<usize> = moe.counts().collect();
    let top_k = (!moe.router.may_pick_all()).then_some(moe.top_k);
    let residual = moe.residual.map(|residual| match residual.learned {
        true => "learned",
        false => "sum",
    });
    let mut ours = match moe.layers.is_empty() {
        true => json!({"layers": [], "n_experts": []}),
        false => json!({
            "layers": moe.layers,
            "n_experts": counts,
            "n_null": moe.n_null,
            "top_k": top_k,
            "intermediate_size": moe.intermediate_size,
            "router": router_json(&moe.router),
            "shared_intermediate_size": moe.shared.map(|shared| shared.intermediate_size),
            "residual": residual,
            "residual_intermediate_size": moe.residual.map(|residual| residual.intermediate_size),
            "recurrent_router": moe.recurrent_router,
        }),
    };
    if let Some(router) = moe.decoupled_router {
        let DecoupledRouter {
            hidden_size,
            n_layers,
            n_heads,
            head_dim,
            intermediate_size,
            per_layer,
        } = router;
        ours[DECOUPLED] = json!({
            "hidden_size": hidden_size, "n_layers": n_layers, "n_heads": n_heads, "head_dim": head_dim,
            "intermediate_size": intermediate_size, "per_layer": per_layer,
        });
    }
    if let Some(experts) = config.attention.experts {
        let AttentionExperts {
            n_experts,
            top_k,
            eps,
        } = experts;
        ours[ATTENTION] = json!({"n_experts": n_experts, "top_k": top_k, "eps": eps});
    }
    if config.attention.qk_norm == QkNorm::None {
        ours[QK_NORM] = json!(false);
    }
    common::put_windows(config, map);
    let bias = json!(config.attention.qkv_bias);
    common::put(map, [("attention_bias", bias), (KEY, ours)]);
}

fn router_json(router: &RouterConfig) -> Value {
    let name = router.name();
    match *router {
        RouterConfig::TopK { norm } => json!({"name": name, "norm_topk_prob": norm}),
        RouterConfig::TopP { mass } => json!({"name": name, "top_p": mass}),
        RouterConfig::DenseToSparse {
            temperature,
            threshold,
            hard,
        } => json!({
            "name": name, "temperature": temperature, "threshold": threshold,
            "stage": if hard { "hard" } else { "soft" },
        }),
        RouterConfig::Uniform { seed } => json!({"name": name, "seed": seed}),
        RouterConfig::Union { eps } | RouterConfig::SparseMixer { eps } => {
            json!({"name": name, "eps": eps})
        }
        RouterConfig::GroupLimited {
            score,
            n_groups,
            keep_groups,
            sum_of_best_two,
            norm,
            scale,
            correction_bias,
        } => json!({
            "name": name, "n_groups": n_groups, "keep_groups": keep_groups, "norm_topk_prob": norm,
            "score": if score == Score::Sigmoid { "sigmoid" } else { "softmax" },
            "group_score": if sum_of_best_two { "sum_of_best_two" } else { "max" },
            "scale": scale, "bias": correction_bias,
        }),
        RouterConfig::Switch | RouterConfig::Top2 | RouterConfig::NullExperts => {
            json!({ "name": name })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::parse;
    use super::*;
    use crate::Dtype;
    use crate::specs::tensor_specs;

    fn base(edits: Value) -> Value {
        let mut ours = json!({
            "layers": [0, 2], "n_experts": [4, 4], "n_null": 0, "top_k": 2, "intermediate_size": 6,
            "router": {"name": "top_k", "norm_topk_prob": true}, "shared_intermediate_size": null,
            "residual": null, "recurrent_router": null,
        });
        for (key, value) in edits.as_object().into_iter().flatten() {
            ours[key] = value.clone();
        }
        json!({
            "model_type": "cadre_moe", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 12,
            "cadre_moe": ours,
        })
    }

    fn read(edits: Value) -> Result<ModelConfig> {
        parse(&base(edits), Value::Null)
    }

    /// Experts of attention, and dense feed-forwards.
    fn attention_alone() -> Value {
        json!({
            "layers": [], "n_experts": [], "top_k": null, "intermediate_size": null, "router": null,
            "attention_experts": {"n_experts": 2, "top_k": 2, "eps": 0},
        })
    }

    fn decoupled(per_layer: bool) -> Value {
        json!({
            "hidden_size": 12, "n_layers": 1, "n_heads": 2, "head_dim": 6, "intermediate_size": 20, "per_layer": per_layer,
        })
    }

    const GROUPS: &str = r#"{"name": "group_limited", "score": "sigmoid", "n_groups": 2, "keep_groups": 1,
        "group_score": "sum_of_best_two", "norm_topk_prob": true, "scale": 2.5, "bias": true}"#;

    #[test]
    fn what_is_written_is_read_back() {
        let groups: Value = serde_json::from_str(GROUPS).unwrap();
        let soft = json!({"name": "dense_to_sparse", "temperature": 0.5, "threshold": 0.001, "stage": "soft"});
        let cases = [
            json!({}),
            json!({"n_experts": [4, 8]}),
            json!({"router": {"name": "switch"}, "top_k": null}),
            json!({"router": {"name": "top_2"}}),
            json!({"router": {"name": "top_p", "top_p": 0.4}, "top_k": null, "n_experts": [4, 6]}),
            json!({"router": {"name": "null_experts"}, "n_null": 3, "top_k": 5}),
            json!({"router": soft, "top_k": null}),
            json!({"router": {"name": "uniform", "seed": u64::MAX}}),
            json!({"router": {"name": "union", "eps": 1.0}}),
            json!({"router": {"name": "sparse_mixer", "eps": 0.01}, "top_k": null}),
            json!({"router": groups, "shared_intermediate_size": 10}),
            json!({"residual": "sum", "residual_intermediate_size": 7}),
            json!({"attention_experts": {"n_experts": 2, "top_k": 1, "eps": 0.25}}),
            attention_alone(),
            json!({"qk_norm": false, "decoupled_router": decoupled(false)}),
            json!({"residual": "learned", "residual_intermediate_size": 7, "recurrent_router": 5}),
            json!({"decoupled_router": decoupled(false)}),
            json!({"decoupled_router": decoupled(true), "n_experts": [4, 6], "shared_intermediate_size": 10}),
        ];
        for edits in cases {
            let config = read(edits.clone()).unwrap();
            let text = config.to_config_json(Dtype::F32).unwrap();
            let again = ModelConfig::parse("m", &text, None).unwrap();
            assert_eq!(again.moe, config.moe, "{edits}");
            assert_eq!(again.attention, config.attention, "{edits}");
        }
    }

    #[test]
    fn every_part_has_its_tensors() {
        let config = read(json!({
            "n_experts": [2, 3], "n_null": 1, "router": {"name": "null_experts"}, "recurrent_router": 5,
            "shared_intermediate_size": 10, "residual": "learned", "residual_intermediate_size": 7,
        }))
        .unwrap();
        let specs = tensor_specs(&config);
        let shape = |name: &str| {
            let found = specs.iter().find(|(known, _)| known == name);
            found.unwrap_or_else(|| panic!("{name}")).1.clone()
        };
        assert_eq!(shape("model.layers.0.mlp.gate.weight"), [3, 5]);
        assert_eq!(shape("model.layers.2.mlp.gate.weight"), [4, 5]);
        assert_eq!(shape("model.layers.2.mlp.router_in.weight"), [5, 32]);
        assert_eq!(
            shape("model.layers.2.mlp.shared_experts.down_proj.weight"),
            [32, 10]
        );
        assert_eq!(
            shape("model.layers.0.mlp.residual_mlp.up_proj.weight"),
            [7, 32]
        );
        assert_eq!(
            shape("model.layers.0.mlp.residual_coefficient.weight"),
            [2, 32]
        );
        assert_eq!(shape("model.layers.0.mlp.residual_coefficient.bias"), [2]);
        assert_eq!(shape("model.router_gru.weight_hh"), [15, 5]);
        assert_eq!(shape("model.router_gru.bias_ih"), [15]);
        assert_eq!(shape("model.layers.1.mlp.up_proj.weight"), [12, 32]);
        let experts = |layer| {
            let prefix = format!("model.layers.{layer}.mlp.experts.");
            specs
                .iter()
                .filter(|(name, _)| name.starts_with(&prefix))
                .count()
        };
        assert_eq!((experts(0), experts(1), experts(2)), (6, 0, 9));
        let attention = tensor_specs(&read(attention_alone()).unwrap());
        let gate = (
            "model.layers.2.self_attn.gate.weight".to_owned(),
            vec![2, 32],
        );
        assert!(attention.contains(&gate) && !specs.contains(&gate));
        assert!(attention.iter().all(|(name, _)| !name.contains("experts")));
        let before =
            read(json!({"n_experts": [2, 3], "decoupled_router": decoupled(true)})).unwrap();
        let before = tensor_specs(&before);
        assert!(before.contains(&("model.router.head.weight".to_owned(), vec![5, 12])));
        assert!(before.iter().all(|(name, _)| !name.contains(".mlp.gate.")));
        let uniform = read(json!({"router": {"name": "uniform", "seed": 1}})).unwrap();
        let gates = tensor_specs(&uniform)
            .iter()
            .filter(|(name, _)| name.contains(".mlp.gate."))
            .count();
        assert_eq!(gates, 0);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let refused = |edits: Value, expected: &str| {
            let text = read(edits.clone()).unwrap_err().to_string();
            assert!(text.contains(expected), "{edits}: {text}");
        };
        let router = |value: Value| json!({ "router": value });
        refused(json!({"n_expert": 4}), "n_expert");
        refused(json!({"n_experts": [4]}), "n_experts");
        refused(json!({"n_experts": [4, 0]}), "n_experts");
        refused(json!({"layers": [0, 3]}), "layers");
        refused(json!({"top_k": 5}), "top_k");
        refused(json!({"top_k": null}), "top_k");
        refused(json!({"n_null": 2}), "n_null");
        refused(json!({"router": {"name": "null_experts"}}), "n_null");
        refused(json!({"residual": "product"}), "known: sum, learned");
        refused(json!({"residual": "sum"}), "residual_intermediate_size");
        refused(json!({"residual_intermediate_size": 3}), "residual");
        refused(router(json!({"name": "expert_choice"})), "come later");
        refused(
            router(json!({"name": "topk"})),
            "known routers: top_k, switch",
        );
        refused(router(json!({"name": "top_k"})), "norm_topk_prob");
        refused(router(json!({"name": "top_2", "seed": 1})), "seed");
        refused(
            router(json!({"name": "top_p", "top_p": 0.5})),
            "no number of picks",
        );
        refused(
            json!({"router": {"name": "top_p", "top_p": 2.0}, "top_k": null}),
            "0 to 1",
        );
        refused(router(json!({"name": "switch"})), "picks 1");
        refused(
            json!({"router": {"name": "uniform", "seed": 1}, "recurrent_router": 4}),
            "recurrent_router",
        );
        let with = |key: &str, value: Value| {
            let mut router = decoupled(false);
            router[key] = value;
            json!({ "decoupled_router": router })
        };
        refused(with("width", json!(4)), "width");
        refused(with("n_heads", Value::Null), "n_heads");
        refused(with("head_dim", json!(5)), "decoupled_router.head_dim");
        refused(with("per_layer", Value::Null), "per_layer");
        refused(
            json!({"decoupled_router": decoupled(false), "n_experts": [4, 6]}),
            "decoupled_router.per_layer",
        );
        refused(
            json!({"decoupled_router": decoupled(false), "recurrent_router": 4}),
            "only one of the two",
        );
        refused(
            json!({"decoupled_router": decoupled(false), "router": {"name": "uniform", "seed": 1}}),
            "picks without logits",
        );
        let attention = |n: usize, top_k: usize| json!({"attention_experts": {"n_experts": n, "top_k": top_k, "eps": 1.0}});
        refused(attention(4, 1), "a divisor of the 2 key and value heads");
        refused(attention(1, 1), "at least 2");
        refused(attention(2, 3), "attention_experts.top_k");
        refused(
            json!({"attention_experts": {"n_experts": 2, "top_k": 1}}),
            "eps",
        );
        refused(json!({"qk_norm": "no"}), "qk_norm");
        let keep = json!({"n_experts": 2, "top_k": 1, "eps": 1.0, "keep": 0.5});
        refused(json!({"attention_experts": keep}), "keep");
        let mut alone = attention_alone();
        alone["top_k"] = json!(2);
        refused(alone, "names no layer with experts");
        let biased =
            json!({"cadre_moe": base(attention(2, 1))["cadre_moe"], "attention_bias": true});
        let text = parse(&base(json!({})), biased).unwrap_err().to_string();
        assert!(text.contains("plain attention only"), "{text}");
        let mut groups: Value = serde_json::from_str(GROUPS).unwrap();
        groups["n_groups"] = json!(3);
        refused(router(groups), "router.n_groups");
        assert!(parse(&base(json!({})), json!({"cadre_moe": null})).is_err());
    }

    #[test]
    fn other_architectures_cannot_say_this() {
        let mut config = read(json!({"n_experts": [4, 8], "top_k": 2})).unwrap();
        config.model_type = "qwen3_moe".to_owned();
        let text = config.to_config_json(Dtype::F32).unwrap_err().to_string();
        assert!(text.contains("different numbers of experts"), "{text}");
        let mut config = read(attention_alone()).unwrap();
        config.model_type = "qwen3".to_owned();
        let text = config.to_config_json(Dtype::F32).unwrap_err().to_string();
        assert!(text.contains("attention cut into 2 experts"), "{text}");
    }
}
