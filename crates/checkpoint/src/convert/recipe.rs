//! How a tensor to be written is made of canonical tensors, and making it in pieces that fit in memory.

use super::experts::{COPIED, Piece};
use crate::Dtype;
use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{CheckpointError, Result};
use crate::gguf::TensorPlan;

/// Values that are converted at a time.
const CHUNK: usize = 1 << 22;

/// Pieces of [`super::experts::COPIED`] bytes that are asked for before they are copied.
const AHEAD: usize = 8;

/// How a tensor is made.
#[derive(Debug, Clone)]
pub(super) enum Recipe {
    /// Rows of tensors, one tensor after the other.
    Rows(Vec<Rows>),
    /// The values of a vector, each plus a constant.
    Shifted { name: String, by: f32 },
    /// The part of `kv_b_proj` for keys, transposed per head: `[heads, latent, nope]`.
    KeysOfLatent { name: String, nope: usize, v: usize },
    /// `kv_b_proj` from its two halves.
    JoinedLatent { keys: String, values: String },
    /// Matrices transposed, their columns in turns: `[in, parts * out]`, one matrix after the other (gpt-oss).
    TransposedInTurns(Vec<Vec<String>>),
    /// These values.
    Values(Vec<f32>),
    /// Parts of stored tensors as they are, and what stands in for parts.
    Pieces(Vec<Piece>),
}

/// Rows of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rows {
    pub(super) name: String,
    pub(super) order: Order,
}

/// Which rows, in which order. A vector has rows of one value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Order {
    /// All as they are.
    All,
    /// From halves to neighbours within every `head` rows: `(i, i + head / 2)` become `(2 i, 2 i + 1)`.
    ToNeighbours { head: usize },
    /// The way back.
    ToHalves { head: usize },
    /// Rows `from..period` of every `period`.
    Tail { period: usize, from: usize },
}

impl Order {
    /// The source row of row `row`.
    fn source(self, row: usize) -> usize {
        match self {
            Self::All => row,
            Self::ToNeighbours { head } => {
                let (start, at) = (row / head * head, row % head);
                start + at % 2 * (head / 2) + at / 2
            }
            Self::ToHalves { head } => {
                let (start, at) = (row / head * head, row % head);
                start + at % (head / 2) * 2 + at / (head / 2)
            }
            Self::Tail { period, from } => {
                let length = period - from;
                row / length * period + from + row % length
            }
        }
    }

    fn count(self, rows: usize) -> usize {
        match self {
            Self::Tail { period, from } => rows / period * (period - from),
            _ => rows,
        }
    }
}

/// Where the bytes of a tensor go, piece by piece.
pub(super) type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

impl Recipe {
    /// One whole tensor.
    pub(super) fn whole(name: &str) -> Self {
        Self::Rows(vec![Rows {
            name: name.to_owned(),
            order: Order::All,
        }])
    }

    /// The canonical tensor whose format stands for the whole.
    pub(super) fn source(&self) -> Option<&str> {
        match self {
            Self::Rows(rows) => rows.first().map(|rows| rows.name.as_str()),
            Self::Shifted { name, .. } | Self::KeysOfLatent { name, .. } => Some(name),
            Self::JoinedLatent { keys, .. } => Some(keys),
            Self::TransposedInTurns(groups) => groups.first()?.first().map(String::as_str),
            Self::Values(_) | Self::Pieces(_) => None,
        }
    }

    /// Bytes of memory that making `written` takes at most. What is copied passes through in chunks; what is converted is there
    /// as it is stored, decoded and encoded, a few million values at a time or, where it has to be whole, one matrix at a time.
    pub(super) fn memory(&self, source: &Checkpoint, written: &TensorPlan) -> u64 {
        let (n_matrices, values) = match written.shape.split_first() {
            Some((n, rest)) if rest.len() > 1 => (*n, rest.iter().product()),
            _ => (1, written.shape.iter().product::<usize>()),
        };
        let n = match self {
            // A matrix is gathered first where its file has it in pieces.
            Self::Rows(_) => 4 * values + 16 * values.min(CHUNK),
            Self::Shifted { .. } | Self::Values(_) => 12 * values,
            Self::KeysOfLatent { .. } | Self::JoinedLatent { .. } => 16 * n_matrices * values,
            Self::TransposedInTurns(_) => 16 * values,
            Self::Pieces(pieces) => {
                let of_piece = |piece: &Piece| match piece {
                    Piece::Stored(_) => 2 * COPIED,
                    Piece::Zeros(n) => CHUNK.min(*n),
                    Piece::Values(values) => 8 * values.len(),
                    Piece::Mixed(mixed) => 8 * values + mixed.mixer.memory(source, values),
                };
                pieces.iter().map(of_piece).max().unwrap_or(0)
            }
        };
        n as u64
    }

