//! Several sequences that are computed together, and where their rows lie in a pass.

use crate::model::Logits;
use crate::session::Session;

/// One sequence of a batch: the session that holds it, the tokens that follow, and which of their logits are wanted.
///
/// Sequences of one batch need not be alike: one may read a long piece of its prompt while others each read the token
/// that they drew last.
#[derive(Debug)]
pub struct Sequence<'a> {
    /// What the sequence remembers.
    pub session: &'a mut Session,
    /// Its next tokens; none are fine.
    pub tokens: &'a [u32],
    /// Positions of `tokens` whose logits are wanted.
    pub want: Logits,
}

impl Sequence<'_> {
    /// Rows of logits that it gets.
    #[must_use]
    pub fn n_logits(&self) -> usize {
        self.want.n_rows(self.tokens.len())
    }

    pub(crate) fn span(&self, first_row: usize) -> Span {
        Span {
            first_row,
            n_rows: self.tokens.len(),
            position: self.session.position,
            n_ctx: self.session.n_ctx,
        }
    }
}

/// The rows of one sequence in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first_row: usize,
    pub(crate) n_rows: usize,
    /// Position in the sequence of the first row.
    pub(crate) position: usize,
    /// Positions that the session can hold, on which some rotations depend.
    pub(crate) n_ctx: usize,
}

impl Span {
    pub(crate) fn end(&self) -> usize {
        self.first_row + self.n_rows
    }

    /// Position in the sequence of row `row` of the pass.
    pub(crate) fn position_of(&self, row: usize) -> usize {
        self.position + row - self.first_row
    }

    /// The span of the last `n` rows, when they start at `first_row`.
    pub(crate) fn last(&self, n: usize, first_row: usize) -> Self {
        Self {
            first_row,
            n_rows: n,
            position: self.position + self.n_rows - n,
            n_ctx: self.n_ctx,
        }
    }
}

/// Rows of all spans, which lie one after the other.
pub(crate) fn n_rows(spans: &[Span]) -> usize {
    spans.last().map_or(0, Span::end)
}

/// The sequence that row `row` belongs to, and its span. The row exists.
pub(crate) fn span_of(spans: &[Span], row: usize) -> (usize, Span) {
    // Of spans that start at the same row only the last is not empty.
    let sequence = spans.partition_point(|span| span.first_row <= row) - 1;
    (sequence, spans[sequence])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first_row: usize, n_rows: usize, position: usize) -> Span {
        Span {
            first_row,
            n_rows,
            position,
            n_ctx: 100,
        }
    }

    #[test]
    fn rows_find_their_sequence() {
        let spans = [span(0, 0, 5), span(0, 3, 7), span(3, 0, 1), span(3, 1, 9)];
        assert_eq!(n_rows(&spans), 4);
        assert_eq!(n_rows(&[]), 0);
        let found = |row| {
            let (sequence, span) = span_of(&spans, row);
            (sequence, span.position_of(row))
        };
        assert_eq!(found(0), (1, 7));
        assert_eq!(found(2), (1, 9));
        assert_eq!(found(3), (3, 9));
        assert_eq!(spans[1].last(1, 0), span(0, 1, 9));
        assert_eq!(spans[1].last(0, 2), span(2, 0, 10));
    }
}
