//! Bringing one file into the cache: locked against others, resumed where it stopped, and checked.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use sha2::{Digest, Sha256};

use super::cache::{RepoCache, create_parent};
use super::client::{Client, Content, Fault};
use super::progress::Progress;
use super::reference::HubRef;
use crate::failure::Failure;

/// Attempts in a row that may bring nothing before a download fails.
const MAX_FRUITLESS: u32 = 5;
const BUFFER: usize = 256 << 10;

/// From where to where.
pub(super) struct Job<'a> {
    pub(super) client: &'a Client,
    pub(super) cache: &'a RepoCache,
    pub(super) wanted: &'a HubRef,
    pub(super) commit: &'a str,
}

/// What is on disk of one file, and the hash of it.
struct Partial<'a> {
    file: File,
    path: &'a Path,
    position: u64,
    hash: Sha256,
}

/// Whether the content is in the cache as a whole.
pub(super) fn is_here(cache: &RepoCache, content: &Content) -> bool {
    fs::metadata(cache.blob(&content.etag)).is_ok_and(|found| found.len() == content.size)
}

/// Bytes of the content that an earlier attempt left.
pub(super) fn begun(cache: &RepoCache, content: &Content) -> u64 {
    let found = fs::metadata(cache.partial(&content.etag)).map_or(0, |found| found.len());
    if found > content.size { 0 } else { found }
}

/// Downloads `file` unless its content is here, and gives it its name in the snapshot.
pub(super) fn bring(
    job: &Job<'_>,
    file: &str,
    content: &Content,
    progress: &mut Progress,
) -> Result<()> {
    let cache = job.cache;
    if !is_here(cache, content) {
        let _lock = lock(&cache.lock(&content.etag), file, progress)?;
        // Whoever held the lock may have brought it.
        if is_here(cache, content) {
            progress.add(content.size - begun(cache, content));
        } else {
            fetch(job, file, content, progress)?;
        }
    }
    cache.point(job.commit, file, &content.etag)
}

/// Waits until no other process downloads the same content.
fn lock(path: &Path, file: &str, progress: &Progress) -> Result<File> {
    let at = || format!("cannot lock {}", path.display());
    create_parent(path)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(at)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            progress.say(&format!(
                "waiting for another process that downloads {file}"
            ));
            lock.lock().with_context(at)?;
        }
        // Without locks two processes may do the same work, and one of them will notice the hash.
        Err(fs::TryLockError::Error(error)) => tracing::warn!(%error, "{}", at()),
    }
    Ok(lock)
}

fn fetch(job: &Job<'_>, file: &str, content: &Content, progress: &mut Progress) -> Result<()> {
    let path = job.cache.partial(&content.etag);
    create_parent(&path)?;
    let mut partial = Partial::open(&path, content.size)?;
    let resumed = partial.position > 0;
    complete(job, file, content, &mut partial, progress)?;
    if !partial.is_right(content) && resumed {
        progress.say(&format!(
            "what was here of {file} is damaged; starting again"
        ));
        partial.restart(progress)?;
        complete(job, file, content, &mut partial, progress)?;
    }
    if !partial.is_right(content) {
        let message = format!(
            "{file} of {} arrived damaged: its SHA-256 is {} and not {}",
            job.wanted.repo,
            partial.hex(),
            content.etag
        );
        partial.restart(progress)?;
        return Err(Failure::new(message)
            .hint(
                "try again; if it happens again, something between here and the hub changes files",
            )
            .into());
    }
    let done = partial
        .file
        .sync_all()
        .and_then(|()| fs::rename(&path, job.cache.blob(&content.etag)));
    done.with_context(|| format!("cannot finish {}", path.display()))
}

