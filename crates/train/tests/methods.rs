//! Training methods on tiny runs: exact resumption of each, and what each promises.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod runs;

use burn::tensor::Device;
use cadre_train::lm::{Batch, LanguageModel, Pass};
use cadre_train::methods::balance_scope::{Scope, ScopedLoads};
use cadre_train::methods::evolve::{Evolve, Spawn};
use cadre_train::methods::start::Part;
use cadre_train::optimizer::GradientSum;
use cadre_train::recipe::Recipe;
use cadre_train::trainer;
use cadre_train::{export, init::Init, params};
use runs::{Watch, recipe, recipe_with, snapshots, trajectory};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn run(recipe: &Recipe, stop_after: Option<u64>) {
    let mut watch = Watch {
        stop_after,
        ..Watch::default()
    };
    trainer::train(recipe, &mut watch).unwrap();
}

/// The line before which tables of methods are put.
const TABLE: &str = "[train]";
const LOSSES: &str = "[losses]\n";

/// Interrupted twice is not interrupted: equal logs, equal weights. Returns the whole run.
fn resumes(folder: &Path, changes: &[(&str, &str)]) -> Recipe {
    let whole = recipe_with(folder, "whole", changes);
    run(&whole, None);
    let parts = recipe_with(folder, "parts", changes);
    for stop_after in [Some(3), Some(2), None] {
        run(&parts, stop_after);
    }
    assert_eq!(trajectory(&whole), trajectory(&parts));
    let last = |r: &Recipe| state(&snapshots(r).pop().unwrap());
    assert!(
        last(&whole) == last(&parts),
        "other parameters, moments or biases"
    );
    whole
}

fn table(text: &str) -> String {
    format!("{text}\n{TABLE}")
}

fn model(recipe: &Recipe) -> LanguageModel {
    let init = Init {
        seed: recipe.seed,
        std: 0.3,
        device: Device::flex().autodiff(),
    };
    LanguageModel::init(&recipe.architecture().unwrap(), &init)
}

/// `n` sequences of 8 tokens.
fn batch(n: usize, shift: usize) -> Batch {
    let ids = |by: usize| {
        Arc::new(
            (0..n * 8)
                .map(|i| ((i + shift) * 7 + by) as u32 % 280)
                .collect(),
        )
    };
    Batch {
        tokens: ids(0),
        targets: ids(3),
        seq_len: 8,
    }
}

/// The tensors of a snapshot.
fn state(snapshot: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = std::fs::read(snapshot.join("state.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let all = tensors.tensors().into_iter();
    all.map(|(name, view)| (name, view.data().to_vec()))
        .collect()
}

/// A finished run to start from or to follow.
fn trained(folder: &Path) -> PathBuf {
    let first = recipe(folder, "first");
    run(&first, None);
    first.output.dir.join("model")
}

#[test]
fn every_scope_resumes_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let mut balances = Vec::new();
    for scope in ["micro", "global", "buffer"] {
        let folder = folder.path().join(scope);
        std::fs::create_dir(&folder).unwrap();
        let text = table(&format!("{LOSSES}scope = \"{scope}\"\nbalance = 0.5"));
        let whole = resumes(&folder, &[(TABLE, &text)]);
        balances.push(trajectory(&whole)[0]["balance"].as_f64().unwrap());
    }
    assert!(
        balances[0] != balances[1] && balances[1] != balances[2],
        "{balances:?}"
    );
}

#[test]
fn the_global_scope_has_the_gradient_of_the_whole_batch() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "run");
    let architecture = recipe.architecture().unwrap();
    let model = model(&recipe);
    let halves = [batch(2, 0), batch(2, 16)];
    let whole = batch(4, 0);
    assert_eq!(whole.tokens[16..], halves[1].tokens[..]);
    let gradient = |batches: &[Batch], scope: Scope| -> Vec<f32> {
        let pass = Pass::default();
        let mut scoped = ScopedLoads::new(scope);
        if scope == Scope::Global {
            for batch in batches {
                let forward = model.forward(&architecture, batch, &pass).unwrap();
                scoped
                    .count(&architecture.balance_loads(&forward.routed))
                    .unwrap();
            }
        }
        let mut sum = GradientSum::default();
        for batch in batches {
            let forward = model.forward(&architecture, batch, &pass).unwrap();
            let loads = scoped
                .of(architecture.balance_loads(&forward.routed))
                .unwrap();
            let losses = model.score(&architecture, forward, batch, &loads);
            let mut gradients = losses.balance.backward();
            sum.add(&model, &mut gradients, 1.0 / batches.len() as f32)
                .unwrap();
        }
        sum.get("layers.1.mlp.Moe.gate").unwrap().to_vec()
    };
    let exact = gradient(std::slice::from_ref(&whole), Scope::Micro);
    let size = exact.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert!(size > 0.0);
    let error = |other: &[f32]| {
        let pairs = exact.iter().zip(other);
        pairs.fold(0f32, |m, (a, b)| m.max((a - b).abs())) / size
    };
    let global = error(&gradient(&halves, Scope::Global));
    let micro = error(&gradient(&halves, Scope::Micro));
    assert!(global < 1e-4, "{global}");
    assert!(
        micro > 1e-2,
        "the micro-batches' own loads are another loss: {micro}"
    );
}

