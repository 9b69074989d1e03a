//! Data files: JSON lines with a domain, or plain text.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::failure::Failure;

/// One text and where it belongs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Document {
    /// For example `code`.
    #[serde(default = "unnamed")]
    pub(crate) domain: String,
    /// The text.
    pub(crate) text: String,
}

/// The domain of what names none.
pub(crate) fn unnamed() -> String {
    "all".to_owned()
}

/// Reads `path`: with the extension `jsonl` one `{"domain": .., "text": ..}` a line, else one
/// plain-text document whose domain is the file's stem. Empty lines and documents are left out.
pub(crate) fn read(path: &Path) -> Result<Vec<Document>> {
    let shown = path.display();
    let text = read_text(path)?;
    let documents = if path
        .extension()
        .is_some_and(|extension| extension == "jsonl")
    {
        parse_lines(path, &text, DOCUMENT)?
    } else {
        let stem = path
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned());
        vec![Document {
            domain: stem.unwrap_or_else(unnamed),
            text,
        }]
    };
    let documents: Vec<_> = documents
        .into_iter()
        .filter(|one| !one.text.is_empty())
        .collect();
    if documents.is_empty() {
        return Err(Failure::new(format!("{shown} holds no text")).into());
    }
    Ok(documents)
}

const DOCUMENT: &str = r#"each line is one document: {"domain": "code", "text": "..."}"#;

/// Reads a file of JSON lines; `hint` says what each of them is. Empty lines are left out.
pub(crate) fn read_lines<T: DeserializeOwned>(path: &Path, hint: &str) -> Result<Vec<T>> {
    let lines = parse_lines(path, &read_text(path)?, hint)?;
    match lines.is_empty() {
        false => Ok(lines),
        true => Err(Failure::new(format!("{} is empty", path.display()))
            .hint(hint)
            .into()),
    }
}

fn read_text(path: &Path) -> Result<String> {
    let shown = path.display();
    let text = std::fs::read(path).with_context(|| format!("cannot read the data file {shown}"))?;
    let text = String::from_utf8(text)
        .map_err(|error| Failure::new(format!("{shown} is not UTF-8 text: {error}")))?;
    Ok(text)
}

fn parse_lines<T: DeserializeOwned>(path: &Path, text: &str, hint: &str) -> Result<Vec<T>> {
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let parse = |(at, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| {
            let message = format!("{}:{}: {error}", path.display(), at + 1);
            Failure::new(message).hint(hint).into()
        })
    };
    lines.map(parse).collect()
}

/// Documents per domain, for messages.
pub(crate) fn summary(documents: &[Document]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for document in documents {
        *counts.entry(&document.domain).or_default() += 1;
    }
    let counts: Vec<_> = counts
        .iter()
        .map(|(domain, n)| format!("{domain} {n}"))
        .collect();
    counts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_carry_domains_and_errors_carry_line_numbers() {
        let text = "{\"domain\":\"code\",\"text\":\"x = 1\"}\n\n{\"text\":\"y\"}\n";
        let documents: Vec<Document> = parse_lines(Path::new("d.jsonl"), text, "").unwrap();
        assert_eq!(
            documents[0],
            Document {
                domain: "code".into(),
                text: "x = 1".into()
            }
        );
        assert_eq!(documents[1].domain, "all");
        assert_eq!(summary(&documents), "all 1, code 1");
        let lines = "{\"text\":\"y\"}\n{}";
        let error = parse_lines::<Document>(Path::new("d.jsonl"), lines, "").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("d.jsonl:2: missing field `text`"),
            "{error}"
        );
    }

    #[test]
    fn plain_text_takes_its_domain_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("german.txt");
        std::fs::write(&path, "Es war einmal").unwrap();
        assert_eq!(read(&path).unwrap()[0].domain, "german");
        std::fs::write(&path, "").unwrap();
        assert!(
            read(&path)
                .unwrap_err()
                .to_string()
                .contains("holds no text")
        );
        assert!(read(Path::new("no.jsonl")).is_err());
    }
}
