//! Reading a trace back: block by block in bounded memory ([`TraceReader`]), or whole ([`Trace`]).
//!
//! Everything is checked before a row is handed out: that the file is Parquet, has the metadata and the columns, and
//! that every row agrees with the model it names.

use crate::error::TraceError;
use crate::meta::{Part, TraceMeta};
use crate::row::Row;
use crate::schema::{self, Columns};
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float32Array, ListArray, RecordBatch, StringArray,
    UInt16Array, UInt32Array,
};
use arrow::compute::{cast, filter_record_batch};
use arrow::datatypes::{DataType, Float32Type, UInt16Type, UInt32Type};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Rows decoded at a time.
const BLOCK_ROWS: usize = 8 << 10;

/// Reads one trace file, block by block.
pub struct TraceReader {
    path: PathBuf,
    meta: TraceMeta,
    /// The model as rows of attention experts see it, if it has any.
    attention: Option<TraceMeta>,
    /// Whose rows are read; `None` for all.
    part: Option<Part>,
    columns: Columns,
    n_rows: u64,
    n_row_groups: usize,
    batches: ParquetRecordBatchReader,
}

impl TraceReader {
    /// Opens a trace for the rows of the feed-forward's experts, and checks its metadata and columns; no row is read yet.
    ///
    /// # Errors
    /// [`TraceError::Io`], [`TraceError::NotParquet`], and the errors about metadata keys and columns.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        Self::open_part(path, Part::FeedForward)
    }

    /// Opens a trace for the rows of the experts of `part`.
    ///
    /// # Errors
    /// As [`TraceReader::open`], and [`TraceError::NoAttention`] for a part that the model does not have.
    pub fn open_part(path: &Path, part: Part) -> Result<Self, TraceError> {
        let mut reader = Self::open_all(path)?;
        if part == Part::Attention && reader.attention.is_none() {
            let path = path.to_path_buf();
            return Err(TraceError::NoAttention { path });
        }
        reader.part = Some(part);
        Ok(reader)
    }

    /// Opens a trace for the rows of all parts.
    pub(crate) fn open_all(path: &Path) -> Result<Self, TraceError> {
        let file = File::open(path).map_err(|source| TraceError::Io {
            action: "open",
            path: path.to_path_buf(),
            source,
        })?;
        let not_parquet = |reason: parquet::errors::ParquetError| TraceError::NotParquet {
            path: path.to_path_buf(),
            reason: reason.to_string(),
        };
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(not_parquet)?;
        let file_metadata = builder.metadata().file_metadata();
        let pairs = file_metadata
            .key_value_metadata()
            .map_or(&[][..], Vec::as_slice);
        let get = |key: &str| {
            pairs
                .iter()
                .find(|pair| pair.key == key)
                .and_then(|pair| pair.value.clone())
        };
        let meta = TraceMeta::from_pairs(path, get)?;
        let columns = schema::check(path, builder.schema(), meta.attention.is_some())?;
        let n_rows = u64::try_from(file_metadata.num_rows()).unwrap_or(0);
        let n_row_groups = builder.metadata().num_row_groups();
        let batches = builder
            .with_batch_size(BLOCK_ROWS)
            .build()
            .map_err(not_parquet)?;
        Ok(Self {
            path: path.to_path_buf(),
            attention: meta.of(Part::Attention),
            meta,
            part: None,
            columns,
            n_rows,
            n_row_groups,
            batches,
        })
    }

    /// The model the trace was recorded from, as the rows see it that are read.
    pub fn meta(&self) -> &TraceMeta {
        self.meta_of(self.part.unwrap_or_default())
    }

    fn meta_of(&self, part: Part) -> &TraceMeta {
        match (part, &self.attention) {
            (Part::Attention, Some(meta)) => meta,
            _ => &self.meta,
        }
    }

    /// Which optional columns the trace has.
    pub fn columns(&self) -> Columns {
        self.columns
    }

    /// Rows in the file, of all parts.
    pub fn n_rows(&self) -> u64 {
        self.n_rows
    }

    /// Row groups in the file.
    pub fn n_row_groups(&self) -> usize {
        self.n_row_groups
    }

    /// The next rows of the file, checked, or `None` at its end.
    ///
    /// # Errors
    /// [`TraceError::Damaged`] when a page cannot be decoded, [`TraceError::Nulls`] and [`TraceError::Row`] for
    /// contents that contradict the format.
    pub fn next_block(&mut self) -> Result<Option<Block>, TraceError> {
        let Some(batch) = self.batches.next() else {
            return Ok(None);
        };
        let batch = batch.map_err(|error| self.damaged(&error.to_string()))?;
        let (batch, parts) = self.select(batch)?;
        let block = Block::new(&self.path, &batch, self.columns, parts)?;
        for (row, part) in block.rows().zip(block.parts()) {
            let meta = self.meta_of(part);
            row.check(meta).map_err(|error| self.located(error))?;
        }
        Ok(Some(block))
    }

    /// The rows that are read, and the part of each; no parts where all rows are the feed-forward's.
    fn select(&self, batch: RecordBatch) -> Result<(RecordBatch, Vec<Part>), TraceError> {
        if self.attention.is_none() {
            return Ok((batch, Vec::new()));
        }
        let damaged = |error: arrow::error::ArrowError| self.damaged(&error.to_string());
        let names = column(&self.path, &batch, schema::PART.0)?;
        let names = cast(names, &DataType::Utf8).map_err(damaged)?;
        let parts = names.as_string::<i32>().iter().flatten().map(|name| {
            let part = Part::ALL.into_iter().find(|part| part.name() == name);
            part.ok_or_else(|| {
                let expected = Part::ALL.map(Part::name).join(" or ");
                self.damaged(&format!("part is `{name}`, expected {expected}"))
            })
        });
        let mut parts = parts.collect::<Result<Vec<_>, _>>()?;
        let Some(wanted) = self.part else {
            return Ok((batch, parts));
        };
        let mask: Vec<bool> = parts.iter().map(|part| *part == wanted).collect();
        let batch = filter_record_batch(&batch, &BooleanArray::from(mask)).map_err(damaged)?;
        parts.retain(|part| *part == wanted);
        Ok((batch, parts))
    }

    fn damaged(&self, reason: &str) -> TraceError {
        TraceError::Damaged {
            path: self.path.clone(),
            reason: reason.to_string(),
        }
    }

    /// The error with the file it came from.
    fn located(&self, error: TraceError) -> TraceError {
        match error {
            TraceError::Row {
                seq,
                pos,
                layer,
                problem,
                ..
            } => TraceError::Row {
                origin: format!("{}: ", self.path.display()),
                seq,
                pos,
                layer,
                problem,
            },
            other => other,
        }
    }
}

