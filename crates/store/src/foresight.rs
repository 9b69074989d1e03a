//! What a pass will want of every layer, told before its first one: for models whose router does not wait for the layers.
//!
//! Source: Read-ME (arXiv 2410.19123). What is certain is read as soon as there is memory to read into, in the order of the
//! layers, and what is cached and will be wanted makes no room for anything else until then: as far as a pass is known,
//! that is Belady's rule, since everything else is wanted in the next pass at the earliest.

use std::sync::MutexGuard;

use crate::expert::ExpertId;
use crate::form::Form;
use crate::inner::Inner;

/// Takes what each layer of the next pass will want. When it is dropped, reading begins.
pub struct Foresight<'a, F: Form> {
    form: &'a F,
    inner: MutexGuard<'a, Inner<F>>,
}

impl<'a, F: Form> Foresight<'a, F> {
    /// Forgets what an earlier pass was told.
    pub(crate) fn new(form: &'a F, mut inner: MutexGuard<'a, Inner<F>>) -> Self {
        for experts in &mut inner.foreseen {
            experts.clear();
        }
        for slot in &mut inner.slots {
            slot.awaited = false;
        }
        Self { form, inner }
    }

    /// Sets for every expert of `layer` whether it is in memory.
    pub fn mark_cached(&self, layer: u16, is_cached: &mut [bool]) {
        self.inner.mark_cached(layer, is_cached);
    }

    /// `layer` will want `experts`, and no others.
    pub fn wants(&mut self, layer: u16, experts: &[u16]) {
        let inner = &mut *self.inner;
        inner.ahead.foresee(layer, experts);
        if !inner.ahead.is_exact() {
            return;
        }
        for expert in experts {
            let id = ExpertId {
                layer,
                expert: *expert,
            };
            if let Some(slot) = inner.cache.slot_of(id) {
                inner.slots[slot].awaited = true;
            }
        }
        let foreseen = &mut inner.foreseen[usize::from(layer)];
        foreseen.clear();
        foreseen.extend_from_slice(experts);
        // In the order of the file, which a disk likes best.
        foreseen.sort_unstable();
    }
}

impl<F: Form> Drop for Foresight<'_, F> {
    fn drop(&mut self) {
        self.inner.expected.clear();
        self.inner.expect_foreseen(0);
        self.inner.feed(self.form);
    }
}

impl<F: Form> Inner<F> {
    /// Expects what the layers from `layer` on will want and is not there, as far as there is memory to read it into.
    pub(crate) fn expect_foreseen(&mut self, layer: u16) {
        let room = self.staging.n_buffers();
        for (layer, experts) in (0u16..).zip(&self.foreseen).skip(usize::from(layer)) {
            for expert in experts {
                if self.expected.len() == room {
                    return;
                }
                let id = ExpertId {
                    layer,
                    expert: *expert,
                };
                if self.cache.slot_of(id).is_none() && self.staging.of(id).is_none() {
                    self.expected.push_back(id);
                }
            }
        }
    }
}
