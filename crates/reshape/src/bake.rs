//! Baking: a steering written into a checkpoint, so that the model is steered wherever it is loaded.
//!
//! A masked expert is left out, with its row of the router: results are those of minus infinity in its place. A gain
//! multiplies what an expert gives to the stream, the matrix `down_proj` and its bias; 0 silences it. The number of experts that a token gets is a
//! number of the configuration. A forced expert is one whose choice is corrected (`e_score_correction_bias`, which moves no weight) so far that none
//! comes before it. The rest of what steering can do looks at each token, and no checkpoint has a place for it: that is refused by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use cadre_checkpoint::{Checkpoint, CheckpointError, Conversion, Mixer, NewExpert, RouterConfig};
use cadre_routing::Steering;
use cadre_routing::plan::{ModelShape, Plan, PlanExpert};
use cadre_routing::steer::{Experts, Layers};

use crate::apply::{Applying, apply_with};
use crate::error::{ReshapeError, Result};
use crate::mix::{name, tensor};
use crate::shape::shape_of;

/// A steering that is to be written.
#[derive(Debug)]
pub struct Baked<'a> {
    /// Which experts stay.
    pub plan: Plan,
    /// What is written.
    pub conversion: Conversion<'a>,
}

/// Plans to write `source` steered by `steering`.
///
/// # Errors
/// The steering says what a checkpoint cannot, or does not fit the model; the model's files have no place for the result.
pub fn bake<'a>(
    source: &'a Checkpoint,
    steering: &Steering,
    options: Applying,
) -> Result<Baked<'a>> {
    refuse_what_looks_at_tokens(steering)?;
    let shape = shape_of(source);
    let plan = kept(&shape, &steering.mask)?;
    let written = Written {
        gains: Gains::of(&shape, steering)?,
        top_k: steering.top_k,
        corrections: forced(source, &shape, steering)?,
    };
    let conversion = apply_with(source, &plan, &written, options)?;
    Ok(Baked { plan, conversion })
}

/// What is written beside who stays.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) gains: Gains,
    pub(crate) top_k: Option<usize>,
    /// Corrections of the choice, by layer and expert of the source.
    pub(crate) corrections: BTreeMap<(usize, usize), f32>,
}

impl Written {
    pub(crate) fn is_empty(&self) -> bool {
        self.gains.is_empty() && self.top_k.is_none() && self.corrections.is_empty()
    }
}

/// A line for each, by which an unfinished output is known.
impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(top_k) = self.top_k {
            writeln!(f, "top_k {top_k}")?;
        }
        for ((layer, expert), value) in &self.corrections {
            writeln!(f, "correction {layer}:{expert}={value}")?;
        }
        write!(f, "{}", self.gains)
    }
}

/// Corrections that let no expert come before those of `force`.
fn forced(
    source: &Checkpoint,
    shape: &ModelShape,
    steering: &Steering,
) -> Result<BTreeMap<(usize, usize), f32>> {
    let refused = |problem: String| ReshapeError::NotBaked {
        rule: "force",
        problem,
    };
    let mut corrections = BTreeMap::new();
    if steering.force.is_empty() {
        return Ok(corrections);
    }
    let moe = &source.config().moe;
    match &moe.router {
        RouterConfig::GroupLimited {
            correction_bias: true,
            n_groups,
            keep_groups,
            ..
        } => {
            if keep_groups < n_groups {
                let problem = "its experts compete in groups, and a forced expert would bring its whole group in";
                return Err(refused(problem.to_owned()));
            }
        }
        _ => {
            let problem = "its routers have no correction of the choice (`e_score_correction_bias`), and no weight makes a router pick an expert always and \
                           weigh it as before";
            return Err(refused(problem.to_owned()));
        }
    }
    let top_k = steering.top_k.unwrap_or(moe.top_k);
    let mut by_layer: BTreeMap<usize, BTreeSet<u16>> = BTreeMap::new();
    for (layers, experts) in steering.force.iter() {
        for (layer, of) in meant("force", shape, layers)? {
            for expert in experts {
                check("force", layer, of, *expert)?;
                by_layer.entry(layer).or_default().insert(*expert);
            }
        }
    }
    let masked = masked(shape, &steering.mask)?;
    for (layer, experts) in by_layer {
        if experts.len() > top_k {
            let n = experts.len();
            return Err(refused(format!(
                "layer {layer} has {n} forced experts, and a token gets {top_k}"
            )));
        }
        let gone = masked.get(&layer).map_or(&[][..], Vec::as_slice);
        if let Some(expert) = experts.iter().find(|expert| gone.contains(expert)) {
            return Err(refused(format!(
                "expert {expert} of layer {layer} is masked, too"
            )));
        }
        let name = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
        let stored = tensor(source, &name)?;
        let most = stored.iter().fold(0.0f32, |most, value| most.max(*value));
        // Scores that are corrected are between 0 and 1; the rest is for formats of few digits.
        let above = most + 4.0 + most / 64.0;
        corrections.extend(
            experts
                .into_iter()
                .map(|expert| ((layer, usize::from(expert)), above)),
        );
    }
    Ok(corrections)
}

