//! Snapshots: everything that changes during a run, written atomically, refused when damaged.
//!
//! A snapshot is a folder `step-00000200/` with `state.safetensors` (parameters `p.*`, moments `m.*` and `v.*`,
//! selection biases `b.*`, importances of rows `i.*`)
//! and `manifest.json` (step, length and CRC-32 of the state, the recipe). It is made under another name, synced,
//! and renamed, so that a kill at any moment leaves the previous one in place.

use crate::error::{Difference, Result, TrainError};
use crate::files;
use crate::lm::LanguageModel;
use crate::optimizer::{AdamW, Moments};
use crate::params;
use crate::recipe::Recipe;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
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
/// Failures of the file system, and parameters that are not finite; nothing half-written keeps a snapshot's name, and the
/// snapshots before it stay.
pub(crate) fn save(folder: &Path, recipe: &Recipe, state: &State<'_>) -> Result<PathBuf> {
    save_with(folder, recipe, state, &files::write_synced)
}

/// Everything that changes during a run.
#[derive(Clone, Copy)]
pub(crate) struct State<'a> {
    pub(crate) model: &'a LanguageModel,
    pub(crate) optimizer: &'a AdamW,
    /// Selection-only biases by MoE layer.
    pub(crate) biases: &'a [Vec<f32>],
    /// Importances of rows by matrix of experts in factors.
    pub(crate) importance: &'a [Vec<f32>],
}

/// Writes a file completely or fails.
type Write = dyn Fn(&Path, &[u8]) -> Result<()>;

/// As [`save`], with the writing of files left to `write`.
fn save_with(folder: &Path, recipe: &Recipe, state: &State<'_>, write: &Write) -> Result<PathBuf> {
    let optimizer = state.optimizer;
    let state = encode(state).map_err(|what| TrainError::Diverged {
        step: optimizer.step,
        what,
        largest: None,
        kept: newest(folder),
    })?;
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
    let written = write(&partial.join(STATE), &state)
        .and_then(|()| write(&partial.join(MANIFEST), &manifest));
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

/// The newest snapshot of `folder`, whole or not.
pub(crate) fn newest(folder: &Path) -> Option<PathBuf> {
    list(folder).ok()?.into_iter().next()
}

/// The state as safetensors, or the name of what is not finite.
fn encode(state: &State<'_>) -> Result<Vec<u8>, String> {
    let params = params::collect(state.model);
    let finite = |values: &[f32]| values.iter().all(|x| x.is_finite());
    if let Some((path, _)) = params.iter().find(|(_, (_, values))| !finite(values)) {
        return Err(format!("the parameter {path}"));
    }
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect();
    for (path, (shape, values)) in &params {
        tensors.push((format!("p.{path}"), shape.clone(), bytes(values)));
    }
    for (path, moments) in &state.optimizer.moments {
        let shape = vec![moments.first.len()];
        tensors.push((format!("m.{path}"), shape.clone(), bytes(&moments.first)));
        tensors.push((format!("v.{path}"), shape, bytes(&moments.second)));
    }
    for (nth, bias) in state.biases.iter().enumerate() {
        tensors.push((bias_name(nth), vec![bias.len()], bytes(bias)));
    }
    for (nth, rows) in state.importance.iter().enumerate() {
        tensors.push((importance_name(nth), vec![rows.len()], bytes(rows)));
    }
    let views = tensors.iter().map(|(name, shape, data)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), data);
        (name.as_str(), view.expect("shape and bytes agree"))
    });
    Ok(safetensors::serialize(views, None).expect("views are whole tensors"))
}

/// Name of the bias of the `nth` MoE layer.
fn bias_name(nth: usize) -> String {
    format!("b.{nth}")
}

/// Name of the importances of the rows of the `nth` matrix of experts.
fn importance_name(nth: usize) -> String {
    format!("i.{nth}")
}