    /// Makes the tensor `written`, by `weights` where errors do not count alike.
    pub(super) fn make(
        &self,
        checkpoint: &Checkpoint,
        written: &TensorPlan,
        weights: Option<Weights<'_>>,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        let mut maker = Maker {
            checkpoint,
            written: &written.name,
            dtype: written.dtype,
            weights,
            n_encoded: 0,
            sink,
        };
        match self {
            Self::Rows(list) => list.iter().try_for_each(|rows| maker.rows(rows)),
            Self::Shifted { name, by } => {
                let mut values = maker.values(name)?;
                values.iter_mut().for_each(|value| *value += by);
                maker.encode(&values)
            }
            Self::KeysOfLatent { name, nope, v } => maker.keys_of_latent(name, *nope, *v),
            Self::JoinedLatent { keys, values } => maker.joined_latent(keys, values),
            Self::TransposedInTurns(groups) => {
                groups.iter().try_for_each(|parts| maker.transposed(parts))
            }
            Self::Values(values) => maker.encode(values),
            Self::Pieces(pieces) => maker.pieces(pieces),
        }
    }
}

/// How much the errors of the columns of a tensor count, for each of the matrices that it is made of.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    /// `[matrices, cols]`.
    pub(super) of: &'a [f32],
    pub(super) cols: usize,
    /// Values of a matrix.
    pub(super) matrix: usize,
}

struct Maker<'a, 'b> {
    checkpoint: &'a Checkpoint,
    written: &'a str,
    dtype: Dtype,
    weights: Option<Weights<'a>>,
    /// Values that have been encoded.
    n_encoded: usize,
    sink: &'a mut Sink<'b>,
}

impl Maker<'_, '_> {
    fn rows(&mut self, rows: &Rows) -> Result<()> {
        let view = self.checkpoint.tensor(&rows.name)?;
        let n_rows = view.shape.first().copied().unwrap_or(1);
        let cols: usize = view.shape.iter().skip(1).product();
        let as_stored = view.dtype == self.dtype && view.scales.is_none();
        if as_stored && rows.order == Order::All {
            for chunk in view.bytes.chunks(COPIED) {
                (self.sink)(chunk)?;
                self.checkpoint.release(chunk);
            }
            return Ok(());
        }
        let row_bytes = view.dtype.n_bytes(cols);
        let Some(row_bytes) = row_bytes.filter(|_| cols > 0) else {
            return Err(self.refuse(&rows.name, "its rows are not whole blocks"));
        };
        let n_out = rows.order.count(n_rows);
        let step = (CHUNK / cols).max(1);
        let mut buffer = Vec::new();
        for from in (0..n_out).step_by(step) {
            let to = (from + step).min(n_out);
            buffer.clear();
            for row in from..to {
                let at = rows.order.source(row) * row_bytes;
                buffer.extend_from_slice(&view.bytes[at..at + row_bytes]);
            }
            self.checkpoint.release(&view.bytes);
            if as_stored {
                (self.sink)(&buffer)?;
                continue;
            }
            let mut values = view.dtype.decode(&buffer);
            scale(&view, &mut values, |row| rows.order.source(from + row));
            self.check(&rows.name, &values)?;
            self.encode(&values)?;
        }
        Ok(())
    }

