//! What the experts did in a pass, for the sequences of whose jobs that is wanted, and for the counts over all.

use cadre_engine::{Observer, RoutingEvent};
use cadre_routing::Routing;

use super::picks::Picks;
use super::steps::Notes;

/// The experts of consecutive tokens of one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Routed {
    /// Position of the first token in the sequence.
    pub(crate) first: usize,
    pub(crate) tokens: Vec<u32>,
    /// By layer with experts, ascending: the layer, and the picks of every token.
    pub(crate) layers: Vec<(usize, Routing)>,
}

/// Watches a batch.
pub(crate) struct Watch<'a> {
    /// Counts in passes that it has begun to count.
    picks: &'a mut Picks,
    /// By sequence of the batch; `None` where nothing is wanted.
    layers: Vec<Option<Vec<(usize, Routing)>>>,
    /// For the choice of who takes part in the next step.
    notes: Option<Notes<'a>>,
}

impl<'a> Watch<'a> {
    /// For a batch; says of which of its sequences the experts are wanted.
    pub(super) fn new(picks: &'a mut Picks, wanted: &[bool], notes: Option<Notes<'a>>) -> Self {
        let layers = wanted.iter().map(|wanted| wanted.then(Vec::new));
        Self {
            picks,
            layers: layers.collect(),
            notes,
        }
    }

    /// What was seen, by sequence; nothing where it is not wanted.
    pub(crate) fn seen(self) -> impl Iterator<Item = Vec<(usize, Routing)>> {
        self.layers.into_iter().map(Option::unwrap_or_default)
    }
}

impl Observer for Watch<'_> {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        if self.picks.watches() {
            self.picks.routed(event);
        }
        if let Some(notes) = &mut self.notes {
            notes.routed(event);
        }
        if let Some(Some(layers)) = self.layers.get_mut(event.sequence) {
            layers.push((event.layer, event.routing.clone()));
        }
    }

    fn watches(&self) -> bool {
        let is_wanted = self.layers.iter().any(Option::is_some);
        self.picks.watches() || self.notes.is_some() || is_wanted
    }
}
