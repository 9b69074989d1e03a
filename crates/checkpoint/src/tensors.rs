//! The tensors of an open checkpoint under canonical names, whatever the files call them and however they pack them.
//!
//! What lies contiguously in a file is handed out as a slice of the map. The few layouts that do not (gpt-oss: gate
//! and up interleaved, matrices transposed, 4-bit weights and their scales apart) are gathered when they are asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use indexmap::IndexMap;
use indexmap::map::Entry as Slot;

use crate::Dtype;
use crate::config::{Activation, ModelConfig};
use crate::error::{CheckpointError, Result};
use crate::names::{Fused, FusedPart, Meaning, meaning};

/// A tensor as a file has it.
#[derive(Debug, Clone)]
pub(crate) struct Raw {
    /// File (with its origin), for errors.
    pub(crate) file: Arc<str>,
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    /// Slowest dimension first.
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Bytes,
}

/// A tensor under its canonical name.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// What the file calls it, or the tensor that it is a piece of.
    pub(crate) stored: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Data,
    pub(crate) scales: Option<BlockScales>,
}

/// Where the values of an [`Entry`] are.
#[derive(Debug, Clone)]
pub(crate) enum Data {
    /// Contiguous.
    Plain(Bytes),
    /// Value `(row, col)` of the entry lies at `first + row * row_step + col * col_step` in `source`, in values.
    Strided {
        source: Bytes,
        first: usize,
        row_step: usize,
        col_step: usize,
    },
    /// MXFP4 as Hugging Face packs it: rows `first, first + step, ..` of one expert's blocks and scales.
    Mxfp4 {
        blocks: Bytes,
        scales: Bytes,
        first: usize,
        step: usize,
    },
}

/// Scales of an 8-bit tensor: value `(r, c)` is multiplied by `scales[r / block[0], c / block[1]]`.
#[derive(Debug, Clone)]
pub struct BlockScales {
    /// Row-major, `[ceil(rows / block[0]), ceil(cols / block[1])]`.
    pub values: Vec<f32>,
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
}

/// Bytes of an MXFP4 block in a file of Hugging Face, without its scale.
const MXFP4_NIBBLES: usize = 16;

impl Entry {
    /// The bytes in the layout of `dtype`, row-major; a slice of the map wherever possible.
    pub(crate) fn bytes(&self) -> Bytes {
        Self::assemble(&self.data, self.dtype, &self.shape)
    }

    /// The bytes of a tensor of this format and shape that lies as `data` says.
    pub(crate) fn assemble(data: &Data, dtype: Dtype, shape: &[usize]) -> Bytes {
        match data {
            Data::Plain(bytes) => bytes.clone(),
            Data::Strided {
                source,
                first,
                row_step,
                col_step,
            } => gather(source, dtype, shape, *first, [*row_step, *col_step]),
            Data::Mxfp4 {
                blocks,
                scales,
                first,
                step,
            } => pack_mxfp4(blocks, scales, shape, *first, *step),
        }
    }

    /// Bytes that the file holds for this tensor.
    pub(crate) fn stored_bytes(&self) -> usize {
        let n_values = self.shape.iter().product();
        self.dtype.n_bytes(n_values).unwrap_or(0)
    }

    /// The mapped bytes for sampling; of gathered tensors, those of their source.
    pub(crate) fn source(&self) -> &Bytes {
        match &self.data {
            Data::Plain(bytes) => bytes,
            Data::Strided { source, .. } => source,
            Data::Mxfp4 { blocks, .. } => blocks,
        }
    }
}

fn gather(
    source: &[u8],
    dtype: Dtype,
    shape: &[usize],
    first: usize,
    [row_step, col_step]: [usize; 2],
) -> Bytes {
    let size = dtype.block_bytes();
    let n_cols = shape.get(1).copied().unwrap_or(1);
    let mut out = Vec::with_capacity(shape[0] * n_cols * size);
    for row in 0..shape[0] {
        for col in 0..n_cols {
            let at = (first + row * row_step + col * col_step) * size;
            out.extend_from_slice(&source[at..at + size]);
        }
    }
    out.into()
}

/// From pairs of neighbours per byte, scales apart, to GGUF's blocks: the scale, then 16 bytes that hold value `j` in
/// the low and value `j + 16` in the high half.
fn pack_mxfp4(blocks: &[u8], scales: &[u8], shape: &[usize], first: usize, step: usize) -> Bytes {
    let per_row = shape[1] / 32;
    let mut out = Vec::with_capacity(shape[0] * per_row * (1 + MXFP4_NIBBLES));
    for row in 0..shape[0] {
        let row = first + row * step;
        for at in row * per_row..(row + 1) * per_row {
            let pairs = &blocks[at * MXFP4_NIBBLES..][..MXFP4_NIBBLES];
            let value = |i: usize| pairs[i / 2] >> (4 * (i % 2)) & 15;
            out.push(scales[at]);
            out.extend((0..MXFP4_NIBBLES).map(|j| value(j) | value(j + 16) << 4));
        }
    }
    out.into()
}

