//! A model that has lost half of its experts finds back towards the one that it came from, and goes on after a stop.

#![expect(clippy::unwrap_used, reason = "tests")]

mod runs;

use cadre_checkpoint::{Checkpoint, Conversion, ConvertTo, NewExpert, NewExperts};
use cadre_train::TrainError;
use cadre_train::log::evaluations;
use cadre_train::methods::start::Part;
use cadre_train::recipe::Source;
use cadre_train::recover::Recovery;
use cadre_train::trainer::{Outcome, train};
use runs::{Watch, recipe_with, trajectory};
use std::path::{Path, PathBuf};

/// A trained tiny model, and the same with the first two of its four experts.
fn whole_and_half(folder: &Path) -> [PathBuf; 2] {
    // Long enough that its experts matter.
    let first = recipe_with(folder, "whole", &[("steps = 8", "steps = 80")]);
    let Outcome::Finished { model, .. } = train(&first, &mut Watch::default()).unwrap() else {
        panic!("the run ends");
    };
    let whole = model.unwrap();
    let checkpoint = Checkpoint::open(&whole).unwrap();
    let experts = NewExperts {
        layers: vec![vec![NewExpert::Kept(0), NewExpert::Kept(1)]; 2],
        rows: Vec::new(),
        factors: None,
        mixer: None,
        top_k: None,
        corrections: std::collections::BTreeMap::new(),
    };
    let target = ConvertTo::Folder {
        max_shard_bytes: 1 << 30,
    };
    let cut = Conversion::with_experts(&checkpoint, &experts, target, String::new()).unwrap();
    let half = folder.join("half");
    cut.write(&half, &mut |_| true).unwrap();
    [whole, half]
}

fn recovery(folder: &Path, [whole, half]: &[PathBuf; 2], run: &str) -> Recovery {
    let source = |name: &str| Source {
        domain: name.to_owned(),
        train: folder.join(format!("{name}.jsonl")),
        heldout: folder.join(format!("{name}.jsonl")),
        weight: 1.0,
    };
    Recovery {
        model: half.clone(),
        teacher: Some(whole.clone()),
        sources: vec![source("a"), source("b")],
        output: folder.join(run),
        freeze: vec![Part::Dense],
        steps: 12,
        batch_size: 4,
        seq_len: 16,
        lr: 1e-2,
        beta: 1.0,
        temperature: 1.0,
        rest: None,
        eval_tokens: 1000,
        seed: 1,
    }
}

#[test]
fn what_was_cut_recovers_resumes_and_moves_only_routers_and_experts() {
    let folder = tempfile::tempdir().unwrap();
    let models = whole_and_half(folder.path());
    let recipe = recovery(folder.path(), &models, "one").recipe().unwrap();
    let Outcome::Finished { model, eval } = train(&recipe, &mut Watch::default()).unwrap() else {
        panic!("the run ends");
    };
    let log = evaluations(&recipe.output.dir.join("log.jsonl")).unwrap();
    let [before, after] = log.as_slice() else {
        panic!("before and after, {} records", log.len());
    };
    assert_eq!((before.step, after.step), (0, 12));
    for (domain, score) in &before.eval {
        let tuned = &eval.eval[domain];
        println!("{domain}: {} to {}", score.nll, tuned.nll);
        assert!(
            tuned.nll < score.nll && tuned.tokens == score.tokens,
            "{domain}"
        );
    }
    // What is neither router nor expert is the same to the bit.
    let (half, tuned) = (
        Checkpoint::open(&models[1]).unwrap(),
        Checkpoint::open(&model.unwrap()).unwrap(),
    );
    let mut n_moved = 0;
    for name in half.tensor_names() {
        let moves = name.contains(".mlp.");
        let same = half.tensor(name).unwrap().bytes == tuned.tensor(name).unwrap().bytes;
        assert!(moves || same, "{name}");
        n_moved += usize::from(!same);
    }
    assert!(n_moved >= 2 * (1 + 3 * 2), "{n_moved}");
    assert_eq!(half.config().eos_token_ids, tuned.config().eos_token_ids);

    // Stopped and gone on with, it is the same run.
    let again = recovery(folder.path(), &models, "two").recipe().unwrap();
    let mut watch = Watch {
        stop_after: Some(5),
        ..Watch::default()
    };
    assert!(matches!(
        train(&again, &mut watch).unwrap(),
        Outcome::Stopped { step: 5 }
    ));
    let mut watch = Watch::default();
    assert!(matches!(
        train(&again, &mut watch).unwrap(),
        Outcome::Finished { .. }
    ));
    assert_eq!(watch.started_at, 5);
    assert_eq!(trajectory(&again), trajectory(&recipe));
}

#[test]
fn a_teacher_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let models = whole_and_half(folder.path());
    let mut recovery = recovery(folder.path(), &models, "with");
    // The text counts little beside the teacher.
    (recovery.beta, recovery.lr, recovery.steps) = (50.0, 2e-3, 40);
    let followed = recovery.recipe().unwrap();
    train(&followed, &mut Watch::default()).unwrap();
    let parts: Vec<f64> = trajectory(&followed)
        .iter()
        .filter_map(|record| record["parts"]["distillation"].as_f64())
        .collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert_eq!(parts.len(), 40);
    let (first, last) = (mean(&parts[..10]), mean(&parts[30..]));
    println!("{first} to {last}");
    assert!(last < 0.7 * first, "{parts:?}");
}

