//! Streamed equals resident, byte for byte: logits of every architecture with experts, whatever the budget, the policy,
//! the reader, what is read ahead, the threads, and how prompts are cut.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cadre_checkpoint::{Checkpoint, DecoupledRouter};
use cadre_engine::{
    AheadKind, EngineError, LoadOptions, Logits, Model, NoObserver, Observer, PolicyKind,
    ReaderKind, RoutingEvent, Sequence, SessionOptions, Steering, StreamOptions, load,
};
use cadre_routing::steer::Layers;
use cadre_testkit::{Random, TinyMoe, golden_dir};

/// Logits of a prompt in chunks, of decoding after it, and of a batch.
fn logits(model: &dyn Model, chunk: usize) -> Vec<u32> {
    let mut random = Random::new(7);
    let info = model.info();
    let mut tokens = |n: usize| -> Vec<u32> {
        (0..n)
            .map(|_| random.below(info.vocab_size) as u32)
            .collect()
    };
    let n_prompt = 19.min(info.max_context / 2);
    let options = SessionOptions {
        n_ctx: Some(info.max_context.min(48)),
        chunk,
        ..SessionOptions::default()
    };
    let mut all = Vec::new();
    let mut session = model.session(&options).unwrap();
    let mut read = |tokens: &[u32]| {
        let logits = model
            .forward(&mut session, tokens, Logits::All, &mut NoObserver)
            .unwrap();
        all.extend(logits.iter().map(|value| value.to_bits()));
    };
    read(&tokens(n_prompt));
    for _ in 0..6 {
        read(&tokens(1));
    }
    let mut sessions = [
        model.session(&options).unwrap(),
        model.session(&options).unwrap(),
    ];
    let mut workspace = model.workspace(8).unwrap();
    for n in [3, 1, 1] {
        let texts = [tokens(n), tokens(1)];
        let sequences = sessions.iter_mut().zip(&texts);
        let mut batch: Vec<Sequence<'_>> = sequences
            .map(|(session, tokens)| Sequence {
                session,
                tokens,
                want: Logits::Last,
            })
            .collect();
        let logits = model
            .forward_batch(&mut batch, &mut workspace, &mut NoObserver)
            .unwrap();
        all.extend(logits.iter().map(|value| value.to_bits()));
    }
    all
}

fn open(
    checkpoint: &Checkpoint,
    n_threads: usize,
    stream: Option<StreamOptions>,
) -> Arc<dyn Model> {
    let options = LoadOptions {
        n_threads: Some(n_threads),
        stream,
        ..LoadOptions::default()
    };
    load(checkpoint, &options).unwrap_or_else(|e| panic!("{}: {e}", checkpoint.origin()))
}

/// The least budget that works, as the refusal of a smaller one says it.
fn least(checkpoint: &Checkpoint) -> u64 {
    let options = LoadOptions {
        stream: Some(StreamOptions::new(0)),
        ..LoadOptions::default()
    };
    match load(checkpoint, &options) {
        Err(EngineError::BudgetTooSmall { needed, dense, .. }) => {
            assert!(dense < needed);
            needed
        }
        other => panic!("{}: {other:?}", checkpoint.origin()),
    }
}

/// Every golden folder and GGUF file that has experts.
fn checkpoints() -> Vec<Checkpoint> {
    let mut paths: Vec<PathBuf> = Vec::new();
    collect(&golden_dir(), &mut paths);
    paths.sort();
    let opened = paths.iter().filter_map(|path| Checkpoint::open(path).ok());
    let with_experts: Vec<Checkpoint> = opened
        .filter(|checkpoint| checkpoint.config().moe.n_experts > 0)
        .collect();
    assert!(
        with_experts.len() > 30,
        "{} golden checkpoints",
        with_experts.len()
    );
    with_experts
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.join("model.safetensors").exists()
                || path.join("model.safetensors.index.json").exists()
            {
                paths.push(path.clone());
            }
            collect(&path, paths);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            paths.push(path);
        }
    }
}

