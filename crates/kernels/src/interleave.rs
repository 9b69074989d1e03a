//! Interleaved rows: a matrix stored so that 32 rows are read as one stream.
//!
//! The rows of a panel lie side by side: for every block first the bytes that do not fill words of 4 (one or two, a
//! scale), row after row, then the first word of each row, then the second, and so on. It is the same bytes in another
//! order. Packing is then loading, and memory is read in sequence, which is what it is fastest at.

use crate::blocks::{
    BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K,
};
use crate::format::Format;
use crate::panel::{PANEL_ROWS, Slab};

/// Bytes of a word.
const WORD: usize = 4;

/// Where the bytes of a block are when its rows are interleaved.
pub(crate) trait Layout: Copy {
    /// Bytes that do not fill words.
    const N_ODD: usize = size_of::<Self>() % WORD;
    /// Where they are in the block.
    const ODD: usize = 0;

    /// The word that byte `offset` of the block belongs to.
    #[inline(always)]
    fn word(offset: usize) -> usize {
        match Self::ODD {
            0 => (offset - Self::N_ODD) / WORD,
            _ => offset / WORD,
        }
    }
}

macro_rules! layout {
    ($($block:ty),*) => { $(impl Layout for $block {})* };
}
layout!(
    BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0,
    BlockQ5_1, BlockQ5K, BlockQ8_0, BlockQ8K, f32
);

impl Layout for BlockQ3K {
    const ODD: usize = 108;
}

impl Layout for BlockQ6K {
    const ODD: usize = 208;
}

/// Two values are a word.
impl Layout for half::f16 {
    const N_ODD: usize = 0;
}

/// Two values are a word.
impl Layout for half::bf16 {
    const N_ODD: usize = 0;
}

/// How rows are stored.
pub(crate) trait Source {
    /// Block `at` of row `row`.
    ///
    /// # Safety
    /// The slab's rows are stored this way, and the block lies inside of them.
    unsafe fn read<B: Layout>(slab: &Slab, row: usize, at: usize) -> B;
}

/// Rows one after the other.
pub(crate) struct InPlace;

/// Rows side by side.
pub(crate) struct Interleaved;

impl Source for InPlace {
    #[inline(always)]
    unsafe fn read<B: Layout>(slab: &Slab, row: usize, at: usize) -> B {
        // SAFETY: the caller's promise.
        unsafe { slab.block::<B>(row, at).read_unaligned() }
    }
}

impl Source for Interleaved {
    #[inline(always)]
    unsafe fn read<B: Layout>(slab: &Slab, row: usize, at: usize) -> B {
        let size = size_of::<B>();
        if size < WORD {
            // Half of a word.
            let per_word = WORD / size;
            // SAFETY: the caller's promise.
            unsafe {
                let word = slab.interleaved::<B>(at / per_word * per_word).add(row * WORD);
                return word.cast::<B>().add(at % per_word).read_unaligned();
            }
        }
        let mut block = std::mem::MaybeUninit::<B>::uninit();
        let out = block.as_mut_ptr().cast::<u8>();
        // SAFETY: the caller's promise for what is read; every byte of the block is written.
        unsafe {
            let from = slab.interleaved::<B>(at);
            std::ptr::copy_nonoverlapping(from.add(row * B::N_ODD), out.add(B::ODD), B::N_ODD);
            let out = if B::ODD == 0 { out.add(B::N_ODD) } else { out };
            for word in 0..size / WORD {
                let word_of_row = B::N_ODD * PANEL_ROWS + (word * PANEL_ROWS + row) * WORD;
                std::ptr::copy_nonoverlapping(from.add(word_of_row), out.add(word * WORD), WORD);
            }
            block.assume_init()
        }
    }
}

/// Sizes of a format's blocks as they are interleaved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Bytes of a block, or of a word where blocks are smaller.
    size: usize,
    n_odd: usize,
    odd: usize,
}

impl Shape {
    /// `None` where the format is not interleaved, or rows of `row_bytes` cannot be.
    pub(crate) fn of(format: Format, row_bytes: usize) -> Option<Self> {
        let size = match format {
            Format::F8E4M3 | Format::U8 => return None,
            // Vectors of floats take 16 bytes of a row at a time.
            Format::F32 | Format::F16 | Format::Bf16 if row_bytes.is_multiple_of(16) => WORD,
            Format::F32 | Format::F16 | Format::Bf16 => return None,
            _ => format.block_bytes(),
        };
        let n_odd = size % WORD;
        let odd = match format {
            Format::Q3K | Format::Q6K => size - n_odd,
            _ => 0,
        };
        Some(Self { size, n_odd, odd })
    }

    fn words(&self) -> usize {
        if self.odd == 0 { self.n_odd } else { 0 }
    }

    /// Interleaves the rows of a slab: `rows` of equal size, at most [`PANEL_ROWS`], the last one repeated.
    pub(crate) fn interleave(&self, rows: &[u8], row_bytes: usize, out: &mut [u8]) {
        let n_rows = rows.len() / row_bytes;
        let row = |row: usize| &rows[row.min(n_rows - 1) * row_bytes..][..row_bytes];
        let rows: [&[u8]; PANEL_ROWS] = std::array::from_fn(row);
        for (at, out) in out.chunks_exact_mut(self.size * PANEL_ROWS).enumerate() {
            let from = at * self.size;
            let (odd, words) = out.split_at_mut(self.n_odd * PANEL_ROWS);
            if self.n_odd > 0 {
                for (out, row) in odd.chunks_exact_mut(self.n_odd).zip(rows) {
                    out.copy_from_slice(&row[from + self.odd..][..self.n_odd]);
                }
            }
            let from = from + self.words();
            for (word, out) in words.as_chunks_mut::<{ WORD * PANEL_ROWS }>().0.iter_mut().enumerate() {
                for (out, row) in out.as_chunks_mut::<WORD>().0.iter_mut().zip(rows) {
                    if let Some(word) = row[from + word * WORD..].first_chunk() {
                        *out = *word;
                    }
                }
            }
        }
    }

    /// Row `row` of a slab, as it was before.
    pub(crate) fn row(&self, slab: &[u8], row: usize, out: &mut [u8]) {
        let blocks = slab.chunks_exact(self.size * PANEL_ROWS);
        for (out, block) in out.chunks_exact_mut(self.size).zip(blocks) {
            let (odd, words) = block.split_at(self.n_odd * PANEL_ROWS);
            out[self.odd..][..self.n_odd].copy_from_slice(&odd[row * self.n_odd..][..self.n_odd]);
            let words = words.as_chunks::<WORD>().0.chunks_exact(PANEL_ROWS);
            for (out, word) in out[self.words()..].as_chunks_mut().0.iter_mut().zip(words) {
                *out = word[row];
            }
        }
    }
}
