//! Steering: what a person changes about the choice of experts while a model runs, per layer and expert.
//!
//! A [`Steering`] is plain data that names layers and experts, in JSON or in the short form of flags ([`by_layer`]).
//! [`Steering::prepare`] checks it against a model's policies and makes a [`Steered`] of it, which routes tokens. For one
//! token and layer the order is this:
//!
//! 1. **mask**: the expert's logit is minus infinity, so that it has no part in any softmax: as if the router had no row
//!    for it.
//! 2. **bias** is added to the logit that experts are ranked by, and to no other: the weight of an expert that is picked
//!    comes from its own logit. Where scores are sigmoids with a correction (DeepSeek-V3), the sigmoid is taken of the
//!    logit with the bias, and then corrected.
//! 3. Experts are ranked as the policy ranks them: by that logit or score, the lower id first among equals; where groups
//!    of experts compete, a group is judged by those left of it, and those of losing groups come last.
//! 4. The first of the ranking are picked: as many as the policy takes, or `top_k`, or as few as have more than `top_p` of
//!    the token's total score, or those at the given `ranks`.
//! 5. **force**: an expert that is not among them takes the place of the lowest ranked pick that is not forced, or a place
//!    of its own while there are fewer than the token may get. Forcing what is picked anyway changes nothing.
//! 6. Weights are what the policy's rule makes of the picks.
//! 7. `min_weight` leaves out picks, and the rule weighs those that stay.
//! 8. **mute** leaves out picks, and the others are scaled to the sum that there was; nothing takes their place. **damp** does
//!    so in part: it takes that part of a pick's weight, and all are scaled to the sum that there was; 1 is mute.
//!    **gain** multiplies weights; 0 leaves the pick out. With all of its picks left out a token gets what shared experts
//!    give it, and no more.
//!
//! Off without refilling and forcing are those of Mixture of Tunable Experts (Dahlke et al., 2025, arXiv 2502.11096), ranks
//! those of self-contrast (Shi et al., 2024, arXiv 2405.14507), `top_p` is dynamic routing (Huang et al., 2024, arXiv
//! 2403.07652) on a model that was not trained for it.

pub mod by_layer;
mod error;
mod row;
mod scale;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use by_layer::{Experts, Layers, Numbers};
pub use error::SteerError;
pub use row::{SteerScratch, SteeredLayer};

use crate::Policy;
use crate::stages::Reach;
use row::Rules;

/// What is changed about the choice of experts; by default nothing. The module's description says what each part does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Steering {
    /// Picks per token, in place of the policy's number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// The fewest experts that have more than this of the token's total score, 0 to 1; never more than `top_k`, or what the
    /// policy takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Picks at these ranks, in place of the first ones; 1 is the best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<Vec<usize>>,
    /// Leaves out picks whose weight is below this part of the token's largest, 0 to 1; forced ones stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_weight: Option<f32>,
    /// So many of the best stay whatever their weight; 1 unless said, and nothing without `min_weight`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_experts: Option<usize>,
    /// Experts that are never picked.
    #[serde(skip_serializing_if = "Experts::is_empty")]
    pub mask: Experts,
    /// Experts that are always picked.
    #[serde(skip_serializing_if = "Experts::is_empty")]
    pub force: Experts,
    /// Experts that are left out when they are picked.
    #[serde(skip_serializing_if = "Experts::is_empty")]
    pub mute: Experts,
    /// What part of the weight of picks is taken away, 0 to 1; nothing to 1 as muting does it.
    #[serde(skip_serializing_if = "Numbers::is_empty")]
    pub damp: Numbers,
    /// What is added to the logits that experts are ranked by.
    #[serde(skip_serializing_if = "Numbers::is_empty")]
    pub bias: Numbers,
    /// Factors on the weights of picks.
    #[serde(skip_serializing_if = "Numbers::is_empty")]
    pub gain: Numbers,
}

