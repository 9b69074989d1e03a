//! What is to become of a model's experts: the plan that is made from a trace, edited by hand, and applied.
//!
//! Here are the types and what must hold of them; making, reading and applying plans is the work of crate `reshape`. A
//! plan lists, for every layer with experts, the experts of the output in their order. Each names the experts that it is
//! made of: one that is kept, or several that are merged. What is named nowhere is dropped.

mod error;
mod shape;

pub use error::PlanError;
pub use shape::{Groups, ModelShape};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The version of plans that is written and read.
pub const PLAN_VERSION: u32 = 1;

/// A plan for one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// [`PLAN_VERSION`].
    pub version: u32,
    /// The model that it was made for.
    pub model: PlannedModel,
    /// What made it, such as `reap`; informative.
    pub method: String,
    /// With which options; informative.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
    /// How the matrices of all experts of the output are compressed; absent: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<PlanFactor>,
    /// The layers that have experts, ascending.
    pub layers: Vec<PlanLayer>,
}

/// Every matrix becomes a product of two thin ones plus some of the rows of what the product misses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFactor {
    /// Width of the products.
    pub rank: usize,
    /// The part of the rows that is kept of what the products miss, from 0 to 1.
    pub rest: f32,
}

/// Which model a plan is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedModel {
    /// Digest of the checkpoint.
    pub digest: String,
    /// Its `model_type`; informative.
    pub architecture: String,
}

/// What becomes of the experts of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanLayer {
    /// Decoder layer, dense ones counted.
    pub layer: usize,
    /// Experts that it has, null ones not counted.
    pub of: usize,
    /// Whether the router keeps the rows of all experts: each then stands for the expert of the output that its own is a
    /// part of, and none may be left out. Otherwise every expert of the output has the row of the first that it is made of.
    #[serde(default, skip_serializing_if = "is_false")]
    pub keep_rows: bool,
    /// Those that it is to have, in their new order.
    pub experts: Vec<PlanExpert>,
}

/// One expert of the output.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanExpert {
    /// What it is made of. The row of the router, and where neurons are aligned their order, are those of the first.
    pub from: Vec<u16>,
    /// How much each counts in a merge; they are divided by their sum. Empty: all the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f32>,
    /// Whether the neurons of the others are brought into the order of the first before they are averaged.
    #[serde(default, skip_serializing_if = "is_false")]
    pub align: bool,
    /// Whether experts are merged by TIES instead of averaged: of each one's differences to their mean this part of the
    /// values, the largest, is kept, and where these disagree about the sign the weaker side is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ties: Option<f32>,
    /// The number format that its matrices are to have, such as `q4_0`; absent: as they are stored. Where any expert has
    /// one, all experts stay in their places: formats are a plan of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl PlanExpert {
    /// An expert that is kept as it is.
    #[must_use]
    pub fn kept(expert: u16) -> Self {
        Self {
            from: vec![expert],
            ..Self::default()
        }
    }

    /// The share of each of [`PlanExpert::from`] in a merge; they sum to 1.
    #[must_use]
    pub fn shares(&self) -> Vec<f32> {
        if self.weights.is_empty() {
            return vec![1.0 / self.from.len() as f32; self.from.len()];
        }
        let sum: f64 = self.weights.iter().map(|w| f64::from(*w)).sum();
        let share = |weight: &f32| (f64::from(*weight) / sum) as f32;
        self.weights.iter().map(share).collect()
    }
}

impl Plan {
    /// A plan for the model of this `shape`, with these experts in its layers, which keep no rows but theirs.
    #[must_use]
    pub fn of(
        shape: &ModelShape,
        method: &str,
        experts: impl IntoIterator<Item = Vec<PlanExpert>>,
    ) -> Self {
        let layers = shape.layers.iter().zip(experts);
        let layers = layers.map(|((layer, of), experts)| PlanLayer {
            layer: *layer,
            of: *of,
            keep_rows: false,
            experts,
        });
        Self {
            version: PLAN_VERSION,
            model: PlannedModel {
                digest: shape.digest.clone(),
                architecture: shape.architecture.clone(),
            },
            method: method.to_owned(),
            options: BTreeMap::new(),
            factor: None,
            layers: layers.collect(),
        }
    }

