//! The safetensors files of a checkpoint: mapping, header checks, and the index over all shards.

use std::collections::BTreeMap;

use bytes::Bytes;
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::dtype::from_safetensors;
use crate::error::{CheckpointError, Result};
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
        let damaged = |problem: String| CheckpointError::Safetensors {
            file: file.clone(),
            problem,
        };
        check_lengths(bytes).map_err(damaged)?;
        let (header, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|error| damaged(error.to_string()))?;
        let start = 8 + header;
        let mut stored = Vec::new();
        for (tensor, info) in metadata.tensors() {
            let Some(dtype) = from_safetensors(info.dtype) else {
                return Err(CheckpointError::UnsupportedDtype {
                    origin: origin.to_owned(),
                    name: tensor,
                    dtype: info.dtype.to_string(),
                });
            };
            let (from, to) = info.data_offsets;
            stored.push(tensor.clone());
            self.tensors.push(Raw {
                file: file.clone(),
                name: tensor,
                dtype,
                shape: info.shape.clone(),
                bytes: bytes.slice(start + from..start + to),
            });
        }
        Ok(stored)
    }
}

/// Says in plain words how a file is cut off, before the parser sees it.
fn check_lengths(bytes: &[u8]) -> Result<(), String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!(
            "it has {} bytes, less than the 8 of the header length",
            bytes.len()
        ));
    };
    let header = u64::from_le_bytes(*length);
    if header > rest.len() as u64 {
        return Err(format!(
            "its header should have {header} bytes, but only {} follow",
            rest.len()
        ));
    }
    // `header <= rest.len()`, so the cast cannot lose anything.
    let data = &rest[header as usize..];
    let Ok(parsed) = serde_json::from_slice::<serde_json::Value>(&rest[..header as usize]) else {
        return Err("its header is not valid JSON".to_owned());
    };
    let end = |tensor: &serde_json::Value| tensor.get("data_offsets")?.get(1)?.as_u64();
    let needed = parsed
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(_, tensor)| end(tensor));
    let needed = needed.max().unwrap_or(0);
    if needed > data.len() as u64 {
        return Err(format!(
            "its tensors need {needed} bytes of data, but {} are there",
            data.len()
        ));
    }
    Ok(())
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
    let listed = index
        .weight_map
        .iter()
        .filter(|(_, file)| *file == shard)
        .map(|(name, _)| name);
    for name in listed {
        if !stored.contains(name) {
            return complain(format!(
                "says that tensor `{name}` is in {shard}, which lacks it"
            ));
        }
    }
    Ok(())
}
