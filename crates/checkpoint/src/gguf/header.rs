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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::encode::{EncodedTensor, encode_header};

    fn tensor<'a>(
        name: &'a str,
        shape: &'a [usize],
        dtype: Format,
        offset: u64,
    ) -> EncodedTensor<'a> {
        EncodedTensor {
            name,
            shape,
            dtype,
            offset,
        }
    }

    /// A file with one F32 value in a tensor `a`.
    fn small() -> Vec<u8> {
        file(&[], vec![tensor("a", &[1], Format::F32, 0)], 4)
    }

    fn file(entries: &[(&str, &Value)], tensors: Vec<EncodedTensor<'_>>, n_data: usize) -> Vec<u8> {
        let mut bytes = encode_header(entries, tensors.into_iter(), 32);
        bytes.resize(bytes.len() + n_data, 0);
        bytes
    }

    #[track_caller]
    fn refused(bytes: Vec<u8>, words: &str) {
        let problem = Header::read(&bytes.into()).err().unwrap();
        assert!(problem.contains(words), "{problem}");
    }

    #[track_caller]
    fn refused_tensors(tensors: Vec<EncodedTensor<'_>>, n_data: usize, words: &str) {
        refused(file(&[], tensors, n_data), words);
    }

    /// [`small`] with `new` written over the bytes from `at` on.
    fn patched(at: usize, new: &[u8]) -> Vec<u8> {
        let mut bytes = small();
        bytes[at..at + new.len()].copy_from_slice(new);
        bytes
    }

    /// Positions in [`small`]: magic 0, version 4, tensors 8, entries 16, name 24 (length) and 32, dimensions 33,
    /// size 37, type 45, offset 49, end of the header 57.
    #[test]
    fn the_layout_is_as_described() {
        let bytes = small();
        assert_eq!(bytes.len(), 64 + 4);
        assert_eq!((bytes[32], bytes[33], bytes[37]), (b'a', 1, 1));
        assert!(Header::read(&bytes.into()).is_ok());
    }

    #[test]
    fn other_files_are_recognised() {
        refused(b"GG".to_vec(), "it has 2 bytes");
        refused(b"version https://git-lfs".to_vec(), "git lfs pull");
        refused(b"PK\x03\x04....".to_vec(), "zip archive");
        refused(b"lmgg....".to_vec(), "before GGUF");
        refused(b"\x40\0\0\0\0\0\0\0{".to_vec(), "looks like a safetensors");
        refused(patched(4, &1u32.to_le_bytes()), "version 1");
        refused(patched(4, &4u32.to_le_bytes()), "version 4 is not known");
        refused(patched(4, &3u32.to_be_bytes()), "big-endian");
        assert!(Header::read(&patched(4, &2u32.to_le_bytes()).into()).is_ok());
    }

    #[test]
    fn counts_that_cannot_be_are_refused_at_once() {
        for huge in [1u64 << 60, u64::MAX, 3] {
            refused(
                patched(8, &huge.to_le_bytes()),
                "tensors, but the 52 bytes that follow hold at most 1",
            );
        }
        refused(patched(16, &(1u64 << 60).to_le_bytes()), "metadata entries");
        refused(
            patched(24, &u64::MAX.to_le_bytes()),
            "tensor 0 of 1: its name it claims",
        );
        refused(patched(33, &5u32.to_le_bytes()), "`a`: it has 5 dimensions");
        refused(patched(33, &0u32.to_le_bytes()), "`a`: it has 0 dimensions");
    }

    #[test]
    fn tensors_that_cannot_be_are_named() {
        refused(patched(32, &[0xff]), "tensor 0 of 1: its name is not UTF-8");
        refused(
            patched(37, &0u64.to_le_bytes()),
            "`a`: a dimension of its shape [0] is 0",
        );
        refused(patched(37, &(1u64 << 62).to_le_bytes()), "`a`: its shape");
        refused(
            patched(45, &99u32.to_le_bytes()),
            "`a`: its type id 99 is not known; supported are F32 (0)",
        );
        refused(patched(45, &31u32.to_le_bytes()), "type Q4_0_4_4 (id 31)");
        refused(
            patched(49, &u64::MAX.to_le_bytes()),
            "`a`: its offset 18446744073709551615 is not a multiple",
        );
        refused(
            patched(49, &(u64::MAX - 31).to_le_bytes()),
            "larger than any file",
        );
        refused(
            patched(49, &32u64.to_le_bytes()),
            "`a` ends at byte 100, but the file ends at byte 68",
        );
        refused(
            patched(49, &8u64.to_le_bytes()),
            "not a multiple of the alignment 32",
        );
        let big = 1 << 31;
        refused_tensors(
            vec![tensor("a", &[big, big, big], Format::F32, 0)],
            4,
            "larger than memory",
        );
        refused_tensors(
            vec![tensor("a", &[2, 16], Format::Q8_0, 0)],
            34,
            "rows have 16 values, not whole blocks of Q8_0",
        );
    }

    #[test]
    fn twins_and_overlaps_are_named() {
        let twice = vec![
            tensor("a", &[1], Format::F32, 0),
            tensor("a", &[1], Format::F32, 32),
        ];
        refused_tensors(twice, 36, "tensor `a` is there twice");
        let over = vec![
            tensor("a", &[9], Format::F32, 0),
            tensor("b", &[1], Format::F32, 32),
        ];
        refused_tensors(over, 36, "tensors `a` and `b` overlap");
        let same = vec![
            tensor("b", &[1], Format::F32, 0),
            tensor("a", &[1], Format::F32, 0),
        ];
        refused_tensors(same, 36, "overlap");
        let value = Value::U8(1);
        refused(
            file(&[("k", &value), ("k", &value)], vec![], 0),
            "key `k` is there twice",
        );
        refused(file(&[("", &value)], vec![], 0), "key 0 of 1 is empty");
        let unordered = vec![
            tensor("a", &[1], Format::F32, 64),
            tensor("b", &[1], Format::F32, 0),
        ];
        assert!(Header::read(&file(&[], unordered, 68).into()).is_ok());
    }

    #[test]
    fn alignments_are_powers_of_two() {
        for bad in [Value::U32(0), Value::U32(24), Value::U64(32)] {
            refused(
                file(&[(ALIGNMENT_KEY, &bad)], vec![], 0),
                "expected a power of two",
            );
        }
        let large = Value::U32(1 << 31);
        refused(
            file(
                &[(ALIGNMENT_KEY, &large)],
                vec![tensor("a", &[1], Format::F32, 0)],
                4,
            ),
            "the file ends at byte",
        );
    }
}
