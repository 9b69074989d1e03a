//! Reading on until everything that is wanted has been read, or the file has ended: what every reader means by a read.

use std::fs::File;
use std::io;

use super::ALIGN;

/// How far the reading of one request has come.
///
/// A system call may read less than it was asked for: at the end of the file, or before a failure, a signal or its own
/// limit. The rest is asked for again, from the last multiple of [`ALIGN`], since direct reads begin at nothing else.
/// The end is where that gives nothing new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Where the next call begins, from the start of the request's memory.
    pub(super) from: usize,
    /// Bytes that are there.
    pub(super) n_read: usize,
}

impl Progress {
    /// Takes note that the call at `from` gave `n_bytes` of the `n_wanted` of the request; whether there may be more.
    pub(super) fn advance(&mut self, n_bytes: usize, n_wanted: usize) -> bool {
        let reached = self.from + n_bytes;
        if reached <= self.n_read {
            return false;
        }
        self.n_read = reached;
        self.from = reached / ALIGN * ALIGN;
        reached < n_wanted
    }
}

/// Reads from `offset` until `memory` is full or the file ends; bytes that were read.
pub(super) fn read_whole(file: &File, offset: u64, memory: &mut [u8]) -> io::Result<usize> {
    read_rest(file, offset, memory, Progress::default())
}

/// Continues after what `progress` says has been read.
pub(super) fn read_rest(
    file: &File,
    offset: u64,
    memory: &mut [u8],
    mut progress: Progress,
) -> io::Result<usize> {
    let n_wanted = memory.len();
    if n_wanted == 0 {
        return Ok(0);
    }
    loop {
        let rest = &mut memory[progress.from..];
        match read_at(file, rest, offset + progress.from as u64) {
            Ok(n_bytes) => {
                if !progress.advance(n_bytes, n_wanted) {
                    return Ok(progress.n_read);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(unix)]
fn read_at(file: &File, memory: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, memory, offset)
}

#[cfg(windows)]
fn read_at(file: &File, memory: &mut [u8], offset: u64) -> io::Result<usize> {
    use std::os::windows::fs::FileExt;

    // It says the end of a file as an error.
    match file.seek_read(memory, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_reads_are_continued_from_a_multiple_until_nothing_new_comes() {
        let mut progress = Progress::default();
        let wanted = 4 * ALIGN;
        assert!(progress.advance(ALIGN + 100, wanted));
        assert_eq!((progress.from, progress.n_read), (ALIGN, ALIGN + 100));
        // The same 100 bytes again: the file ends there.
        assert!(!progress.advance(100, wanted));
        assert_eq!(progress.n_read, ALIGN + 100);

        let mut progress = Progress::default();
        assert!(progress.advance(2 * ALIGN, wanted));
        assert!(!progress.advance(0, wanted), "ends at a multiple");
        assert_eq!(progress.n_read, 2 * ALIGN);

        let mut progress = Progress::default();
        assert!(progress.advance(100, wanted));
        assert!(progress.advance(ALIGN, wanted), "more had come");
        assert!(!progress.advance(3 * ALIGN, wanted), "full");
        assert_eq!(progress.n_read, wanted);

        assert!(!Progress::default().advance(0, wanted), "beyond the end");
    }

    #[test]
    fn reads_past_the_end_give_what_is_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..10_000).map(|at| at as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let file = File::open(file.path()).unwrap();
        let mut memory = vec![0xee; 4 * ALIGN];
        assert_eq!(read_whole(&file, 4096, &mut memory).unwrap(), 5904);
        assert_eq!(memory[..5904], bytes[4096..]);
        assert_eq!(read_whole(&file, 20_480, &mut memory).unwrap(), 0);
        assert_eq!(read_whole(&file, 0, &mut []).unwrap(), 0);
    }
}
