//! The forward pass: against an independent f64 model, and against itself cut in other ways.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod reference;

use std::collections::BTreeMap;
use std::sync::Arc;

use cadre_checkpoint::{AttentionExperts, Dtype};
use cadre_engine::{
    EngineError, KvFormat, KvFormats, LoadOptions, Logits, Model, NoObserver, Observer, Quant,
    RoutingEvent, RowsEvent, Sequence, Session, SessionOptions, load,
};
use cadre_kernels::Isa;
use cadre_testkit::{Random, TinyFolder, TinyMoe, assert_close};
use reference::Reference;

fn model(folder: &TinyFolder, options: &LoadOptions) -> Arc<dyn Model> {
    load(&folder.open().unwrap(), options).unwrap()
}

fn session(model: &dyn Model, chunk: usize) -> Session {
    model
        .session(&SessionOptions {
            chunk,
            ..SessionOptions::default()
        })
        .unwrap()
}

fn all_logits(model: &dyn Model, chunk: usize, tokens: &[u32]) -> Vec<f32> {
    let mut session = session(model, chunk);
    model
        .forward(&mut session, tokens, Logits::All, &mut NoObserver)
        .unwrap()
        .to_vec()
}

fn random_tokens(n: usize, vocab_size: usize) -> Vec<u32> {
    let mut random = Random::new(11);
    (0..n).map(|_| random.below(vocab_size) as u32).collect()
}

/// Every kind of model that the architecture allows.
fn variants() -> Vec<(&'static str, TinyMoe)> {
    vec![
        ("plain", TinyMoe::default()),
        (
            "tied bf16",
            TinyMoe::default().tied(true).dtype(Dtype::Bf16),
        ),
        ("f16", TinyMoe::default().dtype(Dtype::F16)),
        ("raw weights", TinyMoe::default().norm_topk_prob(false)),
        ("one expert", TinyMoe::default().n_experts(1).top_k(1)),
        ("all experts", TinyMoe::default().n_experts(5).top_k(5)),
        ("odd heads", TinyMoe::default().heads(9, 3, 6)),
        ("one kv head", TinyMoe::default().heads(5, 1, 10)),
        (
            "dense first",
            TinyMoe::default().mlp_only_layers(&[0]).n_layers(3),
        ),
        (
            "sparse step",
            TinyMoe::default()
                .n_layers(4)
                .configure(|c| c.moe.layers = vec![1, 3]),
        ),
        ("all dense", TinyMoe::default().mlp_only_layers(&[0, 1])),
        (
            "odd widths",
            TinyMoe::default().configure(|c| {
                (c.hidden_size, c.moe.intermediate_size, c.vocab_size) = (27, 13, 301);
            }),
        ),
    ]
}

#[test]
fn logits_agree_with_the_f64_model_on_every_isa() {
    for (name, builder) in variants() {
        let folder = builder.build().unwrap();
        let tokens = random_tokens(70, builder.config().vocab_size);
        let expected = Reference::new(&folder.open().unwrap()).logits(&tokens);
        for isa in Isa::available() {
            let options = LoadOptions {
                isa: Some(isa),
                n_threads: Some(2),
                ..Default::default()
            };
            let got = all_logits(&*model(&folder, &options), 32, &tokens);
            assert_close(&format!("{name} {isa}"), &got, &expected, 1e-4);
        }
    }
}

/// Attention in experts, whose caches hold some of a sequence's tokens each.
fn attention_experts() -> TinyMoe {
    TinyMoe::default().heads(8, 4, 8).configure(|c| {
        c.model_type = "cadre_moe".to_owned();
        c.attention.experts = Some(AttentionExperts {
            n_experts: 4,
            top_k: 2,
            eps: 0.5,
        });
    })
}

