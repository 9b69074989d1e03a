//! `tojson` as transformers defines it: Python's `json.dumps`, without HTML escapes.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// The `tojson` filter. Arguments as in Python: `ensure_ascii` (false here), `indent`,
/// `separators`, `sort_keys`.
///
/// # Errors
/// The value holds something that JSON has no word for.
pub(crate) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        }),
    };
    let separators = options.get::<Option<Value>>("separators")?;
    let separators = separators.filter(|separators| !separators.is_none());
    let (comma, colon) = match separators {
        Some(pair) => (
            pair.get_item_by_index(0)?.to_string(),
            pair.get_item_by_index(1)?.to_string(),
        ),
        // With an indent each comma ends a line, so Python leaves its space away.
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let mut writer = Writer {
        text: String::new(),
        comma,
        colon,
        indent,
        ensure_ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(writer.text)
}

struct Writer {
    text: String,
    comma: String,
    colon: String,
    indent: Option<String>,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// Deeper data is refused; the parsers in front of this one stop at 128 already.
const MAX_DEPTH: usize = 256;

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(refuse("the data is nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self
                .text
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.text.push_str(&value.to_string()),
            ValueKind::Number => self
                .text
                .push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items('[', &items, ']', depth, |writer, item| {
                    writer.value(item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.items('{', &keys, '}', depth, |writer, key| {
                    writer.key(key)?;
                    writer.text.push_str(&writer.colon.clone());
                    writer.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            other => return Err(refuse(&format!("a value of type {other} is not JSON"))),
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        items: &[Value],
        close: char,
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.text.push_str(&self.comma.clone());
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            self.text.push_str(&indent.repeat(depth));
        }
    }

    /// Python spells keys that are no strings as JSON would, inside quotes.
    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.text.push('"');
                self.value(key, 0)?;
                self.text.push('"');
            }
            other => return Err(refuse(&format!("a key of type {other} is not JSON"))),
        }
        Ok(())
    }

    fn string(&mut self, string: &str) {
        self.text.push('"');
        for c in string.chars() {
            match c {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !matches!(c, ' '..='~')) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.text.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

fn refuse(problem: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {problem}"))
}

/// `repr` of a float: the shortest digits that give it back, as a decimal from 1e-4 up to 1e16.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = x.to_string();
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;

    use super::*;

    fn dumps(json: &str, options: &[(&str, Value)]) -> String {
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        let options: Kwargs = options.iter().map(|(k, v)| (*k, v.clone())).collect();
        tojson(&Value::from(Serde(&value)), options).unwrap()
    }

    #[test]
    fn spelled_as_python_does() {
        let text = r#"{"b": [1, 2.0, 1e16, 0.00001, true, null], "a": "<\u00fc\u007f\u0001\n>"}"#;
        assert_eq!(
            dumps(text, &[]),
            "{\"b\": [1, 2.0, 1e+16, 1e-05, true, null], \"a\": \"<\u{fc}\u{7f}\\u0001\\n>\"}"
        );
        assert_eq!(
            dumps(
                r#"{"b": [], "a": {"c": 1}}"#,
                &[("indent", 2.into()), ("sort_keys", true.into())]
            ),
            "{\n  \"a\": {\n    \"c\": 1\n  },\n  \"b\": []\n}"
        );
        assert_eq!(
            dumps(r#""\ud83d\ude00""#, &[("ensure_ascii", true.into())]),
            "\"\\ud83d\\ude00\""
        );
        let separators = Value::from(Serde([",", ":"]));
        assert_eq!(
            dumps(r#"{"a": [1, 2]}"#, &[("separators", separators)]),
            "{\"a\":[1,2]}"
        );
    }

    #[test]
    fn floats_are_those_of_repr() {
        for (x, text) in [
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (123_456_789.0, "123456789.0"),
            (9_999_999_999_999_998.0, "9999999999999998.0"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn what_is_not_json_is_named() {
        let error = tojson(
            &Value::UNDEFINED,
            Kwargs::from_iter([] as [(&str, Value); 0]),
        )
        .unwrap_err();
        assert!(error.to_string().contains("undefined"), "{error}");
    }
}
