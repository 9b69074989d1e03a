//! Measurements that outlive the process: a line for each in a file, so that a search that was stopped goes on.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Error, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Formats, Trial};
use crate::error::{ReshapeError, Result};

/// The formats of all experts, one after the other: so many times each.
type Runs = Vec<(usize, usize)>;

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    runs: Runs,
    /// The bits of the number, because every one of them counts.
    nll: u64,
}

/// Measures what is not in a file yet, and writes it there. The search asks in the same order every time, so that it comes to
/// the same end whenever it was stopped.
pub struct Remembered<'a> {
    inner: &'a mut dyn Trial,
    path: PathBuf,
    file: File,
    known: HashMap<Runs, f64>,
}

impl<'a> Remembered<'a> {
    /// What is measured by `inner`, remembered in the file at `path`, of which no other process may make use meanwhile.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn open(path: &Path, inner: &'a mut dyn Trial) -> Result<Self> {
        let io = |source| ReshapeError::Measurements {
            path: path.to_owned(),
            source,
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(io)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(io)?;
        let (mut known, mut end) = (HashMap::new(), 0);
        // A line that was torn by the end of the process does not count, nor what follows it.
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let Ok(Line { runs, nll }) = serde_json::from_slice(line) else {
                break;
            };
            if !line.ends_with(b"\n") {
                break;
            }
            known.insert(runs, f64::from_bits(nll));
            end += line.len() as u64;
        }
        file.set_len(end).map_err(io)?;
        file.seek(SeekFrom::Start(end)).map_err(io)?;
        Ok(Self {
            inner,
            path: path.to_owned(),
            file,
            known,
        })
    }

    /// Measurements that were there already.
    #[must_use]
    pub fn n_known(&self) -> usize {
        self.known.len()
    }
}

impl Trial for Remembered<'_> {
    fn nll(&mut self, formats: &Formats) -> Result<f64> {
        let runs = runs(formats);
        if let Some(nll) = self.known.get(&runs) {
            return Ok(*nll);
        }
        let nll = self.inner.nll(formats)?;
        let line = Line {
            runs,
            nll: nll.to_bits(),
        };
        let text = serde_json::to_string(&line).map_err(Error::from);
        let written = text.and_then(|text| self.file.write_all((text + "\n").as_bytes()));
        written.map_err(|source| ReshapeError::Measurements {
            path: self.path.clone(),
            source,
        })?;
        self.known.insert(line.runs, nll);
        Ok(nll)
    }

    fn change(&mut self, layer: usize, expert: usize, formats: [usize; 2]) -> Result<f64> {
        self.inner.change(layer, expert, formats)
    }
}

impl std::fmt::Debug for Remembered<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remembered")
            .field("path", &self.path)
            .field("n_known", &self.known.len())
            .finish_non_exhaustive()
    }
}

fn runs(formats: &Formats) -> Runs {
    let mut runs: Runs = Vec::new();
    for format in formats.iter().flatten() {
        match runs.last_mut() {
            Some((known, n)) if known == format => *n += 1,
            _ => runs.push((*format, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use cadre_routing::plan::{Groups, ModelShape};

    use super::*;
    use crate::bits::{BitsOptions, Chosen, Sensitivity, Unit, choose};

    /// Fails, as a process that is stopped, after some measurements.
    struct Mortal {
        left: usize,
        n: usize,
    }

    impl Trial for Mortal {
        fn nll(&mut self, formats: &Formats) -> Result<f64> {
            self.left = self.left.checked_sub(1).ok_or(ReshapeError::Stopped)?;
            self.n += 1;
            let all = formats.iter().flatten().enumerate();
            // Thirds, whose last bit a decimal number would lose.
            Ok(1.0 + all.map(|(at, f)| (at * f) as f64 / 3000.0).sum::<f64>())
        }

        fn change(&mut self, _: usize, _: usize, _: [usize; 2]) -> Result<f64> {
            Ok(1.0)
        }
    }

    fn search(path: &Path, left: usize) -> (Result<Chosen>, usize) {
        let shape = ModelShape {
            digest: "d".to_owned(),
            architecture: "a".to_owned(),
            layers: vec![(0, 8), (1, 8)],
            top_k: 1,
            n_null: 0,
            groups: Groups::NONE,
            same_picks: false,
        };
        let options = BitsOptions {
            max_increase: 0.05,
            unit: Unit::Expert,
            sensitivity: Sensitivity::Measured,
        };
        let mut trial = Mortal { left, n: 0 };
        let mut remembered = Remembered::open(path, &mut trial).unwrap();
        let chosen = choose(&shape, 3, &options, &mut remembered);
        (chosen, trial.n)
    }

    #[test]
    fn a_search_that_was_stopped_comes_to_the_same_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (whole, n_whole) = search(&path("whole"), 1000);
        let whole = whole.unwrap();
        let mut n_all = 0;
        for stop in [1, 4, 7] {
            let (stopped, n) = search(&path("stopped"), stop);
            assert!(matches!(stopped, Err(ReshapeError::Stopped)));
            n_all += n;
            // The process dies while it writes a line.
            let mut file = OpenOptions::new()
                .append(true)
                .open(path("stopped"))
                .unwrap();
            file.write_all(b"{\"runs\":[[0,1").unwrap();
        }
        let (last, n) = search(&path("stopped"), 1000);
        assert_eq!(last.unwrap(), whole);
        // Nothing is measured twice.
        assert_eq!(n_all + n, n_whole);
        let files = ["whole", "stopped"].map(|name| std::fs::read(path(name)).unwrap());
        assert!(files[0] == files[1]);
    }
}
