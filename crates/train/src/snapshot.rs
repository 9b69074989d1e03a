//! Snapshots: everything that changes during a run, written atomically, refused when damaged.
//!
//! A snapshot is a folder `step-00000200/` with `state.safetensors` (parameters `p.*`, moments `m.*` and `v.*`)
//! and `manifest.json` (step, length and CRC-32 of the state, the recipe). It is made under another name, synced,
//! and renamed, so that a kill at any moment leaves the previous one in place.

use crate::error::{Result, TrainError};
use crate::files;
use crate::lm::LanguageModel;
use crate::optimizer::{AdamW, Moments};
use crate::params;
use crate::recipe::Recipe;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const STATE: &str = "state.safetensors";
const MANIFEST: &str = "manifest.json";

#[derive(Serialize, Deserialize)]
struct Manifest {
    step: u64,
    state_bytes: u64,
    state_crc32: u32,
    recipe: serde_json::Value,
}

/// Writes the snapshot of `optimizer.step` into `folder` and deletes all but the newest `keep`.
///
/// # Errors
/// Failures of the file system; nothing half-written keeps a snapshot's name.
pub(crate) fn save(
    folder: &Path,
    recipe: &Recipe,
    model: &LanguageModel,
    optimizer: &AdamW,
) -> Result<PathBuf> {
    let state = encode(model, optimizer);
    let manifest = Manifest {
        step: optimizer.step,
        state_bytes: state.len() as u64,
        state_crc32: crc32fast::hash(&state),
        recipe: recipe.fingerprint(),
    };
    let name = format!("step-{:08}", optimizer.step);
    let partial = folder.join(format!(".{name}.partial"));
    files::remove_dir(&partial)?;
    files::create_dir(&partial)?;
    let manifest = serde_json::to_vec_pretty(&manifest).expect("plain data");
    let written = files::write_synced(&partial.join(STATE), &state)
        .and_then(|()| files::write_synced(&partial.join(MANIFEST), &manifest));
    if let Err(error) = written {
        let _ = std::fs::remove_dir_all(&partial);
        return Err(error);
    }
    let path = folder.join(name);
    files::remove_dir(&path)?;
    files::rename(&partial, &path)?;
    for old in list(folder)?.into_iter().skip(recipe.output.keep) {
        files::remove_dir(&old)?;
    }
    Ok(path)
}

fn encode(model: &LanguageModel, optimizer: &AdamW) -> Vec<u8> {
    let params = params::collect(model);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect();
    for (path, (shape, values)) in &params {
        tensors.push((format!("p.{path}"), shape.clone(), bytes(values)));
    }
    for (path, moments) in &optimizer.moments {
        let shape = vec![moments.first.len()];
        tensors.push((format!("m.{path}"), shape.clone(), bytes(&moments.first)));
        tensors.push((format!("v.{path}"), shape, bytes(&moments.second)));
    }
    let views = tensors.iter().map(|(name, shape, data)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), data);
        (name.as_str(), view.expect("shape and bytes agree"))
    });
    safetensors::serialize(views, None).expect("views are whole tensors")
}

/// The newest snapshot that is whole, restored into `model` and `optimizer`; `None` without any.
///
/// Damaged ones are passed over and returned by path with the reason.
///
/// # Errors
/// A snapshot of another recipe, or an unreadable folder.
pub(crate) fn restore(
    folder: &Path,
    recipe: &Recipe,
    mut model: LanguageModel,
    optimizer: &mut AdamW,
) -> Result<(LanguageModel, Vec<TrainError>)> {
    let mut refused = Vec::new();
    for path in list(folder)? {
        match open(&path) {
            Ok((manifest, state)) => {
                check_recipe(folder, recipe, &manifest.recipe)?;
                model = decode(&path, &state, model, optimizer)?;
                optimizer.step = manifest.step;
                break;
            }
            Err(error) => refused.push(error),
        }
    }
    Ok((model, refused))
}

/// Snapshots, newest first.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(TrainError::io("read", folder, e)),
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("step-"))
        })
        .collect();
    paths.sort();
    paths.reverse();
    Ok(paths)
}

fn open(path: &Path) -> Result<(Manifest, Vec<u8>)> {
    let damaged = |problem: String| TrainError::Snapshot {
        path: path.to_owned(),
        problem,
    };
    let manifest = files::read(&path.join(MANIFEST)).map_err(|e| damaged(e.to_string()))?;
    let manifest: Manifest =
        serde_json::from_slice(&manifest).map_err(|e| damaged(format!("{MANIFEST}: {e}")))?;
    let state = files::read(&path.join(STATE)).map_err(|e| damaged(e.to_string()))?;
    if state.len() as u64 != manifest.state_bytes {
        let (is, was) = (state.len(), manifest.state_bytes);
        return Err(damaged(format!(
            "{STATE} has {is} bytes, {was} were written"
        )));
    }
    if crc32fast::hash(&state) != manifest.state_crc32 {
        return Err(damaged(format!("the checksum of {STATE} does not match")));
    }
    Ok((manifest, state))
}

fn check_recipe(folder: &Path, recipe: &Recipe, other: &serde_json::Value) -> Result<()> {
    let ours = recipe.fingerprint();
    let differs = ours.as_object().and_then(|ours| {
        ours.iter()
            .find(|(key, value)| other.get(key) != Some(value))
    });
    match differs {
        Some((key, _)) => Err(TrainError::OtherRun {
            path: folder.to_owned(),
            what: format!("[{key}]"),
        }),
        None => Ok(()),
    }
}

fn decode(
    path: &Path,
    state: &[u8],
    model: LanguageModel,
    optimizer: &mut AdamW,
) -> Result<LanguageModel> {
    let damaged = |problem: String| TrainError::Snapshot {
        path: path.to_owned(),
        problem,
    };
    let tensors = SafeTensors::deserialize(state).map_err(|e| damaged(e.to_string()))?;
    let read = |name: &str, len: usize| -> Result<Vec<f32>> {
        let view = tensors
            .tensor(name)
            .map_err(|e| damaged(format!("tensor {name}: {e}")))?;
        let values: Vec<f32> = view
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        if values.len() != len {
            let n = values.len();
            return Err(damaged(format!(
                "tensor {name} has {n} values, expected {len}"
            )));
        }
        Ok(values)
    };
    let mut moments = BTreeMap::new();
    let model = params::replace(model, |path, shape| {
        let len = shape.iter().product();
        if tensors.tensor(&format!("m.{path}")).is_ok() {
            let pair = Moments {
                first: read(&format!("m.{path}"), len)?,
                second: read(&format!("v.{path}"), len)?,
            };
            moments.insert(path.to_owned(), pair);
        }
        read(&format!("p.{path}"), len)
    })?;
    optimizer.moments = moments;
    Ok(model)
}
