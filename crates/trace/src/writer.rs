//! Writing a trace: rows in, one complete Parquet file out, or nothing at all.
//!
//! Rows are gathered into batches and the batches into row groups of bounded size, so memory does not grow with the
//! trace. Everything goes to a temporary file in the target's folder, which [`TraceWriter::finish`] renames; a writer
//! dropped before that removes it.

use crate::error::TraceError;
use crate::meta::{Part, TraceMeta};
use crate::row::{Row, Step};
use crate::schema::{self, Columns};
use arrow::array::{
    ArrayRef, DictionaryArray, Float32Array, Int32Array, ListArray, RecordBatch, StringArray,
    UInt16Array, UInt32Array,
};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Int32Type, SchemaRef};
use arrow::error::ArrowError;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use std::collections::HashMap;
use std::fs::File;
use std::mem::take;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::NamedTempFile;

/// Bytes of list values gathered before a batch is handed to the Parquet writer.
const BATCH_BYTES: usize = 4 << 20;
/// Rows gathered before a batch is handed to the Parquet writer, however small they are.
const BATCH_ROWS: usize = 16 << 10;
/// Encoded size at which a row group is closed; with the batch, the bound on memory.
const ROW_GROUP_BYTES: usize = 32 << 20;

/// What a finished trace file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Rows in the file.
    pub n_rows: u64,
    /// Size of the file.
    pub n_bytes: u64,
}

/// Writes one trace file.
pub struct TraceWriter {
    path: PathBuf,
    meta: TraceMeta,
    /// The model as rows of attention experts see it, if it has any.
    attention: Option<TraceMeta>,
    schema: SchemaRef,
    temp: NamedTempFile,
    writer: ArrowWriter<File>,
    batch: Batch,
    n_rows: u64,
}

impl TraceWriter {
    /// Starts a trace that will appear at `path` (replacing a file there) when it is finished.
    ///
    /// # Errors
    /// [`TraceError::BadMeta`] for impossible counts, [`TraceError::Io`] when the folder cannot be written to.
    pub fn create(path: &Path, meta: &TraceMeta, columns: Columns) -> Result<Self, TraceError> {
        meta.check()?;
        // The finished file is renamed over its target, which must not replace a folder, a device or a pipe.
        if path.exists() && !path.is_file() {
            let source = std::io::Error::other("it is not a regular file");
            return Err(io("write a trace over", path)(source));
        }
        let temp = temporary_beside(path)?;
        let file = temp
            .reopen()
            .map_err(io("open the temporary file of", path))?;
        let pairs = meta.to_pairs();
        // Twice: as Parquet metadata, and in the arrow schema, where pyarrow keeps it when it rewrites a table.
        let own = |&(key, ref value): &(&str, String)| (key.to_string(), value.clone());
        let schema = schema::schema(columns, meta.attention.is_some())
            .as_ref()
            .clone();
        let schema =
            Arc::new(schema.with_metadata(pairs.iter().map(own).collect::<HashMap<_, _>>()));
        let pairs = pairs
            .into_iter()
            .map(|(key, value)| KeyValue::new(key.to_string(), value));
        let properties = WriterProperties::builder()
            .set_created_by(format!("cadre {}", env!("CARGO_PKG_VERSION")))
            .set_compression(Compression::SNAPPY)
            .set_key_value_metadata(Some(pairs.collect()))
            .build();
        let writer =
            ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(failed(path))?;
        let batch = Batch::new(columns, meta.attention.is_some());
        Ok(Self {
            path: path.to_path_buf(),
            meta: meta.clone(),
            attention: meta.of(Part::Attention),
            schema,
            temp,
            writer,
            batch,
            n_rows: 0,
        })
    }

    /// Appends the rows of one step of the feed-forward's experts. Either all of them are taken or none.
    ///
    /// # Errors
    /// As [`TraceWriter::push_part`].
    pub fn push(&mut self, step: &Step<'_>) -> Result<(), TraceError> {
        self.push_part(Part::FeedForward, step)
    }

