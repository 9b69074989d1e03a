//! Keys and values of one layer of one sequence: pages of 64 positions, taken as the sequence grows.

use super::KvFormats;
use super::page::{KV_PAGE, KvMemory, KvPage};
use crate::arch::attention::Panels;
use crate::table::Kernels;

/// Sizes of what a layer stores per position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSizes {
    /// Heads that are stored; 1 where all share (latent attention).
    pub n_heads: usize,
    /// Width of a key; of latent attention, of its rotary part.
    pub key_dim: usize,
    /// Width of a value; of latent attention, of the latent that keys and values come from.
    pub value_dim: usize,
}

/// Keys and values of one layer. Which positions are valid is the owner's business.
#[derive(Debug)]
pub struct KvLayer {
    kernels: Kernels,
    sizes: KvSizes,
    formats: KvFormats,
    n_positions: usize,
    /// Position `p` is in page `p / 64`; `None` until something is stored there.
    pages: Vec<Option<KvPage>>,
    memory: KvMemory,
}

impl KvLayer {
    /// Room for `n_positions`. A page is taken from the system when something is first stored in it.
    pub fn new(kernels: Kernels, sizes: KvSizes, formats: KvFormats, n_positions: usize) -> Self {
        Self {
            kernels,
            sizes,
            formats,
            n_positions,
            pages: vec![None; n_positions.div_ceil(KV_PAGE)],
            memory: KvMemory::default(),
        }
    }

    /// Counts pages that are taken from now on in `memory`.
    pub fn count_in(&mut self, memory: &KvMemory) {
        self.memory = memory.clone();
    }

    /// What is stored per position.
    pub fn sizes(&self) -> KvSizes {
        self.sizes
    }

    /// Positions that fit.
    pub fn n_positions(&self) -> usize {
        self.n_positions
    }

    /// The formats of keys and values.
    pub fn formats(&self) -> KvFormats {
        self.formats
    }

    /// Bytes of one page.
    pub fn page_bytes(&self) -> usize {
        KvPage::bytes_of(self.sizes, self.formats)
    }

    /// Bytes when every position has been stored.
    pub fn n_bytes(&self) -> usize {
        self.pages.len() * self.page_bytes()
    }

    /// The page of positions `64 * index` to `64 * index + 63`, if something was stored there.
    pub fn page(&self, index: usize) -> Option<&KvPage> {
        self.pages.get(index)?.as_ref()
    }

    /// Puts a page in place of another.
    ///
    /// # Panics
    /// When there is no such place, or the page is of other sizes or formats.
    pub fn set_page(&mut self, index: usize, page: KvPage) {
        assert!(
            page.sizes() == self.sizes && page.formats() == self.formats,
            "a page of {:?} for a cache of {:?}",
            page.sizes(),
            self.sizes
        );
        self.pages[index] = Some(page);
    }

    /// Gives up the pages that hold nothing before `position`.
    pub fn release_from(&mut self, position: usize) {
        let first = position.div_ceil(KV_PAGE).min(self.pages.len());
        self.pages[first..].fill(None);
    }

    /// Pages that storing `n` positions from `position` on would take from the system: those that are missing, and
    /// those that others hold, too.
    pub fn n_pages_to_take(&self, position: usize, n: usize) -> usize {
        let to = (position + n).min(self.n_positions).div_ceil(KV_PAGE);
        let from = (position / KV_PAGE).min(to);
        let is_own = |page: &&Option<KvPage>| page.as_ref().is_some_and(|page| !page.is_shared());
        to - from - self.pages[from..to].iter().filter(is_own).count()
    }

    /// Stores the key and value of `head` at `position`.
    ///
    /// # Panics
    /// When head or position is out of range, or the widths are not those of the cache.
    pub fn store(&mut self, head: usize, position: usize, key: &[f32], value: &[f32]) {
        let KvSizes {
            n_heads,
            key_dim,
            value_dim,
        } = self.sizes;
        assert!(
            head < n_heads && position < self.n_positions,
            "head {head} of {n_heads}, position {position} of {}",
            self.n_positions
        );
        assert_eq!(key.len(), key_dim, "a key of the cache's width");
        assert_eq!(value.len(), value_dim, "a value of the cache's width");
        let (sizes, formats, memory) = (self.sizes, self.formats, &self.memory);
        let page = self.pages[position / KV_PAGE]
            .get_or_insert_with(|| KvPage::new(sizes, formats, memory));
        page.store(self.kernels, (head, position % KV_PAGE), key, value);
    }