#[test]
fn the_balance_bias_moves_after_a_step_and_resumes_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let router = "[router]\nname = \"group_limited\"\nscore = \"sigmoid\"";
    let text = table(&format!(
        "{router}\n[balance_bias]\nrate = 0.05\nuntil_step = 5"
    ));
    let whole = resumes(folder.path(), &[(TABLE, &text)]);
    let bias = |snapshot: &Path| -> Vec<f32> {
        let bytes = &state(snapshot)["b.1"];
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    };
    let snapshots = snapshots(&whole);
    assert_eq!(
        bias(&snapshots[0]),
        bias(&snapshots[1]),
        "still after step 5"
    );
    // An odd number of moves by the same size never adds up to none.
    let sixth = bias(&snapshots[0]);
    assert!(sixth.len() == 4 && sixth.iter().any(|b| *b != 0.0));
    for b in &sixth {
        let moves = b / 0.05;
        assert!(
            (moves - moves.round()).abs() < 1e-4 && moves.abs() < 5.5,
            "{sixth:?}"
        );
    }
    // What the last step left is exported, and read back as it was written (bf16 keeps three digits).
    let exported = export::open(&whole.output.dir.join("model"), &Device::flex()).unwrap();
    let written = exported.biases[1].iter().zip(bias(&snapshots[1]));
    for (b, last) in written {
        assert!((b - last).abs() < 4e-3 * last.abs() + 1e-6, "{b} {last}");
    }
    // The first step does not see what follows from its own picks.
    let plain = recipe_with(folder.path(), "plain", &[(TABLE, &table(router))]);
    run(&plain, None);
    let (with, without) = (trajectory(&whole), trajectory(&plain));
    assert_eq!(with[0], without[0]);
    assert_ne!(with[2], without[2]);
}

#[test]
fn the_entropy_of_routers_is_a_loss() {
    let folder = tempfile::tempdir().unwrap();
    let weight = |weight: &str| table(&format!("{LOSSES}entropy = {weight}"));
    let whole = resumes(folder.path(), &[(TABLE, &weight("2.0"))]);
    let plain = recipe_with(folder.path(), "plain", &[(TABLE, &weight("0.0"))]);
    run(&plain, None);
    let (with, without) = (trajectory(&whole), trajectory(&plain));
    let number = |step: &serde_json::Value, key: &str| step[key].as_f64().unwrap();
    let mean = |step: &serde_json::Value| {
        let layers = step["layers"].as_array().unwrap();
        layers.iter().map(|l| number(l, "entropy")).sum::<f64>() / layers.len() as f64
    };
    let first = &with[0];
    let part = number(&first["parts"], "entropy");
    assert!((part - mean(first)).abs() < 1e-5, "{part} {}", mean(first));
    let others = number(first, "cross_entropy")
        + 0.01 * number(first, "balance")
        + 0.001 * number(first, "z");
    assert!((number(first, "loss") - others - 2.0 * part).abs() < 1e-5);
    assert!(without[0]["parts"].is_null(), "not computed without weight");
    let last = |log: &[serde_json::Value]| {
        let mut steps = log.iter().filter(|line| line["loss"].is_f64());
        mean(steps.next_back().unwrap())
    };
    assert!(last(&with) < last(&without));
}

#[test]
fn a_recurrent_state_that_restarts_forgets_the_layer_below() {
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str, restarts: bool| {
        let keys = format!("top_k = 2\nrecurrent_router = 4\nrecurrent_restarts = {restarts}");
        recipe_with(folder.path(), name, &[("top_k = 2", &keys)])
    };
    let logits = |recipe: &Recipe| -> Vec<Vec<f32>> {
        let architecture = recipe.architecture().unwrap();
        let forward = model(recipe).forward(&architecture, &batch(2, 0), &Pass::default());
        let routed = forward.unwrap().routed.into_iter();
        routed
            .map(|r| r.logits.to_data().try_to_vec().unwrap())
            .collect()
    };
    let (memory, restarts) = (of("memory", false), of("restarts", true));
    let (a, b) = (logits(&memory), logits(&restarts));
    assert_eq!(a[0], b[0], "below the first layer there is nothing");
    assert_ne!(a[1], b[1]);
    let architecture = restarts.architecture().unwrap();
    let exported = export::Exported {
        architecture: &architecture,
        biases: &[],
        step: 1,
    };
    let text = export::stored_config(exported).unwrap_err().to_string();
    assert!(text.contains("recurrent"), "{text}");
}

