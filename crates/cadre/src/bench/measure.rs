//! One test on one model: sessions at the right depth, the clock, and the bytes that decoding had to read.

use std::time::Instant;

use anyhow::Result;
use cadre_checkpoint::{ModelConfig, Sizes, kv_bytes_read};
use cadre_engine::{
    KvFormats, Logits, Model, ModelInfo, NoObserver, Observer, RoutingEvent, Sequence, Session,
    SessionOptions, StoreStats, Workspace,
};

use super::plan::Test;

/// Seed of the tokens; every run reads the same ones.
const SEED: u64 = 4;

/// What one repetition took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Wall time.
    pub(crate) ns: u64,
    /// Bytes of weights and cache that decoding cannot do without; 0 for prompts.
    pub(crate) bytes: u64,
    /// What was read from disk meanwhile, for a model that is streamed.
    pub(crate) store: Option<StoreStats>,
}

/// How a test is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting {
    /// Tokens of a prompt that are processed together.
    pub(crate) chunk: usize,
    /// How keys and values are stored.
    pub(crate) kv: KvFormats,
}

/// A test that is ready to be repeated.
pub(crate) struct Runner<'a> {
    model: &'a dyn Model,
    config: &'a ModelConfig,
    test: Test,
    setting: Setting,
    /// One per sequence.
    sessions: Vec<Session>,
    /// For several sequences; a single one brings its own.
    workspace: Option<Workspace>,
    tokens: Tokens,
    touched: Touched,
    /// Bytes that every token reads, experts not among them.
    shared_bytes: u64,
    one_expert: u64,
}

impl<'a> Runner<'a> {
    /// Makes the session and reads the tokens of depth. `held` are the bytes of the weights as they are in memory.
    pub(crate) fn new(
        model: &'a dyn Model,
        config: &'a ModelConfig,
        held: Sizes,
        (test, setting): (Test, Setting),
    ) -> Result<Self> {
        let info = model.info();
        let mut tokens = Tokens::new(info.vocab_size);
        let mut sessions = Vec::new();
        for _ in 0..test.n_seqs {
            let mut session = model.session(&SessionOptions {
                n_ctx: Some(test.n_ctx()),
                chunk: setting.chunk,
                kv: setting.kv,
            })?;
            let before = tokens.take(test.n_depth);
            model.forward(&mut session, &before, Logits::None, &mut NoObserver)?;
            sessions.push(session);
        }
        let several = test.n_seqs > 1;
        let workspace = several.then(|| model.workspace(test.n_seqs)).transpose()?;
        let picks: usize = (0..info.n_layers).map(|layer| config.picks_in(layer)).sum();
        let picked = held.one_expert * picks as u64;
        Ok(Self {
            model,
            config,
            test,
            setting,
            sessions,
            workspace,
            tokens,
            touched: Touched::new(info),
            shared_bytes: held.read_per_token.saturating_sub(picked),
            one_expert: held.one_expert,
        })
    }

    /// Does the test once.
    pub(crate) fn sample(&mut self) -> Result<Sample> {
        for session in &mut self.sessions {
            session.rewind(self.test.n_depth);
        }
        let before = self.model.store_stats();
        let sample = match self.test.n_prompt {
            0 => self.generate()?,
            _ => self.prompt()?,
        };
        let after = self.model.store_stats();
        let store = after
            .zip(before)
            .map(|(after, before)| after.since(&before));
        Ok(Sample { store, ..sample })
    }

    fn prompt(&mut self) -> Result<Sample> {
        let tokens = self.tokens.take(self.test.n_prompt);
        let mut ns = 0;
        for session in &mut self.sessions {
            let start = Instant::now();
            self.model
                .forward(session, &tokens, Logits::Last, &mut NoObserver)?;
            ns += nanoseconds(start);
        }
        Ok(Sample {
            ns,
            bytes: 0,
            store: None,
        })
    }

    fn generate(&mut self) -> Result<Sample> {
        let mut sample = Sample {
            ns: 0,
            bytes: 0,
            store: None,
        };
        for step in 0..self.test.n_gen {
            let tokens = self.tokens.take(self.test.n_seqs);
            self.touched.clear();
            sample.ns += self.step(&tokens)?;
            let position = self.test.n_depth + step;
            let cache = kv_bytes_read(self.config, self.setting.kv, position);
            sample.bytes += self.shared_bytes
                + self.touched.count() * self.one_expert
                + self.test.n_seqs as u64 * cache;
        }
        Ok(sample)
    }

