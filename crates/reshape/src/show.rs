//! A plan as a picture for a terminal: which experts of every layer stay, go, or are merged.

use std::collections::BTreeSet;
use std::fmt::Write;

use cadre_routing::plan::{Plan, PlanLayer};
use serde::Serialize;

/// Experts that are drawn in one line.
const MAX_WIDTH: usize = 128;

/// A layer of a plan in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerSummary {
    /// Decoder layer.
    pub layer: usize,
    /// Experts before.
    pub of: usize,
    /// Experts of the output.
    pub kept: usize,
    /// Experts of the output that are made of several.
    pub merged: usize,
    /// Experts that nothing is made of.
    pub dropped: Vec<u16>,
}

/// Every layer in numbers.
#[must_use]
pub fn summary(plan: &Plan) -> Vec<LayerSummary> {
    let of = |layer: &PlanLayer| LayerSummary {
        layer: layer.layer,
        of: layer.of,
        kept: layer.experts.len(),
        merged: layer
            .experts
            .iter()
            .filter(|one| one.from.len() > 1)
            .count(),
        dropped: layer.dropped(),
    };
    plan.layers.iter().map(of).collect()
}

/// The plan for people: what made it, then a line for every layer, `#` for an expert that stays, `+` for one that others
/// are merged into, `-` for one that is merged into another, `.` for one that goes.
#[must_use]
pub fn text(plan: &Plan) -> String {
    let mut text = String::new();
    let digest = &plan.model.digest;
    let digest = digest.get(..12).unwrap_or(digest);
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{} for {} {digest}: {} of {} experts stay",
        plan.method,
        plan.model.architecture,
        plan.n_kept(),
        plan.n_before()
    );
    for (name, value) in &plan.options {
        let _ = writeln!(text, "{name:10} {value}");
    }
    let names = formats(plan);
    let named = names.iter().zip('a'..='z');
    let legend: String = named
        .map(|(name, letter)| format!("  {letter} as {name}"))
        .collect();
    let _ = writeln!(
        text,
        "\nlayer  stay    of   # stays{legend}{}{}",
        if names.is_empty() { "  . goes" } else { "" },
        if plan.merges() {
            "  + is merged with others  - is merged into another"
        } else {
            ""
        }
    );
    if let Some(factor) = plan.factor {
        let _ = writeln!(
            text,
            "matrices of experts are products of rank {} and {} of the rows of the rest",
            factor.rank, factor.rest
        );
    }
    if plan.layers.iter().any(|layer| layer.keep_rows) {
        text += "routers keep the rows of all experts\n";
    }
    for layer in &plan.layers {
        let marks = marks(layer, &names);
        let (no, kept, of) = (layer.layer, layer.experts.len(), layer.of);
        let mut lines = marks.chunks(MAX_WIDTH);
        let first: String = lines.next().unwrap_or(&[]).iter().collect();
        let _ = writeln!(text, "{no:5} {kept:5} {of:5}   {first}");
        for line in lines {
            let line: String = line.iter().collect();
            let _ = writeln!(text, "{:20}{line}", "");
        }
    }
    text
}

/// The formats that a plan gives, by name.
fn formats(plan: &Plan) -> Vec<&str> {
    let all = plan.layers.iter().flat_map(|layer| &layer.experts);
    let names: BTreeSet<&str> = all.filter_map(|one| one.format.as_deref()).collect();
    names.into_iter().collect()
}

fn marks(layer: &PlanLayer, names: &[&str]) -> Vec<char> {
    let mut marks = vec!['.'; layer.of];
    for expert in &layer.experts {
        for (at, id) in expert.from.iter().enumerate() {
            let format = expert.format.as_deref();
            let named = names.iter().zip('a'..='z');
            let letter = named.clone().find(|(name, _)| Some(**name) == format);
            let mark = match (at, expert.from.len()) {
                (0, 1) if letter.is_some() => letter.map_or('#', |(_, letter)| letter),
                (0, 1) => '#',
                (0, _) => '+',
                _ => '-',
            };
            if let Some(slot) = marks.get_mut(usize::from(*id)) {
                *slot = mark;
            }
        }
    }
    marks
}

#[cfg(test)]
mod tests {
    use cadre_routing::plan::{PlanExpert, PlannedModel};

    use super::*;

    #[test]
    fn every_expert_has_its_mark() {
        let layer = PlanLayer {
            layer: 3,
            of: 6,
            keep_rows: false,
            experts: vec![
                PlanExpert::kept(4),
                PlanExpert {
                    from: vec![1, 5],
                    ..PlanExpert::default()
                },
            ],
        };
        let plan = Plan {
            version: 1,
            model: PlannedModel {
                digest: "0123456789abcdef".to_owned(),
                architecture: "olmoe".to_owned(),
            },
            method: "m-smoe".to_owned(),
            options: [("keep".to_owned(), "0.34".to_owned())].into(),
            factor: None,
            layers: vec![layer],
        };
        let shown = text(&plan);
        assert!(shown.starts_with("m-smoe for olmoe 0123456789ab: 2 of 6 experts stay\n"));
        assert!(shown.contains("    3     2     6   .+..#-\n"), "{shown}");
        let summary = summary(&plan);
        assert_eq!((summary[0].kept, summary[0].merged), (2, 1));
        assert_eq!(summary[0].dropped, [0, 2, 3]);
        let format = |id: u16, name: &str| PlanExpert {
            format: Some(name.to_owned()),
            ..PlanExpert::kept(id)
        };
        let mut formats = plan;
        formats.layers[0].of = 3;
        formats.layers[0].experts = vec![format(0, "q8_0"), PlanExpert::kept(1), format(2, "q4_0")];
        let shown = text(&formats);
        assert!(shown.contains("# stays  a as q4_0  b as q8_0\n"), "{shown}");
        assert!(shown.contains("    3     3     3   b#a\n"), "{shown}");
    }
}
