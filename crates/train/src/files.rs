//! Files that exist completely or not at all.

use crate::error::{Result, TrainError};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| TrainError::io("read", path, e))
}

pub(crate) fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| TrainError::io("create", path, e))
}

pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(TrainError::io("remove", path, e))
        }
        _ => Ok(()),
    }
}

pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(TrainError::io("remove", path, e))
        }
        _ => Ok(()),
    }
}

/// Writes and syncs; removes the file when that fails.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| {
        let _ = fs::remove_file(path);
        TrainError::io("write", path, e)
    })
}

/// Writes under a temporary name beside `path`, then renames.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    write_synced(&partial, bytes)?;
    rename(&partial, path)
}

/// Renames, and syncs the folder so that the new name survives a crash.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    let go = || {
        fs::rename(from, to)?;
        match to.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
            _ => Ok(()),
        }
    };
    go().map_err(|e| TrainError::io("rename to", to, e))
}
