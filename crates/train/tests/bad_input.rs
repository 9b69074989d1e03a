//! What a run does with recipes, text and numbers that it cannot use.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod runs;

use cadre_train::TrainError;
use cadre_train::collapse::PATIENCE;
use cadre_train::recipe::Recipe;
use cadre_train::trainer::{self, Outcome};
use runs::{Watch, recipe, recipe_with, snapshots, text, trajectory};
use std::path::Path;

fn refusal(recipe: &Recipe) -> String {
    trainer::train(recipe, &mut Watch::default())
        .unwrap_err()
        .to_string()
}

#[test]
fn another_recipe_in_the_same_folder_is_refused_with_every_difference() {
    let folder = tempfile::tempdir().unwrap();
    let first = recipe(folder.path(), "run");
    let mut watch = Watch {
        stop_after: Some(2),
        ..Watch::default()
    };
    trainer::train(&first, &mut watch).unwrap();
    let mut other = first.clone();
    other.train.lr = 5e-3;
    other.seed = 4;
    other.losses.z = 0.5;
    other.output.keep = 1;
    let error = refusal(&other);
    for part in [
        "train.lr: 0.01 in the run, 0.005 in the recipe",
        "seed: 3 in the run, 4 in the recipe",
        "losses.z: ",
        "0.5 in the recipe",
        "--fresh",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(error.matches(" in the run, ").count(), 3, "{error}");
    trainer::forget(&other).unwrap();
    let mut watch = Watch::default();
    trainer::train(&other, &mut watch).unwrap();
    assert_eq!(watch.started_at, 0);
}

#[test]
fn bad_data_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "run");
    let file = folder.path().join("a.jsonl");
    std::fs::write(&file, "{\"text\": \"fine\"}\n{\"txt\": 1}\n").unwrap();
    let error = refusal(&recipe);
    assert!(error.contains("a.jsonl line 2"), "{error}");
    std::fs::write(&file, "{\"text\": \"short\"}\n").unwrap();
    let error = refusal(&recipe);
    assert!(
        error.contains("a.jsonl") && error.contains("seq_len"),
        "{error}"
    );
    std::fs::remove_file(&file).unwrap();
    let error = refusal(&recipe);
    assert!(error.contains("a.jsonl"), "{error}");
}

#[test]
fn less_text_than_one_step_takes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe_with(
        folder.path(),
        "run",
        &[("batch_size = 2", "batch_size = 4000")],
    );
    let error = refusal(&recipe);
    assert!(
        error.contains("one step takes 128000") && error.contains("accumulate"),
        "{error}"
    );
    assert!(!folder.path().join("run/snapshots").exists());
}

#[test]
fn impossible_routing_is_refused_before_anything_begins() {
    let folder = tempfile::tempdir().unwrap();
    let parse = |changes: &[(&str, &str)]| {
        Recipe::parse(Path::new("tiny.toml"), &text(folder.path(), "run", changes))
    };
    let error = parse(&[("top_k = 2", "top_k = 5")])
        .unwrap_err()
        .to_string();
    assert!(error.contains('5') && error.contains('4'), "{error}");
    let error = parse(&[("top_k = 2", "top_k = 1")])
        .unwrap_err()
        .to_string();
    assert!(error.contains("would not learn"), "{error}");
}

#[test]
fn one_token_is_a_batch() {
    let folder = tempfile::tempdir().unwrap();
    let changes = [
        ("batch_size = 2", "batch_size = 1"),
        ("seq_len = 16", "seq_len = 1"),
        ("accumulate = 2", "accumulate = 1"),
    ];
    let recipe = recipe_with(folder.path(), "run", &changes);
    let mut watch = Watch::default();
    let outcome = trainer::train(&recipe, &mut watch).unwrap();
    let Outcome::Finished { eval, .. } = outcome else {
        panic!("{outcome:?}");
    };
    assert!(eval.eval["a"].nll.is_finite());
    assert_eq!((watch.steps, watch.warnings.len()), (8, 0));
}

