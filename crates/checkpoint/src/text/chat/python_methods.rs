//! What templates expect of Python's strings and Jinja's filters, where minijinja lacks it or differs.

use minijinja::value::{Kwargs, from_args};
use minijinja::{Error, State, Value};

/// For `Environment::set_unknown_method_callback`.
///
/// # Errors
/// The method is not known or refuses its arguments.
pub(crate) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, method, args)?
    {
        return Ok(result);
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" => {
            let (mark,): (&str,) = from_args(args)?;
            let (before, after) = text.split_once(mark).unwrap_or((text, ""));
            let found = if text.contains(mark) { mark } else { "" };
            list(&[before, found, after])
        }
        "rpartition" => {
            let (mark,): (&str,) = from_args(args)?;
            let (before, after) = text.rsplit_once(mark).unwrap_or(("", text));
            let found = if text.contains(mark) { mark } else { "" };
            list(&[before, found, after])
        }
        "rsplit" => {
            let (mark, most): (Option<&str>, Option<usize>) = from_args(args)?;
            let most = most.map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<&str> = match mark {
                Some(mark) => text.rsplitn(most, mark).collect(),
                None if most == usize::MAX => text.split_whitespace().rev().collect(),
                None => return Ok(None),
            };
            parts.reverse();
            list(&parts)
        }
        _ => return Ok(None),
    }))
}

/// Jinja's filter `indent`, which keeps a line end at the end of the text.
///
/// # Errors
/// An argument is not known.
pub(crate) fn indent(text: &str, width: Option<Value>, options: Kwargs) -> Result<String, Error> {
    let width = match width {
        Some(width) => Some(width),
        None => options.get("width")?,
    };
    let margin = match width {
        Some(width) => match width.as_str() {
            Some(margin) => margin.to_owned(),
            None => " ".repeat(usize::try_from(width)?.min(1000)),
        },
        None => " ".repeat(4),
    };
    let first: Option<bool> = options.get("first")?;
    let blank: Option<bool> = options.get("blank")?;
    options.assert_all_used()?;
    let mut indented = String::new();
    for (i, line) in text.split('\n').enumerate() {
        let inner = i > 0 && (blank == Some(true) || !line.is_empty());
        if i > 0 {
            indented.push('\n');
        }
        if inner || (i == 0 && first == Some(true)) {
            indented += &margin;
        }
        indented += line;
    }
    Ok(indented)
}

fn list(parts: &[&str]) -> Value {
    parts.iter().map(|part| Value::from(*part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str, method: &str, args: &[Value]) -> String {
        string_method(text, method, args)
            .unwrap()
            .unwrap()
            .to_string()
    }

    #[test]
    fn indent_keeps_line_ends_and_blank_lines() {
        let run = |text: &str, width: Option<Value>, pairs: &[(&'static str, bool)]| {
            let options: Kwargs = pairs
                .iter()
                .map(|(name, on)| (*name, Value::from(*on)))
                .collect();
            indent(text, width, options).unwrap()
        };
        assert_eq!(run("{\n", None, &[("first", true)]), "    {\n");
        assert_eq!(run("a\n\nb", Some(2.into()), &[]), "a\n\n  b");
        assert_eq!(
            run("a\n\nb", Some("> ".into()), &[("blank", true)]),
            "a\n> \n> b"
        );
    }

    #[test]
    fn as_in_python() {
        let dash = Value::from("-");
        assert_eq!(
            run("a-b-c", "rsplit", &[dash.clone(), 1.into()]),
            "['a-b', 'c']"
        );
        assert_eq!(
            run("a-b-c", "rsplit", std::slice::from_ref(&dash)),
            "['a', 'b', 'c']"
        );
        assert_eq!(run(" a  b ", "rsplit", &[]), "['a', 'b']");
        assert_eq!(
            run("a-b-c", "partition", std::slice::from_ref(&dash)),
            "['a', '-', 'b-c']"
        );
        assert_eq!(
            run("abc", "rpartition", std::slice::from_ref(&dash)),
            "['', '', 'abc']"
        );
        assert_eq!(
            run("--a", "removeprefix", std::slice::from_ref(&dash)),
            "-a"
        );
        assert_eq!(
            run("a--", "removesuffix", std::slice::from_ref(&dash)),
            "a-"
        );
        assert!(string_method("a", "nothing", &[]).unwrap().is_none());
    }
}
