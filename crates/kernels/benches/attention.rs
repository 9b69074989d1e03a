//! Speed of attention at the shape of Qwen3-MoE: one token over a long context (decoding), and many (prompts).
//!
//!     cargo bench -p cadre-kernels --bench attention
//!     cargo bench -p cadre-kernels --bench attention -- decode    # names that contain it
//!
//! Decoding is bound by the bytes of keys and values: the last lines give bytes per second as a share of the bandwidth that is
//! measured first, with the same threads. Prompts are bound by arithmetic: one item is one operation, two per number of a key
//! and of a value that a query sees.
#![expect(clippy::unwrap_used, reason = "a program for people")]

mod figures;

use std::time::Instant;

use cadre_kernels::{
    Attend, AttendScratch, Heads, HeadsMut, KvFormat, KvFormats, KvLayer, KvSizes, Span,
};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use figures::{COMPUTE, note, numbers};

const FORMATS: [&str; 3] = ["f32", "f16", "q8_0"];
const HEADS: usize = 32;
const KV_HEADS: usize = 4;
const DIM: usize = 128;
/// Positions of a long context.
const CONTEXT: usize = 4096;
/// Layers that are read in turns: together several times the last-level cache of common machines, in any format.
const LAYERS: usize = 32;
/// Tokens of a prompt that are read together.
const CHUNK: usize = 512;

fn main() {
    figures::run();
}

fn format(name: &str) -> KvFormat {
    let found = KvFormat::ALL.into_iter().find(|f| f.name() == name);
    found.unwrap()
}

/// A layer whose cache is full; different positions repeat, because their values do not matter.
fn layer(format: KvFormat) -> KvLayer {
    let sizes = KvSizes {
        n_heads: KV_HEADS,
        key_dim: DIM,
        value_dim: DIM,
    };
    let formats = KvFormats {
        keys: format,
        values: format,
    };
    let mut layer = KvLayer::new(COMPUTE.kernels(), sizes, formats, CONTEXT);
    let noise = numbers(DIM * 67);
    let mut rows = noise.chunks_exact(DIM).cycle();
    for position in 0..CONTEXT {
        for head in 0..KV_HEADS {
            let (key, value) = (rows.next().unwrap(), rows.next().unwrap());
            layer.store(head, position, key, value);
        }
    }
    layer
}

/// Queries of some tokens, and room for what they get.
struct Tokens {
    n: usize,
    queries: Vec<f32>,
    out: Vec<f32>,
    scratch: AttendScratch,
}

impl Tokens {
    fn new(n: usize) -> Self {
        Self {
            n,
            queries: numbers(n * HEADS * DIM),
            out: vec![0.0; n * HEADS * DIM],
            scratch: AttendScratch::default(),
        }
    }

    /// Attention of the tokens from `position` on.
    fn attend(&mut self, kv: &KvLayer, position: usize) {
        let attend = Attend {
            n_heads: HEADS,
            on_keys: Heads {
                values: &self.queries,
                per_token: HEADS * DIM,
                per_head: DIM,
            },
            on_values: None,
            scale: 1.0 / (DIM as f32).sqrt(),
            sinks: None,
            window: None,
        };
        let span = |_| Span {
            kv,
            position,
            first: 0,
            n_tokens: self.n,
        };
        let out = HeadsMut {
            values: &mut self.out,
            per_token: HEADS * DIM,
            per_head: DIM,
        };
        COMPUTE.attend(&attend, 1, &span, out, &mut self.scratch);
    }
}

/// One token at the end of a long context, in every layer.
#[divan::bench(args = FORMATS, sample_count = 20, sample_size = 1)]
fn decode(bencher: Bencher<'_, '_>, name: &str) {
    let layers: Vec<_> = (0..LAYERS).map(|_| layer(format(name))).collect();
    let n_bytes = layers.iter().map(KvLayer::n_bytes).sum::<usize>();
    let mut token = Tokens::new(1);
    let name = format!("decode {name}");
    bencher.counter(BytesCount::new(n_bytes)).bench_local(|| {
        let start = Instant::now();
        for layer in &layers {
            token.attend(layer, CONTEXT - 1);
        }
        note(&name, n_bytes as f64, start.elapsed().as_secs_f64());
    });
}

/// A piece of a prompt from `position` on.
fn prompt(bencher: Bencher<'_, '_>, name: &str, position: usize) {
    let layer = layer(format(name));
    let mut tokens = Tokens::new(CHUNK);
    let seen: usize = (position + 1..=position + CHUNK).sum();
    let operations = 2 * 2 * seen * HEADS * DIM;
    let name = format!("prompt {name} at {position}");
    bencher
        .counter(ItemsCount::new(operations))
        .bench_local(|| {
            let start = Instant::now();
            tokens.attend(&layer, position);
            note(&name, operations as f64, start.elapsed().as_secs_f64());
        });
}

#[divan::bench(args = FORMATS, sample_count = 20, sample_size = 1)]
fn prompt_start(bencher: Bencher<'_, '_>, name: &str) {
    prompt(bencher, name, 0);
}

#[divan::bench(args = FORMATS, sample_count = 10, sample_size = 1)]
fn prompt_end(bencher: Bencher<'_, '_>, name: &str) {
    prompt(bencher, name, CONTEXT - CHUNK);
}
