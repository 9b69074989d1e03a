//! Interleaved rows: a matrix stored so that 32 rows are read as one stream.
//!
//! The rows of a panel lie side by side: for every block first the bytes that do not fill words of 4 (one or two, a
//! scale), row after row; then, for the first 16 rows, the first word of each, then the second, and so on; then the same
//! for the other 16. It is the same bytes in another order. Unpacking is then loading, and memory is read in sequence,
//! which is what it is fastest at.

use crate::blocks::{
    BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K,
    BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K,
};
use crate::format::Format;
use crate::panel::{PANEL_ROWS, Slab};

/// Bytes of a word.
pub(crate) const WORD: usize = 4;
/// Rows whose words lie side by side.
pub(crate) const HALF: usize = PANEL_ROWS / 2;
/// Bytes of a word of each of them.
pub(crate) const HALF_BYTES: usize = HALF * WORD;

/// Where the bytes of a block are when its rows are interleaved.
pub(crate) trait Layout: Copy {
    /// Bytes that do not fill words.
    const N_ODD: usize = size_of::<Self>() % WORD;
    /// Where they are in the block.
    const ODD: usize = 0;

    /// Where word `word` of the first row of half `half` is, from the block's beginning. Words of floats are blocks of
    /// their own.
    #[inline(always)]
    fn place(half: usize, word: usize) -> usize {
        let n_words = size_of::<Self>() / WORD;
        match n_words {
            0 | 1 => (2 * word + half) * HALF_BYTES,
            _ => Self::N_ODD * PANEL_ROWS + (half * n_words + word) * HALF_BYTES,
        }
    }

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
                let word = slab
                    .interleaved::<B>(at / per_word * per_word)
                    .add(row * WORD);
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
                let word_of_row = B::place(row / HALF, word) + row % HALF * WORD;
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
    pub(crate) size: usize,
    /// Bytes of a block that do not fill words.
    pub(crate) n_odd: usize,
    /// Where they are in it.
    pub(crate) odd: usize,
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

    /// Whether rows of so many bytes are whole blocks; of floats, whole vectors, which are four words.
    pub(crate) fn fits(&self, row_bytes: usize) -> bool {
        let unit = if self.size == WORD {
            4 * WORD
        } else {
            self.size
        };
        row_bytes.is_multiple_of(unit)
    }

    /// Where the words of a block begin.
    pub(crate) fn words(&self) -> usize {
        if self.odd == 0 { self.n_odd } else { 0 }
    }