fn refuse_what_looks_at_tokens(steering: &Steering) -> Result<()> {
    let Steering {
        top_k: _,
        top_p,
        ranks,
        min_weight,
        min_experts,
        mask: _,
        force: _,
        mute,
        damp,
        bias,
        gain: _,
    } = steering;
    let share = "what the other picks gain by it depends on the token; a gain of 0 leaves an expert out without that";
    let rule = "the rule of a router is its architecture's; keep the flag";
    let refused = [
        ("top_p", top_p.is_some(), rule),
        ("ranks", ranks.is_some(), rule),
        ("min_weight", min_weight.is_some(), rule),
        ("min_experts", min_experts.is_some(), rule),
        ("mute", !mute.is_empty(), share),
        ("damp", !damp.is_empty(), share),
        (
            "bias",
            !bias.is_empty(),
            "it moves the logit that experts are ranked by and no weight: a bias in a router moves both, and a correction of the choice \
             (`e_score_correction_bias`) moves what the score function has made of the logit",
        ),
    ];
    match refused.into_iter().find(|(_, is_said, _)| *is_said) {
        None => Ok(()),
        Some((rule, _, problem)) => Err(ReshapeError::NotBaked {
            rule,
            problem: problem.to_owned(),
        }),
    }
}

/// Masked experts by layer.
fn masked(shape: &ModelShape, mask: &Experts) -> Result<BTreeMap<usize, Vec<u16>>> {
    let mut masked: BTreeMap<usize, Vec<u16>> = BTreeMap::new();
    for (layers, experts) in mask.iter() {
        for (layer, of) in meant("mask", shape, layers)? {
            for expert in experts {
                check("mask", layer, of, *expert)?;
                masked.entry(layer).or_default().push(*expert);
            }
        }
    }
    Ok(masked)
}

/// The plan that drops what is masked.
fn kept(shape: &ModelShape, mask: &Experts) -> Result<Plan> {
    let dropped = masked(shape, mask)?;
    let experts = shape.layers.iter().map(|(layer, of)| {
        let gone = dropped.get(layer).map_or(&[][..], Vec::as_slice);
        let stay = (0..*of as u16).filter(|expert| !gone.contains(expert));
        stay.map(PlanExpert::kept).collect()
    });
    Ok(Plan::of(shape, "steer", experts))
}

/// The layers that an entry of `rule` is about, and how many experts each has.
fn meant(rule: &'static str, shape: &ModelShape, at: Layers) -> Result<Vec<(usize, usize)>> {
    let Layers::Range(first, last) = at else {
        return Ok(shape.layers.clone());
    };
    let of = |layer: usize| shape.layers.iter().find(|(known, _)| *known == layer);
    let found = (first..=last).map(|layer| {
        of(layer).copied().ok_or_else(|| {
            let known: Vec<String> = shape.layers.iter().map(|(l, _)| l.to_string()).collect();
            ReshapeError::NotBaked {
                rule,
                problem: format!(
                    "layer {layer} has no experts; layers with experts: {}",
                    known.join(", ")
                ),
            }
        })
    });
    found.collect()
}

fn check(rule: &'static str, layer: usize, of: usize, expert: u16) -> Result<()> {
    match usize::from(expert) < of {
        true => Ok(()),
        false => Err(ReshapeError::NotBaked {
            rule,
            problem: format!("layer {layer} has no expert {expert} with weights: it has {of}"),
        }),
    }
}

/// Factors on what experts give, by layer and expert of the source.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Gains(BTreeMap<(usize, usize), f32>);

impl Gains {
    fn of(shape: &ModelShape, steering: &Steering) -> Result<Self> {
        let mut gains = Self::default();
        for (layers, numbers) in steering.gain.iter() {
            for (layer, of) in meant("gain", shape, layers)? {
                for (expert, gain) in numbers {
                    check("gain", layer, of, *expert)?;
                    let problem = match gain.is_finite() {
                        false => format!("{gain} is not a finite number"),
                        true => match gains.0.insert((layer, usize::from(*expert)), *gain) {
                            None => continue,
                            Some(_) => format!("expert {expert} of layer {layer} has two numbers"),
                        },
                    };
                    let rule = "gain";
                    return Err(ReshapeError::NotBaked { rule, problem });
                }
            }
        }
        gains.0.retain(|_, gain| *gain != 1.0);
        Ok(gains)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn has(&self, layer: usize, expert: usize) -> bool {
        self.0.contains_key(&(layer, expert))
    }

    /// The same by the places that experts get.
    pub(crate) fn of_places<'e>(
        &self,
        layers: impl Iterator<Item = (usize, &'e Vec<NewExpert>)>,
    ) -> Scaled {
        let mut places = BTreeMap::new();
        for (layer, experts) in layers {
            for (at, expert) in experts.iter().enumerate() {
                if let NewExpert::Mixed(id) = expert
                    && let Some(gain) = self.0.get(&(layer, *id))
                {
                    places.insert((layer, at), (*id as u16, *gain));
                }
            }
        }
        Scaled(places)
    }
}

/// A line for each, by which an unfinished output is known.
impl fmt::Display for Gains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((layer, expert), gain) in &self.0 {
            writeln!(f, "gain {layer}:{expert}={gain}")?;
        }
        Ok(())
    }
}

/// Makes experts that are those of the source but for their last matrix.
#[derive(Debug)]
pub(crate) struct Scaled(BTreeMap<(usize, usize), (u16, f32)>);

impl Mixer for Scaled {
    fn mix(
        &self,
        source: &Checkpoint,
        layer: usize,
        at: usize,
        part: &str,
    ) -> Result<Vec<f32>, CheckpointError> {
        let Some((expert, gain)) = self.0.get(&(layer, at)) else {
            return Err(CheckpointError::experts(
                source.origin(),
                format!("nothing is said of entry {at} of layer {layer}"),
            ));
        };
        let mut values = tensor(source, &name(layer, *expert, part))?;
        if !self.keeps(layer, at, part) {
            values.iter_mut().for_each(|value| *value *= gain);
        }
        Ok(values)
    }

    fn keeps(&self, _layer: usize, _at: usize, part: &str) -> bool {
        !part.starts_with("down_proj")
    }
}