/// Some rows of a trace, column by column.
#[derive(Debug, Clone)]
pub struct Block {
    seq: UInt32Array,
    pos: UInt32Array,
    token: UInt32Array,
    domain: StringArray,
    layer: UInt16Array,
    experts: Lists<UInt16Array>,
    weights: Lists<Float32Array>,
    logits: Option<Lists<Float32Array>>,
    norms: Option<Lists<Float32Array>>,
    /// One per row, or none where all are the feed-forward's.
    parts: Vec<Part>,
}

/// A list column with its items already downcast.
#[derive(Debug, Clone)]
struct Lists<A> {
    lists: ListArray,
    items: A,
}

impl<A> Lists<A> {
    fn range(&self, row: usize) -> std::ops::Range<usize> {
        // Offsets of a valid list array are ascending and not negative.
        let offsets = self.lists.value_offsets();
        offsets[row] as usize..offsets[row + 1] as usize
    }
}

/// A column whose presence and type were checked when the file was opened, and which must have no nulls.
fn column<'a>(
    path: &Path,
    batch: &'a RecordBatch,
    name: &'static str,
) -> Result<&'a ArrayRef, TraceError> {
    let column = batch
        .column_by_name(name)
        .expect("schema::check found the column");
    match column.logical_null_count() {
        0 => Ok(column),
        nulls => Err(TraceError::Nulls {
            path: path.to_path_buf(),
            column: name,
            nulls,
        }),
    }
}

