//! The safetensors files of a checkpoint and the index over them.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use crate::error::{CheckpointError, Result};
use crate::safetensors_file::read_safetensors;
use crate::tensors::Raw;

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// All tensors of all shards.
#[derive(Default)]
pub(crate) struct Shards {
    pub(crate) tensors: Vec<Raw>,
}

/// The part of `model.safetensors.index.json` that matters.
#[derive(Deserialize)]
struct IndexFile {
    #[serde(deserialize_with = "unique")]
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Reads the header of every shard. `fetch` gives a file of the checkpoint by its name, or
    /// `None` when there is none.
    pub(crate) fn load(
        origin: &str,
        mut fetch: impl FnMut(&str) -> Result<Option<Bytes>>,
    ) -> Result<Self> {
        let mut shards = Self::default();
        if let Some(blob) = fetch(SINGLE)? {
            shards.push(origin, SINGLE, &blob)?;
            return Ok(shards);
        }
        let Some(index) = fetch(INDEX)? else {
            return Err(CheckpointError::MissingFile {
                origin: origin.to_owned(),
                file: format!("{SINGLE} and no {INDEX}"),
                hint: "only safetensors checkpoints are read (not .bin, .pth or GGUF)".to_owned(),
            });
        };
        let file = format!("{origin}/{INDEX}");
        let index: IndexFile =
            serde_json::from_slice(&index).map_err(|source| CheckpointError::Json {
                file: file.clone(),
                source,
            })?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            if name.contains(['/', '\\']) {
                let problem = format!("shard `{name}` is not a plain file name");
                return Err(CheckpointError::Index { file, problem });
            }
            let blob = fetch(name)?.ok_or_else(|| CheckpointError::MissingFile {
                origin: origin.to_owned(),
                file: name.clone(),
                hint: format!("{INDEX} names it; the download may be incomplete"),
            })?;
            let before: Vec<String> = shards.push(origin, name, &blob)?;
            check_against_index(&file, &index, name, &before)?;
        }
        Ok(shards)
    }

    /// Adds one file; returns the tensor names in its header.
    fn push(&mut self, origin: &str, name: &str, bytes: &Bytes) -> Result<Vec<String>> {
        let file = format!("{origin}/{name}");
        let mut stored = Vec::new();
        for tensor in read_safetensors(&file, bytes)? {
            stored.push(tensor.name.clone());
            self.tensors.push(Raw {
                file: file.clone(),
                name: tensor.name,
                dtype: tensor.dtype,
                shape: tensor.shape,
                bytes: tensor.bytes,
            });
        }
        Ok(stored)
    }
}

/// A map from texts to texts in which no key is there twice.
fn unique<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    struct Unique;
    impl<'de> Visitor<'de> for Unique {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object from tensor names to file names")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = BTreeMap::new();
            while let Some((name, file)) = map.next_entry::<String, String>()? {
                if found.insert(name.clone(), file).is_some() {
                    return Err(A::Error::custom(format!("`{name}` is there twice")));
                }
            }
            Ok(found)
        }
    }
    deserializer.deserialize_map(Unique)
}

/// The header of a shard and its lines in the index must name the same tensors.
fn check_against_index(
    file: &str,
    index: &IndexFile,
    shard: &str,
    stored: &[String],
) -> Result<()> {
    let complain = |problem: String| {
        Err(CheckpointError::Index {
            file: file.to_owned(),
            problem,
        })
    };
    for name in stored {
        if index.weight_map.get(name).map(String::as_str) != Some(shard) {
            return complain(format!("does not say that tensor `{name}` is in {shard}"));
        }
    }
    let stored: HashSet<&str> = stored.iter().map(String::as_str).collect();
    let listed = index
        .weight_map
        .iter()
        .filter(|(_, file)| *file == shard)
        .map(|(name, _)| name);
    for name in listed {
        if !stored.contains(name.as_str()) {
            return complain(format!(
                "says that tensor `{name}` is in {shard}, which lacks it"
            ));
        }
    }
    Ok(())
}
