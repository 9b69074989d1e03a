//! A task's share of matrix products, handed to the kernels of the weight's format.

use std::cell::RefCell;

use half::{bf16, f16};

use crate::arch::{Kernel, PanelKernels, Products, Quants, Rows};
use crate::blocks::{
    ActQ8, ActQ8K, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1,
    BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K, Pod,
};
use crate::format::Format;
use crate::matrix::Matrix;
use crate::panel::{Ahead, FEW_TOKENS, Lanes, PANEL_ROWS, PANEL_WORDS, Panel, Slab, TOKEN_BLOCK};
use crate::table::Kernels;

/// What activations a format is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ActFormat {
    /// As they come.
    F32,
    /// Rounded to bf16, as ggml does for weights in bf16.
    Bf16,
    /// [`ActQ8`].
    Q8,
    /// [`ActQ8K`].
    Q8K,
}

impl ActFormat {
    /// The one for weights of `format`.
    pub(crate) fn of(format: Format) -> Self {
        match format {
            Format::F32 | Format::F16 | Format::F8E4M3 | Format::U8 => Self::F32,
            Format::Bf16 => Self::Bf16,
            Format::Q8_0
            | Format::Q4_0
            | Format::Q4_1
            | Format::Q5_0
            | Format::Q5_1
            | Format::Iq4Nl
            | Format::Mxfp4 => Self::Q8,
            Format::Q2K
            | Format::Q3K
            | Format::Q4K
            | Format::Q5K
            | Format::Q6K
            | Format::Q8K
            | Format::Iq4Xs => Self::Q8K,
        }
    }
}

/// The activations of a product, `[n_rows, n_in]`, in every form that its weights need; the others are empty.
#[derive(Clone, Copy)]
pub(crate) struct Acts<'a> {
    pub(crate) f32: &'a [f32],
    /// Values that bf16 can hold.
    pub(crate) rounded: &'a [f32],
    /// Rows padded to an even number of values.
    pub(crate) bf16: &'a [bf16],
    pub(crate) q8: &'a [ActQ8],
    pub(crate) q8_k: &'a [ActQ8K],
}

/// What happens to the outputs of a row block of one token: its index among the outputs, the first row, the outputs of
/// the first weight (to be stored), and those of the second.
pub(crate) type Finish<'a> = &'a (dyn Fn(usize, usize, &mut [f32], &mut [f32]) + Sync);

/// Weights that are multiplied by the same activations.
#[derive(Clone, Copy)]
pub(crate) enum Weights<'a> {
    One(&'a Matrix),
    /// Two of one shape, whose outputs become one.
    Two(&'a Matrix, &'a Matrix, Finish<'a>),
}

impl<'a> Weights<'a> {
    /// The weight whose shape all have.
    pub(crate) fn first(&self) -> &'a Matrix {
        let (Self::One(w) | Self::Two(w, ..)) = self;
        w
    }

    /// Whether one of them is multiplied by activations of that kind.
    pub(crate) fn has(&self, acts: ActFormat) -> bool {
        match self {
            Self::One(w) => w.acts() == acts,
            Self::Two(a, b, _) => a.acts() == acts || b.acts() == acts,
        }
    }
}

/// A task's share: some rows of the weights, the tokens of one group.
pub(crate) struct Part<'a> {
    pub(crate) weights: Weights<'a>,
    pub(crate) first_row: usize,
    pub(crate) n_rows: usize,
    /// Outputs `from..to`.
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Row of the activations that each output comes from; the same number when absent.
    pub(crate) index: Option<&'a [u32]>,
    /// Output 0 of the first weight row of output row 0: `[outputs, n_out]`.
    pub(crate) y: *mut f32,
    pub(crate) n_out: usize,
}

/// What a thread needs for its tasks; grows to the largest group of tokens and never shrinks.
struct Workspace {
    panel: Box<Panel>,
    sums: [Vec<Lanes<f32>>; 2],
    /// Rows of weights in f32, for formats without kernels.
    expanded: Vec<f32>,
}

thread_local! {
    static WORKSPACE: RefCell<Option<Workspace>> = const { RefCell::new(None) };
}

