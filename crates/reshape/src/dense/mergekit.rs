//! Configurations of mergekit-moe: dense models of one kind become the experts of a mixture, and prompts say what each is for.
//!
//! Rule, as mergekit 0.1.5 computes it: everything but the feed-forwards is the base model's; expert `e` has the
//! feed-forwards of its source model, `noise_scale` times a normal draw added, `down_proj` times `residual_scale`. A router row
//! is made of the expert's prompts, each after the tokenizer's begin-of-text token: with `hidden` (also `hidden_last`) the
//! residual stream as it enters the layer at a prompt's last token, with `hidden_avg` its mean over the prompt, averaged over
//! the prompts; with `cheap_embed` the sum of the tokens' embeddings, brought to length 1, the same in all layers. What negative prompts give is
//! subtracted, and the row brought to length 1. `random` is a standard normal draw, `uniform_random` uniform within
//! `1 / sqrt(d)`.
//!
//! Differs: the stream is computed in f32, not bf16; with `hidden_avg` the mean is over a prompt's own tokens, not over the
//! padding before shorter ones too; draws are ours. Keys that are not known are refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use cadre_checkpoint::{
    Checkpoint, CheckpointError, Dtype, EncodeOptions, Mixer, MoeConfig, NewFeedForwards,
    RouterConfig, SharedExpert, TargetDtype, Tokenizer,
};
use cadre_engine::{Logits, Model, Observer, RoutingEvent, RowsEvent, SessionOptions};
use serde::Deserialize;

use super::draws::Draws;
use super::feed_forward::values;
use super::{FromDense, check};
use crate::error::{ReshapeError, Result};

/// Cosine of two router rows of a layer above which one of the experts will hardly be picked: two rows of this cosine have
/// the condition number 5, at which mergekit warns.
const ALIKE: f32 = 12.0 / 13.0;

/// A configuration of mergekit-moe.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergekitMoe {
    /// The model that gives all but the feed-forwards.
    pub base_model: String,
    /// The models that give the experts.
    pub experts: Vec<MergekitExpert>,
    #[serde(default)]
    gate_mode: GateMode,
    dtype: Option<String>,
    #[serde(default = "two")]
    experts_per_token: usize,
    /// Models that give experts that every token uses; at most one.
    #[serde(default)]
    pub shared_experts: Option<Vec<MergekitExpert>>,
    architecture: Option<String>,
}

/// One expert of it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergekitExpert {
    /// The dense model.
    pub source_model: String,
    positive_prompts: Option<Vec<String>>,
    negative_prompts: Option<Vec<String>>,
    noise_scale: Option<f32>,
    residual_scale: Option<f32>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum GateMode {
    #[default]
    #[serde(alias = "hidden_last")]
    Hidden,
    HiddenAvg,
    CheapEmbed,
    Random,
    UniformRandom,
}

fn two() -> usize {
    2
}

/// What a configuration is applied to.
#[derive(Debug)]
pub struct MergekitInput<'a> {
    /// The base model.
    pub base: &'a Checkpoint,
    /// Every model that the configuration names, by that name.
    pub models: &'a BTreeMap<String, Arc<Checkpoint>>,
    /// The base model loaded; needed where [`MergekitMoe::runs_the_base`].
    pub model: Option<&'a dyn Model>,
    /// Of random routers and of noise.
    pub seed: u64,
    /// Whether all experts may come from one model.
    pub allow_same: bool,
}

impl MergekitMoe {
    /// Parses the YAML `text` of the file `origin`.
    ///
    /// # Errors
    /// Text that is not YAML, an unknown key, and what mergekit refuses: too few experts, missing or identical prompts.
    pub fn parse(origin: &str, text: &str) -> Result<Self> {
        let parsed: Self =
            serde_yaml_ng::from_str(text).map_err(|error| ReshapeError::Mergekit {
                file: origin.to_owned(),
                problem: error.to_string(),
            })?;
        match parsed.problem() {
            None => Ok(parsed),
            Some(problem) => Err(ReshapeError::Mergekit {
                file: origin.to_owned(),
                problem,
            }),
        }
    }

