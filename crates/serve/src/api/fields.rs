//! The fields of a request: each is read once with its type and range, and what nobody read is an error.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::{ApiError, Result};

/// A JSON object of a request. Null is as good as absent.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    fields: Map<String, Value>,
    /// Path of the object, with a dot at its end; empty for the request itself.
    path: String,
}

impl Fields {
    /// The object that is a request's body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self> {
        if body.is_empty() {
            return Err(ApiError::bad("the request has no body; send a JSON object"));
        }
        let text = std::str::from_utf8(body).map_err(|error| {
            let at = error.valid_up_to();
            ApiError::bad(format!(
                "the body is not UTF-8: byte {at} begins no character"
            ))
        })?;
        let value: Value = serde_json::from_str(text)
            .map_err(|error| ApiError::bad(format!("the body is not JSON: {error}")))?;
        match value {
            Value::Object(fields) => Ok(Self {
                fields,
                path: String::new(),
            }),
            other => {
                let found = kind(&other);
                Err(ApiError::bad(format!(
                    "the body is {found}, expected an object"
                )))
            }
        }
    }

    /// The object that `value` is; `name` is its path.
    pub(crate) fn of(name: &str, value: Value) -> Result<Self> {
        match value {
            Value::Object(fields) => Ok(Self {
                fields,
                path: format!("{name}."),
            }),
            other => Err(wrong(name, "an object", &other)),
        }
    }

    /// Path of one of the fields.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// Sets a field, for another name of it or to have it read again.
    pub(crate) fn put(&mut self, name: &str, value: Value) {
        self.fields.insert(name.to_owned(), value);
    }

    /// Any value.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    /// A value that must be there.
    pub(crate) fn need(&mut self, name: &str) -> Result<Value> {
        self.take(name).ok_or_else(|| {
            ApiError::field(&self.path(name), "is missing").code("missing_required_parameter")
        })
    }

    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(&self.path(name), "true or false", &other)),
        }
    }

    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(&self.path(name), "a string", &other)),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Self>> {
        let path = self.path(name);
        self.take(name)
            .map(|value| Self::of(&path, value))
            .transpose()
    }

    /// A number within `range`.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        let Some(number) = value.as_f64() else {
            return Err(wrong(&path, "a number", &value));
        };
        match range.contains(&number) {
            true => Ok(Some(number as f32)),
            false => {
                let (from, to) = range.into_inner();
                Err(out_of_range(&path, &value, &format!("{from} to {to}")))
            }
        }
    }

    /// A whole number within `range`. 1.0 is one, too: some languages know no other numbers.
    pub(crate) fn whole(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        let whole = whole(&value).ok_or_else(|| wrong(&path, "a whole number", &value))?;
        match range.contains(&whole) {
            true => Ok(Some(whole)),
            false => {
                let (from, to) = range.into_inner();
                Err(out_of_range(&path, &value, &format!("{from} to {to}")))
            }
        }
    }

    /// [`Fields::whole`] of what counts something.
    pub(crate) fn count(
        &mut self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>> {
        let (from, to) = range.into_inner();
        let clamped = |n| i64::try_from(n).unwrap_or(i64::MAX);
        let whole = self.whole(name, clamped(from)..=clamped(to))?;
        Ok(whole.and_then(|n| usize::try_from(n).ok()))
    }

    /// Refuses every field that is left, but those that change nothing here.
    pub(crate) fn finish(self, ignored: &[&str]) -> Result<()> {
        let left = self
            .fields
            .iter()
            .find(|(name, value)| !value.is_null() && !ignored.contains(&name.as_str()));
        match left {
            None => Ok(()),
            Some((name, _)) => {
                let path = format!("{}{name}", self.path);
                let shown: String = path.chars().take(100).collect();
                let message = format!("unrecognized request argument supplied: {shown}");
                Err(ApiError::bad(message)
                    .param(&shown)
                    .code("unknown_parameter"))
            }
        }
    }

    /// Refuses a field that is known and not supported.
    pub(crate) fn refuse(&mut self, name: &str, why: &str) -> Result<()> {
        match self.take(name) {
            None => Ok(()),
            Some(Value::Bool(false)) => Ok(()),
            Some(Value::Array(items)) if items.is_empty() => Ok(()),
            Some(_) => {
                let path = self.path(name);
                Err(ApiError::field(&path, format!("is not supported: {why}"))
                    .code("unsupported_parameter"))
            }
        }
    }
}

/// The whole number that a JSON number is.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    let exact = |number: &f64| number.fract() == 0.0 && number.abs() < 9e15;
    value
        .as_i64()
        .or_else(|| value.as_f64().filter(exact).map(|number| number as i64))
}

/// A value of the wrong type.
pub(crate) fn wrong(path: &str, expected: &str, found: &Value) -> ApiError {
    let found = kind(found);
    ApiError::field(path, format!("is {found}, expected {expected}")).code("invalid_type")
}

fn out_of_range(path: &str, value: &Value, range: &str) -> ApiError {
    ApiError::field(path, format!("is {value}, expected {range}")).code("invalid_value")
}

/// What a value is, for messages.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes()).unwrap()
    }

    fn message(error: ApiError) -> String {
        error.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn types_and_ranges_are_held() {
        let mut all =
            fields(r#"{"a": true, "b": 1.0, "c": 0.5, "d": "x", "e": null, "f": {"g": []}}"#);
        assert_eq!(all.bool("a").unwrap(), Some(true));
        assert_eq!(all.whole("b", 0..=3).unwrap(), Some(1));
        assert_eq!(all.number("c", 0.0..=1.0).unwrap(), Some(0.5));
        assert_eq!(all.text("d").unwrap().as_deref(), Some("x"));
        assert_eq!(all.bool("e").unwrap(), None);
        let error = all.object("f").unwrap().unwrap().bool("g").unwrap_err();
        assert_eq!(message(error), "`f.g` is an array, expected true or false");
        all.finish(&[]).unwrap();
        let mut all = fields(r#"{"a": 7, "b": 1.5, "c": -1, "d": 1e300}"#);
        let error = all.number("a", 0.0..=2.0).unwrap_err();
        assert_eq!(error.json()["error"]["param"], "a");
        assert_eq!(message(error), "`a` is 7, expected 0 to 2");
        assert!(all.count("b", 0..=9).is_err() && all.count("c", 0..=9).is_err());
        assert!(all.whole("d", i64::MIN..=i64::MAX).is_err());
    }

    #[test]
    fn what_nobody_read_is_named() {
        let error = fields(r#"{"user": "u", "gramar": "x"}"#)
            .finish(&["user"])
            .unwrap_err();
        assert_eq!(error.json()["error"]["param"], "gramar");
        assert_eq!(error.json()["error"]["code"], "unknown_parameter");
        let mut all = fields(r#"{"a": false, "b": [], "c": {}}"#);
        all.refuse("a", "").unwrap();
        all.refuse("b", "").unwrap();
        assert!(message(all.refuse("c", "it is a test").unwrap_err()).contains("it is a test"));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in [&b""[..], b"{", b"[]", b"\"\xff\"", b"nul", b"{} {}"] {
            assert_eq!(Fields::parse(body).unwrap_err().status().as_u16(), 400);
        }
        let deep = "[".repeat(100_000);
        assert!(Fields::parse(deep.as_bytes()).is_err());
    }
}
