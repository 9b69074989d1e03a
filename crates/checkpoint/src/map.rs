//! Mapping a file into memory as shared, read-only bytes, asking for pages of it early, and giving them back.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{CheckpointError, Result};

/// Linux maps up to this much around a page that is touched (`fault_around_bytes`). It is a multiple of every usual
/// page size too.
const AROUND: usize = 64 << 10;

/// What is asked for at once: Linux reads no more than its window of reading ahead, and leaves out the rest.
const STEP: usize = 128 << 10;

/// How far reading is ahead of a reader who goes through the file: enough requests to keep a disk busy meanwhile.
const AHEAD: usize = 32 << 20;

/// A whole file, mapped read-only. Clones share the map, and so do the bytes taken from it.
#[derive(Debug, Clone)]
pub(crate) struct FileMap(Arc<Mmap>, Arc<Path>);

impl AsRef<[u8]> for FileMap {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl FileMap {
    /// Maps the file at `path`; nothing is read until it is touched.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| CheckpointError::io("open", path, source))?;
        // SAFETY: the map is only read. The operating system cannot stop another process from truncating the file
        // meanwhile; as for every program that maps model files, that is outside of what can be defended against, and
        // documented for `Checkpoint::open`.
        #[expect(unsafe_code, reason = "mapping a file is the purpose of this function")]
        let map = unsafe { Mmap::map(&file) };
        let map = map.map_err(|source| CheckpointError::io("map", path, source))?;
        Ok(Self(Arc::new(map), path.into()))
    }

    /// The file.
    pub(crate) fn path(&self) -> &Arc<Path> {
        &self.1
    }

