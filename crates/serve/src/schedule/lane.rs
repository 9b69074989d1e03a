//! A lane: one session of a slot, how it is steered, and which of its blocks others can find.

use cadre_engine::{KV_BLOCK, KvBlock, KvMemory, Model, Session, SessionOptions, Steering};

use super::prefixes::{BlockId, Place, Prefixes};

/// What sessions are made of, and what they share.
pub(super) struct Rooms {
    pub(super) options: SessionOptions,
    /// Counts the keys and values of all sessions.
    pub(super) memory: KvMemory,
    pub(super) prefixes: Prefixes,
}

/// A session with its steering.
pub(super) struct Lane {
    pub(super) session: Session,
    pub(super) steering: Steering,
    /// Its first blocks, by what they are known as.
    chain: Vec<BlockId>,
}

impl Rooms {
    /// A new lane, steered as the model is.
    pub(super) fn lane(&self, model: &dyn Model) -> cadre_engine::Result<Lane> {
        let mut session = model.session(&self.options)?;
        session.count_kv_in(&self.memory);
        Ok(Lane {
            session,
            steering: model.info().steering.clone(),
            chain: Vec::new(),
        })
    }
}

impl Lane {
    /// Steers the session, which forgets what it read otherwise.
    pub(super) fn steer(
        &mut self,
        model: &dyn Model,
        steering: &Steering,
    ) -> cadre_engine::Result<()> {
        if *steering != self.steering {
            model.steer(&mut self.session, steering)?;
            self.steering = steering.clone();
            self.rewind(0);
        }
        Ok(())
    }

    /// Forgets the tokens from `position` on, and gives up their memory.
    pub(super) fn rewind(&mut self, position: usize) {
        self.session.rewind(position);
        self.session.give_up_unused();
        self.chain.truncate(position / KV_BLOCK);
    }

    /// Begins with `blocks` in place of what it held.
    pub(super) fn begin_with(&mut self, blocks: &[(BlockId, KvBlock)]) {
        let (ids, blocks): (Vec<_>, Vec<_>) = blocks.iter().cloned().unzip();
        self.session.begin_with(&blocks);
        self.chain = ids;
    }

    /// Makes the blocks known that have become full; `text` is what the session holds.
    pub(super) fn publish(&mut self, text: &[u32], prefixes: &mut Prefixes, now: u64) {
        while let Some(block) = self.session.block(self.chain.len()) {
            let index = self.chain.len();
            let Some(tokens) = text.get(index * KV_BLOCK..(index + 1) * KV_BLOCK) else {
                return;
            };
            let place = Place {
                chain: &self.chain,
                steering: &self.steering,
                tokens,
            };
            let (id, known) = prefixes.put(&place, block, now);
            if let Some(known) = known {
                self.session.set_block(index, &known);
            }
            self.chain.push(id);
        }
    }
}