impl Part<'_> {
    /// Computes the part's outputs.
    ///
    /// # Safety
    /// Columns `first_row..first_row + n_rows` of outputs `from..to` may be written through `y`.
    pub(crate) unsafe fn compute(&self, kernels: Kernels, acts: Acts<'_>) {
        WORKSPACE.with_borrow_mut(|workspace| {
            let workspace = workspace.get_or_insert_with(|| Workspace {
                panel: Panel::boxed(),
                sums: [Vec::new(), Vec::new()],
                expanded: Vec::new(),
            });
            let n = self.to - self.from;
            for sums in &mut workspace.sums {
                if sums.len() < n {
                    sums.resize(n, [0.0; PANEL_ROWS]);
                }
            }
            let mut row = self.first_row;
            let end = self.first_row + self.n_rows;
            while row < end {
                let n_rows = PANEL_ROWS.min(end - row);
                // SAFETY: the caller's promise, for some of the rows.
                unsafe { self.slab(kernels, acts, (row, n_rows), workspace) };
                row += n_rows;
            }
        });
    }

    /// Computes `n_rows` outputs from `row` on, at most a panel.
    ///
    /// # Safety
    /// As for [`Part::compute`].
    unsafe fn slab(
        &self,
        kernels: Kernels,
        acts: Acts<'_>,
        (row, n_rows): (usize, usize),
        workspace: &mut Workspace,
    ) {
        let n = self.to - self.from;
        let next = row + n_rows;
        let next_row = (next < self.first_row + self.n_rows).then_some(next);
        let Workspace {
            panel,
            sums: [sums, others],
            expanded,
        } = workspace;
        let (sums, others) = (&mut sums[..n], &mut others[..n]);
        let mut product = |w: &Matrix, next: Option<&[u8]>, sums: &mut [Lanes<f32>]| {
            sums.fill([0.0; PANEL_ROWS]);
            let work = Work {
                row,
                n_rows,
                first: w.row_bytes_from(row).as_ptr(),
                next: next.map_or(std::ptr::null(), <[u8]>::as_ptr),
                from: self.from,
                index: self.index,
            };
            work.multiply(kernels, w, acts, (panel, expanded, sums));
        };
        match self.weights {
            Weights::One(w) => product(w, next_row.map(|row| w.row_bytes_from(row)), sums),
            Weights::Two(a, b, _) => {
                product(a, Some(b.row_bytes_from(row)), sums);
                product(b, next_row.map(|row| a.row_bytes_from(row)), others);
            }
        }
        for (t, (sums, others)) in sums.iter_mut().zip(others).enumerate() {
            if let Weights::Two(_, _, finish) = self.weights {
                finish(
                    self.from + t,
                    row,
                    &mut sums[..n_rows],
                    &mut others[..n_rows],
                );
            }
            // SAFETY: the caller's promise: rows row.. of output from + t.
            unsafe {
                let y = self.y.add((self.from + t) * self.n_out + row);
                std::ptr::copy_nonoverlapping(sums.as_ptr(), y, n_rows);
            }
        }
    }
}

/// How a slab is taken apart into panels.
struct Parts {
    /// Units of a row.
    n_units: usize,
    per_panel: usize,
    /// Where that is which is fetched while panels are multiplied; null when nothing is.
    ahead: *const u8,
    row_bytes: usize,
}

/// A panel's worth of rows of one weight, for some tokens.
struct Work<'a> {
    row: usize,
    n_rows: usize,
    /// The first row's first byte.
    first: *const u8,
    next: *const u8,
    from: usize,
    index: Option<&'a [u32]>,
}

