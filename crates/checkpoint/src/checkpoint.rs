//! Opening a checkpoint and handing out its configuration, tensors and tokenizer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bytes::Bytes;

use crate::Dtype;
use crate::config::ModelConfig;
use crate::digest;
use crate::error::{CheckpointError, Result};
use crate::gguf::Gguf;
use crate::gguf_models;
use crate::map::FileMap;
use crate::shards::{Blob, Shards};
use crate::tensors::{BlockScales, Data, Entry, Tensors};
use crate::text::{GgufVocab, Tokenizer};

/// File names and contents of a checkpoint that is part of the program.
pub type EmbeddedFiles = &'static [(&'static str, &'static [u8])];

/// Where the files come from.
enum Source {
    Folder(PathBuf),
    Embedded(EmbeddedFiles),
    Gguf(Box<Gguf>),
}

/// An open checkpoint. Tensors stay on disk (mapped) until they are asked for.
pub struct Checkpoint {
    origin: String,
    source: Source,
    config: ModelConfig,
    tensors: Tensors,
    /// Mapped files of a folder.
    maps: Vec<FileMap>,
    digest: OnceLock<String>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("origin", &self.origin)
            .field("config", &self.config)
            .field("n_tensors", &self.tensors.map.len())
            .finish_non_exhaustive()
    }
}

/// One tensor: its number format, shape (row-major) and little-endian bytes.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    /// Number format of `bytes`.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: &'a [usize],
    /// The values, not necessarily aligned: a piece of the mapped file wherever the file has them in this order.
    pub bytes: Bytes,
    /// What 8-bit floats are multiplied by.
    pub scales: Option<&'a BlockScales>,
}

impl TensorView<'_> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as `f32`, scales applied.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = self.dtype.decode(&self.bytes);
        if let (Some(scales), Some(&cols)) = (self.scales, self.shape.last()) {
            let grid = cols.div_ceil(scales.block[1]);
            for (i, value) in values.iter_mut().enumerate() {
                let (row, col) = (i / cols / scales.block[0], i % cols / scales.block[1]);
                *value *= scales.values[row * grid + col];
            }
        }
        values
    }

    /// Flat index and value of the first NaN or infinity.
    #[must_use]
    pub fn first_non_finite(&self) -> Option<(usize, f32)> {
        // Blocks keep the temporary small for large tensors.
        const BLOCK: usize = 1 << 14;
        self.bytes
            .chunks(BLOCK / self.dtype.block_len() * self.dtype.block_bytes())
            .enumerate()
            .find_map(|(block, bytes)| {
                let values = self.dtype.decode(bytes);
                let at = values.iter().position(|value| !value.is_finite())?;
                Some((block * BLOCK + at, values[at]))
            })
    }
}

