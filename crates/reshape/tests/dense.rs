//! Experts out of dense models: with all experts on, and with copies whatever is picked, they compute what transformers
//! computes with the dense model (`golden/llama` and others, made by `golden/make/checkpoints.py`).
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use cadre_checkpoint::{Checkpoint, CheckpointError, Dtype, TargetDtype};
use cadre_engine::{LoadOptions, Logits, Model, NoObserver, SessionOptions, load};
use cadre_reshape::{
    Activity, ActivityRecorder, FromDense, Importance, PartitionBy, SplitOptions, UpcycleOptions,
    domain_experts, split, upcycle,
};
use cadre_testkit::{assert_close, golden_dir};
use serde_json::Value;

/// Relative to the largest logit.
const TOLERANCE: f32 = 1e-5;
/// Against transformers, whose order of summation is another.
const TO_GOLDEN: f32 = 1e-4;

/// A dense golden: its checkpoint, the tokens of its first case, and transformers' logits of them.
struct Dense {
    checkpoint: Checkpoint,
    tokens: Vec<u32>,
    golden: Vec<f32>,
}

fn dense(name: &str) -> Dense {
    let folder = golden_dir().join(name);
    let text = std::fs::read(folder.join("expected.json")).unwrap();
    let case: Value = serde_json::from_slice::<Value>(&text).unwrap()["cases"][0].clone();
    let rows: Vec<Vec<f32>> = serde_json::from_value(case["logits"].clone()).unwrap();
    Dense {
        checkpoint: Checkpoint::open(&folder).unwrap(),
        tokens: serde_json::from_value(case["tokens"].clone()).unwrap(),
        golden: rows.concat(),
    }
}

fn model(checkpoint: &Checkpoint) -> std::sync::Arc<dyn Model> {
    let options = LoadOptions {
        n_threads: Some(1),
        ..LoadOptions::default()
    };
    load(checkpoint, &options).unwrap()
}

fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    let model = model(checkpoint);
    let session = SessionOptions {
        n_ctx: Some(tokens.len()),
        ..SessionOptions::default()
    };
    let mut session = model.session(&session).unwrap();
    let all = model.forward(&mut session, tokens, Logits::All, &mut NoObserver);
    all.unwrap().to_vec()
}

fn activity(checkpoint: &Checkpoint, tokens: &[u32]) -> Activity {
    let model = model(checkpoint);
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let mut recorder = ActivityRecorder::new(tokens.len());
    let read = model.forward(&mut session, tokens, Logits::None, &mut recorder);
    read.unwrap();
    recorder.end_sequence(tokens.len());
    recorder.finish()
}

fn written(source: &Checkpoint, made: &FromDense, folder: &Path) -> Checkpoint {
    let conversion = made.plan(source, TargetDtype::Keep, 1 << 30).unwrap();
    let paths = conversion.write(folder, &mut |_| true).unwrap();
    Checkpoint::open(&paths[0]).unwrap()
}

fn all_on(n_experts: usize, n_shared: usize, by: PartitionBy) -> SplitOptions {
    SplitOptions {
        n_experts,
        top_k: n_experts,
        n_shared,
        by,
        seed: 3,
    }
}