/// The newest snapshot that is whole, restored into `model`, `optimizer`, biases and importances.
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
    (biases, importance): (&mut [Vec<f32>], &mut [Vec<f32>]),
) -> Result<(LanguageModel, Vec<TrainError>)> {
    let mut refused = Vec::new();
    for path in list(folder)? {
        match open(&path) {
            Ok((manifest, state)) => {
                check_recipe(folder, recipe, &manifest.recipe)?;
                model = decode(&path, &state, model, optimizer, (biases, importance))?;
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
    // Keys that did not exist when the run was started have their defaults now, which must not count as differences.
    let mut other = other.clone();
    other["output"] = serde_json::json!({"dir": recipe.output.dir});
    let theirs = match serde_json::from_value::<Recipe>(other.clone()) {
        Ok(recipe) => recipe.fingerprint(),
        Err(_) => {
            other["output"] = serde_json::json!({});
            other
        }
    };
    let mut differences = Vec::new();
    compare("", Some(&theirs), Some(&ours), &mut differences);
    if differences.is_empty() {
        return Ok(());
    }
    Err(TrainError::OtherRun {
        path: folder.to_owned(),
        differences,
    })
}

/// Collects every key under `key` whose values differ.
fn compare(
    key: &str,
    run: Option<&serde_json::Value>,
    recipe: Option<&serde_json::Value>,
    into: &mut Vec<Difference>,
) {
    if run == recipe {
        return;
    }
    let keys = |value: Option<&serde_json::Value>| -> Option<BTreeSet<String>> {
        Some(value?.as_object()?.keys().cloned().collect())
    };
    if let (Some(a), Some(b)) = (keys(run), keys(recipe)) {
        for name in a.union(&b) {
            let path = if key.is_empty() {
                name.clone()
            } else {
                format!("{key}.{name}")
            };
            let of = |value: Option<&serde_json::Value>| value.and_then(|v| v.get(name)).cloned();
            compare(&path, of(run).as_ref(), of(recipe).as_ref(), into);
        }
        return;
    }
    let text = |value: Option<&serde_json::Value>| value.map(ToString::to_string);
    into.push(Difference {
        key: key.to_owned(),
        run: text(run),
        recipe: text(recipe),
    });
}

fn decode(
    path: &Path,
    state: &[u8],
    model: LanguageModel,
    optimizer: &mut AdamW,
    (biases, importance): (&mut [Vec<f32>], &mut [Vec<f32>]),
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
    for (nth, bias) in biases.iter_mut().enumerate() {
        *bias = read(&bias_name(nth), bias.len())?;
    }
    for (nth, rows) in importance.iter_mut().enumerate() {
        *rows = read(&importance_name(nth), rows.len())?;
    }
    optimizer.moments = moments;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::Init;
    use burn::tensor::Device;

    fn recipe(dir: &Path) -> Recipe {
        let text = format!(
            "name = \"tiny\"\n[model]\nvocab_size = 8\nhidden_size = 4\nn_layers = 1\nn_heads = 1\nn_kv_heads = 1\n\
             head_dim = 4\nn_experts = 2\ntop_k = 2\nmoe_intermediate_size = 4\nmax_position_embeddings = 8\n\
             [train]\nsteps = 9\nbatch_size = 1\nseq_len = 4\nlr = 1e-3\n[output]\ndir = {dir:?}\n"
        );
        Recipe::parse(Path::new("tiny.toml"), &text).unwrap()
    }

    fn model(recipe: &Recipe) -> LanguageModel {
        let init = Init {
            seed: 1,
            std: 0.02,
            device: Device::flex().autodiff(),
        };
        LanguageModel::init(&recipe.architecture().unwrap(), &init)
    }

    fn parts<'a>(model: &'a LanguageModel, optimizer: &'a AdamW) -> State<'a> {
        State {
            model,
            optimizer,
            biases: &[],
            importance: &[],
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// A device that is full after `room` bytes: what fits is written, then the write fails.
    fn full_after(room: usize, path: &Path, bytes: &[u8]) -> Result<()> {
        let n = bytes.len().min(room);
        std::fs::write(path, &bytes[..n]).unwrap();
        if n == bytes.len() {
            return Ok(());
        }
        let full = std::io::ErrorKind::StorageFull.into();
        Err(TrainError::io("write", path, full))
    }

    #[test]
    fn a_full_disk_leaves_the_snapshot_before_it_and_nothing_half_written() {
        let folder = tempfile::tempdir().unwrap();
        let recipe = recipe(folder.path());
        let model = model(&recipe);
        let mut optimizer = AdamW::new(recipe.optimizer);
        optimizer.step = 3;
        save(folder.path(), &recipe, &parts(&model, &optimizer)).unwrap();
        optimizer.step = 4;
        // In the middle of the state, and between state and manifest.
        for (state, manifest) in [(100, usize::MAX), (usize::MAX, 10)] {
            let write = move |path: &Path, bytes: &[u8]| {
                let room = if path.ends_with(MANIFEST) {
                    manifest
                } else {
                    state
                };
                full_after(room, path, bytes)
            };
            let error = save_with(folder.path(), &recipe, &parts(&model, &optimizer), &write)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("no space left on the device") && error.contains("step-00000004"),
                "{error}"
            );
            assert_eq!(names(folder.path()), ["step-00000003"]);
        }
        let mut restored = AdamW::new(recipe.optimizer);
        let (_, refused) = restore(
            folder.path(),
            &recipe,
            model.clone(),
            &mut restored,
            (&mut [], &mut []),
        )
        .unwrap();
        assert_eq!((restored.step, refused.len()), (3, 0));
        save(folder.path(), &recipe, &parts(&model, &optimizer)).unwrap();
        assert_eq!(names(folder.path()), ["step-00000003", "step-00000004"]);
    }

    #[test]
    fn keys_that_a_run_did_not_have_yet_are_no_difference() {
        let folder = tempfile::tempdir().unwrap();
        let mut recipe = recipe(folder.path());
        let mut older = recipe.fingerprint();
        older["model"].as_object_mut().unwrap().remove("rope_theta");
        older.as_object_mut().unwrap().remove("losses");
        check_recipe(folder.path(), &recipe, &older).unwrap();
        recipe.model.rope_theta = 5e5;
        assert!(check_recipe(folder.path(), &recipe, &older).is_err());
    }
}