impl Block {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.seq.len()
    }

    /// The rows, in file order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row<'_>> {
        (0..self.n_rows()).map(|row| self.row(row))
    }

    /// Whose experts each row is about.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Part> {
        let of_row = |row| self.parts.get(row).copied().unwrap_or_default();
        (0..self.n_rows()).map(of_row)
    }

    /// One row.
    ///
    /// # Panics
    /// When `row` is not below [`Block::n_rows`].
    pub fn row(&self, row: usize) -> Row<'_> {
        fn floats(lists: &Lists<Float32Array>, row: usize) -> &[f32] {
            &lists.items.values()[lists.range(row)]
        }
        Row {
            seq: self.seq.value(row),
            pos: self.pos.value(row),
            token: self.token.value(row),
            domain: self.domain.value(row),
            layer: self.layer.value(row),
            experts: &self.experts.items.values()[self.experts.range(row)],
            weights: floats(&self.weights, row),
            logits: self.logits.as_ref().map(|logits| floats(logits, row)),
            norms: self.norms.as_ref().map(|norms| floats(norms, row)),
        }
    }

    /// Takes the columns out of a batch whose schema was checked when the file was opened.
    fn new(
        path: &Path,
        batch: &RecordBatch,
        columns: Columns,
        parts: Vec<Part>,
    ) -> Result<Self, TraceError> {
        let column = |name: &'static str| column(path, batch, name);
        let lists = |name: &'static str| {
            let lists = column(name)?.as_list::<i32>().clone();
            match lists.values().null_count() {
                0 => Ok(lists),
                nulls => Err(TraceError::Nulls {
                    path: path.to_path_buf(),
                    column: name,
                    nulls,
                }),
            }
        };
        let floats = |name: &'static str| {
            let lists = lists(name)?;
            Ok(Lists {
                items: lists.values().as_primitive::<Float32Type>().clone(),
                lists,
            })
        };
        let experts = lists("experts")?;
        let domain =
            cast(column("domain")?, &DataType::Utf8).map_err(|error| TraceError::Damaged {
                path: path.to_path_buf(),
                reason: error.to_string(),
            })?;
        Ok(Self {
            seq: column("seq")?.as_primitive::<UInt32Type>().clone(),
            pos: column("pos")?.as_primitive::<UInt32Type>().clone(),
            token: column("token")?.as_primitive::<UInt32Type>().clone(),
            domain: domain.as_string::<i32>().clone(),
            layer: column("layer")?.as_primitive::<UInt16Type>().clone(),
            experts: Lists {
                items: experts.values().as_primitive::<UInt16Type>().clone(),
                lists: experts,
            },
            weights: floats("weights")?,
            logits: columns.logits.then(|| floats("logits")).transpose()?,
            norms: columns.norms.then(|| floats("norms")).transpose()?,
            parts,
        })
    }
}

/// A whole trace in memory; for files that are known to be small. Statistics do not need it.
#[derive(Debug, Clone)]
pub struct Trace {
    meta: TraceMeta,
    columns: Columns,
    blocks: Vec<Block>,
}

