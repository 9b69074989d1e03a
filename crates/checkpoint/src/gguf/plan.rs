//! What a GGUF file to be written will hold, and where in which file every tensor will lie.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use cadre_kernels::Format;

use super::encode::{EncodedTensor, encode_header};
use super::header::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_DIMS, measure};
use super::split;
use super::value::Value;
use crate::error::{CheckpointError, Result};

/// Longest tensor name that llama.cpp reads, in bytes.
const MAX_TENSOR_NAME: usize = 63;

/// Longest key that the format allows, in bytes.
const MAX_KEY: usize = 65_535;

/// The contents of a GGUF file, all but the tensor data.
#[derive(Debug, Clone, Default)]
pub struct GgufPlan {
    /// Metadata, written in this order. `general.alignment` is honoured; the `split.*` keys are added where needed.
    pub entries: Vec<(String, Value)>,
    /// Tensors, written in this order.
    pub tensors: Vec<TensorPlan>,
    /// Splits into files of at most this many bytes each, named `NAME-00001-of-00003.gguf`; `None`: one file.
    pub max_part_bytes: Option<u64>,
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorPlan {
    /// At most 63 bytes, the most that llama.cpp reads.
    pub name: String,
    /// A format that GGUF has an id for.
    pub dtype: Format,
    /// One to four dimensions, slowest first; the last one in whole blocks.
    pub shape: Vec<usize>,
}

/// A [`GgufPlan`] laid out in files.
pub(super) struct Layout {
    pub(super) parts: Vec<PartLayout>,
    /// For every tensor of the plan, in its order.
    pub(super) slots: Vec<Slot>,
}

/// One file to be.
pub(super) struct PartLayout {
    pub(super) path: PathBuf,
    /// Everything before the data.
    pub(super) header: Vec<u8>,
    /// Length of the file.
    pub(super) n_bytes: u64,
}

/// Where a tensor goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub(super) part: usize,
    /// From the start of the part's data.
    pub(super) offset: u64,
    pub(super) n_bytes: u64,
    /// With the padding up to the next tensor.
    pub(super) padded: u64,
}

impl GgufPlan {
    /// The files that writing to `target` makes, with their exact sizes in bytes.
    ///
    /// # Errors
    /// Something that GGUF, or llama.cpp as its reader, cannot hold, by key or tensor.
    pub fn files(&self, target: &Path) -> Result<Vec<(PathBuf, u64)>> {
        let parts = self.layout(target)?.parts;
        Ok(parts
            .into_iter()
            .map(|part| (part.path, part.n_bytes))
            .collect())
    }

    pub(super) fn layout(&self, target: &Path) -> Result<Layout> {
        self.try_layout(target)
            .map_err(|problem| CheckpointError::CannotWrite {
                path: target.to_owned(),
                problem,
            })
    }

    fn try_layout(&self, target: &Path) -> Result<Layout, String> {
        let alignment = self.check_entries()?;
        let mut slots = self.measure_tensors(alignment)?;
        let n_parts = self.distribute(alignment, &mut slots)?;
        let names = part_paths(target, n_parts)?;
        let part = |(no, path)| self.part(no, n_parts, path, alignment, &slots);
        let parts = names.into_iter().enumerate().map(part).collect();
        Ok(Layout { parts, slots })
    }

    /// Refuses bad keys; returns the alignment.
    fn check_entries(&self) -> Result<u64, String> {
        let mut seen = HashSet::new();
        let mut alignment = DEFAULT_ALIGNMENT as u64;
        for (key, value) in &self.entries {
            if key.is_empty() || key.len() > MAX_KEY {
                return Err(format!(
                    "a key has {} bytes, expected 1 to {MAX_KEY}",
                    key.len()
                ));
            }
            if !seen.insert(key) {
                return Err(format!("key `{key}` is there twice"));
            }
            if split::is_split_key(key) {
                return Err(format!("key `{key}` is set by the writer"));
            }
            if key == ALIGNMENT_KEY {
                match value {
                    Value::U32(wanted) if wanted.is_power_of_two() && *wanted >= 8 => {
                        alignment = u64::from(*wanted);
                    }
                    _ => {
                        return Err(format!(
                            "key `{key}` is {value}, expected a power of two of at least 8 (u32)"
                        ));
                    }
                }
            }
        }
        Ok(alignment)
    }

