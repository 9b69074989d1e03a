//! `cadre.plan`: a steering by the name that the server was started with, or one that the request brings, and how strong.

use cadre_engine::Steering;
use serde_json::Value;

use super::error::{ApiError, Result};
use super::experts::{parsed, try_on};
use super::fields::{Fields, wrong};
use crate::served::Served;

/// The field.
const NAME: &str = "cadre.plan";
/// Strengths beyond this are mistakes.
const MOST: f64 = 1000.0;

/// What it says; nothing where it is absent.
pub(super) fn read(value: Option<Value>, served: &Served) -> Result<Steering> {
    let mut fields = match value {
        None | Some(Value::Null) => return Ok(Steering::default()),
        Some(Value::String(name)) => return named(&name, served),
        Some(value @ Value::Object(_)) => Fields::of(NAME, value)?,
        Some(other) => return Err(wrong(NAME, "a name or an object", &other)),
    };
    let plan = match (fields.text("name")?, fields.take("steer")) {
        (Some(name), None) => named(&name, served)?,
        (None, Some(Value::Object(steering))) => parsed("cadre.plan.steer", steering)?,
        (None, Some(other)) => return Err(wrong("cadre.plan.steer", "an object", &other)),
        (Some(_), Some(_)) | (None, None) => {
            let problem = "needs either `name`, a plan of this server, or `steer`, a steering";
            return Err(ApiError::field(NAME, problem));
        }
    };
    let scale = fields.number("scale", 0.0..=MOST)?.unwrap_or(1.0);
    fields.finish(&[])?;
    let plan = plan
        .scaled(scale)
        .map_err(|error| ApiError::bad(error.to_string()).param("cadre.plan.scale"))?;
    let all = served.model.info().steering.clone().and(&plan);
    try_on(&all, &*served.model).map_err(|error| ApiError::bad(error.to_string()).param(NAME))?;
    Ok(plan)
}

fn named(name: &str, served: &Served) -> Result<Steering> {
    let found = served.plans.iter().find(|(known, _)| known == name);
    found.map(|(_, plan)| plan.clone()).ok_or_else(|| {
        let shown: String = name.chars().take(100).collect();
        let known: Vec<&str> = served.plans.iter().map(|(name, _)| name.as_str()).collect();
        let problem = match known.is_empty() {
            true => format!("names `{shown}`, but this server was started without plans"),
            false => format!(
                "names `{shown}`, which this server does not have; it has `{}`",
                known.join("`, `")
            ),
        };
        ApiError::field(NAME, problem).code("plan_not_found")
    })
}
