//! Blocks of keys and values that sessions share: whoever takes them over computes the same bits, and nobody writes to what
//! another holds.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::sync::Arc;

use cadre_checkpoint::{AttentionExperts, ModelConfig};
use cadre_engine::{
    KV_BLOCK, KvBlock, KvFormat, KvFormats, KvMemory, LoadOptions, Logits, Model, NoObserver,
    Observer, RoutingEvent, Sequence, Session, SessionOptions, load,
};
use cadre_testkit::{Random, TinyMoe};

fn model(change: impl FnOnce(&mut ModelConfig)) -> Arc<dyn Model> {
    let folder = TinyMoe::default()
        .configure(|config| {
            config.max_position_embeddings = 512;
            change(config);
        })
        .build()
        .unwrap();
    load(&folder.open().unwrap(), &LoadOptions::default()).unwrap()
}

fn decoupled() -> Arc<dyn Model> {
    model(TinyMoe::decouple)
}

fn session(model: &dyn Model, kv: KvFormats) -> Session {
    let options = SessionOptions {
        n_ctx: Some(400),
        chunk: 48,
        kv,
    };
    model.session(&options).unwrap()
}

fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| random.below(384) as u32).collect()
}

fn read(model: &dyn Model, session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let logits = model.forward(session, tokens, Logits::Last, &mut NoObserver);
    logits.unwrap().to_vec()
}

fn blocks(session: &Session) -> Vec<KvBlock> {
    (0..).map_while(|index| session.block(index)).collect()
}

#[test]
fn a_session_that_takes_blocks_over_computes_the_same_bits() {
    let q8 = KvFormats {
        keys: KvFormat::Q8_0,
        values: KvFormat::F16,
    };
    let windowed = model(|config| config.attention.windows = vec![Some(70), None]);
    for (what, model, kv) in [
        ("plain", model(|_| {}), KvFormats::default()),
        ("q8_0 and f16", model(|_| {}), q8),
        ("a window", windowed, KvFormats::default()),
        (
            "a router before the model",
            decoupled(),
            KvFormats::default(),
        ),
    ] {
        let model = &*model;
        let start = tokens(2 * KV_BLOCK + 9, 1);
        let mut first = session(model, kv);
        read(model, &mut first, &start);
        let shared = blocks(&first);
        assert_eq!(shared.len(), 2, "{what}: full ones only");
        for (n_same, tail) in [(start.len(), 30), (2 * KV_BLOCK, 5), (2 * KV_BLOCK - 1, 70)] {
            let mut text = start[..n_same].to_vec();
            text.extend(tokens(tail, 7 + tail as u64));
            let expected = read(model, &mut session(model, kv), &text);
            let mut other = session(model, kv);
            let n_blocks = n_same / KV_BLOCK;
            other.begin_with(&shared[..n_blocks]);
            assert_eq!(other.position(), n_blocks * KV_BLOCK);
            let got = read(model, &mut other, &text[n_blocks * KV_BLOCK..]);
            assert!(got == expected, "{what}: {n_same} tokens alike");
            // Going back into a block that others hold, and on in another way.
            other.begin_with(&shared);
            other.rewind(KV_BLOCK + 5);
            let text = [&start[..KV_BLOCK + 5], &tokens(40, 3)].concat();
            let expected = read(model, &mut session(model, kv), &text);
            let got = read(model, &mut other, &text[KV_BLOCK + 5..]);
            assert!(got == expected, "{what}: rewound");
        }
        // The first has not noticed.
        let mut alone = session(model, kv);
        read(model, &mut alone, &start);
        let next = tokens(10, 9);
        assert!(
            read(model, &mut first, &next) == read(model, &mut alone, &next),
            "{what}"
        );
    }
}

