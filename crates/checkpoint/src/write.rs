//! Writing a checkpoint folder that other programs load unchanged, or nothing at all.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::Dtype;
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result};

use crate::shards::SINGLE;
use crate::specs::tensor_specs;
use crate::text::Tokenizer;

/// The files of a folder that Cadre makes; [`write_folder`] replaces a folder only when it holds
/// nothing else. `profile.json` says what the experts are for and is out of date with new weights.
const OURS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "profile.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// One tensor to write.
#[derive(Debug, Clone)]
pub struct TensorData<'a> {
    /// Name as [`tensor_specs`] gives it.
    pub name: String,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// `shape.product()` values, row-major.
    pub values: Cow<'a, [f32]>,
}

/// What goes into a folder.
#[derive(Debug)]
pub struct FolderContents<'a> {
    /// Becomes `config.json` and `generation_config.json`.
    pub config: &'a ModelConfig,
    /// Exactly the tensors of the architecture, in any order.
    pub tensors: &'a [TensorData<'a>],
    /// Number format on disk.
    pub dtype: Dtype,
    /// Text of `tokenizer.json`; without it no tokenizer files are written.
    pub tokenizer_json: Option<&'a str>,
}

/// Writes a Hugging Face folder at `folder`: `config.json`, `generation_config.json`,
/// `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`.
///
/// Everything is written and synced in a hidden folder beside the target and then renamed, so
/// the target is complete or untouched. An existing target is replaced when it is empty or holds
/// only files of these names.
///
/// # Errors
/// Tensors that do not fit the configuration or are not finite, a target with other files in it,
/// and failures of the file system. Nothing is left behind.
pub fn write_folder(folder: &Path, contents: &FolderContents<'_>) -> Result<()> {
    let target = absolute(folder)?;
    let origin = folder.display().to_string();
    contents.config.check(&format!("{origin}/config.json"))?;
    if contents.dtype.torch_name().is_none() {
        return Err(CheckpointError::Unsupported {
            file: origin,
            key: "dtype".to_owned(),
            value: contents.dtype.to_string(),
            reason: "a folder is written as F32, F16 or BF16".to_owned(),
        });
    }
    let sorted = check_tensors(&origin, contents)?;
    refuse_foreign_files(folder)?;
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        let path = folder.to_owned();
        let hint = "the name of a new folder is needed".to_owned();
        return Err(CheckpointError::NotAFolder { path, hint });
    };
    fs::create_dir_all(parent).map_err(|error| CheckpointError::io("create", parent, error))?;
    let hidden = |what: &str| {
        parent.join(format!(
            ".{}.{what}-{}",
            name.to_string_lossy(),
            std::process::id()
        ))
    };
    let partial = PartialFolder::create(hidden("partial"))?;
    write_files(&partial.path, contents, &sorted)?;
    partial.publish(&target, &hidden("previous"))
}

fn absolute(folder: &Path) -> Result<PathBuf> {
    std::path::absolute(folder).map_err(|error| CheckpointError::io("resolve", folder, error))
}

fn write_files(
    folder: &Path,
    contents: &FolderContents<'_>,
    sorted: &[&TensorData<'_>],
) -> Result<()> {
    let config = contents.config;
    write_tensors(&folder.join(SINGLE), contents.dtype, sorted)?;
    write_text(
        &folder.join("generation_config.json"),
        &config.to_generation_json(),
    )?;
    if let Some(json) = contents.tokenizer_json {
        let tokenizer = Tokenizer::from_json("tokenizer.json", json)?;
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(CheckpointError::Tokenizer {
                origin: "tokenizer.json".to_owned(),
                problem: format!(
                    "it has {} tokens, more than vocab_size = {}",
                    tokenizer.vocab_size(),
                    config.vocab_size
                ),
            });
        }
        write_text(&folder.join("tokenizer.json"), json)?;
        let text = tokenizer_config(config, &tokenizer);
        write_text(&folder.join("tokenizer_config.json"), &text)?;
    }
    // Last, because its presence is what makes a folder a checkpoint.
    write_text(
        &folder.join("config.json"),
        &config.to_config_json(contents.dtype)?,
    )
}

/// `tokenizer_config.json` for the generic fast tokenizer of transformers.
fn tokenizer_config(config: &ModelConfig, tokenizer: &Tokenizer) -> String {
    let mut map = Map::new();
    map.insert("clean_up_tokenization_spaces".into(), json!(false));
    map.insert(
        "model_max_length".into(),
        json!(config.max_position_embeddings),
    );
    map.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    let roles = [
        ("bos_token", config.bos_token_id),
        ("eos_token", config.eos_token_ids.first().copied()),
        ("pad_token", config.pad_token_id),
    ];
    for (role, id) in roles {
        if let Some(id) = id {
            map.insert(role.into(), json!(tokenizer.token_str(id)));
        }
    }
    format!("{:#}\n", Value::Object(map))
}