    /// Checks that the plan is one for the model of this `shape`, and that the model can be left with what it lists.
    ///
    /// # Errors
    /// Another version or model; a layer that is missing, repeated or without experts in the model; an expert that does
    /// not exist or is named twice; an entry made of nothing; weights that cannot be averaged with; fewer experts than a
    /// token is sent to, or groups of different sizes.
    pub fn check(&self, shape: &ModelShape) -> Result<(), PlanError> {
        if self.version != PLAN_VERSION {
            return Err(PlanError::Version {
                found: self.version,
            });
        }
        if self.model.digest != shape.digest {
            let name =
                |kind: &str, digest: &str| format!("{kind} {}", digest.get(..12).unwrap_or(digest));
            return Err(PlanError::OtherModel {
                planned: name(&self.model.architecture, &self.model.digest),
                found: name(&shape.architecture, &shape.digest),
            });
        }
        if let Some(PlanFactor { rank, rest }) = self.factor
            && (rank == 0 || !(0.0..=1.0).contains(&rest) || self.has_formats())
        {
            let problem = format!(
                "is factored with rank {rank} and a rest of {rest}: expected a rank from 1, a rest from 0 to 1, and no formats"
            );
            let layer = self.layers.first().map_or(0, |layer| layer.layer);
            return Err(PlanError::Layer { layer, problem });
        }
        let mut wanted = shape.layers.iter();
        for layer in &self.layers {
            let no = layer.layer;
            let problem = match wanted.next() {
                Some((known, of)) if *known == no && *of == layer.of => {
                    layer.check(shape)?;
                    if self.has_formats() {
                        layer.check_places()?;
                    }
                    continue;
                }
                Some((known, of)) if *known == no => {
                    format!("is said to have {} experts, but it has {of}", layer.of)
                }
                Some((known, _)) => format!(
                    "comes where layer {known} was expected: layers with experts are listed once each, ascending"
                ),
                None => "comes after the last layer with experts, or twice".to_owned(),
            };
            return Err(PlanError::Layer { layer: no, problem });
        }
        if shape.same_picks
            && let Some(first) = self.layers.first()
            && let Some(other) = self
                .layers
                .iter()
                .find(|layer| !layer.keep_rows && !layer.has_experts_of(first))
        {
            let problem = format!(
                "keeps other experts than layer {}, but one router picks the same experts in all layers; list the same in each",
                first.layer
            );
            return Err(PlanError::Layer {
                layer: other.layer,
                problem,
            });
        }
        match wanted.next() {
            None => Ok(()),
            Some((layer, of)) => Err(PlanError::Layer {
                layer: *layer,
                problem: format!(
                    "is missing; to leave it as it is, list its {of} experts one by one"
                ),
            }),
        }
    }

    /// Whether nothing changes: every expert is kept in its place.
    #[must_use]
    pub fn is_identity(&self) -> bool {
        self.factor.is_none()
            && !self.has_formats()
            && self.layers.iter().all(|layer| {
                let mut entries = layer.experts.iter().enumerate();
                layer.experts.len() == layer.of && entries.all(|(at, one)| one.from == [at as u16])
            })
    }

    /// Whether any expert is given a number format.
    #[must_use]
    pub fn has_formats(&self) -> bool {
        let mut all = self.layers.iter().flat_map(|layer| &layer.experts);
        all.any(|expert| expert.format.is_some())
    }

    /// Experts of the output, all layers together.
    #[must_use]
    pub fn n_kept(&self) -> usize {
        self.layers.iter().map(|layer| layer.experts.len()).sum()
    }

    /// Experts before, all layers together.
    #[must_use]
    pub fn n_before(&self) -> usize {
        self.layers.iter().map(|layer| layer.of).sum()
    }

    /// Whether any expert is merged of several.
    #[must_use]
    pub fn merges(&self) -> bool {
        let mut all = self.layers.iter().flat_map(|layer| &layer.experts);
        all.any(|expert| expert.from.len() > 1)
    }
}

impl PlanLayer {
    /// Whether its experts are made of those of `other`, in the same order.
    fn has_experts_of(&self, other: &Self) -> bool {
        let of = |layer: &Self| {
            layer
                .experts
                .iter()
                .map(|expert| expert.from.clone())
                .collect::<Vec<_>>()
        };
        of(self) == of(other)
    }

    /// For every expert the entry that it is a part of; `None` for those that go.
    #[must_use]
    pub fn entries(&self) -> Vec<Option<usize>> {
        let mut entries = vec![None; self.of];
        for (at, expert) in self.experts.iter().enumerate() {
            for id in &expert.from {
                if let Some(entry) = entries.get_mut(usize::from(*id)) {
                    *entry = Some(at);
                }
            }
        }
        entries
    }