#[test]
fn memory_is_counted_once_and_given_back() {
    let model = model(|_| {});
    let memory = KvMemory::default();
    let new = || {
        let mut session = session(&*model, KvFormats::default());
        session.count_kv_in(&memory);
        session
    };
    let (mut one, mut other) = (new(), new());
    let block = one.kv_bytes() / 400usize.div_ceil(KV_BLOCK);
    assert_eq!(one.kv_bytes_to_take(KV_BLOCK + 1), 2 * block);
    read(&*model, &mut one, &tokens(150, 1));
    assert_eq!(memory.n_bytes(), 3 * block);
    assert_eq!(
        blocks(&one).iter().map(KvBlock::n_bytes).sum::<usize>(),
        2 * block
    );
    other.begin_with(&blocks(&one));
    assert_eq!(memory.n_bytes(), 3 * block);
    assert!(one.block(0).unwrap().is_shared());
    assert_eq!(other.kv_bytes_to_take(1), block);
    read(&*model, &mut other, &[1]);
    assert_eq!(memory.n_bytes(), 4 * block);
    one.rewind(0);
    assert_eq!(memory.n_bytes(), 4 * block, "kept for the next text");
    one.give_up_unused();
    assert_eq!(memory.n_bytes(), 3 * block);
    drop(other);
    assert_eq!(memory.n_bytes(), 0);
}

#[test]
fn attention_cut_into_experts_has_no_blocks() {
    let model = model(|config| {
        config.model_type = "cadre_moe".to_owned();
        config.attention.experts = Some(AttentionExperts {
            n_experts: 2,
            top_k: 1,
            eps: 0.5,
        });
    });
    let memory = KvMemory::default();
    let mut one = session(&*model, KvFormats::default());
    one.count_kv_in(&memory);
    let most = one.kv_bytes_to_take(100);
    read(&*model, &mut one, &tokens(100, 1));
    assert!(one.block(0).is_none());
    assert!(memory.n_bytes() > 0 && memory.n_bytes() <= most);
    one.rewind(0);
    one.give_up_unused();
    assert_eq!(memory.n_bytes(), 0);
}

/// The experts of every sequence and layer.
#[derive(Default)]
struct Seen(Vec<(usize, usize, Vec<u16>)>);

impl Observer for Seen {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let experts = event.routing.experts().to_vec();
        self.0.push((event.sequence, event.layer, experts));
    }
}

#[test]
fn a_router_before_the_model_tells_the_picks_that_follow() {
    let model = decoupled();
    let mut sessions = [1, 2].map(|seed| {
        let mut session = session(&*model, KvFormats::default());
        read(&*model, &mut session, &tokens(20 * seed, seed as u64));
        session
    });
    let steering = serde_json::from_str(r#"{"mask": {"0": [1, 2, 3]}}"#).unwrap();
    model.steer(&mut sessions[1], &steering).unwrap();
    let mut workspace = model.workspace(8).unwrap();
    let next = [[3], [4]];
    let mut batch: Vec<Sequence<'_>> = sessions
        .iter_mut()
        .zip(&next)
        .map(|(session, tokens)| Sequence {
            session,
            tokens,
            want: Logits::Last,
        })
        .collect();
    let (mut told, mut seen) = (Seen::default(), Seen::default());
    assert!(
        model
            .foretold(&mut batch, &mut workspace, &mut told)
            .unwrap()
    );
    model
        .forward_batch(&mut batch, &mut workspace, &mut seen)
        .unwrap();
    assert_eq!(told.0, seen.0);
    assert_eq!(told.0.len(), 4);
    let plain = self::model(|_| {});
    let mut one = session(&*plain, KvFormats::default());
    let mut batch = [Sequence {
        session: &mut one,
        tokens: &[1],
        want: Logits::Last,
    }];
    let mut workspace = plain.workspace(8).unwrap();
    let mut told = Seen::default();
    assert!(
        !plain
            .foretold(&mut batch, &mut workspace, &mut told)
            .unwrap()
    );
    assert!(told.0.is_empty());
}