/// A steering that fits a model: for each layer what is steered there.
#[derive(Clone, Debug, PartialEq)]
pub struct Steered {
    /// By layer of the model; `None` where its own routing stays.
    layers: Vec<Option<SteeredLayer>>,
}

impl Steered {
    /// How `layer` is steered, if it is.
    #[must_use]
    pub fn layer(&self, layer: usize) -> Option<&SteeredLayer> {
        self.layers.get(layer)?.as_ref()
    }
}

impl Steering {
    /// Whether nothing is changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self {
            top_k,
            top_p,
            ranks,
            min_weight,
            min_experts,
            mask,
            force,
            mute,
            damp,
            bias,
            gain,
        } = self;
        top_k.is_none()
            && top_p.is_none()
            && ranks.is_none()
            && min_weight.is_none()
            && min_experts.is_none()
            && [mask, force, mute].iter().all(|one| one.is_empty())
            && [damp, bias, gain].iter().all(|one| one.is_empty())
    }

    /// What this and `other` say together; a number of picks that `other` gives replaces this one's.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        self.top_k = other.top_k.or(self.top_k);
        self.top_p = other.top_p.or(self.top_p);
        self.ranks = other.ranks.clone().or(self.ranks);
        self.min_weight = other.min_weight.or(self.min_weight);
        self.min_experts = other.min_experts.or(self.min_experts);
        self.mask.extend(&other.mask);
        self.force.extend(&other.force);
        self.mute.extend(&other.mute);
        self.damp.extend(&other.damp);
        self.bias.extend(&other.bias);
        self.gain.extend(&other.gain);
        self
    }

    /// Checks this against a model, whose layers with experts are `layers`, ascending, and makes it ready for use; `None`
    /// when nothing is changed.
    ///
    /// # Errors
    /// A model without experts, a layer or an expert that is not there, rules that contradict each other, too few experts left, too many forced, or
    /// a number out of its range.
    pub fn prepare(&self, layers: &[(usize, &dyn Policy)]) -> Result<Option<Steered>, SteerError> {
        if self.is_empty() {
            return Ok(None);
        }
        if layers.is_empty() {
            return Err(SteerError::NoExperts);
        }
        self.check_numbers()?;
        let mut rules: Vec<LayerRules<'_>> = Vec::with_capacity(layers.len());
        for (layer, policy) in layers {
            rules.push((*layer, *policy, self.of_all(*layer, *policy)?));
        }
        self.gather_experts(&mut rules)?;
        self.gather_numbers(&mut rules)?;
        let n_layers = layers.last().map_or(0, |(layer, _)| layer + 1);
        let mut steered = vec![None; n_layers];
        for (layer, _, rules) in rules {
            steered[layer] = rules.ready(layer)?;
        }
        Ok(Some(Steered { layers: steered }))
    }

    fn gather_experts(&self, rules: &mut [LayerRules<'_>]) -> Result<(), SteerError> {
        type Set = fn(&mut Rules, usize);
        let all: [(&'static str, &Experts, Set); 3] = [
            ("mask", &self.mask, Rules::mask),
            ("force", &self.force, Rules::force),
            ("mute", &self.mute, Rules::mute),
        ];
        for (name, experts, set) in all {
            for (layers, experts) in experts.iter() {
                for one in about(name, layers, rules)? {
                    for expert in experts {
                        let at = known(name, one, *expert)?;
                        set(&mut one.2, at);
                    }
                }
            }
        }
        Ok(())
    }

    fn gather_numbers(&self, rules: &mut [LayerRules<'_>]) -> Result<(), SteerError> {
        type Set = fn(&mut Rules, usize, f32) -> bool;
        let all: [(&'static str, &Numbers, Set); 3] = [
            ("damp", &self.damp, Rules::damp),
            ("bias", &self.bias, Rules::bias),
            ("gain", &self.gain, Rules::gain),
        ];
        for (name, numbers, set) in all {
            for (layers, numbers) in numbers.iter() {
                for one in about(name, layers, rules)? {
                    for (expert, number) in numbers {
                        check_number(name, *number)?;
                        let at = known(name, one, *expert)?;
                        if !set(&mut one.2, at, *number) {
                            return Err(SteerError::Contradiction {
                                layer: one.0,
                                expert: *expert,
                                rules: [name, name],
                            });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The numbers that are the same in every layer.
    fn check_numbers(&self) -> Result<(), SteerError> {
        let bad = |option, value: String, expected: &str| {
            Err(SteerError::BadValue {
                option,
                value,
                expected: expected.to_owned(),
            })
        };
        for (option, value) in [("top_p", self.top_p), ("min_weight", self.min_weight)] {
            if let Some(value) = value.filter(|value| !(0.0..=1.0).contains(value)) {
                return bad(option, value.to_string(), "0 to 1");
            }
        }
        if let Some(ranks) = &self.ranks {
            let is_bad = |at: usize| ranks[at] == 0 || ranks[..at].contains(&ranks[at]);
            if ranks.is_empty() || (0..ranks.len()).any(is_bad) {
                return bad("ranks", format!("{ranks:?}"), "different ranks from 1");
            }
            if self.top_k.is_some() || self.top_p.is_some() {
                return bad(
                    "ranks",
                    format!("{ranks:?}"),
                    "neither top_k nor top_p beside it",
                );
            }
        }
        match (self.min_experts, self.min_weight) {
            (Some(n), None) => bad("min_experts", n.to_string(), "min_weight beside it"),
            (Some(0), _) => bad("min_experts", "0".to_owned(), "at least 1"),
            _ => Ok(()),
        }
    }

    /// The rules of a layer, as far as they are the same in every layer.
    fn of_all(&self, layer: usize, policy: &dyn Policy) -> Result<Rules, SteerError> {
        let Some(stages) = policy.stages() else {
            return Err(SteerError::Unsteerable {
                layer,
                policy: policy.name(),
            });
        };
        let n_experts = policy.n_experts();
        if let Some(top_k) = self.top_k
            && !(1..=n_experts).contains(&top_k)
        {
            return Err(SteerError::BadValue {
                option: "top_k",
                value: top_k.to_string(),
                expected: format!("1 to {n_experts}, the experts of layer {layer}"),
            });
        }
        let own = match stages.reach() {
            Reach::Fixed(k) => k,
            Reach::Mass(_) | Reach::Above(_) => n_experts,
        };
        let limit = self.top_k.unwrap_or(own);
        let reach = match (self.top_p, self.top_k, stages.reach()) {
            (Some(mass), _, _) => Reach::Mass(mass),
            (None, Some(k), Reach::Fixed(_)) => Reach::Fixed(k),
            (None, _, own) => own,
        };
        let is_changed = self.top_k.is_some()
            || self.top_p.is_some()
            || self.ranks.is_some()
            || self.min_weight.is_some();
        let ranks = self.ranks.clone().unwrap_or_default();
        let min_weight = self
            .min_weight
            .map(|share| (share, self.min_experts.unwrap_or(1)));
        Ok(Rules::new(
            n_experts,
            (reach, limit, ranks),
            min_weight,
            is_changed,
        ))
    }
}

/// A layer, its policy, and what is gathered for it.
type LayerRules<'p> = (usize, &'p dyn Policy, Rules);

/// The layers that an entry is about.
fn about<'r, 'p>(
    rule: &'static str,
    at: Layers,
    rules: &'r mut [LayerRules<'p>],
) -> Result<Vec<&'r mut LayerRules<'p>>, SteerError> {
    if let Layers::Range(first, last) = at {
        let has = |layer: usize| rules.binary_search_by_key(&layer, |one| one.0).is_ok();
        if let Some(layer) = (first..=last).find(|layer| !has(*layer)) {
            return Err(SteerError::UnknownLayer {
                rule,
                layer,
                known: rules.iter().map(|(layer, ..)| *layer).collect(),
            });
        }
    }
    let is_meant = |layer: usize| match at {
        Layers::All => true,
        Layers::Range(first, last) => (first..=last).contains(&layer),
    };
    Ok(rules.iter_mut().filter(|one| is_meant(one.0)).collect())
}

/// The expert as an index, if the layer has it.
fn known(
    rule: &'static str,
    (layer, policy, _): &LayerRules<'_>,
    expert: u16,
) -> Result<usize, SteerError> {
    let n_experts = policy.n_experts();
    if usize::from(expert) < n_experts {
        return Ok(usize::from(expert));
    }
    Err(SteerError::UnknownExpert {
        rule,
        layer: *layer,
        expert,
        n_experts,
    })
}

fn check_number(option: &'static str, number: f32) -> Result<(), SteerError> {
    let (is_good, expected) = match option {
        "damp" => ((0.0..=1.0).contains(&number), "0 to 1"),
        _ => (number.is_finite(), "a finite number"),
    };
    match is_good {
        true => Ok(()),
        false => Err(SteerError::BadValue {
            option,
            value: number.to_string(),
            expected: expected.to_owned(),
        }),
    }
}

/// `no`, or the rules as flags name them, as in `top-k-experts=4 mask-experts=3:5,7`.
impl fmt::Display for Steering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("no");
        }
        let mut rules = Vec::new();
        rules.extend(self.top_k.map(|k| format!("top-k-experts={k}")));
        rules.extend(self.top_p.map(|p| format!("top-p-experts={p}")));
        if let Some(ranks) = &self.ranks {
            let ranks: Vec<String> = ranks.iter().map(usize::to_string).collect();
            rules.push(format!("rank-experts={}", ranks.join(",")));
        }
        if let Some(share) = self.min_weight {
            let keep = self.min_experts.unwrap_or(1);
            rules.push(format!("min-expert-weight={share} min-experts={keep}"));
        }
        for (name, experts) in [
            ("mask", &self.mask),
            ("force", &self.force),
            ("mute", &self.mute),
        ] {
            if !experts.is_empty() {
                rules.push(format!("{name}-experts={experts}"));
            }
        }
        for (name, numbers) in [
            ("damp", &self.damp),
            ("bias", &self.bias),
            ("gain", &self.gain),
        ] {
            if !numbers.is_empty() {
                rules.push(format!("{name}-experts={numbers}"));
            }
        }
        f.write_str(&rules.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policies::{ExpertChoice, TopK};

    /// Layers 1 and 2 have 8 experts, of which a token gets two.
    fn prepare(steering: &Steering) -> Result<Option<Steered>, SteerError> {
        let policy = TopK::new(8, 2, true).unwrap();
        steering.prepare(&[(1, &policy), (2, &policy)])
    }

    fn refused(json: &str) -> String {
        let steering: Steering = serde_json::from_str(json).unwrap();
        prepare(&steering).unwrap_err().to_string()
    }

    #[test]
    fn nothing_is_nothing() {
        for json in [
            "{}",
            r#"{"mask":{}}"#,
            r#"{"bias":{"1":{}},"force":{"*":[]}}"#,
        ] {
            let steering: Steering = serde_json::from_str(json).unwrap();
            assert!(steering.is_empty());
            assert_eq!(prepare(&steering), Ok(None));
        }
        assert_eq!(Steering::default().to_string(), "no");
        assert_eq!(serde_json::to_string(&Steering::default()).unwrap(), "{}");
    }

    #[test]
    fn layers_that_nothing_is_said_of_stay_as_they_are() {
        let steering = Steering {
            mask: "2:3".parse().unwrap(),
            ..Steering::default()
        };
        let steered = prepare(&steering).unwrap().unwrap();
        assert!(steered.layer(0).is_none() && steered.layer(1).is_none());
        assert!(steered.layer(2).is_some() && steered.layer(3).is_none());
        let everywhere = Steering {
            top_k: Some(1),
            ..Steering::default()
        };
        let steered = prepare(&everywhere).unwrap().unwrap();
        assert!(steered.layer(1).is_some_and(|layer| layer.max_picks() == 1));
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        for (json, said) in [
            (
                r#"{"mask":{"0":[1]}}"#,
                "mask: layer 0 has no experts; layers with experts: 1-2",
            ),
            (
                r#"{"bias":{"1-3":{"1":1}}}"#,
                "bias: layer 3 has no experts",
            ),
            (
                r#"{"force":{"*":[8]}}"#,
                "force: layer 1 has no expert 8; its experts are 0 to 7",
            ),
            (
                r#"{"mask":{"2":[0,1,2,3,4,5,6]}}"#,
                "layer 2 keeps 1 experts",
            ),
            (
                r#"{"force":{"1":[0,1],"*":[2]}}"#,
                "3 experts are forced in layer 1",
            ),
            (
                r#"{"mask":{"*":[3]},"force":{"2":[3]}}"#,
                "expert 3 of layer 2 is under both mask and force",
            ),
            (
                r#"{"mute":{"*":[3]},"force":{"2":[3]}}"#,
                "both force and mute",
            ),
            (
                r#"{"bias":{"*":{"3":1},"2":{"3":2}}}"#,
                "bias: expert 3 of layer 2 has two numbers",
            ),
            (r#"{"damp":{"1":{"3":1.5}}}"#, "damp = 1.5: expected 0 to 1"),
            (r#"{"top_k":0}"#, "top_k = 0: expected 1 to 8"),
            (r#"{"top_k":9}"#, "top_k = 9"),
            (r#"{"top_p":1.5}"#, "top_p = 1.5: expected 0 to 1"),
            (r#"{"min_weight":-1}"#, "min_weight = -1"),
            (r#"{"min_experts":2}"#, "min_weight beside it"),
            (r#"{"min_experts":0,"min_weight":0.5}"#, "at least 1"),
            (r#"{"ranks":[]}"#, "different ranks from 1"),
            (r#"{"ranks":[0]}"#, "different ranks from 1"),
            (r#"{"ranks":[2,2]}"#, "different ranks from 1"),
            (
                r#"{"ranks":[9]}"#,
                "layer 1 keeps 8 experts, and a token is to get 9",
            ),
            (r#"{"ranks":[1],"top_k":1}"#, "neither top_k nor top_p"),
        ] {
            let text = refused(json);
            assert!(text.contains(said), "{json}: {text}");
        }
        for json in [r#"{"masks":{}}"#, r#"{"mask":[3]}"#, r#"{"top_k":-1}"#] {
            assert!(serde_json::from_str::<Steering>(json).is_err(), "{json}");
        }
        let choice = ExpertChoice::new(8, 1.0).unwrap();
        let steering: Steering = serde_json::from_str(r#"{"top_k":1}"#).unwrap();
        let error = steering.prepare(&[(0, &choice)]).unwrap_err().to_string();
        assert!(
            error.contains("`expert_choice` chooses for all tokens"),
            "{error}"
        );
        assert_eq!(steering.prepare(&[]), Err(SteerError::NoExperts));
        let steering = Steering {
            gain: "1:3=inf".parse().unwrap(),
            ..Steering::default()
        };
        let error = prepare(&steering).unwrap_err().to_string();
        assert_eq!(error, "gain = inf: expected a finite number");
    }

    #[test]
    fn two_say_what_both_say() {
        let one: Steering = serde_json::from_str(r#"{"top_k":1,"mask":{"1":[3]}}"#).unwrap();
        let other: Steering =
            serde_json::from_str(r#"{"top_k":2,"mask":{"1":[4,3]},"bias":{"2":{"0":1.5}}}"#)
                .unwrap();
        let both = one.and(&other);
        assert_eq!(
            both.to_string(),
            "top-k-experts=2 mask-experts=1:3,4 bias-experts=2:0=1.5"
        );
        let json = r#"{"top_k":2,"mask":{"1":[3,4]},"bias":{"2":{"0":1.5}}}"#;
        assert_eq!(serde_json::to_string(&both).unwrap(), json);
    }
}