    /// One token of each sequence; nanoseconds.
    fn step(&mut self, tokens: &[u32]) -> Result<u64> {
        let Some(workspace) = &mut self.workspace else {
            let start = Instant::now();
            let session = &mut self.sessions[0];
            self.model
                .forward(session, tokens, Logits::Last, &mut self.touched)?;
            return Ok(nanoseconds(start));
        };
        let each = self.sessions.iter_mut().zip(tokens.chunks(1));
        let mut batch: Vec<_> = each
            .map(|(session, tokens)| Sequence {
                session,
                tokens,
                want: Logits::Last,
            })
            .collect();
        let start = Instant::now();
        self.model
            .forward_batch(&mut batch, workspace, &mut self.touched)?;
        Ok(nanoseconds(start))
    }
}

fn nanoseconds(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Random token ids: SplitMix64, scaled to the vocabulary.
struct Tokens {
    state: u64,
    n_vocab: u64,
}

impl Tokens {
    fn new(n_vocab: usize) -> Self {
        Self {
            state: SEED,
            n_vocab: n_vocab as u64,
        }
    }

    fn take(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> u32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        // The upper half of a 32-bit number times the size is below the size.
        (((mixed >> 32) * self.n_vocab) >> 32) as u32
    }
}

/// Counts the different experts that a pass reads.
struct Touched {
    /// One flag per layer and expert.
    seen: Vec<bool>,
    n_experts: usize,
    /// Experts of each layer that are read; null ones are not.
    n_real: Vec<usize>,
}

impl Touched {
    fn new(info: &ModelInfo) -> Self {
        let mut n_real = vec![0; info.n_layers];
        for (layer, n_experts) in info.moe_layers.iter().zip(&info.experts_per_layer) {
            n_real[*layer] = *n_experts;
        }
        Self {
            seen: vec![false; info.n_layers * info.n_experts],
            n_experts: info.n_experts,
            n_real,
        }
    }

    fn clear(&mut self) {
        self.seen.fill(false);
    }

    fn count(&self) -> u64 {
        self.seen.iter().filter(|seen| **seen).count() as u64
    }
}

impl Observer for Touched {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let layer = event.layer * self.n_experts;
        for token in 0..event.routing.n_tokens() {
            for expert in event.routing.token(token).0 {
                let expert = usize::from(*expert);
                if expert < self.n_real[event.layer] {
                    self.seen[layer + expert] = true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cadre_checkpoint::{Holding, held_sizes};
    use cadre_engine::{LoadOptions, load};

    use super::*;
    use crate::embedded;

    #[test]
    fn tokens_are_in_the_vocabulary_and_repeat_with_the_seed() {
        let few = Tokens::new(3).take(1000);
        assert!((0..3).all(|id| few.contains(&id)) && few.iter().all(|id| *id < 3));
        assert_eq!(few, Tokens::new(3).take(1000));
    }

    #[test]
    fn a_token_reads_what_the_header_says() {
        let checkpoint = embedded::open().unwrap();
        let model = load(&checkpoint, &LoadOptions::default()).unwrap();
        let held = held_sizes(&checkpoint, Holding::Loaded);
        let config = checkpoint.config();
        let test = |n_prompt, n_gen, n_depth| Test {
            n_prompt,
            n_gen,
            n_depth,
            n_seqs: 1,
        };
        let setting = Setting {
            chunk: 64,
            kv: KvFormats::default(),
        };
        let runner = |test| Runner::new(&*model, config, held, (test, setting)).unwrap();
        let sample = runner(test(0, 2, 0)).sample().unwrap();
        assert!(sample.ns > 0);
        // Two tokens; the second also reads the keys and values of the first.
        let cache = kv_bytes_read(config, setting.kv, 1);
        // Rounding in the mean size of an expert.
        let slack = 2 * (model.info().n_layers * model.info().top_k) as u64;
        assert!(sample.bytes.abs_diff(2 * held.read_per_token + cache) <= slack);
        let mut deep = runner(test(0, 1, 10));
        let first = deep.sample().unwrap().bytes;
        assert!(first.abs_diff(held.read_per_token + 10 * cache) <= slack);
        assert_eq!(
            deep.sample().unwrap().bytes,
            first,
            "it starts from the depth again"
        );
        assert_eq!(runner(test(5, 0, 3)).sample().unwrap().bytes, 0);
        // Eight together read more than one, but what all need only once.
        let eight = Test {
            n_seqs: 8,
            ..test(0, 1, 10)
        };
        let together = runner(eight).sample().unwrap().bytes;
        assert!(first < together && together < 8 * first);
    }
}