impl Trace {
    /// Reads and checks a whole file, as far as it is about the experts of the feed-forward.
    ///
    /// # Errors
    /// Those of [`TraceReader::open`] and [`TraceReader::next_block`].
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let mut reader = TraceReader::open(path)?;
        let mut blocks = Vec::new();
        while let Some(block) = reader.next_block()? {
            blocks.push(block);
        }
        Ok(Self {
            meta: reader.meta().clone(),
            columns: reader.columns,
            blocks,
        })
    }

    /// The model the trace was recorded from.
    pub fn meta(&self) -> &TraceMeta {
        &self.meta
    }

    /// Which optional columns the trace has.
    pub fn columns(&self) -> Columns {
        self.columns
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.blocks.iter().map(Block::n_rows).sum()
    }

    /// The rows, in file order.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.blocks.iter().flat_map(Block::rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::{KEY_DIGEST, KEY_N_EXPERTS};
    use crate::synthetic::{self, Recipe};
    use crate::writer::TraceWriter;
    use arrow::array::Int64Array;
    use parquet::arrow::ArrowWriter;
    use parquet::file::metadata::KeyValue;
    use parquet::file::properties::WriterProperties;
    use std::sync::Arc;

    fn sample(folder: &Path) -> PathBuf {
        let path = folder.join("t.parquet");
        let mut writer =
            TraceWriter::create(&path, &synthetic::meta(), Columns::default()).unwrap();
        for row in synthetic::rows(&Recipe::default()) {
            writer.push_row(&row.view()).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    /// Writes the rows of `from` again with other metadata and without some columns.
    fn rewrite(from: &Path, to: &Path, pairs: Vec<(&str, String)>, drop: &str) {
        let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(from).unwrap()).unwrap();
        let keep: Vec<usize> = (0..builder.schema().fields().len())
            .filter(|&i| builder.schema().field(i).name() != drop)
            .collect();
        let schema = Arc::new(builder.schema().project(&keep).unwrap());
        let pairs = pairs
            .into_iter()
            .map(|(key, value)| KeyValue::new(key.to_string(), value))
            .collect();
        let properties = WriterProperties::builder()
            .set_key_value_metadata(Some(pairs))
            .build();
        let mut writer =
            ArrowWriter::try_new(File::create(to).unwrap(), schema, Some(properties)).unwrap();
        for batch in builder.build().unwrap() {
            writer
                .write(&batch.unwrap().project(&keep).unwrap())
                .unwrap();
        }
        writer.close().unwrap();
    }

    fn error_of(path: &Path) -> String {
        Trace::read(path).unwrap_err().to_string()
    }

    #[test]
    fn files_that_are_not_traces_are_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.parquet");
        assert!(error_of(&path).contains("cannot open"));
        for contents in ["", "seq,pos\n1,2\n"] {
            std::fs::write(&path, contents).unwrap();
            assert!(
                error_of(&path).contains("not a readable Parquet file"),
                "{}",
                error_of(&path)
            );
        }
        let other: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
        let batch = RecordBatch::try_from_iter([("price", other)]).unwrap();
        let mut writer =
            ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        assert!(
            error_of(&path).contains("cadre.trace_version"),
            "{}",
            error_of(&path)
        );
    }

    #[test]
    fn a_truncated_file_is_refused_wherever_it_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = sample(folder.path());
        let bytes = std::fs::read(&path).unwrap();
        for keep in [3, 100, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..keep]).unwrap();
            assert!(error_of(&path).contains("t.parquet"), "{}", error_of(&path));
        }
    }

    #[test]
    fn damaged_pages_are_errors_not_panics() {
        let folder = tempfile::tempdir().unwrap();
        let path = sample(folder.path());
        let bytes = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for at in (4..bytes.len() - 8).step_by(37) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            std::fs::write(&path, &damaged).unwrap();
            refused += usize::from(Trace::read(&path).is_err());
        }
        assert!(refused > 0);
    }

    #[test]
    fn a_missing_column_or_key_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = sample(folder.path());
        let other = folder.path().join("other.parquet");
        rewrite(&path, &other, synthetic::meta().to_pairs(), "experts");
        assert!(
            error_of(&other).contains("no column `experts`"),
            "{}",
            error_of(&other)
        );
        let pairs = synthetic::meta()
            .to_pairs()
            .into_iter()
            .filter(|(key, _)| *key != KEY_DIGEST)
            .collect();
        rewrite(&path, &other, pairs, "");
        assert!(
            error_of(&other).contains(KEY_DIGEST),
            "{}",
            error_of(&other)
        );
    }

    #[test]
    fn an_expert_the_model_does_not_have_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = sample(folder.path());
        let other = folder.path().join("other.parquet");
        let fewer = |(key, value)| {
            (
                key,
                if key == KEY_N_EXPERTS {
                    "2".to_string()
                } else {
                    value
                },
            )
        };
        rewrite(
            &path,
            &other,
            synthetic::meta()
                .to_pairs()
                .into_iter()
                .map(fewer)
                .collect(),
            "",
        );
        let error = error_of(&other);
        assert!(
            error.contains("other.parquet") && error.contains("the model has 2 experts"),
            "{error}"
        );
    }
}