    fn problem(&self) -> Option<String> {
        let n = self.experts.len();
        if n < 2 || self.experts_per_token == 0 || self.experts_per_token > n {
            return Some(format!(
                "`experts_per_token` is {} of {n} experts, expected 1 or more of at least 2",
                self.experts_per_token
            ));
        }
        let shared = self.shared_experts.as_deref().unwrap_or_default();
        if shared.len() > 1 {
            return Some(format!(
                "`shared_experts` has {} entries, expected at most 1",
                shared.len()
            ));
        }
        if let Some(lora) = self.names().find(|name| name.contains('+')) {
            return Some(format!(
                "`{lora}` names an adapter; merge it into its model first"
            ));
        }
        if self.dtype().is_none() {
            let dtype = self.dtype.as_deref().unwrap_or_default();
            return Some(format!(
                "`dtype` is {dtype}, expected float32, float16 or bfloat16"
            ));
        }
        if matches!(self.gate_mode, GateMode::Random | GateMode::UniformRandom) {
            return None;
        }
        let of_all = self.experts.iter().chain(shared);
        let without = of_all
            .clone()
            .position(|expert| expert.positive().is_empty());
        if let Some(at) = without {
            return Some(format!(
                "expert {at} has no `positive_prompts`, of which its router row is made"
            ));
        }
        let prompts =
            |expert: &MergekitExpert| (expert.positive().to_vec(), expert.negative().to_vec());
        let first = self.experts.first().map(prompts);
        if self
            .experts
            .iter()
            .all(|expert| Some(prompts(expert)) == first)
        {
            return Some(
                "all experts have the same prompts, so that the router could not tell them apart"
                    .to_owned(),
            );
        }
        None
    }

