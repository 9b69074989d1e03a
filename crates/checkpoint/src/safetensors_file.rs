//! One safetensors file: its header parsed once, and every claim of it checked against the bytes.
//!
//! Layout: u64 length of the header; the header, a JSON object from tensor names to `dtype`, `shape` and
//! `data_offsets`; the data. The tensors must cover the data without gaps or overlaps, as the format demands.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Read};
use std::ops::Range;

use ahash::AHashSet;
use bytes::Bytes;
use cadre_kernels::Format;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use crate::dtype::from_safetensors;
use crate::error::{CheckpointError, Result};

/// Longest header, in bytes: the limit of the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// Most dimensions of a tensor.
const MAX_DIMS: usize = 16;

/// The key that holds no tensor.
const METADATA: &str = "__metadata__";

/// A tensor of a safetensors file.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Name as the file spells it.
    pub name: String,
    /// Number format.
    pub dtype: Format,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// The values, little-endian: a slice of the file.
    pub bytes: Bytes,
}

/// The tensors of a safetensors file that is in memory or mapped, in the order of its header; `file` stands for its
/// path in errors.
///
/// # Errors
/// A file that is cut off or contradicts itself, and number formats that are not read, by tensor.
pub fn read_safetensors(file: &str, bytes: &Bytes) -> Result<Vec<StoredTensor>> {
    let lines = read_header(bytes).map_err(|problem| CheckpointError::Safetensors {
        file: file.to_owned(),
        problem,
    })?;
    let tensor = |line: Line| {
        let dtype =
            from_safetensors(line.dtype).ok_or_else(|| CheckpointError::UnsupportedDtype {
                origin: file.to_owned(),
                name: line.name.clone(),
                dtype: line.dtype.to_string(),
            })?;
        Ok(StoredTensor {
            name: line.name,
            dtype,
            shape: line.shape,
            bytes: bytes.slice(line.range),
        })
    };
    lines.into_iter().map(tensor).collect()
}

/// Reads a safetensors file up to the end of its header: as much as opening it reads, for files that arrive over a
/// network. Nothing is judged: of a damaged header what is there is returned, and opening says what is wrong.
///
/// # Errors
/// Only those of `file`.
pub fn safetensors_outline(file: &mut dyn Read) -> io::Result<Vec<u8>> {
    let mut header = Vec::new();
    (&mut *file).take(8).read_to_end(&mut header)?;
    let length = header.as_slice().try_into().map_or(0, u64::from_le_bytes);
    if length <= MAX_HEADER {
        file.take(length).read_to_end(&mut header)?;
    }
    Ok(header)
}

/// Bytes of the file up to the end of its header, as it claims; `None` where it cannot be right.
pub(crate) fn header_length(bytes: &[u8]) -> Option<usize> {
    let length = u64::from_le_bytes(*bytes.first_chunk()?);
    (length <= MAX_HEADER).then_some(8 + length as usize)
}

/// A tensor in the header.
struct Line {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Within the file.
    range: Range<usize>,
}

