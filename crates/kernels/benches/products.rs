//! Speed of the products: one token times a matrix beyond the caches (decoding), and many tokens times a set of experts (prompts).
//!
//!     cargo bench -p cadre-kernels --bench products
//!     cargo bench -p cadre-kernels --bench products -- decode    # names that contain it
//!
//! Decoding is bound by bytes: the last lines give each format's bytes per second as a share of the bandwidth that is
//! measured first, with the same threads. Prompts are bound by arithmetic: one item is one operation, two per weight and token.
#![expect(clippy::unwrap_used, reason = "a program for people")]

mod figures;

use std::time::Instant;

use cadre_kernels::{Format, Grouped, MatmulScratch, Matrix};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use figures::{COMPUTE, note, numbers};

const FORMATS: [&str; 8] = [
    "f32", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "mxfp4",
];
const HIDDEN: usize = 2048;
/// Rows of the decoding matrix: at 4 bits it still is several times the last-level cache of common machines.
const ROWS: usize = 96 << 10;
/// Rows that are quantised; the others repeat them, because quantising takes long and values do not matter.
const DIFFERENT: usize = 64;
const EXPERTS: usize = 32;
const WIDTH: usize = 768;

fn main() {
    figures::run();
}

fn matrix(format: &str, n_out: usize, n_in: usize) -> Matrix {
    let format = Format::from_name(format).unwrap();
    let bytes = format.encode(&numbers(DIFFERENT * n_in)).unwrap();
    let bytes = bytes.repeat(n_out / DIFFERENT);
    COMPUTE.interleaved(&Matrix::new(format, n_out, n_in, bytes.into()).unwrap())
}

/// One token.
#[divan::bench(args = FORMATS, sample_count = 20, sample_size = 1)]
fn decode(bencher: Bencher<'_, '_>, format: &str) {
    let weights = matrix(format, ROWS, HIDDEN);
    let x = numbers(HIDDEN);
    let mut y = vec![0.0; ROWS];
    let mut scratch = MatmulScratch::default();
    let n_bytes = weights.n_bytes();
    let name = format!("decode {format}");
    bencher.counter(BytesCount::new(n_bytes)).bench_local(|| {
        let start = Instant::now();
        COMPUTE.matmul(&weights, &x, &mut y, &mut scratch);
        note(&name, n_bytes as f64, start.elapsed().as_secs_f64());
    });
}

/// Tokens sorted by expert, the same number for each.
fn prompt(bencher: Bencher<'_, '_>, format: &str, tokens: usize) {
    let all = matrix(format, EXPERTS * WIDTH, HIDDEN);
    let experts: Vec<_> = (0..EXPERTS)
        .map(|expert| all.rows(expert * WIDTH..(expert + 1) * WIDTH))
        .collect();
    let offsets: Vec<_> = (0..=EXPERTS).map(|expert| expert * tokens).collect();
    let x = numbers(EXPERTS * tokens * HIDDEN);
    let mut y = vec![0.0; EXPERTS * tokens * WIDTH];
    let mut scratch = MatmulScratch::default();
    let operations = 2 * EXPERTS * tokens * HIDDEN * WIDTH;
    let name = format!("prompt {format} x {tokens}");
    bencher
        .counter(ItemsCount::new(operations))
        .bench_local(|| {
            let start = Instant::now();
            let rows = Grouped {
                offsets: &offsets,
                x: &x,
                index: None,
                is_same: false,
            };
            COMPUTE.grouped_matmul(rows, &|g| &experts[g], &mut y, &mut scratch);
            note(&name, operations as f64, start.elapsed().as_secs_f64());
        });
}

#[divan::bench(args = FORMATS, sample_count = 10, sample_size = 1)]
fn prompt_16(bencher: Bencher<'_, '_>, format: &str) {
    prompt(bencher, format, 16);
}

#[divan::bench(args = FORMATS, sample_count = 10, sample_size = 1)]
fn prompt_32(bencher: Bencher<'_, '_>, format: &str) {
    prompt(bencher, format, 32);
}

#[divan::bench(args = FORMATS, sample_count = 10, sample_size = 1)]
fn prompt_64(bencher: Bencher<'_, '_>, format: &str) {
    prompt(bencher, format, 64);
}

/// Weights into blocks, on one thread.
#[divan::bench(args = &FORMATS[1..], sample_count = 10, sample_size = 1)]
fn quantise(bencher: Bencher<'_, '_>, format: &str) {
    let format = Format::from_name(format).unwrap();
    let values = numbers(64 * HIDDEN);
    let mut out = vec![0; format.n_bytes(values.len()).unwrap()];
    bencher
        .counter(BytesCount::new(size_of_val(values.as_slice())))
        .bench_local(|| assert!(format.encode_into(&values, &mut out)));
}