    fn pieces(&mut self, pieces: &[Piece]) -> Result<()> {
        // What is copied is asked for a little ahead, and leaves memory when it has been written.
        let mut asked = 0;
        let chunks: Vec<(&Piece, &[u8])> = pieces.iter().flat_map(Piece::chunks).collect();
        for (at, (piece, chunk)) in chunks.iter().enumerate() {
            asked = asked.max(at);
            while asked < chunks.len().min(at + 1 + AHEAD) {
                self.checkpoint.ask_for(chunks[asked].1);
                asked += 1;
            }
            match piece {
                Piece::Stored(_) => {
                    (self.sink)(chunk)?;
                    self.checkpoint.release(chunk);
                }
                Piece::Zeros(n) => {
                    let zeros = vec![0; CHUNK.min(*n)];
                    let mut left = *n;
                    while left > 0 {
                        let now = left.min(zeros.len());
                        (self.sink)(&zeros[..now])?;
                        left -= now;
                    }
                }
                Piece::Values(values) => self.encode(values)?,
                Piece::Mixed(mixed) => {
                    let values = mixed.values(self.checkpoint)?;
                    self.check(self.written, &values)?;
                    self.encode(&values)?;
                }
            }
        }
        Ok(())
    }

    /// All values of a tensor, finite.
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let view = self.checkpoint.tensor(name)?;
        let values = view.to_f32();
        self.checkpoint.release(&view.bytes);
        self.check(name, &values)?;
        Ok(values)
    }

    fn keys_of_latent(&mut self, name: &str, nope: usize, v: usize) -> Result<()> {
        let values = self.values(name)?;
        let latent = self.checkpoint.tensor(name)?.shape[1];
        let mut out = Vec::with_capacity(nope * latent);
        for head in values.chunks_exact((nope + v) * latent) {
            out.clear();
            for at in 0..latent {
                out.extend((0..nope).map(|row| head[row * latent + at]));
            }
            self.encode(&out)?;
        }
        Ok(())
    }

    fn joined_latent(&mut self, keys: &str, values: &str) -> Result<()> {
        let (keys_shape, values_shape) = (self.shape(keys)?, self.shape(values)?);
        let (&[_, latent, nope], &[_, v, _]) = (keys_shape.as_slice(), values_shape.as_slice())
        else {
            return Err(self.refuse(
                keys,
                "keys and values of latent attention have three dimensions",
            ));
        };
        let (keys, values) = (self.values(keys)?, self.values(values)?);
        let heads = keys
            .chunks_exact(latent * nope)
            .zip(values.chunks_exact(v * latent));
        for (keys, values) in heads {
            let mut out = Vec::with_capacity((nope + v) * latent);
            for row in 0..nope {
                out.extend((0..latent).map(|at| keys[at * nope + row]));
            }
            out.extend_from_slice(values);
            self.encode(&out)?;
        }
        Ok(())
    }

    fn transposed(&mut self, parts: &[String]) -> Result<()> {
        let shape = self.shape(&parts[0])?;
        let matrices: Vec<Vec<f32>> = parts
            .iter()
            .map(|name| self.values(name))
            .collect::<Result<_>>()?;
        let n_in = shape.get(1).copied().unwrap_or(1);
        let mut out = Vec::with_capacity(matrices.len() * matrices[0].len());
        for col in 0..n_in {
            for row in 0..shape[0] {
                out.extend(matrices.iter().map(|matrix| matrix[row * n_in + col]));
            }
        }
        self.encode(&out)
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.checkpoint.tensor(name)?.shape.to_vec())
    }

    fn check(&self, name: &str, values: &[f32]) -> Result<()> {
        let Some(index) = values.iter().position(|value| !value.is_finite()) else {
            return Ok(());
        };
        Err(CheckpointError::NonFinite {
            origin: self.checkpoint.origin().to_owned(),
            name: self.checkpoint.stored_name(name).to_owned(),
            index,
            value: values[index],
        })
    }

    fn encode(&mut self, values: &[f32]) -> Result<()> {
        /// Largest number of 16-bit floats.
        const MAX_F16: f32 = 65504.0;
        if self.dtype == Dtype::F16
            && let Some(value) = values.iter().find(|value| value.abs() > MAX_F16)
        {
            let problem = format!("it holds {value}, more than F16 can hold; BF16 can");
            return Err(self.refuse(self.written, &problem));
        }
        let Some(weights) = self.weights else {
            return self.encode_alike(values, None);
        };
        // Whole rows come, and a run of them may end one matrix and begin the next.
        let mut rest = values;
        while !rest.is_empty() {
            let (matrix, within) = (
                self.n_encoded / weights.matrix,
                self.n_encoded % weights.matrix,
            );
            let (now, later) = rest.split_at(rest.len().min(weights.matrix - within));
            let importance = weights.of.chunks_exact(weights.cols).nth(matrix);
            self.encode_alike(now, importance)?;
            self.n_encoded += now.len();
            rest = later;
        }
        Ok(())
    }

    /// Encodes rows of which all have the same `importance`, if any.
    fn encode_alike(&mut self, values: &[f32], importance: Option<&[f32]>) -> Result<()> {
        match encode_in_parallel(self.dtype, values, importance) {
            Some(bytes) => (self.sink)(&bytes),
            None => Err(self.refuse(
                self.written,
                &format!("{} cannot hold its values", self.dtype),
            )),
        }
    }

    fn refuse(&self, name: &str, problem: &str) -> CheckpointError {
        CheckpointError::Index {
            file: self.checkpoint.origin().to_owned(),
            problem: format!(
                "tensor `{}` cannot be converted: {problem}",
                self.checkpoint.stored_name(name)
            ),
        }
    }
}