#[test]
fn cached_decode_is_full_recomputation_bit_for_bit() {
    let mut builders = variants();
    builders.push(("attention experts", attention_experts()));
    builders.push((
        "wide",
        TinyMoe::default().configure(|c| {
            (c.hidden_size, c.moe.intermediate_size, c.head_dim) = (192, 96, 32);
            (c.rope.dim, c.attention.scale) = (32, 1.0 / 32f64.sqrt());
        }),
    ));
    for (name, builder) in builders {
        let folder = builder.build().unwrap();
        let tokens = random_tokens(100, builder.config().vocab_size);
        let vocab = builder.config().vocab_size;
        for quant in [Quant::AsStored, Quant::Q8_0] {
            for isa in Isa::available() {
                let options = LoadOptions {
                    quant,
                    isa: Some(isa),
                    n_threads: Some(2),
                    ..LoadOptions::default()
                };
                let model = model(&folder, &options);
                let full = all_logits(&*model, 128, &tokens);
                let mut cached = session(&*model, 128);
                // A prompt, then one by one.
                let last = |session: &mut Session, tokens: &[u32]| {
                    model
                        .forward(session, tokens, Logits::Last, &mut NoObserver)
                        .unwrap()
                        .to_vec()
                };
                let prompt = last(&mut cached, &tokens[..30]);
                assert_eq!(
                    prompt,
                    full[29 * vocab..30 * vocab],
                    "{name} {quant:?} {isa}: prompt"
                );
                for t in 30..tokens.len() {
                    let step = last(&mut cached, &tokens[t..=t]);
                    assert_eq!(
                        step,
                        full[t * vocab..][..vocab],
                        "{name} {quant:?} {isa}: {t}"
                    );
                }
            }
        }
    }
}

#[test]
fn chunks_and_threads_change_no_bit() {
    let wide =
        TinyMoe::default().configure(|c| (c.hidden_size, c.moe.intermediate_size) = (128, 64));
    for folder in [wide, attention_experts()] {
        let folder = folder.build().unwrap();
        let tokens = random_tokens(101, 384);
        let options = |n_threads| LoadOptions {
            n_threads: Some(n_threads),
            ..Default::default()
        };
        let expected = all_logits(&*model(&folder, &options(1)), 128, &tokens);
        for n_threads in [1, 2, 5] {
            let model = model(&folder, &options(n_threads));
            for chunk in [1, 3, 16, 100, 101] {
                assert_eq!(
                    all_logits(&*model, chunk, &tokens),
                    expected,
                    "{n_threads} {chunk}"
                );
            }
        }
    }
}

#[test]
fn caches_of_every_format_are_close_and_change_no_bit_with_the_chunk() {
    let window = TinyMoe::default().configure(|c| {
        (c.head_dim, c.rope.dim) = (32, 32);
        c.attention.windows[1] = Some(5);
    });
    let folder = window.build().unwrap();
    let model = model(&folder, &LoadOptions::default());
    let tokens = random_tokens(70, 384);
    let logits = |keys, values, chunk| {
        let options = SessionOptions {
            chunk,
            kv: KvFormats { keys, values },
            ..SessionOptions::default()
        };
        let mut session = model.session(&options).unwrap();
        let all = model.forward(&mut session, &tokens, Logits::All, &mut NoObserver);
        (all.unwrap().to_vec(), session.kv_bytes())
    };
    let (exact, full) = logits(KvFormat::F32, KvFormat::F32, 70);
    for (keys, values, bound, share) in [
        (KvFormat::F16, KvFormat::F16, 2e-3, 0.5),
        (KvFormat::F16, KvFormat::Q8_0, 3e-2, 49.0 / 128.0),
        (KvFormat::Q8_0, KvFormat::Q8_0, 3e-2, 34.0 / 128.0),
    ] {
        let (got, n_bytes) = logits(keys, values, 70);
        assert_eq!(logits(keys, values, 1).0, got);
        assert_eq!(n_bytes as f64, full as f64 * share);
        // On average: where two experts are nearly equal, an error of any size makes another be picked.
        let errors = got.iter().zip(&exact).map(|(a, b)| (a - b).abs());
        let error = errors.sum::<f32>() / exact.iter().map(|v| v.abs()).sum::<f32>();
        assert!(error > 0.0 && error < bound, "{keys} {values}: {error}");
    }
}

#[test]
fn sessions_on_many_threads_do_not_disturb_each_other() {
    let folder = TinyMoe::default().build().unwrap();
    let model = model(
        &folder,
        &LoadOptions {
            n_threads: Some(2),
            ..Default::default()
        },
    );
    let tokens = random_tokens(60, 384);
    let expected = all_logits(&*model, 64, &tokens);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(all_logits(&*model, 7, &tokens), expected));
        }
    });
}