/// All tensors of a checkpoint.
#[derive(Debug, Default)]
pub(crate) struct Tensors {
    /// In the order of the files, which is also that of the memory behind them.
    pub(crate) map: IndexMap<String, Entry, ahash::RandomState>,
    /// Stored tensors that the computation does not use, and why.
    pub(crate) ignored: Vec<(String, &'static str)>,
}

impl Tensors {
    /// Files the tensors of a Hugging Face checkpoint under their canonical names.
    pub(crate) fn from_hugging_face(config: &ModelConfig, raws: Vec<Raw>) -> Result<Self> {
        let mut tensors = Self {
            map: IndexMap::with_capacity_and_hasher(raws.len(), ahash::RandomState::new()),
            ignored: Vec::new(),
        };
        let mut parts = Parts::default();
        // gpt-oss interleaves gate and up and stores its matrices transposed; nothing in the file says so.
        let transposed = matches!(config.activation, Activation::SwigluOai { .. });
        for raw in raws {
            match meaning(&raw.name, config.n_layers) {
                Meaning::Ignored(reason) => tensors.ignored.push((raw.name, reason)),
                Meaning::Tensor(name) if name == "lm_head.weight" && config.tie_word_embeddings => {
                    tensors.ignored.push((raw.name, "tied to the embedding"));
                }
                Meaning::Tensor(name) => tensors.insert_raw(name, raw)?,
                Meaning::Scales(name) => parts.scales.push((name, raw)),
                Meaning::Fused(fused) => match fused.part {
                    FusedPart::Mxfp4Blocks | FusedPart::Mxfp4Scales => {
                        parts.add_mxfp4(fused, raw)?;
                    }
                    FusedPart::Fp8Scales => parts.fused_scales.push((fused, raw)),
                    FusedPart::Weights if transposed => tensors.insert_transposed(&fused, &raw)?,
                    FusedPart::Weights => tensors.insert_stacked(&fused, &raw)?,
                    FusedPart::Bias => tensors.insert_biases(&fused, &raw, transposed)?,
                },
            }
        }
        tensors.finish(parts)?;
        Ok(tensors)
    }

    /// All tensors, sorted by name.
    pub(crate) fn sorted(&self) -> Vec<(&String, &Entry)> {
        let mut tensors: Vec<_> = self.map.iter().collect();
        tensors.sort_unstable_by_key(|(name, _)| *name);
        tensors
    }

    /// Files `entry` under `name`; twice is an error.
    pub(crate) fn insert(&mut self, file: &str, name: String, entry: Entry) -> Result<()> {
        match self.map.entry(name) {
            Slot::Vacant(slot) => {
                slot.insert(entry);
                Ok(())
            }
            Slot::Occupied(slot) => Err(CheckpointError::Index {
                file: file.to_owned(),
                problem: format!(
                    "tensor `{}` is stored twice, as `{}` and as `{}`",
                    slot.key(),
                    slot.get().stored,
                    entry.stored
                ),
            }),
        }
    }

    /// Files a tensor as it is.
    pub(crate) fn insert_raw(&mut self, name: String, raw: Raw) -> Result<()> {
        let entry = Entry {
            stored: raw.name,
            dtype: raw.dtype,
            shape: raw.shape,
            data: Data::Plain(raw.bytes),
            scales: None,
        };
        self.insert(&raw.file, name, entry)
    }

    /// `[E, rows, cols]`, experts one after the other, gate rows before up rows.
    fn insert_stacked(&mut self, fused: &Fused, raw: &Raw) -> Result<()> {
        let [n_experts, rows, cols] = dims(raw, "[experts, rows, columns]")?;
        let parts = projections(fused, raw, rows)?;
        let piece_rows = rows / parts.len();
        let size = n_bytes(raw, piece_rows * cols)?;
        for expert in 0..n_experts {
            for (at, part) in parts.iter().enumerate() {
                let from = (expert * parts.len() + at) * size;
                let entry = Entry {
                    stored: raw.name.clone(),
                    dtype: raw.dtype,
                    shape: vec![piece_rows, cols],
                    data: Data::Plain(raw.bytes.slice(from..from + size)),
                    scales: None,
                };
                let name = format!("{}.{expert}.{part}.weight", fused.prefix);
                self.insert(&raw.file, name, entry)?;
            }
        }
        Ok(())
    }

