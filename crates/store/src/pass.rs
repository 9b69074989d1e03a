//! One layer's turn at the store: its experts come in batches, those in memory first, the others as they are read.

use std::ops::Range;
use std::sync::MutexGuard;

use crate::ahead::Look;
use crate::form::Form;
use crate::inner::Inner;

/// The experts of one layer for one pass. Dropping it ends the pass.
pub struct Pass<'a, F: Form> {
    form: &'a F,
    inner: MutexGuard<'a, Inner<F>>,
    /// The experts that came last.
    batch: Range<usize>,
    /// Of those that were in memory at the start, how many have come.
    n_hits: usize,
    /// Where those that were not, and have come, end in the order.
    n_read: usize,
}

/// Experts from memory that come together: enough to share among threads, and so few that what has been read meanwhile
/// does not wait for long.
const HITS: usize = 8;

impl<'a, F: Form> Pass<'a, F> {
    pub(crate) fn new(form: &'a F, inner: MutexGuard<'a, Inner<F>>) -> Self {
        let n_read = inner.n_hits;
        Self {
            form,
            inner,
            batch: 0..0,
            n_hits: 0,
            n_read,
        }
    }

    /// The experts of the pass, in the order in which they come.
    pub fn order(&self) -> &[u16] {
        &self.inner.order
    }

    /// What is worth finding out about the next layer that has experts.
    pub fn look(&self) -> Look {
        self.inner.look()
    }

    /// Expects all of `experts` in `layer`, a later one: they are read in this order as soon as everything that this pass
    /// wants has been asked for.
    pub fn expect(&mut self, layer: u16, experts: impl Iterator<Item = u16>) {
        self.inner.expect(self.form, layer, experts, usize::MAX);
    }

    /// Says what the router of a later layer answered to the input of this one, the most picked first.
    pub fn give(&mut self, layer: u16, ranked: &[u16]) {
        self.inner.give(self.form, layer, ranked);
    }

    /// Sets for every expert of `layer` whether it is in memory.
    pub fn mark_cached(&self, layer: u16, is_cached: &mut [bool]) {
        self.inner.mark_cached(layer, is_cached);
    }

    /// The next batch: a range of [`Pass::order`], whose experts are in memory until the next call. Batches cover the
    /// order, in whatever sequence suits the disk: what has been read makes room for what has not. `None` after the last.
    ///
    /// # Errors
    /// An expert could not be read or made. Nothing of the pass may be used then.
    pub fn next_batch(&mut self) -> Result<Option<Range<usize>>, F::Error> {
        let (form, inner) = (self.form, &mut *self.inner);
        inner.release(self.batch.clone());
        let from = self.n_read;
        while self.n_read < inner.order.len() {
            if !inner.is_ready(form, self.n_read) {
                if self.n_read > from || self.n_hits < inner.n_hits {
                    break;
                }
                inner.wait(form, self.n_read);
            }
            if !inner.make(form, self.n_read)? {
                break;
            }
            inner.feed(form);
            self.n_read += 1;
        }
        self.batch = from..self.n_read;
        if self.batch.is_empty() {
            let from = self.n_hits;
            // With nothing to wait for, all of them at once share out best among threads.
            let is_last = self.n_read == inner.order.len();
            let until = if is_last { inner.n_hits } else { from + HITS };
            self.n_hits = until.min(inner.n_hits);
            self.batch = from..self.n_hits;
        }
        Ok((!self.batch.is_empty()).then(|| self.batch.clone()))
    }

    /// The expert at `at` of the order, of the current batch.
    pub fn expert(&self, at: usize) -> &F::Expert {
        self.inner.expert(at)
    }
}

impl<F: Form> Drop for Pass<'_, F> {
    fn drop(&mut self) {
        self.inner.end();
    }
}
