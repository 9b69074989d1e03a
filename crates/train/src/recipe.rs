//! Recipes: TOML files that reproduce one named run. Unknown keys are errors.

mod model;

pub use model::{Experts, Model};

use crate::architecture::{Architecture, MoeParts};
use crate::device::Place;
use crate::error::{Result, TrainError};
use crate::layers::decoupled;
pub use crate::losses::LossWeights;
use crate::methods::balance_bias::BalanceBias;
use crate::methods::cut::Cut;
use crate::methods::distill::Distill;
use crate::methods::evolve::Evolve;
use crate::methods::prune_rows::PruneRows;
use crate::methods::router_distill::RouterDistill;
use crate::methods::start::Start;
use crate::ops::{Precision, Recompute};
use crate::optimizer::AdamWConfig;
use crate::routers::{Route, RouterOptions};
use cadre_checkpoint::ModelConfig;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run and of the exported model.
    pub name: String,
    /// Seed of initial values and data order.
    #[serde(default)]
    pub seed: u64,
    /// The model.
    pub model: Model,
    /// The routing rule; absent for softmax top-k.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterOptions>,
    /// The text; absent for speed measurements, which use random tokens.
    pub data: Option<Data>,
    /// The schedule.
    pub train: Train,
    /// Router losses.
    #[serde(default)]
    pub losses: LossWeights,
    /// Balance by a bias on the selection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_bias: Option<BalanceBias>,
    /// A teacher to follow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<Distill>,
    /// A mixture whose routers one before the layers follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_distill: Option<RouterDistill>,
    /// One expert that becomes many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evolve: Option<Evolve>,
    /// A dense model that becomes the experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<Cut>,
    /// Rows of experts in factors that go while the others are tuned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune_rows: Option<PruneRows>,
    /// A checkpoint to start from, and what of it does not move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// Constants of AdamW.
    #[serde(default)]
    pub optimizer: AdamWConfig,
    /// Where results go.
    pub output: Output,
}

/// Text sources.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// One entry per domain.
    pub sources: Vec<Source>,
    /// Tokens per domain in each evaluation on held-out text.
    #[serde(default = "eval_tokens")]
    pub eval_tokens: usize,
}

/// One domain.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Name in logs.
    pub domain: String,
    /// JSONL of documents to train on, relative to the working folder.
    pub train: PathBuf,
    /// JSONL of documents never trained on.
    pub heldout: PathBuf,
    /// Relative share of sequences.
    #[serde(default = "one")]
    pub weight: f64,
}

/// The schedule.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences per micro-batch.
    pub batch_size: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Micro-batches per optimizer step.
    #[serde(default = "one_batch")]
    pub accumulate: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Learning rate at the end, as a share of `lr`.
    #[serde(default = "tenth")]
    pub min_lr_ratio: f64,
    /// Steps of linear warm-up.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Largest global gradient norm; 0 turns clipping off.
    #[serde(default = "one")]
    pub grad_clip: f64,
    /// What the large products are made of: `"f32"`, or `"bf16"` where the CPU multiplies that (elsewhere f32).
    #[serde(default)]
    pub precision: Precision,
    /// What the backward pass computes again so that it need not be kept: `"none"`, `"experts"` or `"layer"`.
    #[serde(default)]
    pub recompute: Recompute,
    /// Where tensors live: `"cpu"`, or `"vulkan"`, `"vulkan-software"`, `"cuda"` or `"metal"` in a build with that feature.
    #[serde(default, skip_serializing_if = "Place::is_cpu")]
    pub device: Place,
}

/// Where results go.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// Folder of the run: log, snapshots, tokenizer, token cache, model.
    pub dir: PathBuf,
    /// Steps between snapshots.
    #[serde(default = "hundred")]
    pub snapshot_every: u64,
    /// Snapshots kept.
    #[serde(default = "two")]
    pub keep: usize,
    /// Steps between evaluations on held-out text; 0 only at the end.
    #[serde(default)]
    pub eval_every: u64,
    /// Whether all held-out text is scored before the first step too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub eval_first: bool,
}

impl Train {
    /// So many steps of `batch_size` sequences of `seq_len` tokens, everything else as where a recipe says nothing.
    pub(crate) fn plain(steps: u64, batch_size: usize, seq_len: usize, lr: f64) -> Self {
        Self {
            steps,
            batch_size,
            seq_len,
            accumulate: one_batch(),
            lr,
            min_lr_ratio: tenth(),
            warmup_steps: 0,
            grad_clip: one(),
            precision: Precision::default(),
            recompute: Recompute::default(),
            device: Place::default(),
        }
    }
}

