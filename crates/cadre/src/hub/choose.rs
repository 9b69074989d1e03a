//! Which files of a repository make up the model that was asked for.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::reference::is_path;

/// The index of a checkpoint in several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// What a checkpoint folder may hold besides weights, as far as Cadre reads it or other tools that
/// open the same folder need it to see the same model.
const SMALL: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "profile.json",
];

/// Formats that are taken when only GGUF files are there and none is asked for, as llama.cpp does.
const USUAL: &[&str] = &["Q4_K_M", "Q8_0"];

/// GGUF files that go with a model and are none themselves.
const SIDECARS: &[&str] = &["mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-"];

/// The files to have.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// A folder with safetensors: the files besides the weights. The weights follow from them.
    Folder { small: Vec<String> },
    /// A GGUF file or the parts of one, in order. `silent` is false when Cadre picked the format.
    Gguf { parts: Vec<String>, silent: bool },
}

/// Chooses among the files of a repository.
///
/// # Errors
/// Text that says why not, and what is there.
pub(super) fn choose(files: &[String], quant: Option<&str>) -> Result<Choice, String> {
    let models = gguf_models(files);
    if let Some(quant) = quant {
        return pick(&models, quant).map(|parts| Choice::Gguf {
            parts,
            silent: true,
        });
    }
    let has = |name: &str| files.iter().any(|file| file == name);
    if has("config.json") && (has(SINGLE) || has(INDEX)) {
        let small = SMALL.iter().chain([&INDEX]).filter(|name| has(name));
        return Ok(Choice::Folder {
            small: small.map(|name| (*name).to_owned()).collect(),
        });
    }
    if models.is_empty() {
        return Err(format!(
            "it has neither config.json with {SINGLE} or {INDEX}, nor a GGUF file; it has: {}",
            list(files.iter().map(String::as_str))
        ));
    }
    let usual = USUAL.iter().find_map(|quant| pick(&models, quant).ok());
    let parts = match usual {
        Some(parts) => parts,
        None if models.len() == 1 => pick_only(&models)?,
        None => {
            return Err(format!(
                "it has several GGUF files; name one as org/name:TYPE; it has: {}",
                list(models.keys().copied())
            ));
        }
    };
    Ok(Choice::Gguf {
        parts,
        silent: false,
    })
}

/// The weight files of a folder, given its index if it has one.
///
/// # Errors
/// Text that says what is wrong with the index.
pub(super) fn weights(index: Option<&str>) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(index) = index else {
        return Ok(vec![SINGLE.to_owned()]);
    };
    let index: Index = serde_json::from_str(index).map_err(|error| format!("{INDEX}: {error}"))?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    match files.iter().find(|file| !is_path(file)) {
        Some(file) => Err(format!("{INDEX}: `{file}` is not the name of a file")),
        None if files.is_empty() => Err(format!("{INDEX}: it names no files")),
        None => Ok(files.into_iter().collect()),
    }
}

/// The parts of one model, by number, and how many there should be.
struct Parts {
    n: usize,
    files: BTreeMap<usize, String>,
}

/// GGUF models by path without the part number and `.gguf`.
fn gguf_models(files: &[String]) -> BTreeMap<&str, Parts> {
    let mut models: BTreeMap<&str, Parts> = BTreeMap::new();
    for file in files {
        let Some(stem) = file.strip_suffix(".gguf") else {
            continue;
        };
        let name = file_name(file);
        if SIDECARS.iter().any(|word| name.contains(word)) {
            continue;
        }
        let (stem, part, n) = split_part(stem).unwrap_or((stem, 1, 1));
        let files = BTreeMap::new();
        let parts = models.entry(stem).or_insert(Parts { n, files });
        parts.files.insert(part, file.clone());
    }
    models
}

