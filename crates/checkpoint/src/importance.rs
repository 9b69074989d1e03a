//! Importance matrices of llama.cpp: for every matrix, how much the errors of each of its columns count.
//!
//! The importance of column `j` is the mean of `x_j^2` over the inputs `x` that the matrix got; matrices of experts have
//! one each, over the tokens that were sent to the expert. Both forms that llama-imatrix has written are read: GGUF
//! (`NAME.in_sum2` with `NAME.counts`), and the older one of means alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{CheckpointError, Result};
use crate::gguf::Gguf;
use crate::map::FileMap;

/// An importance matrix.
#[derive(Debug, Clone)]
pub struct Importance {
    file: String,
    datasets: Vec<String>,
    n_chunks: u32,
    /// By the GGUF name of the weight: importance of every column, one matrix after the other.
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    values: Vec<f32>,
    /// Matrices that no token was sent to; their columns count alike.
    n_unseen: usize,
    /// Matrices; 0 where the file does not say.
    n_matrices: usize,
}

impl Importance {
    /// Reads the importance matrix at `path`.
    ///
    /// # Errors
    /// A file that cannot be read, is cut off, is no importance matrix, or has numbers that are not finite or below 0.
    pub fn open(path: &Path) -> Result<Self> {
        let map = FileMap::open(path)?;
        let importance = match map.bytes().starts_with(b"GGUF") {
            true => Self::from_gguf(path)?,
            false => Self::from_means(&path.display().to_string(), &map.bytes())?,
        };
        for (name, entry) in &importance.entries {
            let bad = entry
                .values
                .iter()
                .position(|v| !(v.is_finite() && *v >= 0.0));
            if let Some(at) = bad {
                return Err(importance.refuse(format!(
                    "`{name}` holds {} at {at}, expected a number from 0",
                    entry.values[at]
                )));
            }
        }
        match importance.entries.is_empty() {
            true => Err(importance.refuse("it has no entries".to_owned())),
            false => Ok(importance),
        }
    }

    fn from_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let kind = gguf.text_opt("general.type")?.unwrap_or("a model");
        let mut importance = Self {
            file: path.display().to_string(),
            datasets: Vec::new(),
            n_chunks: gguf.u32_opt("imatrix.chunk_count")?.unwrap_or(0),
            entries: BTreeMap::new(),
        };
        if kind != "imatrix" {
            return Err(importance.refuse(format!("it is {kind}")));
        }
        let datasets = gguf.strings_opt("imatrix.datasets")?.unwrap_or_default();
        importance.datasets = datasets.into_iter().map(str::to_owned).collect();
        for tensor in gguf.tensors() {
            let Some(name) = tensor.name.strip_suffix(".in_sum2") else {
                continue;
            };
            let Some(counts) = gguf.tensor(&format!("{name}.counts")) else {
                return Err(importance.refuse(format!("`{name}` has sums and no counts")));
            };
            let counts = counts.dtype.decode(&counts.bytes);
            let mut values = tensor.dtype.decode(&tensor.bytes);
            if counts.is_empty() || !values.len().is_multiple_of(counts.len()) || values.is_empty()
            {
                return Err(importance.refuse(format!(
                    "`{name}` has {} sums for {} matrices",
                    values.len(),
                    counts.len()
                )));
            }
            let cols = values.len() / counts.len();
            let mut n_unseen = 0;
            for (values, count) in values.chunks_exact_mut(cols).zip(&counts) {
                match *count > 0.0 {
                    true => values.iter_mut().for_each(|sum| *sum /= count),
                    false => {
                        values.fill(1.0);
                        n_unseen += 1;
                    }
                }
            }
            let entry = Entry {
                values,
                n_unseen,
                n_matrices: counts.len(),
            };
            importance.entries.insert(name.to_owned(), entry);
        }
        Ok(importance)
    }

    /// The older form: little-endian numbers of 32 bits and names, one entry after the other.
    fn from_means(file: &str, bytes: &[u8]) -> Result<Self> {
        let mut importance = Self {
            file: file.to_owned(),
            datasets: Vec::new(),
            n_chunks: 0,
            entries: BTreeMap::new(),
        };
        let read = importance.read_means(bytes);
        match read {
            Some(()) => Ok(importance),
            None => Err(importance.refuse("it is cut off, or another kind of file".to_owned())),
        }
    }

    fn read_means(&mut self, mut rest: &[u8]) -> Option<()> {
        let rest = &mut rest;
        for _ in 0..size(rest)? {
            let n_name = size(rest)?;
            let name = std::str::from_utf8(take(rest, n_name)?).ok()?.to_owned();
            let n_calls = size(rest)?;
            let n_values = size(rest)?;
            let words = take(rest, n_values.checked_mul(4)?)?.as_chunks::<4>().0;
            // Means come multiplied by the number of calls.
            let calls = if n_calls > 0 { n_calls as f32 } else { 1.0 };
            let values = words.iter().map(|word| f32::from_le_bytes(*word) / calls);
            let entry = Entry {
                values: values.collect(),
                n_unseen: 0,
                n_matrices: 0,
            };
            self.entries.insert(name, entry);
        }
        // Files of the first versions end here.
        if let Some(n_chunks) = size(rest) {
            self.n_chunks = u32::try_from(n_chunks).ok()?;
            let n_name = size(rest)?;
            let dataset = String::from_utf8_lossy(take(rest, n_name)?);
            self.datasets.push(dataset.into_owned());
        }
        rest.is_empty().then_some(())
    }

    /// Importance of the columns of the weight `name`, `[n_matrices, cols]` row-major; `None` where nothing was recorded.
    ///
    /// # Errors
    /// What was recorded is of another size.
    pub(crate) fn of(&self, name: &str, [n_matrices, cols]: [usize; 2]) -> Result<Option<&[f32]>> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        if Some(entry.values.len()) == n_matrices.checked_mul(cols) {
            return Ok(Some(&entry.values));
        }
        Err(self.refuse(format!(
            "`{name}` has {} numbers, expected {n_matrices} x {cols}; was it made with another model?",
            entry.values.len()
        )))
    }

    /// The file that it was read from.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// What text it was made with, as the file says.
    #[must_use]
    pub fn datasets(&self) -> &[String] {
        &self.datasets
    }

    /// Weights that it has numbers for.
    #[must_use]
    pub fn n_entries(&self) -> usize {
        self.entries.len()
    }

    /// Pieces of text that it was made with, as the file says.
    #[must_use]
    pub fn n_chunks(&self) -> u32 {
        self.n_chunks
    }

    /// Matrices of experts that no token was sent to, and how many the file has counts for.
    #[must_use]
    pub fn unseen(&self) -> (usize, usize) {
        let experts = self.entries.values().filter(|entry| entry.n_matrices > 1);
        experts.fold((0, 0), |(unseen, all), entry| {
            (unseen + entry.n_unseen, all + entry.n_matrices)
        })
    }

    /// What output that was made with it depends on.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (name, entry) in &self.entries {
            hash.update(name.as_bytes());
            for value in &entry.values {
                hash.update(value.to_le_bytes());
            }
        }
        hash.finalize()
            .iter()
            .fold(String::new(), |mut text, byte| {
                let _ = write!(text, "{byte:02x}");
                text
            })
    }

    fn refuse(&self, problem: String) -> CheckpointError {
        CheckpointError::Index {
            file: self.file.clone(),
            problem: format!("this is no importance matrix that can be used: {problem}"),
        }
    }
}