    /// Appends the rows of one step of the experts of `part`. Either all of them are taken or none.
    ///
    /// # Errors
    /// [`TraceError::NoAttention`] for a part that the model does not have, [`TraceError::Shape`] and [`TraceError::Row`] for data that does not fit the model or lacks a declared column,
    /// [`TraceError::Write`] when the disk refuses.
    pub fn push_part(&mut self, part: Part, step: &Step<'_>) -> Result<(), TraceError> {
        let rows = step.rows(self.meta_of(part)?)?;
        for row in &rows {
            self.batch.check_columns(row)?;
        }
        rows.iter().try_for_each(|row| self.append(part, row))
    }

    /// Appends one row of the feed-forward's experts.
    ///
    /// # Errors
    /// As [`TraceWriter::push`].
    pub fn push_row(&mut self, row: &Row<'_>) -> Result<(), TraceError> {
        self.push_row_of(Part::FeedForward, row)
    }

    /// Appends one row.
    pub(crate) fn push_row_of(&mut self, part: Part, row: &Row<'_>) -> Result<(), TraceError> {
        row.check(self.meta_of(part)?)?;
        self.batch.check_columns(row)?;
        self.append(part, row)
    }

    fn meta_of(&self, part: Part) -> Result<&TraceMeta, TraceError> {
        let meta = match part {
            Part::FeedForward => Some(&self.meta),
            Part::Attention => self.attention.as_ref(),
        };
        meta.ok_or_else(|| TraceError::NoAttention {
            path: self.path.clone(),
        })
    }

    /// Completes the file: flushes it to the disk and gives it its name.
    ///
    /// # Errors
    /// [`TraceError::Write`] or [`TraceError::Io`]; the temporary file is gone then.
    pub fn finish(mut self) -> Result<Written, TraceError> {
        self.write_batch()?;
        // `into_inner` writes the footer first.
        let file = self.writer.into_inner().map_err(failed(&self.path))?;
        file.sync_all().map_err(io("flush", &self.path))?;
        let n_bytes = file.metadata().map_err(io("measure", &self.path))?.len();
        self.temp
            .persist(&self.path)
            .map_err(|error| io("give its name to", &self.path)(error.error))?;
        Ok(Written {
            n_rows: self.n_rows,
            n_bytes,
        })
    }

    fn append(&mut self, part: Part, row: &Row<'_>) -> Result<(), TraceError> {
        self.batch.push(part, row);
        self.n_rows += 1;
        if self.batch.seq.len() >= BATCH_ROWS || self.batch.n_bytes >= BATCH_BYTES {
            self.write_batch()?;
            if self.writer.in_progress_size() >= ROW_GROUP_BYTES {
                self.writer.flush().map_err(failed(&self.path))?;
            }
        }
        Ok(())
    }

    fn write_batch(&mut self) -> Result<(), TraceError> {
        if self.batch.seq.is_empty() {
            return Ok(());
        }
        let batch = self
            .batch
            .take(&self.schema)
            .map_err(|error| TraceError::Write {
                path: self.path.clone(),
                reason: error.to_string(),
            })?;
        self.writer.write(&batch).map_err(failed(&self.path))
    }
}

/// A temporary file in the folder of `path`, with the permissions a newly created file would have.
fn temporary_beside(path: &Path) -> Result<NamedTempFile, TraceError> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".trace-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The process's umask is applied to this, as for any other new file.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder
        .tempfile_in(folder)
        .map_err(io("create a temporary file beside", path))
}

