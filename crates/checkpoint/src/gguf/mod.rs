//! The GGUF container: typed metadata and quantised tensors in one file, or split over several.
//!
//! Opening maps the files and reads their headers only; tensors are slices of the maps, and arrays of metadata are
//! decoded when they are asked for. Everything in a header is checked, see `header`. [`GgufWriter`] writes such files
//! tensor by tensor.

mod cursor;
mod encode;
mod get;
mod header;
mod journal;
mod outline;
mod partial;
mod plan;
mod split;
mod types;
mod value;
mod writer;

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;

use crate::error::{CheckpointError, Result};
use crate::map::FileMap;

pub use header::GgufTensor;
use header::Header;
pub use outline::{Outline, gguf_outline};
pub(crate) use partial::unfinished_bytes;
pub use plan::{GgufPlan, TensorPlan};
pub use value::{Array, Value, ValueType};
pub use writer::{GgufWriter, WriteOptions};

/// An open GGUF file, with all its parts when it is split.
pub struct Gguf {
    origin: String,
    entries: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<GgufTensor>,
    names: HashMap<String, usize>,
    /// The files that the tensors lie in.
    maps: Vec<FileMap>,
}

/// One file of the set.
struct Part {
    file: String,
    header: Header,
    map: Option<FileMap>,
}

