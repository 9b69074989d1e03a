//! Batches: a sequence's logits and routing are the same bits alone and among others, and however a prompt is cut.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cadre_checkpoint::{
    Checkpoint, Conversion, ConvertOptions, ConvertTo, Dtype, QuantizeOptions, TargetDtype,
    TensorData,
};
use cadre_engine::{
    EngineError, KvFormat, KvFormats, LoadOptions, Logits, Model, NoObserver, Observer, Quant,
    RoutingEvent, Sequence, Session, SessionOptions, load,
};
use cadre_testkit::{Random, TinyMoe, golden_dir};

fn open(checkpoint: &Checkpoint, quant: Quant, n_threads: usize) -> Arc<dyn Model> {
    let options = LoadOptions {
        quant,
        n_threads: Some(n_threads),
        ..LoadOptions::default()
    };
    load(checkpoint, &options).unwrap_or_else(|e| panic!("{}: {e}", checkpoint.origin()))
}

fn tiny() -> Arc<dyn Model> {
    let folder = TinyMoe::default().build().unwrap();
    open(&folder.open().unwrap(), Quant::AsStored, 2)
}

fn session(model: &dyn Model, chunk: usize) -> Session {
    let options = SessionOptions {
        n_ctx: Some(model.info().max_context.min(64)),
        chunk,
        ..SessionOptions::default()
    };
    model.session(&options).unwrap()
}

fn tokens(model: &dyn Model, n: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    let vocab_size = model.info().vocab_size;
    (0..n).map(|_| random.below(vocab_size) as u32).collect()
}

/// All logits of each text, read alone in one piece.
fn alone(model: &dyn Model, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let read = |text: &Vec<u32>| {
        let mut session = session(model, 64);
        model
            .forward(&mut session, text, Logits::All, &mut NoObserver)
            .unwrap()
            .to_vec()
    };
    texts.iter().map(read).collect()
}

/// How many tokens each of three sequences reads in each pass: prompts of unequal length that start at different
/// times, one sequence that pauses, single tokens beside long pieces, and decoding together.
const PASSES: &[[usize; 3]] = &[
    [7, 0, 1],
    [1, 9, 1],
    [3, 1, 0],
    [1, 1, 1],
    [0, 2, 5],
    [1, 1, 1],
];

/// Tokens of each sequence in all.
fn lengths() -> [usize; 3] {
    [0, 1, 2].map(|i| PASSES.iter().map(|pass| pass[i]).sum())
}

/// Reads `texts` together; everything that is returned has to be the rows of `expected`.
fn check_batches(what: &str, model: &dyn Model, texts: &[Vec<u32>], expected: &[Vec<f32>]) {
    let vocab = model.info().vocab_size;
    let mut workspace = model.workspace(16).unwrap();
    let mut sessions: Vec<Session> = texts.iter().map(|_| session(model, 64)).collect();
    let mut at = [0; 3];
    for (index, pass) in PASSES.iter().enumerate() {
        // Every sequence wants something else in every pass.
        let want = |i: usize| [Logits::Last, Logits::All, Logits::None][(index + i) % 3];
        let mut batch: Vec<Sequence<'_>> = sessions
            .iter_mut()
            .enumerate()
            .map(|(i, session)| Sequence {
                session,
                tokens: &texts[i][at[i]..at[i] + pass[i]],
                want: want(i),
            })
            .collect();
        let got = model
            .forward_batch(&mut batch, &mut workspace, &mut NoObserver)
            .unwrap();
        let mut rows = Vec::new();
        for (i, n) in pass.iter().enumerate() {
            at[i] += n;
            let n_wanted = want(i).n_rows(*n);
            rows.extend_from_slice(&expected[i][(at[i] - n_wanted) * vocab..at[i] * vocab]);
        }
        assert!(got == rows, "{what}: pass {index}");
    }
    for (session, text) in sessions.iter().zip(texts) {
        assert_eq!(session.position(), text.len());
    }
}

