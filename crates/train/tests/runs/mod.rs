//! Tiny runs for the tests of the loop.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![allow(dead_code, reason = "each test binary uses some of it")]

use cadre_train::TrainError;
use cadre_train::log::{StepRecord, WarningRecord};
use cadre_train::recipe::Recipe;
use cadre_train::trainer::Progress;
use std::path::{Path, PathBuf};

/// Stops after `stop_after` steps and remembers what it was told.
#[derive(Default)]
pub(crate) struct Watch {
    pub(crate) stop_after: Option<u64>,
    pub(crate) steps: u64,
    pub(crate) started_at: u64,
    pub(crate) refused: Vec<String>,
    pub(crate) warnings: Vec<WarningRecord>,
}

impl Progress for Watch {
    fn begin(&mut self, done: u64, _total: u64, refused: &[TrainError]) {
        self.started_at = done;
        self.refused = refused.iter().map(ToString::to_string).collect();
    }

    fn step(&mut self, _record: &StepRecord) {
        self.steps += 1;
    }

    fn warning(&mut self, warning: &WarningRecord) {
        self.warnings.push(warning.clone());
    }

    fn stop(&mut self) -> bool {
        self.stop_after == Some(self.steps)
    }
}

pub(crate) fn write_documents(path: &Path, words: &[&str]) {
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

/// A run of 8 steps of a tiny model on two tiny domains.
pub(crate) fn recipe(folder: &Path, run: &str) -> Recipe {
    recipe_with(folder, run, &[])
}

/// As [`recipe`], with lines of its text replaced by others.
pub(crate) fn recipe_with(folder: &Path, run: &str, changes: &[(&str, &str)]) -> Recipe {
    Recipe::parse(Path::new("tiny.toml"), &text(folder, run, changes)).unwrap()
}

/// Text of the recipe.
pub(crate) fn text(folder: &Path, run: &str, changes: &[(&str, &str)]) -> String {
    let path = |name: &str| folder.join(name);
    write_documents(&path("a.jsonl"), &["one", "two", "three", "four", "five"]);
    write_documents(&path("b.jsonl"), &["let", "x", "=", "fn", "(y)"]);
    let (a, b) = (path("a.jsonl"), path("b.jsonl"));
    let mut text = format!(
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
    for (line, instead) in changes {
        assert!(text.contains(line), "{line}");
        text = text.replace(line, instead);
    }
    text
}

/// The log without what depends on the clock.
pub(crate) fn trajectory(recipe: &Recipe) -> Vec<serde_json::Value> {
    std::fs::read_to_string(recipe.output.dir.join("log.jsonl"))
        .unwrap()
        .lines()
        .map(|line| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            for clock in [
                "seconds",
                "tokens_per_second",
                "data_seconds",
                "idle_seconds",
            ] {
                value.as_object_mut().unwrap().remove(clock);
            }
            value
        })
        .collect()
}

pub(crate) fn snapshots(recipe: &Recipe) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(recipe.output.dir.join("snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
}
