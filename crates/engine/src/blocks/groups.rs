//! Which tokens each expert computes: the pairs of a routing sorted by expert, and their outputs put together again.

use cadre_kernels::Compute;
use cadre_routing::Routing;

use super::experts::ExpertRows;

/// Which experts a routing uses, and its pairs sorted by expert.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// Experts that have pairs, ascending.
    pub(super) active: Vec<u16>,
    /// Pairs of each expert.
    pub(super) counts: Vec<u32>,
    pub(super) rows: Rows,
}

/// The pairs of a routing sorted by expert; pairs of one expert stay in the order of their tokens.
#[derive(Debug, Default)]
pub(super) struct Rows {
    offsets: Vec<usize>,
    /// Row of each pair of the routing; [`NO_ROW`] for experts that are not computed.
    row_of_pair: Vec<u32>,
    /// Token of each row.
    token_of_row: Vec<u32>,
    /// Next free row of each expert while sorting.
    next: Vec<u32>,
}

/// Who has whose weights, where experts share them.
pub(super) type WeightsOf<'a> = Option<&'a [u16]>;

/// The expert whose weights `expert` has. Null experts have none, and stay behind all others.
pub(super) fn weights(weights_of: WeightsOf<'_>, expert: u16) -> usize {
    let expert = usize::from(expert);
    match weights_of {
        None => expert,
        Some(map) => map.get(expert).map_or(usize::MAX, |id| usize::from(*id)),
    }
}

/// The pick of a token before its `at`-th that has the same weights, if any.
fn earlier(weights_of: WeightsOf<'_>, experts: &[u16], at: usize) -> Option<usize> {
    let map = weights_of?;
    let own = map.get(usize::from(experts[at]))?;
    let mut before = experts[..at].iter();
    before.position(|other| map.get(usize::from(*other)) == Some(own))
}

/// Marks the pair of a null expert, which has no weights and adds nothing.
const NO_ROW: u32 = u32::MAX;

impl Groups {
    pub(super) fn with_capacity(n_pairs: usize, n_experts: usize) -> Self {
        Self {
            active: Vec::with_capacity(n_experts),
            counts: Vec::with_capacity(n_experts),
            rows: Rows {
                offsets: Vec::with_capacity(n_experts + 1),
                row_of_pair: Vec::with_capacity(n_pairs),
                token_of_row: Vec::with_capacity(n_pairs),
                next: Vec::with_capacity(n_experts),
            },
        }
    }

    /// Counts the rows of each expert: its pairs, of which those of one token that share its weights are one row. Ids from
    /// `n_experts` on are null experts.
    pub(super) fn count(
        &mut self,
        (routing, weights_of): (&Routing, WeightsOf<'_>),
        n_experts: usize,
    ) {
        self.counts.clear();
        self.counts.resize(n_experts, 0);
        for (experts, _) in routing.iter() {
            for (at, expert) in experts.iter().enumerate() {
                let own = weights(weights_of, *expert);
                if let Some(count) = self.counts.get_mut(own)
                    && earlier(weights_of, experts, at).is_none()
                {
                    *count += 1;
                }
            }
        }
        self.active.clear();
        let used = (0u16..).zip(&self.counts).filter(|(_, count)| **count > 0);
        self.active.extend(used.map(|(expert, _)| expert));
    }
}

impl Rows {
    pub(super) fn len(&self) -> usize {
        self.token_of_row.len()
    }

    pub(super) fn as_rows(&self) -> ExpertRows<'_> {
        ExpertRows {
            offsets: &self.offsets,
            token_of_row: &self.token_of_row,
        }
    }

