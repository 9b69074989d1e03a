//! The routing of a pass, told one sequence at a time.

use cadre_routing::Routing;

use super::Step;
use crate::model::RoutingEvent;

/// What a router has said about all rows of a pass.
pub(super) struct Told<'a> {
    /// `[rows, n]`.
    pub(super) logits: &'a [f32],
    pub(super) routing: &'a Routing,
    /// One per pair of `routing`, or empty.
    pub(super) norms: &'a [f32],
    /// Ids from here on are copies of the experts from 0 on, and are told as these; `None` where there are no copies.
    pub(super) copies_from: Option<u16>,
}

impl Told<'_> {
    /// Says the routing of every sequence that has rows; `part` is for those that are not all of the pass.
    pub(super) fn each(
        &self,
        step: Step<'_>,
        part: &mut Routing,
        say: &mut dyn FnMut(&RoutingEvent<'_>),
    ) {
        let (routing, n) = (self.routing, self.logits.len() / step.n_rows().max(1));
        for (sequence, span) in step.spans.iter().enumerate() {
            if span.n_rows == 0 {
                continue;
            }
            let rows = span.first_row..span.end();
            let whole = rows.len() == routing.n_tokens() && self.copies_from.is_none();
            if !whole {
                part.clear();
                for row in rows.clone() {
                    let (experts, weights) = routing.token(row);
                    for (expert, weight) in experts.iter().zip(weights) {
                        let id = self.copies_from.map_or(*expert, |n| expert % n);
                        part.push_pair(id, *weight);
                    }
                    part.end_token();
                }
            }
            let pairs =
                routing.offsets()[rows.start] as usize..routing.offsets()[rows.end] as usize;
            say(&RoutingEvent {
                sequence,
                layer: step.layer,
                first_position: span.position,
                logits: &self.logits[rows.start * n..rows.end * n],
                routing: if whole { routing } else { part },
                norms: self.norms.get(pairs).unwrap_or_default(),
            });
        }
    }
}
