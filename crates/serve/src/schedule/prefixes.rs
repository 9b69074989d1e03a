//! What prompts have left behind: blocks of keys and values, found again by the tokens that they hold and by how those were
//! read. Whoever begins alike takes them over instead of reading.
//!
//! A block is known by the block before it and by its own tokens, the first one by the steering: a chain in which nothing
//! is told apart by a hash alone. Blocks that no session holds stay until their memory is needed; those that nobody has
//! begun with for longest go first, ends of chains before their beginnings.

use std::collections::HashMap;

use cadre_engine::{KV_BLOCK, KvBlock, Steering};

/// A block, or the beginning of all chains with one steering.
pub(super) type BlockId = u64;

/// Blocks of all sequences.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    blocks: HashMap<Key, Known>,
    roots: Vec<Root>,
    n_ids: BlockId,
}

/// What comes before a block, and its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    before: BlockId,
    tokens: Box<[u32]>,
}

#[derive(Debug)]
struct Known {
    id: BlockId,
    root: BlockId,
    block: KvBlock,
    /// Blocks before it.
    depth: usize,
    /// When somebody began with it last, or left it; larger is later.
    used: u64,
}

#[derive(Debug)]
struct Root {
    id: BlockId,
    steering: Steering,
    n_blocks: usize,
}

/// Where a block goes.
pub(super) struct Place<'a> {
    /// The chain so far.
    pub(super) chain: &'a [BlockId],
    pub(super) steering: &'a Steering,
    /// Its own tokens.
    pub(super) tokens: &'a [u32],
}

impl Prefixes {
    /// The longest chain of known blocks that `tokens` begin with.
    pub(super) fn find(
        &mut self,
        steering: &Steering,
        tokens: &[u32],
        now: u64,
    ) -> Vec<(BlockId, KvBlock)> {
        let mut found = Vec::new();
        let Some(root) = self.roots.iter().find(|root| root.steering == *steering) else {
            return found;
        };
        let mut before = root.id;
        for tokens in tokens.chunks_exact(KV_BLOCK) {
            let key = Key {
                before,
                tokens: tokens.into(),
            };
            let Some(known) = self.blocks.get_mut(&key) else {
                break;
            };
            known.used = now;
            before = known.id;
            found.push((known.id, known.block.clone()));
        }
        found
    }

    /// Makes a block known. Where the same is known already, that one is returned with its id, for the session to hold in
    /// place of its own.
    pub(super) fn put(
        &mut self,
        place: &Place<'_>,
        block: KvBlock,
        now: u64,
    ) -> (BlockId, Option<KvBlock>) {
        let root = self.root(place.steering);
        let key = Key {
            before: place.chain.last().copied().unwrap_or(root),
            tokens: place.tokens.into(),
        };
        if let Some(known) = self.blocks.get_mut(&key) {
            known.used = now;
            return (known.id, Some(known.block.clone()));
        }
        let id = self.new_id();
        if let Some(root) = self.roots.iter_mut().find(|one| one.id == root) {
            root.n_blocks += 1;
        }
        let known = Known {
            id,
            root,
            block,
            depth: place.chain.len(),
            used: now,
        };
        self.blocks.insert(key, known);
        (id, None)
    }

    /// Takes note that a session lets go of `tokens`: all of their chain was used until now.
    pub(super) fn leave(&mut self, steering: &Steering, tokens: &[u32], now: u64) {
        self.find(steering, tokens, now);
    }

    /// Gives up blocks that nobody else holds until `n_bytes` are free, or none are left.
    pub(super) fn free(&mut self, n_bytes: usize) {
        let unused = self.blocks.values().filter(|one| !one.block.is_shared());
        let mut unused: Vec<_> = unused
            .map(|one| {
                let depth = std::cmp::Reverse(one.depth);
                ((one.used, depth, one.id), one.block.n_bytes())
            })
            .collect();
        unused.sort_unstable_by_key(|(order, _)| *order);
        let mut n_freed = 0;
        let enough = unused.iter().take_while(|(_, bytes)| {
            let goes = n_freed < n_bytes;
            n_freed += bytes;
            goes
        });
        let gone: std::collections::HashSet<BlockId> = enough.map(|((.., id), _)| *id).collect();
        let roots = &mut self.roots;
        self.blocks.retain(|_, one| {
            let stays = !gone.contains(&one.id);
            if let Some(root) = roots.iter_mut().find(|root| !stays && root.id == one.root) {
                root.n_blocks -= 1;
            }
            stays
        });
        self.roots.retain(|root| root.n_blocks > 0);
    }

    fn root(&mut self, steering: &Steering) -> BlockId {
        if let Some(root) = self.roots.iter().find(|root| root.steering == *steering) {
            return root.id;
        }
        let id = self.new_id();
        self.roots.push(Root {
            id,
            steering: steering.clone(),
            n_blocks: 0,
        });
        id
    }