    /// The models that are named, the base first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let shared = self.shared_experts.iter().flatten();
        let experts = self.experts.iter().chain(shared);
        let sources = experts.map(|expert| expert.source_model.as_str());
        std::iter::once(self.base_model.as_str()).chain(sources)
    }

    /// Whether router rows follow from what the base model computes, so that it has to be loaded.
    #[must_use]
    pub fn runs_the_base(&self) -> bool {
        matches!(self.gate_mode, GateMode::Hidden | GateMode::HiddenAvg)
    }

    /// The format that matrices are written in; nothing for one that is not known.
    #[must_use]
    pub fn dtype(&self) -> Option<TargetDtype> {
        match self.dtype.as_deref() {
            None => Some(TargetDtype::Keep),
            Some("float32") => Some(TargetDtype::Is(Dtype::F32)),
            Some("float16") => Some(TargetDtype::Is(Dtype::F16)),
            Some("bfloat16") => Some(TargetDtype::Is(Dtype::Bf16)),
            Some(_) => None,
        }
    }

    /// Whether it says a format.
    #[must_use]
    pub fn says_dtype(&self) -> bool {
        self.dtype.is_some()
    }

    /// The experts that it describes, and warnings.
    ///
    /// # Errors
    /// Models of different kinds or sizes, experts that are all the same, prompts without tokens.
    pub fn experts_for(&self, input: &MergekitInput<'_>) -> Result<(FromDense, Vec<String>)> {
        let base = input.base;
        let n_experts = self.experts.len();
        check(base, n_experts, self.experts_per_token)?;
        let shared = self.shared_experts.as_deref().unwrap_or_default();
        let all: Vec<&MergekitExpert> = self.experts.iter().chain(shared).collect();
        let mut sources = Vec::with_capacity(all.len());
        for expert in &all {
            let source = input.models.get(&expert.source_model);
            let source = source.ok_or_else(|| missing(&expert.source_model))?;
            same_kind(base, source)?;
            sources.push(Arc::clone(source));
        }
        let first = &self.experts[0].source_model;
        if !input.allow_same && self.experts.iter().all(|one| one.source_model == *first) {
            return Err(bad(
                "experts",
                format!(
                    "are all of {first}: the mixture would compute what that does and take more; to train it afterwards, pass --allow-same"
                ),
            ));
        }
        let rows = self.rows(input, &all)?;
        let config = base.config();
        let (d, n_layers) = (config.hidden_size, config.n_layers);
        let router = |layer: usize| -> Vec<f32> {
            let of = rows[..n_experts].iter();
            of.flat_map(|layers| layers[layer].iter().copied())
                .collect()
        };
        let routers: Vec<Vec<f32>> = (0..n_layers).map(router).collect();
        let shared_gates = rows[n_experts..].iter().flatten().cloned().collect();
        let settings = format!(
            "mergekit {self:?} {} {} {:x}",
            input.seed,
            sources
                .iter()
                .map(|one| one.digest())
                .collect::<Vec<_>>()
                .join(" "),
            fingerprint(&rows)
        );
        let warnings = alike(&routers, d);
        let new = NewFeedForwards {
            moe: MoeConfig {
                layers: (0..n_layers).collect(),
                n_experts,
                top_k: self.experts_per_token,
                intermediate_size: config.intermediate_size,
                router: RouterConfig::TopK { norm: true },
                shared: (!shared.is_empty()).then_some(SharedExpert {
                    intermediate_size: config.intermediate_size,
                    gated: true,
                }),
                ..MoeConfig::default()
            },
            mixer: Arc::new(Sources {
                experts: all.iter().map(|one| (*one).clone()).zip(sources).collect(),
                draws: Draws::new(input.seed),
            }),
            routers,
            shared_gates,
        };
        Ok((FromDense { new, settings }, warnings))
    }

    /// Whether `model_type` is of the architecture that the configuration asks for.
    #[must_use]
    pub fn asks_for(&self, model_type: &str) -> bool {
        let Some(wanted) = &self.architecture else {
            return true;
        };
        let wanted = wanted.to_lowercase();
        model_type.starts_with(wanted.split_whitespace().next().unwrap_or_default())
    }

    /// What it asks for, for messages.
    #[must_use]
    pub fn architecture(&self) -> &str {
        self.architecture.as_deref().unwrap_or("any")
    }

    /// For every expert and layer a router row, `[experts][layers][d]`.
    fn rows(
        &self,
        input: &MergekitInput<'_>,
        all: &[&MergekitExpert],
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        let (config, draws) = (input.base.config(), Draws::new(input.seed));
        let (d, n_layers) = (config.hidden_size, config.n_layers);
        let random = |value: &dyn Fn(Draws, usize) -> f64| -> Vec<Vec<Vec<f32>>> {
            let of = |expert: usize, layer: usize| {
                let draws = draws.of(expert as u64).of(layer as u64);
                (0..d).map(|i| value(draws, i) as f32).collect()
            };
            (0..all.len())
                .map(|expert| (0..n_layers).map(|layer| of(expert, layer)).collect())
                .collect()
        };
        let scale = 1.0 / (d as f64).sqrt();
        match self.gate_mode {
            GateMode::Random => return Ok(random(&|draws, i| draws.normal(i))),
            GateMode::UniformRandom => {
                return Ok(random(&|draws, i| (2.0 * draws.uniform(i) - 1.0) * scale));
            }
            _ => {}
        }
        let reader = Reader::new(input.base)?;
        let of = |prompts: &[String]| -> Result<Vec<Vec<f32>>> {
            let tokens: Vec<Vec<u32>> = prompts
                .iter()
                .map(|prompt| reader.tokens(prompt))
                .collect::<Result<_>>()?;
            match (self.gate_mode, input.model) {
                (GateMode::CheapEmbed, _) => Ok(vec![embedded(input.base, &tokens)?; n_layers]),
                (mode, Some(model)) => stream(model, &tokens, mode == GateMode::HiddenAvg),
                (_, None) => Err(bad("the base model", "has not been loaded".to_owned())),
            }
        };
        let mut rows = Vec::with_capacity(all.len());
        for expert in all {
            let mut layers = of(expert.positive())?;
            if !expert.negative().is_empty() {
                let negative = of(expert.negative())?;
                let cells = layers.iter_mut().flatten().zip(negative.iter().flatten());
                cells.for_each(|(a, b)| *a -= b);
            }
            layers.iter_mut().for_each(|row| normalise(row));
            rows.push(layers);
        }
        Ok(rows)
    }
}

