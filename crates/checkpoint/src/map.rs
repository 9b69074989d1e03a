//! Mapping a file into memory as shared, read-only bytes, and giving pages of it back.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{CheckpointError, Result};

/// Linux maps up to this much around a page that is touched (`fault_around_bytes`). It is a multiple of every usual
/// page size too.
const AROUND: usize = 64 << 10;

/// A whole file, mapped read-only. Clones share the map, and so do the bytes taken from it.
#[derive(Debug, Clone)]
pub(crate) struct FileMap(Arc<Mmap>);

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
        Ok(Self(Arc::new(map)))
    }

    /// All bytes of the file. Slices of the result share the map and keep it alive.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes::from_owner(self.clone())
    }

    /// Takes the pages under `bytes` out of this process's memory if they are a part of this map, which is answered.
    /// They stay in the system's cache of files while it has room, and come back when they are touched.
    pub(crate) fn release(&self, bytes: &[u8]) -> bool {
        let map = self.0.as_ptr_range();
        let part = bytes.as_ptr_range();
        let (start, end) = (map.start.addr(), map.end.addr());
        if part.start.addr() < start || part.end.addr() > end {
            return false;
        }
        // What is this small shares its pages with others, and is not worth a call.
        if bytes.len() >= AROUND {
            // The neighbours that came in when this was read go as well: they may have been released before.
            let from = (part.start.addr() / AROUND * AROUND).max(start);
            let to = part.end.addr().next_multiple_of(AROUND).min(end);
            self.drop_pages(from - start, to - from);
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