    fn new_id(&mut self) -> BlockId {
        self.n_ids += 1;
        self.n_ids
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cadre_engine::{
        KvMemory, LoadOptions, Logits, Model, NoObserver, Session, SessionOptions, load,
    };
    use cadre_testkit::TinyMoe;

    use super::*;

    struct Bench {
        model: Arc<dyn Model>,
        memory: KvMemory,
        prefixes: Prefixes,
    }

    impl Bench {
        fn new() -> Self {
            let folder = TinyMoe::default()
                .configure(|config| config.max_position_embeddings = 512)
                .build()
                .unwrap();
            Self {
                model: load(&folder.open().unwrap(), &LoadOptions::default()).unwrap(),
                memory: KvMemory::default(),
                prefixes: Prefixes::default(),
            }
        }

        /// Reads a text and makes its blocks known.
        fn read(&mut self, text: &[u32], steering: &Steering, now: u64) -> Session {
            let mut session = self.model.session(&SessionOptions::default()).unwrap();
            session.count_kv_in(&self.memory);
            self.model
                .forward(&mut session, text, Logits::None, &mut NoObserver)
                .unwrap();
            let mut chain = Vec::new();
            while let Some(block) = session.block(chain.len()) {
                let at = chain.len() * KV_BLOCK;
                let place = Place {
                    chain: &chain,
                    steering,
                    tokens: &text[at..at + KV_BLOCK],
                };
                let (id, known) = self.prefixes.put(&place, block, now);
                if let Some(known) = known {
                    session.set_block(chain.len(), &known);
                }
                chain.push(id);
            }
            session
        }

        fn n_known(&mut self, text: &[u32], steering: &Steering) -> usize {
            self.prefixes.find(steering, text, 0).len()
        }

        fn free_one(&mut self) {
            self.prefixes.free(1);
        }
    }

    fn text(n_blocks: usize, seed: u32) -> Vec<u32> {
        (0..n_blocks * KV_BLOCK)
            .map(|at| (at as u32 * 7 + seed * 13) % 300)
            .collect()
    }

    #[test]
    fn chains_are_found_by_their_tokens_and_steering() {
        let mut bench = Bench::new();
        let plain = Steering::default();
        let muted: Steering = serde_json::from_str(r#"{"mute": {"0": [1]}}"#).unwrap();
        let long = text(3, 1);
        drop(bench.read(&long, &plain, 1));
        assert_eq!(bench.n_known(&long, &plain), 3);
        assert_eq!(bench.n_known(&long[..2 * KV_BLOCK + 63], &plain), 2);
        assert_eq!(bench.n_known(&long, &muted), 0);
        let mut other = long.clone();
        other[KV_BLOCK] += 1;
        assert_eq!(bench.n_known(&other, &plain), 1);
        // The second block of one text is not the second block of another, whatever its tokens.
        other.clone_from(&long);
        other[0] += 1;
        assert_eq!(bench.n_known(&other, &plain), 0);
    }

    #[test]
    fn what_two_have_read_is_kept_once() {
        let mut bench = Bench::new();
        let plain = Steering::default();
        let one = bench.read(&text(2, 1), &plain, 1);
        let bytes = bench.memory.n_bytes();
        let other = bench.read(&text(2, 1), &plain, 2);
        assert_eq!(bench.memory.n_bytes(), bytes);
        drop((one, other));
        assert_eq!(bench.memory.n_bytes(), bytes);
        bench.prefixes.free(usize::MAX);
        assert_eq!(bench.memory.n_bytes(), 0);
        assert!(bench.prefixes.roots.is_empty() && bench.prefixes.blocks.is_empty());
    }

    #[test]
    fn what_nobody_has_used_for_longest_goes_first_and_ends_before_beginnings() {
        let mut bench = Bench::new();
        let plain = Steering::default();
        let (old, new) = (text(2, 1), text(2, 2));
        drop(bench.read(&new, &plain, 2));
        drop(bench.read(&old, &plain, 1));
        bench.prefixes.leave(&plain, &new, 9);
        bench.prefixes.leave(&plain, &old, 8);
        bench.free_one();
        assert_eq!(bench.prefixes.find(&plain, &old, 8).len(), 1);
        bench.free_one();
        assert_eq!(bench.prefixes.find(&plain, &old, 8).len(), 0);
        assert_eq!(bench.prefixes.find(&plain, &new, 9).len(), 2);
        // What a session holds stays.
        let held = bench.read(&old, &plain, 10);
        bench.prefixes.free(usize::MAX);
        assert_eq!(bench.prefixes.find(&plain, &old, 11).len(), 2);
        assert_eq!(bench.prefixes.find(&plain, &new, 11).len(), 0);
        drop(held);
    }
}
