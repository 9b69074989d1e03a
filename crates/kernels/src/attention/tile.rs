//! A tile: some queries that read the same keys, computed together block by block.

use std::ops::Range;

use super::{KvFormat, KvLayer, SEGMENT};
use crate::arch::attention::{
    AttentionTable, KEY_BLOCK, MAX_ROWS, PANEL, PanelProduct, Panels, ProductFn, SoftRow, Turn,
};
use crate::pool::SendPtr;

/// Vectors of tokens and heads inside of a buffer: `values[token * per_token + head * per_head..]`.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// The buffer.
    pub values: &'a [f32],
    /// From one token to the next.
    pub per_token: usize,
    /// From one head to the next.
    pub per_head: usize,
}

/// [`Heads`] to write to.
#[derive(Debug)]
pub struct HeadsMut<'a> {
    /// The buffer.
    pub values: &'a mut [f32],
    /// From one token to the next.
    pub per_token: usize,
    /// From one head to the next.
    pub per_head: usize,
}

/// What the queries of a call have in common.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// Heads of queries, a multiple of the stored heads: query head `h` reads stored head `h / (n_heads / stored)`.
    pub n_heads: usize,
    /// Multiplied with the keys, `key_dim` values each.
    pub on_keys: Heads<'a>,
    /// Multiplied with the values as well, `value_dim` values each, where keys come from both (latent attention).
    pub on_values: Option<Heads<'a>>,
    /// Factor on the scores.
    pub scale: f32,
    /// Per head, a logit that takes part in the softmax and adds nothing.
    pub sinks: Option<&'a [f32]>,
    /// Positions that a token sees, itself included; all when absent.
    pub window: Option<usize>,
}

/// Consecutive tokens of one sequence, whose keys and values are stored already.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// Keys and values of the sequence.
    pub kv: &'a KvLayer,
    /// Position of the first token in its sequence.
    pub position: usize,
    /// The first token's index among the queries and outputs of the call.
    pub first: usize,
    /// How many tokens.
    pub n_tokens: usize,
}

/// Where the outputs go.
pub(super) struct Sink {
    pub(super) values: SendPtr<f32>,
    pub(super) per_token: usize,
    pub(super) per_head: usize,
}

/// Rows `rows` of a span and a stored head, where row `i` is token `i / group`, head `i % group` of the heads that read
/// the stored one.
pub(super) struct Tile<'a> {
    pub(super) table: &'static AttentionTable,
    pub(super) attend: &'a Attend<'a>,
    pub(super) span: Span<'a>,
    pub(super) head: usize,
    pub(super) group: usize,
    pub(super) rows: Range<usize>,
}

/// Memory of a thread that computes a tile.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// The queries, `[rows, key_dim]` and `[rows, value_dim]`.
    on_keys: Vec<f32>,
    on_values: Vec<f32>,
    /// A block's values as keys, `[4, value_dim, 16]`.
    turned: Vec<f32>,
    /// Of a segment: where each softmax stands, and its sums `[rows, width]`.
    rows: Vec<SoftRow>,
    sums: Vec<f32>,
    /// Over the segments so far.
    pub(super) joined: Joined,
}

/// Sums over segments, in their order.
#[derive(Debug, Default)]
pub(super) struct Joined {
    rows: Vec<SoftRow>,
    /// `[rows, width]`.
    sums: Vec<f32>,
}

/// What a tile has computed of one segment.
pub(super) struct Part<'a> {
    pub(super) rows: &'a mut [SoftRow],
    /// `[rows, width]`.
    pub(super) sums: &'a mut [f32],
}

impl Workspace {
    /// Makes room for tiles of `n_rows`, so that none is needed later.
    pub(super) fn reserve(&mut self, n_rows: usize, kv: &KvLayer, latent: bool) {
        let sizes = kv.sizes();
        let width = width(kv);
        let grow = |values: &mut Vec<f32>, n: usize| {
            if values.len() < n {
                values.resize(n, 0.0);
            }
        };
        grow(&mut self.on_keys, n_rows * sizes.key_dim);
        grow(&mut self.sums, n_rows * width);
        grow(&mut self.joined.sums, n_rows * width);
        if latent {
            grow(&mut self.on_values, n_rows * sizes.value_dim);
            grow(&mut self.turned, KEY_BLOCK * sizes.value_dim);
        }
        if self.rows.len() < n_rows {
            self.rows.resize(n_rows, SoftRow::START);
            self.joined.rows.resize(n_rows, SoftRow::START);
        }
    }
}