#[test]
fn q8_0_is_close_to_what_it_was_made_from() {
    let folder = TinyMoe::default()
        .configure(|c| (c.hidden_size, c.moe.intermediate_size) = (128, 64))
        .build()
        .unwrap();
    let tokens = random_tokens(12, 384);
    let exact = all_logits(&*model(&folder, &LoadOptions::default()), 64, &tokens);
    let quantised = LoadOptions {
        quant: Quant::Q8_0,
        ..Default::default()
    };
    let quantised = model(&folder, &quantised);
    let close = all_logits(&*quantised, 64, &tokens);
    // Picks may flip where two experts are near each other, so the bound is on the mean.
    let mean = |values: &mut dyn Iterator<Item = f32>| values.sum::<f32>() / exact.len() as f32;
    let error = mean(&mut exact.iter().zip(&close).map(|(a, b)| (a - b).abs()));
    let size = mean(&mut exact.iter().map(|v| v.abs()));
    assert!(error < 0.05 * size && error > 0.0, "{error} of {size}");
    let stored = model(&folder, &LoadOptions::default()).info().weight_bytes;
    assert!(
        quantised.info().weight_bytes * 3 < stored,
        "34 bytes for 128"
    );
}

#[test]
fn rewinding_forgets() {
    for folder in [TinyMoe::default(), attention_experts()] {
        let folder = folder.build().unwrap();
        let model = model(&folder, &LoadOptions::default());
        let tokens = random_tokens(20, 384);
        let expected = all_logits(&*model, 32, &tokens);
        let mut session = session(&*model, 32);
        let wrong: Vec<u32> = tokens.iter().rev().copied().collect();
        model
            .forward(&mut session, &tokens[..8], Logits::None, &mut NoObserver)
            .unwrap();
        model
            .forward(&mut session, &wrong, Logits::None, &mut NoObserver)
            .unwrap();
        session.rewind(8);
        assert_eq!((session.position(), session.free()), (8, 120));
        let rest = model
            .forward(&mut session, &tokens[8..], Logits::All, &mut NoObserver)
            .unwrap();
        assert_eq!(rest, &expected[8 * 384..]);
    }
}

#[test]
fn no_tokens_and_no_logits_are_fine() {
    let folder = TinyMoe::default().build().unwrap();
    let model = model(&folder, &LoadOptions::default());
    let mut session = session(&*model, 4);
    for want in [Logits::None, Logits::Last, Logits::All] {
        assert!(
            model
                .forward(&mut session, &[], want, &mut NoObserver)
                .unwrap()
                .is_empty()
        );
    }
    let none = model
        .forward(&mut session, &[1, 2], Logits::None, &mut NoObserver)
        .unwrap();
    assert!(none.is_empty());
    assert_eq!(session.position(), 2);
}

#[test]
fn misuse_is_an_error_that_names_it() {
    let folder = TinyMoe::default().build().unwrap();
    let model = model(&folder, &LoadOptions::default());
    let mut session = model
        .session(&SessionOptions {
            n_ctx: Some(5),
            chunk: 3,
            ..SessionOptions::default()
        })
        .unwrap();
    let forward = |session: &mut Session, tokens: &[u32]| {
        let result = model.forward(session, tokens, Logits::Last, &mut NoObserver);
        result.map(|_| ()).unwrap_err()
    };
    let error = forward(&mut session, &[0; 6]);
    assert!(matches!(
        error,
        EngineError::ContextFull {
            position: 0,
            n_tokens: 6,
            n_ctx: 5
        }
    ));
    assert!(forward(&mut session, &[384]).to_string().contains("384"));
    assert_eq!(session.position(), 0);

    let other = TinyMoe::default().heads(2, 2, 8).build().unwrap();
    let other = load(&other.open().unwrap(), &LoadOptions::default()).unwrap();
    let mut foreign = other.session(&SessionOptions::default()).unwrap();
    assert!(matches!(
        forward(&mut foreign, &[1]),
        EngineError::ForeignSession
    ));

    for options in [
        SessionOptions {
            n_ctx: Some(129),
            chunk: 8,
            ..SessionOptions::default()
        },
        SessionOptions {
            n_ctx: Some(0),
            chunk: 8,
            ..SessionOptions::default()
        },
        SessionOptions {
            n_ctx: None,
            chunk: 0,
            ..SessionOptions::default()
        },
    ] {
        assert!(matches!(
            model.session(&options),
            Err(EngineError::BadOption { .. })
        ));
    }
}

/// The layers and positions of the events, and the sums of weights.
#[derive(Default)]
struct Log {
    events: Vec<(usize, usize, usize)>,
}