/// The value of a tensor in the JSON.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The JSON object, names in its order.
struct Header(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to their dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut tensors, mut seen) = (Vec::new(), AHashSet::new());
                while let Some(Name(name)) = map.next_key()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("`{name}` is there twice")));
                    }
                    if name == METADATA {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let info = map.next_value::<Info>();
                    let info = info
                        .map_err(|error| A::Error::custom(format!("tensor `{name}`: {error}")))?;
                    tensors.push((name.into_owned(), info));
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

/// A name, borrowed from the header unless it holds escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

fn read_header(bytes: &[u8]) -> Result<Vec<Line>, String> {
    let (json, start) = header_bytes(bytes)?;
    let header: Header = serde_json::from_slice(json).map_err(|error| {
        let what = if error.is_data() {
            "its header cannot be used"
        } else {
            "its header is not valid JSON"
        };
        format!("{what}: {error}")
    })?;
    let data = (bytes.len() - start) as u64;
    let mut lines = Vec::with_capacity(header.0.len());
    for (name, info) in header.0 {
        match check(info, data, start) {
            Ok((dtype, shape, range)) => lines.push(Line {
                name,
                dtype,
                shape,
                range,
            }),
            Err(problem) => return Err(format!("tensor `{name}`: {problem}")),
        }
    }
    check_cover(&lines, start, bytes.len())?;
    Ok(lines)
}

/// The JSON of the header, and where the data starts.
fn header_bytes(bytes: &[u8]) -> Result<(&[u8], usize), String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!(
            "it has {} bytes, less than the 8 of the header length",
            bytes.len()
        ));
    };
    if rest.starts_with(b"https://git-lfs") {
        return Err("it is a pointer of Git LFS, not the file (`git lfs pull`)".to_owned());
    }
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!(
            "its header claims {length} bytes; at most {MAX_HEADER} are accepted"
        ));
    }
    // At most MAX_HEADER, so the cast loses nothing.
    let json = rest.get(..length as usize).ok_or_else(|| {
        format!(
            "its header should have {length} bytes, but only {} follow",
            rest.len()
        )
    })?;
    Ok((json, 8 + json.len()))
}

/// The shape, dtype and offsets of one tensor must agree with each other and with the `data` bytes that are there.
fn check(info: Info, data: u64, start: usize) -> Result<(Dtype, Vec<usize>, Range<usize>), String> {
    let Info {
        dtype,
        shape,
        data_offsets: (from, to),
    } = info;
    if shape.len() > MAX_DIMS {
        return Err(format!(
            "it has {} dimensions; at most {MAX_DIMS} are accepted",
            shape.len()
        ));
    }
    if from > to {
        return Err(format!(
            "it starts at byte {from} of the data, after its end at {to}"
        ));
    }
    if to > data {
        return Err(format!("it needs {to} bytes of data, but {data} are there"));
    }
    let n_bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |n, dim| n.checked_mul(*dim));
    if n_bits != (to - from).checked_mul(8) {
        let wanted = match n_bits {
            Some(n_bits) if n_bits.is_multiple_of(8) => format!("{} bytes", n_bits / 8),
            Some(n_bits) => format!("{n_bits} bits"),
            None => "more than any file".to_owned(),
        };
        return Err(format!(
            "{dtype} of shape {shape:?} takes {wanted}, but it has {} bytes",
            to - from
        ));
    }
    // A tensor without values may still claim dimensions that no memory has.
    let shape = shape.into_iter().map(usize::try_from);
    let shape: Vec<usize> = shape
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())?;
    // Within the file, whose length is a usize.
    Ok((dtype, shape, start + from as usize..start + to as usize))
}

