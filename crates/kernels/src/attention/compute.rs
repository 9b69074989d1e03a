//! Attention over the threads: checks a call and runs its tiles, or their segments where tiles are few.

use std::sync::{Mutex, PoisonError};

use super::KvSizes;
use super::plan::{Cut, Plan, TILE_ROWS, TilePlan};
use super::tile::{Attend, HeadsMut, Part, Sink, Span, Tile, Workspace, width};
use crate::arch::attention::SoftRow;
use crate::compute::Compute;
use crate::pool::SendPtr;

/// Below this many multiplications a call is cheaper on one thread than shared.
const MIN_SHARED_PRODUCTS: usize = 1 << 16;

/// Memory that calls of [`Compute::attend`] reuse. Grows to the largest call seen and never shrinks.
#[derive(Debug, Default)]
pub struct AttendScratch {
    tiles: Vec<TilePlan>,
    /// Workspaces that no task uses.
    free: Mutex<Vec<Workspace>>,
    /// Results by segment, where segments are tasks: `[part, rows of a tile]` and `[part, rows of a tile, width]`.
    part_rows: Vec<SoftRow>,
    part_sums: Vec<f32>,
}

impl Compute {
    /// `out[token, head] = softmax(scale * query . keys) . values`, over the positions up to the token's own, for the
    /// tokens of `n_spans` spans. `span(i)` is called more than once and gives the same each time; all spans have caches
    /// of one shape, and no two of them share tokens.
    ///
    /// # Panics
    /// When the shapes do not match, or a span is longer than its cache.
    pub fn attend<'s>(
        &self,
        attend: &Attend<'_>,
        n_spans: usize,
        span: &(dyn Fn(usize) -> Span<'s> + Sync),
        out: HeadsMut<'_>,
        scratch: &mut AttendScratch,
    ) {
        if n_spans == 0 {
            return;
        }
        let sizes = span(0).kv.sizes();
        let group = attend.n_heads / sizes.n_heads;
        let n_products = check(attend, sizes, (n_spans, span), &out);
        let n_threads = self.pool().n_threads();
        let shared = n_threads > 1 && n_products >= MIN_SHARED_PRODUCTS;
        let plan = Plan {
            attend,
            group,
            spans: (n_spans, span),
            n_threads,
            shared,
        };
        let cut = plan.cut(&mut scratch.tiles);
        scratch.reserve(n_threads, cut, &span(0), attend.on_values.is_some());
        let sink = Sink {
            per_token: out.per_token,
            per_head: out.per_head,
            values: SendPtr(out.values.as_mut_ptr()),
        };
        let tile = |plan: &TilePlan| Tile {
            table: self.kernels().table().attention,
            attend,
            span: span(plan.span),
            head: plan.head,
            group,
            rows: plan.rows.clone(),
        };
        if cut.by_segment {
            let width = width(span(0).kv);
            scratch.run_parts(self, cut.tile_rows, width, &tile, &sink);
            return;
        }
        let (tiles, free) = (&scratch.tiles, &scratch.free);
        let task = |i: usize| {
            with_workspace(free, |memory| {
                // SAFETY: tiles are disjoint, and so are the outputs of their rows, as was checked.
                unsafe { tile(&tiles[i]).run(memory, &sink) };
            });
        };
        if shared {
            self.pool().run(tiles.len(), &task);
        } else {
            (0..tiles.len()).for_each(task);
        }
    }
}