#[test]
fn streamed_is_resident_byte_for_byte() {
    let mut random = Random::new(3);
    for checkpoint in checkpoints() {
        let what = checkpoint.origin().to_owned();
        let resident = logits(&*open(&checkpoint, 2, None), 64);
        let least = least(&checkpoint);
        let experts = checkpoint.data_bytes();
        let budgets = [least, least + experts / 3, least + 4 * experts];
        for budget in budgets {
            let policies = PolicyKind::all();
            let mut stream = StreamOptions::new(budget);
            stream.store.policy = policies[random.below(policies.len())];
            stream.store.reader =
                [ReaderKind::Auto, ReaderKind::Pread, ReaderKind::Sync][random.below(3)];
            stream.store.request_bytes = [4096, 1 << 20][random.below(2)];
            let before = checkpoint.config().moe.decoupled_router.is_some();
            stream.ahead = match AheadKind::ALL[random.below(AheadKind::ALL.len())] {
                // Of the two ways in which the model's own router may say something, the one that it has.
                AheadKind::Gate | AheadKind::Exact if before => Some(AheadKind::Exact),
                AheadKind::Gate | AheadKind::Exact => Some(AheadKind::Gate),
                kind => Some(kind),
            };
            (stream.store.adaptive, stream.store.scored) =
                (random.below(2) == 0, random.below(2) == 0);
            let (n_threads, chunk) = (1 + random.below(3), [1, 5, 64][random.below(3)]);
            let model = open(&checkpoint, n_threads, Some(stream));
            assert!(
                logits(&*model, chunk) == resident,
                "{what}: {stream:?}, {n_threads} threads, chunk {chunk}"
            );
            let stats = model.store_stats().unwrap();
            assert!(stats.reads > 0 && stats.lookups > 0);
        }
    }
}

/// Something of every kind, as far as each layer has experts for it; and which expert is masked and forced by layer.
type Steered = (Steering, Vec<(usize, Option<u16>, u16)>);

fn steering(model: &dyn Model) -> Steered {
    let info = model.info();
    let mut steering = Steering::default();
    let mut rules = Vec::new();
    for (layer, n) in info.moe_layers.iter().zip(&info.experts_per_layer) {
        let (at, last) = (Layers::Range(*layer, *layer), *n as u16 - 1);
        let masked = (*n > info.top_k).then_some(0);
        steering.mask.add(at, masked);
        steering.force.add(at, [last]);
        steering.bias.add(at, last / 2, 0.75);
        steering.gain.add(at, last / 3, 1.25);
        rules.push((*layer, masked, last));
    }
    (steering, rules)
}

/// Whether every token gets what is forced and none what is masked.
struct Held {
    rules: Vec<(usize, Option<u16>, u16)>,
    n_tokens: usize,
}

impl Observer for Held {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let rule = self.rules.iter().find(|rule| rule.0 == event.layer);
        let (_, masked, forced) = rule.unwrap();
        for (ids, weights) in event.routing.iter() {
            self.n_tokens += 1;
            assert!(ids.contains(forced) && masked.is_none_or(|id| !ids.contains(&id)));
            assert!(weights.iter().all(|weight| weight.is_finite()));
        }
    }
}

#[test]
fn steered_streams_are_what_steered_residents_are() {
    for checkpoint in checkpoints() {
        let what = checkpoint.origin().to_owned();
        let plain = open(&checkpoint, 2, None);
        let (steering, rules) = steering(&*plain);
        let open = |stream| {
            let options = LoadOptions {
                n_threads: Some(2),
                stream,
                steering: steering.clone(),
                ..LoadOptions::default()
            };
            load(&checkpoint, &options).unwrap_or_else(|e| panic!("{what}: {e}"))
        };
        let resident = open(None);
        let expected = logits(&*resident, 64);
        assert!(expected != logits(&*plain, 64), "{what}: not steered");
        let least = least(&checkpoint);
        for (budget, chunk) in [(least, 5), (least + checkpoint.data_bytes() / 3, 64)] {
            let streamed = open(Some(StreamOptions::new(budget)));
            assert!(logits(&*streamed, chunk) == expected, "{what}: {budget}");
        }
        let n_layers = rules.len();
        let mut held = Held { rules, n_tokens: 0 };
        let mut session = resident.session(&SessionOptions::default()).unwrap();
        let tokens = [1, 2, 3, 5, 8, 13];
        resident
            .forward(&mut session, &tokens, Logits::None, &mut held)
            .unwrap();
        assert_eq!(held.n_tokens, n_layers * tokens.len(), "{what}");
    }
}

/// A model with one router before its layers.
fn decoupled(per_layer: bool) -> TinyMoe {
    TinyMoe::default()
        .n_layers(5)
        .mlp_only_layers(&[1])
        .configure(|config| {
            config.model_type = "cadre_moe".to_owned();
            config.moe.decoupled_router = Some(DecoupledRouter {
                hidden_size: 16,
                n_layers: 2,
                n_heads: 2,
                head_dim: 6,
                intermediate_size: 20,
                per_layer,
            });
        })
}