/// Every byte of the data must belong to one tensor.
fn check_cover(lines: &[Line], start: usize, end: usize) -> Result<(), String> {
    let mut sorted: Vec<&Line> = lines.iter().collect();
    sorted.sort_unstable_by_key(|line| (line.range.start, line.range.end));
    let mut covered = start;
    for (at, line) in sorted.iter().enumerate() {
        let Range {
            start: from,
            end: to,
        } = line.range;
        if from < covered {
            let other = &sorted[at - 1].name;
            return Err(format!("tensors `{other}` and `{}` overlap", line.name));
        }
        if from > covered {
            return Err(format!(
                "{} bytes before tensor `{}` belong to no tensor",
                from - covered,
                line.name
            ));
        }
        covered = to;
    }
    if covered < end {
        return Err(format!(
            "{} bytes after the last tensor belong to no tensor",
            end - covered
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, n_data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.bytes());
        bytes.extend(vec![0; n_data]);
        bytes
    }

    fn read(bytes: Vec<u8>) -> Result<Vec<StoredTensor>> {
        read_safetensors("m", &bytes.into())
    }

    /// A tensor as JSON.
    fn line(name: &str, dtype: &str, shape: &str, from: u64, to: u64) -> String {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    }

    #[track_caller]
    fn refused(lines: &[String], n_data: usize, words: &str) {
        let json = format!("{{{}}}", lines.join(","));
        let error = read(file(&json, n_data)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn tensors_come_out_in_the_order_of_the_header() {
        let lines = [
            r#""__metadata__":{"format":"pt"}"#.to_owned(),
            line("b", "F32", "[2]", 4, 12),
            line("a\\u0020b", "BF16", "[1,2]", 0, 4),
            line("none", "U8", "[0,3]", 4, 4),
        ];
        let tensors = read(file(&format!("{{{}}}   ", lines.join(",")), 12)).unwrap();
        let names: Vec<&str> = tensors.iter().map(|tensor| &*tensor.name).collect();
        assert_eq!(names, ["b", "a b", "none"]);
        assert_eq!((tensors[0].dtype, tensors[0].bytes.len()), (Format::F32, 8));
        assert_eq!(
            (tensors[1].dtype, &*tensors[1].shape),
            (Format::Bf16, &[1, 2][..])
        );
    }

    #[test]
    fn contradictions_are_named() {
        let a = || line("a", "F32", "[1]", 0, 4);
        refused(&[a(), a()], 4, "`a` is there twice");
        refused(&[a()], 3, "`a`: it needs 4 bytes of data, but 3 are there");
        refused(&[a()], 5, "1 bytes after the last tensor");
        refused(
            &[a(), line("b", "U8", "[2]", 3, 5)],
            5,
            "`a` and `b` overlap",
        );
        refused(
            &[a(), line("b", "U8", "[1]", 5, 6)],
            6,
            "1 bytes before tensor `b`",
        );
        refused(
            &[line("a", "F32", "[2]", 0, 4)],
            4,
            "F32 of shape [2] takes 8 bytes, but it has 4 bytes",
        );
        refused(&[line("a", "F32", "[1]", 4, 0)], 4, "after its end");
        let huge = format!("[{0},{0}]", 1u64 << 60);
        refused(&[line("a", "F32", &huge, 0, 4)], 4, "more than any file");
        refused(
            &[line("a", "U8", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", 0, 1)],
            1,
            "17 dimensions",
        );
        refused(&[line("a", "I64", "[1]", 0, 8)], 8, "`a` has dtype I64");
        refused(
            &[line("a", "X9", "[1]", 0, 8)],
            8,
            "tensor `a`: unknown variant `X9`",
        );
        refused(
            &[line("a", "F32", "[-1]", 0, 8)],
            8,
            "tensor `a`: invalid value",
        );
        refused(
            &[r#""a":{"dtype":"F32"}"#.to_owned()],
            0,
            "missing field `shape`",
        );
    }

    #[test]
    fn headers_that_are_none_are_refused() {
        let error = |bytes: Vec<u8>| read(bytes).unwrap_err().to_string();
        assert!(error(vec![1, 2]).contains("it has 2 bytes"));
        assert!(error([&[0xff; 8][..], b"{}"].concat()).contains("18446744073709551615 bytes"));
        assert!(error([&3u64.to_le_bytes()[..], b"{}"].concat()).contains("only 2 follow"));
        assert!(error(file("[]", 0)).contains("expected an object from tensor names"));
        assert!(error(file("{", 0)).contains("not valid JSON"));
        assert!(
            error(b"version https://git-lfs.github.com/spec/v1\n".to_vec()).contains("Git LFS")
        );
        let deep = format!(r#"{{"__metadata__":{}"#, "[".repeat(100_000));
        assert!(error(file(&deep, 0)).contains("not valid JSON"));
    }

    #[test]
    fn every_prefix_of_a_file_is_refused() {
        let bytes = file(&format!("{{{}}}", line("a", "F32", "[1]", 0, 4)), 4);
        assert!(read(bytes.clone()).is_ok());
        for cut in 0..bytes.len() {
            assert!(read(bytes[..cut].to_vec()).is_err(), "{cut}");
        }
    }
}
