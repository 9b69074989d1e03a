//! What this machine can do: CPU features and measured memory bandwidth. Returns values, prints nothing.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::blocks::bytes_of;
use crate::compute::Compute;
use crate::isa::{self, Isa};
use crate::pool::ThreadPool;

/// What the CPU offers and what Cadre takes from it.
#[derive(Clone, Debug)]
pub struct CpuReport {
    /// The target architecture of this build, such as `x86_64`.
    pub arch: &'static str,
    /// The kernels that are used unless told otherwise.
    pub chosen: Isa,
    /// Every set of kernels that can run here, worst first.
    pub available: Vec<Isa>,
    /// Features that matter to the kernels and whether the CPU has them.
    pub features: Vec<(&'static str, bool)>,
    /// Hardware threads that the system grants this process.
    pub n_threads: usize,
}

/// Describes the CPU.
pub fn cpu() -> CpuReport {
    CpuReport {
        arch: std::env::consts::ARCH,
        chosen: Isa::detect(),
        available: Isa::available(),
        features: isa::features(),
        n_threads: default_threads(),
    }
}

/// Hardware threads that the system grants this process, at least 1.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Processor time that all threads of this process have taken so far; `None` where the system does not say.
#[must_use]
pub fn processor_time() -> Option<Duration> {
    #[cfg(unix)]
    {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: fills the one value that it is given.
        let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
        let seconds = u64::try_from(time.tv_sec).ok()?;
        (failed == 0).then(|| Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0)))
    }
    #[cfg(not(unix))]
    None
}

/// A measurement of reading memory in order.
#[derive(Clone, Copy, Debug)]
pub struct Bandwidth {
    /// Threads that read.
    pub n_threads: usize,
    /// Bytes read in each pass.
    pub n_bytes: usize,
    /// The best pass, in bytes per second.
    pub best: f64,
    /// The median pass, in bytes per second.
    pub median: f64,
}

/// Measures how fast `pool` reads `n_bytes` of memory, over `n_passes` (at least one).
///
/// Use several times the last-level cache, or the cache is measured; 256 MiB takes about 10 ms per pass.
pub fn bandwidth(pool: &ThreadPool, n_bytes: usize, n_passes: usize) -> Bandwidth {
    // Ones, not zeros: pages of zeros may never be given memory.
    let words = vec![1u64; (n_bytes / size_of::<u64>()).max(1)];
    let mut rates: Vec<f64> = (0..n_passes.max(1))
        .map(|_| reading(pool, &[bytes_of(&words)]))
        .collect();
    rates.sort_by(f64::total_cmp);
    Bandwidth {
        n_threads: pool.n_threads(),
        n_bytes: size_of_val(words.as_slice()),
        best: rates[rates.len() - 1],
        median: rates[rates.len() / 2],
    }
}

/// How fast `pool` reads `pieces` of memory once, in bytes per second; the more they are beyond the last-level cache, the
/// better the measurement. Memory is not equally fast everywhere: this is the speed of these pieces.
pub fn reading(pool: &ThreadPool, pieces: &[&[u8]]) -> f64 {
    const BYTES_PER_TASK: usize = 1 << 19;
    let tasks: Vec<&[u8]> = pieces
        .iter()
        .flat_map(|piece| piece.chunks(BYTES_PER_TASK))
        .collect();
    let total = AtomicU64::new(0);
    let start = Instant::now();
    pool.run(tasks.len(), &|i| {
        // SAFETY: any bytes are numbers.
        let (_, words, _) = unsafe { tasks[i].align_to::<u64>() };
        total.fetch_add(sum(words), Ordering::Relaxed);
    });
    let seconds = start.elapsed().as_secs_f64();
    black_box(total.into_inner());
    let n_bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    n_bytes as f64 / seconds.max(1e-9)
}

/// What the multipliers do at their best, in operations per second (a product and a sum are two), on all threads of
/// `compute`.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Of 8-bit integers; absent where the kernels have no such instruction.
    pub int8: Option<f64>,
    /// Of bf16.
    pub bf16: Option<f64>,
}

/// Measures [`Peaks`]; takes some 40 ms.
pub fn peaks(compute: &Compute) -> Peaks {
    const ROUNDS: u64 = 1 << 20;
    let table = compute.kernels().table();
    let n_threads = compute.pool().n_threads();
    let measure = |run: unsafe fn(u64) -> u64| {
        let rate = || {
            let total = AtomicU64::new(0);
            let start = Instant::now();
            compute.pool().run(n_threads * 4, &|_| {
                // SAFETY: the kernels prove their instruction set.
                total.fetch_add(unsafe { run(ROUNDS / 8) }, Ordering::Relaxed);
            });
            total.into_inner() as f64 / start.elapsed().as_secs_f64().max(1e-9)
        };
        (0..3).map(|_| rate()).fold(0.0, f64::max)
    };
    Peaks {
        int8: table.peak_int8.map(measure),
        bf16: table.peak_bf16.map(measure),
    }
}

/// Eight independent sums, so that the loads and not the additions set the pace.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 8];
    let chunks = words.chunks_exact(8);
    let tail = chunks
        .remainder()
        .iter()
        .fold(0u64, |s, w| s.wrapping_add(*w));
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().fold(tail, |s, lane| s.wrapping_add(*lane))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_agrees_with_the_kernels() {
        let report = cpu();
        assert_eq!(report.chosen, crate::Kernels::detect().isa());
        assert!(report.available.contains(&Isa::Scalar) && report.n_threads >= 1);
    }

    #[test]
    fn processor_time_grows_with_work() {
        let Some(before) = processor_time() else {
            return;
        };
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50) {
            black_box(start);
        }
        assert!(processor_time().unwrap() > before);
    }

    #[test]
    fn peaks_are_measured_where_there_are_kernels() {
        for isa in Isa::available() {
            let kernels = crate::Kernels::for_isa(isa).unwrap();
            let peaks = peaks(&Compute::new(kernels, 2));
            let int8 = matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::NeonDotprod);
            assert_eq!(peaks.int8.is_some(), int8, "{isa}");
            assert_eq!(peaks.bf16.is_some(), isa == Isa::Avx512Bf16, "{isa}");
            assert!(peaks.int8.unwrap_or(1e9) > 1e8 && peaks.bf16.unwrap_or(1e9) > 1e8);
        }
    }

    #[test]
    fn a_bandwidth_is_measured() {
        let measured = bandwidth(&ThreadPool::new(2), 1 << 20, 3);
        assert!(measured.best >= measured.median && measured.median > 0.0);
        assert_eq!((measured.n_bytes, measured.n_threads), (1 << 20, 2));
    }
}
