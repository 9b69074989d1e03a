//! Attention over stored keys and values: the cache's formats and layout, tiles of queries, the work of the threads.
//!
//! **One canonical order.** What a query gets depends on the query, on the keys and values that it sees and on their
//! positions, and on nothing else: not on the queries that are computed with it, on how the tokens before it came in,
//! or on the number of threads. Positions are cut into blocks of 64 and segments of 1024, both at multiples of their
//! size. Within a block every score is a sum over the dimensions in their order and every output a sum over the
//! positions in theirs, so that a lane of a vector register is an element of the result and lanes are never added;
//! the maximum runs from block to block of a segment, and a segment starts afresh. Segments are joined in their order,
//! also where one thread computed all of them.
//!
//! A position that a query does not see takes no part at all: its weight is not zero, it is left out, so that what is
//! stored there (another token's overflow, or nothing yet) cannot reach the output. A NaN in what is seen does.

mod compute;
mod format;
mod page;
mod plan;
mod store;
mod tile;

pub use compute::AttendScratch;
pub use format::{KvFormat, KvFormats};
pub use page::{KV_PAGE, KvMemory, KvPage};
pub use store::{KvLayer, KvSizes};
pub use tile::{Attend, Heads, HeadsMut, Span};

/// Positions whose softmax is computed on its own; a multiple of the block of 64.
const SEGMENT: usize = 1024;