/// The last row of every sequence, with and without an observer, in chunks of several sizes.
fn check_last(what: &str, model: &dyn Model, texts: &[Vec<u32>], expected: &[Vec<f32>]) {
    let vocab = model.info().vocab_size;
    for (text, expected) in texts.iter().zip(expected) {
        let last = &expected[expected.len() - vocab..];
        for chunk in [1, 5, 64] {
            let mut trimmed = session(model, chunk);
            let got = model.forward(&mut trimmed, text, Logits::Last, &mut NoObserver);
            assert!(got.unwrap() == last, "{what}: chunks of {chunk}");
            let mut watched = session(model, chunk);
            let mut log = Log::default();
            let got = model.forward(&mut watched, text, Logits::Last, &mut log);
            assert!(got.unwrap() == last, "{what}: chunks of {chunk}, watched");
        }
        // What `None` leaves in the cache serves the next token.
        let mut silent = session(model, 6);
        let (before, after) = text.split_at(text.len() - 1);
        let none = model.forward(&mut silent, before, Logits::None, &mut NoObserver);
        assert!(none.unwrap().is_empty());
        let got = model.forward(&mut silent, after, Logits::All, &mut NoObserver);
        assert!(got.unwrap() == last, "{what}: after none");
    }
}

fn check(what: &str, checkpoint: &Checkpoint, quant: Quant) {
    let mut expected = Vec::new();
    for n_threads in [1, 2, 5] {
        let model = &*open(checkpoint, quant, n_threads);
        let texts: Vec<Vec<u32>> = (5..)
            .zip(lengths())
            .map(|(seed, n)| tokens(model, n, seed))
            .collect();
        if expected.is_empty() {
            expected = alone(model, &texts);
        }
        let what = format!("{what}, {n_threads} threads");
        check_batches(&what, model, &texts, &expected);
        check_last(&what, model, &texts, &expected);
    }
}

/// Checkpoints of every architecture, in both kinds of files.
fn goldens() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let folders = |path: &Path| {
        let entries = std::fs::read_dir(path).into_iter().flatten();
        entries
            .map(|entry| entry.unwrap().path())
            .collect::<Vec<_>>()
    };
    for folder in folders(&golden_dir()).iter().flat_map(|path| folders(path)) {
        if folder.join("model.gguf").is_file() {
            found.push(folder.join("model.gguf"));
        } else if folder.join("config.json").is_file() && folder.join("expected.json").is_file() {
            found.push(folder);
        }
    }
    found.sort();
    found
}

#[test]
fn every_architecture_computes_a_sequence_the_same_alone_and_among_others() {
    let paths = goldens();
    assert!(paths.len() > 50, "{} goldens", paths.len());
    for path in paths {
        let checkpoint = Checkpoint::open(&path).unwrap();
        check(&path.display().to_string(), &checkpoint, Quant::AsStored);
    }
}

#[test]
fn every_block_format_computes_a_sequence_the_same_alone_and_among_others() {
    let folder = TinyMoe::default()
        .configure(|c| (c.hidden_size, c.moe.intermediate_size) = (256, 256))
        .build()
        .unwrap();
    let checkpoint = folder.open().unwrap();
    check("q8_0 while loading", &checkpoint, Quant::Q8_0);
    let target = tempfile::tempdir().unwrap();
    for dtype in Dtype::all().filter(|format| format.can_encode()) {
        let name = dtype.name();
        let options = ConvertOptions {
            target: ConvertTo::Gguf {
                max_part_bytes: None,
            },
            dtype: TargetDtype::Is(dtype),
            allow_differences: false,
            quantize: QuantizeOptions::default(),
        };
        let path = target.path().join(format!("{name}.gguf"));
        let conversion = Conversion::plan(&checkpoint, name, options).unwrap();
        let paths = conversion.write(&path, &mut |_| true).unwrap();
        check(name, &Checkpoint::open(&paths[0]).unwrap(), Quant::AsStored);
    }
}

/// Sequence, layer and position; experts; weights, norms and logits.
type Routed = (usize, usize, usize, Vec<u16>, Vec<f32>);

