//! Reading large pieces of files at once or in turns, past the system's cache: what is loaded before a model runs.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::error::{Result, StoreError};
use crate::reader::{Completion, OpenFile, Reader, Request, aligned};
use crate::store::StoreOptions;

/// A disk answers within this, or is asked again whether it has.
const PATIENCE: Duration = Duration::from_secs(1);

/// Reads pieces of files with many requests at a time.
pub struct BulkReader {
    files: Vec<OpenFile>,
    reader: Box<dyn Reader>,
    request_bytes: usize,
}

/// What is read as one.
struct Piece {
    range: Range<u64>,
    parts: Range<usize>,
}

/// A part of a piece: one request.
struct Part {
    offset: u64,
    /// Bytes that must come.
    n_needed: usize,
    is_here: bool,
    memory: BytesMut,
    failure: Option<std::io::Error>,
}

impl std::fmt::Debug for BulkReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BulkReader")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl BulkReader {
    /// Reads as `options` say.
    ///
    /// # Errors
    /// This system does not have the reader that they name.
    pub fn new(options: &StoreOptions) -> Result<Self> {
        Ok(Self {
            files: Vec::new(),
            reader: options.open_reader()?,
            request_bytes: options.request_bytes,
        })
    }

    /// Bytes `range` of the file at `path`.
    ///
    /// # Errors
    /// The file cannot be opened or read, or ends before the range does.
    pub fn read(&mut self, path: &Path, range: &Range<u64>) -> Result<Bytes> {
        let pieces = self.read_all(path, std::slice::from_ref(range))?;
        Ok(pieces.into_iter().next().unwrap_or_default())
    }

    /// Bytes of each of `ranges` of the file at `path`, all asked for at once.
    ///
    /// # Errors
    /// As [`BulkReader::read`].
    pub fn read_all(&mut self, path: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let at = self.file(path)?;
        let mut parts = Vec::new();
        let pieces: Vec<Piece> = ranges
            .iter()
            .map(|range| self.ask(at, range.clone(), &mut parts))
            .collect();
        let all = 0..parts.len();
        self.wait(at, &mut parts, &all)?;
        Ok(pieces
            .into_iter()
            .map(|piece| self.join(at, piece, &mut parts))
            .collect())
    }

    /// Calls `take` for bytes `range` of the file at `path`, `n_bytes` at a time, in order: while it works on some, the next
    /// are read. So no more than two times `n_bytes` are in memory.
    ///
    /// # Errors
    /// As [`BulkReader::read`], and what `take` says; nothing is read behind it.
    ///
    /// # Panics
    /// When `n_bytes` is 0.
    pub fn read_in_turns<E: From<StoreError>>(
        &mut self,
        path: &Path,
        range: &Range<u64>,
        n_bytes: usize,
        mut take: impl FnMut(Bytes) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let at = self.file(path)?;
        let mut parts = Vec::new();
        let mut next = range.clone().step_by(n_bytes);
        let mut ask = |bulk: &mut Self, parts: &mut Vec<Part>| {
            let start = next.next()?;
            let end = range.end.min(start + n_bytes as u64);
            Some(bulk.ask(at, start..end, parts))
        };
        let mut asked = ask(self, &mut parts);
        while let Some(piece) = asked {
            asked = ask(self, &mut parts);
            let read = self.wait(at, &mut parts, &piece.parts);
            let read = read.map_err(E::from).and_then(|()| {
                let bytes = self.join(at, piece, &mut parts);
                take(bytes)
            });
            if read.is_err() {
                // The reader is used again: nothing of this may come in later.
                let all = 0..parts.len();
                let _ = self.wait(at, &mut parts, &all);
                return read;
            }
        }
        Ok(())
    }

    /// Asks for a piece; `parts` are those of all pieces that this call reads, their places are the requests' tags.
    fn ask(&mut self, at: usize, range: Range<u64>, parts: &mut Vec<Part>) -> Piece {
        let (start, n_bytes) = OpenFile::window(&range);
        let mut memory = aligned(n_bytes);
        let first = parts.len();
        for offset in (0..n_bytes).step_by(self.request_bytes) {
            let offset = start + offset as u64;
            let n = self.request_bytes.min(memory.len());
            self.reader.submit(Request {
                tag: parts.len() as u64,
                file: Arc::clone(self.files[at].file()),
                offset,
                memory: memory.split_to(n),
            });
            parts.push(Part {
                offset,
                n_needed: range.end.saturating_sub(offset).min(n as u64) as usize,
                is_here: false,
                memory: BytesMut::new(),
                failure: None,
            });
        }
        Piece {
            range,
            parts: first..parts.len(),
        }
    }

    /// The bytes of a piece, all parts of which are here.
    fn join(&self, at: usize, piece: Piece, parts: &mut [Part]) -> Bytes {
        let Piece { range, parts: own } = piece;
        self.files[at].read_done(range.clone());
        let mut whole = BytesMut::new();
        for part in &mut parts[own] {
            whole.unsplit(std::mem::take(&mut part.memory));
        }
        let (start, _) = OpenFile::window(&range);
        let from = (range.start - start) as usize;
        whole
            .freeze()
            .slice(from..from + (range.end - range.start) as usize)
    }

    /// Waits for `wanted` parts; the first failure among them.
    fn wait(&mut self, at: usize, parts: &mut [Part], wanted: &Range<usize>) -> Result<()> {
        let mut n_left = parts[wanted.clone()].iter().filter(|p| !p.is_here).count();
        while n_left > 0 {
            let Some(Completion {
                tag,
                memory,
                result,
            }) = self.reader.next(PATIENCE)
            else {
                continue;
            };
            n_left -= usize::from(wanted.contains(&(tag as usize)));
            let part = &mut parts[tag as usize];
            part.failure = match result {
                Ok(n) if n < part.n_needed => Some(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => None,
                Err(source) => Some(source),
            };
            (part.memory, part.is_here) = (memory, true);
        }
        self.files[at].check_unchanged()?;
        let failed = |part: &mut Part| Some((part.failure.take()?, part.offset, part.n_needed));
        match parts[wanted.clone()].iter_mut().find_map(failed) {
            None => Ok(()),
            Some((source, offset, n_bytes)) => Err(StoreError::ReadWeights {
                path: self.files[at].path().to_owned(),
                offset,
                n_bytes,
                source,
            }),
        }
    }

    fn file(&mut self, path: &Path) -> Result<usize> {
        if let Some(at) = self.files.iter().position(|file| file.path() == path) {
            return Ok(at);
        }
        self.files.push(OpenFile::open(&PathBuf::from(path))?);
        Ok(self.files.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::ReaderKind;

    #[test]
    fn pieces_are_those_of_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..100_003_u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        for reader in [ReaderKind::Auto, ReaderKind::Pread, ReaderKind::Sync] {
            let options = StoreOptions {
                reader,
                request_bytes: 8192,
                ..StoreOptions::default()
            };
            let mut bulk = BulkReader::new(&options).unwrap();
            for range in [
                0..1,
                0..0,
                4095..4097,
                17..100_003,
                99_999..100_003,
                0..100_003,
            ] {
                let got = bulk.read(file.path(), &range).unwrap();
                assert!(
                    got == bytes[range.start as usize..range.end as usize],
                    "{range:?}"
                );
            }
            let ranges = [5..9, 90_000..100_003, 5..5, 4096..8192, 6..7];
            let many = bulk.read_all(file.path(), &ranges).unwrap();
            for (got, range) in many.iter().zip(ranges) {
                assert!(
                    *got == bytes[range.start as usize..range.end as usize],
                    "{range:?}"
                );
            }
            for (n_bytes, range) in [
                (10_000, 5..100_003),
                (8192, 0..8192),
                (100, 50..51),
                (7, 9..9),
            ] {
                let mut got = Vec::new();
                let taken = bulk.read_in_turns(file.path(), &range, n_bytes, |piece| {
                    got.extend_from_slice(&piece);
                    match piece.len() <= n_bytes {
                        true => Ok::<(), StoreError>(()),
                        false => unreachable!("{} bytes", piece.len()),
                    }
                });
                taken.unwrap();
                assert!(got == bytes[range.start as usize..range.end as usize]);
            }
            // Stopped by either side: what was asked for meanwhile does not come in later.
            let stop = |_| Err(StoreError::NoMemory { n_bytes: 1 });
            let stopped = bulk.read_in_turns(file.path(), &(0..90_000), 5000, stop);
            assert!(matches!(stopped, Err(StoreError::NoMemory { .. })));
            let mut n_taken = 0;
            let ended = bulk.read_in_turns(file.path(), &(80_000..120_000), 10_000, |_| {
                n_taken += 1;
                Ok(())
            });
            assert!(matches!(ended, Err(StoreError::ReadWeights { .. })) && n_taken == 2);
            let error = bulk.read(file.path(), &(99_000..100_004)).unwrap_err();
            assert!(matches!(error, StoreError::ReadWeights { .. }), "{error}");
            assert!(bulk.read(file.path(), &(5..6)).is_ok());
        }
        assert!(
            BulkReader::new(&StoreOptions::default())
                .unwrap()
                .read(Path::new("/no/such"), &(0..1))
                .is_err()
        );
    }
}
