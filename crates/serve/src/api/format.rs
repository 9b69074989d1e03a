//! `response_format`: the form that an answer is held to.

use serde_json::Value;

use super::error::{ApiError, Result};
use super::fields::Fields;
use crate::grammar::any_object;
use crate::schedule::{Constraint, Job};
use crate::served::Served;

const NAME: &str = "response_format";

/// The schema that answers are held to, if there is one; `call` is that of a call that has to be made.
pub(crate) fn read(fields: &mut Fields, call: Option<Value>) -> Result<Option<Value>> {
    let Some(mut format) = fields.object(NAME)? else {
        return Ok(call);
    };
    let schema = match format.text("type")?.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(any_object()),
        Some("json_schema") => {
            let Some(mut named) = format.object("json_schema")? else {
                return Err(ApiError::field("response_format.json_schema", "is missing"));
            };
            named.text("name")?;
            named.text("description")?;
            // Answers are always held to the schema.
            named.bool("strict")?;
            let schema = named.need("schema")?;
            named.finish(&[])?;
            Some(schema)
        }
        _ => {
            let problem = "is none of text, json_object, json_schema";
            return Err(ApiError::field("response_format.type", problem));
        }
    };
    format.finish(&[])?;
    if schema.is_some() && call.is_some() {
        let problem = "cannot be held to by an answer that has to call a tool";
        return Err(ApiError::field(NAME, problem));
    }
    Ok(schema.or(call))
}

/// Holds answers to `schema`, if there is one.
pub(crate) fn hold(jobs: &mut [Job], schema: Option<&Value>, served: &Served) -> Result<()> {
    if let Some(schema) = schema {
        for job in jobs {
            job.constraint = Some(constraint(schema, served)?);
        }
    }
    Ok(())
}

fn constraint(schema: &Value, served: &Served) -> Result<Box<dyn Constraint>> {
    let held = served.grammars.json(schema.clone(), &served.tokenizer);
    let held = held.map_err(|problem| {
        let shown: String = problem.chars().take(300).collect();
        let problem = format!("has a schema that answers cannot be held to: {shown}");
        ApiError::field(NAME, problem).code("invalid_json_schema")
    })?;
    Ok(Box::new(held))
}
