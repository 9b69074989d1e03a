//! Hidden, unfinished files beside their targets: names, verification, and opening them again.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::journal::stale_parts;
use super::plan::{PartLayout, Slot, part_paths};
use crate::error::{CheckpointError, Result};

/// Bytes of the buffers for reading and writing.
pub(super) const BUFFER: usize = 1 << 20;

/// How many of the first tensors of a part are as their checksums say; none when the header is another.
pub(super) fn verify(
    path: &Path,
    part: &PartLayout,
    slots: &[Slot],
    crcs: &[u32],
) -> std::io::Result<usize> {
    let mut file = BufReader::with_capacity(BUFFER, File::open(path)?);
    let n_bytes = file.get_ref().metadata()?.len();
    if n_bytes < part.header.len() as u64 {
        return Ok(0);
    }
    let mut header = vec![0; part.header.len()];
    file.read_exact(&mut header)?;
    if header != part.header {
        return Ok(0);
    }
    let mut buffer = vec![0; BUFFER];
    for (at, (slot, expected)) in slots.iter().zip(crcs).enumerate() {
        if n_bytes < part.header.len() as u64 + slot.offset + slot.padded {
            return Ok(at);
        }
        let mut crc = crc32fast::Hasher::new();
        let mut left = slot.padded;
        while left > 0 {
            let piece = &mut buffer[..left.min(BUFFER as u64) as usize];
            file.read_exact(piece)?;
            crc.update(piece);
            left -= piece.len() as u64;
        }
        if crc.finalize() != *expected {
            return Ok(at);
        }
    }
    Ok(crcs.len())
}

/// Opens `path` to be continued at byte `end`; what follows is cut off.
pub(super) fn append_at(path: &Path, end: u64) -> Result<BufWriter<File>> {
    let open = || {
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.set_len(end)?;
        file.seek(SeekFrom::Start(end))?;
        Ok(BufWriter::with_capacity(BUFFER, file))
    };
    open().map_err(|error| CheckpointError::io("write", path, error))
}

/// Waits until `path` is on the device.
pub(super) fn sync(path: &Path) -> Result<()> {
    let synced = OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.sync_all());
    synced.map_err(|error| CheckpointError::io("sync", path, error))
}

/// Bytes of the files that an unfinished writer left at `target`.
pub(crate) fn unfinished_bytes(target: &Path) -> u64 {
    let journal = fs::read(hidden(target, "journal")).unwrap_or_default();
    let n_parts = stale_parts(&journal).unwrap_or(0);
    let paths = part_paths(target, n_parts).unwrap_or_default();
    let sizes = paths
        .iter()
        .filter_map(|path| fs::metadata(hidden(path, "partial")).ok());
    sizes.map(|metadata| metadata.len()).sum()
}

/// `.NAME.what` beside `path`.
pub(super) fn hidden(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{what}"))
}

/// Removes `path` if it is there.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(CheckpointError::io("remove", path, error))
        }
        _ => Ok(()),
    }
}
