//! How a model on the hub is named: `org/name[@revision][:quant]`.

use std::fmt;

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HubRef {
    /// `org/name`.
    pub(crate) repo: String,
    /// Branch, tag or commit; `None` is the main branch.
    pub(crate) revision: Option<String>,
    /// Number format of a GGUF file, or its whole name.
    pub(crate) quant: Option<String>,
}

impl HubRef {
    /// Understands `org/name[@revision][:quant]`; `None` when the text cannot be one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (text, quant) = match text.split_once(':') {
            Some((text, quant)) => (text, Some(quant)),
            None => (text, None),
        };
        let (repo, revision) = match text.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (text, None),
        };
        let (org, name) = repo.split_once('/')?;
        let has_sense = is_name(org)
            && is_name(name)
            && revision.is_none_or(is_path)
            && quant.is_none_or(is_path);
        has_sense.then(|| Self {
            repo: repo.to_owned(),
            revision: revision.map(str::to_owned),
            quant: quant.map(str::to_owned),
        })
    }

    /// Branch, tag or commit.
    pub(crate) fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for HubRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        match &self.quant {
            Some(quant) => write!(f, ":{quant}"),
            None => Ok(()),
        }
    }
}

/// What the hub allows as a part of a repository's name. `--` is left to the cache, where it
/// separates the parts.
fn is_name(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edges = ['-', '.'];
    (1..=96).contains(&text.len())
        && text.chars().all(is_allowed)
        && !text.starts_with(edges)
        && !text.ends_with(edges)
        && !text.contains("--")
        && !text.contains("..")
}

/// A relative path of plain names, with `/` between them, that stays inside of its folder on every
/// system.
pub(crate) fn is_path(text: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && !part.contains(|c: char| c.is_control() || matches!(c, '\\' | ':'))
    };
    !text.is_empty() && text.split('/').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_three_parts() {
        let all = HubRef::parse("org/Name-1.5_b@refs/pr/2:Q4_K_M").unwrap();
        assert_eq!(all.repo, "org/Name-1.5_b");
        assert_eq!(all.revision(), "refs/pr/2");
        assert_eq!(all.quant.as_deref(), Some("Q4_K_M"));
        assert_eq!(all.to_string(), "org/Name-1.5_b@refs/pr/2:Q4_K_M");
        let plain = HubRef::parse("a/b").unwrap();
        assert_eq!((plain.revision(), plain.quant.as_deref()), ("main", None));
        let file = HubRef::parse("a/b:sub/m-Q8_0.gguf").unwrap();
        assert_eq!(file.quant.as_deref(), Some("sub/m-Q8_0.gguf"));
    }

    #[test]
    fn paths_and_nonsense_are_not_names() {
        for text in [
            "",
            "a",
            "/a/b",
            "a/b/c",
            "./a",
            "../a",
            "a/..",
            "a b/c",
            "a/b:",
            "a/b@",
            "a/b@..",
            "a--b/c",
            "C:\\models\\x",
            "a/b:..",
        ] {
            assert_eq!(HubRef::parse(text), None, "{text:?}");
        }
    }
}
