//! Writing a model whose experts have formats of their own: a GGUF file, in which a layer of unlike experts has a tensor for
//! each of them.

use std::collections::BTreeMap;

use cadre_checkpoint::{
    Checkpoint, Conversion, ConvertOptions, ConvertTo, Dtype, QuantizeOptions, TargetDtype,
};
use cadre_routing::plan::{Plan, PlanError};

use crate::apply::Applying;
use crate::error::{ReshapeError, Result};

/// Plans to write `source` with the formats of `plan`, which fits it.
pub(crate) fn apply<'a>(
    source: &'a Checkpoint,
    plan: &Plan,
    options: Applying,
) -> Result<Conversion<'a>> {
    if !matches!(options.target, ConvertTo::Gguf { .. }) {
        return Err(ReshapeError::Option {
            name: "the output",
            problem: "is a folder, which holds no block formats: give it a name in .gguf"
                .to_owned(),
        });
    }
    let mut experts = BTreeMap::new();
    for layer in &plan.layers {
        let mut seen = None;
        for (at, expert) in layer.experts.iter().enumerate() {
            let refuse = |problem: String| PlanError::Expert {
                layer: layer.layer,
                at,
                problem,
            };
            if options.pad && seen.is_some_and(|format| format != &expert.format) {
                let problem = "has another format than the experts before it, which no other program reads; plan with \
                               `--unit layer` for them";
                return Err(refuse(problem.to_owned()).into());
            }
            seen = Some(&expert.format);
            let Some(name) = &expert.format else {
                continue;
            };
            let known = |format: &Dtype| format.can_encode() && format.gguf_id().is_some();
            let Some(format) = Dtype::from_name(name).filter(known) else {
                let names: Vec<String> = Dtype::all()
                    .filter(known)
                    .map(|format| format.name().to_lowercase())
                    .collect();
                let problem = format!(
                    "has the format `{name}`, which is not written; known: {}",
                    names.join(", ")
                );
                return Err(refuse(problem).into());
            };
            experts.insert((layer.layer, at), format);
        }
    }
    let origin = std::path::Path::new(source.origin());
    let name = origin.file_stem().unwrap_or_default().to_string_lossy();
    let options = ConvertOptions {
        target: options.target,
        dtype: TargetDtype::Keep,
        allow_differences: false,
        quantize: QuantizeOptions {
            experts,
            ..QuantizeOptions::default()
        },
    };
    Ok(Conversion::plan(source, &name, options)?)
}
