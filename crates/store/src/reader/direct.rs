//! An open file as experts are read from it: past the system's own cache where the file system lets us, and watched for
//! changes.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::ALIGN;
use super::memory::aligned;
use super::whole::read_whole;
use crate::error::{Result, StoreError};

/// A file that is read in pieces while a model runs.
///
/// The system's own cache would hold a second copy of what the store caches, and copying through it competes with the
/// products for memory. So it is gone around where that works, and emptied of what was read where it does not.
#[derive(Debug)]
pub struct OpenFile {
    file: Arc<File>,
    path: PathBuf,
    stamp: Stamp,
    /// Why reads go through the system's cache, if they do.
    why_buffered: Option<io::Error>,
}

/// By what a change of a file is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    n_bytes: u64,
    /// Absent where the system keeps none.
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            n_bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

impl OpenFile {
    /// Opens `path` past the system's cache if a trial shows that this works, and through it otherwise.
    ///
    /// # Errors
    ///
    /// [`StoreError::Open`] if it cannot be opened at all.
    pub fn open(path: &Path) -> Result<Self> {
        Self::direct_or_not(path, open_direct(path))
    }

    fn direct_or_not(path: &Path, direct: io::Result<File>) -> Result<Self> {
        match direct {
            Ok(file) => Self::new(path, file, None),
            Err(why) => Self::new(path, open_plain(path)?, Some(why)),
        }
    }

    /// Opens `path` for reads through the system's cache.
    ///
    /// # Errors
    ///
    /// [`StoreError::Open`] if it cannot be opened.
    pub fn open_buffered(path: &Path) -> Result<Self> {
        let why = io::Error::other("reads through the system's cache were asked for");
        Self::new(path, open_plain(path)?, Some(why))
    }

    fn new(path: &Path, file: File, why_buffered: Option<io::Error>) -> Result<Self> {
        let metadata = file.metadata();
        let metadata = metadata.map_err(failed("ask for the size of", path))?;
        Ok(Self {
            file: Arc::new(file),
            path: path.to_owned(),
            stamp: Stamp::of(&metadata),
            why_buffered,
        })
    }

    /// The file, for a [`Request`](super::Request).
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that it had when it was opened.
    pub fn n_bytes(&self) -> u64 {
        self.stamp.n_bytes
    }

    /// Whether reads go past the system's cache, so that they measure the disk and leave no second copy.
    pub fn is_direct(&self) -> bool {
        self.why_buffered.is_none()
    }

    /// Why they do not, if they do not.
    pub fn why_buffered(&self) -> Option<&io::Error> {
        self.why_buffered.as_ref()
    }

    /// Checks that size and time of change are those at opening. A file that was replaced by another under its name is
    /// still the old one here, so only changes in place are errors.
    ///
    /// # Errors
    ///
    /// [`StoreError::Changed`]; [`StoreError::Open`] if the system does not say.
    pub fn check_unchanged(&self) -> Result<()> {
        let metadata = self.file.metadata();
        let metadata = metadata.map_err(failed("ask for the size of", &self.path))?;
        if Stamp::of(&metadata) == self.stamp {
            return Ok(());
        }
        let path = self.path.clone();
        Err(StoreError::Changed { path })
    }

    /// To be called when the bytes of `range` have been read and stored elsewhere: the system may drop its copy, if it has
    /// made one.
    pub fn read_done(&self, range: Range<u64>) {
        if !self.is_direct() {
            drop_cached(&self.file, range);
        }
    }

    /// The smallest request that holds the bytes of `range`: where it begins, and how long it is, both multiples of
    /// [`ALIGN`].
    pub fn window(range: &Range<u64>) -> (u64, usize) {
        let align = ALIGN as u64;
        let start = range.start / align * align;
        let end = range.end.max(start).next_multiple_of(align);
        // A piece that is read at once fits into memory, so its length into usize.
        (start, (end - start) as usize)
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Open {
        action,
        path: path.to_owned(),
        source,
    }
}

fn open_plain(path: &Path) -> Result<File> {
    File::open(path).map_err(failed("open", path))
}

/// The file past the system's cache, if it can be read so. Some file systems refuse to open it, some to read it.
fn open_direct(path: &Path) -> io::Result<File> {
    let file = open_uncached(path)?;
    // Not the start, which is a multiple of everything: an odd multiple of our alignment shows that it is enough.
    read_whole(&file, ALIGN as u64, &mut aligned(ALIGN))?;
    Ok(file)
}

#[cfg(target_os = "linux")]
fn open_uncached(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

#[cfg(not(target_os = "linux"))]
fn open_uncached(_path: &Path) -> io::Result<File> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "reading past the system's cache is known for Linux alone",
    ))
}

