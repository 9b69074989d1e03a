//! The beginning of a GGUF file that arrives over a network: as much as opening the file reads, and no more.
//!
//! Nothing is judged here. Where the bytes make no sense the walk ends, and opening the file says what is wrong.

use std::io::{self, Read};
use std::ops::Range;

use super::header::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS};
use super::value::ValueType;
use crate::gguf_models::ROPE_TENSORS;

/// No header is longer; those of known models have less than 64 MiB.
const MAX_HEADER: u64 = 1 << 30;

/// What opening a file reads of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outline {
    /// The file from its beginning to the end of its header.
    pub header: Vec<u8>,
    /// Where the data lies that opening needs as well: the factors of the rope. In bytes from the beginning.
    pub more: Vec<Range<u64>>,
}

/// Reads a GGUF file up to the end of its header.
///
/// # Errors
/// Only those of `file`. A damaged header is returned as far as it was read.
pub fn gguf_outline(file: &mut dyn Read) -> io::Result<Outline> {
    let mut walk = Walk {
        file,
        outline: Outline::default(),
    };
    match walk.whole() {
        Ok(()) | Err(Stop::Senseless) => Ok(walk.outline),
        Err(Stop::Io(error)) => Err(error),
    }
}

enum Stop {
    Io(io::Error),
    Senseless,
}

struct Walk<'a> {
    file: &'a mut dyn Read,
    outline: Outline,
}