#[derive(Default)]
struct Log {
    rows: Vec<Routed>,
}

impl Observer for Log {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let n_tokens = event.routing.n_tokens();
        assert!(n_tokens > 0);
        let n_experts = event.logits.len() / n_tokens;
        assert_eq!(event.norms.len(), event.routing.n_pairs());
        for (t, (experts, weights)) in event.routing.iter().enumerate() {
            let pairs =
                event.routing.offsets()[t] as usize..event.routing.offsets()[t + 1] as usize;
            let mut values = weights.to_vec();
            values.extend_from_slice(&event.norms[pairs]);
            values.extend_from_slice(&event.logits[t * n_experts..][..n_experts]);
            let position = event.first_position + t;
            let row = (
                event.sequence,
                event.layer,
                position,
                experts.to_vec(),
                values,
            );
            self.rows.push(row);
        }
    }

    fn wants_norms(&self) -> bool {
        true
    }
}

#[test]
fn an_observer_hears_of_every_sequence_what_it_hears_of_it_alone() {
    let model = &*tiny();
    let texts: Vec<Vec<u32>> = [4, 1, 6].map(|n| tokens(model, n, n as u64)).into();
    let mut expected = Log::default();
    for (sequence, text) in texts.iter().enumerate() {
        let mut log = Log::default();
        model
            .forward(&mut session(model, 64), text, Logits::All, &mut log)
            .unwrap();
        assert_eq!(log.rows.len(), 2 * text.len());
        log.rows.iter_mut().for_each(|row| row.0 = sequence);
        expected.rows.append(&mut log.rows);
    }
    let mut sessions: Vec<Session> = (0..4).map(|_| session(model, 64)).collect();
    // A sequence without tokens in between has no events.
    let pieces: [&[u32]; 4] = [&texts[0], &texts[1], &[], &texts[2]];
    let mut batch: Vec<Sequence<'_>> = sessions
        .iter_mut()
        .zip(pieces)
        .map(|(session, tokens)| Sequence {
            session,
            tokens,
            want: Logits::None,
        })
        .collect();
    let mut log = Log::default();
    let mut workspace = model.workspace(11).unwrap();
    model
        .forward_batch(&mut batch, &mut workspace, &mut log)
        .unwrap();
    for row in &mut log.rows {
        assert_ne!(row.0, 2);
        row.0 -= usize::from(row.0 == 3);
    }
    log.rows.sort_by_key(|row| (row.0, row.1, row.2));
    expected.rows.sort_by_key(|row| (row.0, row.1, row.2));
    assert_eq!(log.rows, expected.rows);
}

#[test]
fn sessions_of_one_batch_may_store_keys_and_values_in_different_formats() {
    let model = &*tiny();
    let texts = [13, 13, 13].map(|n| tokens(model, n, 3));
    let formats = [KvFormat::F32, KvFormat::F16, KvFormat::Q8_0];
    let sessions = || {
        formats.map(|format| {
            let options = SessionOptions {
                kv: KvFormats {
                    keys: format,
                    values: format,
                },
                ..SessionOptions::default()
            };
            model.session(&options).unwrap()
        })
    };
    let mut alone = Vec::new();
    for (session, text) in sessions().iter_mut().zip(&texts) {
        let logits = model.forward(session, text, Logits::Last, &mut NoObserver);
        alone.extend_from_slice(logits.unwrap());
    }
    let mut workspace = model.workspace(39).unwrap();
    let mut sessions = sessions();
    let mut texts = texts.iter();
    let mut batch = sessions.each_mut().map(|session| Sequence {
        session,
        tokens: texts.next().unwrap(),
        want: Logits::Last,
    });
    let together = model.forward_batch(&mut batch, &mut workspace, &mut NoObserver);
    assert!(together.unwrap() == alone);
    assert_ne!(alone[..384], alone[384..768], "formats differ");
}

