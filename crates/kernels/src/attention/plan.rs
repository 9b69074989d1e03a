//! How a call of attention is cut: into tiles, and long contexts into segments where tiles are few.

use std::ops::Range;

use super::SEGMENT;
use super::tile::{Attend, Span};
use crate::arch::attention::{KEY_BLOCK, MAX_ROWS};

/// Rows of a tile: enough that a block of keys and values, once in the nearer caches, is used often.
pub(super) const TILE_ROWS: usize = 32;
/// Tasks per thread that even out threads of unequal speed.
const TASKS_PER_THREAD: usize = 4;
const _: () = assert!(SEGMENT.is_multiple_of(KEY_BLOCK));

/// Which rows of which span and stored head make a tile.
#[derive(Debug)]
pub(super) struct TilePlan {
    pub(super) span: usize,
    pub(super) head: usize,
    pub(super) rows: Range<usize>,
    pub(super) segments: Range<usize>,
    /// Index of the first segment's part.
    pub(super) first_part: usize,
}

/// How a call is cut.
pub(super) struct Plan<'a, 's> {
    pub(super) attend: &'a Attend<'a>,
    pub(super) group: usize,
    pub(super) spans: (usize, &'a (dyn Fn(usize) -> Span<'s> + Sync)),
    pub(super) n_threads: usize,
    /// Whether the threads share this call.
    pub(super) shared: bool,
}

/// What tiles were cut to.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Most rows of one.
    pub(super) tile_rows: usize,
    /// Whether their segments are tasks of their own.
    pub(super) by_segment: bool,
    /// Parts of `TILE_ROWS` that this call or a later one like it may need, when the cache is full.
    pub(super) most_parts: usize,
}

impl Plan<'_, '_> {
    /// Fills `tiles`. The cut changes no bit of a result, so it is free to suit the number of threads.
    pub(super) fn cut(&self, tiles: &mut Vec<TilePlan>) -> Cut {
        let n_parts = self.fill(tiles, TILE_ROWS);
        let mut cut = Cut {
            tile_rows: TILE_ROWS,
            by_segment: false,
            most_parts: 0,
        };
        if self.n_threads == 1 || tiles.len() >= self.n_threads * TASKS_PER_THREAD {
            return cut;
        }
        let spans = (0..self.spans.0).map(|i| self.spans.1(i).kv.n_positions());
        cut.most_parts = tiles.len() * spans.max().unwrap_or(0).div_ceil(SEGMENT);
        cut.by_segment = self.shared && n_parts > tiles.len();
        if self.shared && !cut.by_segment {
            self.fill(tiles, MAX_ROWS);
            cut.tile_rows = MAX_ROWS;
        }
        cut
    }

    /// Tiles of at most `tile_rows` rows, later tokens last: the pool starts with the last, which take longest.
    fn fill(&self, tiles: &mut Vec<TilePlan>, tile_rows: usize) -> usize {
        tiles.clear();
        let mut first_part = 0;
        for i in 0..self.spans.0 {
            let span = self.spans.1(i);
            let n_rows = span.n_tokens * self.group;
            for from in (0..n_rows).step_by(tile_rows) {
                for head in 0..span.kv.sizes().n_heads {
                    let rows = from..n_rows.min(from + tile_rows);
                    let segments = span.segments(self.attend.window, self.group, &rows);
                    let n_segments = segments.len();
                    tiles.push(TilePlan {
                        span: i,
                        head,
                        rows,
                        segments,
                        first_part,
                    });
                    first_part += n_segments;
                }
            }
        }
        first_part
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Heads, KvFormats, KvLayer, KvSizes};
    use crate::table::Kernels;

    /// Tiles, and the cut, of a span of a cache of 4 heads, for 8 heads of queries.
    fn cut(n_threads: usize, position: usize, n_tokens: usize) -> (Vec<TilePlan>, Cut) {
        let sizes = KvSizes {
            n_heads: 4,
            key_dim: 2,
            value_dim: 2,
        };
        let kv = KvLayer::new(Kernels::detect(), sizes, KvFormats::default(), 8 * SEGMENT);
        let attend = Attend {
            n_heads: 8,
            on_keys: Heads {
                values: &[],
                per_token: 0,
                per_head: 0,
            },
            on_values: None,
            scale: 1.0,
            sinks: None,
            window: None,
        };
        let span = |_| Span {
            kv: &kv,
            position,
            first: 0,
            n_tokens,
        };
        let plan = Plan {
            attend: &attend,
            group: 2,
            spans: (1, &span),
            n_threads,
            shared: n_threads > 1,
        };
        let mut tiles = Vec::new();
        let cut = plan.cut(&mut tiles);
        (tiles, cut)
    }

    #[test]
    fn few_tiles_are_cut_by_segment_and_many_are_not() {
        let (tiles, few) = cut(2, 3 * SEGMENT - 1, 1);
        assert!(few.by_segment && tiles.len() == 4);
        assert_eq!(tiles[3].first_part..tiles[3].first_part + 3, 9..12);
        // A full cache has 8 segments.
        assert_eq!(few.most_parts, 4 * 8);
        let (tiles, alone) = cut(1, 3 * SEGMENT - 1, 1);
        assert!(!alone.by_segment && tiles.len() == 4 && alone.most_parts == 0);
        let (tiles, many) = cut(2, 0, 100);
        assert!(!many.by_segment && tiles.len() == 4 * 200usize.div_ceil(TILE_ROWS));
    }

    #[test]
    fn short_calls_for_many_threads_are_cut_finer() {
        let (tiles, cut) = cut(4, 0, 10);
        assert_eq!((cut.tile_rows, cut.by_segment), (MAX_ROWS, false));
        let rows: usize = tiles.iter().map(|tile| tile.rows.len()).sum();
        assert_eq!(rows, 4 * 20);
        assert!(tiles.iter().all(|tile| tile.rows.len() <= MAX_ROWS));
    }
}