/// `model-00002-of-00003` as (`model`, 2, 3).
fn split_part(stem: &str) -> Option<(&str, usize, usize)> {
    let (rest, n) = stem.rsplit_once("-of-")?;
    let (model, part) = rest.rsplit_once('-')?;
    let number = |text: &str| {
        let is_number = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse().ok()).flatten()
    };
    Some((model, number(part)?, number(n)?))
}

/// The one model that carries `quant`.
fn pick(models: &BTreeMap<&str, Parts>, quant: &str) -> Result<Vec<String>, String> {
    let wanted = quant.to_ascii_lowercase();
    let wanted = wanted.strip_suffix(".gguf").unwrap_or(&wanted);
    let wanted = split_part(wanted).map_or(wanted, |(stem, ..)| stem);
    // The surest sign first: the whole name, then the type at its end or as its folder, then the
    // type anywhere between separators.
    for carries in [is_called, ends_with_type, has_type] {
        let found: Vec<_> = models
            .iter()
            .filter(|(stem, _)| carries(&stem.to_ascii_lowercase(), wanted))
            .collect();
        match found.as_slice() {
            [] => {}
            [(stem, parts)] => return complete(stem, parts),
            several => {
                return Err(format!(
                    "several files carry `{quant}`; pass a whole name, as org/name:FILE: {}",
                    list(several.iter().map(|(stem, _)| **stem))
                ));
            }
        }
    }
    let there = if models.is_empty() {
        "no GGUF file at all".to_owned()
    } else {
        list(models.keys().copied())
    };
    Err(format!(
        "no GGUF file carries the type `{quant}`; it has: {there}"
    ))
}

fn pick_only(models: &BTreeMap<&str, Parts>) -> Result<Vec<String>, String> {
    let parts = models
        .iter()
        .next()
        .map(|(stem, parts)| complete(stem, parts));
    parts.unwrap_or_else(|| Ok(Vec::new()))
}

fn complete(stem: &str, parts: &Parts) -> Result<Vec<String>, String> {
    let missing = (1..=parts.n).find(|part| !parts.files.contains_key(part));
    match missing {
        Some(part) => Err(format!("part {part} of {} of `{stem}` is missing", parts.n)),
        None => Ok(parts.files.values().cloned().collect()),
    }
}

fn is_called(stem: &str, wanted: &str) -> bool {
    stem == wanted || file_name(stem) == wanted
}

fn ends_with_type(stem: &str, wanted: &str) -> bool {
    let name = file_name(stem);
    let rest = name.strip_suffix(wanted);
    let folder = stem.strip_suffix(name).unwrap_or_default();
    rest.is_some_and(|rest| rest.ends_with(['-', '.', '_']))
        || file_name(folder.trim_end_matches('/')) == wanted
}

