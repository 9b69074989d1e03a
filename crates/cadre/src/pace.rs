//! How fast this machine multiplies: what bounds prompts, and models so small that memory does not.

use std::time::Instant;

use cadre_checkpoint::{Dtype, ModelConfig, ModelSizes, tensor_specs};
use cadre_engine::SessionOptions;
use cadre_kernels::doctor::default_threads;
use cadre_kernels::{Compute, Kernels, MatmulScratch, Matrix};

/// A matrix that caches hold in every format but f32.
const ROWS: usize = 512;
const COLS: usize = 1024;
/// Measurements of which the best counts.
const N_BEST: usize = 5;
/// Seconds that one measurement takes at least.
const LONG_ENOUGH: f64 = 2e-3;

/// Measured speeds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pace {
    /// Multiplications per second with weights of one token, weights in the cache.
    one: f64,
    /// The same with as many tokens as a prompt is read by.
    many: f64,
    /// The same with as many as one of the experts gets of these.
    per_expert: f64,
    /// Seconds that any product takes, however small.
    product: f64,
}

/// The work of one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Work {
    /// Multiplications with weights of experts.
    pub(crate) experts: u64,
    /// Multiplications with other weights, the output head among them.
    pub(crate) rest: u64,
    /// Those of the output head, which a prompt needs once.
    pub(crate) head: u64,
    /// Products of matrices.
    pub(crate) n_products: u64,
}

impl Work {
    /// Of a model. Products of a router, of norms and of attention itself are left out: they are small.
    pub(crate) fn new(config: &ModelConfig, sizes: &ModelSizes) -> Self {
        let parameters = sizes.parameters;
        let picked: usize = (0..config.n_layers)
            .map(|layer| config.picks_in(layer))
            .sum();
        let experts = parameters.one_expert * picked as u64;
        let n_products = tensor_specs(config)
            .iter()
            .filter(|(name, shape)| shape.len() > 1 && !name.contains(".mlp.experts."))
            .count();
        Self {
            experts,
            rest: parameters.read_per_token.saturating_sub(experts),
            head: (config.hidden_size * config.vocab_size) as u64,
            // Experts of a layer are multiplied together: gate, up and down.
            n_products: (n_products + 3 * config.moe.layers.len()) as u64,
        }
    }
}

impl Pace {
    /// Measures products in `format`, or in Q8_0 where that cannot be written. Takes some hundredths of a second.
    pub(crate) fn measure(config: &ModelConfig, format: Dtype) -> Self {
        let compute = Compute::new(Kernels::detect(), default_threads());
        let chunk = SessionOptions::default().chunk;
        let moe = &config.moe;
        let share = (chunk * moe.top_k.min(moe.n_experts)).checked_div(moe.n_experts);
        let values: Vec<f32> = (0..ROWS * COLS).map(|i| (i % 17) as f32 - 8.0).collect();
        let plain = Matrix::from_f32(ROWS, COLS, values);
        let matrix = plain.and_then(|plain| {
            let format = if format.can_encode() {
                format
            } else {
                Dtype::Q8_0
            };
            plain.to_format(format)
        });
        let Ok(matrix) = matrix else {
            return Self {
                one: f64::INFINITY,
                many: f64::INFINITY,
                per_expert: f64::INFINITY,
                product: 0.0,
            };
        };
        let rate = |n_tokens: usize| {
            (ROWS * COLS * n_tokens) as f64 / seconds(&compute, &matrix, n_tokens)
        };
        Self {
            one: rate(1),
            many: rate(chunk),
            per_expert: rate(share.unwrap_or(chunk).clamp(1, chunk)),
            product: seconds(&compute, &matrix.rows(0..1), 1),
        }
    }

    /// Seconds that decoding a token takes at least, if `reading` its bytes from memory takes that long.
    pub(crate) fn decode(&self, work: Work, reading: f64) -> f64 {
        let multiplying = (work.experts + work.rest) as f64 / self.one;
        multiplying.max(reading) + work.n_products as f64 * self.product
    }

    /// Seconds that a token of a long prompt takes at least.
    pub(crate) fn prompt(&self, work: Work) -> f64 {
        let rest = work.rest.saturating_sub(work.head) as f64;
        work.experts as f64 / self.per_expert + rest / self.many
    }
}

/// The best time of one product with `n_tokens` rows.
fn seconds(compute: &Compute, matrix: &Matrix, n_tokens: usize) -> f64 {
    let x = vec![0.5; n_tokens * matrix.n_in()];
    let mut y = vec![0.0; n_tokens * matrix.n_out()];
    let mut scratch = MatmulScratch::with_capacity(x.len());
    let mut best = f64::INFINITY;
    for _ in 0..N_BEST {
        let (start, mut n) = (Instant::now(), 0u32);
        let taken = loop {
            compute.matmul(matrix, &x, &mut y, &mut scratch);
            n += 1;
            let taken = start.elapsed().as_secs_f64();
            if taken >= LONG_ENOUGH {
                break taken;
            }
        };
        best = best.min(taken / f64::from(n));
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;
    use cadre_checkpoint::model_sizes;

    #[test]
    fn the_slower_of_reading_and_multiplying_counts() {
        let pace = Pace {
            one: 1e9,
            many: 4e9,
            per_expert: 2e9,
            product: 1e-6,
        };
        let work = Work {
            experts: 1_000_000,
            rest: 3_000_000,
            head: 1_000_000,
            n_products: 10,
        };
        assert!((pace.decode(work, 0.0) - 4.01e-3).abs() < 1e-9);
        assert!((pace.decode(work, 1.0) - 1.000_01).abs() < 1e-9);
        assert!((pace.prompt(work) - (5e-4 + 5e-4)).abs() < 1e-9);
    }

    #[test]
    fn the_work_of_a_token_is_that_of_its_experts() {
        let checkpoint = embedded::open().unwrap();
        let (config, sizes) = (checkpoint.config(), model_sizes(&checkpoint));
        let work = Work::new(config, &sizes);
        let moe = &config.moe;
        let expert = 3 * config.hidden_size * moe.intermediate_size;
        assert_eq!(work.experts, (config.n_layers * moe.top_k * expert) as u64);
        assert!(work.rest > work.head && work.n_products > 6 * config.n_layers as u64);
        let pace = Pace::measure(config, Dtype::Q8_0);
        assert!(pace.one > 0.0 && pace.many > 0.0 && pace.product > 0.0);
    }
}
