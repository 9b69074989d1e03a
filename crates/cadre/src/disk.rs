//! Measuring how fast a disk is read, past the cache of the system where that is possible.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

const FILE_BYTES: usize = 256 << 20;
const READ_BYTES: usize = 1 << 20;
/// Alignment that direct reads ask of buffers.
const ALIGN: usize = 4096;

/// One measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    folder: String,
    bytes_per_second: f64,
    read_bytes: usize,
    /// Whether the cache of the system was out of the way. If not, memory was measured.
    direct: bool,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.bytes_per_second / 1e9;
        let how = if self.direct {
            "direct"
        } else {
            "through the cache, so not the disk itself"
        };
        write!(
            f,
            "{rate:.2} GB/s in reads of 1 MiB at {} ({how})",
            self.folder
        )
    }
}

/// Writes a temporary file in `folder`, reads it in order, and removes it.
pub(crate) fn measure(folder: &Path) -> Result<Measured> {
    let shown = folder.display();
    let mut file = tempfile::Builder::new()
        .prefix(".cadre-doctor-")
        .tempfile_in(folder)
        .with_context(|| format!("cannot create a file in {shown}"))?;
    // Not zeros, which some devices do not store.
    let block: Vec<u8> = (0..READ_BYTES)
        .map(|at| (at * 31 + at / 251) as u8)
        .collect();
    for _ in 0..FILE_BYTES / READ_BYTES {
        file.write_all(&block)
            .with_context(|| format!("cannot write in {shown}"))?;
    }
    file.as_file()
        .sync_all()
        .with_context(|| format!("cannot write in {shown}"))?;
    let (reader, direct) = match open_direct(file.path()) {
        Ok(reader) => (reader, true),
        Err(_) => (File::open(file.path())?, false),
    };
    let seconds = read_through(reader).with_context(|| format!("cannot read in {shown}"))?;
    Ok(Measured {
        folder: shown.to_string(),
        bytes_per_second: FILE_BYTES as f64 / seconds,
        read_bytes: READ_BYTES,
        direct,
    })
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_path: &Path) -> std::io::Result<File> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Seconds for reading the whole file.
fn read_through(mut file: File) -> std::io::Result<f64> {
    let mut buffer = vec![0; READ_BYTES + ALIGN];
    let offset = buffer.as_ptr().align_offset(ALIGN);
    let aligned = &mut buffer[offset..offset + READ_BYTES];
    let start = Instant::now();
    while file.read(aligned)? > 0 {}
    Ok(start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let error = measure(Path::new("/no/such/folder")).unwrap_err();
        assert!(error.to_string().contains("/no/such/folder"));
    }
}
