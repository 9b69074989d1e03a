//! `cadre.contrast`: answers that are pushed away from what weaker experts say (SCMoE). What a request leaves out is as
//! `--contrast` has it.

use std::sync::Arc;

use cadre_engine::{Contrast, Steering};
use serde_json::Value;

use super::error::{ApiError, Result};
use super::experts::try_on;
use super::fields::{Fields, whole, wrong};
use crate::served::Served;

/// The field.
pub(super) const NAME: &str = "cadre.contrast";
/// The paper's.
const BETA: f32 = 0.5;
const ALPHA: f32 = 0.1;
const RANK: usize = 2;
/// Far beyond what leaves anything of a text.
const MOST: f64 = 1000.0;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Asked {
    beta: f32,
    alpha: f32,
    /// Of the weaker experts, from 1.
    ranks: Vec<usize>,
}

impl Asked {
    /// Reads the field.
    pub(super) fn read(value: Option<Value>) -> Result<Option<Self>> {
        let Some(value) = value.filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        let mut fields = Fields::of(NAME, value)?;
        let asked = Self {
            beta: fields.number("beta", 0.0..=MOST)?.unwrap_or(BETA),
            alpha: fields.number("alpha", 0.0..=1.0)?.unwrap_or(ALPHA),
            ranks: ranks(&mut fields)?,
        };
        fields.finish(&[])?;
        Ok(Some(asked))
    }

    /// The contrast of `strong`, which has been checked, with the weaker experts.
    pub(super) fn with(self, strong: &Steering, served: &Served) -> Result<Arc<Contrast>> {
        let contrast = Contrast::with_ranks(strong.clone(), self.ranks, self.beta, self.alpha);
        let bad = |key: &str, error: &cadre_engine::EngineError| {
            let error = ApiError::bad(error.to_string()).param(&format!("{NAME}.{key}"));
            Err(error.code("invalid_value"))
        };
        // Beta has been checked.
        if let Err(error) = contrast.check() {
            return bad("alpha", &error);
        }
        match try_on(&contrast.weak, &*served.model) {
            Ok(()) => Ok(Arc::new(contrast)),
            Err(error) => bad("ranks", &error),
        }
    }
}

fn ranks(fields: &mut Fields) -> Result<Vec<usize>> {
    let path = fields.path("ranks");
    let bad = |value: &Value| wrong(&path, "a list of ranks, of which 1 is the best", value);
    match fields.take("ranks") {
        None => Ok(vec![RANK]),
        Some(Value::Array(items)) => {
            let rank = |item: &Value| {
                let rank = whole(item).and_then(|rank| usize::try_from(rank).ok());
                rank.ok_or_else(|| bad(item))
            };
            items.iter().map(rank).collect()
        }
        Some(other) => Err(bad(&other)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_left_out_is_as_on_the_command_line() {
        let read = |value: Value| Asked::read(Some(value)).unwrap().unwrap();
        let plain = read(json!({}));
        assert_eq!((plain.beta, plain.alpha), (0.5, 0.1));
        assert_eq!(plain.ranks, [2]);
        let asked = read(json!({"beta": 0.1, "ranks": [3, 4]}));
        assert_eq!((asked.beta, asked.alpha), (0.1, 0.1));
        assert_eq!(asked.ranks, [3, 4]);
        assert_eq!(Asked::read(Some(Value::Null)).unwrap(), None);
    }

    #[test]
    fn a_key_that_is_wrong_is_named() {
        for (value, param) in [
            (json!(0.5), "cadre.contrast"),
            (json!({"beta": "much"}), "cadre.contrast.beta"),
            (json!({"beta": -1}), "cadre.contrast.beta"),
            (json!({"alpha": 1.5}), "cadre.contrast.alpha"),
            (json!({"ranks": 2}), "cadre.contrast.ranks"),
            (json!({"ranks": [-2]}), "cadre.contrast.ranks"),
            (json!({"gamma": 1}), "cadre.contrast.gamma"),
        ] {
            let error = Asked::read(Some(value)).unwrap_err();
            assert_eq!(error.json()["error"]["param"], param);
        }
    }
}