/// Multiplies 8-bit values with the scales of their blocks. `source(row)` is where a row comes from.
fn scale(view: &TensorView<'_>, values: &mut [f32], source: impl Fn(usize) -> usize) {
    let (Some(scales), Some(&cols)) = (view.scales, view.shape.last()) else {
        return;
    };
    let grid = cols.div_ceil(scales.block[1]);
    for (row, values) in values.chunks_exact_mut(cols).enumerate() {
        let scales_row = &scales.values[source(row) / scales.block[0] * grid..][..grid];
        for (col, value) in values.iter_mut().enumerate() {
            *value *= scales_row[col / scales.block[1]];
        }
    }
}

/// Encodes pieces of whole blocks, or of whole rows where columns have an `importance`, on all cores.
fn encode_in_parallel(dtype: Dtype, values: &[f32], importance: Option<&[f32]>) -> Option<Vec<u8>> {
    const FEW: usize = 1 << 16;
    let importance = importance.filter(|_| dtype.is_quantized());
    let encode = |values: &[f32], out: &mut [u8]| match importance {
        Some(importance) => dtype.encode_weighted_into(values, importance, out),
        None => dtype.encode_into(values, out),
    };
    let mut bytes = vec![0; dtype.n_bytes(values.len())?];
    if !dtype.is_quantized() || values.len() < FEW {
        return encode(values, &mut bytes).then_some(bytes);
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let unit = importance.map_or(dtype.block_len(), <[f32]>::len);
    let piece = values.len().div_ceil(threads).next_multiple_of(unit);
    let outs = bytes.chunks_mut(dtype.n_bytes(piece)?);
    let encode = &encode;
    let all = std::thread::scope(|scope| {
        let pieces = values.chunks(piece).zip(outs);
        let running: Vec<_> = pieces
            .map(|(values, out)| scope.spawn(move || encode(values, out)))
            .collect();
        running
            .into_iter()
            .all(|thread| thread.join().unwrap_or(false))
    });
    all.then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_inverse() {
        let rows: Vec<usize> = (0..8)
            .map(|row| Order::ToNeighbours { head: 8 }.source(row))
            .collect();
        assert_eq!(rows, [0, 4, 1, 5, 2, 6, 3, 7]);
        let tail: Vec<usize> = (0..4)
            .map(|row| Order::Tail { period: 5, from: 3 }.source(row))
            .collect();
        assert_eq!(tail, [3, 4, 8, 9]);
        for row in 0..24 {
            let there = Order::ToNeighbours { head: 6 }.source(row);
            assert_eq!(Order::ToHalves { head: 6 }.source(there), row);
        }
    }

    #[test]
    fn pieces_are_the_whole() {
        let values: Vec<f32> = (0..1 << 17).map(|i| (i as f32).sin()).collect();
        let whole = Dtype::Q8_0.encode(&values);
        assert_eq!(encode_in_parallel(Dtype::Q8_0, &values, None), whole);
        // Rows of 96 are no power of two, so that pieces end elsewhere than the halves.
        let values = &values[..96 * 1000];
        let importance: Vec<f32> = (0..96).map(|i| i as f32).collect();
        let mut whole = vec![0; Dtype::Q4_0.n_bytes(values.len()).unwrap()];
        assert!(Dtype::Q4_0.encode_weighted_into(values, &importance, &mut whole));
        let pieces = encode_in_parallel(Dtype::Q4_0, values, Some(&importance));
        assert_eq!(pieces, Some(whole));
    }
}