/// Numbers of a row of sums: the dimensions of a value, in whole panels.
pub(super) fn width(kv: &KvLayer) -> usize {
    kv.sizes().value_dim.next_multiple_of(PANEL)
}

impl Span<'_> {
    /// Segments that rows `rows` of a stored head see something of.
    pub(super) fn segments(
        &self,
        window: Option<usize>,
        group: usize,
        rows: &Range<usize>,
    ) -> Range<usize> {
        let first = seen(self, window, rows.start / group);
        let last = seen(self, window, (rows.end - 1) / group);
        first.start / SEGMENT..last.end.div_ceil(SEGMENT)
    }
}

/// Positions that token `token` of a span sees. Both ends ascend with the token.
fn seen(span: &Span<'_>, window: Option<usize>, token: usize) -> Range<usize> {
    let to = span.position + token + 1;
    window.map_or(0, |window| to.saturating_sub(window))..to
}

/// The part of `range` inside of `from..to`, relative to `from`; empty ranges are inside of it too.
fn clip(range: &Range<usize>, from: usize, to: usize) -> (usize, usize) {
    let inside = |at: usize| at.clamp(from, to) - from;
    (inside(range.start), inside(range.end))
}

impl Tile<'_> {
    /// Segments to compute and join.
    pub(super) fn segments(&self) -> Range<usize> {
        let window = self.attend.window;
        self.span.segments(window, self.group, &self.rows)
    }

    /// Computes everything and writes the outputs.
    ///
    /// # Safety
    /// Nobody else uses the outputs of these rows.
    pub(super) unsafe fn run(&self, memory: &mut Workspace, sink: &Sink) {
        memory.joined.start(self);
        self.load(memory);
        for segment in self.segments() {
            let (mut rows, mut sums) = (
                std::mem::take(&mut memory.rows),
                std::mem::take(&mut memory.sums),
            );
            let mut part = Part {
                rows: &mut rows[..self.rows.len()],
                sums: &mut sums[..self.rows.len() * width(self.span.kv)],
            };
            self.compute(segment, memory, &mut part);
            memory.joined.add(self, segment, &part);
            (memory.rows, memory.sums) = (rows, sums);
        }
        // SAFETY: the caller's promise.
        unsafe { memory.joined.write(self, sink) };
    }

    /// Gathers the queries.
    pub(super) fn load(&self, memory: &mut Workspace) {
        let sizes = self.span.kv.sizes();
        self.gather(&self.attend.on_keys, sizes.key_dim, &mut memory.on_keys);
        if let Some(heads) = &self.attend.on_values {
            self.gather(heads, sizes.value_dim, &mut memory.on_values);
        }
    }

    fn gather(&self, heads: &Heads<'_>, width: usize, out: &mut [f32]) {
        for (row, out) in self.rows.clone().zip(out.chunks_exact_mut(width)) {
            let (token, head) = self.place(row);
            let from = token * heads.per_token + head * heads.per_head;
            out.copy_from_slice(&heads.values[from..][..width]);
        }
    }

    /// Token, among those of the call, and query head of a row.
    fn place(&self, row: usize) -> (usize, usize) {
        let token = self.span.first + row / self.group;
        (token, self.head * self.group + row % self.group)
    }

    fn seen(&self, row: usize) -> Range<usize> {
        seen(&self.span, self.attend.window, row / self.group)
    }

    /// Softmax and weighted sums over one segment; the queries were gathered.
    pub(super) fn compute(&self, segment: usize, memory: &mut Workspace, part: &mut Part<'_>) {
        part.rows.fill(SoftRow::START);
        part.sums.fill(0.0);
        let all = self.seen(self.rows.start).start..self.seen(self.rows.end - 1).end;
        let from = all.start.max(segment * SEGMENT) / KEY_BLOCK * KEY_BLOCK;
        let to = all.end.min((segment + 1) * SEGMENT);
        for block in (from..to).step_by(KEY_BLOCK) {
            let (first, last) = clip(&all, block, block + KEY_BLOCK);
            if self.attend.on_values.is_some() {
                let (head, panels) = (self.head, first / PANEL..last.div_ceil(PANEL));
                self.turn(self.span.kv.value_panels(head, block), panels, memory);
            }
            for first in (0..part.rows.len()).step_by(MAX_ROWS) {
                let n_rows = MAX_ROWS.min(part.rows.len() - first);
                self.rows_of_block(block, first..first + n_rows, memory, part);
            }
        }
    }

    /// Some rows against one block.
    fn rows_of_block(
        &self,
        block: usize,
        mut rows: Range<usize>,
        memory: &Workspace,
        part: &mut Part<'_>,
    ) {
        for at in rows.clone() {
            let seen = self.seen(self.rows.start + at);
            let row = &mut part.rows[at];
            (row.from, row.to) = clip(&seen, block, block + KEY_BLOCK);
        }
        // What rows see ascends, so those that see nothing are at the ends.
        let nothing = |row: &SoftRow| row.from >= row.to;
        while !rows.is_empty() && nothing(&part.rows[rows.start]) {
            rows.start += 1;
        }
        while !rows.is_empty() && nothing(&part.rows[rows.end - 1]) {
            rows.end -= 1;
        }
        if rows.is_empty() {
            return;
        }
        let mut scores = [[0.0f32; KEY_BLOCK]; MAX_ROWS];
        let scores = &mut scores[..rows.len()];
        self.score(block, &rows, memory, &part.rows[rows.clone()], scores);
        let width = width(self.span.kv);
        let soft = &mut part.rows[rows.clone()];
        // SAFETY: the table is the CPU's, ranges end at 64 at most, and there are as many rows as scores.
        unsafe { (self.table.soften)(scores, soft, self.attend.scale) };
        let sums = &mut part.sums[rows.start * width..rows.end * width];
        for (row, sums) in soft.iter().zip(sums.chunks_exact_mut(width)) {
            if row.shrink != 1.0 {
                sums.iter_mut().for_each(|sum| *sum *= row.shrink);
            }
        }
        self.mix(
            self.span.kv.value_panels(self.head, block),
            soft,
            scores,
            sums,
        );
    }

    fn turn(&self, b: Panels, key_panels: Range<usize>, memory: &mut Workspace) {
        let turn = match self.span.kv.formats().values {
            KvFormat::F32 => self.table.turn_f32,
            KvFormat::F16 => self.table.turn_f16,
            KvFormat::Q8_0 => self.table.turn_q8,
        };
        let n_dims = self.span.kv.sizes().value_dim;
        assert!(
            memory.turned.len() >= KEY_BLOCK * n_dims,
            "memory was reserved"
        );
        let args = Turn {
            b,
            n_dims,
            key_panels,
            out: memory.turned.as_mut_ptr(),
        };
        // SAFETY: the table is the CPU's; the panels are a block's; the memory holds four panels of keys.
        unsafe { turn(&args) };
    }

    /// Unscaled scores of `rows` in the panels of the block that any of them sees.
    fn score(
        &self,
        block: usize,
        rows: &Range<usize>,
        memory: &Workspace,
        soft: &[SoftRow],
        scores: &mut [[f32; KEY_BLOCK]],
    ) {
        let keys = self.span.kv.formats().keys;
        let product = match keys {
            KvFormat::F32 => self.table.product_f32,
            KvFormat::F16 => self.table.product_f16,
            KvFormat::Q8_0 => self.table.product_q8_keys,
        };
        let sizes = self.span.kv.sizes();
        let panels = soft[0].from / PANEL..soft[soft.len() - 1].to.div_ceil(PANEL);
        let mut args = PanelProduct {
            a: memory.on_keys[rows.start * sizes.key_dim..rows.end * sizes.key_dim].as_ptr(),
            a_stride: sizes.key_dim,
            n_rows: rows.len(),
            b: self.span.kv.key_panels(self.head, block),
            panels,
            steps: 0..sizes.key_dim,
            c: scores.as_mut_ptr().cast(),
            c_stride: KEY_BLOCK,
            add: false,
        };
        // SAFETY: the table is the CPU's; the rows of queries were sliced above; a block has four panels of keys, and
        // a row of scores as many.
        unsafe { product(&args) };
        if self.attend.on_values.is_some() {
            let n = sizes.value_dim;
            args.a = memory.on_values[rows.start * n..rows.end * n].as_ptr();
            (args.a_stride, args.steps, args.add) = (n, 0..n, true);
            let data = memory.turned[..KEY_BLOCK * n].as_ptr().cast();
            args.b = Panels {
                data,
                scales: std::ptr::null(),
                n_steps: n,
                next: data,
                n_panels: KEY_BLOCK / PANEL,
            };
            // SAFETY: as above, with the four panels that `turn` wrote.
            unsafe { (self.table.product_f32)(&args) };
        }
    }

    /// Adds weighted values, each row's over what it sees and in the order of positions.
    fn mix(&self, b: Panels, soft: &[SoftRow], weights: &[[f32; KEY_BLOCK]], sums: &mut [f32]) {
        let product: ProductFn = match self.span.kv.formats().values {
            KvFormat::F32 => self.table.product_f32,
            KvFormat::F16 => self.table.product_f16,
            KvFormat::Q8_0 => self.table.product_q8_values,
        };
        let width = width(self.span.kv);
        assert!(sums.len() == soft.len() * width && weights.len() == soft.len());
        let mut add = |rows: Range<usize>, steps: Range<usize>| {
            if steps.is_empty() {
                return;
            }
            let args = PanelProduct {
                a: weights[rows.clone()].as_ptr().cast(),
                a_stride: KEY_BLOCK,
                n_rows: rows.len(),
                b,
                panels: 0..width / PANEL,
                steps,
                c: sums[rows.start * width..].as_mut_ptr(),
                c_stride: width,
                add: true,
            };
            // SAFETY: the table is the CPU's; rows and their sums are inside of the slices; steps are positions of the
            // block, whose values are `width` wide.
            unsafe { product(&args) };
        };
        // What all rows see is added to all at once.
        let (from, to) = (soft[soft.len() - 1].from, soft[0].to);
        if from >= to {
            for (at, row) in soft.iter().enumerate() {
                add(at..at + 1, row.from..row.to);
            }
            return;
        }
        for (at, row) in soft.iter().enumerate() {
            add(at..at + 1, row.from..from);
        }
        add(0..soft.len(), from..to);
        for (at, row) in soft.iter().enumerate() {
            add(at..at + 1, to..row.to);
        }
    }
}