impl Checkpoint {
    /// Opens a Hugging Face folder (`config.json`, safetensors, single or sharded, and lazily
    /// `tokenizer.json`) or a `.gguf` file (any part of a split one). Only headers are read; tensor
    /// data is mapped, so the files must not be truncated by others while the checkpoint is in use.
    ///
    /// A folder is computed as transformers does, a GGUF file as llama.cpp does; they differ for
    /// some architectures, such as in how picked experts are weighted.
    ///
    /// # Errors
    /// A path that is neither, a configuration that is not understood, or damaged files.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file()
            && path
                .extension()
                .is_some_and(|extension| extension == "gguf")
        {
            return Self::from_gguf(Gguf::open(path)?);
        }
        check_folder(path)?;
        Self::load(path.display().to_string(), Source::Folder(path.to_owned()))
    }

    /// Opens a checkpoint whose files are part of the program; `name` stands in for a path in
    /// errors.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_embedded(name: &str, files: EmbeddedFiles) -> Result<Self> {
        Self::load(name.to_owned(), Source::Embedded(files))
    }

    fn load(origin: String, source: Source) -> Result<Self> {
        let text = source.text(&origin, "config.json")?;
        let config = text.ok_or_else(|| CheckpointError::MissingFile {
            origin: origin.clone(),
            file: "config.json".to_owned(),
            hint: "pass the folder that holds config.json and model.safetensors".to_owned(),
        })?;
        let generation = source.text(&origin, "generation_config.json")?;
        let config = ModelConfig::parse(&origin, &config, generation.as_deref())?;
        let shards = Shards::load(&origin, |name| source.blob(name))?;
        let tensors = Tensors::from_hugging_face(&config, shards.tensors)?;
        tracing::debug!(%origin, n_tensors = tensors.map.len(), "opened checkpoint");
        Ok(Self {
            origin,
            source,
            config,
            tensors,
            maps: shards.maps,
            digest: OnceLock::new(),
        })
    }

    /// The same under another name, for files that lie where nobody looks for them.
    #[must_use]
    pub fn with_origin(mut self, origin: String) -> Self {
        self.origin = origin;
        self
    }

    /// A checkpoint of an open GGUF file.
    ///
    /// # Errors
    /// An architecture or key that is not known, or tensors that do not belong to it.
    pub fn from_gguf(gguf: Gguf) -> Result<Self> {
        let config = gguf_models::read_config(&gguf)?;
        let tensors =
            gguf_models::canonical_tensors(gguf_models::architecture(&gguf)?, &config, &gguf)?;
        let origin = gguf.origin().to_owned();
        tracing::debug!(%origin, n_tensors = tensors.map.len(), "opened checkpoint");
        Ok(Self {
            origin,
            source: Source::Gguf(Box::new(gguf)),
            config,
            tensors,
            maps: Vec::new(),
            digest: OnceLock::new(),
        })
    }

    /// The GGUF file behind the checkpoint, if it is one.
    #[must_use]
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            _ => None,
        }
    }

    /// The configuration, dialects resolved.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether this is a GGUF file, whose models are computed as llama.cpp does; folders follow transformers.
    #[must_use]
    pub fn is_gguf(&self) -> bool {
        matches!(self.source, Source::Gguf(_))
    }

    /// The path or name under which the checkpoint was opened.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Bytes of tensor data.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        let entries = self.tensors.map.values();
        entries.map(|entry| entry.stored_bytes() as u64).sum()
    }

    /// Stored tensors that the computation does not use (such as multi-token prediction), each with the reason.
    pub fn ignored(&self) -> impl Iterator<Item = (&str, &'static str)> {
        let ignored = self.tensors.ignored.iter();
        ignored.map(|(name, reason)| (name.as_str(), *reason))
    }

    /// Hexadecimal identity of the model, the same however it is sharded or spelled.
    ///
    /// SHA-256 over what is computed from `config.json`, over the name, dtype and shape of every
    /// tensor, and over up to three 64-byte samples of each tensor's data: its first, middle and
    /// last bytes (small tensors entirely). It tells models apart; it does not prove integrity.
    #[must_use]
    pub fn digest(&self) -> &str {
        self.digest.get_or_init(|| {
            let tensors = self.tensors.sorted();
            // The system maps much more around each sample: of a large model, a good part of the file.
            digest::digest(&self.config, tensors.into_iter(), |bytes| {
                self.release(bytes);
            })
        })
    }

    fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let entry = self.tensors.map.get(name)?;
        // Callers go through tensors in about the order of the files.
        let _found = self.maps().any(|map| map.ask_ahead(entry.source()));
        let bytes = entry.bytes();
        if !matches!(entry.data, Data::Plain(_)) {
            // It was gathered: the view does not need the file any more.
            self.release(entry.source());
        }
        Some(TensorView {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes,
            scales: entry.scales.as_ref(),
        })
    }

    /// Takes mapped bytes of a tensor, or of a part of one, out of the process's memory, for callers that have made a
    /// copy of what they need. Nothing is lost: bytes that are touched again are read from the file again, most likely
    /// from the system's cache of it. Bytes that are in no mapped file of this checkpoint are left alone.
    pub fn release(&self, bytes: &[u8]) {
        let _found = self.maps().any(|map| map.release(bytes));
    }

    pub(crate) fn maps(&self) -> impl Iterator<Item = &FileMap> {
        let of_gguf = self.gguf().map_or(&[][..], Gguf::maps);
        self.maps.iter().chain(of_gguf)
    }

    /// Asks the system to read these mapped bytes and returns before they are there.
    pub(crate) fn ask_for(&self, bytes: &[u8]) {
        let found = self
            .maps()
            .find_map(|map| Some((map, map.range_of(bytes)?)));
        if let Some((map, range)) = found {
            map.ask_for(range);
        }
    }

    /// Takes all mapped pages out of the process's memory; see [`Checkpoint::release`].
    pub fn release_all(&self) {
        for map in self.maps() {
            map.release(&map.bytes());
        }
    }

    /// A large file of the checkpoint, by the map that it was opened with where there is one.
    pub(crate) fn blob(&self, name: &str) -> Result<Option<Blob>> {
        let is_it = |map: &&FileMap| map.path().file_name().is_some_and(|file| file == name);
        match self.maps.iter().find(is_it) {
            Some(map) => Ok(Some(Blob {
                bytes: map.bytes(),
                map: Some(map.clone()),
            })),
            None => self.source.blob(name),
        }
    }

    /// Puts experts of another checkpoint, by decoder layer and expert, in the place of this one's: in memory, and without
    /// a copy. The digest stays what it was if it has been asked for.
    ///
    /// # Errors
    /// The other has no such expert, or one of another shape.
    pub fn take_experts(
        &mut self,
        from: &Self,
        experts: impl IntoIterator<Item = (usize, usize)>,
    ) -> Result<()> {
        for (layer, expert) in experts {
            for part in ["gate_proj", "up_proj", "down_proj"] {
                for ending in ["weight", "bias"] {
                    let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}.{ending}");
                    let Some(entry) = self.tensors.map.get_mut(&name) else {
                        continue;
                    };
                    from.check_shape(&name, &entry.shape)?;
                    if let Some(other) = from.entry(&name) {
                        *entry = other.clone();
                    }
                }
            }
        }
        for map in from.maps() {
            if self.maps().all(|known| known.path() != map.path()) {
                self.maps.push(map.clone());
            }
        }
        Ok(())
    }

    /// Number format and shape of a tensor, without touching its values.
    #[must_use]
    pub fn tensor_info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        let entry = self.tensors.map.get(name)?;
        Some((entry.dtype, &entry.shape))
    }

    /// What the file calls a tensor: the name to use in messages.
    #[must_use]
    pub fn stored_name<'a>(&'a self, name: &'a str) -> &'a str {
        self.entry(name).map_or(name, |entry| &entry.stored)
    }

    pub(crate) fn entry(&self, name: &str) -> Option<&Entry> {
        self.tensors.map.get(name)
    }

    /// Name, number format and shape of every tensor, in the order of the files, without touching their values.
    pub fn tensor_infos(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        let tensors = self.tensors.map.iter();
        tensors.map(|(name, entry)| (name.as_str(), entry.dtype, &*entry.shape))
    }

    /// Names of all tensors, sorted. Stacked expert tensors appear under per-expert names.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        let tensors = self.tensors.sorted().into_iter();
        tensors.map(|(name, _)| name.as_str())
    }

    /// A tensor as it is stored.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`] when there is none of this name.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name)
            .ok_or_else(|| CheckpointError::MissingTensor {
                origin: self.origin.clone(),
                name: name.to_owned(),
                shape: Vec::new(),
                n_missing: 1,
            })
    }

    /// A tensor of exactly this shape.
    ///
    /// # Errors
    /// The tensor is missing or has another shape.
    pub fn tensor_shaped(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>> {
        self.check_shape(name, shape)?;
        self.tensor(name)
    }

    fn check_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        let Some(entry) = self.entry(name) else {
            return Err(CheckpointError::MissingTensor {
                origin: self.origin.clone(),
                name: name.to_owned(),
                shape: shape.to_vec(),
                n_missing: 1,
            });
        };
        if entry.shape == shape {
            return Ok(());
        }
        Err(CheckpointError::WrongShape {
            origin: self.origin.clone(),
            name: said(name, &entry.stored),
            found: entry.shape.clone(),
            expected: shape.to_vec(),
        })
    }

    /// The values of a tensor of exactly this shape, all finite.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or holds NaN or an infinity.
    pub fn tensor_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let view = self.tensor_shaped(name, shape)?;
        let values = view.to_f32();
        self.release(&view.bytes);
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(self.non_finite(name, index, values[index])),
            None => Ok(values),
        }
    }

    /// Refuses a tensor that holds NaN or an infinity; for readers that keep the stored bytes.
    ///
    /// # Errors
    /// The tensor is missing or not finite.
    pub fn check_finite(&self, name: &str) -> Result<()> {
        match self.tensor(name)?.first_non_finite() {
            Some((index, value)) => Err(self.non_finite(name, index, value)),
            None => Ok(()),
        }
    }

    fn non_finite(&self, name: &str, index: usize, value: f32) -> CheckpointError {
        let origin = self.origin.clone();
        CheckpointError::NonFinite {
            origin,
            name: said(name, self.stored_name(name)),
            index,
            value,
        }
    }

    /// Checks that the checkpoint holds exactly these tensors, as [`crate::tensor_specs`] lists
    /// them.
    ///
    /// # Errors
    /// The first missing, unexpected or wrongly shaped tensor, by name.
    pub fn expect_exactly(&self, specs: &[(String, Vec<usize>)]) -> Result<()> {
        let stored = &self.tensors.map;
        // Both sides have every name once, so equal numbers and a place for every spec leave nothing over.
        let is_there = |(name, shape): &(String, Vec<usize>)| {
            stored.get(name).is_some_and(|entry| entry.shape == *shape)
        };
        if specs.len() == stored.len() && specs.iter().all(is_there) {
            return Ok(());
        }
        let mut missing = specs.iter().filter(|(name, _)| !stored.contains_key(name));
        if let Some((name, shape)) = missing.next() {
            return Err(CheckpointError::MissingTensor {
                origin: self.origin.clone(),
                name: name.clone(),
                shape: shape.clone(),
                n_missing: 1 + missing.count(),
            });
        }
        let wanted: HashMap<&str, &Vec<usize>> = specs
            .iter()
            .map(|(name, shape)| (name.as_str(), shape))
            .collect();
        let sorted = self.tensors.sorted().into_iter();
        let mut unexpected = sorted.filter(|(name, _)| !wanted.contains_key(name.as_str()));
        if let Some((name, entry)) = unexpected.next() {
            return Err(CheckpointError::UnexpectedTensor {
                origin: self.origin.clone(),
                name: said(name, &entry.stored),
                shape: entry.shape.clone(),
                n_unexpected: 1 + unexpected.count(),
            });
        }
        specs
            .iter()
            .try_for_each(|(name, shape)| self.check_shape(name, shape))
    }

    /// The tokenizer of the checkpoint.
    ///
    /// # Errors
    /// There is no `tokenizer.json` or vocabulary, or it is not understood.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        if let Some(gguf) = self.gguf() {
            return Tokenizer::from_gguf_vocab(&self.vocab(gguf)?);
        }
        Tokenizer::from_json(
            &format!("{}/tokenizer.json", self.origin),
            &self.tokenizer_json()?,
        )
    }

    /// The vocabulary of a GGUF file; files made without one say so.
    pub(crate) fn vocab(&self, gguf: &Gguf) -> Result<GgufVocab> {
        const KEY: &str = "tokenizer.ggml.model";
        match gguf.text_opt(KEY)? {
            None | Some("none" | "no_vocab") => Err(CheckpointError::MissingFile {
                origin: self.origin.clone(),
                file: format!("vocabulary ({KEY})"),
                hint: "text goes in and out only with one; use token ids".to_owned(),
            }),
            Some(_) => GgufVocab::read(gguf),
        }
    }

    /// The text of another file of the checkpoint, such as `profile.json`, if it is there.
    ///
    /// # Errors
    /// The file cannot be read or is not UTF-8.
    pub fn file_text(&self, name: &str) -> Result<Option<String>> {
        self.source.text(&self.origin, name)
    }

    /// Size of another file of the checkpoint, if it is there; the file is not read.
    #[must_use]
    pub fn file_bytes(&self, name: &str) -> Option<u64> {
        match &self.source {
            Source::Embedded(files) => find(files, name).map(|bytes| bytes.len() as u64),
            Source::Folder(folder) => {
                let metadata = std::fs::metadata(folder.join(name)).ok()?;
                metadata.is_file().then_some(metadata.len())
            }
            Source::Gguf(_) => None,
        }
    }

    /// The files of a sub-folder whose names end in `extension`: name without it, and text, sorted by name.
    ///
    /// # Errors
    /// The folder is there and cannot be read, or a file is not UTF-8.
    pub(crate) fn folder_texts(
        &self,
        folder: &str,
        extension: &str,
    ) -> Result<Vec<(String, String)>> {
        let Source::Folder(root) = &self.source else {
            return Ok(Vec::new());
        };
        let path = root.join(folder);
        if !path.is_dir() {
            return Ok(Vec::new());
        }
        let read = |error| CheckpointError::io("read", &path, error);
        let mut texts = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(read)? {
            let file = entry.map_err(read)?.file_name();
            let file = file.to_string_lossy();
            if let Some(name) = file.strip_suffix(extension)
                && let Some(text) = self.file_text(&format!("{folder}/{file}"))?
            {
                texts.push((name.to_owned(), text));
            }
        }
        texts.sort();
        Ok(texts)
    }

    /// The text of `tokenizer.json`, for writing it into another folder.
    ///
    /// # Errors
    /// There is no `tokenizer.json`.
    pub fn tokenizer_json(&self) -> Result<String> {
        let text = self.file_text("tokenizer.json")?;
        text.ok_or_else(|| CheckpointError::MissingFile {
            origin: self.origin.clone(),
            file: "tokenizer.json".to_owned(),
            hint: "text goes in and out only with a tokenizer; copy tokenizer.json of the \
                   original model into the folder, or use token ids"
                .to_owned(),
        })
    }
}