    /// The experts that no entry is made of, ascending.
    #[must_use]
    pub fn dropped(&self) -> Vec<u16> {
        let mut used = vec![false; self.of];
        for expert in self.experts.iter().flat_map(|one| &one.from) {
            if let Some(used) = used.get_mut(usize::from(*expert)) {
                *used = true;
            }
        }
        let ids = used.iter().enumerate().filter(|(_, used)| !**used);
        ids.map(|(id, _)| id as u16).collect()
    }

    fn check(&self, shape: &ModelShape) -> Result<(), PlanError> {
        let mut owner: Vec<Option<usize>> = vec![None; self.of];
        for (at, expert) in self.experts.iter().enumerate() {
            self.check_expert(at, expert, &mut owner)?;
        }
        let refuse = |problem: String| {
            Err(PlanError::Layer {
                layer: self.layer,
                problem,
            })
        };
        let (n, n_null) = (self.experts.len(), shape.n_null);
        if n == 0 {
            return refuse(format!(
                "drops all experts; list at least {}",
                shape.least().max(1)
            ));
        }
        if self.keep_rows {
            // As many can be picked as before.
            return match owner.iter().position(Option::is_none) {
                None => Ok(()),
                Some(id) => refuse(format!(
                    "keeps the rows of all experts, but expert {id} is in no entry; without `keep_rows` it goes"
                )),
            };
        }
        let top_k = shape.top_k;
        if n + n_null < top_k {
            return refuse(format!(
                "keeps {n} of {} experts, but a token is sent to {top_k}; list at least {}",
                self.of,
                top_k - n_null
            ));
        }
        self.check_groups(shape)
    }

    /// Every expert must be there, in its place.
    fn check_places(&self) -> Result<(), PlanError> {
        let mut entries = self.experts.iter().enumerate();
        let moved = entries.position(|(at, one)| one.from != [at as u16]);
        if moved.is_none() && self.experts.len() == self.of {
            return Ok(());
        }
        Err(PlanError::Expert {
            layer: self.layer,
            at: moved.unwrap_or(self.experts.len()),
            problem: "formats are given to experts that all stay in their places; apply one plan that drops, moves or \
                      merges, and make one of formats for what comes of it"
                .to_owned(),
        })
    }

    fn check_expert(
        &self,
        at: usize,
        expert: &PlanExpert,
        owner: &mut [Option<usize>],
    ) -> Result<(), PlanError> {
        let refuse = |problem: String| {
            Err(PlanError::Expert {
                layer: self.layer,
                at,
                problem,
            })
        };
        if expert.from.is_empty() {
            return refuse(
                "is made of no expert; name one in `from`, or take the entry out".to_owned(),
            );
        }
        for id in &expert.from {
            match owner.get_mut(usize::from(*id)) {
                None => {
                    let last = self.of.saturating_sub(1);
                    return refuse(format!(
                        "there is no expert {id} of {}; they are 0 to {last}",
                        self.of
                    ));
                }
                Some(Some(other)) => {
                    return refuse(format!(
                        "expert {id} is in entry {other} already; take it out of one of the two"
                    ));
                }
                Some(free) => *free = Some(at),
            }
        }
        let weights = &expert.weights;
        if !weights.is_empty() && weights.len() != expert.from.len() {
            return refuse(format!(
                "has {} weights for {} experts",
                weights.len(),
                expert.from.len()
            ));
        }
        if let Some(bad) = weights.iter().find(|w| !(w.is_finite() && **w >= 0.0)) {
            return refuse(format!("has the weight {bad}, expected a number from 0"));
        }
        if !weights.is_empty() && weights.iter().sum::<f32>() <= 0.0 {
            return refuse("has weights that are all 0".to_owned());
        }
        if let Some(part) = expert.ties.filter(|part| !(*part > 0.0 && *part <= 1.0)) {
            return refuse(format!(
                "has `ties` {part}, expected a part above 0 and up to 1"
            ));
        }
        Ok(())
    }

