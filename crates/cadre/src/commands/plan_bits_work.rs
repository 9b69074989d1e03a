//! What `cadre plan bits` has beside its output until it is done: the model in every format, and what was measured.

use std::fs::{self, File, TryLockError};
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cadre_checkpoint::Checkpoint;
use cadre_engine::eval::Document;
use sha2::{Digest, Sha256};

/// Says what is measured.
const IDENTITY: &str = "identity";
/// Locked by the process whose folder it is.
const LOCK: &str = "lock";

/// The hidden folder.
pub(crate) struct Unfinished {
    folder: PathBuf,
    _lock: File,
}

impl Unfinished {
    /// The folder beside `output`, which is gone on with if it is of the same `identity` and emptied otherwise.
    pub(crate) fn begin(output: &Path, identity: &str) -> Result<Self> {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        let folder = output.with_file_name(format!(".{name}.bits"));
        let lock = begin(&folder, identity)
            .with_context(|| format!("cannot work in {}", folder.display()))?;
        Ok(Self {
            folder,
            _lock: lock,
        })
    }

    /// Its path.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of measurements.
    pub(crate) fn measurements(&self) -> PathBuf {
        self.folder.join("measured.jsonl")
    }

    /// Removes all of it.
    pub(crate) fn remove(&self) -> Result<()> {
        fs::remove_dir_all(&self.folder)
            .with_context(|| format!("cannot remove {}", self.folder.display()))
    }
}

fn begin(folder: &Path, identity: &str) -> Result<File, Error> {
    fs::create_dir_all(folder)?;
    let lock = File::create(folder.join(LOCK))?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::Error(error) => error,
        TryLockError::WouldBlock => Error::new(
            ErrorKind::ResourceBusy,
            "another process makes the same plan; wait for it, or choose another name",
        ),
    })?;
    let mark = folder.join(IDENTITY);
    if fs::read_to_string(&mark).is_ok_and(|known| known == identity) {
        return Ok(lock);
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() != LOCK {
            fs::remove_file(entry.path())?;
        }
    }
    fs::write(&mark, identity)?;
    Ok(lock)
}

/// What measurements depend on: neither on the limit nor on how experts are grouped and ranked.
pub(crate) fn identity(
    checkpoint: &Checkpoint,
    formats: &[String],
    (documents, window): (&[Document], usize),
) -> String {
    let mut hasher = Sha256::new();
    for document in documents {
        hasher.update((document.tokens.len() as u64).to_le_bytes());
        for token in &document.tokens {
            hasher.update(token.to_le_bytes());
        }
    }
    let digest = hasher.finalize();
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{} {} {window} {digest}\n",
        checkpoint.digest(),
        formats.join(",")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_gone_on_with_by_one_process_and_for_one_thing() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("bits.json");
        let work = Unfinished::begin(&output, "one").unwrap();
        fs::write(work.measurements(), "x").unwrap();
        let Err(error) = Unfinished::begin(&output, "one") else {
            panic!("two processes have one folder");
        };
        assert!(
            format!("{error:#}").contains("another process"),
            "{error:#}"
        );
        drop(work);
        let work = Unfinished::begin(&output, "one").unwrap();
        assert!(work.measurements().exists());
        drop(work);
        let work = Unfinished::begin(&output, "other").unwrap();
        assert!(!work.measurements().exists());
        work.remove().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
