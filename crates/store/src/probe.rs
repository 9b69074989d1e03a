//! A self-test of a disk: how fast a file can be read in random pieces, how many at a time it takes, and how large they
//! should be.

use std::time::{Duration, Instant};

use bytes::BytesMut;

use crate::error::{Result, StoreError};
use crate::reader::{ALIGN, Completion, LARGE_PAGE, OpenFile, Reader, Request, aligned};

/// Random pieces are read; this is where the sequence of their places begins, so that every run reads the same.
const SEED: u64 = 0x5eed;

/// Reads of one small piece, of which the median counts.
const N_SMALL: usize = 15;

/// What is tried. The default takes up to five seconds.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Requests at a time, ascending; larger ones are left out once they gain nothing.
    pub lanes: Vec<usize>,
    /// Bytes of a request, ascending, multiples of [`ALIGN`].
    pub request_bytes: Vec<usize>,
    /// How long each combination is read.
    pub time: Duration,
    /// When no further combination is begun; for disks that are slow to end what they have begun.
    pub most: Duration,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            lanes: vec![1, 2, 4, 8],
            request_bytes: vec![128 << 10, 512 << 10, 1 << 20, 4 << 20],
            time: Duration::from_millis(300),
            most: Duration::from_secs(8),
        }
    }
}

/// One combination.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Requests at a time.
    pub lanes: usize,
    /// Bytes of each.
    pub request_bytes: usize,
    /// What came in, per second.
    pub bytes_per_second: f64,
}

/// How fast a disk is.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskSpeed {
    /// At `lanes` and `request_bytes`.
    pub bytes_per_second: f64,
    /// The fewest requests at a time that reach that, within [`ENOUGH`].
    pub lanes: usize,
    /// The smallest requests that reach that with so many at a time.
    pub request_bytes: usize,
    /// How long one request of [`ALIGN`] bytes takes when nothing else is read.
    pub latency: Duration,
    /// Whether the system's cache was out of the way. If not, this may be the speed of memory.
    pub is_direct: bool,
    /// The reader that was used.
    pub reader: &'static str,
    /// Everything that was measured.
    pub points: Vec<Point>,
}

/// The share of the best that is as good as the best.
pub const ENOUGH: f64 = 0.95;

/// Measures reading `file` with readers that `reader_of` makes for a number of requests at a time.
///
/// Where the file is read through the system's cache, its pages are dropped first; the system need not do that.
///
/// # Errors
///
/// [`StoreError::Open`] if the file cannot be read, or has not even one piece.
pub fn measure(
    file: &OpenFile,
    plan: &Plan,
    mut reader_of: impl FnMut(usize) -> Box<dyn Reader>,
) -> Result<DiskSpeed> {
    let n_bytes = file.n_bytes();
    let mut places = Places {
        n_bytes,
        state: SEED,
    };
    let mut points = Vec::new();
    let start = Instant::now();
    let mut small = reader_of(1);
    let latency = latency(file, &mut *small, &mut places)?;
    let sizes = plan.request_bytes.iter();
    for &request_bytes in sizes.filter(|&&size| size as u64 <= n_bytes) {
        let mut before = 0.0;
        for &lanes in &plan.lanes {
            if !points.is_empty() && start.elapsed() > plan.most {
                break;
            }
            let mut reader = reader_of(lanes);
            let run = Run {
                lanes,
                request_bytes,
                time: plan.time,
            };
            let bytes_per_second = run.measure(file, &mut *reader, &mut places)?;
            points.push(Point {
                lanes,
                request_bytes,
                bytes_per_second,
            });
            if bytes_per_second * ENOUGH < before {
                break;
            }
            before = bytes_per_second;
        }
    }
    let chosen = choose(&points).ok_or_else(|| too_short(file))?;
    Ok(DiskSpeed {
        bytes_per_second: chosen.bytes_per_second,
        lanes: chosen.lanes,
        request_bytes: chosen.request_bytes,
        latency,
        is_direct: file.is_direct(),
        reader: small.name(),
        points,
    })
}

/// The combination with the least in flight among those that are as good as the best.
fn choose(points: &[Point]) -> Option<Point> {
    let rates = points.iter().map(|point| point.bytes_per_second);
    let best = rates.fold(0.0, f64::max);
    let good = points
        .iter()
        .filter(|point| point.bytes_per_second >= best * ENOUGH);
    good.min_by_key(|point| (point.lanes * point.request_bytes, point.lanes))
        .copied()
}

/// Where to read next: random multiples of [`ALIGN`], so that nothing can read ahead.
struct Places {
    n_bytes: u64,
    state: u64,
}

impl Places {
    /// Where a piece of `request_bytes` that the file has begins.
    fn next(&mut self, request_bytes: usize) -> u64 {
        // SplitMix64 (Steele, Lea and Flood 2014).
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let n_places = self.n_bytes.saturating_sub(request_bytes as u64) / ALIGN as u64 + 1;
        mixed % n_places * ALIGN as u64
    }
}

/// One combination and how long it is tried.
struct Run {
    lanes: usize,
    request_bytes: usize,
    time: Duration,
}

