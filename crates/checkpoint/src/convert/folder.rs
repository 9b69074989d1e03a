//! Writing a planned folder: files of tensors that are finished one by one, small files last, one rename at the end.
//!
//! Until then everything is in `.NAME.converting` beside the target. Every file of tensors there under its final name is
//! complete, so that a conversion of the same identity goes on after the last one.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{Conversion, ConvertTo, Meter, Planned};
use crate::error::{CheckpointError, Result};
use crate::shards::{INDEX, SINGLE};
use crate::write::sync_parent;

/// Says what is being converted, in the hidden folder only.
const IDENTITY: &str = ".cadre-conversion";

/// Writes the folder of `conversion` to `target`.
pub(super) fn write(
    conversion: &Conversion<'_>,
    target: &Path,
    files: &[(String, String)],
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Vec<PathBuf>> {
    let ConvertTo::Folder { max_shard_bytes } = conversion.options.target else {
        return Ok(Vec::new());
    };
    let target = std::path::absolute(target)
        .map_err(|error| CheckpointError::io("resolve", target, error))?;
    refuse_existing(&target)?;
    let shards = shards(&conversion.tensors, max_shard_bytes);
    let partial = hidden(&target);
    begin(&partial, &identity(conversion, &shards, files))?;
    let mut meter = Meter::new(&target, progress);
    for shard in &shards {
        let path = partial.join(&shard.file);
        let n_bytes = shard.tensors.iter().map(|tensor| tensor.n_bytes()).sum();
        if path.exists() {
            meter.add(n_bytes)?;
            continue;
        }
        let unfinished = partial.join("unfinished");
        write_shard(conversion, &unfinished, shard, &mut meter)?;
        rename(&unfinished, &path)?;
    }
    if shards.len() > 1 {
        write_text(&partial.join(INDEX), &index(conversion, &shards))?;
    }
    for (name, text) in files {
        write_text(&partial.join(name), text)?;
    }
    let identity = partial.join(IDENTITY);
    fs::remove_file(&identity).map_err(|error| CheckpointError::io("remove", &identity, error))?;
    if target.exists() {
        // Empty, as was checked at the beginning; a rename needs the name.
        fs::remove_dir(&target).map_err(|error| CheckpointError::io("replace", &target, error))?;
    }
    rename(&partial, &target)?;
    sync_parent(&target)?;
    Ok(vec![target])
}

/// One file of tensors.
struct Shard<'a> {
    file: String,
    tensors: Vec<&'a Planned>,
}

/// Tensors in their order, in files of at most `max_bytes` where they fit.
fn shards(tensors: &[Planned], max_bytes: u64) -> Vec<Shard<'_>> {
    let mut groups: Vec<(u64, Vec<&Planned>)> = Vec::new();
    for tensor in tensors {
        let n = tensor.n_bytes();
        match groups.last_mut().filter(|(used, _)| used + n <= max_bytes) {
            Some((used, group)) => {
                *used += n;
                group.push(tensor);
            }
            None => groups.push((n, vec![tensor])),
        }
    }
    let count = groups.len();
    let name = |at: usize| match count {
        1 => SINGLE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
    };
    let shards = groups.into_iter().enumerate();
    shards
        .map(|(at, (_, tensors))| Shard {
            file: name(at),
            tensors,
        })
        .collect()
}

/// The header of a file of safetensors, with its length before it.
fn header(shard: &Shard<'_>) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for tensor in &shard.tensors {
        let start = end;
        end += tensor.n_bytes();
        let entry = json!({
            "dtype": tensor.plan.dtype.name(),
            "shape": tensor.plan.shape,
            "data_offsets": [start, end],
        });
        map.insert(tensor.plan.name.clone(), entry);
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    // Padding keeps the data aligned for readers that map the file.
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

fn write_shard(
    conversion: &Conversion<'_>,
    path: &Path,
    shard: &Shard<'_>,
    meter: &mut Meter<'_, '_>,
) -> Result<()> {
    let io = |error| CheckpointError::io("write", path, error);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    file.write_all(&header(shard)).map_err(io)?;
    for tensor in &shard.tensors {
        let mut sink = |bytes: &[u8]| {
            file.write_all(bytes).map_err(io)?;
            meter.add(bytes.len() as u64)
        };
        let recipe = &tensor.recipe;
        recipe.make(conversion.source, &tensor.plan, None, &mut sink)?;
    }
    let file = file.into_inner().map_err(|error| io(error.into_error()))?;
    file.sync_all().map_err(io)
}

fn index(conversion: &Conversion<'_>, shards: &[Shard<'_>]) -> String {
    let mut map = Map::new();
    for shard in shards {
        for tensor in &shard.tensors {
            map.insert(tensor.plan.name.clone(), json!(shard.file));
        }
    }
    let index = json!({"metadata": {"total_size": conversion.n_bytes()}, "weight_map": map});
    format!("{index:#}\n")
}

/// What the files of tensors depend on.
fn identity(
    conversion: &Conversion<'_>,
    shards: &[Shard<'_>],
    files: &[(String, String)],
) -> String {
    let mut hasher = Sha256::new();
    hasher.update(conversion.identity());
    for shard in shards {
        hasher.update(header(shard));
    }
    for (name, text) in files {
        hasher.update(name);
        hasher.update(text);
    }
    let digest = hasher.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the hidden folder, or keeps one of the same identity.
fn begin(partial: &Path, identity: &str) -> Result<()> {
    let mark = partial.join(IDENTITY);
    if partial.exists() {
        if fs::read_to_string(&mark).is_ok_and(|known| known == identity) {
            tracing::info!(partial = %partial.display(), "going on with an unfinished folder");
            return Ok(());
        }
        // Ours by its name; another source, format or version of the source.
        fs::remove_dir_all(partial)
            .map_err(|error| CheckpointError::io("remove", partial, error))?;
    }
    fs::create_dir_all(partial).map_err(|error| CheckpointError::io("create", partial, error))?;
    write_text(&mark, identity)
}

/// Bytes of the files of an unfinished folder.
pub(super) fn unfinished_bytes(target: &Path) -> u64 {
    let entries = fs::read_dir(hidden(target)).into_iter().flatten();
    let files = entries.flatten().filter_map(|entry| entry.metadata().ok());
    files.map(|metadata| metadata.len()).sum()
}

fn hidden(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.converting"))
}

fn refuse_existing(target: &Path) -> Result<()> {
    let Ok(metadata) = fs::metadata(target) else {
        return Ok(());
    };
    let refuse = |problem: &str| CheckpointError::CannotWrite {
        path: target.to_owned(),
        problem: problem.to_owned(),
    };
    if !metadata.is_dir() {
        return Err(refuse("a file is in the way; choose another name"));
    }
    let mut entries =
        fs::read_dir(target).map_err(|error| CheckpointError::io("read", target, error))?;
    if entries.next().is_some() {
        return Err(refuse(
            "it exists already; remove it or choose another name",
        ));
    }
    Ok(())
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error| CheckpointError::io("write", path, error))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|error| CheckpointError::io("rename", from, error))
}