impl Source {
    /// A small text file of the checkpoint, or `None` when it is absent.
    fn text(&self, origin: &str, name: &str) -> Result<Option<String>> {
        let bytes = match self {
            Self::Embedded(files) => find(files, name).map(<[u8]>::to_vec),
            Self::Gguf(_) => None,
            Self::Folder(folder) => {
                let path = folder.join(name);
                match std::fs::read(&path) {
                    Ok(bytes) => Some(bytes),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                    Err(error) => return Err(CheckpointError::io("read", &path, error)),
                }
            }
        };
        let text = bytes.map(String::from_utf8).transpose();
        text.map_err(|error| CheckpointError::Key {
            file: format!("{origin}/{name}"),
            key: "(whole file)".to_owned(),
            problem: format!("is not UTF-8: {error}"),
        })
    }

    /// A large file of the checkpoint, or `None` when it is absent.
    fn blob(&self, name: &str) -> Result<Option<Blob>> {
        match self {
            Self::Embedded(files) => Ok(find(files, name).map(|bytes| Blob {
                bytes: Bytes::from_static(bytes),
                map: None,
            })),
            Self::Gguf(_) => Ok(None),
            Self::Folder(folder) => {
                let path = folder.join(name);
                if !path.is_file() {
                    return Ok(None);
                }
                let map = FileMap::open(&path)?;
                Ok(Some(Blob {
                    bytes: map.bytes(),
                    map: Some(map),
                }))
            }
        }
    }
}

fn find(files: EmbeddedFiles, name: &str) -> Option<&'static [u8]> {
    files
        .iter()
        .find(|(file, _)| *file == name)
        .map(|(_, bytes)| *bytes)
}

/// A tensor's name in messages: what the file says, and what it stands for where that differs.
fn said(name: &str, stored: &str) -> String {
    if name == stored {
        name.to_owned()
    } else {
        format!("{stored}` (`{name}`)")
    }
}

/// Tells apart the ways in which a path is not a checkpoint folder.
fn check_folder(path: &Path) -> Result<()> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => CheckpointError::NotFound {
            path: path.to_owned(),
        },
        _ => CheckpointError::io("open", path, error),
    })?;
    if metadata.is_dir() {
        return Ok(());
    }
    let extension = path
        .extension()
        .and_then(|extension| extension.to_str())
        .unwrap_or("");
    let hint = match extension {
        "safetensors" | "json" => "pass the folder that holds it".to_owned(),
        _ => "pass a .gguf file, or the folder that holds config.json and model.safetensors"
            .to_owned(),
    };
    Err(CheckpointError::NotAFolder {
        path: path.to_owned(),
        hint,
    })
}
