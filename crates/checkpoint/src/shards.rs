//! The safetensors files of a checkpoint and the index over them.

use std::borrow::Cow;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fmt, panic, thread};

use ahash::{AHashMap, AHashSet};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use crate::error::{CheckpointError, Result};
use crate::map::FileMap;
use crate::safetensors_file::{StoredTensor, header_length, read_safetensors};
use crate::tensors::Raw;

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Bytes that are asked for when a file is opened: the header, or most of it.
const FIRST_ASKED: usize = 256 << 10;

/// All tensors of all shards.
#[derive(Default)]
pub(crate) struct Shards {
    pub(crate) tensors: Vec<Raw>,
    /// The files that are mapped for it.
    pub(crate) maps: Vec<FileMap>,
}

/// A file of the checkpoint.
pub(crate) struct Blob {
    pub(crate) bytes: Bytes,
    /// Where the bytes are, unless they are part of the program.
    pub(crate) map: Option<FileMap>,
}

impl Blob {
    fn ask_for(&self, range: Range<usize>) {
        if let Some(map) = &self.map {
            map.ask_for(range);
        }
    }
}

/// The part of `model.safetensors.index.json` that matters.
#[derive(Deserialize)]
struct IndexFile<'a> {
    #[serde(borrow)]
    weight_map: WeightMap<'a>,
}

/// Tensor names to file names, borrowed from the JSON where it has no escapes. No name is there twice.
struct WeightMap<'a> {
    /// Tensor names, to indices of `files`.
    tensors: AHashMap<Cow<'a, str>, usize>,
    /// File names, and how many tensors each has.
    files: Vec<(Cow<'a, str>, usize)>,
}

impl Shards {
    /// Reads the header of every shard. `fetch` gives a file of the checkpoint by its name, or
    /// `None` when there is none.
    pub(crate) fn load(origin: &str, fetch: impl Fn(&str) -> Result<Option<Blob>>) -> Result<Self> {
        if let Some(blob) = fetch(SINGLE)? {
            blob.ask_for(0..FIRST_ASKED);
            ask_for_header(&blob);
            return Ok(Self {
                tensors: read_shard(origin, SINGLE, &blob.bytes)?,
                maps: blob.map.into_iter().collect(),
            });
        }
        let Some(index) = fetch(INDEX)? else {
            return Err(CheckpointError::MissingFile {
                origin: origin.to_owned(),
                file: format!("{SINGLE} and no {INDEX}"),
                hint: "only safetensors checkpoints are read (not .bin, .pth or GGUF)".to_owned(),
            });
        };
        index.ask_for(0..index.bytes.len());
        let file = format!("{origin}/{INDEX}");
        let index: IndexFile<'_> =
            serde_json::from_slice(&index.bytes).map_err(|source| CheckpointError::Json {
                file: file.clone(),
                source,
            })?;
        let map = index.weight_map;
        let blobs = open_all(origin, &file, &map, fetch)?;
        let read = in_parallel(&blobs, |(no, blob)| {
            let tensors = read_shard(origin, &map.files[*no].0, &blob.bytes)?;
            check_against_index(&file, &map, *no, &tensors)?;
            Ok(tensors)
        });
        let mut shards = Self::default();
        for tensors in read {
            shards.tensors.extend(tensors?);
        }
        shards.maps = blobs.into_iter().filter_map(|(_, blob)| blob.map).collect();
        Ok(shards)
    }
}

/// The shards that the index `file` names, sorted by name, each with its number in the index. All are opened, and their
/// headers asked for, before the first is read.
fn open_all(
    origin: &str,
    file: &str,
    map: &WeightMap<'_>,
    fetch: impl Fn(&str) -> Result<Option<Blob>>,
) -> Result<Vec<(usize, Blob)>> {
    let mut order: Vec<usize> = (0..map.files.len()).collect();
    order.sort_unstable_by_key(|no| &map.files[*no].0);
    let mut blobs = Vec::with_capacity(order.len());
    for no in order {
        let name = &*map.files[no].0;
        if name.contains(['/', '\\']) {
            return Err(CheckpointError::Index {
                file: file.to_owned(),
                problem: format!("shard `{name}` is not a plain file name"),
            });
        }
        let blob = fetch(name)?.ok_or_else(|| CheckpointError::MissingFile {
            origin: origin.to_owned(),
            file: name.to_owned(),
            hint: format!("{INDEX} names it; the download may be incomplete"),
        })?;
        blob.ask_for(0..FIRST_ASKED);
        blobs.push((no, blob));
    }
    blobs.iter().for_each(|(_, blob)| ask_for_header(blob));
    Ok(blobs)
}

