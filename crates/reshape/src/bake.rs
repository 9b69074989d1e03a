//! Baking: a steering written into a checkpoint, so that the model is steered wherever it is loaded.
//!
//! A masked expert is left out, with its row of the router: results are those of minus infinity in its place. A gain
//! multiplies what an expert gives to the stream, the matrix `down_proj` and its bias; 0 silences it. The rest of what steering can do
//! looks at each token, and no checkpoint has a place for it: that is refused by name.

use std::collections::BTreeMap;
use std::fmt;

use cadre_checkpoint::{Checkpoint, CheckpointError, Conversion, Mixer, NewExpert};
use cadre_routing::Steering;
use cadre_routing::plan::{ModelShape, PLAN_VERSION, Plan, PlanExpert, PlanLayer, PlannedModel};
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
    let gains = Gains::of(&shape, steering)?;
    let conversion = apply_with(source, &plan, &gains, options)?;
    Ok(Baked { plan, conversion })
}

fn refuse_what_looks_at_tokens(steering: &Steering) -> Result<()> {
    let Steering {
        top_k,
        top_p,
        ranks,
        min_weight,
        min_experts,
        mask: _,
        force,
        mute,
        damp,
        bias,
        gain: _,
    } = steering;
    let share = "what the other picks gain by it depends on the token; a gain of 0 leaves an expert out without that";
    let number =
        "the number of picks is a key of the configuration; edit it there, or keep the flag";
    let rule = "the rule of a router is its architecture's; keep the flag";
    let refused = [
        ("top_k", top_k.is_some(), number),
        ("top_p", top_p.is_some(), rule),
        ("ranks", ranks.is_some(), rule),
        ("min_weight", min_weight.is_some(), rule),
        ("min_experts", min_experts.is_some(), rule),
        (
            "force",
            !force.is_empty(),
            "no weight of a router makes it pick an expert always and weigh it as before",
        ),
        ("mute", !mute.is_empty(), share),
        ("damp", !damp.is_empty(), share),
        (
            "bias",
            !bias.is_empty(),
            "it moves the ranking and no weight, and a bias in a router would move both",
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

/// The plan that drops what is masked.
fn kept(shape: &ModelShape, mask: &Experts) -> Result<Plan> {
    let mut dropped: BTreeMap<usize, Vec<u16>> = BTreeMap::new();
    for (layers, experts) in mask.iter() {
        for (layer, of) in meant("mask", shape, layers)? {
            for expert in experts {
                check("mask", layer, of, *expert)?;
                dropped.entry(layer).or_default().push(*expert);
            }
        }
    }
    let layers = shape.layers.iter().map(|(layer, of)| {
        let gone = dropped.get(layer).map_or(&[][..], Vec::as_slice);
        let stay = (0..*of as u16).filter(|expert| !gone.contains(expert));
        PlanLayer {
            layer: *layer,
            of: *of,
            keep_rows: false,
            experts: stay.map(PlanExpert::kept).collect(),
        }
    });
    Ok(Plan {
        version: PLAN_VERSION,
        model: PlannedModel {
            digest: shape.digest.clone(),
            architecture: shape.architecture.clone(),
        },
        method: "steer".to_owned(),
        options: BTreeMap::new(),
        factor: None,
        layers: layers.collect(),
    })
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