    /// `[E, in, out]`, gate and up in turns along the last dimension.
    fn insert_transposed(&mut self, fused: &Fused, raw: &Raw) -> Result<()> {
        let [n_experts, n_in, n_out] = dims(raw, "[experts, inputs, outputs]")?;
        let parts = projections(fused, raw, n_out)?;
        let size = n_bytes(raw, n_in * n_out)?;
        for expert in 0..n_experts {
            for (at, part) in parts.iter().enumerate() {
                let entry = Entry {
                    stored: raw.name.clone(),
                    dtype: raw.dtype,
                    shape: vec![n_out / parts.len(), n_in],
                    data: Data::Strided {
                        source: raw.bytes.slice(expert * size..(expert + 1) * size),
                        first: at,
                        row_step: parts.len(),
                        col_step: n_out,
                    },
                    scales: None,
                };
                let name = format!("{}.{expert}.{part}.weight", fused.prefix);
                self.insert(&raw.file, name, entry)?;
            }
        }
        Ok(())
    }

    /// `[E, out]`, gate and up one after the other or in turns.
    fn insert_biases(&mut self, fused: &Fused, raw: &Raw, interleaved: bool) -> Result<()> {
        let [n_experts, n_out] = dims(raw, "[experts, outputs]")?;
        let parts = projections(fused, raw, n_out)?;
        let size = n_bytes(raw, n_out)?;
        for expert in 0..n_experts {
            for (at, part) in parts.iter().enumerate() {
                let n = n_out / parts.len();
                let (first, row_step) = if interleaved {
                    (at, parts.len())
                } else {
                    (at * n, 1)
                };
                let entry = Entry {
                    stored: raw.name.clone(),
                    dtype: raw.dtype,
                    shape: vec![n],
                    data: Data::Strided {
                        source: raw.bytes.slice(expert * size..(expert + 1) * size),
                        first,
                        row_step,
                        col_step: 0,
                    },
                    scales: None,
                };
                let name = format!("{}.{expert}.{part}.bias", fused.prefix);
                self.insert(&raw.file, name, entry)?;
            }
        }
        Ok(())
    }

    /// Joins what was stored apart.
    fn finish(&mut self, parts: Parts) -> Result<()> {
        for ((prefix, is_gate_up), pair) in parts.mxfp4 {
            self.insert_mxfp4(&prefix, is_gate_up, pair)?;
        }
        for (name, raw) in parts.scales {
            let [rows, cols] = dims(&raw, "[rows, columns]")?;
            self.attach_scales(&name, &raw, raw.dtype.decode(&raw.bytes), [rows, cols])?;
        }
        for (fused, raw) in parts.fused_scales {
            let [n_experts, rows, cols] = dims(&raw, "[experts, rows, columns]")?;
            let pieces = projections(&fused, &raw, rows)?;
            let values = raw.dtype.decode(&raw.bytes);
            let (piece_rows, n) = (rows / pieces.len(), rows / pieces.len() * cols);
            for expert in 0..n_experts {
                for (at, part) in pieces.iter().enumerate() {
                    let name = format!("{}.{expert}.{part}.weight", fused.prefix);
                    let from = (expert * pieces.len() + at) * n;
                    let values = values[from..from + n].to_vec();
                    self.attach_scales(&name, &raw, values, [piece_rows, cols])?;
                }
            }
        }
        Ok(())
    }