impl Run {
    /// Keeps `lanes` requests in flight; bytes per second, those in flight at the end and their time counted.
    fn measure(
        &self,
        file: &OpenFile,
        reader: &mut dyn Reader,
        places: &mut Places,
    ) -> Result<f64> {
        // As the store reads: into large pages, and into pages that are there already.
        let n_bytes = self.lanes * self.request_bytes;
        let mut memory = aligned(n_bytes.max(LARGE_PAGE));
        memory.fill(1);
        let start = Instant::now();
        for tag in 0..self.lanes {
            let piece = memory.split_to(self.request_bytes);
            reader.submit(request(file, tag as u64, piece, places));
        }
        let mut n_bytes = 0u64;
        while let Some(done) = reader.next(Duration::MAX) {
            n_bytes += finished(file, &done)?;
            if start.elapsed() < self.time {
                reader.submit(request(file, done.tag, done.memory, places));
            }
        }
        Ok(n_bytes as f64 / start.elapsed().as_secs_f64().max(1e-9))
    }
}

fn request(file: &OpenFile, tag: u64, memory: BytesMut, places: &mut Places) -> Request {
    let offset = places.next(memory.len());
    if !file.is_direct() {
        file.read_done(offset..offset + memory.len() as u64);
    }
    Request {
        tag,
        file: file.file().clone(),
        offset,
        memory,
    }
}

/// Bytes that were read.
fn finished(file: &OpenFile, done: &Completion) -> Result<u64> {
    match &done.result {
        Ok(n_bytes) => Ok(*n_bytes as u64),
        Err(error) => {
            let source = match error.raw_os_error() {
                Some(number) => std::io::Error::from_raw_os_error(number),
                None => error.kind().into(),
            };
            Err(failed(file, source))
        }
    }
}

fn failed(file: &OpenFile, source: std::io::Error) -> StoreError {
    StoreError::Open {
        action: "read",
        path: file.path().to_owned(),
        source,
    }
}

fn too_short(file: &OpenFile) -> StoreError {
    let why = format!("a file of {} bytes is too short for it", file.n_bytes());
    StoreError::Open {
        action: "measure the disk with",
        path: file.path().to_owned(),
        source: std::io::Error::other(why),
    }
}

/// The median time of one small read.
fn latency(file: &OpenFile, reader: &mut dyn Reader, places: &mut Places) -> Result<Duration> {
    let mut times = Vec::with_capacity(N_SMALL);
    let mut memory = aligned(ALIGN);
    for _ in 0..N_SMALL {
        let start = Instant::now();
        reader.submit(request(file, 0, memory, places));
        let done = reader
            .next(Duration::MAX)
            .expect("a request that was submitted ends");
        finished(file, &done)?;
        times.push(start.elapsed());
        memory = done.memory;
    }
    times.sort_unstable();
    Ok(times[N_SMALL / 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::{Fault, FaultyReader, ReaderKind, SyncReader, When};

    fn point(lanes: usize, request_bytes: usize, bytes_per_second: f64) -> Point {
        Point {
            lanes,
            request_bytes,
            bytes_per_second,
        }
    }

    fn quick() -> Plan {
        Plan {
            lanes: vec![1, 2],
            request_bytes: vec![8 << 10, 64 << 10, 1 << 30],
            time: Duration::from_millis(2),
            most: Duration::MAX,
        }
    }

    fn open(n_bytes: usize) -> OpenFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; n_bytes]).unwrap();
        OpenFile::open(file.path()).unwrap()
    }

    #[test]
    fn the_least_in_flight_is_chosen_among_the_good() {
        let points = [
            point(1, 100, 1.0),
            point(2, 100, 9.4),
            point(4, 100, 9.6),
            point(8, 100, 10.0),
            point(2, 200, 9.7),
            point(1, 400, 9.5),
        ];
        assert_eq!(choose(&points), Some(point(1, 400, 9.5)));
        assert_eq!(choose(&points[..5]), Some(point(2, 200, 9.7)));
        assert_eq!(choose(&points[..4]), Some(point(4, 100, 9.6)));
        assert_eq!(choose(&[]), None);
    }

    #[test]
    fn places_are_within_the_file() {
        let mut places = Places {
            n_bytes: 5 * 4096 + 9,
            state: 1,
        };
        let seen: std::collections::BTreeSet<u64> = (0..200).map(|_| places.next(8192)).collect();
        assert_eq!(Vec::from_iter(seen), [0, 4096, 8192, 12_288]);
        places.n_bytes = 3;
        assert_eq!(places.next(8192), 0);
    }

    #[test]
    fn a_file_is_measured_with_what_fits_into_it() {
        let file = open(1 << 20);
        let speed = measure(&file, &quick(), |lanes| {
            ReaderKind::Auto.open(lanes).unwrap()
        })
        .unwrap();
        assert!(speed.bytes_per_second > 0.0 && speed.latency > Duration::ZERO);
        assert!(speed.lanes <= 2 && speed.request_bytes <= 64 << 10);
        assert_eq!(speed.is_direct, file.is_direct());
        let hurried = Plan {
            most: Duration::ZERO,
            ..quick()
        };
        let speed = measure(&file, &hurried, |_| Box::new(SyncReader::default())).unwrap();
        assert_eq!(speed.points.len(), 1, "one at least");
        let error = measure(&open(100), &quick(), |_| Box::new(SyncReader::default())).unwrap_err();
        assert!(error.to_string().contains("measure the disk"), "{error}");
    }

    #[test]
    fn a_disk_that_fails_is_an_error_and_not_a_speed() {
        let broken = |_| -> Box<dyn Reader> {
            Box::new(FaultyReader::new(SyncReader::default()).with(When::Always, Fault::Refused))
        };
        assert!(measure(&open(1 << 20), &quick(), broken).is_err());
    }
}