fn one() -> f64 {
    1.0
}
fn tenth() -> f64 {
    0.1
}
fn one_batch() -> usize {
    1
}
fn two() -> usize {
    2
}
fn hundred() -> u64 {
    100
}
fn eval_tokens() -> usize {
    16_384
}

impl Recipe {
    /// Reads and checks a recipe.
    ///
    /// # Errors
    /// A file that is not readable or not TOML, an unknown key, or a value that cannot be used.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| TrainError::io("read", path, e))?;
        Self::parse(path, &text)
    }

    /// As [`Recipe::read`], with some values replaced: `overrides` are `key.path=value`, the value in TOML's form
    /// (a bare word is a string).
    ///
    /// # Errors
    /// As [`Recipe::read`], and an override that is not `key=value`.
    pub fn read_with(path: &Path, overrides: &[String]) -> Result<Self> {
        if overrides.is_empty() {
            return Self::read(path);
        }
        let fail = |message: String| TrainError::Recipe {
            path: path.to_owned(),
            message,
        };
        let text = std::fs::read_to_string(path).map_err(|e| TrainError::io("read", path, e))?;
        let mut table: toml::Table = text.parse().map_err(|e| fail(format!("{e}")))?;
        for change in overrides {
            let Some((key, value)) = change.split_once('=') else {
                return Err(fail(format!("`{change}`, expected key=value")));
            };
            let parsed = format!("x = {value}").parse::<toml::Table>();
            let value = match parsed {
                Ok(mut one) => one.remove("x").unwrap_or_else(|| value.into()),
                Err(_) => toml::Value::String(value.to_owned()),
            };
            set(&mut table, key, value).map_err(fail)?;
        }
        Self::parse(path, &table.to_string())
    }

    /// Parses the text of a recipe; `path` names it in errors.
    ///
    /// # Errors
    /// As [`Recipe::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let fail = |message: String| TrainError::Recipe {
            path: path.to_owned(),
            message,
        };
        let recipe: Self = toml::from_str(text).map_err(|e| fail(e.to_string()))?;
        recipe.check().map_err(fail)?;
        recipe
            .model_config()
            .check(&path.display().to_string())
            .map_err(|e| fail(e.to_string()))?;
        recipe.check_routers().map_err(fail)?;
        Ok(recipe)
    }

    fn check_routers(&self) -> Result<(), String> {
        let options = self.router.clone().unwrap_or_default();
        options.check()?;
        self.model
            .check_parts(self.model_config().moe.layers.len())?;
        let architecture = self.architecture();
        let architecture = architecture.map_err(|e| format!("[router]: {e}"))?;
        decoupled::check(self, &architecture)?;
        let model = &self.model;
        let is_made = model.factors.is_some() || !model.shared_weights.is_empty();
        if is_made && (self.evolve.is_some() || self.cut.is_some()) {
            return Err(
                "`model.factors` and `model.shared_weights` are of experts that are there already; they do not go with `[evolve]` and \
                 `[cut]`"
                    .to_owned(),
            );
        }
        if !options.allow_non_causal {
            check_causal(&options, &architecture)?;
        }
        crate::methods::check(self, &architecture)
    }

    /// The model without its parameters: its configuration and routing rules.
    ///
    /// # Errors
    /// Options that the router cannot work with.
    pub fn architecture(&self) -> Result<Architecture> {
        let options = self.router.clone().unwrap_or_default();
        let (m, config) = (&self.model, self.model_config());
        let counts = match &m.n_experts {
            Experts::Same(n) => vec![*n; config.moe.layers.len()],
            Experts::PerLayer(counts) => counts.clone(),
        };
        let residual_width = m
            .residual_intermediate_size
            .unwrap_or(config.intermediate_size);
        let parts = MoeParts {
            shared: m.shared_intermediate_size,
            residual: m.residual.map(|kind| (kind, residual_width)),
            recurrent_router: m.recurrent_router,
            recurrent_restarts: m.recurrent_restarts,
            decoupled: m.decoupled_router.map(|options| options.stored()),
        };
        let mut architecture = Architecture::with_parts(config, &options, &counts, parts)?;
        // As checkpoints have it, but for what they cannot say.
        architecture.attention = m.attention_experts.map(|e| e.rule()).transpose()?;
        Ok(match &self.evolve {
            Some(evolve) => evolve.wrap(architecture),
            None => architecture,
        })
    }

    fn check(&self) -> Result<(), String> {
        let positive = [
            ("train.steps", self.train.steps as usize),
            ("train.batch_size", self.train.batch_size),
            ("train.seq_len", self.train.seq_len),
            ("train.accumulate", self.train.accumulate),
            ("output.snapshot_every", self.output.snapshot_every as usize),
            ("output.keep", self.output.keep),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("`{key}` = 0, expected at least 1"));
        }
        let eps = self.model.rms_norm_eps;
        if !(eps > 0.0 && eps < 1.0) {
            return Err(format!(
                "`model.rms_norm_eps` = {eps}, expected more than 0 and less than 1"
            ));
        }
        let (seq, longest) = (self.train.seq_len, self.model.max_position_embeddings);
        if seq > longest {
            return Err(format!(
                "`train.seq_len` = {seq} is more than `model.max_position_embeddings` = {longest}"
            ));
        }
        if !(self.train.lr > 0.0 && self.train.lr.is_finite()) {
            return Err(format!(
                "`train.lr` = {}, expected more than 0",
                self.train.lr
            ));
        }
        self.train.check_device()?;
        let Some(data) = &self.data else {
            return Ok(());
        };
        if data.sources.is_empty() {
            return Err("`data.sources` is empty, expected at least one domain".to_owned());
        }
        match data
            .sources
            .iter()
            .find(|s| !(s.weight > 0.0 && s.weight.is_finite()))
        {
            Some(s) => Err(format!(
                "`weight` = {} of domain `{}`, expected more than 0",
                s.weight, s.domain
            )),
            None => Ok(()),
        }
    }

    /// The model's configuration; that of [`Model::config`].
    #[must_use]
    pub fn model_config(&self) -> ModelConfig {
        let router = self.router.clone().unwrap_or_default();
        self.model.config(&router)
    }

    /// Tokens per optimizer step.
    #[must_use]
    pub fn tokens_per_step(&self) -> usize {
        self.train.batch_size * self.train.seq_len * self.train.accumulate
    }

    /// Learning rate of step `step` (from 1): linear warm-up, then half a cosine down to `min_lr_ratio`.
    #[must_use]
    pub fn learning_rate(&self, step: u64) -> f64 {
        let t = &self.train;
        if step <= t.warmup_steps {
            return t.lr * step as f64 / t.warmup_steps as f64;
        }
        let done = (step - t.warmup_steps) as f64 / (t.steps - t.warmup_steps).max(1) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
        t.lr * (t.min_lr_ratio + (1.0 - t.min_lr_ratio) * cosine)
    }

    /// Everything that decides the numbers of a run, as JSON: two runs with equal text here are the same run.
    #[must_use]
    pub fn fingerprint(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).expect("a recipe is plain data");
        value["output"] = serde_json::json!({});
        value
    }
}