pub(crate) fn io(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> TraceError {
    let path = path.to_path_buf();
    move |source| TraceError::Io {
        action,
        path: path.clone(),
        source,
    }
}

fn failed(path: &Path) -> impl Fn(parquet::errors::ParquetError) -> TraceError {
    let path = path.to_path_buf();
    move |error| TraceError::Write {
        path: path.clone(),
        reason: error.to_string(),
    }
}

/// Rows waiting to be encoded, column by column.
struct Batch {
    seq: Vec<u32>,
    pos: Vec<u32>,
    token: Vec<u32>,
    domain_ids: Vec<i32>,
    domains: Vec<String>,
    layer: Vec<u16>,
    experts: Lists<u16>,
    weights: Lists<f32>,
    logits: Option<Lists<f32>>,
    norms: Option<Lists<f32>>,
    parts: Option<Vec<&'static str>>,
    n_bytes: usize,
}

/// A list column: the items of row `i` are `items[ends[i-1]..ends[i]]`.
struct Lists<T> {
    items: Vec<T>,
    ends: Vec<i32>,
}

impl<T: Copy> Lists<T> {
    fn new() -> Self {
        Self {
            items: Vec::new(),
            ends: vec![0],
        }
    }

    fn push(&mut self, row: &[T]) {
        self.items.extend_from_slice(row);
        // A batch is cut at BATCH_BYTES, so this cannot overflow.
        self.ends.push(self.items.len() as i32);
    }

    /// Takes the offsets and the items, leaving an empty column.
    fn take(&mut self) -> (OffsetBuffer<i32>, Vec<T>) {
        let ends = std::mem::replace(&mut self.ends, vec![0]);
        (
            OffsetBuffer::new(ScalarBuffer::from(ends)),
            take(&mut self.items),
        )
    }
}

impl Batch {
    fn new(columns: Columns, parts: bool) -> Self {
        Self {
            seq: Vec::new(),
            pos: Vec::new(),
            token: Vec::new(),
            domain_ids: Vec::new(),
            domains: Vec::new(),
            layer: Vec::new(),
            experts: Lists::new(),
            weights: Lists::new(),
            logits: columns.logits.then(Lists::new),
            norms: columns.norms.then(Lists::new),
            parts: parts.then(Vec::new),
            n_bytes: 0,
        }
    }

    /// A declared optional column must be in every row: a half-filled column would be read as zeros by someone.
    fn check_columns(&self, row: &Row<'_>) -> Result<(), TraceError> {
        let declared = [
            ("logits", self.logits.is_some(), row.logits),
            ("norms", self.norms.is_some(), row.norms),
        ];
        for (what, declared, values) in declared {
            if declared && values.is_none() {
                return Err(TraceError::Row {
                    origin: String::new(),
                    seq: row.seq,
                    pos: row.pos,
                    layer: usize::from(row.layer),
                    problem: format!("the trace was started with {what}, but the row has none"),
                });
            }
        }
        Ok(())
    }

    fn push(&mut self, part: Part, row: &Row<'_>) {
        if let Some(parts) = &mut self.parts {
            parts.push(part.name());
        }
        self.seq.push(row.seq);
        self.pos.push(row.pos);
        self.token.push(row.token);
        let domain = self.domain_id(row.domain);
        self.domain_ids.push(domain);
        self.layer.push(row.layer);
        self.experts.push(row.experts);
        self.weights.push(row.weights);
        self.n_bytes += 6 * row.experts.len();
        for (column, values) in [(&mut self.logits, row.logits), (&mut self.norms, row.norms)] {
            if let (Some(column), Some(values)) = (column, values) {
                column.push(values);
                self.n_bytes += 4 * values.len();
            }
        }
    }

    fn domain_id(&mut self, domain: &str) -> i32 {
        // Rows come sequence by sequence, so the last domain used is nearly always the one.
        let known = match self.domain_ids.last() {
            Some(&last) if self.domains[last as usize] == domain => Some(last as usize),
            _ => self.domains.iter().position(|name| name == domain),
        };
        let id = known.unwrap_or_else(|| {
            self.domains.push(domain.to_string());
            self.domains.len() - 1
        });
        id as i32
    }

    /// Turns the rows into an arrow batch and starts over.
    fn take(&mut self, schema: &SchemaRef) -> Result<RecordBatch, ArrowError> {
        let keys = Int32Array::from(take(&mut self.domain_ids));
        let names = Arc::new(StringArray::from(take(&mut self.domains)));
        self.n_bytes = 0;
        let (offsets, experts) = self.experts.take();
        let experts = Arc::new(UInt16Array::from(experts));
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from(take(&mut self.seq))),
            Arc::new(UInt32Array::from(take(&mut self.pos))),
            Arc::new(UInt32Array::from(take(&mut self.token))),
            Arc::new(DictionaryArray::try_new(keys, names)?),
            Arc::new(UInt16Array::from(take(&mut self.layer))),
            Arc::new(ListArray::try_new(
                schema::item(DataType::UInt16),
                offsets,
                experts,
                None,
            )?),
        ];
        let floats = [
            Some(&mut self.weights),
            self.logits.as_mut(),
            self.norms.as_mut(),
        ];
        for lists in floats.into_iter().flatten() {
            let (offsets, items) = lists.take();
            let items = Arc::new(Float32Array::from(items));
            columns.push(Arc::new(ListArray::try_new(
                schema::item(DataType::Float32),
                offsets,
                items,
                None,
            )?));
        }
        if let Some(parts) = &mut self.parts {
            let parts: DictionaryArray<Int32Type> = take(parts).into_iter().collect();
            columns.push(Arc::new(parts));
        }
        RecordBatch::try_new(schema.clone(), columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::AttentionExperts;
    use crate::reader::{Trace, TraceReader};
    use crate::synthetic::{self, Recipe};

    #[test]
    fn a_trace_round_trips_with_every_choice_of_columns() {
        let folder = tempfile::tempdir().unwrap();
        for columns in [(false, false), (true, false), (false, true), (true, true)] {
            let columns = Columns {
                logits: columns.0,
                norms: columns.1,
            };
            let rows = synthetic::rows(&Recipe {
                columns,
                ..Recipe::default()
            });
            let path = folder.path().join("t.parquet");
            let mut writer = TraceWriter::create(&path, &synthetic::meta(), columns).unwrap();
            for row in &rows {
                writer.push_row(&row.view()).unwrap();
            }
            let written = writer.finish().unwrap();
            assert_eq!(written.n_rows, rows.len() as u64);
            assert_eq!(written.n_bytes, std::fs::metadata(&path).unwrap().len());

            let trace = Trace::read(&path).unwrap();
            assert_eq!(trace.meta(), &synthetic::meta());
            assert_eq!(trace.columns(), columns);
            assert!(trace.rows().eq(rows.iter().map(|row| row.view())));
        }
    }

    #[test]
    fn long_traces_are_cut_into_row_groups_and_read_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let meta = TraceMeta {
            n_layers: 1,
            n_experts: 512,
            top_k: 2,
            ..synthetic::meta()
        };
        let mut writer = TraceWriter::create(
            &path,
            &meta,
            Columns {
                logits: true,
                norms: false,
            },
        )
        .unwrap();
        // Logits that do not compress, so that more than one row group is filled: 24k rows of 2 KiB.
        let mut state = 1_u32;
        let mut logits = vec![0.0; 512];
        for pos in 0..24_000 {
            for value in &mut logits {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *value = (state >> 8) as f32;
            }
            let experts = [(pos % 512) as u16, ((pos + 1) % 512) as u16];
            let row = Row {
                seq: 0,
                pos,
                token: pos,
                domain: "prose",
                layer: 0,
                experts: &experts,
                weights: &[0.5, 0.5],
                logits: Some(&logits),
                norms: None,
            };
            writer.push_row(&row).unwrap();
        }
        writer.finish().unwrap();
        let mut reader = TraceReader::open(&path).unwrap();
        assert!(reader.n_row_groups() > 1);
        let mut next = 0;
        while let Some(block) = reader.next_block().unwrap() {
            for row in block.rows() {
                assert_eq!((row.pos, row.experts[0]), (next, (next % 512) as u16));
                next += 1;
            }
        }
        assert_eq!(next, 24_000);
    }

    #[test]
    fn rows_of_attention_experts_are_kept_apart() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("t.parquet"), folder.path().join("old"));
        let meta = TraceMeta {
            attention: Some(AttentionExperts {
                n_experts: 7,
                top_k: 1,
            }),
            ..synthetic::meta()
        };
        let rows = synthetic::rows(&Recipe::default());
        let mut writer = TraceWriter::create(&path, &meta, Columns::default()).unwrap();
        let mut plain = TraceWriter::create(&old, &synthetic::meta(), Columns::default()).unwrap();
        let attention = |row: &Row<'_>| (row.pos % 7) as u16;
        for row in &rows {
            let row = row.view();
            let experts = [attention(&row)];
            let of_attention = Row {
                experts: &experts,
                weights: &[0.25],
                ..row
            };
            writer.push_row_of(Part::Attention, &of_attention).unwrap();
            writer.push_row(&row).unwrap();
            plain.push_row(&row).unwrap();
            let refused = plain.push_row_of(Part::Attention, &of_attention);
            assert!(matches!(refused, Err(TraceError::NoAttention { .. })));
        }
        let many = Row {
            experts: &[7],
            weights: &[0.25],
            ..rows[0].view()
        };
        assert!(writer.push_row_of(Part::Attention, &many).is_err());
        assert_eq!(writer.finish().unwrap().n_rows, 2 * rows.len() as u64);
        plain.finish().unwrap();

        let read = |path: &Path, part| {
            let mut reader = TraceReader::open_part(path, part)?;
            let (mut found, n_experts) = (Vec::new(), reader.meta().n_experts);
            while let Some(block) = reader.next_block()? {
                found.extend(block.rows().map(|row| format!("{row:?}")));
            }
            Ok::<_, TraceError>((n_experts, found))
        };
        let (n_experts, found) = read(&path, Part::FeedForward).unwrap();
        assert_eq!((n_experts, found), read(&old, Part::FeedForward).unwrap());
        let trace = Trace::read(&path).unwrap();
        assert_eq!(trace.n_rows(), rows.len());
        let (n_experts, found) = read(&path, Part::Attention).unwrap();
        assert_eq!((n_experts, found.len()), (7, rows.len()));
        for (found, row) in found.iter().zip(&rows) {
            let experts = [attention(&row.view())];
            let want = Row {
                experts: &experts,
                weights: &[0.25],
                ..row.view()
            };
            assert_eq!(*found, format!("{want:?}"));
        }
        let refused = read(&old, Part::Attention).unwrap_err().to_string();
        assert!(refused.contains("old is of a model"), "{refused}");
    }

    #[test]
    fn a_writer_dropped_without_finish_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let rows = synthetic::rows(&Recipe::default());
        let mut writer =
            TraceWriter::create(&path, &synthetic::meta(), Columns::default()).unwrap();
        writer.push_row(&rows[0].view()).unwrap();
        assert!(!path.exists());
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_older_trace_survives_until_the_new_one_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        std::fs::write(&path, "old").unwrap();
        let writer = TraceWriter::create(&path, &synthetic::meta(), Columns::default()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        writer.finish().unwrap();
        assert_ne!(std::fs::read(&path).unwrap(), b"old");
    }

    #[cfg(unix)]
    #[test]
    fn a_finished_trace_has_ordinary_permissions() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (path, plain) = (folder.path().join("t.parquet"), folder.path().join("plain"));
        TraceWriter::create(&path, &synthetic::meta(), Columns::default())
            .unwrap()
            .finish()
            .unwrap();
        std::fs::write(&plain, "").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain));
    }

    #[test]
    fn targets_that_cannot_be_written_are_named() {
        let folder = tempfile::tempdir().unwrap();
        for path in [
            folder.path().to_path_buf(),
            folder.path().join("absent/t.parquet"),
            PathBuf::from(if cfg!(unix) { "/dev/null" } else { "." }),
        ] {
            let error = TraceWriter::create(&path, &synthetic::meta(), Columns::default())
                .err()
                .unwrap();
            assert!(
                error.to_string().contains(&path.display().to_string()),
                "{error}"
            );
        }
        let meta = TraceMeta {
            top_k: 9,
            ..synthetic::meta()
        };
        assert!(TraceWriter::create(&folder.path().join("t"), &meta, Columns::default()).is_err());
    }

    #[test]
    fn a_row_without_a_declared_column_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let rows = synthetic::rows(&Recipe::default());
        let mut writer = TraceWriter::create(
            &path,
            &synthetic::meta(),
            Columns {
                logits: true,
                norms: false,
            },
        )
        .unwrap();
        let error = writer.push_row(&rows[0].view()).unwrap_err().to_string();
        assert!(error.contains("logits"), "{error}");
    }
}
