//! A trace recorded in parts, so that an interrupted recording goes on where it stopped.
//!
//! Until it is finished everything is in `.NAME.recording` beside the target: a file that says what is being recorded, and
//! parts, each a whole trace of some sequences, named by the first sequence that comes after it. A part is closed when a
//! sequence ends and it has enough rows; what was open when the program ended is recorded again. At the end the rows of all
//! parts are written into one file, in their order, whose row groups are those of a recording that was never interrupted.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::TraceError;
use crate::meta::{Part, TraceMeta};
use crate::reader::TraceReader;
use crate::row::Step;
use crate::schema::Columns;
use crate::writer::{TraceWriter, Written, io};

/// Says what is recorded, in the hidden folder only.
const IDENTITY: &str = "identity";

/// Rows after which a part is closed, at the end of a sequence.
const PART_ROWS: u64 = 1 << 16;

/// A recording in progress. Dropped before [`Recording::finish`], it leaves its parts for the next one, or nothing where
/// there are none.
pub struct Recording {
    target: PathBuf,
    folder: PathBuf,
    meta: TraceMeta,
    columns: Columns,
    part_rows: u64,
    /// Finished parts, in order.
    parts: Vec<PathBuf>,
    /// The next sequence.
    next: u32,
    open: Option<TraceWriter>,
    open_rows: u64,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording")
            .field("target", &self.target)
            .field("parts", &self.parts.len())
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl Recording {
    /// Begins a trace that will appear at `target` (replacing a file there), or goes on with an unfinished one of the same
    /// `identity`, which has to say all that rows depend on: the model, the text, the options.
    ///
    /// # Errors
    /// As [`TraceWriter::create`], and parts that cannot be read.
    pub fn begin(
        target: &Path,
        meta: &TraceMeta,
        columns: Columns,
        identity: &str,
    ) -> Result<Self, TraceError> {
        meta.check()?;
        if target.exists() && !target.is_file() {
            let source = std::io::Error::other("it is not a regular file");
            return Err(io("write a trace over", target)(source));
        }
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let folder = target.with_file_name(format!(".{name}.recording"));
        let mut recording = Self {
            target: target.to_path_buf(),
            folder,
            meta: meta.clone(),
            columns,
            part_rows: PART_ROWS,
            parts: Vec::new(),
            next: 0,
            open: None,
            open_rows: 0,
        };
        recording.go_on_or_begin(identity)?;
        Ok(recording)
    }

    /// The first sequence that has not been recorded; those before are not to be recorded again.
    #[must_use]
    pub fn next_sequence(&self) -> u32 {
        self.next
    }

    /// Appends the rows of one step of sequence [`Recording::next_sequence`], of the experts of `part`.
    ///
    /// # Errors
    /// As [`TraceWriter::push_part`].
    pub fn push(&mut self, part: Part, step: &Step<'_>) -> Result<(), TraceError> {
        if self.open.is_none() {
            let path = self.folder.join("open.parquet");
            self.open = Some(TraceWriter::create(&path, &self.meta, self.columns)?);
        }
        if let Some(writer) = &mut self.open {
            writer.push_part(part, step)?;
            self.open_rows += step.tokens.len() as u64;
        }
        Ok(())
    }

    /// Says that all of sequence [`Recording::next_sequence`] has been pushed.
    ///
    /// # Errors
    /// As [`TraceWriter::finish`].
    pub fn end_sequence(&mut self) -> Result<(), TraceError> {
        self.next += 1;
        match self.open_rows >= self.part_rows {
            true => self.close(),
            false => Ok(()),
        }
    }

    /// Writes the whole trace and gives it its name.
    ///
    /// # Errors
    /// As [`TraceWriter::finish`]; the parts are still there then.
    pub fn finish(mut self) -> Result<Written, TraceError> {
        self.close()?;
        let mut whole = TraceWriter::create(&self.target, &self.meta, self.columns)?;
        for part in &self.parts {
            let mut reader = TraceReader::open_all(part)?;
            while let Some(block) = reader.next_block()? {
                for (row, part) in block.rows().zip(block.parts()) {
                    whole.push_row_of(part, &row)?;
                }
            }
        }
        let written = whole.finish()?;
        fs::remove_dir_all(&self.folder).map_err(io("remove", &self.folder))?;
        self.parts.clear();
        Ok(written)
    }

    /// Closes the open part.
    fn close(&mut self) -> Result<(), TraceError> {
        let Some(writer) = self.open.take() else {
            return Ok(());
        };
        writer.finish()?;
        self.open_rows = 0;
        let part = self.folder.join(format!("{:010}.parquet", self.next));
        let from = self.folder.join("open.parquet");
        fs::rename(&from, &part).map_err(io("give its name to", &part))?;
        self.parts.push(part);
        Ok(())
    }

    /// Takes over the parts of an unfinished recording of the same identity; removes those of another.
    fn go_on_or_begin(&mut self, identity: &str) -> Result<(), TraceError> {
        let mark = self.folder.join(IDENTITY);
        if self.folder.exists() {
            if fs::read_to_string(&mark).is_ok_and(|known| known == identity) {
                return self.take_over();
            }
            // Ours by its name; another model or text, or of a version that says it otherwise.
            fs::remove_dir_all(&self.folder).map_err(io("remove", &self.folder))?;
        }
        fs::create_dir(&self.folder).map_err(io("create", &self.folder))?;
        fs::write(&mark, identity).map_err(io("write", &mark))
    }

    fn take_over(&mut self) -> Result<(), TraceError> {
        let mut parts = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(io("read", &self.folder))? {
            let path = entry.map_err(io("read", &self.folder))?.path();
            let is_part = path
                .extension()
                .is_some_and(|extension| extension == "parquet");
            let next = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse::<u32>().ok());
            match next.filter(|_| is_part) {
                Some(next) => parts.push((next, path)),
                // What was open when the program was killed.
                None if path.file_name().is_some_and(|name| name != IDENTITY) => {
                    fs::remove_file(&path).map_err(io("remove", &path))?;
                }
                None => {}
            }
        }
        parts.sort();
        self.next = parts.last().map_or(0, |(next, _)| *next);
        self.parts = parts.into_iter().map(|(_, path)| path).collect();
        Ok(())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // The temporary file of the open part goes first.
        self.open = None;
        if self.parts.is_empty() {
            // Nothing to go on with; that it cannot be removed is not worth a message on the way out.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use cadre_routing::Routing;

    use super::*;
    use crate::reader::Trace;

    const COLUMNS: Columns = Columns {
        logits: false,
        norms: false,
    };

    fn meta() -> TraceMeta {
        crate::synthetic::meta()
    }

    /// Pushes sequence `next_sequence` of three tokens.
    fn push(recording: &mut Recording) {
        let seq = recording.next_sequence();
        let mut routing = Routing::new();
        for token in 0..3 {
            routing.push_pair(((seq + token) % 4) as u16, 0.5);
            routing.end_token();
        }
        let step = Step {
            seq,
            first_pos: 0,
            tokens: &[seq, seq + 1, seq + 2],
            domain: if seq.is_multiple_of(2) { "even" } else { "odd" },
            layer: 0,
            routing: &routing,
            logits: None,
            norms: None,
        };
        recording.push(Part::FeedForward, &step).unwrap();
    }

    fn begin(path: &Path, identity: &str) -> Recording {
        let mut recording = Recording::begin(path, &meta(), COLUMNS, identity).unwrap();
        recording.part_rows = 6;
        recording
    }

    fn rows(path: &Path) -> Vec<String> {
        let trace = Trace::read(path).unwrap();
        trace.rows().map(|row| format!("{row:?}")).collect()
    }

    fn entries(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn an_interrupted_recording_goes_on_and_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("whole.parquet");
        let mut recording = begin(&whole, "a");
        while recording.next_sequence() < 7 {
            push(&mut recording);
            recording.end_sequence().unwrap();
        }
        recording.finish().unwrap();
        let cut = folder.path().join("cut.parquet");
        let mut starts = Vec::new();
        for stop in [3, 6, 7] {
            let mut recording = begin(&cut, "a");
            starts.push(recording.next_sequence());
            while recording.next_sequence() < stop {
                push(&mut recording);
                recording.end_sequence().unwrap();
            }
            match stop {
                7 => {
                    recording.finish().unwrap();
                }
                // In the middle of a sequence.
                _ => push(&mut recording),
            }
        }
        assert_eq!(starts, [0, 2, 6]);
        assert_eq!(rows(&cut), rows(&whole));
        assert_eq!(rows(&cut).len(), 21);
        assert_eq!(entries(folder.path()), 2, "nothing else is left");
    }

    #[test]
    fn another_model_or_text_begins_anew_and_nothing_is_left_of_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let mut recording = begin(&path, "a");
        for _ in 0..2 {
            push(&mut recording);
            recording.end_sequence().unwrap();
        }
        drop(recording);
        assert_eq!(begin(&path, "a").next_sequence(), 2);
        let recording = begin(&path, "b");
        assert_eq!(recording.next_sequence(), 0);
        drop(recording);
        assert_eq!(entries(folder.path()), 0);
        assert!(Recording::begin(folder.path(), &meta(), COLUMNS, "a").is_err());
    }
}