/// Sets `a.b.c` in nested tables.
fn set(table: &mut toml::Table, key: &str, value: toml::Value) -> Result<(), String> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Ok(())
        }
        Some((head, rest)) => {
            let inner = table
                .entry(head)
                .or_insert_with(|| toml::Table::new().into());
            let inner = inner
                .as_table_mut()
                .ok_or_else(|| format!("`{head}` is not a table, in `{key}`"))?;
            set(inner, rest, value)
        }
    }
}

/// Refuses rules under which the experts of a token depend on later tokens or other sequences.
fn check_causal(options: &RouterOptions, architecture: &Architecture) -> Result<(), String> {
    let leaks = |r: &dyn Route| !(r.causal() && r.batch_invariant());
    let sorts = options
        .capacity()
        .is_some_and(|(_, order)| !order.with_seed(0).causal());
    if sorts {
        return Err(
            "`router.drop_order` other than `position` drops a token's pairs in favour of later tokens, which a model \
             that generates does not have; to train one all the same, set `router.allow_non_causal = true`"
                .to_owned(),
        );
    }
    if architecture.attention.iter().any(|rule| leaks(rule)) {
        return Err(
            "`model.attention_experts.keep` below 1 lets the attention experts of a token depend on later tokens, which \
             a model that generates does not have; to train one all the same, set `router.allow_non_causal = true`"
                .to_owned(),
        );
    }
    if architecture.moe.iter().any(|m| leaks(&*m.router)) {
        return Err(format!(
            "router `{}` lets the experts of a token depend on later tokens or other sequences, which a model that \
             generates does not have; to train one all the same, set `router.allow_non_causal = true`",
            options.name
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = r#"
        name = "tiny"
        [model]
        vocab_size = 300
        hidden_size = 16
        n_layers = 2
        n_heads = 2
        n_kv_heads = 1
        head_dim = 8
        n_experts = 4
        top_k = 2
        moe_intermediate_size = 8
        max_position_embeddings = 64
        [train]
        steps = 20
        batch_size = 2
        seq_len = 16
        lr = 1e-3
        warmup_steps = 10
        [output]
        dir = "runs/tiny"
    "#;

    fn parse(text: &str) -> Result<Recipe> {
        Recipe::parse(Path::new("tiny.toml"), text)
    }

    #[test]
    fn warm_up_then_cosine() {
        let recipe = parse(TINY).unwrap();
        let lr = |step| recipe.learning_rate(step);
        assert!((lr(1) - 1e-4).abs() < 1e-12 && (lr(10) - 1e-3).abs() < 1e-12);
        assert!((lr(15) - 5.5e-4).abs() < 1e-9, "half way down");
        assert!((lr(20) - 1e-4).abs() < 1e-12);
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        let with = |from: &str, to: &str| parse(&TINY.replace(from, to)).unwrap_err().to_string();
        assert!(with("lr = 1e-3", "lr = 1e-3\nlearning = 1").contains("learning"));
        assert!(with("steps = 20", "steps = 0").contains("train.steps"));
        assert!(with("seq_len = 16", "seq_len = 65").contains("max_position_embeddings"));
        assert!(
            with("top_k = 2", "top_k = 5").contains("top_k")
                || with("top_k = 2", "top_k = 5").contains("num_experts_per_tok")
        );
        assert!(with("lr = 1e-3", "lr = \"fast\"").contains("lr"));
    }

    #[test]
    fn routers_are_built_while_reading() {
        let with = |table: &str| parse(&format!("{TINY}\n[router]\n{table}"));
        let refused = |table: &str| with(table).unwrap_err().to_string();
        let router = |table: &str| {
            with(table)
                .unwrap()
                .architecture()
                .unwrap()
                .moe
                .remove(0)
                .router
        };
        assert_eq!(router("name = 'top_p'\ntop_p = 0.3").name(), "top_p");
        let null = router("name = 'null_experts'\nn_null = 3");
        assert_eq!((null.n_experts(), null.n_real_experts()), (7, 4));
        assert!(refused("name = 'top_q'").contains("known policies: top_k"));
        assert!(refused("name = 'top_p'\nn_null = 3").contains("router.n_null"));
        assert!(refused("name = 'top_p'\ntopp = 3").contains("topp"));
        assert!(refused("name = 'top_p'\ntop_p = 3").contains("0 to 1"));
        assert!(refused("name = 'switch'").contains("model.top_k"));
        assert!(refused("name = 'group_limited'\nn_groups = 3").contains("n_groups = 3"));
        assert!(refused("name = 'expert_choice'").contains("allow_non_causal"));
        let allowed = "name = 'expert_choice'\nallow_non_causal = true";
        assert!(with(allowed).is_ok());
        assert!(
            refused(&format!("{allowed}\n[losses]\nconsistency = -1.0"))
                .contains("losses.consistency")
        );
        let drop = "name = 'top_k'\ncapacity = { factor = 1.5 }\ndrop_order = ";
        assert!(refused(&format!("{drop}'priority'")).contains("drop_order"));
        assert!(with(&format!("{drop}'position'")).is_ok());
        assert!(refused("capacity = { factor = 0 }").contains("capacity.factor"));
        let switch = TINY.replace("top_k = 2", "");
        assert!(parse(&format!("{switch}\n[router]\nname = 'switch'")).is_ok());
    }

    #[test]
    fn what_only_the_cpu_computes_is_refused_beside_another_device() {
        for device in ["vulkan", "vulkan-software", "cuda", "metal"] {
            let with = |keys: &str| {
                let keys = format!("lr = 1e-3\ndevice = \"{device}\"\n{keys}");
                parse(&TINY.replace("lr = 1e-3", &keys))
            };
            for (keys, key) in [
                ("precision = \"bf16\"", "train.precision"),
                ("recompute = \"experts\"", "train.recompute"),
            ] {
                let error = with(keys).unwrap_err().to_string();
                assert!(error.contains(key) && error.contains(device), "{error}");
            }
            assert!(with("precision = \"f32\"\nrecompute = \"layer\"").is_ok());
        }
        let cpu = TINY.replace(
            "lr = 1e-3",
            "lr = 1e-3\nprecision = \"bf16\"\nrecompute = \"experts\"",
        );
        assert!(parse(&cpu).is_ok());
    }

    #[test]
    fn losses_by_device_need_devices() {
        let with = |router: &str, losses: &str| {
            parse(&format!("{TINY}\n[router]\n{router}\n[losses]\n{losses}"))
        };
        let refused = |router: &str, losses: &str| with(router, losses).unwrap_err().to_string();
        let groups = "name = 'group_limited'\nn_groups = 2\nkeep_groups = 1";
        let both = "device = 0.05\ncommunication = 0.02\nsequence = 0.003";
        assert!(with(groups, both).is_ok());
        assert!(with("name = 'top_k'", "device = 0.05\ndevices = 4").is_ok());
        assert!(refused("name = 'top_k'", "device = 0.05").contains("losses.devices"));
        assert!(refused("name = 'top_k'", "device = 0.05\ndevices = 3").contains("layer 0"));
        assert!(refused("name = 'top_k'", "devices = 2").contains("without `losses.device`"));
        let limit = refused("name = 'top_k'", "communication = 0.02\ndevices = 2");
        assert!(limit.contains("router.keep_groups"), "{limit}");
        let null = "name = 'null_experts'\nn_null = 2";
        assert!(refused(null, "device = 0.05\ndevices = 2").contains("null experts"));
        assert!(refused(groups, "device = nan").contains("losses.device"));
    }

    #[test]
    fn parts_beside_the_experts_are_checked() {
        let with = |keys: &str| parse(&TINY.replace("n_experts = 4", keys));
        let refused = |keys: &str| with(keys).unwrap_err().to_string();
        let recipe = with("n_experts = [4, 8]\nshared_intermediate_size = 8").unwrap();
        let architecture = recipe.architecture().unwrap();
        let counts: Vec<usize> = architecture
            .moe
            .iter()
            .map(|m| m.router.n_experts())
            .collect();
        assert_eq!((counts, architecture.parts.shared), (vec![4, 8], Some(8)));
        assert!(refused("n_experts = [4]").contains("each of the 2 layers"));
        assert!(refused("n_experts = [4, 0]").contains("mlp_only_layers"));
        assert!(refused("n_experts = [4, 1]").contains("top_k = 2"));
        assert!(
            refused("n_experts = 4\nresidual_intermediate_size = 3").contains("model.residual")
        );
        assert!(refused("n_experts = 4\nrecurrent_router = 0").contains("recurrent_router"));
        let restarts = "n_experts = 4\nrecurrent_restarts = true";
        assert!(refused(restarts).contains("model.recurrent_router"));
        assert!(refused("n_experts = 4\nresidual = 'product'").contains("product"));
        assert!(refused("n_experts = 0\nrecurrent_router = 4").contains("none"));
    }

    #[test]
    fn attention_experts_must_divide_the_heads() {
        let with = |options: &str, router: &str| {
            let keys = format!("n_kv_heads = 2\n        attention_experts = {{ {options} }}");
            let text = TINY.replace("n_kv_heads = 1", &keys);
            parse(&format!("{text}\n[router]\n{router}"))
        };
        let refused = |options: &str| with(options, "").unwrap_err().to_string();
        let recipe = with("n_experts = 2, top_k = 1", "").unwrap();
        let rule = recipe.architecture().unwrap().attention.unwrap();
        assert!(rule.causal() && rule.batch_invariant());
        assert!(refused("n_experts = 3, top_k = 1").contains("attention_experts.n_experts"));
        assert!(refused("n_experts = 2, top_k = 3").contains("attention_experts.top_k"));
        assert!(refused("n_experts = 2").contains("top_k"));
        assert!(refused("n_experts = 2, top_k = 1, heads = 1").contains("heads"));
        assert!(refused("n_experts = 2, top_k = 1, eps = -1.0").contains("eps"));
        assert!(refused("n_experts = 2, top_k = 1, keep = 2.0").contains("keep"));
        let keep = "n_experts = 2, top_k = 1, keep = 0.5";
        assert!(refused(keep).contains("model.attention_experts.keep"));
        let recipe = with(keep, "allow_non_causal = true").unwrap();
        assert!(!recipe.architecture().unwrap().attention.unwrap().causal());
    }

    #[test]
    fn no_experts_means_dense_everywhere() {
        let recipe =
            parse(&TINY.replace("n_experts = 4", "n_experts = 0\nintermediate_size = 16")).unwrap();
        let config = recipe.model_config();
        assert!((0..2).all(|layer| !config.is_moe_layer(layer)));
        assert_eq!(config.intermediate_size, 16);
    }
}