#[test]
fn consistency_resumes_exactly_and_is_nothing_with_one_expert() {
    let folder = tempfile::tempdir().unwrap();
    let uniform = table("[router]\nname = \"uniform\"\n[losses]\nconsistency = 2.0");
    let whole = resumes(folder.path(), &[(TABLE, &uniform)]);
    let log = trajectory(&whole);
    assert!(log[3]["parts"]["consistency"].as_f64().unwrap() > 0.0);

    let one = |name: &str, losses: &str| {
        let changes = [
            ("n_experts = 4", "n_experts = 1"),
            ("top_k = 2", "top_k = 1\nnorm_topk_prob = false"),
            (TABLE, losses),
        ];
        let recipe = recipe_with(folder.path(), name, &changes);
        run(&recipe, Some(1));
        trajectory(&recipe)[0].clone()
    };
    let once = one("once", TABLE);
    let twice = one("twice", &table("[losses]\nconsistency = 5.0"));
    assert_eq!(twice["parts"]["consistency"], 0.0);
    assert_eq!(twice["cross_entropy"], once["cross_entropy"]);
    let norm = |step: &serde_json::Value| step["grad_norm"].as_f64().unwrap();
    assert!(
        (norm(&twice) / norm(&once) - 2.0).abs() < 1e-5,
        "{} {}",
        norm(&twice),
        norm(&once)
    );
}

#[test]
fn distillation_resumes_exactly_stops_and_is_nothing_for_the_teacher_itself() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = trained(folder.path());
    let staged = table(&format!(
        "[distill]\nteacher = {teacher:?}\nbeta = 0.5\ntemperature = 2.0\nuntil_step = 5"
    ));
    let whole = resumes(folder.path(), &[(TABLE, &staged), ("seed = 3", "seed = 4")]);
    let steps: Vec<_> = trajectory(&whole)
        .into_iter()
        .filter(|r| r.get("loss").is_some())
        .collect();
    for (i, step) in steps.iter().enumerate() {
        let part = step
            .get("parts")
            .and_then(|parts| parts["distillation"].as_f64());
        assert_eq!(part.is_some(), i < 5, "step {}", i + 1);
        assert!(part.is_none_or(|kd| kd > 0.0));
    }
    let read = |name: &str| std::fs::read(teacher.parent().unwrap().join(name)).unwrap();
    assert_eq!(
        std::fs::read(whole.output.dir.join("tokenizer.json")).unwrap(),
        read("tokenizer.json")
    );

    let start = format!("[start]\nfrom = {teacher:?}\n");
    let alone = recipe_with(folder.path(), "alone", &[(TABLE, &table(&start))]);
    let follow = format!("{start}[distill]\nteacher = {teacher:?}\n");
    let followed = recipe_with(folder.path(), "followed", &[(TABLE, &table(&follow))]);
    run(&alone, Some(1));
    run(&followed, Some(1));
    let (alone, followed) = (
        trajectory(&alone)[0].clone(),
        trajectory(&followed)[0].clone(),
    );
    assert!(followed["parts"]["distillation"].as_f64().unwrap().abs() < 1e-6);
    let norm = |step: &serde_json::Value| step["grad_norm"].as_f64().unwrap();
    assert!((norm(&alone) - norm(&followed)).abs() < 1e-5 * norm(&alone));
}

