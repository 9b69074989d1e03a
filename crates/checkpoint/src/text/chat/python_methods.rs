//! Methods of Python's strings that templates call and minijinja-contrib lacks.

use minijinja::value::from_args;
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
