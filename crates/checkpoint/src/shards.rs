//! The safetensors files of a checkpoint and the index over them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::Arc;

use ahash::{AHashMap, AHashSet};
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
struct IndexFile<'a> {
    #[serde(borrow, deserialize_with = "unique")]
    weight_map: WeightMap<'a>,
}

/// Tensor names to file names, borrowed from the JSON where it has no escapes.
type WeightMap<'a> = AHashMap<Cow<'a, str>, Cow<'a, str>>;

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
        let index: IndexFile<'_> =
            serde_json::from_slice(&index).map_err(|source| CheckpointError::Json {
                file: file.clone(),
                source,
            })?;
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for name in index.weight_map.values() {
            *counts.entry(name).or_default() += 1;
        }
        for (name, n_listed) in counts {
            if name.contains(['/', '\\']) {
                let problem = format!("shard `{name}` is not a plain file name");
                return Err(CheckpointError::Index { file, problem });
            }
            let blob = fetch(name)?.ok_or_else(|| CheckpointError::MissingFile {
                origin: origin.to_owned(),
                file: name.to_owned(),
                hint: format!("{INDEX} names it; the download may be incomplete"),
            })?;
            let from = shards.tensors.len();
            shards.push(origin, name, &blob)?;
            let stored = &shards.tensors[from..];
            check_against_index(&file, &index.weight_map, (name, n_listed), stored)?;
        }
        Ok(shards)
    }

    /// Adds one file.
    fn push(&mut self, origin: &str, name: &str, bytes: &Bytes) -> Result<()> {
        let file = format!("{origin}/{name}");
        let tensors = read_safetensors(&file, bytes)?;
        let file: Arc<str> = file.into();
        self.tensors.reserve(tensors.len());
        for tensor in tensors {
            self.tensors.push(Raw {
                file: Arc::clone(&file),
                name: tensor.name,
                dtype: tensor.dtype,
                shape: tensor.shape,
                bytes: tensor.bytes,
            });
        }
        Ok(())
    }
}

/// A map from texts to texts in which no key is there twice.
fn unique<'de, D: Deserializer<'de>>(deserializer: D) -> Result<WeightMap<'de>, D::Error> {
    struct Unique;
    impl<'de> Visitor<'de> for Unique {
        type Value = WeightMap<'de>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object from tensor names to file names")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = WeightMap::new();
            while let Some((Text(name), Text(file))) = map.next_entry()? {
                match found.entry(name) {
                    Entry::Vacant(slot) => slot.insert(file),
                    Entry::Occupied(slot) => {
                        let problem = format!("`{}` is there twice", slot.key());
                        return Err(A::Error::custom(problem));
                    }
                };
            }
            Ok(found)
        }
    }
    deserializer.deserialize_map(Unique)
}

/// A text, borrowed unless it holds escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The header of a shard and its lines in the index, of which there are `n_listed`, must name the same tensors.
fn check_against_index(
    file: &str,
    weight_map: &WeightMap<'_>,
    (shard, n_listed): (&str, usize),
    stored: &[Raw],
) -> Result<()> {
    let complain = |problem: String| {
        Err(CheckpointError::Index {
            file: file.to_owned(),
            problem,
        })
    };
    for tensor in stored {
        let name = tensor.name.as_str();
        if weight_map.get(name).map(|file| &**file) != Some(shard) {
            return complain(format!("does not say that tensor `{name}` is in {shard}"));
        }
    }
    // A header has every name once, so equal numbers leave no line over.
    if stored.len() == n_listed {
        return Ok(());
    }
    let stored: AHashSet<&str> = stored.iter().map(|tensor| &*tensor.name).collect();
    let listed = weight_map.iter().filter(|(_, file)| *file == shard);
    let mut lacking: Vec<&str> = listed
        .map(|(name, _)| &**name)
        .filter(|name| !stored.contains(name))
        .collect();
    lacking.sort_unstable();
    match lacking.first() {
        Some(name) => complain(format!(
            "says that tensor `{name}` is in {shard}, which lacks it"
        )),
        None => Ok(()),
    }
}
