//! Opening a checkpoint and handing out its configuration, tensors and tokenizer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::config::ModelConfig;
use crate::digest;
use crate::dtype::Dtype;
use crate::error::{CheckpointError, Result};
use crate::shards::{Blob, Shards};
use crate::text::Tokenizer;

/// File names and contents of a checkpoint that is part of the program.
pub type EmbeddedFiles = &'static [(&'static str, &'static [u8])];

/// Where the files come from.
enum Source {
    Folder(PathBuf),
    Embedded(EmbeddedFiles),
}

/// An open checkpoint. Tensors stay on disk (mapped) until they are asked for.
pub struct Checkpoint {
    origin: String,
    source: Source,
    config: ModelConfig,
    shards: Shards,
    digest: OnceLock<String>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("origin", &self.origin)
            .field("config", &self.config)
            .field("n_tensors", &self.shards.tensors.len())
            .finish_non_exhaustive()
    }
}

/// One tensor: its number format, shape (row-major) and little-endian bytes.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Number format of `bytes`.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: &'a [usize],
    /// The values; `shape.product() * dtype.size()` bytes, not necessarily aligned.
    pub bytes: &'a [u8],
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

    /// The values, widened to `f32` where needed.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        self.dtype.decode(self.bytes)
    }

    /// Flat index and value of the first NaN or infinity.
    #[must_use]
    pub fn first_non_finite(&self) -> Option<(usize, f32)> {
        // Blocks keep the temporary small for large tensors.
        const BLOCK: usize = 1 << 14;
        self.bytes
            .chunks(BLOCK * self.dtype.size())
            .enumerate()
            .find_map(|(block, bytes)| {
                let values = self.dtype.decode(bytes);
                let at = values.iter().position(|value| !value.is_finite())?;
                Some((block * BLOCK + at, values[at]))
            })
    }
}

impl Checkpoint {
    /// Opens a Hugging Face folder: `config.json`, safetensors (single or sharded), and lazily
    /// `tokenizer.json`. Only headers are read; tensor data is mapped, so the files must not be
    /// truncated by others while the checkpoint is in use.
    ///
    /// # Errors
    /// A path that is not such a folder, a configuration that is not understood, or damaged files.
    pub fn open(path: &Path) -> Result<Self> {
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
        tracing::debug!(%origin, n_tensors = shards.tensors.len(), "opened checkpoint");
        Ok(Self {
            origin,
            source,
            config,
            shards,
            digest: OnceLock::new(),
        })
    }

    /// The configuration, dialects resolved.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The path or name under which the checkpoint was opened.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Bytes of tensor data.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.shards
            .tensors
            .values()
            .map(|entry| entry.range.len() as u64)
            .sum()
    }

    /// Hexadecimal identity of the model, the same however it is sharded or spelled.
    ///
    /// SHA-256 over what is computed from `config.json`, over the name, dtype and shape of every
    /// tensor, and over up to three 64-byte samples of each tensor's data: its first, middle and
    /// last bytes (small tensors entirely). It tells models apart; it does not prove integrity.
    #[must_use]
    pub fn digest(&self) -> &str {
        self.digest.get_or_init(|| {
            let names = self.shards.tensors.keys();
            digest::digest(
                &self.config,
                names.filter_map(|name| Some((&**name, self.get(name)?))),
            )
        })
    }

    fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let entry = self.shards.tensors.get(name)?;
        let bytes = &self.shards.blobs[entry.shard].bytes()[entry.range.clone()];
        Some(TensorView {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes,
        })
    }

    /// Names of all tensors, sorted. Stacked expert tensors appear under per-expert names.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.shards.tensors.keys().map(String::as_str)
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
        let Some(view) = self.get(name) else {
            return Err(CheckpointError::MissingTensor {
                origin: self.origin.clone(),
                name: name.to_owned(),
                shape: shape.to_vec(),
                n_missing: 1,
            });
        };
        if view.shape != shape {
            return Err(CheckpointError::WrongShape {
                origin: self.origin.clone(),
                name: name.to_owned(),
                found: view.shape.to_vec(),
                expected: shape.to_vec(),
            });
        }
        Ok(view)
    }

    /// The values of a tensor of exactly this shape, all finite.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or holds NaN or an infinity.
    pub fn tensor_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values = self.tensor_shaped(name, shape)?.to_f32();
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
            name: name.to_owned(),
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
        let stored = &self.shards.tensors;
        let mut missing = specs.iter().filter(|(name, _)| !stored.contains_key(name));
        if let Some((name, shape)) = missing.next() {
            return Err(CheckpointError::MissingTensor {
                origin: self.origin.clone(),
                name: name.clone(),
                shape: shape.clone(),
                n_missing: 1 + missing.count(),
            });
        }
        let wanted: BTreeMap<&str, &Vec<usize>> = specs
            .iter()
            .map(|(name, shape)| (name.as_str(), shape))
            .collect();
        let mut unexpected = stored
            .iter()
            .filter(|(name, _)| !wanted.contains_key(name.as_str()));
        if let Some((name, entry)) = unexpected.next() {
            return Err(CheckpointError::UnexpectedTensor {
                origin: self.origin.clone(),
                name: name.clone(),
                shape: entry.shape.clone(),
                n_unexpected: 1 + unexpected.count(),
            });
        }
        specs
            .iter()
            .try_for_each(|(name, shape)| self.tensor_shaped(name, shape).map(|_| ()))
    }

    /// The tokenizer of the checkpoint.
    ///
    /// # Errors
    /// There is no `tokenizer.json`, or it does not parse.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::from_json(
            &format!("{}/tokenizer.json", self.origin),
            &self.tokenizer_json()?,
        )
    }

    /// The text of another file of the checkpoint, such as `profile.json`, if it is there.
    ///
    /// # Errors
    /// The file cannot be read or is not UTF-8.
    pub fn file_text(&self, name: &str) -> Result<Option<String>> {
        self.source.text(&self.origin, name)
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
            Self::Embedded(files) => Ok(find(files, name).map(Blob::Static)),
            Self::Folder(folder) => {
                let path = folder.join(name);
                if path.is_file() {
                    Blob::map(&path).map(Some)
                } else {
                    Ok(None)
                }
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
        "gguf" => "GGUF files are not read yet; pass a Hugging Face folder".to_owned(),
        _ => "pass the folder that holds config.json and model.safetensors".to_owned(),
    };
    Err(CheckpointError::NotAFolder {
        path: path.to_owned(),
        hint,
    })
}
