//! A hub model without its weights: what `inspect` and `fit` read, in a folder of its own.
//!
//! The small files are brought into the cache as for a download. Of the files with weights only the headers are asked
//! for, by ranges; they are laid into files of the full length whose other bytes were never written and take no room.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cadre_checkpoint::gguf::{Outline, gguf_outline};
use cadre_checkpoint::safetensors_outline;
use tempfile::TempDir;

use super::choose::{Choice, choose};
use super::client::{Content, Fault, Listing};
use super::download::Job;
use super::progress::say;
use super::{ATTEMPTS, bring_all, content, folder_weights, picked};
use crate::cli::App;
use crate::failure::Failure;
use crate::output::spinner;

/// Bytes of one request: more than most headers have.
const CHUNK: u64 = 4 << 20;

/// Brings what opening the model reads; where it is.
pub(super) fn bring_outline(
    app: &App,
    job: &Job<'_>,
    listing: &Listing,
) -> Result<(TempDir, PathBuf)> {
    let names: Vec<String> = listing.files.iter().map(|file| file.name.clone()).collect();
    let choice = choose(&names, job.wanted.quant.as_deref())
        .map_err(|reason| Failure::new(format!("{} cannot be used: {reason}", job.wanted)))?;
    let folder = tempfile::tempdir().context("cannot create a folder for headers")?;
    let (weights, path) = match choice {
        Choice::Gguf { parts, silent } => {
            if !silent {
                say(&picked(job.wanted, &parts));
            }
            let path = folder.path().join(&parts[0]);
            (parts, path)
        }
        Choice::Folder { small } => {
            bring_all(app, job, listing, &small)?;
            let snapshot = job.cache.snapshot(job.commit);
            for name in &small {
                let (from, to) = (snapshot.join(name), folder.path().join(name));
                fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            }
            let weights = folder_weights(&snapshot, &small)?;
            (weights, folder.path().to_owned())
        }
    };
    let progress = spinner(&app.env, format!("reading headers of {}", job.wanted));
    for name in &weights {
        app.interrupt.check()?;
        let content = content(job, listing, name)?;
        header(job, name, &content, &folder.path().join(name))?;
    }
    progress.finish_and_clear();
    Ok((folder, path))
}

/// Writes the header of a file with weights, and gives it the length of the whole.
fn header(job: &Job<'_>, name: &str, content: &Content, path: &Path) -> Result<()> {
    let mut remote = Remote {
        job,
        name,
        size: content.size,
        position: 0,
        body: None,
    };
    let outline = match name.ends_with(".gguf") {
        true => gguf_outline(&mut remote)?,
        false => Outline {
            header: safetensors_outline(&mut remote)?,
            more: Vec::new(),
        },
    };
    let at = || format!("cannot write {}", path.display());
    super::cache::create_parent(path)?;
    let mut file = File::create(path).with_context(at)?;
    file.write_all(&outline.header).with_context(at)?;
    for range in outline.more {
        // Ranges that lie outside are what opening complains about.
        if range.end > content.size {
            continue;
        }
        let mut bytes = Vec::new();
        remote.seek(range.start);
        (&mut remote)
            .take(range.end - range.start)
            .read_to_end(&mut bytes)?;
        file.seek(SeekFrom::Start(range.start)).with_context(at)?;
        file.write_all(&bytes).with_context(at)?;
    }
    file.set_len(content.size).with_context(at)
}

/// A file on the hub, read piece by piece.
struct Remote<'a> {
    job: &'a Job<'a>,
    name: &'a str,
    size: u64,
    position: u64,
    /// An answer that is being read, and how many bytes of it are meant.
    body: Option<(Box<dyn Read>, u64)>,
}

impl Remote<'_> {
    fn seek(&mut self, position: u64) {
        self.position = position;
        self.body = None;
    }

    /// Asks for the next bytes, more than once if the connection breaks.
    fn request(&mut self) -> io::Result<(Box<dyn Read>, u64)> {
        let to = self.size.min(self.position + CHUNK);
        let mut attempt = 1;
        loop {
            let (job, name) = (self.job, self.name);
            let answer = job
                .client
                .read(job.wanted, job.commit, name, (self.position, Some(to)));
            match answer {
                Ok((start, mut body)) => {
                    // A hub that knows no ranges sends everything.
                    let skipped = io::copy(
                        &mut (&mut body).take(self.position - start),
                        &mut io::sink(),
                    )?;
                    if skipped == self.position - start {
                        return Ok((Box::new(body), to - self.position));
                    }
                }
                Err(Fault::Final(failure)) => return Err(io::Error::other(failure)),
                Err(Fault::Transient(reason)) if attempt >= ATTEMPTS => {
                    return Err(io::Error::other(Failure::new(reason).hint("try again")));
                }
                Err(Fault::Transient(reason)) => tracing::info!("{reason}; trying again"),
            }
            if attempt >= ATTEMPTS {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            std::thread::sleep(std::time::Duration::from_millis(250 << attempt));
            attempt += 1;
        }
    }
}

impl Read for Remote<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut fruitless = 0;
        loop {
            if self.position >= self.size || buffer.is_empty() {
                return Ok(0);
            }
            let (mut body, left) = match self.body.take() {
                Some(body) => body,
                None => self.request()?,
            };
            let most = buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            match body.read(&mut buffer[..most]) {
                Ok(n) if n > 0 => {
                    self.position += n as u64;
                    let left = left - n as u64;
                    self.body = (left > 0).then_some((body, left));
                    return Ok(n);
                }
                Err(error) if fruitless >= ATTEMPTS => return Err(error),
                Ok(_) if fruitless >= ATTEMPTS => return Err(io::ErrorKind::UnexpectedEof.into()),
                // The connection broke: the rest is asked for again.
                _ => fruitless += 1,
            }
        }
    }
}