/// The next `n` bytes.
fn take<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(n)?;
    *rest = tail;
    Some(head)
}

/// The next number, which is not negative.
fn size(rest: &mut &[u8]) -> Option<usize> {
    let word = take(rest, 4)?.as_chunks::<4>().0.first()?;
    usize::try_from(i32::from_le_bytes(*word)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn means(entries: &[(&str, i32, &[f32])], tail: bool) -> Vec<u8> {
        let mut bytes = (entries.len() as i32).to_le_bytes().to_vec();
        for (name, n_calls, values) in entries {
            bytes.extend((name.len() as i32).to_le_bytes());
            bytes.extend(name.as_bytes());
            bytes.extend(n_calls.to_le_bytes());
            bytes.extend((values.len() as i32).to_le_bytes());
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        if tail {
            bytes.extend(7i32.to_le_bytes());
            bytes.extend(4i32.to_le_bytes());
            bytes.extend(b"text");
        }
        bytes
    }

    #[test]
    fn the_older_form_is_divided_by_its_calls() {
        let bytes = means(
            &[("a.weight", 4, &[8.0, 2.0]), ("b.weight", 0, &[3.0])],
            true,
        );
        let read = Importance::from_means("m.dat", &bytes).unwrap();
        assert_eq!(read.of("a.weight", [1, 2]).unwrap(), Some(&[2.0, 0.5][..]));
        assert_eq!(read.of("b.weight", [1, 1]).unwrap(), Some(&[3.0][..]));
        assert_eq!(read.of("c.weight", [1, 1]).unwrap(), None);
        assert_eq!(
            (read.n_chunks(), read.datasets()),
            (7, &["text".to_owned()][..])
        );
        let short = Importance::from_means("m.dat", &means(&[("a", 1, &[1.0])], false)).unwrap();
        assert_eq!((short.n_chunks(), short.n_entries()), (0, 1));
        let text = read.of("a.weight", [2, 2]).unwrap_err().to_string();
        assert!(text.contains("has 2 numbers, expected 2 x 2"), "{text}");
    }

    #[test]
    fn what_is_cut_off_is_refused_wherever_it_is_cut() {
        let bytes = means(&[("a.weight", 4, &[8.0, 2.0])], true);
        let whole_entries = means(&[("a.weight", 4, &[8.0, 2.0])], false).len();
        for n in (0..bytes.len()).filter(|n| *n != whole_entries) {
            let cut = Importance::from_means("m.dat", &bytes[..n]);
            // The counts behind the entries may be left out, and nothing else.
            assert!(
                cut.is_err() || n < whole_entries + 4 && n > whole_entries,
                "{n}"
            );
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(Importance::from_means("m.dat", &longer).is_err());
        assert!(Importance::from_means("m.dat", &[0xff; 64]).is_err());
    }

    #[test]
    fn another_matrix_is_another_digest() {
        let of = |value| {
            let bytes = means(&[("a", 1, &[value])], false);
            Importance::from_means("m", &bytes).unwrap().digest()
        };
        assert_eq!(of(1.0), of(1.0));
        assert_ne!(of(1.0), of(1.5));
    }
}
