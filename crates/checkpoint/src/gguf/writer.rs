//! Writing GGUF files in bounded memory, complete or not at all, and going on after a kill.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::journal::{Earlier, Journal};
use super::partial::{BUFFER, append_at, hidden, remove, sync, verify};
use super::plan::{GgufPlan, Layout, Slot, TensorPlan, part_paths};
use crate::error::{CheckpointError, Result};
use crate::write::sync_parent;

/// How a [`GgufWriter`] treats what it finds at its target.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriteOptions<'a> {
    /// Everything that the tensor data depends on beyond the plan: the digest of the source model, settings of the
    /// quantiser. An unfinished file is only continued when this and the plan are the same.
    pub source: &'a str,
    /// Replace existing files of the same names. Otherwise they are an error.
    pub replace: bool,
    /// Start from the first tensor even if an unfinished file is there.
    pub restart: bool,
}

/// Writes one GGUF file, or the parts of one, tensor by tensor.
///
/// Until [`GgufWriter::finish`] everything is in hidden files beside the target, `.NAME.gguf.partial` and a journal.
/// When the writer is dropped or killed they stay, and the next writer of the same plan goes on after the last tensor
/// that was written completely, once its checksum has been verified; the outcome is the same to the byte.
pub struct GgufWriter {
    target: PathBuf,
    plan: GgufPlan,
    layout: Layout,
    journal: Journal,
    /// The part that is being written.
    file: Option<(usize, BufWriter<File>)>,
    /// Tensors that are complete.
    n_done: usize,
    /// Bytes of the next tensor so far, and their checksum.
    written: u64,
    crc: crc32fast::Hasher,
    /// All data is on the device; renames may be done in part.
    published: bool,
    /// A write failed, so what the file holds is not known.
    failed: bool,
}

