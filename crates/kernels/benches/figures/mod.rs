//! What the benchmarks share: the kernels, reading memory as the measure, and the figures of the last lines.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "programs for people"
)]

use std::sync::{LazyLock, Mutex};

use cadre_kernels::doctor::{bandwidth, default_threads};
use cadre_kernels::{Compute, Kernels};

/// Bytes of a pass over memory.
const PASS: usize = 256 << 20;

/// One figure for the last lines.
struct Figure {
    name: String,
    amount: f64,
    seconds: Vec<f64>,
}

/// The best kernels, with all threads.
pub(crate) static COMPUTE: LazyLock<Compute> =
    LazyLock::new(|| Compute::new(Kernels::detect(), default_threads()));
static FIGURES: Mutex<Vec<Figure>> = Mutex::new(Vec::new());

/// Runs the benchmarks of the program. Names that start with `decode` have bytes as their amount and are compared with
/// reading memory, measured before and after; the amount of the others is operations.
pub(crate) fn run() {
    let pool = COMPUTE.pool();
    let rate = bandwidth(pool, PASS, 7).median;
    println!(
        "kernels {}, {} threads, reading {:.1} GB/s",
        COMPUTE.kernels().isa().name(),
        pool.n_threads(),
        rate / 1e9
    );
    divan::main();
    let rate = f64::midpoint(rate, bandwidth(pool, PASS, 7).median);
    for figure in FIGURES.lock().unwrap().iter_mut() {
        figure.seconds.sort_by(f64::total_cmp);
        let median = figure.seconds[figure.seconds.len() / 2];
        let speed = figure.amount / median;
        if figure.name.starts_with("decode") {
            println!(
                "{:<24} {:7.1} GB/s  {:4.0} % of reading",
                figure.name,
                speed / 1e9,
                100.0 * speed / rate
            );
        } else {
            println!("{:<24} {:7.1} GOP/s", figure.name, speed / 1e9);
        }
    }
}

/// Remembers how long `amount` took, for the last lines.
pub(crate) fn note(name: &str, amount: f64, seconds: f64) {
    let mut figures = FIGURES.lock().unwrap();
    let at = figures.iter().position(|figure| figure.name == name);
    let at = at.unwrap_or_else(|| {
        figures.push(Figure {
            name: name.to_owned(),
            amount,
            seconds: Vec::new(),
        });
        figures.len() - 1
    });
    figures[at].seconds.push(seconds);
}

/// Numbers between -1 and 1 without a pattern.
pub(crate) fn numbers(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    (0..n)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}