impl MergekitExpert {
    fn positive(&self) -> &[String] {
        self.positive_prompts.as_deref().unwrap_or_default()
    }

    fn negative(&self) -> &[String] {
        self.negative_prompts.as_deref().unwrap_or_default()
    }
}

/// Prompts to tokens, as mergekit does: the text of the begin-of-text token before each, nothing else added.
struct Reader {
    tokenizer: Tokenizer,
    begin: String,
}

impl Reader {
    fn new(base: &Checkpoint) -> Result<Self> {
        let tokenizer = base.tokenizer()?;
        let begin = match base.is_gguf() {
            true => {
                let id = base.config().bos_token_id;
                id.map(|id| tokenizer.token_str(id).into_owned())
            }
            false => {
                let text = base.file_text("tokenizer_config.json")?;
                let json =
                    text.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
                let bos = json.as_ref().and_then(|json| json.get("bos_token"));
                let bos = bos.map(|bos| bos.get("content").unwrap_or(bos));
                bos.and_then(|bos| bos.as_str()).map(str::to_owned)
            }
        };
        Ok(Self {
            tokenizer,
            begin: begin.unwrap_or_default(),
        })
    }

    fn tokens(&self, prompt: &str) -> Result<Vec<u32>> {
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        let text = format!("{}{prompt}", self.begin);
        let tokens = self.tokenizer.encode_with(&text, options)?;
        match tokens.is_empty() {
            true => Err(bad(
                "prompts",
                "has an empty one, of which no router row can be made".to_owned(),
            )),
            false => Ok(tokens),
        }
    }
}

