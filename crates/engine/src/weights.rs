//! Reading a checkpoint's tensors into the formats that the kernels multiply by.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cadre_checkpoint::{Checkpoint, ModelConfig, TensorOnDisk, TensorView};
use cadre_kernels::{Bytes, Compute, Format, GrowingMatrix, Matrix, MatrixError};

use cadre_store::BulkReader;

use crate::blocks::{Embedding, Linear};
use crate::error::{EngineError, Result};
use crate::load::{LoadOptions, Progress, Quant};
use crate::lossy::Lossy;
use crate::streaming::{self, ExpertStore};

/// Bytes of a matrix that are read while others are interleaved.
const TURN_BYTES: usize = 16 << 20;

/// Reads tensors of one checkpoint, checked for shape and for NaN and infinities.
pub(crate) struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    quant: Quant,
    in_place: bool,
    pub(crate) compute: Arc<Compute>,
    /// Where experts are read from when they are wanted, unless all are loaded.
    pub(crate) store: Option<Arc<ExpertStore>>,
    pub(crate) lossy: Lossy,
    /// Reads what is loaded of a model that is streamed.
    bulk: Option<Arc<Mutex<BulkReader>>>,
    embedding_stays_on_disk: bool,
    /// Matrices that the wanted format cannot hold.
    n_kept: AtomicUsize,
    progress: &'a Progress<'a>,
}

impl<'a> Weights<'a> {
    pub(crate) fn new(
        (checkpoint, low_bit): (&'a Checkpoint, Option<&Checkpoint>),
        options: &LoadOptions,
        compute: Arc<Compute>,
        progress: &'a Progress<'a>,
    ) -> Result<Self> {
        let store = match &options.stream {
            None => None,
            Some(stream) => streaming::open((checkpoint, low_bit), options, stream, &compute)?,
        };
        let embedding_stays_on_disk = options.stream.is_some_and(|stream| {
            let store_bytes = store.as_ref().map_or(0, |store| store.n_bytes());
            let taken = streaming::dense_bytes(checkpoint).saturating_add(store_bytes);
            // Experts take what they can, so this is left over only when all of them fit.
            streaming::embedding_bytes(checkpoint) > stream.budget.saturating_sub(taken)
        });
        Ok(Self {
            checkpoint,
            embedding_stays_on_disk,
            bulk: match &options.stream {
                None => None,
                Some(stream) => Some(Arc::new(Mutex::new(BulkReader::new(&stream.store)?))),
            },
            store,
            lossy: options.lossy,
            quant: options.quant,
            in_place: options.in_place,
            compute,
            n_kept: AtomicUsize::new(0),
            progress,
        })
    }

    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.checkpoint.config()
    }