#[test]
fn a_refused_batch_names_the_sequence_and_advances_none() {
    let model = &*tiny();
    let mut workspace = model.workspace(8).unwrap();
    let mut sessions = [session(model, 8), session(model, 8)];
    let mut run = |texts: [&[u32]; 2]| {
        let [a, b] = &mut sessions;
        let sequence = |session, tokens| Sequence {
            session,
            tokens,
            want: Logits::Last,
        };
        let mut batch = [sequence(a, texts[0]), sequence(b, texts[1])];
        let result = model.forward_batch(&mut batch, &mut workspace, &mut NoObserver);
        let result = result.map(|logits| logits.len());
        assert_eq!(a.position(), b.position());
        result
    };
    assert_eq!(run([&[], &[]]).unwrap(), 0);
    assert_eq!(run([&[1], &[2]]).unwrap(), 2 * 384);
    let error = run([&[1; 4], &[1; 5]]).unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::BatchTooLarge {
                n_tokens: 9,
                capacity: 8
            }
        ),
        "{error}"
    );
    let Err(EngineError::InBatch { sequence, source }) = run([&[1], &[384]]) else {
        panic!("token 384 is not in the vocabulary");
    };
    assert!(matches!(*source, EngineError::UnknownToken { .. }));
    assert_eq!(sequence, 1);
    assert_eq!(run([&[1], &[2]]).unwrap(), 2 * 384);

    assert!(matches!(
        model.workspace(0),
        Err(EngineError::BadOption { .. })
    ));
    let other = TinyMoe::default().heads(2, 2, 8).build().unwrap();
    let other = open(&other.open().unwrap(), Quant::AsStored, 1);
    let mut foreign = other.workspace(8).unwrap();
    let result = model.forward_batch(&mut [], &mut foreign, &mut NoObserver);
    assert!(matches!(result, Err(EngineError::ForeignWorkspace)));
}

#[test]
fn a_non_finite_row_names_its_sequence_and_position() {
    let folder = TinyMoe::default().build().unwrap();
    // Only token 7 has a value in the first channel, and the first router makes it overflow.
    let spoil = |tensors: &mut Vec<TensorData<'_>>| {
        let mut values = |name: &str, edit: &dyn Fn(usize, &mut f32)| {
            let tensor = tensors.iter_mut().find(|t| t.name == name).unwrap();
            let values = tensor.values.to_mut().iter_mut().enumerate();
            values.for_each(|(i, value)| edit(i, value));
        };
        values("model.embed_tokens.weight", &|i, value| {
            if i % 32 == 0 || i / 32 == 7 {
                *value = if i == 7 * 32 { 1.0 } else { 0.0 };
            }
        });
        values("model.layers.0.self_attn.o_proj.weight", &|i, value| {
            if i < 32 {
                *value = 0.0;
            }
        });
        values("model.layers.0.mlp.gate.weight", &|i, value| {
            if i % 32 == 0 {
                *value = 3e38;
            }
        });
    };
    folder.edit_tensors(spoil).unwrap();
    let model = &*open(&folder.open().unwrap(), Quant::AsStored, 1);
    let mut workspace = model.workspace(8).unwrap();
    let mut sessions = [session(model, 8), session(model, 8)];
    let [a, b] = &mut sessions;
    let mut batch = [
        Sequence {
            session: a,
            tokens: &[1, 2],
            want: Logits::All,
        },
        Sequence {
            session: b,
            tokens: &[3, 4, 7],
            want: Logits::All,
        },
    ];
    let result = model.forward_batch(&mut batch, &mut workspace, &mut NoObserver);
    let Err(EngineError::InBatch { sequence, source }) = result.map(|_| ()) else {
        panic!("infinite activations");
    };
    assert_eq!(sequence, 1);
    match *source {
        EngineError::Routing {
            layer: 0,
            position: 0,
            source: cadre_routing::RoutingError::NonFinite { token: 2, .. },
        } => {}
        error => panic!("{error:?}"),
    }
    assert_eq!(sessions.map(|session| session.position()), [0, 0]);
}