#[test]
fn all_tokens_to_the_same_experts_train_and_are_warned_of_once() {
    let folder = tempfile::tempdir().unwrap();
    // Zero weights: all logits are equal, and the first experts take every token.
    let steps = format!("steps = {}", PATIENCE + 8);
    let changes = [
        ("tie_word_embeddings = true", "initializer_range = 0.0"),
        ("steps = 8", steps.as_str()),
        ("batch_size = 2", "batch_size = 8"),
    ];
    let whole = recipe_with(folder.path(), "whole", &changes);
    let mut watch = Watch::default();
    trainer::train(&whole, &mut watch).unwrap();
    let log = trajectory(&whole);
    assert_eq!(log[0]["layers"][1]["dead"], 2);
    assert_eq!(log[0]["layers"][1]["max_vio"], 1.0);
    let told: Vec<_> = watch.warnings.iter().map(|w| (w.step, w.layer)).collect();
    assert_eq!(told, [(PATIENCE, 0), (PATIENCE, 1)]);
    assert!(watch.warnings[1].warning.contains("layer 1"));

    // Stopped in the middle of the spell: the resumed run still knows how long it has lasted.
    let parts = recipe_with(folder.path(), "parts", &changes);
    for stop_after in [Some(13), None] {
        let mut watch = Watch {
            stop_after,
            ..Watch::default()
        };
        trainer::train(&parts, &mut watch).unwrap();
    }
    assert_eq!(trajectory(&parts), log);
}

#[test]
fn divergence_stops_the_run_names_step_and_layer_and_keeps_the_last_good_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    // The first update throws every parameter far away; the second step overflows, backward or forward. What is reported
    // is the origin where gradients show it, and the largest gradient of the step before where there are none yet.
    let changes = |lr: &'static str| {
        [
            ("lr = 1e-2", lr),
            ("warmup_steps = 2", "warmup_steps = 0"),
            ("snapshot_every = 2", "snapshot_every = 1"),
        ]
    };
    for (name, lr, what, of_step) in [
        ("backward", "lr = 1e30", "the gradient", 2),
        (
            "router",
            "lr = 1e15",
            "the router logit of token 0 and expert 0",
            1,
        ),
    ] {
        let recipe = recipe_with(folder.path(), name, &changes(lr));
        let error = trainer::train(&recipe, &mut Watch::default()).unwrap_err();
        let message = error.to_string();
        let TrainError::Diverged {
            step,
            what: found,
            largest: Some(largest),
            kept: Some(kept),
        } = error
        else {
            panic!("{message}");
        };
        assert_eq!(
            (step, found.as_str(), largest.step),
            (2, what, of_step),
            "{message}"
        );
        assert_eq!(largest.norm.is_finite(), of_step == 1, "{message}");
        assert!(kept.ends_with("step-00000001") && snapshots(&recipe) == [kept.clone()]);
        for part in [
            "step 2",
            largest.part.as_str(),
            "lower train.lr",
            "step-00000001",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }

    // Past the range of f32 at once: what is not finite is never saved.
    let recipe = recipe_with(folder.path(), "beyond", &changes("lr = 1e39"));
    let error = refusal(&recipe);
    assert!(error.contains("step 1: the parameter "), "{error}");
    assert!(!recipe.output.dir.join("snapshots").exists());
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_leaves_a_snapshot_that_loads() {
    let folder = tempfile::tempdir().unwrap();
    // Without routers, whose logits would be the first to be looked at. After the first update, weights of 1e18 meet
    // each other in the forward pass, beyond the range of f32.
    let changes = [
        ("n_experts = 4", "n_experts = 0"),
        ("top_k = 2", "intermediate_size = 8"),
        ("moe_intermediate_size = 8", ""),
        ("lr = 1e-2", "lr = 1e18"),
        ("warmup_steps = 2", "warmup_steps = 0"),
        ("snapshot_every = 2", "snapshot_every = 1"),
    ];
    let recipe = recipe_with(folder.path(), "run", &changes);
    for started_at in [0, 1] {
        let mut watch = Watch::default();
        let error = trainer::train(&recipe, &mut watch).unwrap_err();
        let message = error.to_string();
        // The second time the run goes on from what the first one kept.
        assert_eq!((watch.started_at, watch.refused.len()), (started_at, 0));
        let TrainError::Diverged {
            step: 2,
            what,
            largest,
            kept: Some(kept),
        } = error
        else {
            panic!("{message}");
        };
        assert_eq!(what, "the loss", "{message}");
        assert_eq!(snapshots(&recipe), [kept]);
        // The gradients of step 1 are gone with the process that computed them.
        assert_eq!(largest.is_some(), started_at == 0, "{message}");
        if let Some(largest) = largest {
            assert!(largest.norm.is_finite() && largest.step == 1, "{message}");
            assert!(message.contains(&format!("step 1 is in {}", largest.part)));
            assert!(message.contains("step-00000001"), "{message}");
        }
    }
}
