//! Blocks of what a session remembers, which other sessions may hold as well: what a prompt has left in one begins all
//! that begin alike.
//!
//! A block is the keys and values of [`KV_BLOCK`] consecutive tokens in all layers. What is in it follows from the tokens up
//! to its end and from how they were read (the model, the steering, the formats of keys and values), and not from chunks,
//! batches or threads, so that a session that takes it over computes what it would have computed anyway, to the last bit.

use cadre_kernels::{KV_PAGE, KvMemory, KvPage};

use crate::session::Session;

/// Tokens of a block.
pub const KV_BLOCK: usize = KV_PAGE;

/// Keys and values of one block of a sequence, in all layers.
#[derive(Clone, Debug)]
pub struct KvBlock {
    pages: Vec<KvPage>,
}

impl KvBlock {
    /// Whether anybody else holds it.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.pages.iter().any(KvPage::is_shared)
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.pages.iter().map(KvPage::n_bytes).sum()
    }
}

impl Session {
    /// Counts in `memory` what keys and values take from now on.
    pub fn count_kv_in(&mut self, memory: &KvMemory) {
        for layer in &mut self.kv.layers {
            layer.count_in(memory);
        }
    }

    /// The most bytes of keys and values that reading `n` more tokens may take from the system.
    #[must_use]
    pub fn kv_bytes_to_take(&self, n: usize) -> usize {
        self.kv.bytes_to_take(self.position, n)
    }

    /// Block `index`, which begins at token `index * KV_BLOCK`; `None` unless it is full. Sessions whose attention is cut into experts
    /// have none, since their experts hold different tokens.
    #[must_use]
    pub fn block(&self, index: usize) -> Option<KvBlock> {
        let is_full = (index + 1) * KV_BLOCK <= self.position;
        if !is_full || !self.kv.held.is_empty() {
            return None;
        }
        let pages = self
            .kv
            .layers
            .iter()
            .map(|layer| layer.page(index).cloned());
        Some(KvBlock {
            pages: pages.collect::<Option<_>>()?,
        })
    }

    /// Holds `block` in place of its own block `index`, which must be of the same tokens, read in the same way.
    ///
    /// # Panics
    /// When the block is of a session of another model, or there is no such place.
    pub fn set_block(&mut self, index: usize, block: &KvBlock) {
        assert_eq!(
            block.pages.len(),
            self.kv.layers.len(),
            "a block of a session of the same model"
        );
        for (layer, page) in self.kv.layers.iter_mut().zip(&block.pages) {
            layer.set_page(index, page.clone());
        }
    }

    /// Forgets everything, and begins with the tokens of `blocks`.
    ///
    /// # Panics
    /// As [`Session::set_block`].
    pub fn begin_with(&mut self, blocks: &[KvBlock]) {
        self.rewind(0);
        self.give_up_unused();
        for (index, block) in blocks.iter().enumerate() {
            self.set_block(index, block);
        }
        self.position = blocks.len() * KV_BLOCK;
    }

    /// Gives memory back that holds no token of the session, which [`Session::rewind`] keeps.
    pub fn give_up_unused(&mut self) {
        self.kv.release_from(self.position);
    }
}
