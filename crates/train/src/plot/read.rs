//! A run's log, read back.

use super::PlotError;
use crate::log::{EvalRecord, StepRecord, WarningRecord};
use serde_json::Value;
use std::path::Path;

/// What a log says, in the order of steps.
#[derive(Debug)]
pub(super) struct History {
    pub(super) name: String,
    /// At least one.
    pub(super) steps: Vec<StepRecord>,
    pub(super) evals: Vec<EvalRecord>,
    pub(super) warnings: Vec<WarningRecord>,
}

enum Record {
    Step(StepRecord),
    Eval(EvalRecord),
    Warning(WarningRecord),
}

/// Reads the log at `path`.
pub(super) fn history(name: &str, path: &Path) -> Result<History, PlotError> {
    let text = std::fs::read_to_string(path).map_err(|source| PlotError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mut history = History {
        name: name.to_owned(),
        steps: Vec::new(),
        evals: Vec::new(),
        warnings: Vec::new(),
    };
    // A run that is being written may end in half a line; every finished record ends its line.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for (i, line) in whole.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        match record(line) {
            Ok(Record::Step(step)) => history.steps.push(step),
            Ok(Record::Eval(eval)) => history.evals.push(eval),
            Ok(Record::Warning(warning)) => history.warnings.push(warning),
            Err(error) => {
                return Err(PlotError::Line {
                    path: path.to_owned(),
                    line: i + 1,
                    problem: error.to_string(),
                });
            }
        }
    }
    if history.steps.is_empty() {
        return Err(PlotError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(history)
}

fn record(line: &str) -> Result<Record, serde_json::Error> {
    let value: Value = serde_json::from_str(line)?;
    if value.get("eval").is_some() {
        serde_json::from_value(value).map(Record::Eval)
    } else if value.get("warning").is_some() {
        serde_json::from_value(value).map(Record::Warning)
    } else {
        serde_json::from_value(value).map(Record::Step)
    }
}
