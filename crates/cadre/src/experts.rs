//! Watching the experts while text is generated: who leads each token, and what they did in all.

use anyhow::{Context, Result};
use cadre_checkpoint::Checkpoint;
use cadre_engine::{ModelInfo, RoutingEvent};
use cadre_trace::ansi::{ColourMode, Painter};
use cadre_trace::{
    AttentionExperts, Part, Profile, Stats, StatsBuilder, StatsOptions, Step, TraceMeta,
};
use serde::Serialize;

use crate::cli::App;
use crate::env::Env;
use crate::failure::Failure;
use crate::lossy::Said;
use crate::model::Loaded;

/// File of a checkpoint that says what its experts are for, made by `cadre trace show --profile`.
pub(crate) const PROFILE: &str = "profile.json";

/// Experts listed per domain.
const N_TOP: usize = 6;

/// Statistics of a model's experts, in the form of `-o json`.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    #[serde(flatten)]
    pub(crate) stats: Stats,
    /// Those of the experts of its attention, if it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) attention_experts: Option<Stats>,
}

/// How the experts of one model are shown.
pub(crate) struct ExpertView {
    painter: Painter,
    profile: Option<Profile>,
    meta: TraceMeta,
    layer: usize,
    width: usize,
}

impl ExpertView {
    /// Chooses colours and the layer whose experts give them.
    pub(crate) fn new(app: &App, loaded: &Loaded, layer: Option<usize>) -> Result<Self> {
        let info = loaded.model.info();
        let profile = profile(&loaded.checkpoint)?;
        let layer = choose_layer(info, layer, profile.as_ref())?;
        let painter = Painter::new(info.n_ids(), colour_mode(app));
        let width = app.env.width;
        Ok(Self {
            painter,
            profile,
            meta: meta(loaded),
            layer,
            width,
        })
    }

    /// Starts watching a sequence that begins with `prompt`.
    pub(crate) fn watch(&self, prompt: &[u32]) -> Result<ExpertWatch> {
        let builder = |meta: &TraceMeta| StatsBuilder::new(meta, &StatsOptions::default());
        let attention = self.meta.of(Part::Attention);
        Ok(ExpertWatch {
            builder: builder(&self.meta)?,
            attention: attention.as_ref().map(builder).transpose()?,
            layer: self.layer,
            tokens: prompt.to_vec(),
            leading: Vec::new(),
        })
    }

    /// `text` in the colour of `expert`, or unpainted. Control characters are replaced.
    pub(crate) fn paint(&self, text: &str, expert: Option<usize>) -> String {
        self.painter.paint(text, expert.unwrap_or(usize::MAX))
    }

    /// The strip, its legend, and what the profile knows.
    pub(crate) fn summary(&self, shown: &Shown) -> Result<String> {
        let stats = &shown.stats;
        let mut text = format!(
            "\nlayer x expert, {} tokens (the text is coloured by layer {})\n",
            stats.n_tokens, self.layer
        );
        text += &self.painter.strip(stats, self.width, Some(self.layer));
        if let Some(attention) = &shown.attention_experts {
            text += "\nlayer x expert of attention\n";
            text += &self.painter.strip(attention, self.width, None);
        }
        text += &format!("\nexperts of layer {}\n", self.layer);
        let profile = self.profile.as_ref();
        text += &self.painter.legend(stats, self.layer, profile, self.width);
        if let Some(profile) = profile {
            text += "\ntop experts per domain, as layer.expert (times their usual share)\n";
            text += &self
                .painter
                .top_experts(&profile.top_experts(N_TOP), self.width);
            text += "\nthis text was routed like\n";
            text += &self
                .painter
                .mixture(profile.domains(), &profile.mixture(stats)?);
        }
        Ok(text)
    }
}

/// Identity of a model for traces.
pub(crate) fn meta(loaded: &Loaded) -> TraceMeta {
    let info = loaded.model.info();
    let mut layer_experts = Vec::new();
    if info.experts_per_layer.iter().any(|n| *n != info.n_experts) {
        layer_experts.resize(info.n_layers, 0);
        for (layer, n_experts) in info.moe_layers.iter().zip(&info.experts_per_layer) {
            layer_experts[*layer] = n_experts + info.n_null;
        }
    }
    TraceMeta {
        digest: loaded.checkpoint.digest().to_owned(),
        architecture: info.model_type.clone(),
        n_layers: info.n_layers,
        n_experts: info.n_ids(),
        layer_experts,
        n_null: info.n_null,
        top_k: info.top_k,
        attention: info.attention_experts.map(|sizes| AttentionExperts {
            n_experts: sizes.n_experts,
            top_k: sizes.top_k,
        }),
        lossy: Said::of(info).rules().map(str::to_owned),
    }
}