    /// Refuses bad tensors; returns their sizes.
    fn measure_tensors(&self, alignment: u64) -> Result<Vec<Slot>, String> {
        if i32::try_from(self.tensors.len()).is_err() {
            return Err(format!(
                "{} tensors are more than a file can hold",
                self.tensors.len()
            ));
        }
        let mut seen = HashSet::new();
        let slot = |tensor: &TensorPlan| -> Result<Slot, String> {
            let TensorPlan { name, dtype, shape } = tensor;
            if name.is_empty() || name.len() > MAX_TENSOR_NAME {
                return Err(format!(
                    "its name has {} bytes, llama.cpp reads 1 to {MAX_TENSOR_NAME}",
                    name.len()
                ));
            }
            if dtype.gguf_id().is_none() {
                return Err(format!("GGUF has no number format {dtype}"));
            }
            if shape.is_empty() || shape.len() > MAX_DIMS {
                return Err(format!(
                    "its shape is {shape:?}, expected 1 to {MAX_DIMS} dimensions"
                ));
            }
            let dims: Vec<u64> = shape.iter().map(|dim| *dim as u64).collect();
            let n_bytes = measure(&dims, *dtype)?.1 as u64;
            let padded = n_bytes.checked_next_multiple_of(alignment);
            let padded = padded.ok_or("it is larger than any file")?;
            Ok(Slot {
                part: 0,
                offset: 0,
                n_bytes,
                padded,
            })
        };
        let mut slots = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            if !seen.insert(&tensor.name) {
                return Err(format!("tensor `{}` is there twice", tensor.name));
            }
            slots.push(
                slot(tensor).map_err(|problem| format!("tensor `{}`: {problem}", tensor.name))?,
            );
        }
        Ok(slots)
    }

    /// Gives every tensor its part and offset; returns the number of parts.
    fn distribute(&self, alignment: u64, slots: &mut [Slot]) -> Result<usize, String> {
        let most = self.max_part_bytes.unwrap_or(u64::MAX);
        // As if it came to several parts, which costs a single one a few bytes.
        let header_bytes = |part| {
            let entries = self.part_entries(part, usize::MAX, alignment);
            encode_header(&entries.borrow(), [].into_iter(), 1).len() as u64
        };
        let (mut part, mut lines, mut offset) = (0, 0u64, 0u64);
        let mut fixed = header_bytes(0);
        for (slot, tensor) in slots.iter_mut().zip(&self.tensors) {
            // Name, dimensions, type and offset, with their lengths.
            let line = (8 + tensor.name.len() + 4 + 8 * tensor.shape.len() + 4 + 8) as u64;
            let fits = |fixed: u64, lines: u64, offset: u64| {
                let end = offset
                    .checked_add(slot.padded)?
                    .checked_add(fixed)?
                    .checked_add(lines + line)?;
                (end.checked_next_multiple_of(alignment)? <= most).then_some(())
            };
            if fits(fixed, lines, offset).is_none() {
                if offset > 0 {
                    (part, lines, offset) = (part + 1, 0, 0);
                    fixed = header_bytes(part);
                }
                if fits(fixed, 0, 0).is_none() {
                    return Err(format!(
                        "tensor `{}` takes {} bytes, which with the header do not fit a part of {most}; allow larger parts",
                        tensor.name, slot.padded
                    ));
                }
            }
            (slot.part, slot.offset) = (part, offset);
            offset += slot.padded;
            lines += line;
        }
        if part >= usize::from(u16::MAX) {
            return Err(format!(
                "{} parts are too many; allow larger ones",
                part + 1
            ));
        }
        Ok(part + 1)
    }

    /// The entries of part `no`: the first has all of them.
    fn part_entries(&self, no: usize, count: usize, alignment: u64) -> PartEntries<'_> {
        let mut added = Vec::new();
        if no > 0 && alignment != DEFAULT_ALIGNMENT as u64 {
            added.push((ALIGNMENT_KEY, Value::U32(alignment as u32)));
        }
        if count > 1 {
            // Both numbers are checked to fit before anything is written.
            added.push((split::NO_KEY, Value::U16(no as u16)));
            added.push((split::COUNT_KEY, Value::U16(count as u16)));
            added.push((split::TENSORS_KEY, Value::I32(self.tensors.len() as i32)));
        }
        let model = if no == 0 { &self.entries[..] } else { &[] };
        PartEntries { model, added }
    }

    fn part(
        &self,
        no: usize,
        count: usize,
        path: PathBuf,
        alignment: u64,
        slots: &[Slot],
    ) -> PartLayout {
        let mine = |(slot, _): &(&Slot, &TensorPlan)| slot.part == no;
        let mine: Vec<_> = slots.iter().zip(&self.tensors).filter(mine).collect();
        let lines = mine.iter().map(|(slot, tensor)| EncodedTensor {
            name: &tensor.name,
            shape: &tensor.shape,
            dtype: tensor.dtype,
            offset: slot.offset,
        });
        let entries = self.part_entries(no, count, alignment);
        let header = encode_header(&entries.borrow(), lines, alignment as usize);
        let data = mine.last().map_or(0, |(slot, _)| slot.offset + slot.padded);
        let n_bytes = header.len() as u64 + data;
        PartLayout {
            path,
            header,
            n_bytes,
        }
    }
}

/// Metadata of one part: the model's and that about the container.
struct PartEntries<'a> {
    model: &'a [(String, Value)],
    added: Vec<(&'static str, Value)>,
}

impl PartEntries<'_> {
    fn borrow(&self) -> Vec<(&str, &Value)> {
        let model = self.model.iter().map(|(key, value)| (key.as_str(), value));
        model
            .chain(self.added.iter().map(|(key, value)| (*key, value)))
            .collect()
    }
}

/// `target` itself, or the names of its parts.
pub(super) fn part_paths(target: &Path, n_parts: usize) -> Result<Vec<PathBuf>, String> {
    let name = target.file_name().and_then(|name| name.to_str());
    let prefix = name
        .and_then(|name| name.strip_suffix(".gguf"))
        .filter(|prefix| !prefix.is_empty());
    let Some(prefix) = prefix else {
        return Err("its name does not end in .gguf".to_owned());
    };
    if n_parts == 1 {
        return Ok(vec![target.to_owned()]);
    }
    let path = |no| target.with_file_name(split::part_name(prefix, no, n_parts));
    Ok((0..n_parts).map(path).collect())
}
