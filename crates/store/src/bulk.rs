//! Reading large pieces of files at once, past the system's cache: what is loaded before a model runs.

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

/// Reads pieces of files, one piece at a time with many requests.
pub struct BulkReader {
    files: Vec<OpenFile>,
    reader: Box<dyn Reader>,
    request_bytes: usize,
}

/// A part of a piece: one request.
struct Part {
    offset: u64,
    /// Bytes that must come.
    n_needed: usize,
    memory: Option<BytesMut>,
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
        let mut parts: Vec<Part> = Vec::new();
        for range in ranges {
            let (start, n_bytes) = OpenFile::window(range);
            let mut memory = aligned(n_bytes);
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
                    memory: None,
                });
            }
        }
        let failure = self.collect(path, &mut parts);
        self.files[at].check_unchanged()?;
        if let Some(failure) = failure {
            return Err(failure);
        }
        let mut parts = parts.into_iter().peekable();
        let join = |range: &Range<u64>| {
            let (start, n_bytes) = OpenFile::window(range);
            self.files[at].read_done(range.clone());
            let end = start + n_bytes as u64;
            let mut whole = BytesMut::new();
            while whole.len() < n_bytes
                && let Some(part) = parts.next_if(|part| part.offset < end)
            {
                whole.unsplit(part.memory.unwrap_or_default());
            }
            let from = (range.start - start) as usize;
            whole
                .freeze()
                .slice(from..from + (range.end - range.start) as usize)
        };
        Ok(ranges.iter().map(join).collect())
    }

    /// Waits for all parts; the first failure.
    fn collect(&mut self, path: &Path, parts: &mut [Part]) -> Option<StoreError> {
        let (mut n_left, mut failure) = (parts.len(), None);
        while n_left > 0 {
            let Some(Completion {
                tag,
                memory,
                result,
            }) = self.reader.next(PATIENCE)
            else {
                continue;
            };
            let part = &mut parts[tag as usize];
            let problem = match result {
                Ok(n) if n < part.n_needed => Some(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => None,
                Err(source) => Some(source),
            };
            if let Some(source) = problem {
                failure.get_or_insert(StoreError::ReadWeights {
                    path: path.to_owned(),
                    offset: part.offset,
                    n_bytes: part.n_needed,
                    source,
                });
            }
            part.memory = Some(memory);
            n_left -= 1;
        }
        failure
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