/// The profile of the checkpoint, if it has one that was made for these weights.
fn profile(checkpoint: &Checkpoint) -> Result<Option<Profile>> {
    let Some(text) = checkpoint.file_text(PROFILE)? else {
        return Ok(None);
    };
    let profile = Profile::from_json(&text)
        .with_context(|| format!("{}/{PROFILE} cannot be used", checkpoint.origin()))?;
    if let Err(error) = profile.check(checkpoint.digest()) {
        tracing::warn!("{}/{PROFILE} is ignored: {error}", checkpoint.origin());
        return Ok(None);
    }
    Ok(Some(profile))
}

/// The layer that was asked for; else the one that most of the telling experts are in; else the
/// middle one.
fn choose_layer(
    info: &ModelInfo,
    asked: Option<usize>,
    profile: Option<&Profile>,
) -> Result<usize> {
    let Some(middle) = info.moe_layers.get(info.moe_layers.len() / 2).copied() else {
        return Err(
            Failure::new("the model has no layers with experts, so none can be shown").into(),
        );
    };
    if let Some(layer) = asked {
        if info.moe_layers.contains(&layer) {
            return Ok(layer);
        }
        let message = format!(
            "--layer {layer}: no experts there; layers: {:?}",
            info.moe_layers
        );
        return Err(Failure::usage(message).into());
    }
    let Some(profile) = profile else {
        return Ok(middle);
    };
    let tops = profile.top_experts(N_TOP);
    let telling = |layer: &usize| {
        tops.iter()
            .flat_map(|top| &top.experts)
            .filter(|expert| expert.layer == *layer)
            .count()
    };
    Ok(info
        .moe_layers
        .iter()
        .copied()
        .max_by_key(telling)
        .unwrap_or(middle))
}

fn colour_mode(app: &App) -> ColourMode {
    let Env { true_color, .. } = app.env;
    match (app.color.on_stdout(&app.env), true_color) {
        (false, _) => ColourMode::Plain,
        (true, false) => ColourMode::Ansi256,
        (true, true) => ColourMode::TrueColour,
    }
}

/// What was seen of one sequence.
pub(crate) struct ExpertWatch {
    builder: StatsBuilder,
    /// Of the experts of the attention.
    attention: Option<StatsBuilder>,
    layer: usize,
    tokens: Vec<u32>,
    /// Leading expert of each position in the chosen layer, as far as it is routed.
    leading: Vec<usize>,
}

impl ExpertWatch {
    /// A token was drawn.
    pub(crate) fn token(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// A layer routed some positions.
    pub(crate) fn routed(&mut self, event: &RoutingEvent<'_>) -> Result<()> {
        let (first, n_tokens) = (event.first_position, event.routing.n_tokens());
        self.builder.push(&step(&self.tokens, event)?)?;
        if event.layer == self.layer {
            self.leading.truncate(first);
            for token in 0..n_tokens {
                let (experts, _) = event.routing.token(token);
                self.leading
                    .push(experts.first().map_or(usize::MAX, |id| usize::from(*id)));
            }
        }
        Ok(())
    }

    /// A layer's attention routed some positions.
    pub(crate) fn attention_routed(&mut self, event: &RoutingEvent<'_>) -> Result<()> {
        if let Some(builder) = &mut self.attention {
            builder.push(&step(&self.tokens, event)?)?;
        }
        Ok(())
    }

    /// The leading expert at `position`, once it is routed.
    pub(crate) fn leading(&self, position: usize) -> Option<usize> {
        self.leading.get(position).copied()
    }

    /// The statistics.
    pub(crate) fn finish(self) -> Result<Shown> {
        Ok(Shown {
            stats: self.builder.finish()?,
            attention_experts: self.attention.map(StatsBuilder::finish).transpose()?,
        })
    }
}

/// An event of the one sequence whose tokens are `tokens`, to be counted.
fn step<'a>(tokens: &'a [u32], event: &RoutingEvent<'a>) -> Result<Step<'a>> {
    let first = event.first_position;
    Ok(Step {
        seq: 0,
        first_pos: u32::try_from(first).context("the sequence is too long to trace")?,
        tokens: &tokens[first..first + event.routing.n_tokens()],
        domain: "text",
        layer: event.layer,
        routing: event.routing,
        logits: Some(event.logits),
        norms: None,
    })
}
