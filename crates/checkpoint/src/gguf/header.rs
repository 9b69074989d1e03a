//! One GGUF file: magic, version, metadata and tensor table, everything checked before a byte of data is handed out.
//!
//! Layout (version 3; version 2 is the same): `GGUF`, u32 version, u64 tensors, u64 metadata entries; the entries (key,
//! type, value); the tensor table (name, u32 dimensions, u64 each fastest first, u32 type, u64 offset); padding to
//! `general.alignment`; the data, where every tensor starts at a multiple of the alignment.

use std::collections::HashSet;

use bytes::Bytes;
use cadre_kernels::Format;

use super::cursor::{Cursor, Problem, utf8};
use super::types::type_name;
use super::value::Value;

pub(super) const MAGIC: &[u8; 4] = b"GGUF";
pub(super) const VERSION: u32 = 3;
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";
pub(super) const DEFAULT_ALIGNMENT: usize = 32;

/// Most dimensions of a tensor (`GGML_MAX_DIMS`).
pub(super) const MAX_DIMS: usize = 4;

/// Longest key or tensor name, in bytes: what the format allows for keys. llama.cpp reads tensor names of at most 63
/// bytes; longer ones are read here, since nothing is lost by it, but never written.
const MAX_NAME: usize = 65_535;

/// Fewest bytes of a metadata entry: key length, type, a one-byte value.
const MIN_ENTRY: usize = 8 + 4 + 1;

/// Fewest bytes of a line of the tensor table, with one dimension.
const MIN_TENSOR: usize = 8 + 4 + 8 + 4 + 8;

/// A tensor of a GGUF file.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    /// Name as the file spells it.
    pub name: String,
    /// Number format.
    pub dtype: Format,
    /// Dimensions, slowest first (the file lists them the other way round). The last is a multiple of the format's
    /// block length.
    pub shape: Vec<usize>,
    /// The blocks: a slice of the mapped file.
    pub bytes: Bytes,
}

/// What one file holds.
pub(super) struct Header {
    /// In the order of the file, keys unique.
    pub(super) entries: Vec<(String, Value)>,
    /// In the order of the table, names unique.
    pub(super) tensors: Vec<GgufTensor>,
}

/// A line of the tensor table.
struct Line {
    name: String,
    dtype: Format,
    shape: Vec<usize>,
    n_bytes: usize,
    offset: u64,
}

impl Header {
    pub(super) fn read(whole: &Bytes) -> Result<Self, Problem> {
        let mut cursor = Cursor::new(whole);
        check_magic(&mut cursor)?;
        check_version(cursor.u32()?)?;
        // Both counts come before either list, so the first can only be bounded by all that follows.
        let n_tensors = cursor.count(MIN_TENSOR, "tensors")?;
        let n_entries = cursor.count(MIN_ENTRY, "metadata entries")?;
        let entries = read_entries(n_entries, &mut cursor, whole)?;
        let alignment = alignment(&entries)?;
        let lines = read_table(n_tensors, &mut cursor)?;
        let start = (cursor.at() as u64).next_multiple_of(alignment);
        let tensors = locate(lines, start, alignment, whole)?;
        Ok(Self { entries, tensors })
    }
}

fn check_magic(cursor: &mut Cursor<'_>) -> Result<(), Problem> {
    let n_bytes = cursor.remaining();
    if n_bytes < 4 {
        return Err(format!(
            "it has {n_bytes} bytes, less than the 4 of the magic"
        ));
    }
    let start = cursor.clone().take(n_bytes.min(9) as u64)?;
    let magic: [u8; 4] = cursor.word()?;
    if &magic == MAGIC {
        return Ok(());
    }
    let what = match (&magic, start) {
        (b"vers", _) => ": it is a pointer of Git LFS, not the file; fetch it with `git lfs pull`",
        (b"lmgg" | b"fmgg" | b"tjgg" | b"algg", _) => {
            ": it is a GGML file from before GGUF (2023); convert the model again"
        }
        (b"PK\x03\x04", _) => ": it is a zip archive (a PyTorch checkpoint?)",
        (_, [.., b'{']) if n_bytes > 8 => ": it looks like a safetensors file",
        _ => "",
    };
    Err(format!(
        "it starts with `{}` instead of `GGUF`{what}",
        magic.escape_ascii()
    ))
}

fn check_version(version: u32) -> Result<(), Problem> {
    match version {
        2 | VERSION => Ok(()),
        1 => Err("version 1 of GGUF is not read; convert the model again".to_owned()),
        _ if version.swap_bytes() <= VERSION => Err(
            "it is big-endian; only little-endian files are read (the gguf Python package swaps \
             them: gguf-convert-endian)"
                .to_owned(),
        ),
        _ => Err(format!(
            "GGUF version {version} is not known; known are 2 and {VERSION}"
        )),
    }
}

fn read_entries(
    n: u64,
    cursor: &mut Cursor<'_>,
    whole: &Bytes,
) -> Result<Vec<(String, Value)>, Problem> {
    let mut entries = Vec::new();
    let mut seen = HashSet::new();
    for at in 0..n {
        let key = cursor.string(MAX_NAME).and_then(utf8);
        let key = key.map_err(|problem| format!("key {at} of {n}: {problem}"))?;
        if key.is_empty() {
            return Err(format!("key {at} of {n} is empty"));
        }
        if !seen.insert(key) {
            return Err(format!("key `{key}` is there twice"));
        }
        let value = Value::read(cursor, whole);
        let value = value.map_err(|problem| format!("key `{key}`: {problem}"))?;
        entries.push((key.to_owned(), value));
    }
    Ok(entries)
}