impl Joined {
    /// Nothing but the sinks, which are scores that came before all others.
    pub(super) fn start(&mut self, tile: &Tile<'_>) {
        for (row, joined) in tile.rows.clone().zip(&mut self.rows) {
            *joined = SoftRow::START;
            if let Some(sinks) = tile.attend.sinks {
                joined.highest = sinks[tile.place(row).1];
                joined.total = 1.0;
            }
        }
        self.sums[..tile.rows.len() * width(tile.span.kv)].fill(0.0);
    }

    /// Joins the next segment.
    pub(super) fn add(&mut self, tile: &Tile<'_>, segment: usize, part: &Part<'_>) {
        let width = width(tile.span.kv);
        let sums = self.sums.chunks_exact_mut(width);
        let news = part.rows.iter().zip(part.sums.chunks_exact(width));
        let joined = self.rows.iter_mut().zip(sums);
        for ((row, (joined, sums)), (new, new_sums)) in tile.rows.clone().zip(joined).zip(news) {
            let seen = tile.seen(row);
            let (from, to) = clip(&seen, segment * SEGMENT, (segment + 1) * SEGMENT);
            if from >= to {
                continue;
            }
            let highest = joined.highest.max(new.highest);
            let old_factor = (joined.highest - highest).exp();
            let new_factor = (new.highest - highest).exp();
            joined.highest = highest;
            joined.total = joined.total * old_factor + new.total * new_factor;
            for (sum, new) in sums.iter_mut().zip(new_sums) {
                *sum = *sum * old_factor + new * new_factor;
            }
        }
    }

    /// Writes the outputs.
    ///
    /// # Safety
    /// Nobody else uses the outputs of the tile's rows.
    pub(super) unsafe fn write(&self, tile: &Tile<'_>, sink: &Sink) {
        let (n, width) = (tile.span.kv.sizes().value_dim, width(tile.span.kv));
        let joined = self.rows.iter().zip(self.sums.chunks_exact(width));
        for (row, (joined, sums)) in tile.rows.clone().zip(joined) {
            let (token, head) = tile.place(row);
            let to = token * sink.per_token + head * sink.per_head;
            // SAFETY: the caller's promise, and the call checked that the outputs hold every token and head.
            let out = unsafe { std::slice::from_raw_parts_mut(sink.values.get().add(to), n) };
            let inverse = 1.0 / joined.total;
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum * inverse;
            }
        }
    }
}