fn has_type(stem: &str, wanted: &str) -> bool {
    let name = file_name(stem);
    name.match_indices(wanted).any(|(at, _)| {
        let before = name[..at].chars().next_back();
        let after = name[at + wanted.len()..].chars().next();
        let is_edge = |c: Option<char>| c.is_none_or(|c| c == '-' || c == '.');
        is_edge(before) && is_edge(after)
    })
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// At most so many names that an error stays readable.
fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const MOST: usize = 40;
    let names: Vec<&str> = names.collect();
    let shown = names[..names.len().min(MOST)].join(", ");
    match names.len() {
        0 => "nothing".to_owned(),
        n if n > MOST => format!("{shown}, and {} more", n - MOST),
        _ => shown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn gguf(files: &[&str], quant: Option<&str>) -> Result<Vec<String>, String> {
        match choose(&names(files), quant)? {
            Choice::Gguf { parts, .. } => Ok(parts),
            Choice::Folder { .. } => panic!("a folder"),
        }
    }

    #[test]
    fn safetensors_come_without_pictures_and_pickles() {
        let files = names(&[
            "README.md",
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "pytorch_model.bin",
            "original/consolidated.00.pth",
            "m-Q4_K_M.gguf",
            "picture.png",
        ]);
        let small = names(&["config.json", "tokenizer.json"]);
        assert_eq!(choose(&files, None), Ok(Choice::Folder { small }));
        let error = choose(&names(&["config.json", "pytorch_model.bin"]), None).unwrap_err();
        assert!(error.contains("pytorch_model.bin"), "{error}");
    }

    #[test]
    fn the_index_names_the_weights() {
        let index = r#"{"weight_map":{"a":"model-2.safetensors","b":"model-1.safetensors","c":"model-1.safetensors"}}"#;
        assert_eq!(
            weights(Some(index)).unwrap(),
            ["model-1.safetensors", "model-2.safetensors"]
        );
        assert_eq!(weights(None).unwrap(), ["model.safetensors"]);
        for bad in [
            "{",
            r#"{"weight_map":{}}"#,
            r#"{"weight_map":{"a":"../x"}}"#,
            r#"{"weight_map":{"a":"/etc/x"}}"#,
        ] {
            assert!(weights(Some(bad)).unwrap_err().contains(INDEX), "{bad}");
        }
    }

    #[test]
    fn types_are_found_in_names() {
        let files = [
            "m-Q4_K_M.gguf",
            "m-Q4_K_S.gguf",
            "m.q8_0.gguf",
            "m-UD-Q2_K_XL.gguf",
            "mmproj-m-Q8_0.gguf",
            "m-F16-mtp.gguf",
        ];
        assert_eq!(gguf(&files, Some("q4_k_m")).unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(gguf(&files, Some("Q8_0")).unwrap(), ["m.q8_0.gguf"]);
        assert_eq!(
            gguf(&files, Some("Q2_K_XL")).unwrap(),
            ["m-UD-Q2_K_XL.gguf"]
        );
        assert_eq!(
            gguf(&files, Some("ud-q2_k_xl")).unwrap(),
            ["m-UD-Q2_K_XL.gguf"]
        );
        assert_eq!(gguf(&files, Some("f16")).unwrap(), ["m-F16-mtp.gguf"]);
        let error = gguf(&files, Some("Q4_K")).unwrap_err();
        assert!(
            error.contains("`Q4_K`") && error.contains("m-Q4_K_S"),
            "{error}"
        );
        assert_eq!(gguf(&files, None).unwrap(), ["m-Q4_K_M.gguf"]);
    }

    #[test]
    fn several_files_need_a_whole_name() {
        let files = ["a-Q8_0.gguf", "b-Q8_0.gguf"];
        let error = gguf(&files, Some("Q8_0")).unwrap_err();
        assert!(error.contains("a-Q8_0, b-Q8_0"), "{error}");
        assert_eq!(gguf(&files, Some("b-Q8_0.gguf")).unwrap(), ["b-Q8_0.gguf"]);
        assert_eq!(gguf(&files, Some("B-Q8_0")).unwrap(), ["b-Q8_0.gguf"]);
        let error = gguf(&["a-F16.gguf", "a-Q6_K.gguf"], None).unwrap_err();
        assert!(error.contains("org/name:TYPE"), "{error}");
        assert_eq!(gguf(&["a-F16.gguf"], None).unwrap(), ["a-F16.gguf"]);
    }

    #[test]
    fn parts_belong_together() {
        let files = [
            "Q6_K/m-Q6_K-00002-of-00002.gguf",
            "Q6_K/m-Q6_K-00001-of-00002.gguf",
            "BF16/m-00001-of-00001.gguf",
            "m-Q3_K-00001-of-00002.gguf",
        ];
        assert_eq!(
            gguf(&files, Some("q6_k")).unwrap(),
            [
                "Q6_K/m-Q6_K-00001-of-00002.gguf",
                "Q6_K/m-Q6_K-00002-of-00002.gguf"
            ]
        );
        assert_eq!(
            gguf(&files, Some("bf16")).unwrap(),
            ["BF16/m-00001-of-00001.gguf"]
        );
        let error = gguf(&files, Some("q3_k")).unwrap_err();
        assert!(error.contains("part 2 of 2"), "{error}");
    }
}
