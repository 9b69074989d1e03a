//! Number crunching for inference: weight formats, SIMD kernels with their scalar twins, the thread pool.
//!
//! Start at [`Compute`]: it holds the kernel table chosen for this CPU and the threads, and multiplies
//! activations by a [`Matrix`]. Row-wise operations (norm, softmax, activation) are methods of [`Kernels`].
//!
//! Two promises, which the engine builds on:
//! - **One sequence per output.** An output element is computed by the same instructions in the same order
//!   whatever the number of tokens, threads or groups in the call. Only another [`Isa`] may change a bit.
//! - **Every kernel has a scalar twin** with the same signature, and the tests run every ISA of the machine
//!   against it.
//!
//! Shapes: activations are `[n_tokens, n_in]`, weights `[n_out, n_in]`, both row-major.

mod accuracy;
mod activations;
mod arch;
mod attention;
pub mod bf16_gemm;
mod blocks;
mod compute;
pub mod doctor;
mod format;
pub mod gemm;
mod interleave;
mod isa;
mod matrix;
mod memory;
mod panel;
mod place;
mod pool;
mod product;
mod quantize;
mod room;
#[cfg(test)]
mod samples;
mod table;

pub use activations::MatmulScratch;
pub use attention::{
    Attend, AttendScratch, Heads, HeadsMut, KV_PAGE, KvFormat, KvFormats, KvLayer, KvMemory,
    KvPage, KvSizes, Span,
};
pub use blocks::{ActQ8, ActQ8K, BlockQ8_0, Q8_BLOCK, SUPER_BLOCK, dequantize_q8_0, quantize_q8_0};
pub use bytes::Bytes;
pub use compute::{Compute, Grouped};
pub use format::Format;
pub use half::{bf16, f16};
pub use isa::Isa;
pub use matrix::{Matrix, MatrixError};
pub use memory::{keep_freed_memory, zeros};
pub use place::{GrowingMatrix, PlacedMemory};
pub use pool::ThreadPool;
pub use room::{Piece, Room};
pub use table::Kernels;