/// Compares the shapes; returns about how many multiplications the call takes.
fn check<'s>(
    attend: &Attend<'_>,
    sizes: KvSizes,
    (n_spans, span): (usize, &(dyn Fn(usize) -> Span<'s> + Sync)),
    out: &HeadsMut<'_>,
) -> usize {
    assert!(
        attend.n_heads.is_multiple_of(sizes.n_heads) && attend.n_heads > 0,
        "{} heads of queries for {} of keys",
        attend.n_heads,
        sizes.n_heads
    );
    assert!(sizes.key_dim > 0 && sizes.value_dim > 0, "keys and values");
    assert!(
        attend.window != Some(0),
        "a window of at least one position"
    );
    let n_sinks = attend.sinks.map_or(attend.n_heads, <[f32]>::len);
    assert_eq!(n_sinks, attend.n_heads, "a sink per head");
    let (mut n_tokens, mut n_products) = (0, 0);
    for i in 0..n_spans {
        let span = span(i);
        assert_eq!(span.kv.sizes(), sizes, "caches of one shape");
        assert!(
            span.position + span.n_tokens <= span.kv.n_positions(),
            "positions {} to {} of a cache of {}",
            span.position,
            span.position + span.n_tokens,
            span.kv.n_positions()
        );
        assert!(span.first >= n_tokens, "spans in order, sharing no token");
        n_tokens = span.first + span.n_tokens;
        let n_seen = attend.window.unwrap_or(usize::MAX);
        n_products += span.n_tokens * n_seen.min(span.position + span.n_tokens);
    }
    let fits = |len: usize, per_token: usize, per_head: usize, n: usize| {
        n_tokens == 0 || (n_tokens - 1) * per_token + (attend.n_heads - 1) * per_head + n <= len
    };
    let reads = |heads: &super::Heads<'_>, n: usize| {
        assert!(
            fits(heads.values.len(), heads.per_token, heads.per_head, n),
            "queries of {n_tokens} tokens"
        );
    };
    reads(&attend.on_keys, sizes.key_dim);
    if let Some(heads) = &attend.on_values {
        reads(heads, sizes.value_dim);
    }
    let (per_token, per_head) = (out.per_token, out.per_head);
    assert!(
        fits(out.values.len(), per_token, per_head, sizes.value_dim),
        "outputs of {n_tokens} tokens"
    );
    let by_token = per_head >= sizes.value_dim && per_token >= attend.n_heads * per_head;
    let by_head = per_token >= sizes.value_dim && per_head >= n_tokens * per_token;
    assert!(by_token || by_head, "outputs that do not overlap");
    n_products * attend.n_heads * (sizes.key_dim + sizes.value_dim)
}

impl AttendScratch {
    /// Workspaces for every thread, and room for parts of a full cache, so that growing contexts allocate nothing.
    fn reserve(&mut self, n_threads: usize, cut: Cut, span: &Span<'_>, latent: bool) {
        let n_rows = cut.most_parts * TILE_ROWS;
        if self.part_rows.len() < n_rows {
            self.part_rows.resize(n_rows, SoftRow::START);
        }
        let n_sums = n_rows * width(span.kv);
        if self.part_sums.len() < n_sums {
            self.part_sums.resize(n_sums, 0.0);
        }
        let free = self.free.get_mut().unwrap_or_else(PoisonError::into_inner);
        while free.len() < n_threads {
            free.push(Workspace::default());
        }
        for workspace in free {
            workspace.reserve(TILE_ROWS, span.kv, latent);
        }
    }

    /// Computes segments as tasks, then joins them tile by tile.
    fn run_parts<'t>(
        &mut self,
        compute: &Compute,
        tile_rows: usize,
        width: usize,
        tile: &(dyn Fn(&TilePlan) -> Tile<'t> + Sync),
        sink: &Sink,
    ) {
        let tiles = self.tiles.as_slice();
        let n_parts = tiles
            .last()
            .map_or(0, |last| last.first_part + last.segments.len());
        let part_len = tile_rows * width;
        assert!(
            self.part_rows.len() >= n_parts * tile_rows
                && self.part_sums.len() >= n_parts * part_len,
            "memory was reserved"
        );
        let rows = SendPtr(self.part_rows.as_mut_ptr());
        let sums = SendPtr(self.part_sums.as_mut_ptr());
        let part = |index: usize, n_rows: usize| {
            // SAFETY: parts are disjoint and inside of both buffers, and a part is used by one task at a time.
            unsafe {
                let rows = rows.get().add(index * tile_rows);
                let sums = sums.get().add(index * part_len);
                Part {
                    rows: std::slice::from_raw_parts_mut(rows, n_rows),
                    sums: std::slice::from_raw_parts_mut(sums, n_rows * width),
                }
            }
        };
        let free = &self.free;
        compute.pool().run(n_parts, &|i| {
            let plan = &tiles[tiles.partition_point(|plan| plan.first_part <= i) - 1];
            let tile = tile(plan);
            with_workspace(free, |memory| {
                tile.load(memory);
                let segment = plan.segments.start + i - plan.first_part;
                tile.compute(segment, memory, &mut part(i, plan.rows.len()));
            });
        });
        compute.pool().run(tiles.len(), &|i| {
            let plan = &tiles[i];
            let tile = tile(plan);
            with_workspace(free, |memory| {
                memory.joined.start(&tile);
                for (at, segment) in plan.segments.clone().enumerate() {
                    let part = part(plan.first_part + at, plan.rows.len());
                    memory.joined.add(&tile, segment, &part);
                }
                // SAFETY: tiles are disjoint, and so are the outputs of their rows, as was checked.
                unsafe { memory.joined.write(&tile, sink) };
            });
        });
    }
}

