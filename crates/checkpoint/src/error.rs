//! The errors of this crate: each names the path, tensor or key, what was expected, and what to do.

use std::path::{Path, PathBuf};

/// Result with a [`CheckpointError`].
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// Everything that can be wrong with a checkpoint, its tokenizer, or writing one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The path given as a checkpoint does not exist.
    #[error("no checkpoint at {}: the path does not exist", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// The path exists but is not a folder.
    #[error("{} is not a checkpoint folder; {hint}", path.display())]
    NotAFolder {
        /// The path as given.
        path: PathBuf,
        /// What to pass instead.
        hint: String,
    },
    /// A file that a checkpoint needs is absent.
    #[error("checkpoint {origin} has no {file}; {hint}")]
    MissingFile {
        /// Folder, or name of the embedded checkpoint.
        origin: String,
        /// The file that was looked for.
        file: String,
        /// What to do.
        hint: String,
    },
    /// Reading or writing failed in the operating system.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// Verb: `read`, `write`, `create`, `rename`, ...
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Reason from the operating system.
        source: std::io::Error,
    },
    /// The device is full.
    #[error("no space left on the device while writing {}; free some space or choose another folder", path.display())]
    NoSpace {
        /// The file that was being written.
        path: PathBuf,
    },
    /// A JSON file does not parse.
    #[error("{file} is not valid JSON")]
    Json {
        /// File (with its origin).
        file: String,
        /// Position and reason.
        source: serde_json::Error,
    },
    /// A key of a JSON file has a value that cannot be used.
    #[error("{file}: key `{key}` {problem}")]
    Key {
        /// File (with its origin).
        file: String,
        /// Name of the key.
        key: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// The configuration asks for something that would be computed wrongly.
    #[error("{file}: `{key}` = {value} is not supported: {reason}")]
    Unsupported {
        /// File (with its origin).
        file: String,
        /// Name of the key.
        key: String,
        /// Its value.
        value: String,
        /// What is supported.
        reason: String,
    },
    /// A safetensors file is cut off or damaged.
    #[error("{file} is not a complete safetensors file: {problem}; fetch or write it again")]
    Safetensors {
        /// File (with its origin).
        file: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// A GGUF file is cut off, damaged, or holds something that is not known.
    #[error("{file} cannot be read as GGUF: {problem}")]
    Gguf {
        /// The file.
        file: String,
        /// What was expected and what was found, with the key or tensor.
        problem: String,
    },
    /// A file cannot be written as asked.
    #[error("cannot write {}: {problem}", path.display())]
    CannotWrite {
        /// The file.
        path: PathBuf,
        /// What is in the way, with the key or tensor.
        problem: String,
    },
    /// The index and its shards disagree.
    #[error("{file}: {problem}")]
    Index {
        /// Index file (with its origin).
        file: String,
        /// The contradiction.
        problem: String,
    },
    /// Tensors were to be read from a file, and are a part of the program.
    #[error(
        "checkpoint {origin} is a part of the program, not a file that could be read piece by piece: run it in memory"
    )]
    NotInFile {
        /// Name of the checkpoint.
        origin: String,
    },
    /// The experts of a model cannot be changed as asked for.
    #[error("the experts of {origin} cannot be changed: {problem}")]
    Experts {
        /// Folder, file, or name of the embedded checkpoint.
        origin: String,
        /// What is in the way, with the layer or tensor, and what to do.
        problem: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error(
        "checkpoint {origin}: tensor `{name}` of shape {shape:?} is missing ({n_missing} missing in all)"
    )]
    MissingTensor {
        /// Folder, or name of the embedded checkpoint.
        origin: String,
        /// First missing tensor.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
        /// How many are missing.
        n_missing: usize,
    },
    /// A tensor is there that the architecture does not know.
    #[error(
        "checkpoint {origin}: tensor `{name}` of shape {shape:?} is unexpected ({n_unexpected} unexpected in all); it would be ignored silently, so the checkpoint is refused"
    )]
    UnexpectedTensor {
        /// Folder, or name of the embedded checkpoint.
        origin: String,
        /// First unexpected tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// How many are unexpected.
        n_unexpected: usize,
    },
    /// A tensor has another shape than the configuration implies.
    #[error(
        "checkpoint {origin}: tensor `{name}` has shape {found:?}, expected {expected:?} from config.json"
    )]
    WrongShape {
        /// Folder, or name of the embedded checkpoint.
        origin: String,
        /// The tensor.
        name: String,
        /// Shape on disk.
        found: Vec<usize>,
        /// Shape implied by the configuration.
        expected: Vec<usize>,
    },
    /// A tensor has a number format that is not read.
    #[error(
        "checkpoint {origin}: tensor `{name}` has dtype {dtype}; read are F32, F16, BF16, F8_E4M3 and (packed) U8"
    )]
    UnsupportedDtype {
        /// Folder, or name of the embedded checkpoint.
        origin: String,
        /// The tensor.
        name: String,
        /// The dtype in the header.
        dtype: String,
    },
    /// A tensor holds NaN or an infinity.
    #[error(
        "checkpoint {origin}: tensor `{name}` holds {value} at flat index {index}; the weights are damaged or training diverged"
    )]
    NonFinite {
        /// Folder, or name of the embedded checkpoint.
        origin: String,
        /// The tensor.
        name: String,
        /// Flat row-major index of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// The tokenizer cannot be read, trained or applied.
    #[error("tokenizer {origin}: {problem}")]
    Tokenizer {
        /// File or checkpoint.
        origin: String,
        /// What went wrong.
        problem: String,
    },
    /// A chat template does not parse or fails.
    #[error("chat template {origin}, line {line}: {problem}")]
    ChatTemplate {
        /// File (with its origin) or key.
        origin: String,
        /// Line of the template, from 1; 0 when it is not about a line.
        line: usize,
        /// What went wrong.
        problem: String,
    },
    /// A chat template refuses the conversation by itself, through `raise_exception`.
    #[error("chat template {origin}, line {line}, refuses the conversation: {message}")]
    ChatRefused {
        /// File (with its origin) or key.
        origin: String,
        /// Line of the template, from 1.
        line: usize,
        /// The template's own words.
        message: String,
    },
    /// Writing was asked to stop; what is there is kept.
    #[error("stopped before {} was complete; run the same again to go on", path.display())]
    Interrupted {
        /// What was being written.
        path: PathBuf,
    },
    /// The folder to write exists and holds files of somebody else.
    #[error("will not replace {}: it holds `{file}`, which Cadre did not write; choose another folder or empty it", path.display())]
    WouldOverwrite {
        /// Target folder.
        path: PathBuf,
        /// First foreign entry.
        file: String,
    },
}

impl CheckpointError {
    /// [`CheckpointError::Experts`] of the checkpoint `origin`.
    pub fn experts(origin: &str, problem: impl Into<String>) -> Self {
        Self::Experts {
            origin: origin.to_owned(),
            problem: problem.into(),
        }
    }

    /// Wraps an I/O error with its path; a full device becomes [`CheckpointError::NoSpace`].
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::StorageFull {
            return Self::NoSpace {
                path: path.to_owned(),
            };
        }
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_device_has_its_own_message() {
        let full = std::io::ErrorKind::StorageFull.into();
        let error = CheckpointError::io("write", Path::new("m/config.json"), full);
        let text = error.to_string();
        assert!(
            text.contains("no space left") && text.contains("m/config.json"),
            "{text}"
        );
        let denied = std::io::ErrorKind::PermissionDenied.into();
        let error = CheckpointError::io("write", Path::new("m"), denied);
        assert_eq!(error.to_string(), "cannot write m");
    }
}