/// What the `split.*` keys of a part say.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Split {
    no: usize,
    count: usize,
    n_tensors: Option<usize>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("origin", &self.origin)
            .field("n_keys", &self.entries.len())
            .field("n_tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

impl Gguf {
    /// Opens a GGUF file. When it is one part of a split file (`name-00002-of-00009.gguf`, any of them), the others are
    /// opened with it. The files stay mapped and must not be truncated by others meanwhile.
    ///
    /// # Errors
    /// A file that cannot be read, a missing part, and anything in a header that is damaged, contradictory or not
    /// known, by key or tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let first = Part::open(path)?;
        let Some(split) = first.split()? else {
            return Self::join(vec![first]);
        };
        let Some(paths) = split::all_parts(path, split.no, split.count) else {
            let name = split::part_name("NAME", split.no, split.count);
            return Err(damaged(
                &first.file,
                format!(
                    "it is part {} of {}; the parts are found by their names, so name it `{name}`",
                    split.no + 1,
                    split.count
                ),
            ));
        };
        if let Some(missing) = paths.iter().find(|path| !path.exists()) {
            return Err(CheckpointError::MissingFile {
                origin: path.display().to_string(),
                file: missing.display().to_string(),
                hint: format!(
                    "it is one of {} parts and all are needed; the download may be incomplete",
                    split.count
                ),
            });
        }
        let mut first = Some(first);
        let mut parts = Vec::new();
        for (no, path) in paths.iter().enumerate() {
            let part = match first.take_if(|_| no == split.no) {
                Some(part) => part,
                None => Part::open(path)?,
            };
            part.expect_split(Split { no, ..split })?;
            parts.push(part);
        }
        check_total(&parts, split)?;
        Self::join(parts)
    }

    /// Reads a GGUF file that is already in memory; `name` stands in for its path in errors.
    ///
    /// # Errors
    /// As [`Gguf::open`]; a part of a split file is refused.
    pub fn from_bytes(name: &str, bytes: Bytes) -> Result<Self> {
        let part = Part::read(name.to_owned(), &bytes)?;
        if let Some(split) = part.split()? {
            let problem = format!(
                "it is part {} of {}; open it by its path",
                split.no + 1,
                split.count
            );
            return Err(damaged(name, problem));
        }
        Self::join(vec![part])
    }

    /// Puts the parts together. The first has the metadata; others may repeat it, but not contradict it.
    /// A file that is not written yet: what its metadata will mean can be asked before.
    pub(crate) fn planned(
        origin: &str,
        entries: Vec<(String, Value)>,
        tensors: Vec<GgufTensor>,
    ) -> Result<Self> {
        let file = origin.to_owned();
        let header = Header { entries, tensors };
        Self::join(vec![Part {
            file,
            header,
            map: None,
        }])
    }

    fn join(parts: Vec<Part>) -> Result<Self> {
        let mut gguf = Self {
            origin: parts
                .first()
                .map(|part| part.file.clone())
                .unwrap_or_default(),
            entries: Vec::new(),
            keys: HashMap::new(),
            tensors: Vec::new(),
            names: HashMap::new(),
            maps: Vec::new(),
        };
        for part in parts {
            gguf.add(part)?;
        }
        tracing::debug!(?gguf, "opened");
        Ok(gguf)
    }

    fn add(&mut self, part: Part) -> Result<()> {
        let Part { file, header, map } = part;
        self.maps.extend(map);
        for (key, value) in header.entries {
            // How the file is split is no property of the model, and each part has its own alignment.
            if split::is_split_key(&key) || key == header::ALIGNMENT_KEY {
                continue;
            }
            if let Some(known) = self.value(&key) {
                if *known != value {
                    let problem = format!("key `{key}` is {value}, but {known} in {}", self.origin);
                    return Err(damaged(&file, problem));
                }
                continue;
            }
            self.keys.insert(key.clone(), self.entries.len());
            self.entries.push((key, value));
        }
        for tensor in header.tensors {
            if self.names.contains_key(&tensor.name) {
                let problem = format!("tensor `{}` is in an earlier part too", tensor.name);
                return Err(damaged(&file, problem));
            }
            self.names.insert(tensor.name.clone(), self.tensors.len());
            self.tensors.push(tensor);
        }
        Ok(())
    }

    /// The path or name of the (first) file.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The files that are mapped: none of one that is read from memory.
    pub(crate) fn maps(&self) -> &[FileMap] {
        &self.maps
    }

    /// All tensors, in the order of the files.
    #[must_use]
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor of this name, as the file spells it.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        Some(&self.tensors[*self.names.get(name)?])
    }

    /// All metadata, in the order of the file. Keys about the container itself (`split.*`, `general.alignment`) are
    /// not listed.
    #[must_use]
    pub fn entries(&self) -> &[(String, Value)] {
        &self.entries
    }

    /// The metadata keys, in the order of the file.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(key, _)| key.as_str())
    }

    /// The value of a metadata key.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&Value> {
        Some(&self.entries[*self.keys.get(key)?].1)
    }
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        let map = FileMap::open(path)?;
        let part = Self::read(path.display().to_string(), &map.bytes())?;
        Ok(Self {
            map: Some(map),
            ..part
        })
    }

    fn read(file: String, bytes: &Bytes) -> Result<Self> {
        match Header::read(bytes) {
            Ok(header) => Ok(Self {
                file,
                header,
                map: None,
            }),
            Err(problem) => Err(damaged(&file, problem)),
        }
    }

    /// What the file says about being split; `None` when it is whole.
    fn split(&self) -> Result<Option<Split>> {
        let Some(count) = self.size(split::COUNT_KEY)?.filter(|count| *count > 1) else {
            return Ok(None);
        };
        let no = self.size(split::NO_KEY)?;
        match no.filter(|no| *no < count) {
            Some(no) => Ok(Some(Split {
                no,
                count,
                n_tensors: self.size(split::TENSORS_KEY)?,
            })),
            None => Err(damaged(
                &self.file,
                format!(
                    "key `{}` is {no:?}, expected a number below `{}` = {count}",
                    split::NO_KEY,
                    split::COUNT_KEY
                ),
            )),
        }
    }

    /// A `split.*` key. The format has 16 bits for the number of parts, which bounds all work done for them.
    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some((_, value)) = self.header.entries.iter().find(|(known, _)| known == key) else {
            return Ok(None);
        };
        let most = if key == split::TENSORS_KEY {
            i128::from(i32::MAX)
        } else {
            i128::from(u16::MAX)
        };
        let size = value.as_integer().filter(|size| (0..=most).contains(size));
        match size.and_then(|size| usize::try_from(size).ok()) {
            Some(size) => Ok(Some(size)),
            None => Err(damaged(
                &self.file,
                format!("key `{key}` is {value}, expected 0 to {most}"),
            )),
        }
    }

    fn expect_split(&self, expected: Split) -> Result<()> {
        if self.split()? == Some(expected) {
            return Ok(());
        }
        let show = |split: Option<Split>| match split {
            None => "a whole file".to_owned(),
            Some(Split {
                no,
                count,
                n_tensors: Some(n),
            }) => format!("part {} of {count} with {n} tensors in all", no + 1),
            Some(Split {
                no,
                count,
                n_tensors: None,
            }) => format!("part {} of {count}", no + 1),
        };
        let problem = format!(
            "it says that it is {}, but the others and its name say {}; the parts are not of one set",
            show(self.split()?),
            show(Some(expected))
        );
        Err(damaged(&self.file, problem))
    }
}

