//! A run that is stopped and resumed is the run that was never stopped; damaged snapshots are passed over.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use cadre_train::TrainError;
use cadre_train::log::StepRecord;
use cadre_train::recipe::Recipe;
use cadre_train::trainer::{self, Outcome, Progress};
use std::path::{Path, PathBuf};

/// Stops after `stop_after` steps and remembers what it was told.
#[derive(Default)]
struct Watch {
    stop_after: Option<u64>,
    steps: u64,
    started_at: u64,
    refused: Vec<String>,
}

impl Progress for Watch {
    fn begin(&mut self, done: u64, _total: u64, refused: &[TrainError]) {
        self.started_at = done;
        self.refused = refused.iter().map(ToString::to_string).collect();
    }

    fn step(&mut self, _record: &StepRecord) {
        self.steps += 1;
    }

    fn stop(&mut self) -> bool {
        self.stop_after == Some(self.steps)
    }
}

fn write_documents(path: &Path, words: &[&str]) {
    let lines: String = (0..40)
        .map(|i| {
            let text: Vec<&str> = (0..60)
                .map(|j| words[(i * 7 + j * j) % words.len()])
                .collect();
            format!("{{\"domain\":\"d\",\"text\":\"{}\"}}\n", text.join(" "))
        })
        .collect();
    std::fs::write(path, lines).unwrap();
}

fn recipe(folder: &Path, run: &str) -> Recipe {
    let path = |name: &str| folder.join(name);
    write_documents(&path("a.jsonl"), &["one", "two", "three", "four", "five"]);
    write_documents(&path("b.jsonl"), &["let", "x", "=", "fn", "(y)"]);
    let (a, b) = (path("a.jsonl"), path("b.jsonl"));
    let text = format!(
        r#"
        name = "tiny"
        seed = 3
        [model]
        vocab_size = 280
        hidden_size = 16
        n_layers = 2
        n_heads = 2
        n_kv_heads = 1
        head_dim = 8
        n_experts = 4
        top_k = 2
        moe_intermediate_size = 8
        max_position_embeddings = 32
        tie_word_embeddings = true
        [data]
        sources = [
          {{ domain = "a", train = {a:?}, heldout = {a:?} }},
          {{ domain = "b", train = {b:?}, heldout = {b:?} }},
        ]
        [train]
        steps = 8
        batch_size = 2
        seq_len = 16
        accumulate = 2
        lr = 1e-2
        warmup_steps = 2
        [output]
        dir = {:?}
        snapshot_every = 2
        eval_every = 4
        "#,
        path(run)
    );
    Recipe::parse(Path::new("tiny.toml"), &text).unwrap()
}

/// The log without what depends on the clock.
fn trajectory(recipe: &Recipe) -> Vec<serde_json::Value> {
    std::fs::read_to_string(recipe.output.dir.join("log.jsonl"))
        .unwrap()
        .lines()
        .map(|line| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            for clock in ["seconds", "tokens_per_second"] {
                value.as_object_mut().unwrap().remove(clock);
            }
            value
        })
        .collect()
}

fn snapshots(recipe: &Recipe) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(recipe.output.dir.join("snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
}

#[test]
fn stopped_and_resumed_equals_uninterrupted() {
    let folder = tempfile::tempdir().unwrap();
    let whole = recipe(folder.path(), "whole");
    let outcome = trainer::train(&whole, &mut Watch::default()).unwrap();
    assert!(matches!(outcome, Outcome::Finished { .. }));
    assert_eq!(snapshots(&whole).len(), 2, "keeps two");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(whole.output.dir.join("model").join(name).exists(), "{name}");
    }

    let parts = recipe(folder.path(), "parts");
    for stop_after in [Some(3), Some(2), None] {
        let mut watch = Watch {
            stop_after,
            ..Watch::default()
        };
        trainer::train(&parts, &mut watch).unwrap();
    }
    let (whole, parts) = (trajectory(&whole), trajectory(&parts));
    assert_eq!(whole.len(), 8 + 2, "steps and evaluations");
    assert_eq!(whole, parts);
}

#[test]
fn a_damaged_snapshot_is_refused_and_the_one_before_it_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let whole = recipe(folder.path(), "whole");
    trainer::train(&whole, &mut Watch::default()).unwrap();

    for damage in ["truncate", "flip", "no manifest"] {
        let hurt = recipe(folder.path(), damage);
        let mut watch = Watch {
            stop_after: Some(6),
            ..Watch::default()
        };
        trainer::train(&hurt, &mut watch).unwrap();
        let newest = snapshots(&hurt).pop().unwrap();
        let state = newest.join("state.safetensors");
        let mut bytes = std::fs::read(&state).unwrap();
        match damage {
            "truncate" => bytes.truncate(bytes.len() / 2),
            "flip" => *bytes.last_mut().unwrap() ^= 1,
            _ => std::fs::remove_file(newest.join("manifest.json")).unwrap(),
        }
        std::fs::write(&state, bytes).unwrap();

        let mut watch = Watch::default();
        trainer::train(&hurt, &mut watch).unwrap();
        assert_eq!(watch.started_at, 4, "{damage}");
        assert!(
            watch.refused[0].contains("step-00000006"),
            "{:?}",
            watch.refused
        );
        assert_eq!(trajectory(&hurt), trajectory(&whole), "{damage}");
    }
}

#[test]
fn another_recipe_in_the_same_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = recipe(folder.path(), "run");
    let mut watch = Watch {
        stop_after: Some(2),
        ..Watch::default()
    };
    trainer::train(&first, &mut watch).unwrap();
    first.train.lr = 5e-3;
    let error = trainer::train(&first, &mut Watch::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("[train]") && error.contains("--fresh"),
        "{error}"
    );
    trainer::forget(&first).unwrap();
    let mut watch = Watch::default();
    trainer::train(&first, &mut watch).unwrap();
    assert_eq!(watch.started_at, 0);
}

#[test]
fn bad_data_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "run");
    let file = folder.path().join("a.jsonl");
    std::fs::write(&file, "{\"text\": \"fine\"}\n{\"txt\": 1}\n").unwrap();
    let error = trainer::train(&recipe, &mut Watch::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("a.jsonl line 2"), "{error}");
    std::fs::write(&file, "{\"text\": \"short\"}\n").unwrap();
    let error = trainer::train(&recipe, &mut Watch::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("a.jsonl") && error.contains("seq_len"),
        "{error}"
    );
    std::fs::remove_file(&file).unwrap();
    let error = trainer::train(&recipe, &mut Watch::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("a.jsonl"), "{error}");
}
