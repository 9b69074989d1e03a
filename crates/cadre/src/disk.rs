//! Measuring how fast a disk is read: of which file, and how the result is told.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cadre_store::probe::{self, DiskSpeed, Plan};
use cadre_store::reader::{OpenFile, best};
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::machine::{Disk, device_of};
use crate::output::bytes;

/// Of the file that is written where there is none to read. Every piece is read about as often as any other, so it must be
/// larger than what disks remember.
const FILE_BYTES: usize = 512 << 20;
/// Shorter files are within what disks remember.
const ENOUGH_BYTES: u64 = 64 << 20;
const BLOCK_BYTES: usize = 1 << 20;

/// One measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    /// The file or folder.
    path: String,
    /// The device that holds it.
    device: Option<String>,
    bytes_per_second: f64,
    /// Requests at a time, and bytes of each, from which on there is nothing to gain.
    lanes: usize,
    request_bytes: usize,
    /// Of one read of 4 KiB.
    latency_seconds: f64,
    /// Whether the cache of the system was out of the way. If not, memory may have been measured.
    direct: bool,
    /// The best way of reading that this system has.
    reader: &'static str,
    /// Why that is not io_uring.
    reader_fell_back: Option<String>,
    points: Vec<Point>,
}

/// Everything that was tried.
#[derive(Debug, Serialize)]
struct Point {
    lanes: usize,
    request_bytes: usize,
    bytes_per_second: f64,
}

impl Measured {
    fn new(path: &Path, speed: DiskSpeed, reader_fell_back: Option<String>) -> Self {
        let points = speed.points.iter().map(|point| Point {
            lanes: point.lanes,
            request_bytes: point.request_bytes,
            bytes_per_second: point.bytes_per_second,
        });
        Self {
            path: path.display().to_string(),
            device: device_of(path),
            bytes_per_second: speed.bytes_per_second,
            lanes: speed.lanes,
            request_bytes: speed.request_bytes,
            latency_seconds: speed.latency.as_secs_f64(),
            direct: speed.is_direct,
            reader: speed.reader,
            reader_fell_back,
            points: points.collect(),
        }
    }

    /// What later runs want to know, and of which device.
    pub(crate) fn remembered(&self) -> Option<(&str, Disk)> {
        let disk = Disk {
            bytes_per_second: self.bytes_per_second,
            latency_seconds: self.latency_seconds,
            lanes: self.lanes,
            request_bytes: self.request_bytes,
            reader: self.reader.to_owned(),
            direct: self.direct,
        };
        Some((self.device.as_deref()?, disk))
    }

    /// How fast it is, for people.
    pub(crate) fn speed_text(&self) -> String {
        let rate = self.bytes_per_second / 1e9;
        let small = self.latency_seconds * 1e3;
        let how = match self.direct {
            true => "past the cache of the system",
            false => "through the cache of the system, so perhaps not the disk itself",
        };
        let device = self.device.as_deref().unwrap_or("unknown device");
        format!(
            "{rate:.2} GB/s in random pieces of {} ({device}), {small:.2} ms for 4 KiB; {how}",
            self.path
        )
    }

    /// What experts are read with, for people.
    pub(crate) fn choice_text(&self) -> String {
        let why = match &self.reader_fell_back {
            Some(why) => format!(" (io_uring is refused: {why})"),
            None => String::new(),
        };
        format!(
            "experts with {}{why}; {} requests of {} at a time are enough",
            self.reader,
            self.lanes,
            bytes(self.request_bytes as u64)
        )
    }
}

/// Measures the disk that holds `path`: by reading that file or the largest of that folder, or, where these are small, a
/// temporary file beside it, which is removed.
pub(crate) fn measure(path: &Path) -> Result<Measured> {
    let shown = path.display();
    if let Some(file) = large_file(path) {
        return measure_file(&file, &file);
    }
    let folder = match path.is_dir() {
        true => path,
        false => path.parent().unwrap_or(path),
    };
    let file = written(folder).with_context(|| {
        format!(
            "cannot write a file of {} to {shown}",
            bytes(FILE_BYTES as u64)
        )
    })?;
    measure_file(folder, file.path())
}

/// Whether [`measure`] finds a file of `path` to read.
pub(crate) fn is_large(path: &Path) -> bool {
    large_file(path).is_some()
}

fn measure_file(shown: &Path, file: &Path) -> Result<Measured> {
    let file = OpenFile::open(file)?;
    let (_, fell_back) = best(1);
    let speed = probe::measure(&file, &Plan::default(), |lanes| best(lanes).0)?;
    Ok(Measured::new(
        shown,
        speed,
        fell_back.map(|why| why.to_string()),
    ))
}

/// The file that `path` means, if it is large enough.
fn large_file(path: &Path) -> Option<PathBuf> {
    let size = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        let is_enough = metadata.is_file() && metadata.len() >= ENOUGH_BYTES;
        is_enough.then_some(metadata.len())
    };
    if size(path).is_some() {
        return Some(path.to_owned());
    }
    let entries = fs::read_dir(path).ok()?.flatten();
    let files = entries.filter_map(|entry| Some((size(&entry.path())?, entry.path())));
    files.max().map(|(_, path)| path)
}

/// A temporary file in `folder`.
fn written(folder: &Path) -> Result<NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix(".cadre-doctor-")
        .tempfile_in(folder)?;
    // Not zeros, which some devices do not store.
    let block: Vec<u8> = (0..BLOCK_BYTES)
        .map(|at| (at * 31 + at / 251) as u8)
        .collect();
    for _ in 0..FILE_BYTES / BLOCK_BYTES {
        file.write_all(&block)?;
    }
    file.as_file().sync_all()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let error = measure(Path::new("/no/such/folder")).unwrap_err();
        assert!(error.to_string().contains("/no/such/folder"));
    }

    #[test]
    fn the_largest_file_of_a_folder_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str, n_bytes| {
            let path = folder.path().join(name);
            fs::File::create(&path).unwrap().set_len(n_bytes).unwrap();
            path
        };
        let small = make("a", 1000);
        assert_eq!(large_file(folder.path()), None);
        assert_eq!(large_file(&small), None);
        let largest = make("b", ENOUGH_BYTES + 1);
        make("c", ENOUGH_BYTES);
        assert_eq!(large_file(folder.path()), Some(largest.clone()));
        assert_eq!(large_file(&largest), Some(largest));
    }
}