    /// A vector of `n` values.
    pub(crate) fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        Ok(self.checkpoint.tensor_f32(name, &[n])?)
    }

    /// The values of a tensor of any shape.
    pub(crate) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        Ok(self.checkpoint.tensor_f32(name, shape)?)
    }

    /// A matrix in f32 whatever the wanted format; for what is small and sensitive. Every token reads it, so it lies as
    /// kernels read it fastest, and in large pages.
    pub(crate) fn matrix_f32(&self, name: &str, [n_out, n_in]: [usize; 2]) -> Result<Matrix> {
        let values = self.values(name, &[n_out, n_in])?;
        let matrix = Matrix::from_f32(n_out, n_in, values);
        let matrix = matrix.map_err(|source| weight_error(name, source))?;
        Ok(self.compute.interleaved(&matrix))
    }

    /// A matrix as stored, over the mapped file where it lies in it, or quantised if that was asked for.
    pub(crate) fn matrix(&self, name: &str, [n_out, n_in]: [usize; 2]) -> Result<Matrix> {
        let stored = self.stored(name, &[n_out, n_in], [n_out, n_in])?;
        self.wanted(name, stored)
    }

    /// The embedding. It is left on disk where it would take memory that experts could have, and is multiplied by nothing.
    pub(crate) fn embedding(
        &self,
        name: &str,
        shape: [usize; 2],
        is_head: bool,
    ) -> Result<Embedding> {
        let reader = self.bulk.as_ref();
        if let Some(reader) = reader.filter(|_| self.embedding_stays_on_disk && !is_head) {
            let tensor = self.checkpoint.tensor_on_disk(name)?;
            if tensor.is_plain() {
                let reader = Arc::clone(reader);
                return Ok(Embedding::OnDisk { tensor, reader });
            }
        }
        // Multiplied by only where it is the head as well.
        Ok(Embedding::Resident(match is_head || self.bulk.is_some() {
            true => self.placed_matrix(name, shape)?,
            false => self.matrix(name, shape)?,
        }))
    }

    /// A tensor of several matrices, `[n, n_out, n_in]`, one after the other.
    pub(crate) fn matrices(&self, name: &str, [n, n_out, n_in]: [usize; 3]) -> Result<Vec<Matrix>> {
        let all = self.stored(name, &[n, n_out, n_in], [n * n_out, n_in])?;
        let all = self.wanted(name, all)?;
        Ok((0..n)
            .map(|i| self.placed(all.rows(i * n_out..(i + 1) * n_out)))
            .collect())
    }

    /// `{name}.weight`, and `{name}.bias` if there is to be one.
    pub(crate) fn linear(&self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let weight = self.placed_matrix(&format!("{name}.weight"), shape)?;
        let bias = bias.then(|| self.vector(&format!("{name}.bias"), shape[0]));
        Ok(Linear {
            weight,
            bias: bias.transpose()?,
        })
    }

    /// A matrix where it is to be multiplied, as [`Weights::placed`] says.
    fn placed_matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        match self.grown(name, shape)? {
            Some(matrix) => Ok(matrix),
            None => Ok(self.placed(self.matrix(name, shape)?)),
        }
    }

    /// A matrix that is interleaved while the rest of it is read, so that reading is not waited for and no more than a few
    /// rows are in memory twice; `None` where it cannot be made this way.
    fn grown(&self, name: &str, [n_out, n_in]: [usize; 2]) -> Result<Option<Matrix>> {
        let Some(bulk) = &self.bulk else {
            return Ok(None);
        };
        let tensor = self.checkpoint.tensor_on_disk(name)?;
        let (dtype, [source]) = (tensor.dtype(), tensor.sources()) else {
            return Ok(None);
        };
        let is_as_wanted = self.quant == Quant::AsStored || dtype.is_quantized();
        let is_whole = tensor.is_plain() && tensor.shape() == [n_out, n_in];
        if self.in_place || !is_as_wanted || !is_whole {
            return Ok(None);
        }
        let Some(mut growing) = self.compute.growing(dtype, [n_out, n_in]) else {
            return Ok(None);
        };
        let row_bytes = dtype.n_bytes(n_in).unwrap_or(1);
        let slab_bytes = (GrowingMatrix::ROWS * row_bytes).max(1);
        let turn_bytes = (TURN_BYTES / slab_bytes).max(1) * slab_bytes;
        let mut bulk = bulk.lock().unwrap_or_else(PoisonError::into_inner);
        bulk.read_in_turns(&source.path, &source.range, turn_bytes, |bytes| {
            let n_bytes = bytes.len();
            let shape = [n_bytes / row_bytes, n_in];
            let view = TensorView {
                dtype,
                shape: &shape,
                bytes,
                scales: None,
            };
            let rows = matrix_of(&view, shape, self.checkpoint.is_gguf())
                .map_err(|source| weight_error(self.checkpoint.stored_name(name), source))?;
            if rows.first_non_finite().is_some() {
                // Slower, but it words the error.
                self.checkpoint.check_finite(name)?;
            }
            growing.push(&rows);
            (self.progress)(n_bytes as u64);
            Ok::<(), EngineError>(())
        })?;
        Ok(growing.finish())
    }

    /// The matrix where it is to be multiplied: rows interleaved in memory of its own, or where the file has them.
    pub(crate) fn placed(&self, matrix: Matrix) -> Matrix {
        match self.in_place {
            true => matrix,
            false => self.copied(matrix.bytes(), self.compute.interleaved(&matrix)),
        }
    }

    /// The matrix that was made of `source`. If that was copied, its pages of the file are not needed any more: without
    /// giving them back, loading would take the memory of the weights twice.
    fn copied(&self, source: &[u8], matrix: Matrix) -> Matrix {
        if !std::ptr::eq(source.as_ptr(), matrix.bytes().as_ptr()) {
            self.checkpoint.release(source);
        }
        matrix
    }

    /// Puts a matrix into the format that was asked for.
    pub(crate) fn wanted(&self, name: &str, stored: Matrix) -> Result<Matrix> {
        let quantise = self.quant == Quant::Q8_0 && !stored.format().is_quantized();
        if !quantise {
            return Ok(stored);
        }
        match stored.to_format(Format::Q8_0) {
            // Keeping such a matrix as it is loses nothing; the caller reports how many there are.
            Err(MatrixError::Ragged { .. }) => {
                self.n_kept.fetch_add(1, Ordering::Relaxed);
                Ok(stored)
            }
            result => {
                let made = result.map_err(|source| weight_error(name, source))?;
                Ok(self.copied(stored.bytes(), made))
            }
        }
    }

    /// Matrices that were kept as stored because their rows are not whole blocks.
    pub(crate) fn n_kept(&self) -> usize {
        self.n_kept.load(Ordering::Relaxed)
    }

    /// The matrix as the file has it, without going through the wanted format.
    pub(crate) fn stored(
        &self,
        name: &str,
        shape: &[usize],
        [n_out, n_in]: [usize; 2],
    ) -> Result<Matrix> {
        let on_disk;
        let view = match &self.bulk {
            None => self.checkpoint.tensor_shaped(name, shape)?,
            Some(bulk) => {
                on_disk = self.checkpoint.tensor_on_disk(name)?;
                on_disk.view(&read_all(bulk, &on_disk)?)
            }
        };
        let source = view.bytes.clone();
        let matrix = matrix_of(&view, [n_out, n_in], self.checkpoint.is_gguf());
        let matrix = matrix.map_err(|source| {
            let said = self.checkpoint.stored_name(name);
            weight_error(said, source)
        })?;
        if matrix.first_non_finite().is_some() {
            // Slower, but it words the error.
            self.checkpoint.check_finite(name)?;
        }
        (self.progress)(source.len() as u64);
        Ok(self.copied(&source, matrix))
    }
}