impl Observer for Log {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let n_tokens = event.routing.n_tokens();
        assert_eq!(event.sequence, 0);
        assert_eq!(event.logits.len(), n_tokens * 8);
        assert!(event.norms.is_empty());
        for (experts, weights) in event.routing.iter() {
            assert_eq!(experts.len(), 2);
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
        self.events
            .push((event.layer, event.first_position, n_tokens));
    }
}

#[test]
fn routing_is_observed_by_layer_and_chunk() {
    let folder = TinyMoe::default()
        .n_layers(3)
        .mlp_only_layers(&[1])
        .build()
        .unwrap();
    let model = model(&folder, &LoadOptions::default());
    let mut session = session(&*model, 4);
    let mut log = Log::default();
    model
        .forward(&mut session, &[1, 2, 3, 4, 5, 6], Logits::None, &mut log)
        .unwrap();
    model
        .forward(&mut session, &[7], Logits::Last, &mut log)
        .unwrap();
    assert_eq!(
        log.events,
        [
            (0, 0, 4),
            (2, 0, 4),
            (0, 4, 2),
            (2, 4, 2),
            (0, 6, 1),
            (2, 6, 1)
        ]
    );
}

#[test]
fn overflowing_activations_are_an_error_with_the_layer() {
    let folder = TinyMoe::default().build().unwrap();
    let spoil = |name: &'static str| {
        folder
            .edit_tensors(|tensors| {
                for tensor in tensors
                    .iter_mut()
                    .filter(|tensor| tensor.name.contains(name))
                {
                    tensor.values.to_mut().fill(3e38);
                }
            })
            .unwrap();
        let model = model(&folder, &LoadOptions::default());
        let mut session = session(&*model, 4);
        let result = model.forward(&mut session, &[1, 2], Logits::Last, &mut NoObserver);
        result.map(|_| ()).unwrap_err()
    };
    let error = spoil("lm_head");
    assert!(
        matches!(error, EngineError::NonFiniteLogits { position: 1, .. }),
        "{error}"
    );
    let error = spoil("layers.1.self_attn.o_proj");
    assert!(
        matches!(
            error,
            EngineError::Routing {
                layer: 1,
                // The last layer routes only the token whose logits are wanted.
                position: 1,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn parameters_are_counted() {
    let folder = TinyMoe::default().build().unwrap();
    let info = model(&folder, &LoadOptions::default()).info().clone();
    // Per layer: attention 32*32*2 + 32*16*2 + norms 32*2 + 8*2, router 8*32, experts 8 * 3*32*16.
    let layer = 2048 + 1024 + 80 + 256 + 8 * 1536;
    let n_params = 2 * 384 * 32 + 2 * layer + 32;
    assert_eq!(info.n_params, n_params);
    assert_eq!(info.n_active_params, n_params - 2 * 6 * 1536);
    assert_eq!(
        (info.n_layers, info.top_k, info.moe_layers),
        (2, 2, vec![0, 1])
    );
    let folder = attention_experts().build().unwrap();
    let info = model(&folder, &LoadOptions::default()).info().clone();
    // Half of the projections from and to 8 heads of queries and 4 of keys and values.
    let unused = 6 * 1536 + 32 * 8 * (8 + 4);
    assert_eq!(info.n_params - info.n_active_params, 2 * unused);
}

/// What is told of the experts of attention, and the streams that enter the layers, by sequence and layer.
#[derive(Default)]
struct AttentionWatch {
    /// `[n_tokens, d]`.
    streams: BTreeMap<(usize, usize), Vec<f32>>,
    routed: BTreeMap<(usize, usize), AttentionRouting>,
    n_feed_forward: usize,
}

/// What is told of one sequence in one layer.
#[derive(Debug, Default, PartialEq)]
struct AttentionRouting {
    experts: Vec<Vec<u16>>,
    weights: Vec<Vec<f32>>,
    logits: Vec<f32>,
    norms: Vec<f32>,
}

impl Observer for AttentionWatch {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        self.n_feed_forward += event.routing.n_tokens();
    }

    fn attention_routed(&mut self, event: &RoutingEvent<'_>) {
        let all = self
            .routed
            .entry((event.sequence, event.layer))
            .or_default();
        assert_eq!(event.first_position, all.experts.len());
        for (experts, weights) in event.routing.iter() {
            all.experts.push(experts.to_vec());
            all.weights.push(weights.to_vec());
        }
        all.logits.extend(event.logits);
        all.norms.extend(event.norms);
    }

    fn wants_norms(&self) -> bool {
        true
    }

    fn wants_stream(&self) -> bool {
        true
    }

    fn entered(&mut self, event: &RowsEvent<'_>) {
        let at = (event.sequence, event.layer);
        self.streams.entry(at).or_default().extend(event.rows);
    }
}

#[test]
fn what_is_told_of_attention_experts_is_a_computation_by_hand() {
    let folder = attention_experts().build().unwrap();
    let model = model(&folder, &LoadOptions::default());
    let tokens = random_tokens(20, 384);
    let mut watch = AttentionWatch::default();
    let mut one = session(&*model, 7);
    model
        .forward(&mut one, &tokens, Logits::Last, &mut watch)
        .unwrap();
    assert_eq!(watch.n_feed_forward, 2 * 20);

    let checkpoint = folder.open().unwrap();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    for layer in 0..2 {
        let tensor = |name: &str, shape: &[usize]| {
            let name = format!("model.layers.{layer}.{name}.weight");
            checkpoint.tensor_f32(&name, shape).unwrap()
        };
        let (norm, gate) = (
            tensor("input_layernorm", &[32]),
            tensor("self_attn.gate", &[4, 32]),
        );
        let (v, o) = (
            tensor("self_attn.v_proj", &[32, 32]),
            tensor("self_attn.o_proj", &[32, 64]),
        );
        let told = &watch.routed[&(0, layer)];
        assert_eq!((told.experts.len(), told.norms.len()), (20, 2 * 20));
        let mut met = [false; 4];
        for (t, row) in watch.streams[&(0, layer)].chunks(32).enumerate() {
            let rms = (dot(row, row) / 32.0 + 1e-6).sqrt();
            let x: Vec<f32> = row.iter().zip(&norm).map(|(x, w)| x / rms * w).collect();
            let logits: Vec<f32> = gate.chunks(32).map(|gate| dot(gate, &x)).collect();
            assert_close("logits", &told.logits[4 * t..][..4], &logits, 1e-5);
            let sum: f32 = logits.iter().map(|l| l.exp()).sum();
            let mut order = [0, 1, 2, 3];
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            let picks = &order[..2];
            let found: Vec<usize> = told.experts[t].iter().map(|e| usize::from(*e)).collect();
            assert_eq!(found, picks, "layer {layer}, token {t}");
            let mass: f32 = picks.iter().map(|e| logits[*e].exp() / sum).sum();
            assert_close("weights", &told.weights[t], &[mass / (mass + 0.5); 2], 1e-5);
            for (place, expert) in picks.iter().enumerate() {
                if std::mem::replace(&mut met[*expert], true) {
                    continue;
                }
                // The first token of an expert sees nothing but itself: its values, once for each of two heads.
                let values: Vec<f32> = (8 * expert..8 * expert + 8)
                    .map(|row| dot(&v[32 * row..][..32], &x))
                    .collect();
                let y = o.chunks(64).map(|row| {
                    let heads = row[16 * expert..][..16].chunks(8);
                    heads.map(|head| dot(head, &values)).sum::<f32>()
                });
                let want = y.map(|y| y * y).sum::<f32>().sqrt();
                assert_close("norms", &told.norms[2 * t + place..][..1], &[want], 1e-4);
            }
        }
        assert_eq!(met, [true; 4], "layer {layer}: an expert that none takes");
    }

    // Beside another sequence in a batch, the same is told of both.
    let (mut short, mut long) = (session(&*model, 32), session(&*model, 32));
    let mut batch =
        [(&mut short, &tokens[..5]), (&mut long, &tokens[..])].map(|(session, tokens)| Sequence {
            session,
            tokens,
            want: Logits::Last,
        });
    let mut workspace = model.workspace(32).unwrap();
    let mut both = AttentionWatch::default();
    model
        .forward_batch(&mut batch, &mut workspace, &mut both)
        .unwrap();
    for layer in 0..2 {
        let whole = &watch.routed[&(0, layer)];
        assert_eq!(&both.routed[&(1, layer)], whole);
        let start = &both.routed[&(0, layer)];
        assert_eq!(start.experts, whole.experts[..5]);
        assert_eq!(start.norms, whole.norms[..10]);
    }
}