#[cfg(target_os = "linux")]
fn drop_cached(file: &File, range: Range<u64>) {
    use std::os::fd::AsRawFd;

    let length = range.end.saturating_sub(range.start);
    let (Ok(start), Ok(length)) = (range.start.try_into(), length.try_into()) else {
        return;
    };
    // A length of 0 would mean all of the file.
    if length == 0 {
        return;
    }
    // SAFETY: the descriptor is open as long as `file` is borrowed, and the call touches no memory of ours.
    #[expect(unsafe_code, reason = "the standard library has no face for it")]
    // Advice; a system that does not follow it keeps a copy that it may drop at any time.
    let _ =
        unsafe { libc::posix_fadvise(file.as_raw_fd(), start, length, libc::POSIX_FADV_DONTNEED) };
}

#[cfg(not(target_os = "linux"))]
fn drop_cached(_file: &File, _range: Range<u64>) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn both_ways_read_the_same_and_say_which_they_are() {
        let bytes: Vec<u8> = (0..3 * ALIGN + 77).map(|at| (at % 251) as u8).collect();
        let file = temporary(&bytes);
        let direct = OpenFile::open(file.path()).unwrap();
        let buffered = OpenFile::open_buffered(file.path()).unwrap();
        assert!(!buffered.is_direct() && buffered.why_buffered().is_some());
        assert_eq!(direct.is_direct(), direct.why_buffered().is_none());
        for open in [direct, buffered] {
            assert_eq!(open.n_bytes(), bytes.len() as u64);
            let mut memory = aligned(4 * ALIGN);
            let n_read = read_whole(open.file(), 0, &mut memory).unwrap();
            assert_eq!(memory[..n_read], bytes);
            open.read_done(0..n_read as u64);
            open.read_done(5..5);
            open.check_unchanged().unwrap();
        }
    }

    #[test]
    fn where_direct_reads_are_refused_the_file_is_read_through_the_cache() {
        let file = temporary(b"abc");
        let refused = || Err(io::ErrorKind::InvalidInput.into());
        let open = OpenFile::direct_or_not(file.path(), refused()).unwrap();
        let why = open.why_buffered().unwrap();
        assert_eq!(why.kind(), io::ErrorKind::InvalidInput);
        let mut memory = vec![0; 7];
        assert_eq!(read_whole(open.file(), 1, &mut memory).unwrap(), 2);
        assert_eq!(&memory[..2], b"bc");
        let nowhere = Path::new("/no/such/file");
        assert!(OpenFile::direct_or_not(nowhere, refused()).is_err());
    }

    #[test]
    fn short_and_empty_files_open() {
        for bytes in [&b""[..], b"abc"] {
            let file = temporary(bytes);
            let open = OpenFile::open(file.path()).unwrap();
            let mut memory = aligned(ALIGN);
            assert_eq!(
                read_whole(open.file(), 0, &mut memory).unwrap(),
                bytes.len()
            );
        }
        let error = OpenFile::open(Path::new("/no/such/file")).unwrap_err();
        assert!(error.to_string().contains("/no/such/file"));
    }

    #[test]
    fn changes_in_place_are_noticed_and_replacement_is_not_one() {
        let file = temporary(&[1; 10_000]);
        let open = OpenFile::open(file.path()).unwrap();
        // Another file under the same name leaves ours as it is.
        let folder = file.path().parent().unwrap();
        let other = tempfile::NamedTempFile::new_in(folder).unwrap();
        std::fs::write(other.path(), [2; 10]).unwrap();
        let path = file.into_temp_path();
        other.persist(&path).unwrap();
        open.check_unchanged().unwrap();

        let open = OpenFile::open(&path).unwrap();
        let writer = File::options().write(true).open(&path).unwrap();
        writer.set_len(4).unwrap();
        let error = open.check_unchanged().unwrap_err();
        assert!(matches!(error, StoreError::Changed { .. }), "{error}");

        let open = OpenFile::open(&path).unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        writer.set_modified(later).unwrap();
        assert!(open.check_unchanged().is_err());
    }

    #[test]
    fn windows_are_rounded_outwards() {
        assert_eq!(OpenFile::window(&(0..1)), (0, 4096));
        assert_eq!(OpenFile::window(&(4095..4097)), (0, 8192));
        assert_eq!(OpenFile::window(&(8192..12_288)), (8192, 4096));
        assert_eq!(OpenFile::window(&(5000..5000)), (4096, 4096));
        assert_eq!(OpenFile::window(&(4096..4096)), (4096, 0));
    }
}