fn alignment(entries: &[(String, Value)]) -> Result<u64, Problem> {
    let Some((_, value)) = entries.iter().find(|(key, _)| key == ALIGNMENT_KEY) else {
        return Ok(DEFAULT_ALIGNMENT as u64);
    };
    match value {
        Value::U32(alignment) if alignment.is_power_of_two() => Ok(u64::from(*alignment)),
        _ => Err(format!(
            "key `{ALIGNMENT_KEY}` is {value} ({}), expected a power of two (u32)",
            value.kind().name()
        )),
    }
}

fn read_table(n: u64, cursor: &mut Cursor<'_>) -> Result<Vec<Line>, Problem> {
    let mut lines = Vec::new();
    let mut seen = HashSet::new();
    for at in 0..n {
        let name = cursor.string(MAX_NAME).and_then(utf8);
        let name = name.map_err(|problem| format!("tensor {at} of {n}: its name {problem}"))?;
        if name.is_empty() {
            return Err(format!("tensor {at} of {n} has no name"));
        }
        if !seen.insert(name) {
            return Err(format!("tensor `{name}` is there twice"));
        }
        let line = read_line(name, cursor);
        lines.push(line.map_err(|problem| format!("tensor `{name}`: {problem}"))?);
    }
    Ok(lines)
}

fn read_line(name: &str, cursor: &mut Cursor<'_>) -> Result<Line, Problem> {
    let n_dims = cursor.u32()? as usize;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(format!(
            "it has {n_dims} dimensions, expected 1 to {MAX_DIMS}"
        ));
    }
    let mut dims = Vec::with_capacity(n_dims);
    for _ in 0..n_dims {
        dims.push(cursor.u64()?);
    }
    dims.reverse();
    let id = cursor.u32()?;
    let offset = cursor.u64()?;
    let dtype = Format::from_gguf_id(id).ok_or_else(|| unknown_type(id))?;
    let (shape, n_bytes) = measure(&dims, dtype)?;
    Ok(Line {
        name: name.to_owned(),
        dtype,
        shape,
        n_bytes,
        offset,
    })
}

fn unknown_type(id: u32) -> Problem {
    let known: Vec<String> = Format::all()
        .filter_map(|format| Some(format!("{format} ({})", format.gguf_id()?)))
        .collect();
    let known = known.join(", ");
    match type_name(id) {
        Some(name) => format!("its type {name} (id {id}) is not supported; supported are {known}"),
        None => format!("its type id {id} is not known; supported are {known}"),
    }
}

/// Shape and size in bytes of `dims` (slowest first) values.
pub(super) fn measure(dims: &[u64], dtype: Format) -> Result<(Vec<usize>, usize), Problem> {
    if dims.contains(&0) {
        return Err(format!("a dimension of its shape {dims:?} is 0"));
    }
    let too_large = || format!("its shape {dims:?} is larger than memory can address");
    let n_values = dims
        .iter()
        .try_fold(1usize, |n, dim| n.checked_mul(usize::try_from(*dim).ok()?));
    let n_values = n_values.ok_or_else(too_large)?;
    let row = dims.last().copied().unwrap_or(1);
    if !row.is_multiple_of(dtype.block_len() as u64) {
        return Err(format!(
            "its rows have {row} values, not whole blocks of {dtype}, which hold {}",
            dtype.block_len()
        ));
    }
    let n_bytes = dtype
        .n_bytes(n_values)
        .filter(|n| isize::try_from(*n).is_ok());
    let n_bytes = n_bytes.ok_or_else(too_large)?;
    // No dimension exceeds the product, so the casts lose nothing.
    Ok((dims.iter().map(|dim| *dim as usize).collect(), n_bytes))
}

/// Cuts the data of every tensor out of the file. They may lie in any order and with gaps, but not on each other.
fn locate(
    lines: Vec<Line>,
    start: u64,
    alignment: u64,
    whole: &Bytes,
) -> Result<Vec<GgufTensor>, Problem> {
    let mut spans: Vec<(u64, u64, usize)> = Vec::with_capacity(lines.len());
    for (at, line) in lines.iter().enumerate() {
        let Line {
            name,
            n_bytes,
            offset,
            ..
        } = line;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "tensor `{name}`: its offset {offset} is not a multiple of the alignment {alignment}"
            ));
        }
        let from = start.checked_add(*offset);
        let to = from.and_then(|from| from.checked_add(*n_bytes as u64));
        let (Some(from), Some(to)) = (from, to) else {
            return Err(format!(
                "tensor `{name}`: its offset {offset} is larger than any file"
            ));
        };
        if to > whole.len() as u64 {
            return Err(format!(
                "tensor `{name}` ends at byte {to}, but the file ends at byte {}; the download may be incomplete",
                whole.len()
            ));
        }
        spans.push((from, to, at));
    }
    let mut sorted = spans.clone();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        let ((_, end, first), (begin, _, second)) = (pair[0], pair[1]);
        if begin < end {
            return Err(format!(
                "tensors `{}` and `{}` overlap: one ends at byte {end}, the other starts at byte {begin}",
                lines[first].name, lines[second].name
            ));
        }
    }
    let tensor = |(line, (from, to, _)): (Line, (u64, u64, usize))| GgufTensor {
        name: line.name,
        dtype: line.dtype,
        shape: line.shape,
        // `to` is at most the length of the file, a usize.
        bytes: whole.slice(from as usize..to as usize),
    };
    Ok(lines.into_iter().zip(spans).map(tensor).collect())
}