#[test]
fn with_all_experts_on_a_split_model_is_the_dense_one() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("llama/plain", 0, "mixtral"),
        ("llama/smollm", 0, "mixtral"),
        ("llama/llama3", 0, "mixtral"),
        ("mistral/window", 0, "mixtral"),
        ("qwen3/plain", 0, "qwen3_moe"),
        // transformers' Qwen3-MoE has one window for all layers or none.
        ("qwen3/window", 0, "cadre_moe"),
        ("qwen3/plain", 8, "cadre_moe"),
        ("qwen2/yarn", 8, "qwen2_moe"),
    ];
    for (name, n_shared, layout) in cases {
        let Dense {
            checkpoint,
            tokens,
            golden,
        } = dense(name);
        let before = logits(&checkpoint, &tokens);
        let width = checkpoint.config().intermediate_size;
        let by = [
            PartitionBy::Contiguous,
            PartitionBy::Random,
            PartitionBy::Activity(activity(&checkpoint, &tokens)),
        ];
        for by in by {
            let what = format!("{name} {}", by.name());
            let (made, parts) = split(&checkpoint, &all_on(4, n_shared, by)).unwrap();
            for part in &parts {
                let mut all = [part.experts.concat(), part.shared.clone()].concat();
                all.sort_unstable();
                assert_eq!(all, (0..width).collect::<Vec<_>>(), "{what}");
            }
            let path = folder.path().join(what.replace(['/', ' '], "_") + layout);
            let moe = written(&checkpoint, &made, &path);
            assert_eq!(moe.config().model_type, layout, "{what}");
            let after = logits(&moe, &tokens);
            assert_close(&what, &after, &before, TOLERANCE);
            assert_close(&what, &after, &golden, TO_GOLDEN);
        }
    }
}

#[test]
fn an_expert_of_all_neurons_is_the_dense_model() {
    let folder = tempfile::tempdir().unwrap();
    let Dense {
        checkpoint, tokens, ..
    } = dense("llama/plain");
    let before = logits(&checkpoint, &tokens);
    let model = model(&checkpoint);
    let (one, two) = tokens.split_at(tokens.len() / 2);
    let domains = [one, two].map(|tokens| {
        let mut seen = Importance::default();
        let mut session = model.session(&SessionOptions::default()).unwrap();
        let read = model.forward(&mut session, tokens, Logits::None, &mut seen);
        read.unwrap();
        seen
    });
    let width = checkpoint.config().intermediate_size;
    let (made, _) = domain_experts(&checkpoint, &domains, width).unwrap();
    let whole = written(&checkpoint, &made, &folder.path().join("whole"));
    assert_close("whole", &logits(&whole, &tokens), &before, TOLERANCE);
    let (_, parts) = domain_experts(&checkpoint, &domains, width / 2).unwrap();
    assert!(
        parts
            .iter()
            .all(|part| part.experts.iter().all(|expert| expert.len() == width / 2))
    );
    assert_ne!(parts[0].experts[0], parts[0].experts[1], "domains differ");
    let error = domain_experts(&checkpoint, &domains, width + 1).unwrap_err();
    assert!(error.to_string().contains("width is 41"), "{error}");
    let unseen = [Importance::default(), Importance::default()];
    let error = domain_experts(&checkpoint, &unseen, width).unwrap_err();
    assert!(
        error.to_string().contains("has nothing of layer 0"),
        "{error}"
    );
}

#[test]
fn copies_are_the_dense_model_whatever_is_picked_and_new_neurons_are_not() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama/plain", "qwen3/plain"] {
        let Dense {
            checkpoint,
            tokens,
            golden,
        } = dense(name);
        let before = logits(&checkpoint, &tokens);
        let run = |drop: f64, seed: u64| {
            let options = UpcycleOptions {
                n_experts: 4,
                top_k: 2,
                drop,
                seed,
            };
            let made = upcycle(&checkpoint, &options).unwrap();
            let path = folder
                .path()
                .join(format!("{}{drop}{seed}", name.replace('/', "_")));
            logits(&written(&checkpoint, &made, &path), &tokens)
        };
        assert_close(name, &run(0.0, 1), &before, TOLERANCE);
        assert_close(name, &run(0.0, 2), &golden, TO_GOLDEN);
        let distance = |a: &[f32]| {
            let cells = a.iter().zip(&before);
            cells.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let half = run(0.5, 1);
        assert!(distance(&half) > 1e-3, "{}", distance(&half));
        assert_ne!(half, run(0.5, 2));
    }
}