    /// Counting sort of the pairs, experts in `order`.
    pub(super) fn lay_out(
        &mut self,
        (routing, weights_of): (&Routing, WeightsOf<'_>),
        order: &[u16],
        counts: &[u32],
    ) {
        self.next.clear();
        self.next.resize(counts.len(), 0);
        self.offsets.clear();
        self.offsets.push(0);
        let mut n_rows = 0;
        for expert in order {
            let expert = usize::from(*expert);
            self.next[expert] = n_rows;
            n_rows += counts[expert];
            self.offsets.push(n_rows as usize);
        }
        self.row_of_pair.clear();
        self.token_of_row.clear();
        self.token_of_row.resize(n_rows as usize, 0);
        for (t, (experts, _)) in (0u32..).zip(routing.iter()) {
            let first = self.row_of_pair.len();
            for (at, expert) in experts.iter().enumerate() {
                let mut row = NO_ROW;
                if let Some(before) = earlier(weights_of, experts, at) {
                    row = self.row_of_pair[first + before];
                } else if let Some(next) = self.next.get_mut(weights(weights_of, *expert)) {
                    row = *next;
                    *next += 1;
                    self.token_of_row[row as usize] = t;
                }
                self.row_of_pair.push(row);
            }
        }
    }
}

/// Adds up each token's experts in the order of its picks.
pub(super) fn combine(
    compute: &Compute,
    routing: &Routing,
    rows: &Rows,
    y_pd: &[f32],
    out_td: &mut [f32],
) {
    let d = out_td.len() / routing.n_tokens().max(1);
    if d == 0 {
        return;
    }
    let kernels = compute.kernels();
    let work = routing.n_pairs().div_ceil(routing.n_tokens()) * d;
    compute.for_each_chunk(out_td, d, work, |t, out| {
        out.fill(0.0);
        let first = routing.offsets()[t] as usize;
        let (_, weights) = routing.token(t);
        for (weight, row) in weights.iter().zip(&rows.row_of_pair[first..]) {
            if *row != NO_ROW {
                kernels.axpy(*weight, &y_pd[*row as usize * d..][..d], out);
            }
        }
    });
}

pub(super) fn output_norms(
    compute: &Compute,
    rows: &Rows,
    y_pd: &[f32],
    d: usize,
    norms: &mut Vec<f32>,
) {
    let kernels = compute.kernels();
    norms.extend(rows.row_of_pair.iter().map(|row| match *row {
        NO_ROW => 0.0,
        row => {
            let y = &y_pd[row as usize * d..][..d];
            kernels.dot(y, y).sqrt()
        }
    }));
}

#[cfg(test)]
mod tests {
    use cadre_kernels::Kernels;

    use super::*;

    #[test]
    fn null_experts_get_no_row() {
        let mut routing = Routing::new();
        routing.push_token(&[2, 7], &[0.5, 0.0]);
        routing.push_token(&[], &[]);
        routing.push_token(&[0, 2], &[0.25, 0.75]);
        let mut groups = Groups::default();
        groups.count((&routing, None), 3);
        assert_eq!(groups.active, [0, 2]);
        let Groups { rows, counts, .. } = &mut groups;
        rows.lay_out((&routing, None), &[0, 2], counts);
        assert_eq!(rows.offsets, [0, 1, 3]);
        assert_eq!(rows.row_of_pair, [1, NO_ROW, 0, 2]);
        assert_eq!(rows.token_of_row, [2, 0, 2]);

        let compute = Compute::new(Kernels::detect(), 1);
        let mut out = [9.0; 3];
        combine(&compute, &routing, rows, &[1.0, 10.0, 100.0], &mut out);
        assert_eq!(out, [5.0, 0.0, 75.25]);

        // Experts 0 and 2 share the weights of the first stored one, 1 has its own, and 3 is null.
        let map: WeightsOf<'_> = Some(&[0, 1, 0]);
        let mut routing = Routing::new();
        routing.push_token(&[2, 0, 3], &[0.5, 0.25, 0.0]);
        routing.push_token(&[1, 2], &[0.5, 1.0]);
        let mut shared = Groups::default();
        shared.count((&routing, map), 2);
        assert_eq!(
            (&shared.active[..], &shared.counts[..]),
            (&[0, 1][..], &[2, 1][..])
        );
        let Groups {
            rows: own,
            counts: n,
            ..
        } = &mut shared;
        own.lay_out((&routing, map), &[0, 1], n);
        assert_eq!(own.row_of_pair, [0, 0, NO_ROW, 2, 1]);
        assert_eq!(own.token_of_row, [0, 1, 1]);
        let mut sums = [9.0; 2];
        combine(&compute, &routing, own, &[4.0, 10.0, 100.0], &mut sums);
        assert_eq!(sums, [3.0, 60.0]);

        // Another order of the experts moves rows and changes no sum.
        let mut routing = Routing::new();
        routing.push_token(&[2, 7], &[0.5, 0.0]);
        routing.push_token(&[], &[]);
        routing.push_token(&[0, 2], &[0.25, 0.75]);
        rows.lay_out((&routing, None), &[2, 0], counts);
        assert_eq!(rows.row_of_pair, [0, NO_ROW, 2, 1]);
        combine(&compute, &routing, rows, &[10.0, 100.0, 1.0], &mut out);
        assert_eq!(out, [5.0, 0.0, 75.25]);
    }
}
