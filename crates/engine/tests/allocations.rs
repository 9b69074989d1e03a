//! What is allocated, and when: nothing while decoding once that is warm, and for a workspace what was foretold.
//!
//! Counted over all threads, which is why this file has a process of its own and one test.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::alloc::System;
use std::ops::ControlFlow;
use std::sync::Arc;

use cadre_checkpoint::{AttentionExperts, DecoupledRouter, ModelConfig, scratch_bytes};
use cadre_engine::{
    GenerateOptions, Hooks, LoadOptions, Logits, Model, NoObserver, Observer, Quant, RoutingEvent,
    SamplingOptions, Sequence, SessionOptions, generate, load,
};
use cadre_testkit::TinyMoe;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Tokens of a round.
const TOKENS: usize = 40;
/// Rounds that may pass until all is warm: a thread that got its first task late makes its buffers late. What allocates
/// for every token does so in every round.
const ROUNDS: usize = 6;

/// Calls to the allocator so far.
fn n_calls() -> usize {
    let stats = ALLOCATOR.stats();
    stats.allocations + stats.reallocations
}

fn models() -> Vec<(&'static str, Arc<dyn Model>, ModelConfig)> {
    let open = |what, builder: TinyMoe, quant| {
        let options = LoadOptions {
            quant,
            n_threads: Some(3),

            ..LoadOptions::default()
        };
        let folder = builder.build().unwrap();
        let model = load(&folder.open().unwrap(), &options).unwrap();
        (what, model, builder.config().clone())
    };
    // Wide enough that the products are shared among the threads.
    let wide = || {
        TinyMoe::default()
            .mlp_only_layers(&[1])
            .n_layers(3)
            .configure(|c| (c.hidden_size, c.moe.intermediate_size) = (256, 256))
    };
    let experts = || {
        wide().heads(8, 4, 32).configure(|c| {
            c.model_type = "cadre_moe".to_owned();
            c.attention.experts = Some(AttentionExperts {
                n_experts: 4,
                top_k: 2,
                eps: 0.5,
            });
        })
    };
    let decoupled = || {
        wide().configure(|c| {
            c.model_type = "cadre_moe".to_owned();
            c.moe.decoupled_router = Some(DecoupledRouter {
                hidden_size: 64,
                n_layers: 1,
                n_heads: 4,
                head_dim: 16,
                intermediate_size: 64,
                per_layer: true,
            });
        })
    };
    vec![
        open("tiny", TinyMoe::default(), Quant::AsStored),
        open("wide", wide(), Quant::AsStored),
        open("wide q8_0", wide(), Quant::Q8_0),
        open("attention experts", experts(), Quant::AsStored),
        open("router before the model", decoupled(), Quant::AsStored),
    ]
}

/// Some round of `read`, which is told the number of the token, makes no call.
fn check(what: &str, mut read: impl FnMut(usize)) {
    let mut counts = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let before = n_calls();
        (0..TOKENS).for_each(&mut read);
        counts.push(n_calls() - before);
    }
    assert!(counts.contains(&0), "{what}: calls per round: {counts:?}");
}

fn one_by_one(what: &str, model: &dyn Model) {
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let mut read = |tokens: &[u32]| {
        session.rewind(64);
        let logits = model.forward(&mut session, tokens, Logits::Last, &mut NoObserver);
        assert_eq!(logits.unwrap().len(), 384);
    };
    read(&[1, 2, 3, 4, 5]);
    check(what, |token| read(&[token as u32]));
}

fn together(what: &str, model: &dyn Model) {
    let mut sessions = [(); 5].map(|()| model.session(&SessionOptions::default()).unwrap());
    let mut workspace = model.workspace(8).unwrap();
    // Four sequences decode, and one reads its prompt in pieces.
    check(what, |token| {
        let tokens = [token as u32; 4];
        let mut n = token % 5;
        let mut batch = sessions.each_mut().map(|session| {
            session.rewind(64);
            Sequence {
                session,
                tokens: &tokens[..std::mem::replace(&mut n, 1)],
                want: Logits::Last,
            }
        });
        let logits = model.forward_batch(&mut batch, &mut workspace, &mut NoObserver);
        assert!(logits.unwrap().len() >= 4 * 384);
    });
}

/// Notes the allocator's calls at every token.
struct Counter {
    calls: Vec<usize>,
}

impl Observer for Counter {
    fn routed(&mut self, _event: &RoutingEvent<'_>) {}
}

impl Hooks for Counter {
    fn token(&mut self, _token: u32, _position: usize) -> ControlFlow<()> {
        self.calls.push(n_calls());
        ControlFlow::Continue(())
    }
}

fn generating(what: &str, model: &dyn Model) {
    let hot = SamplingOptions {
        temperature: 1.0,
        top_k: 40,
        top_p: 0.9,
        ..SamplingOptions::default()
    };
    for sampling in [SamplingOptions::default(), hot] {
        let mut session = model.session(&SessionOptions::default()).unwrap();
        let options = GenerateOptions {
            max_new_tokens: TOKENS,
            stop_tokens: Vec::new(),
            sampling,
        };
        let mut round = || {
            session.rewind(0);
            let mut counter = Counter {
                calls: Vec::with_capacity(TOKENS),
            };
            generate(model, &mut session, &[1, 2, 3], &options, &mut counter).unwrap();
            assert_eq!(counter.calls.len(), TOKENS);
            // From the second token on, when the sampler has its buffers.
            counter.calls[TOKENS - 1] - counter.calls[1]
        };
        let counts: Vec<usize> = (0..ROUNDS).map(|_| round()).collect();
        assert!(counts.contains(&0), "{what}: calls per round: {counts:?}");
    }
}

/// `scratch_bytes` is what `fit` and `inspect` go by.
fn workspaces(what: &str, model: &dyn Model, config: &ModelConfig) {
    for capacity in [1, 50, 128] {
        let before = ALLOCATOR.stats().bytes_allocated;
        let workspace = model.workspace(capacity).unwrap();
        let n_bytes = (ALLOCATOR.stats().bytes_allocated - before) as f64;
        assert_eq!(workspace.capacity(), capacity);
        // Logits are allocated later; tables of fixed size weigh little.
        let logits = 4 * config.vocab_size as u64;
        let foretold = (scratch_bytes(config, capacity, capacity) - logits) as f64;
        let error = (n_bytes - foretold).abs();
        assert!(
            error < 0.05 * foretold + 4096.0,
            "{what}, {capacity} tokens: {n_bytes} bytes, not {foretold}"
        );
    }
}

#[test]
fn decoding_allocates_nothing_and_a_workspace_what_was_foretold() {
    let before = n_calls();
    drop(std::hint::black_box(vec![0u8; 100]));
    assert!(n_calls() > before, "the counter counts");
    for (what, model, config) in models() {
        one_by_one(what, &*model);
        together(what, &*model);
        generating(what, &*model);
        workspaces(what, &*model, &config);
    }
}