#[test]
fn fewer_experts_are_nearer_when_the_rest_is_less() {
    // Three of four experts are nearer to the dense model than one.
    let folder = tempfile::tempdir().unwrap();
    let Dense {
        checkpoint, tokens, ..
    } = dense("llama/smollm");
    let before = logits(&checkpoint, &tokens);
    let distance = |top_k: usize| {
        let options = SplitOptions {
            top_k,
            ..all_on(4, 0, PartitionBy::Random)
        };
        let (made, _) = split(&checkpoint, &options).unwrap();
        let path = folder.path().join(format!("top{top_k}"));
        let after = logits(&written(&checkpoint, &made, &path), &tokens);
        let cells = after.iter().zip(&before);
        cells.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    };
    let [one, three, four] = [1, 3, 4].map(distance);
    assert!(four < three && three < one, "{one} {three} {four}");
}

#[test]
fn what_cannot_be_parted_or_written_is_refused_with_the_reason() {
    let plain = dense("llama/plain").checkpoint;
    let refused = |checkpoint: &Checkpoint, options: &SplitOptions| {
        let made = split(checkpoint, options)
            .and_then(|(made, _)| made.plan(checkpoint, TargetDtype::Keep, 1 << 30).map(drop));
        made.unwrap_err().to_string()
    };
    let text = refused(&plain, &all_on(7, 0, PartitionBy::Contiguous));
    assert!(text.contains("does not divide"), "{text}");
    let text = refused(&plain, &all_on(1, 0, PartitionBy::Contiguous));
    assert!(text.contains("experts is 1, expected 2"), "{text}");
    let mut options = all_on(4, 0, PartitionBy::Contiguous);
    options.top_k = 5;
    let text = refused(&plain, &options);
    assert!(text.contains("top-k is 5, expected 1 to 4"), "{text}");
    // No mixture has norms after its blocks as well.
    let gemma = dense("gemma3_text/pattern_6").checkpoint;
    let text = refused(&gemma, &all_on(2, 0, PartitionBy::Contiguous));
    assert!(
        text.contains("mixtral: ") && text.contains("no layout has both"),
        "{text}"
    );
    let other = dense("qwen3/plain");
    let seen = activity(&other.checkpoint, &other.tokens);
    let shallow = PartitionBy::Activity(seen);
    if other.checkpoint.config().n_layers < plain.config().n_layers
        || other.checkpoint.config().intermediate_size != plain.config().intermediate_size
    {
        let text = refused(&plain, &all_on(4, 0, shallow));
        assert!(text.contains("the activity has"), "{text}");
    }
    let mixture = Checkpoint::open(&golden_dir().join("mixtral/plain")).unwrap();
    let text = refused(&mixture, &all_on(4, 0, PartitionBy::Contiguous));
    assert!(text.contains("has experts already"), "{text}");
    let (made, _) = split(&plain, &all_on(4, 0, PartitionBy::Contiguous)).unwrap();
    let error = made
        .plan(&plain, TargetDtype::Is(Dtype::Q8_0), 1 << 30)
        .unwrap_err();
    assert!(!error.to_string().is_empty());
}

#[test]
fn an_interrupted_output_goes_on_and_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let plain = dense("llama/plain").checkpoint;
    let (made, _) = split(&plain, &all_on(4, 0, PartitionBy::Random)).unwrap();
    let small = |made: &FromDense| made.plan(&plain, TargetDtype::Keep, 4096).unwrap();
    let whole = folder.path().join("whole");
    small(&made).write(&whole, &mut |_| true).unwrap();
    let cut = folder.path().join("cut");
    let mut left = 5;
    let stopped = small(&made).write(&cut, &mut |_| {
        left -= 1;
        left > 0
    });
    assert!(matches!(stopped, Err(CheckpointError::Interrupted { .. })));
    assert!(!cut.exists());
    small(&made).write(&cut, &mut |_| true).unwrap();
    for entry in std::fs::read_dir(&whole).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |folder: &Path| std::fs::read(folder.join(&name)).unwrap();
        assert!(read(&whole) == read(&cut), "{name:?}");
    }
}