    /// Panels of keys of the page that `position` is in: four of `key_dim` steps.
    pub(super) fn key_panels(&self, head: usize, position: usize) -> Panels {
        self.panels(position, |page| page.key_panels(head))
    }

    /// Panels of values of the same page: one of 64 steps per 16 dimensions.
    pub(super) fn value_panels(&self, head: usize, position: usize) -> Panels {
        self.panels(position, |page| page.value_panels(head))
    }

    /// Panels of a page, which know those of the page that follows: that is what is read next.
    fn panels(&self, position: usize, of: impl Fn(&KvPage) -> Panels) -> Panels {
        let panels = of(self.stored(position));
        match self.page(position / KV_PAGE + 1) {
            None => panels,
            Some(page) => Panels {
                next: of(page).data,
                ..panels
            },
        }
    }

    fn stored(&self, position: usize) -> &KvPage {
        let page = self.pages[position / KV_PAGE].as_ref();
        page.expect("what a token sees was stored before")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::KvFormat;

    const SIZES: KvSizes = KvSizes {
        n_heads: 2,
        key_dim: 48,
        value_dim: 20,
    };

    fn layer(format: KvFormat, memory: &KvMemory) -> KvLayer {
        let formats = KvFormats {
            keys: format,
            values: format,
        };
        let mut layer = KvLayer::new(Kernels::detect(), SIZES, formats, 200);
        layer.count_in(memory);
        layer
    }

    fn fill(layer: &mut KvLayer, positions: std::ops::Range<usize>, number: f32) {
        for position in positions {
            for head in 0..SIZES.n_heads {
                layer.store(head, position, &[number; 48], &[number; 20]);
            }
        }
    }

    #[test]
    fn pages_are_taken_when_they_are_needed_and_counted_once() {
        for format in KvFormat::ALL {
            let memory = KvMemory::default();
            let (mut one, mut other) = (layer(format, &memory), layer(format, &memory));
            let page = one.page_bytes();
            assert_eq!((one.n_bytes(), memory.n_bytes()), (4 * page, 0));
            assert_eq!(one.n_pages_to_take(0, 65), 2);
            fill(&mut one, 0..65, 1.0);
            assert_eq!(memory.n_bytes(), 2 * page);
            assert_eq!(one.page(0).unwrap().n_bytes(), page);
            assert_eq!(
                (one.n_pages_to_take(65, 63), one.n_pages_to_take(65, 64)),
                (0, 1)
            );
            other.set_page(0, one.page(0).unwrap().clone());
            assert_eq!(memory.n_bytes(), 2 * page);
            // The last page ends with the cache.
            assert_eq!(other.n_pages_to_take(64, 1000), 3);
            one.release_from(64);
            assert_eq!(memory.n_bytes(), page);
            drop(one);
            assert_eq!(memory.n_bytes(), page, "the other one holds it");
            drop(other);
            assert_eq!(memory.n_bytes(), 0);
        }
    }

    #[test]
    fn a_page_that_others_hold_is_copied_before_it_is_written_to() {
        let memory = KvMemory::default();
        let (mut one, mut other) = (layer(KvFormat::F32, &memory), layer(KvFormat::F32, &memory));
        fill(&mut one, 0..64, 1.0);
        other.set_page(0, one.page(0).unwrap().clone());
        assert_eq!(other.n_pages_to_take(10, 5), 1);
        fill(&mut other, 10..15, 2.0);
        assert_eq!(other.n_pages_to_take(10, 5), 0);
        assert_eq!(memory.n_bytes(), 2 * one.page_bytes());
        let key = |layer: &KvLayer, position: usize| {
            let panels = layer.key_panels(1, position);
            // SAFETY: a page has four panels of 48 steps of 16 numbers.
            let keys = unsafe { std::slice::from_raw_parts(panels.data.cast::<f32>(), 64 * 48) };
            keys[position % 64 / 16 * 48 * 16 + position % 16]
        };
        assert_eq!([key(&one, 9), key(&one, 10), key(&one, 14)], [1.0; 3]);
        assert_eq!(
            [key(&other, 9), key(&other, 10), key(&other, 15)],
            [1.0, 2.0, 1.0]
        );
    }
}