    /// Interleaves the rows of a slab: `rows` of equal size, at most [`PANEL_ROWS`], the last one repeated. The twin of
    /// [`crate::Kernels::interleave`], and what it means.
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
            let halves = words.chunks_exact_mut(words.len() / 2);
            for (words, rows) in halves.zip(rows.chunks_exact(HALF)) {
                let words = words.as_chunks_mut::<HALF_BYTES>().0;
                for (word, out) in words.iter_mut().enumerate() {
                    for (out, row) in out.as_chunks_mut::<WORD>().0.iter_mut().zip(rows) {
                        if let Some(word) = row[from + word * WORD..].first_chunk() {
                            *out = *word;
                        }
                    }
                }
            }
        }
    }

    /// Calls `take(offset, bytes)` for pieces of row `row` of a slab, whole blocks as they were before.
    pub(crate) fn row(&self, slab: &[u8], row: usize, mut take: impl FnMut(usize, &[u8])) {
        let mut piece = [0; 1024];
        let per_piece = piece.len() / self.size;
        let blocks = slab.chunks(per_piece * self.size * PANEL_ROWS);
        for (at, blocks) in blocks.enumerate() {
            let piece = &mut piece[..blocks.len() / PANEL_ROWS];
            let blocks = blocks.chunks_exact(self.size * PANEL_ROWS);
            for (out, block) in piece.chunks_exact_mut(self.size).zip(blocks) {
                let (odd, words) = block.split_at(self.n_odd * PANEL_ROWS);
                let odd = &odd[row * self.n_odd..][..self.n_odd];
                out[self.odd..][..self.n_odd].copy_from_slice(odd);
                let words = &words[row / HALF * (words.len() / 2)..];
                let words = words.as_chunks::<WORD>().0.chunks_exact(HALF);
                for (out, word) in out[self.words()..].as_chunks_mut().0.iter_mut().zip(words) {
                    *out = word[row % HALF];
                }
            }
            take(at * per_piece * self.size, piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::isa::Isa;
    use crate::samples::noise_bytes;
    use crate::table::Kernels;

    #[test]
    fn rows_come_back_from_any_slab() {
        for format in Format::all() {
            for (n_rows, n_blocks) in [(1, 1), (32, 3), (31, 16), (7, 40)] {
                let row_bytes = n_blocks * format.block_bytes() * 16 / format.block_bytes().min(16);
                let Some(shape) = Shape::of(format, row_bytes) else {
                    continue;
                };
                let rows = noise_bytes(n_rows * row_bytes, 3);
                let mut slab = vec![0; PANEL_ROWS * row_bytes];
                shape.interleave(&rows, row_bytes, &mut slab);
                for row in 0..PANEL_ROWS {
                    let mut got = Vec::new();
                    shape.row(&slab, row, |at, bytes| {
                        assert_eq!(at, got.len());
                        got.extend_from_slice(bytes);
                    });
                    let from = row.min(n_rows - 1) * row_bytes;
                    assert_eq!(got, rows[from..][..row_bytes], "{format} {n_rows} {row}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn every_instruction_set_moves_bytes_as_the_twin_does(
            format in prop::sample::select(Format::all().collect::<Vec<_>>()),
            n_rows in 1..=PANEL_ROWS, n_blocks in 1usize..40, offset in 0usize..64, seed in any::<u32>()
        ) {
            let unit = if format.is_quantized() { format.block_bytes() } else { 16 };
            let row_bytes = n_blocks * unit;
            let Some(shape) = Shape::of(format, row_bytes) else {
                return Ok(());
            };
            let n_bytes = n_rows * row_bytes;
            let bytes = noise_bytes(offset + n_bytes, seed);
            let rows = &bytes[offset..];
            let mut expected = vec![0; PANEL_ROWS * row_bytes];
            shape.interleave(rows, row_bytes, &mut expected);
            for isa in Isa::available() {
                let kernels = Kernels::for_isa(isa).unwrap();
                // Room before and after, which stays as it is.
                let mut got = vec![0xa5; offset + expected.len() + 64];
                let out = &mut got[offset..][..expected.len()];
                kernels.interleave(&shape, rows, row_bytes, out);
                prop_assert_eq!(&*out, &expected[..], "{} {}", isa, format);
                let mut around = got[..offset].iter().chain(&got[offset + expected.len()..]);
                prop_assert!(around.all(|byte| *byte == 0xa5), "{} {}", isa, format);
            }
        }
    }

    #[test]
    fn words_of_a_block_lie_side_by_side() {
        // Two blocks of Q4_0 in two rows: bytes count up, the second row from 100 on.
        let shape = Shape::of(Format::Q4_0, 18).unwrap();
        let rows: Vec<u8> = (0..18).chain(100..118).collect();
        let mut slab = vec![0; PANEL_ROWS * 18];
        shape.interleave(&rows, 18, &mut slab);
        assert_eq!(slab[..6], [0, 1, 100, 101, 100, 101]);
        assert_eq!(
            slab[64..76],
            [2, 3, 4, 5, 102, 103, 104, 105, 102, 103, 104, 105]
        );
        // The second word, and the first one of row 16.
        assert_eq!(slab[128..132], [6, 7, 8, 9]);
        assert_eq!(slab[320..324], [102, 103, 104, 105]);
    }
}