impl Work<'_> {
    fn multiply(
        &self,
        kernels: Kernels,
        w: &Matrix,
        acts: Acts<'_>,
        (panel, expanded, sums): (&mut Panel, &mut Vec<f32>, &mut [Lanes<f32>]),
    ) {
        let panels = match kernels.table().products {
            Products::Rows(ref quants) => {
                return self.by_rows(kernels, quants, w, acts, (expanded, sums));
            }
            Products::Panels(panels) => panels,
        };
        // What comes next is fetched while packing or while multiplying, whichever takes longer.
        let few = sums.len() <= FEW_TOKENS;
        let next = if few { self.next } else { std::ptr::null() };
        let slab = match w.is_interleaved() {
            true => Slab::interleaved_at(self.first),
            false => Slab::new(self.first, w.row_bytes(), self.n_rows, next),
        };
        let ahead = match (few, w.is_interleaved()) {
            (true, _) => std::ptr::null(),
            (false, true) => self.first,
            (false, false) => self.next,
        };
        let (n_in, len) = (w.n_in(), w.format().block_len());
        let blocks = n_in / len;
        let parts = |n_units: usize, bytes_per_unit: usize| Parts {
            n_units,
            // Panels hold 4 bytes of a row a word.
            per_panel: (PANEL_WORDS * 4 / bytes_per_unit).max(1),
            ahead,
            row_bytes: w.row_bytes(),
        };
        let float = w.acts() == ActFormat::F32;
        // SAFETY: `kernels` proves the instruction set; the matrix holds the rows in blocks of its format; the rows of
        // the activations are as long as those of the matrix, which `rows` checks.
        unsafe {
            match panels(w.format(), w.is_interleaved()) {
                PanelKernels::Q8(kernel) if !float => {
                    let rows = (acts.q8, blocks);
                    self.by_panels(&slab, parts(blocks, len), kernel, rows, (panel, sums));
                }
                PanelKernels::Q8K(kernel) if !float => {
                    let rows = (acts.q8_k, blocks);
                    self.by_panels(&slab, parts(blocks, len), kernel, rows, (panel, sums));
                }
                PanelKernels::Bf16(_, kernel) if !float => {
                    let rows = (acts.bf16, n_in.next_multiple_of(2));
                    self.by_panels(&slab, parts(n_in, 2), kernel, rows, (panel, sums));
                }
                PanelKernels::F32(kernel) | PanelKernels::Bf16(kernel, _) => {
                    let x = if float { acts.f32 } else { acts.rounded };
                    self.by_panels(&slab, parts(n_in, 4), kernel, (x, n_in), (panel, sums));
                }
                PanelKernels::Expand | PanelKernels::Q8(..) | PanelKernels::Q8K(..) => {
                    let PanelKernels::F32(kernel) = panels(Format::F32, false) else {
                        unreachable!("f32 is multiplied as it is")
                    };
                    self.expand(kernels, w, expanded);
                    let row_bytes = n_in * size_of::<f32>();
                    let first = expanded.as_ptr().cast();
                    let slab = Slab::new(first, row_bytes, self.n_rows, std::ptr::null());
                    let parts = Parts {
                        ahead: std::ptr::null(),
                        row_bytes,
                        ..parts(n_in, 4)
                    };
                    self.by_panels(&slab, parts, kernel, (acts.f32, n_in), (panel, sums));
                }
            }
        }
    }

    /// Multiplies panel by panel, or a few tokens at once.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set, and the slab's rows hold the units of their type.
    unsafe fn by_panels<X: Copy>(
        &self,
        slab: &Slab,
        parts: Parts,
        kernel: Kernel<X>,
        (x, row_units): (&[X], usize),
        (panel, sums): (&mut Panel, &mut [Lanes<f32>]),
    ) {
        let n_units = parts.n_units;
        // The tokens from `first` on, each from unit `from` on.
        let point = |xs: &mut [*const X], first: usize, from: usize| {
            for (t, x_t) in xs.iter_mut().enumerate() {
                let row = self.x_row(first + t);
                *x_t = x[row * row_units..][..row_units][from..].as_ptr();
            }
        };
        let n_tokens = sums.len();
        if let Some(few) = kernel.few.filter(|few| n_tokens <= few.up_to) {
            let mut done = 0;
            while done < n_tokens {
                let log = (n_tokens - done).min(FEW_TOKENS).ilog2();
                let n = 1 << log;
                let mut xs = [std::ptr::null(); FEW_TOKENS];
                let (xs, sums) = (&mut xs[..n], &mut sums[done..][..n]);
                point(xs, done, 0);
                // SAFETY: the caller's promise; the tokens were sliced.
                unsafe { few.of[log as usize](slab, n_units, xs, sums, panel) };
                done += n;
            }
            return;
        }
        for from in (0..n_units).step_by(parts.per_panel) {
            let n = parts.per_panel.min(n_units - from);
            // SAFETY: the caller's promise.
            unsafe { (kernel.pack)(slab, from, n, panel) };
            let mut ahead = self.ahead(&parts, from, n);
            for (block, sums) in sums.chunks_mut(TOKEN_BLOCK).enumerate() {
                let mut xs = [std::ptr::null(); TOKEN_BLOCK];
                let xs = &mut xs[..sums.len()];
                point(xs, block * TOKEN_BLOCK, from);
                // SAFETY: as above; the panel was packed with `n` units, and the tokens were sliced.
                unsafe { (kernel.multiply)(panel, n, xs, sums, ahead) };
                ahead.n_bytes = 0;
            }
        }
    }

    /// What to fetch while units `from..from + n` are multiplied.
    fn ahead(&self, parts: &Parts, from: usize, n: usize) -> Ahead {
        let base = parts.ahead;
        if base.is_null() {
            return Ahead {
                from: base,
                n_bytes: 0,
            };
        }
        let bytes = |units: usize| units * PANEL_ROWS * parts.row_bytes / parts.n_units;
        // Interleaved, the next panel follows at once; in place, it is the same columns of the next rows.
        let skip = if base == self.first { n } else { 0 };
        Ahead {
            from: base.wrapping_add(bytes(from + skip)),
            n_bytes: bytes(n),
        }
    }

    /// Row of the activations of the `t`-th token.
    fn x_row(&self, t: usize) -> usize {
        let output = self.from + t;
        self.index.map_or(output, |index| index[output] as usize)
    }

    /// Expands the rows to f32.
    fn expand(&self, kernels: Kernels, w: &Matrix, out: &mut Vec<f32>) {
        let n_in = w.n_in();
        out.resize(self.n_rows * n_in, 0.0);
        for (r, values) in out.chunks_exact_mut(n_in).enumerate() {
            if w.format() == Format::F8E4M3 {
                // SAFETY: `kernels` proves the instruction set.
                let decode = |bytes: &[u8], out: &mut [f32]| unsafe {
                    (kernels.table().decode_f8)(bytes, out);
                };
                w.row_by(self.row + r, values, decode);
            } else {
                w.row(self.row + r, values);
            }
        }
    }

    /// Multiplies with the kernels over rows where they lie.
    fn by_rows(
        &self,
        kernels: Kernels,
        quants: &Quants,
        w: &Matrix,
        acts: Acts<'_>,
        (expanded, sums): (&mut Vec<f32>, &mut [Lanes<f32>]),
    ) {
        let table = kernels.table();
        macro_rules! rows {
            ($kernel:expr, $unit:ty, $x:expr) => {{
                let n_units = w.n_in() / w.format().block_len();
                let w = &w.units::<$unit>()[self.row * n_units..][..self.n_rows * n_units];
                // SAFETY: `kernels` proves the instruction set.
                unsafe { self.run($kernel, w, ($x, n_units), sums) }
            }};
        }
        if w.acts() == ActFormat::F32 && (w.format().is_quantized() || w.format() == Format::F8E4M3)
        {
            self.expand(kernels, w, expanded);
            // SAFETY: as above.
            return unsafe { self.run(table.rows_f32, expanded, (acts.f32, w.n_in()), sums) };
        }
        match w.format() {
            Format::F32 => rows!(table.rows_f32, f32, acts.f32),
            Format::F16 => rows!(table.rows_f16, f16, acts.f32),
            Format::Bf16 if w.acts() == ActFormat::F32 => rows!(table.rows_bf16, bf16, acts.f32),
            Format::Bf16 => rows!(table.rows_bf16, bf16, acts.rounded),
            Format::Q8_0 => rows!(quants.rows_q8_0, BlockQ8_0, acts.q8),
            Format::Q4_0 => rows!(quants.rows_q4_0, BlockQ4_0, acts.q8),
            Format::Q4_1 => rows!(quants.rows_q4_1, BlockQ4_1, acts.q8),
            Format::Q5_0 => rows!(quants.rows_q5_0, BlockQ5_0, acts.q8),
            Format::Q5_1 => rows!(quants.rows_q5_1, BlockQ5_1, acts.q8),
            Format::Iq4Nl => rows!(quants.rows_iq4_nl, BlockIq4Nl, acts.q8),
            Format::Mxfp4 => rows!(quants.rows_mxfp4, BlockMxfp4, acts.q8),
            Format::Q2K => rows!(quants.rows_q2_k, BlockQ2K, acts.q8_k),
            Format::Q3K => rows!(quants.rows_q3_k, BlockQ3K, acts.q8_k),
            Format::Q4K => rows!(quants.rows_q4_k, BlockQ4K, acts.q8_k),
            Format::Q5K => rows!(quants.rows_q5_k, BlockQ5K, acts.q8_k),
            Format::Q6K => rows!(quants.rows_q6_k, BlockQ6K, acts.q8_k),
            Format::Q8K => rows!(quants.rows_q8_k, BlockQ8K, acts.q8_k),
            Format::Iq4Xs => rows!(quants.rows_iq4_xs, BlockIq4Xs, acts.q8_k),
            Format::F8E4M3 | Format::U8 => unreachable!("expanded, and never made"),
        }
    }

    /// Runs a kernel over rows for as many consecutive tokens at a time as there are.
    ///
    /// # Safety
    /// The CPU has the kernel's instruction set.
    unsafe fn run<W: Pod, X>(
        &self,
        kernel: unsafe fn(&Rows<W, X>),
        w: &[W],
        (x, n_units): (&[X], usize),
        sums: &mut [Lanes<f32>],
    ) {
        let mut t = 0;
        while t < sums.len() {
            let first = self.x_row(t);
            let run = (t..sums.len()).take_while(|next| self.x_row(*next) == first + next - t);
            let n_tokens = run.count();
            let args = Rows {
                w: w[..self.n_rows * n_units].as_ptr(),
                n_rows: self.n_rows,
                x: x[first * n_units..][..n_tokens * n_units].as_ptr(),
                n_tokens,
                n_units,
                y: sums[t..][..n_tokens].as_mut_ptr().cast(),
                y_stride: PANEL_ROWS,
            };
            // SAFETY: the caller's promise; the operands were sliced, and a row of sums holds the outputs of a token.
            unsafe { kernel(&args) };
            t += n_tokens;
        }
    }
}