impl Walk<'_> {
    fn whole(&mut self) -> Result<(), Stop> {
        if self.take(4)? != MAGIC {
            return Err(Stop::Senseless);
        }
        self.u32()?;
        let (n_tensors, n_entries) = (self.u64()?, self.u64()?);
        let mut alignment = DEFAULT_ALIGNMENT as u64;
        for _ in 0..n_entries {
            let key = self.text()?;
            let is_alignment = self.outline.header[key] == *ALIGNMENT_KEY.as_bytes();
            let kind = self.kind()?;
            if is_alignment && kind == ValueType::U32 {
                alignment = u64::from(self.u32()?);
            } else {
                self.value(kind, 0)?;
            }
        }
        let mut factors = Vec::new();
        for _ in 0..n_tensors {
            factors.extend(self.tensor()?);
        }
        let end = self.outline.header.len() as u64;
        let start = end
            .checked_next_multiple_of(alignment.max(1))
            .ok_or(Stop::Senseless)?;
        let place = |(offset, n): (u64, u64)| {
            let from = start.checked_add(offset)?;
            Some(from..from.checked_add(n)?)
        };
        self.outline.more = factors.into_iter().filter_map(place).collect();
        Ok(())
    }

    /// A line of the tensor table; offset and bytes of the data that opening reads.
    fn tensor(&mut self) -> Result<Option<(u64, u64)>, Stop> {
        let name = self.text()?;
        let is_needed = {
            let name = &self.outline.header[name];
            ROPE_TENSORS.iter().any(|known| known.as_bytes() == name)
        };
        let n_dims = self.u32()?;
        if n_dims as usize > MAX_DIMS {
            return Err(Stop::Senseless);
        }
        let mut n_bytes = Some(4u64);
        for _ in 0..n_dims {
            let dim = self.u64()?;
            n_bytes = n_bytes.and_then(|n| n.checked_mul(dim));
        }
        // Factors are f32; of another type they are refused, whatever their values.
        self.u32()?;
        let offset = self.u64()?;
        Ok(is_needed.then_some(offset).zip(n_bytes))
    }

    fn value(&mut self, kind: ValueType, depth: usize) -> Result<(), Stop> {
        match (kind, kind.fixed_bytes()) {
            (_, Some(n)) => self.take(n as u64).map(drop),
            (ValueType::Text, _) => self.text().map(drop),
            _ if depth > super::value::MAX_DEPTH => Err(Stop::Senseless),
            _ => {
                let (item, n) = (self.kind()?, self.u64()?);
                match item.fixed_bytes() {
                    Some(bytes) => {
                        let bytes = n.checked_mul(bytes as u64).ok_or(Stop::Senseless)?;
                        self.take(bytes).map(drop)
                    }
                    None => (0..n).try_for_each(|_| self.value(item, depth + 1)),
                }
            }
        }
    }

    fn kind(&mut self) -> Result<ValueType, Stop> {
        let id = self.u32()?;
        ValueType::from_id(id).map_err(|_| Stop::Senseless)
    }

    /// Where a text lies in the header.
    fn text(&mut self) -> Result<Range<usize>, Stop> {
        let n = self.u64()?;
        self.take(n)?;
        let end = self.outline.header.len();
        // That many bytes were just read.
        Ok(end - n as usize..end)
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        let bytes = self.take(4)?;
        bytes
            .try_into()
            .map(u32::from_le_bytes)
            .map_err(|_| Stop::Senseless)
    }

    fn u64(&mut self) -> Result<u64, Stop> {
        let bytes = self.take(8)?;
        bytes
            .try_into()
            .map(u64::from_le_bytes)
            .map_err(|_| Stop::Senseless)
    }

    /// The next `n` bytes; what is there of them is kept even when the file ends before.
    fn take(&mut self, n: u64) -> Result<&[u8], Stop> {
        let header = &mut self.outline.header;
        let from = header.len();
        if n > MAX_HEADER - (from as u64).min(MAX_HEADER) {
            return Err(Stop::Senseless);
        }
        let read = (&mut *self.file).take(n).read_to_end(header);
        match read {
            Ok(read) if read as u64 == n => Ok(&header[from..]),
            Ok(_) => Err(Stop::Senseless),
            Err(error) => Err(Stop::Io(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;
    use crate::gguf::{Array, GgufPlan, GgufWriter, TensorPlan, Value, WriteOptions};

    fn file(alignment: u32) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let tensor = |name: &str, n: usize| TensorPlan {
            name: name.to_owned(),
            dtype: Dtype::F32,
            shape: vec![n],
        };
        let words = Array::of_texts(&["a".to_owned(), "bc".to_owned()]);
        let plan = GgufPlan {
            entries: vec![
                (ALIGNMENT_KEY.to_owned(), Value::U32(alignment)),
                ("words".to_owned(), words.into()),
                ("numbers".to_owned(), Array::from(&[1i32, 2, 3][..]).into()),
                ("name".to_owned(), Value::Text("x".to_owned())),
                ("yes".to_owned(), Value::Bool(true)),
            ],
            tensors: vec![tensor("first", 3), tensor("rope_freqs.weight", 4)],
            max_part_bytes: None,
        };
        let mut writer =
            GgufWriter::create_or_resume(&path, plan, &WriteOptions::default()).unwrap();
        writer.write("first", &[1; 12]).unwrap();
        writer.write("rope_freqs.weight", &[2; 16]).unwrap();
        writer.finish().unwrap();
        std::fs::read(path).unwrap()
    }

    #[test]
    fn the_header_and_the_factors_are_all_that_is_needed() {
        for alignment in [32, 64] {
            let file = file(alignment);
            let outline = gguf_outline(&mut file.as_slice()).unwrap();
            let n = outline.header.len();
            assert_eq!(outline.header, file[..n]);
            let [factors] = &outline.more[..] else {
                panic!("{:?}", outline.more)
            };
            let factors = factors.start as usize..factors.end as usize;
            assert_eq!(file[factors], [2; 16]);
            let first = n.next_multiple_of(alignment as usize);
            assert_eq!(file[first..first + 12], [1; 12]);
        }
    }

    #[test]
    fn what_makes_no_sense_ends_the_walk() {
        let file = file(32);
        for n in 0..file.len().min(150) {
            let outline = gguf_outline(&mut &file[..n]).unwrap();
            assert!(file.starts_with(&outline.header) && outline.header.len() <= n);
        }
        let mut large = file.clone();
        // The number of metadata entries.
        large[16..24].fill(0xff);
        assert!(gguf_outline(&mut large.as_slice()).unwrap().more.is_empty());
        let other = gguf_outline(&mut &b"<html>"[..]).unwrap();
        assert_eq!(other.header, b"<htm");
    }
}