/// The sum of the tokens' embeddings, of length 1.
fn embedded(base: &Checkpoint, prompts: &[Vec<u32>]) -> Result<Vec<f32>> {
    let d = base.config().hidden_size;
    let table = base.tensor("model.embed_tokens.weight")?.to_f32();
    let mut sum = vec![0.0; d];
    for token in prompts.iter().flatten() {
        let row = table.chunks_exact(d).nth(*token as usize);
        let row = row.ok_or_else(|| {
            bad(
                "prompts",
                format!("has token {token}, which the model does not know"),
            )
        })?;
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    normalise(&mut sum);
    Ok(sum)
}

/// For every layer what enters it, at the last token or in the mean over all, averaged over the prompts.
fn stream(model: &dyn Model, prompts: &[Vec<u32>], average: bool) -> Result<Vec<Vec<f32>>> {
    let info = model.info();
    let mut sum = vec![vec![0.0_f32; info.d_model]; info.n_layers];
    for tokens in prompts {
        let mut session = model.session(&SessionOptions {
            n_ctx: Some(tokens.len()),
            ..SessionOptions::default()
        })?;
        let mut watcher = Watcher {
            n_tokens: tokens.len(),
            average,
            sum: vec![vec![0.0; info.d_model]; info.n_layers],
        };
        model.forward(&mut session, tokens, Logits::None, &mut watcher)?;
        let share = 1.0 / prompts.len() as f32;
        for (sum, own) in sum.iter_mut().flatten().zip(watcher.sum.iter().flatten()) {
            *sum += share * own;
        }
    }
    Ok(sum)
}

/// Sums what enters the layers.
struct Watcher {
    n_tokens: usize,
    average: bool,
    sum: Vec<Vec<f32>>,
}

impl Observer for Watcher {
    fn routed(&mut self, _event: &RoutingEvent<'_>) {}

    fn wants_stream(&self) -> bool {
        true
    }

    fn entered(&mut self, event: &RowsEvent<'_>) {
        let share = if self.average {
            1.0 / self.n_tokens as f32
        } else {
            1.0
        };
        for (at, row) in event.rows.chunks_exact(event.width).enumerate() {
            let is_last = event.first_position + at + 1 == self.n_tokens;
            if self.average || is_last {
                let cells = self.sum[event.layer].iter_mut().zip(row);
                cells.for_each(|(sum, x)| *sum += share * x);
            }
        }
    }
}

fn normalise(row: &mut [f32]) {
    let length = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-8);
    row.iter_mut().for_each(|x| *x /= length);
}

/// Layers in which the rows of two experts nearly point the same way.
fn alike(routers: &[Vec<f32>], d: usize) -> Vec<String> {
    let mut layers = Vec::new();
    for (layer, router) in routers.iter().enumerate() {
        let rows: Vec<Vec<f32>> = router
            .chunks_exact(d)
            .map(|row| {
                let mut row = row.to_vec();
                normalise(&mut row);
                row
            })
            .collect();
        let cosine = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let found = (0..rows.len()).any(|a| (0..a).any(|b| cosine(&rows[a], &rows[b]) > ALIKE));
        if found {
            layers.push(layer.to_string());
        }
    }
    if layers.is_empty() {
        return Vec::new();
    }
    vec![format!(
        "the prompts of two experts give nearly the same router row in layers {}: one of them will hardly be picked there",
        layers.join(", ")
    )]
}

fn fingerprint(rows: &[Vec<Vec<f32>>]) -> u64 {
    let values = rows.iter().flatten().flatten();
    values.fold(0, |sum, value| {
        cadre_routing::filters::mix(sum ^ u64::from(value.to_bits()))
    })
}

/// The experts must be of the base's kind and size.
fn same_kind(base: &Checkpoint, other: &Checkpoint) -> Result<()> {
    let (a, b) = (base.config(), other.config());
    let sizes = [
        ("hidden_size", a.hidden_size, b.hidden_size),
        ("num_hidden_layers", a.n_layers, b.n_layers),
        (
            "intermediate_size",
            a.intermediate_size,
            b.intermediate_size,
        ),
    ];
    let wrong = |what: String| {
        let problem = format!(
            "{} cannot give experts to {}: {what}",
            other.origin(),
            base.origin()
        );
        Err(bad("a source model", problem))
    };
    if a.model_type != b.model_type || a.activation != b.activation || a.mlp_bias || b.mlp_bias {
        return wrong(format!(
            "its feed-forwards are those of {}, expected {} without biases",
            b.model_type, a.model_type
        ));
    }
    match sizes.into_iter().find(|(_, a, b)| a != b) {
        Some((key, a, b)) => wrong(format!("{key} is {b}, expected {a}")),
        None if !b.moe.layers.is_empty() => wrong("it has experts itself".to_owned()),
        None => Ok(()),
    }
}

fn missing(name: &str) -> ReshapeError {
    bad("a source model", format!("`{name}` has not been opened"))
}

fn bad(name: &'static str, problem: String) -> ReshapeError {
    ReshapeError::Option { name, problem }
}

/// Copies the feed-forwards of several models.
#[derive(Debug)]
struct Sources {
    experts: Vec<(MergekitExpert, Arc<Checkpoint>)>,
    draws: Draws,
}

impl Mixer for Sources {
    fn mix(
        &self,
        source: &Checkpoint,
        layer: usize,
        at: usize,
        part: &str,
    ) -> Result<Vec<f32>, CheckpointError> {
        let Some((expert, model)) = self.experts.get(at) else {
            return Err(CheckpointError::experts(
                source.origin(),
                format!("nothing says what expert {at} is"),
            ));
        };
        let mut all = values(model, layer, part)?;
        if let Some(noise) = expert.noise_scale {
            let draws = self.draws.of(layer as u64).of(at as u64).named(part);
            for (i, value) in all.iter_mut().enumerate() {
                *value += noise * draws.normal(i) as f32;
            }
        }
        let scale = expert.residual_scale.filter(|_| part == "down_proj.weight");
        if let Some(scale) = scale {
            all.iter_mut().for_each(|value| *value *= scale);
        }
        if scale.is_some() || expert.noise_scale.is_some() {
            all = rounded(model, layer, part, all);
        }
        Ok(all)
    }
}

/// Values in the floats of the tensor that they were made of, in which mergekit computes them.
fn rounded(model: &Checkpoint, layer: usize, part: &str, values: Vec<f32>) -> Vec<f32> {
    let stored = model.tensor_info(&format!("model.layers.{layer}.mlp.{part}"));
    let floats = stored.filter(|(dtype, _)| dtype.torch_name().is_some());
    let bytes = floats.and_then(|(dtype, _)| Some((dtype, dtype.encode(&values)?)));
    bytes.map_or(values, |(dtype, bytes)| dtype.decode(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
base_model: a
gate_mode: cheap_embed # of tokens
dtype: bfloat16
experts:
  - source_model: a
    positive_prompts: [\"write code\", 'x']
  - source_model: b
    positive_prompts:
      - |
        two
        lines
    negative_prompts: [no]
    residual_scale: 0.1
";

    fn problem(text: &str) -> String {
        MergekitMoe::parse("moe.yml", text).unwrap_err().to_string()
    }

    #[test]
    fn files_of_mergekit_are_read() {
        let parsed = MergekitMoe::parse("moe.yml", FILE).unwrap();
        assert_eq!(parsed.gate_mode, GateMode::CheapEmbed);
        assert_eq!(parsed.names().collect::<Vec<_>>(), ["a", "a", "b"]);
        assert_eq!(parsed.experts[1].positive(), ["two\nlines\n"]);
        assert_eq!(parsed.experts[1].residual_scale, Some(0.1));
        assert_eq!(parsed.dtype(), Some(TargetDtype::Is(Dtype::Bf16)));
        assert_eq!(parsed.experts_per_token, 2);
        let plain = MergekitMoe::parse("m", &FILE.replace("gate_mode: cheap_embed", ""));
        assert!(plain.unwrap().runs_the_base());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_key() {
        for (from, to, words) in [
            (
                "gate_mode: cheap_embed",
                "gate_mode: magic",
                "unknown variant",
            ),
            ("dtype: bfloat16", "dtype: int3", "`dtype` is int3"),
            ("base_model: a", "base_model: a\ntop_k: 3", "top_k"),
            (
                "base_model: a",
                "base_model: a\nexperts_per_token: 3",
                "`experts_per_token` is 3 of 2",
            ),
            ("source_model: b", "source_model: b+lora", "adapter"),
            (
                "[\"write code\", 'x']",
                "[]",
                "expert 0 has no `positive_prompts`",
            ),
        ] {
            let text = problem(&FILE.replace(from, to));
            assert!(
                text.contains(words) && text.contains("moe.yml"),
                "{words}: {text}"
            );
        }
        let same = "base_model: a\nexperts:\n- {source_model: a, positive_prompts: [x]}\n- {source_model: b, positive_prompts: [x]}\n";
        assert!(problem(same).contains("same prompts"));
        assert!(problem(": :").contains("moe.yml"));
    }

    #[test]
    fn rows_that_point_the_same_way_are_told() {
        let routers = vec![vec![1.0, 0.0, 0.0, 1.0], vec![1.0, 0.0, 1.0, 0.1]];
        assert!(alike(&routers, 2)[0].contains("layers 1:"));
        assert!(alike(&routers[..1], 2).is_empty());
    }
}
