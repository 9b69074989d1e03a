//! The inputs of products in the forms that weights are multiplied by.

use half::bf16;

use crate::arch::{PanelKernels, Products};
use crate::blocks::{ActQ8, ActQ8K, Q8_BLOCK, SUPER_BLOCK};
use crate::compute::{Compute, Grouped};
use crate::format::Format;
use crate::product::{ActFormat, Acts};
use crate::table::Kernels;

/// Buffers that products reuse. Grows to the largest product seen and never shrinks.
#[derive(Debug, Default)]
pub struct MatmulScratch {
    q8: Vec<ActQ8>,
    q8_k: Vec<ActQ8K>,
    rounded: Vec<f32>,
    bf16: Vec<bf16>,
    gathered: Vec<f32>,
    made: Made,
}

/// Forms that the inputs of the last call were brought into.
#[derive(Clone, Copy, Debug, Default)]
struct Made {
    q8: bool,
    q8_k: bool,
    bf16: bool,
}

impl MatmulScratch {
    /// Scratch that is large enough for inputs of `n_values` activations of block formats, so that it need not grow.
    pub fn with_capacity(n_values: usize) -> Self {
        Self {
            q8: vec![ActQ8::ZERO; n_values.div_ceil(Q8_BLOCK)],
            q8_k: vec![ActQ8K::ZERO; n_values.div_ceil(SUPER_BLOCK)],
            ..Self::default()
        }
    }

    /// Brings the inputs into the forms that the weights are multiplied by. Returns the index that goes with them.
    pub(crate) fn fill<'s>(
        &'s mut self,
        compute: &Compute,
        rows: Grouped<'s>,
        n_in: usize,
        needs: &dyn Fn(ActFormat) -> bool,
    ) -> (Acts<'s>, Option<&'s [u32]>) {
        let MatmulScratch {
            q8,
            q8_k,
            rounded,
            bf16,
            gathered,
            made,
        } = self;
        // Gathered rows are those of this call, whatever the inputs.
        if !rows.is_same || matches!(compute.kernels().table().products, Products::Rows(_)) {
            *made = Made::default();
        }
        let (mut x, mut index) = (rows.x, rows.index);
        let kernels = compute.kernels();
        let table = kernels.table();
        if let (Products::Rows(_), Some(of)) = (&table.products, index) {
            // Kernels over rows take neighbours together.
            grow(gathered, of.len() * n_in, 0.0);
            for (out, row) in gathered.chunks_exact_mut(n_in).zip(of) {
                out.copy_from_slice(&x[*row as usize * n_in..][..n_in]);
            }
            (x, index) = (&gathered[..of.len() * n_in], None);
        }
        if needs(ActFormat::Q8) && !std::mem::replace(&mut made.q8, true) {
            let zero = (ActQ8::ZERO, Q8_BLOCK);
            quantize(compute, x, q8, zero, Kernels::quantize_act);
        }
        if needs(ActFormat::Q8K) && !std::mem::replace(&mut made.q8_k, true) {
            let zero = (ActQ8K::ZERO, SUPER_BLOCK);
            quantize(compute, x, q8_k, zero, Kernels::quantize_act_k);
        }
        if needs(ActFormat::Bf16) && !std::mem::replace(&mut made.bf16, true) {
            match table.products {
                Products::Panels(panels)
                    if matches!(panels(Format::Bf16, false), PanelKernels::Bf16(..)) =>
                {
                    round_rows(x, n_in, bf16);
                }
                _ => {
                    grow(rounded, x.len(), 0.0);
                    for (out, x) in rounded.iter_mut().zip(x) {
                        *out = half::bf16::from_f32(*x).to_f32();
                    }
                }
            }
        }
        let acts = Acts {
            f32: x,
            rounded,
            bf16,
            q8,
            q8_k,
        };
        (acts, index)
    }
}

/// Fills the front of `out` with `x` in blocks of `block` values.
fn quantize<T: Copy + Send>(
    compute: &Compute,
    x: &[f32],
    out: &mut Vec<T>,
    (zero, block): (T, usize),
    quantize: impl Fn(&Kernels, &[f32], &mut [T]) + Sync,
) {
    // Enough values per task to be worth a task.
    const VALUES_PER_TASK: usize = 8192;
    let n_blocks = x.len() / block;
    grow(out, n_blocks, zero);
    let per_task = VALUES_PER_TASK / block;
    let out = &mut out[..n_blocks];
    compute.pool().for_each_chunk(out, per_task, |i, out| {
        let from = i * VALUES_PER_TASK;
        quantize(&compute.kernels(), &x[from..][..out.len() * block], out);
    });
}

fn grow<T: Copy>(out: &mut Vec<T>, len: usize, zero: T) {
    if out.len() < len {
        out.resize(len, zero);
    }
}

/// Rows of `n_in` values in bf16, each padded to an even number with zero.
fn round_rows(x: &[f32], n_in: usize, out: &mut Vec<bf16>) {
    let padded = n_in.next_multiple_of(2);
    grow(out, x.len() / n_in * padded, bf16::ZERO);
    for (out, x) in out.chunks_exact_mut(padded).zip(x.chunks_exact(n_in)) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = bf16::from_f32(*x);
        }
        if padded > n_in {
            out[n_in] = bf16::ZERO;
        }
    }
}