/// Lends a workspace: there is one per thread, and a task runs on one.
fn with_workspace(free: &Mutex<Vec<Workspace>>, task: impl FnOnce(&mut Workspace)) {
    let lock = || free.lock().unwrap_or_else(PoisonError::into_inner);
    let mut memory = lock().pop().expect("a workspace per thread");
    task(&mut memory);
    lock().push(memory);
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::attention::{Heads, KvFormat, KvFormats, KvLayer};
    use crate::isa::Isa;
    use crate::samples::noise;
    use crate::table::Kernels;

    /// Largest error of an output against an f64 softmax over what the cache holds, relative to the largest value:
    /// scores of magnitude 30 are off by 30 ulps, which their exponentials inherit.
    const ERROR: f64 = 2e-5;

    /// One sequence and what is asked of it.
    #[derive(Clone)]
    struct Case {
        n_heads: usize,
        sizes: KvSizes,
        formats: KvFormats,
        n_positions: usize,
        window: Option<usize>,
        sinks: Option<Vec<f32>>,
        latent: bool,
        q: Vec<f32>,
        q_values: Vec<f32>,
        keys: Vec<f32>,
        values: Vec<f32>,
    }

    impl Case {
        fn new(n_heads: usize, sizes: [usize; 3], n_positions: usize) -> Self {
            let [n_kv, key_dim, value_dim] = sizes;
            let sharp: Vec<f32> = noise(n_positions * n_heads * key_dim, 1);
            Self {
                n_heads,
                sizes: KvSizes {
                    n_heads: n_kv,
                    key_dim,
                    value_dim,
                },
                formats: KvFormats::default(),
                n_positions,
                window: None,
                sinks: None,
                latent: false,
                q: sharp.into_iter().map(|v| 4.0 * v).collect(),
                q_values: noise(n_positions * n_heads * value_dim, 2),
                keys: noise(n_positions * n_kv * key_dim, 3),
                values: noise(n_positions * n_kv * value_dim, 4),
            }
        }

        fn format(self, format: KvFormat) -> Self {
            let formats = KvFormats {
                keys: format,
                values: format,
            };
            Self { formats, ..self }
        }

        fn window(self, window: usize) -> Self {
            let window = Some(window);
            Self { window, ..self }
        }

        fn sinks(self) -> Self {
            let sinks = (0..self.n_heads).map(|head| head as f32 * 3.0 - 4.0);
            let sinks = Some(sinks.collect());
            Self { sinks, ..self }
        }

        fn latent(self) -> Self {
            Self {
                latent: true,
                ..self
            }
        }

        fn scale(&self) -> f32 {
            1.0 / (self.sizes.key_dim as f32).sqrt()
        }

        fn store(&self, kv: &mut KvLayer, positions: Range<usize>) {
            let KvSizes {
                n_heads,
                key_dim,
                value_dim,
            } = self.sizes;
            for position in positions {
                for head in 0..n_heads {
                    let row = position * n_heads + head;
                    let key = &self.keys[row * key_dim..][..key_dim];
                    let value = &self.values[row * value_dim..][..value_dim];
                    kv.store(head, position, key, value);
                }
            }
        }

        fn layer(&self, kernels: Kernels) -> KvLayer {
            KvLayer::new(kernels, self.sizes, self.formats, self.n_positions)
        }

        fn attend(&self) -> Attend<'_> {
            let heads = |values, width| Heads {
                values,
                per_token: self.n_heads * width,
                per_head: width,
            };
            Attend {
                n_heads: self.n_heads,
                on_keys: heads(&self.q, self.sizes.key_dim),
                on_values: self
                    .latent
                    .then(|| heads(&self.q_values, self.sizes.value_dim)),
                scale: self.scale(),
                sinks: self.sinks.as_deref(),
                window: self.window,
            }
        }

        fn width(&self) -> usize {
            self.n_heads * self.sizes.value_dim
        }

        /// The outputs of all positions, computed in chunks that end at `ends`.
        fn run(&self, compute: &Compute, ends: &[usize]) -> Vec<f32> {
            let (mut kv, mut from) = (self.layer(compute.kernels()), 0);
            let mut scratch = AttendScratch::default();
            let mut out = vec![f32::NAN; self.n_positions * self.width()];
            for &to in ends {
                self.store(&mut kv, from..to);
                self.ask(compute, &kv, from..to, &mut scratch, &mut out);
                from = to;
            }
            out
        }

        fn ask(
            &self,
            compute: &Compute,
            kv: &KvLayer,
            positions: Range<usize>,
            scratch: &mut AttendScratch,
            out: &mut [f32],
        ) {
            let span = |_| Span {
                kv,
                position: positions.start,
                first: positions.start,
                n_tokens: positions.len(),
            };
            let out = HeadsMut {
                values: out,
                per_token: self.width(),
                per_head: self.sizes.value_dim,
            };
            compute.attend(&self.attend(), 1, &span, out, scratch);
        }

        /// What the cache makes of `numbers`.
        fn stored(&self, numbers: &[f32], format: KvFormat, width: usize) -> Vec<f64> {
            let rows = numbers.chunks(width).flat_map(|row| row.chunks(32));
            let read = |group: &[f32]| -> Vec<f64> {
                let d = group.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
                let rounded = f64::from(half::f16::from_f32(d).to_f32());
                let one = |v: &f32| match format {
                    KvFormat::F32 => f64::from(*v),
                    KvFormat::F16 => f64::from(half::f16::from_f32(*v).to_f32()),
                    KvFormat::Q8_0 => f64::from((v / d).round_ties_even()) * rounded,
                };
                group.iter().map(one).collect()
            };
            rows.flat_map(read).collect()
        }

        fn expected(&self) -> Vec<f64> {
            let KvSizes {
                n_heads: n_kv,
                key_dim,
                value_dim,
            } = self.sizes;
            let keys = self.stored(&self.keys, self.formats.keys, key_dim);
            let values = self.stored(&self.values, self.formats.values, value_dim);
            let dot = |a: &[f32], b: &[f64]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum()
            };
            let mut out = Vec::new();
            for row in 0..self.n_positions * self.n_heads {
                let (position, head) = (row / self.n_heads, row % self.n_heads);
                let stored = head / (self.n_heads / n_kv);
                let from = self
                    .window
                    .map_or(0, |window| (position + 1).saturating_sub(window));
                let at = |j: usize| j * n_kv + stored;
                let score = |j: usize| {
                    let mut score = dot(
                        &self.q[row * key_dim..][..key_dim],
                        &keys[at(j) * key_dim..],
                    );
                    if self.latent {
                        let q = &self.q_values[row * value_dim..][..value_dim];
                        score += dot(q, &values[at(j) * value_dim..]);
                    }
                    (score * f64::from(self.scale())).exp()
                };
                let weights: Vec<f64> = (from..=position).map(score).collect();
                let sink = self
                    .sinks
                    .as_ref()
                    .map_or(0.0, |sinks| f64::from(sinks[head]).exp());
                let total = weights.iter().sum::<f64>() + sink;
                out.extend((0..value_dim).map(|c| {
                    let parts = weights.iter().enumerate();
                    parts
                        .map(|(i, w)| w * values[at(from + i) * value_dim + c])
                        .sum::<f64>()
                        / total
                }));
            }
            out
        }
    }

    fn cases() -> Vec<Case> {
        let mut cases = vec![
            Case::new(1, [1, 3, 3], 5),
            Case::new(4, [2, 8, 8], 70),
            Case::new(6, [2, 64, 64], 131),
            Case::new(2, [2, 80, 80], 66).sinks(),
            Case::new(8, [1, 96, 96], 40).window(7),
            Case::new(3, [3, 128, 128], 140).window(64).sinks(),
            Case::new(9, [1, 256, 256], 20),
            Case::new(2, [1, 5, 7], 1100),
            Case::new(2, [1, 8, 8], 1100).window(1050).sinks(),
            Case::new(5, [1, 16, 40], 150).latent(),
            Case::new(17, [1, 10, 33], 70).latent(),
        ];
        for format in [KvFormat::F16, KvFormat::Q8_0] {
            cases.push(Case::new(6, [2, 64, 64], 70).format(format));
            cases.push(Case::new(3, [1, 40, 40], 70).format(format).window(5));
            cases.push(Case::new(5, [1, 16, 40], 100).latent().format(format));
        }
        cases
    }

    fn computes() -> impl Iterator<Item = Compute> {
        let isas = Isa::available().into_iter();
        isas.map(|isa| Compute::new(Kernels::for_isa(isa).unwrap(), 2))
    }

    #[test]
    fn outputs_agree_with_an_f64_softmax_on_every_isa() {
        for case in cases() {
            let expected = case.expected();
            for compute in computes() {
                let got = case.run(&compute, &[case.n_positions]);
                for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    assert!(
                        (f64::from(*got) - expected).abs() <= ERROR,
                        "{compute:?} {:?} {:?}, {at}: {got} {expected}",
                        case.sizes,
                        case.formats
                    );
                }
            }
        }
    }

    #[test]
    fn neither_chunks_nor_threads_change_a_bit() {
        for case in cases() {
            let n = case.n_positions;
            for isa in Isa::available() {
                let kernels = Kernels::for_isa(isa).unwrap();
                let bits = |n_threads, ends: &[usize]| -> Vec<u32> {
                    let compute = Compute::new(kernels, n_threads);
                    let out = case.run(&compute, ends);
                    out.into_iter().map(f32::to_bits).collect()
                };
                let one_by_one: Vec<usize> = (1..=n).collect();
                let expected = bits(1, &one_by_one);
                for (n_threads, ends) in [
                    (1, vec![n]),
                    (2, vec![n / 3, n / 2, n]),
                    (5, vec![n]),
                    (5, vec![n - 1, n]),
                ] {
                    assert!(
                        bits(n_threads, &ends) == expected,
                        "{isa} {:?} {:?}: {n_threads} threads, {ends:?}",
                        case.sizes,
                        case.formats
                    );
                }
            }
        }
    }

    #[test]
    fn sequences_together_are_sequences_alone() {
        let case = Case::new(4, [2, 24, 24], 300);
        for compute in computes() {
            let expected = case.run(&compute, &[300]);
            let mut kv = case.layer(compute.kernels());
            case.store(&mut kv, 0..300);
            // Three spans, as if of three sequences that begin alike, with a gap between the rows of two of them.
            let ranges = [(0..5), (40..41), (100..300)];
            let span = |i: usize| Span {
                kv: &kv,
                position: ranges[i].start,
                first: ranges[i].start,
                n_tokens: ranges[i].len(),
            };
            let mut out = vec![9.0; expected.len()];
            let heads = HeadsMut {
                values: &mut out,
                per_token: case.width(),
                per_head: 24,
            };
            let mut scratch = AttendScratch::default();
            compute.attend(&case.attend(), 3, &span, heads, &mut scratch);
            for (token, (got, expected)) in out.chunks(96).zip(expected.chunks(96)).enumerate() {
                match ranges.iter().any(|range| range.contains(&token)) {
                    true => assert_eq!(got, expected, "{compute:?} {token}"),
                    false => assert_eq!(got, [9.0; 96], "not asked for"),
                }
            }
        }
    }

    #[test]
    fn what_is_not_seen_cannot_reach_a_query_and_what_is_does() {
        for format in KvFormat::ALL {
            for group in [1, 8] {
                let mut case = Case::new(group, [1, 32, 32], 200).format(format).window(90);
                let expected: Vec<Vec<f32>> = computes().map(|c| case.run(&c, &[200])).collect();
                case.keys[120 * 32] = f32::NAN;
                case.values[120 * 32 + 1] = f32::INFINITY;
                for (compute, expected) in computes().zip(&expected) {
                    let got = case.run(&compute, &[200]);
                    let tokens = got.chunks(case.width()).zip(expected.chunks(case.width()));
                    for (token, (got, expected)) in tokens.enumerate() {
                        match token {
                            120.. => assert!(got.iter().all(|v| v.is_nan()), "{token}"),
                            _ => assert_eq!(got, expected, "{compute:?} {format} {token}"),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn queries_by_head_are_queries_by_token() {
        let case = Case::new(4, [1, 8, 8], 50).latent();
        let by_head = |values: &[f32]| -> Vec<f32> {
            let row = |i: usize| (i % 50 * 4 + i / 50) * 8;
            (0..200)
                .flat_map(|i| values[row(i)..][..8].to_vec())
                .collect()
        };
        let (q, q_values) = (by_head(&case.q), by_head(&case.q_values));
        let heads = |values| Heads {
            values,
            per_token: 8,
            per_head: 50 * 8,
        };
        for compute in computes() {
            let mut kv = case.layer(compute.kernels());
            case.store(&mut kv, 0..50);
            let attend = Attend {
                on_keys: heads(&q),
                on_values: Some(heads(&q_values)),
                ..case.attend()
            };
            let span = |_| Span {
                kv: &kv,
                position: 0,
                first: 0,
                n_tokens: 50,
            };
            let mut out = vec![0.0; 50 * 32];
            let heads = HeadsMut {
                values: &mut out,
                per_token: 8,
                per_head: 50 * 8,
            };
            compute.attend(&attend, 1, &span, heads, &mut AttendScratch::default());
            assert_eq!(out, by_head(&case.run(&compute, &[50])));
        }
    }
}