#[test]
fn a_router_before_the_layers_foresees_every_pick() {
    for per_layer in [false, true] {
        let folder = decoupled(per_layer).build().unwrap();
        let checkpoint = folder.open().unwrap();
        let resident = logits(&*open(&checkpoint, 2, None), 64);
        let least = least(&checkpoint);
        for (budget, ahead) in [
            (least, None),
            (least + checkpoint.data_bytes() / 4, None),
            (least + checkpoint.data_bytes() / 4, Some(AheadKind::Exact)),
            (
                least + checkpoint.data_bytes() / 4,
                Some(AheadKind::EdgeMoe),
            ),
        ] {
            let mut stream = StreamOptions::new(budget);
            stream.ahead = ahead;
            stream.store.scored = true;
            let model = open(&checkpoint, 2, Some(stream));
            for chunk in [1, 7, 64] {
                assert!(logits(&*model, chunk) == resident, "{ahead:?} {chunk}");
            }
            let scores = model.predictor_scores();
            let exact = scores.iter().find(|score| score.name == "exact").unwrap();
            assert_eq!(exact.overall().whole_sets(), 1.0, "{exact:?}");
            assert!(exact.overall().n_picks > 100);
            assert!(scores.iter().all(|score| score.name != "gate"));
            let stats = model.store_stats().unwrap();
            if ahead != Some(AheadKind::EdgeMoe) {
                assert_eq!(stats.wasted, 0);
                assert!(2 * stats.read_ahead > stats.reads, "{stats:?}");
            }
        }
    }
}

#[test]
fn who_cannot_say_what_is_read_early_is_refused() {
    let refused = |builder: TinyMoe, ahead: AheadKind| {
        let mut stream = StreamOptions::new(1 << 20);
        stream.ahead = Some(ahead);
        let options = LoadOptions {
            stream: Some(stream),
            ..LoadOptions::default()
        };
        let folder = builder.build().unwrap();
        load(&folder.open().unwrap(), &options)
            .unwrap_err()
            .to_string()
    };
    let said = refused(TinyMoe::default(), AheadKind::Exact);
    assert!(
        said.contains("exact") && said.contains("wait for its layers"),
        "{said}"
    );
    let said = refused(decoupled(false), AheadKind::Gate);
    assert!(
        said.contains("gate") && said.contains("before the layers"),
        "{said}"
    );
}

#[test]
fn with_room_for_all_every_expert_is_read_once() {
    let folder = TinyMoe::default().n_layers(4).build().unwrap();
    let checkpoint = folder.open().unwrap();
    let mut stream = StreamOptions::new(1 << 30);
    stream.ahead = Some(AheadKind::Off);
    let model = open(&checkpoint, 2, Some(stream));
    logits(&*model, 64);
    let first = model.store_stats().unwrap();
    logits(&*model, 64);
    let second = model.store_stats().unwrap();
    assert_eq!(first.reads, second.reads);
    assert_eq!(second.evictions, 0);
    assert!((second.since(&first).hit_rate() - 1.0).abs() < 1e-12);
}

#[test]
fn sessions_on_many_threads_share_a_store() {
    let folder = TinyMoe::default().build().unwrap();
    let checkpoint = folder.open().unwrap();
    let expected = logits(&*open(&checkpoint, 2, None), 64);
    let model = open(&checkpoint, 2, Some(StreamOptions::new(least(&checkpoint))));
    std::thread::scope(|scope| {
        for chunk in [1, 3, 64] {
            let (model, expected) = (&model, &expected);
            scope.spawn(move || {
                for _ in 0..3 {
                    assert!(logits(&**model, chunk) == *expected);
                }
            });
        }
    });
}

#[test]
fn a_file_that_is_cut_off_ends_the_pass_and_not_the_program() {
    let folder = TinyMoe::default().build().unwrap();
    let checkpoint = folder.open().unwrap();
    let model = open(&checkpoint, 1, Some(StreamOptions::new(least(&checkpoint))));
    let file = folder.path().join("model.safetensors");
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.set_len(4096).unwrap();
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let error = model
        .forward(&mut session, &[1, 2, 3], Logits::Last, &mut NoObserver)
        .unwrap_err();
    assert!(matches!(error, EngineError::Store(_)), "{error}");
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    assert_eq!(session.position(), 0);
}

#[test]
fn what_is_damaged_is_found_when_it_is_read() {
    let folder = TinyMoe::default().build().unwrap();
    let checkpoint = folder.open().unwrap();
    folder
        .edit_tensors(|tensors| {
            let expert = tensors
                .iter_mut()
                .find(|t| t.name.contains("experts.1.up_proj"))
                .unwrap();
            expert.values.to_mut()[5] = f32::NAN;
        })
        .unwrap();
    drop(checkpoint);
    let checkpoint = folder.open().unwrap();
    let model = open(&checkpoint, 1, Some(StreamOptions::new(least(&checkpoint))));
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let tokens: Vec<u32> = (0..40).collect();
    let error = model
        .forward(&mut session, &tokens, Logits::Last, &mut NoObserver)
        .unwrap_err();
    assert!(
        matches!(error, EngineError::NonFiniteWeight { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("experts.1.up_proj"), "{error}");
}