/// The parts together must have as many tensors as each of them says.
fn check_total(parts: &[Part], split: Split) -> Result<()> {
    let found: usize = parts.iter().map(|part| part.header.tensors.len()).sum();
    match split.n_tensors {
        Some(n) if n != found => {
            let problem = format!(
                "key `{}` is {n}, but the {} parts hold {found}",
                split::TENSORS_KEY,
                split.count
            );
            Err(damaged(&parts[0].file, problem))
        }
        _ => Ok(()),
    }
}

fn damaged(file: &str, problem: String) -> CheckpointError {
    CheckpointError::Gguf {
        file: file.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use cadre_kernels::Format;

    use super::encode::{EncodedTensor, encode_header};
    use super::*;

    /// A file with `values` (F32) as tensors of one dimension.
    fn file(entries: &[(&str, Value)], tensors: &[(&str, &[f32])]) -> Vec<u8> {
        let entries: Vec<(&str, &Value)> =
            entries.iter().map(|(key, value)| (*key, value)).collect();
        let shapes: Vec<[usize; 1]> = tensors.iter().map(|(_, values)| [values.len()]).collect();
        let mut data: Vec<u8> = Vec::new();
        let mut lines = Vec::new();
        for ((name, values), shape) in tensors.iter().zip(&shapes) {
            data.resize(data.len().next_multiple_of(32), 0);
            let offset = data.len() as u64;
            lines.push(EncodedTensor {
                name,
                shape,
                dtype: Format::F32,
                offset,
            });
            data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        [encode_header(&entries, lines.into_iter(), 32), data].concat()
    }

    fn open(bytes: Vec<u8>) -> Result<Gguf> {
        Gguf::from_bytes("m.gguf", bytes.into())
    }

    fn small() -> Vec<u8> {
        let entries = [
            ("general.architecture", "olmoe".into()),
            ("olmoe.block_count", 2u32.into()),
            (
                "olmoe.feed_forward_length",
                Array::from(&[8u32, 16][..]).into(),
            ),
            ("olmoe.rope.freq_base", 1e4f32.into()),
            ("tokenizer.ggml.tokens", Array::of_texts(["a", "b"]).into()),
            ("tokenizer.ggml.add_bos_token", true.into()),
            ("olmoe.temperature", (-1i32).into()),
        ];
        file(&entries, &[("x", &[1.0, 2.0, 3.0]), ("y", &[4.0])])
    }

    #[test]
    fn values_and_tensors_come_out() {
        let gguf = open(small()).unwrap();
        assert_eq!(gguf.text("general.architecture").unwrap(), "olmoe");
        assert_eq!(gguf.size("olmoe.block_count").unwrap(), 2);
        assert_eq!(gguf.f32("olmoe.rope.freq_base").unwrap(), 1e4);
        assert_eq!(gguf.strings("tokenizer.ggml.tokens").unwrap(), ["a", "b"]);
        assert!(gguf.flag("tokenizer.ggml.add_bos_token").unwrap());
        let per_layer = |key| gguf.sizes_per_layer(key, 2).unwrap();
        assert_eq!(per_layer("olmoe.feed_forward_length"), Some(vec![8, 16]));
        assert_eq!(per_layer("olmoe.block_count"), Some(vec![2, 2]));
        assert_eq!(per_layer("olmoe.nothing"), None);
        let x = gguf.tensor("x").unwrap();
        assert_eq!((x.dtype, &*x.shape), (Format::F32, &[3][..]));
        assert_eq!(x.dtype.decode(&x.bytes), [1.0, 2.0, 3.0]);
        assert_eq!(
            gguf.tensor("y")
                .unwrap()
                .dtype
                .decode(&gguf.tensors()[1].bytes),
            [4.0]
        );
        assert!(gguf.tensor("z").is_none());
    }

    #[test]
    fn getters_name_file_and_key() {
        let gguf = open(small()).unwrap();
        let text = |error: CheckpointError| error.to_string();
        assert_eq!(
            text(gguf.size("n").unwrap_err()),
            "m.gguf: key `n` is missing"
        );
        let error = text(gguf.size("olmoe.temperature").unwrap_err());
        assert_eq!(
            error,
            "m.gguf: key `olmoe.temperature` is -1 (i32), expected an integer that is not negative"
        );
        let error = text(
            gguf.sizes_per_layer("olmoe.feed_forward_length", 3)
                .unwrap_err(),
        );
        assert!(error.contains("one for each of the 3 layers"), "{error}");
        assert!(
            gguf.sizes_per_layer("olmoe.block_count", usize::MAX)
                .is_err()
        );
        assert_eq!(gguf.layers("olmoe.block_count").unwrap(), 2);
        let error = text(gguf.text("tokenizer.ggml.tokens").unwrap_err());
        assert!(
            error.contains("[text; 2] (array), expected text"),
            "{error}"
        );
    }

    #[test]
    fn every_prefix_is_refused() {
        let bytes = small();
        for cut in 0..bytes.len() {
            let error = open(bytes[..cut].to_vec()).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("m.gguf cannot be read as GGUF"),
                "{cut}: {error}"
            );
        }
    }

    /// The three parts of a split file, with `count` in the second, in a folder.
    fn parts(count: u16) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (no, count) in [3, count, 3].into_iter().enumerate() {
            let mut entries = vec![
                ("split.no", Value::U16(no as u16)),
                ("split.count", Value::U16(count)),
                ("split.tensors.count", Value::I32(3)),
            ];
            if no == 0 {
                entries.push(("general.architecture", "olmoe".into()));
            }
            let name = format!("t{no}");
            let bytes = file(&entries, &[(&name, &[no as f32])]);
            std::fs::write(folder.path().join(split::part_name("m", no, 3)), bytes).unwrap();
        }
        folder
    }

    #[test]
    fn any_part_opens_all() {
        let folder = parts(3);
        for no in 0..3 {
            let gguf = Gguf::open(&folder.path().join(split::part_name("m", no, 3))).unwrap();
            let values = |tensor: &GgufTensor| tensor.dtype.decode(&tensor.bytes)[0];
            assert_eq!(
                gguf.tensors().iter().map(values).collect::<Vec<_>>(),
                [0.0, 1.0, 2.0]
            );
            assert_eq!(gguf.keys().collect::<Vec<_>>(), ["general.architecture"]);
        }
    }

    #[test]
    fn missing_misnamed_and_foreign_parts_are_named() {
        let folder = parts(3);
        let part = |no| folder.path().join(split::part_name("m", no, 3));
        std::fs::rename(part(1), folder.path().join("other.gguf")).unwrap();
        let error = Gguf::open(&part(0)).unwrap_err().to_string();
        assert!(
            error.contains("m-00002-of-00003.gguf") && error.contains("3 parts"),
            "{error}"
        );
        let error = Gguf::open(&folder.path().join("other.gguf"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("part 2 of 3") && error.contains("`NAME-00002-of-00003.gguf`"),
            "{error}"
        );
        let folder = parts(4);
        let error = Gguf::open(&folder.path().join("m-00001-of-00003.gguf"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("part 2 of 4 with 3 tensors") && error.contains("part 2 of 3"),
            "{error}"
        );
    }
}