    fn insert_mxfp4(&mut self, prefix: &str, is_gate_up: bool, pair: Pair) -> Result<()> {
        let (Some(blocks), Some(scales)) = (&pair.blocks, &pair.scales) else {
            let found = pair.blocks.as_ref().or(pair.scales.as_ref());
            let (file, name) = found.map_or((String::new(), String::new()), |raw| {
                (raw.file.to_string(), raw.name.clone())
            });
            let problem =
                format!("tensor `{name}` has no partner: `_blocks` and `_scales` belong together");
            return Err(CheckpointError::Index { file, problem });
        };
        let [n_experts, rows, per_row, nibbles] = dims(blocks, "[experts, rows, blocks, 16]")?;
        let expected = [n_experts, rows, per_row];
        if nibbles != MXFP4_NIBBLES || scales.shape != expected {
            return Err(CheckpointError::WrongShape {
                origin: scales.file.to_string(),
                name: scales.name.clone(),
                found: scales.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        let fused = Fused {
            prefix: prefix.to_owned(),
            is_gate_up,
            part: FusedPart::Mxfp4Blocks,
        };
        let parts = projections(&fused, blocks, rows)?;
        let n = rows * per_row;
        for expert in 0..n_experts {
            for (at, part) in parts.iter().enumerate() {
                let range = |size: usize| expert * n * size..(expert + 1) * n * size;
                let entry = Entry {
                    stored: blocks.name.clone(),
                    dtype: mxfp4(blocks)?,
                    shape: vec![rows / parts.len(), per_row * 32],
                    data: Data::Mxfp4 {
                        blocks: blocks.bytes.slice(range(MXFP4_NIBBLES)),
                        scales: scales.bytes.slice(range(1)),
                        first: at,
                        step: parts.len(),
                    },
                    scales: None,
                };
                let name = format!("{prefix}.{expert}.{part}.weight");
                self.insert(&blocks.file, name, entry)?;
            }
        }
        Ok(())
    }

    /// Gives the 8-bit tensor `name` its scales, a grid of `grid` values.
    fn attach_scales(
        &mut self,
        name: &str,
        raw: &Raw,
        values: Vec<f32>,
        grid: [usize; 2],
    ) -> Result<()> {
        let complain = |problem: String| {
            Err(CheckpointError::Index {
                file: raw.file.to_string(),
                problem,
            })
        };
        let Some(entry) = self.map.get_mut(name) else {
            return complain(format!(
                "`{}` scales `{name}`, which is not there",
                raw.name
            ));
        };
        let &[rows, cols] = entry.shape.as_slice() else {
            return complain(format!(
                "`{}` scales `{name}`, which is no matrix",
                raw.name
            ));
        };
        if entry.dtype != Dtype::F8E4M3 {
            return complain(format!(
                "`{}` scales `{name}`, which is {} and not F8_E4M3",
                raw.name, entry.dtype
            ));
        }
        // The grid tells the block: 128 x 128 in every published checkpoint.
        let block = if grid == [1, 1] && (rows > FP8_BLOCK || cols > FP8_BLOCK) {
            [rows, cols]
        } else {
            [FP8_BLOCK; 2]
        };
        if [rows.div_ceil(block[0]), cols.div_ceil(block[1])] != grid {
            return complain(format!(
                "`{}` is {grid:?}, but `{name}` of [{rows}, {cols}] needs a scale per 128 x 128 block",
                raw.name
            ));
        }
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return complain(format!("`{}` holds {value}", raw.name));
        }
        entry.scales = Some(BlockScales { values, block });
        Ok(())
    }
}

/// Rows and columns that share a scale in FP8 checkpoints.
const FP8_BLOCK: usize = 128;

/// Tensors that only make sense together.
#[derive(Default)]
struct Parts {
    scales: Vec<(String, Raw)>,
    fused_scales: Vec<(Fused, Raw)>,
    mxfp4: BTreeMap<(String, bool), Pair>,
}

#[derive(Default)]
struct Pair {
    blocks: Option<Raw>,
    scales: Option<Raw>,
}

impl Parts {
    fn add_mxfp4(&mut self, fused: Fused, raw: Raw) -> Result<()> {
        if raw.dtype != Dtype::U8 {
            return Err(CheckpointError::UnsupportedDtype {
                origin: raw.file.to_string(),
                name: raw.name,
                dtype: raw.dtype.to_string(),
            });
        }
        let pair = self
            .mxfp4
            .entry((fused.prefix, fused.is_gate_up))
            .or_default();
        let slot = match fused.part {
            FusedPart::Mxfp4Blocks => &mut pair.blocks,
            _ => &mut pair.scales,
        };
        *slot = Some(raw);
        Ok(())
    }
}

/// MXFP4 is known to the kernels under its GGUF name.
fn mxfp4(raw: &Raw) -> Result<Dtype> {
    Dtype::from_name("MXFP4").ok_or_else(|| CheckpointError::UnsupportedDtype {
        origin: raw.file.to_string(),
        name: raw.name.clone(),
        dtype: "MXFP4".to_owned(),
    })
}

/// The projections that a fused tensor stacks over `rows` rows.
fn projections(fused: &Fused, raw: &Raw, rows: usize) -> Result<&'static [&'static str]> {
    if !fused.is_gate_up {
        return Ok(&["down_proj"]);
    }
    if rows.is_multiple_of(2) {
        return Ok(&["gate_proj", "up_proj"]);
    }
    Err(CheckpointError::Index {
        file: raw.file.to_string(),
        problem: format!(
            "tensor `{}` of {:?} should hold as many gate as up rows",
            raw.name, raw.shape
        ),
    })
}

fn dims<const N: usize>(raw: &Raw, meaning: &str) -> Result<[usize; N]> {
    let shape = raw.shape.as_slice().try_into();
    shape.map_err(|_| CheckpointError::Index {
        file: raw.file.to_string(),
        problem: format!(
            "tensor `{}` has shape {:?}, expected {meaning}",
            raw.name, raw.shape
        ),
    })
}

fn n_bytes(raw: &Raw, n_values: usize) -> Result<usize> {
    raw.dtype
        .n_bytes(n_values)
        .ok_or_else(|| CheckpointError::Index {
            file: raw.file.to_string(),
            problem: format!(
                "tensor `{}` of {:?} does not split into whole blocks of {}",
                raw.name, raw.shape, raw.dtype
            ),
        })
}