    /// All bytes of the file. Slices of the result share the map and keep it alive.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes::from_owner(self.clone())
    }

    /// Asks the system to read these bytes of the file (cut off at its end) and returns before they are there.
    ///
    /// What is touched without having been asked for comes in as pieces whose size the system guesses: too little and
    /// the reader waits often, too much and it waits for bytes that nobody wants.
    pub(crate) fn ask_for(&self, range: Range<usize>) {
        let end = range.end.min(self.0.len());
        for from in (range.start..end).step_by(STEP) {
            self.advise_needed(from, STEP.min(end - from));
        }
    }

    /// Asks for `bytes` and as much as [`AHEAD`] behind them, of which what was asked for with the bytes before is left
    /// out. Whether they are a part of this map is answered.
    pub(crate) fn ask_ahead(&self, bytes: &[u8]) -> bool {
        let Some(Range { start, end }) = self.range_of(bytes) else {
            return false;
        };
        // What is this small comes in with its neighbours.
        if bytes.len() >= AROUND {
            self.ask_for(start..end);
            self.ask_for(end.max(start + AHEAD)..end + AHEAD);
        }
        true
    }

    #[cfg(unix)]
    fn advise_needed(&self, offset: usize, len: usize) {
        let advised = self.0.advise_range(memmap2::Advice::WillNeed, offset, len);
        if let Err(error) = advised {
            // Only time is lost by that.
            tracing::debug!(%error, "a file is not read ahead");
        }
    }

    #[cfg(not(unix))]
    fn advise_needed(&self, _offset: usize, _len: usize) {}

    /// Where `bytes` are in the file if they are a part of this map.
    pub(crate) fn range_of(&self, bytes: &[u8]) -> Option<Range<usize>> {
        let (map, part) = (self.0.as_ptr_range(), bytes.as_ptr_range());
        let is_inside = part.start >= map.start && part.end <= map.end;
        is_inside.then(|| {
            let start = map.start.addr();
            part.start.addr() - start..part.end.addr() - start
        })
    }

    /// Takes the pages under `bytes` out of this process's memory if they are a part of this map, which is answered.
    /// They stay in the system's cache of files while it has room, and come back when they are touched.
    pub(crate) fn release(&self, bytes: &[u8]) -> bool {
        let Some(Range { start, end }) = self.range_of(bytes) else {
            return false;
        };
        // What is this small shares its pages with others, and is not worth a call.
        if bytes.len() >= AROUND {
            // The neighbours that came in when this was read go as well: they may have been released before.
            let first = self.0.as_ptr().addr();
            let from = ((first + start) / AROUND * AROUND).max(first) - first;
            let to = (first + end).next_multiple_of(AROUND) - first;
            self.drop_pages(from, to.min(self.0.len()) - from);
        }
        true
    }

    /// Drops the pages of `offset..offset + len`, and the rest of the first and last one.
    #[cfg(unix)]
    fn drop_pages(&self, offset: usize, len: usize) {
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the range lies inside of the map. The advice loses what was written to memory that no file backs; this
        // is a shared map of a file that nobody can write to, so a page that is touched again, by whoever reads
        // meanwhile, is the same page of the same file. Whole pages of it belong to the map, which starts with one.
        #[expect(unsafe_code, reason = "only file pages can be dropped without loss")]
        let dropped = unsafe { self.0.unchecked_advise_range(advice, offset, len) };
        if let Err(error) = dropped {
            // Only memory is lost by that.
            tracing::debug!(%error, "pages of a file stay in memory");
        }
    }

    #[cfg(not(unix))]
    fn drop_pages(&self, _offset: usize, _len: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(n: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let values: Vec<u8> = (0..n).map(|i| (i % 251) as u8).collect();
        std::fs::write(file.path(), &values).unwrap();
        (file, values)
    }

    /// KiB of the file's map that are in memory.
    #[cfg(target_os = "linux")]
    fn resident(path: &Path) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let of_file = maps.split_once(path.to_str().unwrap()).unwrap().1;
        let rss = of_file.split_once("Rss:").unwrap().1;
        rss.split_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn released_bytes_read_the_same() {
        let (file, values) = file(3 << 20);
        let map = FileMap::open(file.path()).unwrap();
        let bytes = map.bytes();
        // Odd ends, so that pages are shared with what is not released; the last range ends with the file.
        for range in [0..1, 5..(1 << 20) + 3, 100_001..400_000, 0..3 << 20] {
            assert!(bytes == values);
            assert!(map.release(&bytes.slice(range.clone())), "{range:?}");
            assert!(bytes == values);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn released_pages_leave_memory() {
        let (file, values) = file(3 << 20);
        let map = FileMap::open(file.path()).unwrap();
        let bytes = map.bytes();
        assert!(bytes == values);
        assert_eq!(resident(file.path()), 3 << 10);
        map.release(&bytes[..1 << 20]);
        assert!(resident(file.path()) <= 2 << 10);
        map.release(&bytes);
        assert_eq!(resident(file.path()), 0);
    }

    #[test]
    fn asking_changes_no_byte_and_takes_any_range() {
        let (file, values) = file(3 << 20);
        let map = FileMap::open(file.path()).unwrap();
        let bytes = map.bytes();
        for range in [
            0..0,
            0..1,
            7..100_001,
            (3 << 20) - 1..5 << 20,
            4 << 20..5 << 20,
        ] {
            map.ask_for(range);
        }
        assert!(map.ask_ahead(&bytes[1 << 20..2 << 20]));
        assert!(map.ask_ahead(&bytes) && map.ask_ahead(&bytes[3 << 20..]));
        assert!(!map.ask_ahead(&values));
        assert!(bytes == values);
    }

    #[test]
    fn other_memory_is_left_alone() {
        let (file, values) = file(1 << 20);
        let map = FileMap::open(file.path()).unwrap();
        assert!(!map.release(&values));
        // The same file, but another map.
        let other = FileMap::open(file.path()).unwrap();
        assert!(!map.release(&other.bytes()));
        assert!(other.release(&other.bytes()));
        assert!(
            values
                .iter()
                .enumerate()
                .all(|(i, v)| *v == (i % 251) as u8)
        );
    }
}
