//! Plans as files: JSON that people can read, edit and compare line by line.

use std::fmt::Write;
use std::path::Path;

use cadre_routing::plan::Plan;
use serde_json::json;

use crate::error::{ReshapeError, Result};

/// Reads a plan file. Whether it fits a model is checked when it is used, see [`Plan::check`].
///
/// # Errors
/// A file that cannot be read, is no JSON, or has keys that are missing or not known.
pub fn read_plan(path: &Path) -> Result<Plan> {
    let text = std::fs::read_to_string(path).map_err(|source| ReshapeError::Io {
        path: path.to_owned(),
        source,
    })?;
    parse_plan(&path.display().to_string(), &text)
}

/// Reads the text of a plan; `name` stands for its file in errors.
///
/// # Errors
/// As [`read_plan`].
pub fn parse_plan(name: &str, text: &str) -> Result<Plan> {
    serde_json::from_str(text).map_err(|error| ReshapeError::NotAPlan {
        file: name.to_owned(),
        problem: error.to_string(),
    })
}

/// The text of a plan file: one expert a line.
#[must_use]
pub fn plan_json(plan: &Plan) -> String {
    let mut text = String::from("{\n");
    // Writing to a String cannot fail.
    let _ = writeln!(text, "  \"version\": {},", plan.version);
    let model = json!({"digest": plan.model.digest, "architecture": plan.model.architecture});
    let _ = writeln!(text, "  \"model\": {model},");
    let _ = writeln!(text, "  \"method\": {},", json!(plan.method));
    if !plan.options.is_empty() {
        let _ = writeln!(text, "  \"options\": {},", json!(plan.options));
    }
    if let Some(factor) = plan.factor {
        let _ = writeln!(
            text,
            "  \"factor\": {},",
            serde_json::to_string(&factor).unwrap_or_default()
        );
    }
    text += "  \"layers\": [";
    for (at, layer) in plan.layers.iter().enumerate() {
        let comma = if at > 0 { "," } else { "" };
        let (no, of) = (layer.layer, layer.of);
        let rows = if layer.keep_rows {
            "\"keep_rows\": true, "
        } else {
            ""
        };
        let _ = write!(
            text,
            "{comma}\n    {{\"layer\": {no}, \"of\": {of}, {rows}\"experts\": ["
        );
        for (at, expert) in layer.experts.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            // Numbers and flags; floats in as few digits as read back the same.
            let expert = serde_json::to_string(expert).unwrap_or_default();
            let _ = write!(text, "{comma}\n      {expert}");
        }
        text += "\n    ]}";
    }
    text += "\n  ]\n}\n";
    text
}

#[cfg(test)]
mod tests {
    use cadre_routing::plan::{PlanExpert, PlanLayer, PlannedModel};

    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_is_one_expert_a_line() {
        let merged = PlanExpert {
            from: vec![1, 3],
            weights: vec![0.75, 0.1],
            align: true,
            ties: None,
            format: None,
        };
        let layer = |layer, experts| PlanLayer {
            layer,
            of: 4,
            keep_rows: layer == 2,
            experts,
        };
        let plan = Plan {
            version: 1,
            model: PlannedModel {
                digest: "d".to_owned(),
                architecture: "qwen3_moe".to_owned(),
            },
            method: "m-smoe".to_owned(),
            options: [("keep".to_owned(), "0.5".to_owned())].into(),
            factor: None,
            layers: vec![
                layer(0, vec![PlanExpert::kept(2), merged]),
                layer(2, vec![PlanExpert::kept(0)]),
            ],
        };
        let text = plan_json(&plan);
        assert_eq!(parse_plan("p.json", &text).unwrap(), plan);
        assert!(text.contains("\n      {\"from\":[2]},\n"), "{text}");
        assert!(text.contains("{\"from\":[1,3],\"weights\":[0.75,0.1],\"align\":true}\n"));
        let empty = Plan {
            layers: vec![layer(0, Vec::new())],
            ..plan
        };
        assert_eq!(parse_plan("p.json", &plan_json(&empty)).unwrap(), empty);
    }

    #[test]
    fn what_is_no_plan_is_named_with_its_place() {
        let error = parse_plan("p.json", "{\n  \"version\": 1,\n  \"keep\": 2\n}").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("p.json") && text.contains("`keep`") && text.contains("line 3"),
            "{text}"
        );
        assert!(read_plan(Path::new("no.json")).is_err());
    }
}