/// Reads until all bytes are here, however often the connection breaks, as long as every attempt
/// or one of a few brings something.
fn complete(
    job: &Job<'_>,
    file: &str,
    content: &Content,
    partial: &mut Partial<'_>,
    progress: &mut Progress,
) -> Result<()> {
    let mut fruitless = 0;
    while partial.position < content.size {
        let before = partial.position;
        let reason = match attempt(job, file, content, partial, progress) {
            Ok(()) => continue,
            Err(Stop::Connection(reason)) => reason,
            Err(Stop::Error(error)) => return Err(error),
        };
        fruitless = if partial.position > before {
            0
        } else {
            fruitless + 1
        };
        if fruitless >= MAX_FRUITLESS {
            return Err(
                Failure::new(format!("the download of {file} broke off: {reason}"))
                    .hint("run the same command again; it goes on where it stopped")
                    .into(),
            );
        }
        tracing::info!("{file}: {reason}; going on at byte {}", partial.position);
        if fruitless > 0 {
            std::thread::sleep(Duration::from_millis(250 << fruitless));
        }
    }
    Ok(())
}

/// Why an attempt ended early.
enum Stop {
    Connection(String),
    Error(anyhow::Error),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Self::Error(error)
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Transient(reason) => Self::Connection(reason),
            Fault::Final(failure) => Self::Error(failure.into()),
        }
    }
}

/// One request, read to its end.
fn attempt(
    job: &Job<'_>,
    file: &str,
    content: &Content,
    partial: &mut Partial<'_>,
    progress: &mut Progress,
) -> Result<(), Stop> {
    let (start, mut body) =
        job.client
            .read(job.wanted, job.commit, file, (partial.position, None))?;
    if start != partial.position {
        // The server does not resume.
        partial.restart(progress)?;
    }
    let mut buffer = vec![0; BUFFER];
    while partial.position < content.size {
        let n = match body.read(&mut buffer) {
            Ok(0) => return Err(Stop::Connection("the connection was closed".to_owned())),
            Ok(n) => n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Stop::Connection(error.to_string())),
        };
        if n as u64 > content.size - partial.position {
            let message = format!(
                "{file}: the hub sends more than the {} bytes it announced",
                content.size
            );
            return Err(Stop::Error(anyhow!(message)));
        }
        partial.append(&buffer[..n])?;
        progress.add(n as u64);
    }
    Ok(())
}

impl<'a> Partial<'a> {
    /// Opens what an earlier attempt left, if it can be the beginning of `size` bytes.
    fn open(path: &'a Path, size: u64) -> Result<Self> {
        let at = || format!("cannot open {}", path.display());
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .with_context(at)?;
        if file.metadata().with_context(at)?.len() > size {
            file.set_len(0).with_context(at)?;
        }
        let mut hash = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        let mut position = 0;
        loop {
            let n = file.read(&mut buffer).with_context(at)?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            position += n as u64;
        }
        Ok(Self {
            file,
            path,
            position,
            hash,
        })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all(bytes);
        written.with_context(|| format!("cannot write {}", self.path.display()))?;
        self.hash.update(bytes);
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self, progress: &mut Progress) -> Result<()> {
        progress.take_back(self.position);
        let emptied = self
            .file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.with_context(|| format!("cannot write {}", self.path.display()))?;
        self.position = 0;
        self.hash = Sha256::new();
        Ok(())
    }

    fn is_right(&self, content: &Content) -> bool {
        content
            .sha256()
            .is_none_or(|sha256| self.hex().eq_ignore_ascii_case(sha256))
    }

    fn hex(&self) -> String {
        let digest = self.hash.clone().finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beginning_is_hashed_and_too_much_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.incomplete");
        fs::write(&path, "abc").unwrap();
        let partial = Partial::open(&path, 3).unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!((partial.position, partial.hex().as_str()), (3, abc));
        let etag = abc.to_owned();
        assert!(partial.is_right(&Content { size: 3, etag }));
        let etag = "f".repeat(64);
        assert!(!partial.is_right(&Content { size: 3, etag }));
        // Git's name of a small file cannot be compared.
        let etag = "f".repeat(40);
        assert!(partial.is_right(&Content { size: 3, etag }));
        assert_eq!(Partial::open(&path, 2).unwrap().position, 0);
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }
}
