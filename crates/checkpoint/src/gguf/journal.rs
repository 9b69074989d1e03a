//! The record of an unfinished GGUF file: which tensors are complete, so that writing can go on after a kill.
//!
//! A text file beside the target: a line with the identity of what is written and its number of parts, then the CRC-32
//! of every finished tensor on a line of its own, then `publish` once all data is on the device and only renames are
//! left. Lines are of fixed length; a torn last line does not count. The file is locked while it is in use.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{CheckpointError, Result};

const MAGIC: &str = "cadre-gguf-1";
const PUBLISH: &str = "publish\n";

/// Bytes of a line `t 0123abcd\n`.
const LINE: usize = 11;

/// An open and locked journal.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    start: u64,
}

/// What an earlier writer left.
#[derive(Debug, PartialEq)]
pub(super) enum Earlier {
    /// Nothing to go on from. If another file was begun here, it had this many parts.
    Nothing { stale_parts: Option<usize> },
    /// The CRCs of the tensors it finished.
    Tensors(Vec<u32>),
    /// All data; the renames may be done in part.
    Publishing,
}

impl Journal {
    /// Opens or makes the journal at `path` for the file of this `identity`.
    pub(super) fn open(path: &Path, identity: &str, n_parts: usize) -> Result<(Self, Earlier)> {
        let io = |action| move |error| CheckpointError::io(action, path, error);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(io("create"))?;
        lock(&file, path)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(io("read"))?;
        let head = format!("{MAGIC} {identity} {n_parts:05}\n");
        let start = head.len() as u64;
        let earlier = match text.strip_prefix(head.as_bytes()) {
            Some(rest) => parse(rest),
            None => Earlier::Nothing {
                stale_parts: stale_parts(&text),
            },
        };
        let mut journal = Self {
            path: path.to_owned(),
            file,
            start,
        };
        if let Earlier::Nothing { .. } = earlier {
            journal.truncate(0)?;
            journal.append(&head)?;
        }
        Ok((journal, earlier))
    }

    /// Forgets all but the first `n` finished tensors.
    pub(super) fn keep(&mut self, n: usize) -> Result<()> {
        self.truncate(self.start + (n * LINE) as u64)
    }

    /// Records the next tensor as finished.
    pub(super) fn finished(&mut self, crc: u32) -> Result<()> {
        self.append(&format!("t {crc:08x}\n"))
    }

    /// Records that all data is on the device.
    pub(super) fn publish(&mut self) -> Result<()> {
        self.append(PUBLISH)?;
        let sync = self.file.sync_all();
        sync.map_err(|error| CheckpointError::io("sync", &self.path, error))
    }

    /// Removes the journal: there is nothing left to go on from.
    pub(super) fn remove(self) -> Result<()> {
        let Self { path, file, .. } = self;
        // Some systems refuse to remove an open file.
        drop(file);
        fs::remove_file(&path).map_err(|error| CheckpointError::io("remove", &path, error))
    }

    fn truncate(&mut self, n_bytes: u64) -> Result<()> {
        let cut = self
            .file
            .set_len(n_bytes)
            .and_then(|()| self.file.seek(SeekFrom::End(0)));
        cut.map(|_| ())
            .map_err(|error| CheckpointError::io("write", &self.path, error))
    }

    fn append(&mut self, line: &str) -> Result<()> {
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|error| CheckpointError::io("write", &self.path, error))
    }
}

fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(CheckpointError::CannotWrite {
            path: path.to_owned(),
            problem: "another process is writing it".to_owned(),
        }),
        Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {
            tracing::warn!(path = %path.display(), "this file system has no locks");
            Ok(())
        }
        Err(TryLockError::Error(error)) => Err(CheckpointError::io("lock", path, error)),
    }
}

fn parse(lines: &[u8]) -> Earlier {
    let mut crcs = Vec::new();
    let mut rest = lines;
    while let Some((line, tail)) = rest.split_at_checked(LINE) {
        let crc = line
            .strip_prefix(b"t ")
            .and_then(|line| line.strip_suffix(b"\n"));
        let crc = crc.and_then(|hex| u32::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        let Some(crc) = crc else { break };
        crcs.push(crc);
        rest = tail;
    }
    if rest == PUBLISH.as_bytes() {
        return Earlier::Publishing;
    }
    Earlier::Tensors(crcs)
}

/// The number of parts in the first line of another file's journal.
pub(super) fn stale_parts(text: &[u8]) -> Option<usize> {
    let line = std::str::from_utf8(text).ok()?.lines().next()?;
    let (MAGIC, rest) = line.split_once(' ')? else {
        return None;
    };
    rest.split_once(' ')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, crcs: &[u32]) {
        let (mut journal, earlier) = Journal::open(path, "id", 1).unwrap();
        assert_eq!(earlier, Earlier::Nothing { stale_parts: None });
        for crc in crcs {
            journal.finished(*crc).unwrap();
        }
    }

    #[test]
    fn lines_come_back_and_a_torn_one_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j");
        write(&path, &[1, 0xffff_ffff]);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, [&whole[..], b"t 0000"].concat()).unwrap();
        let (mut journal, earlier) = Journal::open(&path, "id", 1).unwrap();
        assert_eq!(earlier, Earlier::Tensors(vec![1, 0xffff_ffff]));
        journal.keep(1).unwrap();
        journal.finished(7).unwrap();
        drop(journal);
        let (mut journal, earlier) = Journal::open(&path, "id", 1).unwrap();
        assert_eq!(earlier, Earlier::Tensors(vec![1, 7]));
        journal.keep(2).unwrap();
        journal.publish().unwrap();
        drop(journal);
        let (journal, earlier) = Journal::open(&path, "id", 1).unwrap();
        assert_eq!(earlier, Earlier::Publishing);
        journal.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn another_file_is_not_continued() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j");
        write(&path, &[1]);
        let (journal, earlier) = Journal::open(&path, "other", 3).unwrap();
        assert_eq!(
            earlier,
            Earlier::Nothing {
                stale_parts: Some(1)
            }
        );
        drop(journal);
        let (_, earlier) = Journal::open(&path, "other", 3).unwrap();
        assert_eq!(earlier, Earlier::Tensors(vec![]));
    }

    #[test]
    fn only_one_process_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j");
        let (_held, _) = Journal::open(&path, "id", 1).unwrap();
        let error = Journal::open(&path, "id", 1).err().unwrap().to_string();
        assert!(error.contains("another process"), "{error}");
    }
}