impl GgufWriter {
    /// Begins to write `plan` to `target` (a name in `.gguf`), or goes on with it. [`GgufWriter::next_tensor`] says
    /// which tensor is due; those before it are complete.
    ///
    /// # Errors
    /// A plan that GGUF cannot hold, an existing target, another process writing it, and failures of the file system.
    pub fn create_or_resume(
        target: &Path,
        plan: GgufPlan,
        options: &WriteOptions<'_>,
    ) -> Result<Self> {
        let layout = plan.layout(target)?;
        if let Some(parent) = target
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            fs::create_dir_all(parent)
                .map_err(|error| CheckpointError::io("create", parent, error))?;
        }
        let existing = layout.parts.iter().find(|part| part.path.exists());
        let path = hidden(target, "journal");
        if let Some(part) = existing.filter(|_| !options.replace && !path.exists()) {
            return Err(exists(&part.path));
        }
        let (journal, earlier) = Journal::open(
            &path,
            &identity(options.source, &layout),
            layout.parts.len(),
        )?;
        let mut writer = Self {
            target: target.to_owned(),
            plan,
            layout,
            journal,
            file: None,
            n_done: 0,
            written: 0,
            crc: crc32fast::Hasher::new(),
            published: false,
            failed: false,
        };
        if earlier == Earlier::Publishing && !options.restart && writer.is_all_there() {
            // Interrupted between renames: an existing target is the new file.
            writer.n_done = writer.plan.tensors.len();
            writer.published = true;
            return Ok(writer);
        }
        let existing = writer.layout.parts.iter().find(|part| part.path.exists());
        if let Some(part) = existing.filter(|_| !options.replace) {
            return Err(exists(&part.path));
        }
        match earlier {
            Earlier::Tensors(crcs) if !options.restart => writer.resume(&crcs)?,
            Earlier::Nothing {
                stale_parts: Some(n),
            } => writer.remove_stale(n)?,
            _ => {}
        }
        writer.journal.keep(writer.n_done)?;
        Ok(writer)
    }

    /// The tensor that is due, or `None` when all are complete.
    #[must_use]
    pub fn next_tensor(&self) -> Option<&TensorPlan> {
        self.plan.tensors.get(self.n_done)
    }

    /// Number of complete tensors: the first ones of the plan.
    #[must_use]
    pub fn n_done(&self) -> usize {
        self.n_done
    }

    /// Appends `bytes` to tensor `name`, which must be the one that is due. It is complete, and the next one due, once
    /// all bytes that its shape and format need have come. After a failure of the file system the writer is of no more
    /// use; a new one goes on.
    ///
    /// # Errors
    /// Another tensor is due, more bytes than it has, and failures of the file system.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let due = self.next_tensor().map(|tensor| tensor.name.clone());
        if due.as_deref() != Some(name) {
            let due = due.map_or("all tensors are complete".to_owned(), |due| {
                format!("`{due}` is due")
            });
            return Err(self.refuse(format!("tensor `{name}` came, but {due}")));
        }
        let slot = self.layout.slots[self.n_done];
        let left = slot.n_bytes - self.written;
        if bytes.len() as u64 > left {
            let problem = format!(
                "tensor `{name}` has {} bytes, but {} came",
                slot.n_bytes,
                self.written + bytes.len() as u64
            );
            return Err(self.refuse(problem));
        }
        if std::mem::replace(&mut self.failed, true) {
            return Err(self.refuse(
                "an earlier write failed; begin again, complete tensors are kept".to_owned(),
            ));
        }
        let path = self.partial(slot.part);
        let written = self.part(slot.part)?.write_all(bytes);
        written.map_err(|error| CheckpointError::io("write", &path, error))?;
        self.crc.update(bytes);
        self.written += bytes.len() as u64;
        if self.written == slot.n_bytes {
            self.complete(slot, &path)?;
        }
        self.failed = false;
        Ok(())
    }

    /// Waits until everything is on the device and gives the files their names, which it returns.
    ///
    /// # Errors
    /// A tensor is not complete, and failures of the file system.
    pub fn finish(mut self) -> Result<Vec<PathBuf>> {
        if let Some(due) = self.next_tensor() {
            let problem = format!(
                "tensor `{}` is not complete ({} of {} are)",
                due.name,
                self.n_done,
                self.plan.tensors.len()
            );
            return Err(self.refuse(problem));
        }
        if !self.published {
            // Parts without tensors exist only when there are no tensors at all.
            if self.plan.tensors.is_empty() {
                self.part(0)?;
            }
            self.close_part()?;
            (0..self.layout.parts.len()).try_for_each(|no| sync(&self.partial(no)))?;
            self.journal.publish()?;
        }
        let mut paths = Vec::new();
        for (no, part) in self.layout.parts.iter().enumerate() {
            let partial = self.partial(no);
            // Renames may have been interrupted before.
            if !self.published || partial.exists() {
                fs::rename(&partial, &part.path)
                    .map_err(|error| CheckpointError::io("rename", &partial, error))?;
            }
            paths.push(part.path.clone());
        }
        // A bare file name has no parent to sync.
        let target = std::path::absolute(&self.target);
        sync_parent(&target.map_err(|error| CheckpointError::io("resolve", &self.target, error))?)?;
        self.journal.remove()?;
        Ok(paths)
    }

    /// Gives up: removes everything that was written.
    ///
    /// # Errors
    /// Failures of the file system.
    pub fn abandon(mut self) -> Result<()> {
        self.file = None;
        for no in 0..self.layout.parts.len() {
            remove(&self.partial(no))?;
        }
        self.journal.remove()
    }

    /// Padding after a tensor, then its line in the journal.
    fn complete(&mut self, slot: Slot, path: &Path) -> Result<()> {
        let padding = vec![0; (slot.padded - slot.n_bytes) as usize];
        let file = self.part(slot.part)?;
        let flushed = file.write_all(&padding).and_then(|()| file.flush());
        flushed.map_err(|error| CheckpointError::io("write", path, error))?;
        self.crc.update(&padding);
        let crc = std::mem::take(&mut self.crc).finalize();
        self.journal.finished(crc)?;
        self.n_done += 1;
        self.written = 0;
        Ok(())
    }

    /// The file of part `no`, begun with its header if it is new. Parts are written in order.
    fn part(&mut self, no: usize) -> Result<&mut BufWriter<File>> {
        if self.file.as_ref().is_none_or(|(open, _)| *open != no) {
            self.close_part()?;
            let path = self.partial(no);
            let io = |error| CheckpointError::io("write", &path, error);
            let mut file = BufWriter::with_capacity(BUFFER, File::create(&path).map_err(io)?);
            file.write_all(&self.layout.parts[no].header).map_err(io)?;
            self.file = Some((no, file));
        }
        let (_, file) = self.file.as_mut().expect("a part is open now");
        Ok(file)
    }

    fn close_part(&mut self) -> Result<()> {
        let Some((no, mut file)) = self.file.take() else {
            return Ok(());
        };
        file.flush()
            .map_err(|error| CheckpointError::io("write", &self.partial(no), error))
    }

    /// Whether every part is there, renamed or not.
    fn is_all_there(&self) -> bool {
        let parts = &mut self.layout.parts.iter().enumerate();
        parts.all(|(no, part)| part.path.exists() || self.partial(no).exists())
    }

    /// Verifies what an earlier writer left and positions this one after it.
    fn resume(&mut self, crcs: &[u32]) -> Result<()> {
        let n_parts = self.layout.parts.len();
        for no in 0..n_parts {
            let path = self.partial(no);
            let slots: Vec<Slot> = self
                .layout
                .slots
                .iter()
                .filter(|slot| slot.part == no)
                .copied()
                .collect();
            let claimed = crcs.get(self.n_done..).unwrap_or_default();
            let claimed = &claimed[..claimed.len().min(slots.len())];
            if claimed.is_empty() || !path.exists() {
                break;
            }
            tracing::debug!(path = %path.display(), n_tensors = claimed.len(), "verifying an unfinished file");
            let part = &self.layout.parts[no];
            let n_verified = verify(&path, part, &slots, claimed)
                .map_err(|error| CheckpointError::io("read", &path, error))?;
            self.n_done += n_verified;
            if n_verified == slots.len() && no + 1 < n_parts {
                continue;
            }
            if let Some(last) = n_verified.checked_sub(1).map(|last| slots[last]) {
                let end = part.header.len() as u64 + last.offset + last.padded;
                self.file = Some((no, append_at(&path, end)?));
            }
            break;
        }
        if self.n_done > 0 {
            tracing::info!(
                target = %self.target.display(),
                n_done = self.n_done,
                n_tensors = self.plan.tensors.len(),
                "going on with an unfinished file"
            );
        }
        Ok(())
    }

    /// Removes what is left of another file that was begun here, in `n_parts` parts.
    fn remove_stale(&self, n_parts: usize) -> Result<()> {
        let paths = part_paths(&self.target, n_parts).unwrap_or_default();
        paths
            .iter()
            .try_for_each(|path| remove(&hidden(path, "partial")))
    }

    fn partial(&self, no: usize) -> PathBuf {
        hidden(&self.layout.parts[no].path, "partial")
    }

    fn refuse(&self, problem: String) -> CheckpointError {
        CheckpointError::CannotWrite {
            path: self.target.clone(),
            problem,
        }
    }
}

impl std::fmt::Debug for GgufWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GgufWriter")
            .field("target", &self.target)
            .field("n_done", &self.n_done)
            .field("n_tensors", &self.plan.tensors.len())
            .finish_non_exhaustive()
    }
}

/// Names the bytes to be: the source of the data and every header, which hold all else.
fn identity(source: &str, layout: &Layout) -> String {
    let mut hasher = Sha256::new();
    let headers = layout.parts.iter().map(|part| &part.header[..]);
    for bytes in std::iter::once(source.as_bytes()).chain(headers) {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    let digest = hasher.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn exists(path: &Path) -> CheckpointError {
    CheckpointError::CannotWrite {
        path: path.to_owned(),
        problem: "it exists already; remove it or choose another name".to_owned(),
    }
}