#[test]
fn a_teacher_of_another_vocabulary_and_a_start_of_other_sizes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = trained(folder.path());
    let refused = |name: &str, changes: &[(&str, &str)]| {
        let recipe = recipe_with(folder.path(), name, changes);
        trainer::train(&recipe, &mut Watch::default())
            .unwrap_err()
            .to_string()
    };
    let distill = table(&format!("[distill]\nteacher = {teacher:?}"));
    let error = refused(
        "a",
        &[(TABLE, &distill), ("vocab_size = 280", "vocab_size = 281")],
    );
    assert!(error.contains("vocab_size is 280 there, 281"), "{error}");
    let start = table(&format!("[start]\nfrom = {teacher:?}"));
    let changes = [
        (TABLE, start.as_str()),
        ("n_experts = 4", "n_experts = 8"),
        ("n_heads = 2", "n_heads = 4"),
        ("head_dim = 8", "head_dim = 4"),
    ];
    let error = refused("b", &changes);
    for part in [
        "num_attention_heads is 2 there, 4",
        "head_dim is 8 there, 4",
        "Moe.gate is [4, 16] there, [8, 16]",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn frozen_parts_do_not_move_by_a_bit_and_a_started_run_resumes_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let from = trained(folder.path());
    let start = export::open(&from, &Device::flex()).unwrap();
    let start = params::collect(&start.model);
    let bytes = |values: &[f32]| {
        values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    for (i, (freeze, moving)) in [
        (r#"["router", "dense"]"#, vec![Part::Experts]),
        (r#"["experts", "dense"]"#, vec![Part::Router]),
        (r#"["router", "experts"]"#, vec![Part::Dense]),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = folder.path().join(i.to_string());
        std::fs::create_dir(&folder).unwrap();
        let text = table(&format!("[start]\nfrom = {from:?}\nfreeze = {freeze}"));
        let whole = resumes(&folder, &[(TABLE, &text)]);
        let state = state(&snapshots(&whole)[1]);
        for (path, (_, values)) in &start {
            let same = state[&format!("p.{path}")] == bytes(values);
            assert_eq!(same, !moving.contains(&Part::of(path)), "{freeze} {path}");
            assert_eq!(state.contains_key(&format!("m.{path}")), !same, "{path}");
        }
    }
}

#[test]
fn experts_evolve_from_one_and_the_run_resumes_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let text = table("[evolve]\ndense_steps = 3\nspawn = { noise = 0.02 }");
    let whole = resumes(folder.path(), &[(TABLE, &text)]);
    let log = trajectory(&whole);
    for (i, step) in log.iter().filter(|r| r.get("loss").is_some()).enumerate() {
        let layer = &step["layers"][0];
        let (dense, picks) = (i < 3, layer["picks"].as_f64().unwrap());
        assert_eq!(picks, if dense { 1.0 } else { 2.0 }, "step {}", i + 1);
        assert_eq!(layer["dead"] == 3, dense, "step {}", i + 1);
    }
}

#[test]
fn perfect_copies_compute_what_the_one_expert_did() {
    let folder = tempfile::tempdir().unwrap();
    let text = table("[evolve]\ndense_steps = 3\nspawn = { mask = 0.0 }");
    let recipe = recipe_with(folder.path(), "run", &[(TABLE, &text)]);
    let architecture = recipe.architecture().unwrap();
    let evolve = Evolve {
        dense_steps: 3,
        spawn: Spawn::Mask(0.0),
    };
    let before = model(&recipe);
    let loss = |model: &LanguageModel, step: u64| -> f32 {
        let pass = Pass {
            step,
            training: true,
            ..Pass::default()
        };
        let losses = model.losses(&architecture, &batch(2, 0), &pass).unwrap();
        losses.cross_entropy.into_scalar()
    };
    let dense = loss(&before, 3);
    assert!(
        (dense - loss(&before, 4)).abs() > 1e-4,
        "other experts compute something else"
    );
    let spawned = evolve.spawn(4, 3, before, &mut BTreeMap::new());
    // Weights of two equal experts sum to 1.
    assert!((dense - loss(&spawned, 4)).abs() < 1e-5);
}

#[test]
fn methods_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |text: &str| {
        let text = runs::text(folder.path(), "run", &[(TABLE, &table(text))]);
        Recipe::parse(Path::new("tiny.toml"), &text)
            .unwrap_err()
            .to_string()
    };
    for (text, named) in [
        ("[balance_bias]\nrate = 0.001", "router.name"),
        ("[evolve]\ndense_steps = 8", "evolve.dense_steps"),
        (
            "[evolve]\ndense_steps = 2\nspawn = { mask = 1.5 }",
            "evolve.spawn.mask",
        ),
        (
            "[distill]\nteacher = \"x\"\ntemperature = 0.0",
            "distill.temperature",
        ),
        ("[losses]\nconsistency = -1.0", "losses.consistency"),
        ("[losses]\nbalance = inf", "losses.balance"),
        ("[losses]\nentropy = nan", "losses.entropy"),
        ("[losses]\nscope = \"world\"", "world"),
        (
            "[start]\nfreeze = [\"router\", \"experts\", \"dense\"]",
            "start.freeze",
        ),
    ] {
        let error = refused(text);
        assert!(error.contains(named), "{named}: {error}");
    }
}
