//! Speed of the bf16 products of training, as a share of what the multipliers do at their best.
//!
//!     cargo bench -p cadre-kernels --bench training
//!
//! Sizes are those of `recipes/bench-65m.toml`: per expert 512 rows, hidden size 512, width 256, and the output head. `products` multiplies
//! what is packed, `whole` packs first. The peak is measured before and after, and the better one counts: a share below
//! it may be a neighbour's doing, a share above it is not possible. One thread, then all of rayon's.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program for people"
)]

use std::time::Instant;

use cadre_kernels::bf16_gemm::{Bf16Gemm, Left, Panels, Rows};
use cadre_kernels::doctor::peaks;
use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};
use cadre_kernels::{Compute, Kernels};

/// Runs of which the best counts.
const RUNS: usize = 40;

struct Case {
    name: &'static str,
    sizes: [usize; 3],
    /// Whether the left operand and the right one are transposes of what lies in memory.
    turned: [bool; 2],
}

const CASES: [Case; 8] = [
    Case {
        name: "gate_up: x w^T",
        sizes: [512, 512, 512],
        turned: [false, true],
    },
    Case {
        name: "down: h w^T",
        sizes: [512, 512, 256],
        turned: [false, true],
    },
    Case {
        name: "dh = dy w",
        sizes: [512, 256, 512],
        turned: [false, false],
    },
    Case {
        name: "dx = dg w",
        sizes: [512, 512, 512],
        turned: [false, false],
    },
    Case {
        name: "dw gate_up = dg^T x",
        sizes: [512, 512, 512],
        turned: [true, false],
    },
    Case {
        name: "dw down = dy^T h",
        sizes: [512, 256, 512],
        turned: [true, false],
    },
    Case {
        name: "logits = x w^T",
        sizes: [512, 8192, 512],
        turned: [false, true],
    },
    Case {
        name: "dw head = dl^T x",
        sizes: [8192, 512, 512],
        turned: [true, false],
    },
];

/// The best of some runs, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    let time = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..RUNS).map(|_| time(&mut run)).fold(f64::MAX, f64::min)
}

fn mat(data: &[f32], rows: usize, cols: usize, turned: bool) -> Mat<'_> {
    match turned {
        true => Mat::new(data, cols, rows).t(),
        false => Mat::new(data, rows, cols),
    }
}

fn main() {
    let Some(bf16) = Bf16Gemm::native() else {
        println!("this processor has no products of bf16");
        return;
    };
    let all = rayon::current_num_threads();
    for threads in [1, all] {
        let compute = Compute::new(Kernels::detect(), threads);
        let peak = || peaks(&compute).bf16.unwrap();
        let mut rows = Vec::new();
        let mut top = peak();
        for case in &CASES {
            rows.push((case.name, measure(bf16, case, threads)));
            top = top.max(peak());
        }
        println!("{threads} thread(s), peak {:.0} GFLOP/s of bf16", top / 1e9);
        println!("{:24} {:>18} {:>18} {:>12}", "", "products", "whole", "f32");
        for (name, [products, whole, f32]) in rows {
            let share = |speed: f64| format!("{:.0} ({:.0} %)", speed / 1e9, 100.0 * speed / top);
            println!(
                "{name:24} {:>18} {:>18} {:>12.0}",
                share(products),
                share(whole),
                f32 / 1e9
            );
        }
    }
}

/// Operations per second of the product alone, with packing, and in f32.
fn measure(bf16: Bf16Gemm, case: &Case, threads: usize) -> [f64; 3] {
    let [m, n, k] = case.sizes;
    let (a, b) = (vec![0.5; m * k], vec![0.25; k * n]);
    let (a, b) = (mat(&a, m, k, case.turned[0]), mat(&b, k, n, case.turned[1]));
    let mut c = vec![0.0; m * n];
    let (mut left, mut turned, mut right) = (Rows::default(), Panels::default(), Panels::default());
    bf16.panels(&mut right, b, None, threads);
    let left = if case.turned[0] {
        bf16.panels(&mut turned, a.t(), None, threads);
        Left::transposed(&turned)
    } else {
        bf16.rows(&mut left, a, None, threads);
        Left::rows(&left)
    };
    let products =
        best(|| bf16.multiply(MatMut::new(&mut c, m, n), Write::Set, left, &right, threads));
    let (mut rows, mut turned, mut right) = (Rows::default(), Panels::default(), Panels::default());
    let whole = best(|| {
        bf16.panels(&mut right, b, None, threads);
        let left = if case.turned[0] {
            bf16.panels(&mut turned, a.t(), None, threads);
            Left::transposed(&turned)
        } else {
            bf16.rows(&mut rows, a, None, threads);
            Left::rows(&rows)
        };
        bf16.multiply(MatMut::new(&mut c, m, n), Write::Set, left, &right, threads);
    });
    let single = best(|| gemm(MatMut::new(&mut c, m, n), Write::Set, 1.0, a, b, threads));
    [products, whole, single].map(|seconds| (2 * m * n * k) as f64 / seconds)
}