    /// Every group must keep the same number of its own experts, in the place of the group.
    fn check_groups(&self, shape: &ModelShape) -> Result<(), PlanError> {
        let Groups { n, keep, least } = shape.groups;
        if n <= 1 && least <= 1 {
            return Ok(());
        }
        let refuse = |problem: String| {
            Err(PlanError::Layer {
                layer: self.layer,
                problem,
            })
        };
        let n_kept = self.experts.len();
        if n == 0 || !n_kept.is_multiple_of(n) || !self.of.is_multiple_of(n) {
            return refuse(format!(
                "keeps {n_kept} experts, which the {n} groups of this model cannot share equally"
            ));
        }
        let (each, before) = (n_kept / n, self.of / n);
        if each < least || keep * each < shape.top_k {
            return refuse(format!(
                "keeps {each} experts in each of {n} groups, but a token is sent to {} of {keep} groups, and a group \
                 needs at least {least}",
                shape.top_k
            ));
        }
        for (at, expert) in self.experts.iter().enumerate() {
            let group = at / each;
            let stray = expert
                .from
                .iter()
                .find(|id| usize::from(**id) / before != group);
            if let Some(id) = stray {
                return Err(PlanError::Expert {
                    layer: self.layer,
                    at,
                    problem: format!(
                        "expert {id} is of group {}, but this is the place of group {group}",
                        usize::from(*id) / before
                    ),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> ModelShape {
        ModelShape {
            digest: "0123456789abcdef".to_owned(),
            architecture: "qwen3_moe".to_owned(),
            layers: vec![(1, 4), (3, 4)],
            top_k: 2,
            n_null: 0,
            groups: Groups::NONE,
            same_picks: false,
        }
    }

    fn plan(layers: &[&[&[u16]]]) -> Plan {
        let layers = layers.iter().zip([1, 3, 5]).map(|(experts, layer)| {
            let experts = experts.iter().map(|from| PlanExpert {
                from: from.to_vec(),
                ..PlanExpert::default()
            });
            PlanLayer {
                layer,
                of: 4,
                keep_rows: false,
                experts: experts.collect(),
            }
        });
        Plan {
            version: PLAN_VERSION,
            model: PlannedModel {
                digest: "0123456789abcdef".to_owned(),
                architecture: "qwen3_moe".to_owned(),
            },
            method: "by hand".to_owned(),
            options: BTreeMap::new(),
            factor: None,
            layers: layers.collect(),
        }
    }

    #[track_caller]
    fn refused(plan: &Plan, shape: &ModelShape, words: &str) {
        let text = plan.check(shape).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }

    const ALL: &[&[u16]] = &[&[0], &[1], &[2], &[3]];

    #[test]
    fn plans_of_the_model_pass() {
        let all = plan(&[ALL, ALL]);
        assert_eq!(all.check(&shape()), Ok(()));
        assert!(all.is_identity() && !all.merges());
        let half = plan(&[&[&[3], &[0]], &[&[1, 2], &[0]]]);
        assert_eq!(half.check(&shape()), Ok(()));
        assert!(!half.is_identity() && half.merges());
        assert_eq!((half.n_kept(), half.n_before()), (4, 8));
        assert_eq!(half.layers[0].dropped(), [1, 2]);
        assert_eq!(half.layers[1].dropped(), [3]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let mut other = plan(&[ALL, ALL]);
        other.model.digest = "f".repeat(64);
        refused(&other, &shape(), "another model: qwen3_moe ffffffffffff");
        other.version = 2;
        refused(&other, &shape(), "version 2, expected 1");
        refused(&plan(&[ALL]), &shape(), "layer 3: is missing");
        refused(&plan(&[ALL, ALL, ALL]), &shape(), "layer 5: comes after");
        let mut swapped = plan(&[ALL, ALL]);
        swapped.layers.swap(0, 1);
        refused(
            &swapped,
            &shape(),
            "layer 3: comes where layer 1 was expected",
        );
        let mut wrong = plan(&[ALL, ALL]);
        wrong.layers[1].of = 5;
        refused(&wrong, &shape(), "layer 3: is said to have 5 experts");
        let first = |experts: &[&[u16]]| plan(&[experts, ALL]);
        refused(&first(&[]), &shape(), "layer 1: drops all experts");
        refused(&first(&[&[2]]), &shape(), "keeps 1 of 4 experts");
        refused(
            &first(&[&[1], &[2], &[1]]),
            &shape(),
            "layer 1, entry 2: expert 1 is in entry 0 already",
        );
        refused(
            &first(&[&[1], &[4]]),
            &shape(),
            "entry 1: there is no expert 4 of 4",
        );
        refused(&first(&[&[1], &[]]), &shape(), "entry 1: is made of no");
    }

    #[test]
    fn weights_must_be_such_that_one_can_average() {
        let mut merged = plan(&[&[&[0, 1], &[2]], ALL]);
        for (weights, words) in [
            (vec![1.0], "1 weights for 2 experts"),
            (vec![1.0, -1.0], "the weight -1"),
            (vec![f32::NAN, 1.0], "the weight NaN"),
            (vec![0.0, 0.0], "all 0"),
        ] {
            merged.layers[0].experts[0].weights = weights;
            refused(&merged, &shape(), words);
        }
        merged.layers[0].experts[0].weights = vec![3.0, 1.0];
        assert_eq!(merged.check(&shape()), Ok(()));
        assert_eq!(merged.layers[0].experts[0].shares(), [0.75, 0.25]);
        assert_eq!(merged.layers[0].experts[1].shares(), [1.0]);
    }

    #[test]
    fn factors_are_checked() {
        let with = |rank, rest| Plan {
            factor: Some(PlanFactor { rank, rest }),
            ..plan(&[ALL, ALL])
        };
        assert_eq!(with(4, 0.1).check(&shape()), Ok(()));
        assert!(!with(4, 0.1).is_identity());
        refused(&with(0, 0.1), &shape(), "rank 0");
        refused(&with(4, 1.5), &shape(), "a rest of 1.5");
    }

    #[test]
    fn rows_that_stay_need_an_expert_each() {
        let mut rows = plan(&[&[&[0, 1, 2, 3]], ALL]);
        refused(&rows, &shape(), "keeps 1 of 4 experts");
        rows.layers[0].keep_rows = true;
        assert_eq!(rows.check(&shape()), Ok(()));
        assert_eq!(rows.layers[0].entries(), [Some(0); 4]);
        rows.layers[0].experts[0].from.pop();
        refused(
            &rows,
            &shape(),
            "layer 1: keeps the rows of all experts, but expert 3",
        );
        let mut ties = plan(&[&[&[0, 1], &[2, 3]], ALL]);
        ties.layers[0].experts[1].ties = Some(1.5);
        refused(&ties, &shape(), "entry 1: has `ties` 1.5");
    }

    #[test]
    fn formats_are_a_plan_of_their_own() {
        let mut formats = plan(&[ALL, ALL]);
        formats.layers[1].experts[2].format = Some("q4_0".to_owned());
        assert_eq!(formats.check(&shape()), Ok(()));
        assert!(formats.has_formats() && !formats.is_identity());
        let mut cut = plan(&[&[&[0], &[1], &[2]], ALL]);
        cut.layers[0].experts[0].format = Some("q4_0".to_owned());
        refused(&cut, &shape(), "layer 1, entry 3: formats are given");
        let mut moved = plan(&[ALL, &[&[1], &[0], &[2], &[3]]]);
        moved.layers[0].experts[0].format = Some("q4_0".to_owned());
        refused(&moved, &shape(), "layer 3, entry 0: formats are given");
    }

    #[test]
    fn groups_keep_their_places_and_sizes() {
        let grouped = ModelShape {
            groups: Groups {
                n: 2,
                keep: 1,
                least: 1,
            },
            top_k: 1,
            ..shape()
        };
        let one = |experts: &[&[u16]]| plan(&[experts, ALL]);
        assert_eq!(one(&[&[1], &[2]]).check(&grouped), Ok(()));
        refused(&one(&[&[2], &[1]]), &grouped, "expert 2 is of group 1");
        refused(&one(&[&[0], &[1], &[2]]), &grouped, "cannot share equally");
        refused(&one(&[&[0], &[1, 2]]), &grouped, "expert 1 is of group 0");
        let needs_two = ModelShape {
            groups: Groups {
                least: 2,
                ..grouped.groups
            },
            ..grouped
        };
        refused(&one(&[&[0], &[2]]), &needs_two, "at least 2");
        assert_eq!((needs_two.least(), shape().least()), (4, 2));
    }

    #[test]
    fn one_router_for_all_layers_keeps_the_same_experts_in_all() {
        let shape = ModelShape {
            same_picks: true,
            ..shape()
        };
        let same: &[&[u16]] = &[&[0], &[3]];
        plan(&[same, same]).check(&shape).unwrap();
        refused(
            &plan(&[same, &[&[0], &[2]]]),
            &shape,
            "keeps other experts than layer 1",
        );
    }

    #[test]
    fn unknown_keys_are_refused_and_short_forms_are_read() {
        let text = r#"{"version":1,"model":{"digest":"d","architecture":"a"},"method":"m",
            "layers":[{"layer":0,"of":2,"experts":[{"from":[1]}]}]}"#;
        let plan: Plan = serde_json::from_str(text).unwrap();
        assert_eq!(plan.layers[0].experts[0], PlanExpert::kept(1));
        for (known, unknown) in [
            (r#""from":[1]"#, r#""from":[1],"bits":4"#),
            (r#""of":2"#, r#""of":2,"keep":1"#),
            (r#""method":"m""#, r#""method":"m","steer":{}"#),
        ] {
            let edited = text.replace(known, unknown);
            assert!(
                serde_json::from_str::<Plan>(&edited)
                    .unwrap_err()
                    .to_string()
                    .contains("unknown field")
            );
        }
    }
}
