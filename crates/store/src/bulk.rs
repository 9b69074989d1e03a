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
        let at = self.file(path)?;
        let file = Arc::clone(self.files[at].file());
        let (start, n_bytes) = OpenFile::window(range);
        let mut memory = aligned(n_bytes);
        let mut n_requests = 0;
        while !memory.is_empty() {
            let offset = (n_requests * self.request_bytes) as u64;
            let n = self.request_bytes.min(memory.len());
            self.reader.submit(Request {
                tag: n_requests as u64,
                file: Arc::clone(&file),
                offset: start + offset,
                memory: memory.split_to(n),
            });
            n_requests += 1;
        }
        let mut parts: Vec<Option<BytesMut>> = (0..n_requests).map(|_| None).collect();
        let mut failure = None;
        while parts.iter().any(Option::is_none) {
            let Some(Completion {
                tag,
                memory,
                result,
            }) = self.reader.next(PATIENCE)
            else {
                continue;
            };
            let offset = start + tag * self.request_bytes as u64;
            let needed = range.end.saturating_sub(offset).min(memory.len() as u64) as usize;
            let problem = match result {
                Ok(n) if n < needed => Some(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => None,
                Err(source) => Some(source),
            };
            if let Some(source) = problem {
                failure.get_or_insert(StoreError::ReadWeights {
                    path: path.to_owned(),
                    offset,
                    n_bytes: needed,
                    source,
                });
            }
            parts[tag as usize] = Some(memory);
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        self.files[at].read_done(range.clone());
        let mut parts = parts.into_iter().flatten();
        let mut whole = parts.next().unwrap_or_default();
        for part in parts {
            whole.unsplit(part);
        }
        let from = (range.start - start) as usize;
        Ok(whole
            .freeze()
            .slice(from..from + (range.end - range.start) as usize))
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