#[test]
fn what_cannot_be_recovered_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let models = whole_and_half(folder.path());
    let refused = |change: &dyn Fn(&mut Recovery)| {
        let mut recovery = recovery(folder.path(), &models, "no");
        change(&mut recovery);
        let made = recovery
            .recipe()
            .and_then(|recipe| train(&recipe, &mut Watch::default()));
        made.unwrap_err()
    };
    let error = refused(&|r| r.seq_len = 33);
    assert!(error.to_string().contains("train.seq_len"), "{error}");
    let error = refused(&|r| r.freeze = vec![Part::Dense, Part::Router, Part::Experts]);
    assert!(error.to_string().contains("start.freeze"), "{error}");
    let error = refused(&|r| r.model = folder.path().join("nothing"));
    assert!(error.to_string().contains("nothing"), "{error}");
    let dense = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/llama/llama3");
    let error = refused(&|r| r.model = dense.clone());
    assert!(matches!(error, TrainError::Untrainable { .. }), "{error}");
}

/// A model in factors with all rows, which gives up most of them on its way.
fn pruning(folder: &Path, run: &str) -> cadre_train::recipe::Recipe {
    let factors = "factors = { rank = 2, up_rows = 8, down_rows = 16 }\n";
    let rule = "[prune_rows]\nrest = 0.3\ninitial_steps = 2\nfinal_steps = 3\n";
    let changes = [
        (
            "tie_word_embeddings = true",
            format!("tie_word_embeddings = true\n{factors}"),
        ),
        ("[output]", format!("{rule}[output]")),
        ("steps = 8", "steps = 12".to_owned()),
    ];
    let changes: Vec<(&str, &str)> = changes.iter().map(|(a, b)| (*a, b.as_str())).collect();
    recipe_with(folder, run, &changes)
}

#[test]
fn rows_go_by_schedule_and_a_stop_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = pruning(folder.path(), "one");
    let Outcome::Finished { model, eval } = train(&recipe, &mut Watch::default()).unwrap() else {
        panic!("the run ends");
    };
    let made = model.unwrap();
    let steps = trajectory(&recipe);
    let left: Vec<f64> = steps
        .iter()
        .filter_map(|record| record["parts"]["rows_left"].as_f64())
        .collect();
    // Two layers of four experts, three matrices of 8 x 16; a row has 16 values, or 8.
    let (whole, row) = (2.0 * 4.0 * 3.0 * 128.0, 16.0);
    let rule = recipe.prune_rows.unwrap();
    assert_eq!(left.len(), 12);
    assert_eq!(left[..2], [1.0, 1.0]);
    for (step, left) in (1..).zip(&left) {
        let part = rule.part(step, 12);
        assert!(
            *left <= part + 1e-6 && *left > part - row / whole,
            "{step}: {left} of {part}"
        );
    }
    assert!(left.windows(2).all(|pair| pair[0] >= pair[1]) && left[4] < left[3]);

    // What is written has the rows that are left, computes the same, and can be gone on with.
    let checkpoint = Checkpoint::open(&made).unwrap();
    let factors = checkpoint.config().moe.factors.clone().unwrap();
    assert!(
        factors.rank == 2 && factors.uneven.len() == 2,
        "{factors:?}"
    );
    let held: usize = factors
        .uneven
        .iter()
        .flatten()
        .map(|[gate, up, down]| 16 * (gate + up) + 8 * down)
        .sum();
    assert_eq!(held as f64 / whole, left[11]);
    let again = Recovery {
        steps: 1,
        ..recovery(folder.path(), &[made.clone(), made.clone()], "again")
    };
    let again = again.recipe().unwrap();
    train(&again, &mut Watch::default()).unwrap();
    let first = &evaluations(&again.output.dir.join("log.jsonl")).unwrap()[0];
    for (domain, score) in &eval.eval {
        let off = first.eval[domain].nll - score.nll;
        assert!(off.abs() < 0.01, "{domain}: {off}");
    }

    // Stopped while rows go, it is the same run, and the same model to the byte.
    for stop in [4, 11] {
        let stopped = pruning(folder.path(), &format!("stopped-{stop}"));
        let mut watch = Watch {
            stop_after: Some(stop),
            ..Watch::default()
        };
        train(&stopped, &mut watch).unwrap();
        let Outcome::Finished { model, .. } = train(&stopped, &mut Watch::default()).unwrap()
        else {
            panic!("the run ends");
        };
        assert_eq!(trajectory(&stopped), steps);
        let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert!(
            bytes(&model.unwrap()) == bytes(&made),
            "stopped after {stop}"
        );
    }
}

#[test]
fn rows_cannot_go_from_whole_experts() {
    let folder = tempfile::tempdir().unwrap();
    let models = whole_and_half(folder.path());
    let mut recovery = recovery(folder.path(), &models, "no");
    recovery.rest = Some(0.1);
    let error = recovery.recipe().unwrap_err().to_string();
    assert!(error.contains("needs experts in factors"), "{error}");
}