/// Checks names, shapes, lengths and finiteness; returns the tensors sorted by name.
fn check_tensors<'a>(
    origin: &str,
    contents: &'a FolderContents<'a>,
) -> Result<Vec<&'a TensorData<'a>>> {
    let mut wanted: BTreeMap<String, Vec<usize>> =
        tensor_specs(contents.config).into_iter().collect();
    for tensor in contents.tensors {
        let name = tensor.name.clone();
        let Some(expected) = wanted.remove(&name) else {
            return Err(CheckpointError::UnexpectedTensor {
                origin: origin.to_owned(),
                name,
                shape: tensor.shape.clone(),
                n_unexpected: 1,
            });
        };
        if tensor.shape != expected || tensor.values.len() != expected.iter().product::<usize>() {
            return Err(CheckpointError::WrongShape {
                origin: origin.to_owned(),
                name,
                found: tensor.shape.clone(),
                expected,
            });
        }
        if let Some(index) = tensor.values.iter().position(|value| !value.is_finite()) {
            let value = tensor.values[index];
            return Err(CheckpointError::NonFinite {
                origin: origin.to_owned(),
                name,
                index,
                value,
            });
        }
    }
    if let Some((name, shape)) = wanted.iter().next() {
        return Err(CheckpointError::MissingTensor {
            origin: origin.to_owned(),
            name: name.clone(),
            shape: shape.clone(),
            n_missing: wanted.len(),
        });
    }
    let mut sorted: Vec<&TensorData<'_>> = contents.tensors.iter().collect();
    sorted.sort_unstable_by(|left, right| left.name.cmp(&right.name));
    Ok(sorted)
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    write_synced(path, |file| file.write_all(text.as_bytes()))
}

/// Plain formats only; `write_folder` has refused the others.
fn encode(dtype: Dtype, values: &[f32]) -> std::io::Result<Vec<u8>> {
    dtype
        .encode(values)
        .ok_or_else(|| std::io::Error::other(format!("{dtype} cannot hold these values")))
}

/// Numbers of rows must be exact, and those of experts in factors are the only ones that are no weights.
fn held_as(dtype: Dtype, name: &str) -> Dtype {
    match name.ends_with("_proj.rows") {
        true => Dtype::F32,
        false => dtype,
    }
}

/// Header, then the data tensor by tensor, so that only one converted tensor is in memory.
fn write_tensors(path: &Path, dtype: Dtype, tensors: &[&TensorData<'_>]) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        let dtype = held_as(dtype, &tensor.name);
        end += tensor.values.len() * dtype.block_bytes();
        let entry = json!({
            "dtype": dtype.to_string(),
            "shape": tensor.shape,
            "data_offsets": [start, end],
        });
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Padding keeps the data aligned for readers that map the file.
    header.resize(header.len().next_multiple_of(8), b' ');
    write_synced(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        tensors.iter().try_for_each(|tensor| {
            file.write_all(&encode(held_as(dtype, &tensor.name), &tensor.values)?)
        })
    })
}

/// Creates `path`, lets `fill` write it, and waits until it is on the device.
fn write_synced(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<()> {
    let write = || {
        let mut file = BufWriter::new(File::create(path)?);
        fill(&mut file)?;
        file.into_inner()
            .map_err(std::io::IntoInnerError::into_error)?
            .sync_all()
    };
    write().map_err(|error| CheckpointError::io("write", path, error))
}

/// Refuses a target with entries that are not files of ours.
fn refuse_foreign_files(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    if !folder.is_dir() {
        let hint = "a file is in the way; choose another name".to_owned();
        return Err(CheckpointError::NotAFolder {
            path: folder.to_owned(),
            hint,
        });
    }
    let read = |error| CheckpointError::io("read", folder, error);
    for entry in fs::read_dir(folder).map_err(read)? {
        let file = entry
            .map_err(read)?
            .file_name()
            .to_string_lossy()
            .into_owned();
        if !OURS.contains(&file.as_str()) {
            return Err(CheckpointError::WouldOverwrite {
                path: folder.to_owned(),
                file,
            });
        }
    }
    Ok(())
}

/// A folder under construction; removed when dropped before it is published.
struct PartialFolder {
    path: PathBuf,
}

impl PartialFolder {
    fn create(path: PathBuf) -> Result<Self> {
        // A process of the same id may have been killed here before.
        if path.exists() {
            fs::remove_dir_all(&path)
                .map_err(|error| CheckpointError::io("remove", &path, error))?;
        }
        fs::create_dir(&path).map_err(|error| CheckpointError::io("create", &path, error))?;
        Ok(Self { path })
    }

    /// Renames the folder to `target`; an old `target` waits at `previous` meanwhile.
    fn publish(self, target: &Path, previous: &Path) -> Result<()> {
        let rename = |from: &Path, to: &Path| {
            fs::rename(from, to).map_err(|error| CheckpointError::io("rename", from, error))
        };
        if !target.exists() {
            rename(&self.path, target)?;
            return sync_parent(target);
        }
        rename(target, previous)?;
        if let Err(error) = rename(&self.path, target) {
            rename(previous, target)?;
            return Err(error);
        }
        sync_parent(target)?;
        fs::remove_dir_all(previous).map_err(|error| CheckpointError::io("remove", previous, error))
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        // After publishing there is nothing at this path. A failure here leaves a hidden folder
        // behind, which the error on its way out matters more than.
        if self.path.exists()
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a partial folder");
        }
    }
}

/// Makes a rename durable where folders can be synced.
pub(crate) fn sync_parent(target: &Path) -> Result<()> {
    if let Some(parent) = target.parent().filter(|_| cfg!(unix)) {
        let sync = File::open(parent).and_then(|folder| folder.sync_all());
        sync.map_err(|error| CheckpointError::io("sync", parent, error))?;
    }
    Ok(())
}