/// Asks for what opening the file did not ask for.
fn ask_for_header(blob: &Blob) {
    if let Some(length) = header_length(&blob.bytes).filter(|length| *length > FIRST_ASKED) {
        blob.ask_for(FIRST_ASKED..length);
    }
}

/// The tensors of one file.
fn read_shard(origin: &str, name: &str, bytes: &Bytes) -> Result<Vec<Raw>> {
    let file = format!("{origin}/{name}");
    let tensors = read_safetensors(&file, bytes)?;
    let file: Arc<str> = file.into();
    let raw = |tensor: StoredTensor| Raw {
        file: Arc::clone(&file),
        name: tensor.name,
        dtype: tensor.dtype,
        shape: tensor.shape,
        bytes: tensor.bytes,
    };
    Ok(tensors.into_iter().map(raw).collect())
}

/// `make` of every item, in their order, on as many threads as the system grants.
fn in_parallel<T: Sync, R: Send>(items: &[T], make: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let n_threads = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut made = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            match items.get(at) {
                Some(item) => made.push((at, make(item))),
                None => return made,
            }
        }
    };
    let mut made = thread::scope(|scope| {
        // A thread that the system refuses leaves its part to the others.
        let helpers: Vec<_> = (1..n_threads.min(items.len()))
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        let mut made = work();
        for helper in helpers {
            match helper.join() {
                Ok(more) => made.extend(more),
                Err(panic) => panic::resume_unwind(panic),
            }
        }
        made
    });
    made.sort_unstable_by_key(|(at, _)| *at);
    made.into_iter().map(|(_, made)| made).collect()
}

impl<'de: 'a, 'a> Deserialize<'de> for WeightMap<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Lines;
        impl<'de> Visitor<'de> for Lines {
            type Value = WeightMap<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut tensors = AHashMap::new();
                let mut files = Files::default();
                while let Some((Text(name), Text(file))) = map.next_entry()? {
                    match tensors.entry(name) {
                        Entry::Vacant(slot) => slot.insert(files.count(file)),
                        Entry::Occupied(slot) => {
                            let problem = format!("`{}` is there twice", slot.key());
                            return Err(A::Error::custom(problem));
                        }
                    };
                }
                Ok(WeightMap {
                    tensors,
                    files: files.list,
                })
            }
        }
        deserializer.deserialize_map(Lines)
    }
}

/// The files of an index while it is read.
#[derive(Default)]
struct Files<'a> {
    list: Vec<(Cow<'a, str>, usize)>,
    indices: AHashMap<Cow<'a, str>, usize>,
    last: usize,
}

impl<'a> Files<'a> {
    /// Index of `file`, which has one more tensor.
    fn count(&mut self, file: Cow<'a, str>) -> usize {
        // Neighbours in an index are mostly in the same file.
        if self.list.get(self.last).is_none_or(|last| last.0 != file) {
            self.last = match self.indices.entry(file) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(slot) => {
                    self.list.push((slot.key().clone(), 0));
                    *slot.insert(self.list.len() - 1)
                }
            };
        }
        self.list[self.last].1 += 1;
        self.last
    }
}

/// A text, borrowed unless it holds escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The header of shard `no` and its lines in the index must name the same tensors.
fn check_against_index(
    file: &str,
    weight_map: &WeightMap<'_>,
    no: usize,
    stored: &[Raw],
) -> Result<()> {
    let (shard, n_listed) = &weight_map.files[no];
    let complain = |problem: String| {
        Err(CheckpointError::Index {
            file: file.to_owned(),
            problem,
        })
    };
    for tensor in stored {
        let name = tensor.name.as_str();
        if weight_map.tensors.get(name) != Some(&no) {
            return complain(format!("does not say that tensor `{name}` is in {shard}"));
        }
    }
    // A header has every name once, so equal numbers leave no line over.
    if stored.len() == *n_listed {
        return Ok(());
    }
    let stored: AHashSet<&str> = stored.iter().map(|tensor| &*tensor.name).collect();
    let listed = weight_map.tensors.iter().filter(|(_, file)| **file == no);
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
