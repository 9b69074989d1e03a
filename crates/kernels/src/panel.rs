//! Panels: a few rows of a weight matrix, unpacked and transposed so that the lanes of a vector are rows.
//!
//! With many tokens, a product takes its weights panel by panel: 32 rows by up to 512 bytes of unpacked columns, which
//! stay in the first cache while all tokens are multiplied by them. With few, an instruction set may have functions that
//! multiply what they unpack at once ([`FewFn`]): memory is then never idle. They compute the same in the same order,
//! which is why a token's result does not depend on its company.
//!
//! A panel is made of words of 4 bytes: four 8-bit integers, two bf16, or one f32 of consecutive columns of a row.

/// Rows of a panel.
pub(crate) const PANEL_ROWS: usize = 32;
/// Words of each row in a panel.
pub(crate) const PANEL_WORDS: usize = 128;
/// Tokens that one call multiplies at most: their sums stay in the first cache beside the panel.
pub(crate) const TOKEN_BLOCK: usize = 64;
/// Words whose products of floats are summed up apart, which loses less than adding one by one. Panels of floats are
/// multiples of it.
pub(crate) const FLOAT_STEP: usize = 32;
/// The most tokens that [`FewFn`]s take.
pub(crate) const FEW_TOKENS: usize = 8;
/// Powers of two up to [`FEW_TOKENS`].
pub(crate) const N_FEW: usize = FEW_TOKENS.ilog2() as usize + 1;
/// What signed integers are stored with: `q + 128`, so that they are unsigned.
pub(crate) const SIGNED_BIAS: i32 = 128;

/// A value for each row.
pub(crate) type Lanes<T> = [T; PANEL_ROWS];

/// Unpacked rows.
///
/// What is filled depends on the family of the format, see [`Panels`].
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub(crate) struct Panel {
    /// `words[w]`: word `w` of every row.
    pub(crate) words: [Lanes<u32>; PANEL_WORDS],
    /// Scale of every block.
    pub(crate) d: [Lanes<f32>; PANEL_WORDS / 8],
    /// What is added to every weight of a block of 32, or what a minimum of a super-block is worth.
    pub(crate) m: [Lanes<f32>; PANEL_WORDS / 8],
    /// Integer scales of super-blocks: of 32 weights each, or of 16 where the format has one per 16.
    pub(crate) scales: [[Lanes<i32>; 16]; PANEL_WORDS / 64],
    /// Two 16-bit factors per word for the sums of 16 activations each: the minima, or minus scale times offset.
    pub(crate) pairs: [[Lanes<u32>; 8]; PANEL_WORDS / 64],
}

impl Panel {
    /// An empty panel on the heap.
    pub(crate) fn boxed() -> Box<Self> {
        // SAFETY: all fields are numbers, for which zeroed memory is a value.
        unsafe { Box::<Self>::new_zeroed().assume_init() }
    }
}

/// Rows that are to be packed.
#[derive(Clone, Debug)]
pub(crate) struct Slab {
    /// Where each row begins. Rows that a panel has too many are copies of the last one. Interleaved rows all begin
    /// where the first does.
    rows: [*const u8; PANEL_ROWS],
    /// Where the rows that come next begin, to be fetched while these are packed; null when they are not to be.
    #[allow(dead_code, reason = "not every instruction set fetches ahead")]
    pub(crate) next: *const u8,
}

impl Slab {
    /// `n_rows` rows, 1 to [`PANEL_ROWS`], `row_bytes` apart.
    pub(crate) fn new(base: *const u8, row_bytes: usize, n_rows: usize, next: *const u8) -> Self {
        assert!((1..=PANEL_ROWS).contains(&n_rows), "rows for one panel");
        let row = |row: usize| base.wrapping_add(row.min(n_rows - 1) * row_bytes);
        Self {
            rows: std::array::from_fn(row),
            next,
        }
    }

    /// [`PANEL_ROWS`] interleaved rows.
    pub(crate) fn interleaved_at(base: *const u8) -> Self {
        Self {
            rows: [base; PANEL_ROWS],
            next: std::ptr::null(),
        }
    }

    /// Block `block` of row `row`.
    ///
    /// # Safety
    /// The rows are not interleaved, and the block lies inside of them.
    #[inline(always)]
    pub(crate) unsafe fn block<B>(&self, row: usize, block: usize) -> *const B {
        // SAFETY: the caller's promise.
        unsafe { self.rows[row].cast::<B>().add(block) }
    }

    /// Where the rows of a half begin; the rows are not interleaved.
    #[inline(always)]
    #[allow(dead_code, reason = "not every instruction set reads them so")]
    pub(crate) fn half(&self, half: usize) -> &[*const u8; PANEL_ROWS / 2] {
        &self.rows.as_chunks().0[half]
    }

    /// Where the first row begins.
    #[inline(always)]
    #[allow(dead_code, reason = "not every instruction set fetches ahead")]
    pub(crate) fn start(&self) -> *const u8 {
        self.rows[0]
    }

    /// Block `block` of all rows.
    ///
    /// # Safety
    /// The rows are interleaved, and the block lies inside of them.
    #[inline(always)]
    pub(crate) unsafe fn interleaved<B>(&self, block: usize) -> *const u8 {
        // SAFETY: the caller's promise.
        unsafe { self.rows[0].add(block * PANEL_ROWS * size_of::<B>()) }
    }
}

/// Memory that will be needed next, to be fetched a little at a time while something else is computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead {
    #[allow(dead_code, reason = "not every instruction set fetches ahead")]
    pub(crate) from: *const u8,
    pub(crate) n_bytes: usize,
}

/// Unpacks blocks `from..from + n` of a slab into the front of a panel.
///
/// # Safety
/// The CPU has the table's instruction set. The slab's rows hold blocks `from..from + n` of the function's type, at
/// addresses that suit it, and `n` blocks fit into a panel.
pub(crate) type PackFn = unsafe fn(slab: &Slab, from: usize, n: usize, panel: &mut Panel);

/// Adds a panel's share of the products: `sums[t][row] += dot(row, xs[t])` over the first `n` units.
///
/// # Safety
/// The CPU has the table's instruction set. The panel holds `n` units; `xs` and `sums` are of one length, at most
/// [`TOKEN_BLOCK`]; `xs[t]` points to `n` units. `ahead` may be any address.
pub(crate) type MultiplyFn<X> =
    unsafe fn(panel: &Panel, n: usize, xs: &[*const X], sums: &mut [Lanes<f32>], ahead: Ahead);

/// Unpacks and multiplies in one pass: `sums[t][row] += dot(row, xs[t])` over the `n` units of a slab's rows.
///
/// # Safety
/// The CPU has the table's instruction set. The slab's rows hold `n` units, and `xs[t]` points to as many; `xs` and
/// `sums` are of the length that the function is for. The panel is for scratch.
pub(crate) type FewFn<X> =
    unsafe fn(slab: &Slab, n: usize, xs: &[*const X], sums: &mut [Lanes<f32>], panel: &mut Panel);