/// Rows that were read one by one, as a matrix.
pub(crate) fn matrix_of_rows(
    dtype: Format,
    n_in: usize,
    rows: &[Bytes],
) -> std::result::Result<Matrix, MatrixError> {
    Matrix::new(dtype, rows.len(), n_in, rows.concat().into())
}

/// Reads what a tensor is made of, past the system's cache of files: that would need memory which the model may not take.
fn read_all(bulk: &Mutex<BulkReader>, tensor: &TensorOnDisk) -> Result<Vec<Bytes>> {
    let mut bulk = bulk.lock().unwrap_or_else(PoisonError::into_inner);
    let read = tensor
        .sources()
        .iter()
        .map(|source| bulk.read(&source.path, &source.range));
    Ok(read.collect::<Result<_, _>>()?)
}

/// The matrix over the bytes of a tensor, as they are.
///
/// Blocks in safetensors (MXFP4) stand for the numbers that transformers multiplies by in floats; blocks in GGUF files are
/// what llama.cpp multiplies by activations of 8 bits.
pub(crate) fn matrix_of(
    view: &TensorView<'_>,
    [n_out, n_in]: [usize; 2],
    is_gguf: bool,
) -> std::result::Result<Matrix, MatrixError> {
    let bytes = view.bytes.clone();
    let matrix = match view.scales {
        None => Matrix::new(view.dtype, n_out, n_in, bytes),
        Some(scales) => {
            let values = scales.values.clone();
            Matrix::with_block_scales(n_out, n_in, bytes, values, scales.block)
        }
    };
    Ok(match is_gguf {
        true => matrix?,
        false => matrix?.with_float_activations(),
    })
}

pub(crate) fn weight_error(name: &str, source: MatrixError) -> EngineError {
    EngineError::Weight {
        tensor: name.to_owned(),
        source,
    }
}
