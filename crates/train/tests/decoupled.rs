//! A router before the layers, taught by the routers of a trained mixture: what moves, what does not, what is refused, and
//! that an interrupted run is the whole one.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod runs;

use burn::tensor::Device;
use cadre_checkpoint::Checkpoint;
use cadre_train::lm::{Batch, LanguageModel, Pass};
use cadre_train::optimizer::GradientSum;
use cadre_train::recipe::Recipe;
use cadre_train::trainer;
use cadre_train::{export, init::Init};
use runs::{Watch, recipe_with, snapshots, text, trajectory};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn run(recipe: &Recipe, stop_after: Option<u64>) {
    let mut watch = Watch {
        stop_after,
        ..Watch::default()
    };
    trainer::train(recipe, &mut watch).unwrap();
}

/// The last line of the keys of the tiny recipe's model.
const MODEL: &str = "tie_word_embeddings = true";

fn router(per_layer: bool) -> String {
    format!(
        "{MODEL}\ndecoupled_router = {{ hidden_size = 12, n_heads = 2, head_dim = 6, intermediate_size = 12, per_layer = {per_layer} }}"
    )
}

/// A mixture whose routers look at layers, and tables that start from it and follow it.
fn teacher(folder: &Path) -> (PathBuf, String) {
    // Wide enough that its routers tell tokens apart.
    let wide = format!("{MODEL}\ninitializer_range = 0.3");
    let first = recipe_with(folder, "first", &[(MODEL, wide.as_str())]);
    run(&first, None);
    let model = first.output.dir.join("model");
    let tables = format!(
        "[start]\nfrom = {model:?}\nfreeze = [\"experts\", \"dense\"]\n[router_distill]\nteacher = {model:?}\n[train]"
    );
    (model, tables)
}

#[test]
fn a_router_before_the_layers_learns_what_those_of_layers_do() {
    let folder = tempfile::tempdir().unwrap();
    let (teacher, tables) = teacher(folder.path());
    for per_layer in [true, false] {
        let model = router(per_layer);
        let changes = [
            (MODEL, model.as_str()),
            ("[train]", tables.as_str()),
            ("        steps = 8", "        steps = 40"),
            ("snapshot_every = 2", "snapshot_every = 10"),
            ("eval_every = 4", "eval_every = 40"),
            ("lr = 1e-2", "lr = 2e-2"),
        ];
        let name = |what: &str| format!("{what}-{per_layer}");
        let whole = recipe_with(folder.path(), &name("whole"), &changes);
        run(&whole, None);
        let parts = recipe_with(folder.path(), &name("parts"), &changes);
        for stop_after in [Some(13), None] {
            run(&parts, stop_after);
        }
        assert_eq!(trajectory(&whole), trajectory(&parts));
        let last = |r: &Recipe| snapshots(r).pop().unwrap().join("state.safetensors");
        assert!(std::fs::read(last(&whole)).unwrap() == std::fs::read(last(&parts)).unwrap());

        let steps: Vec<_> = trajectory(&whole)
            .into_iter()
            .filter(|line| line["parts"].is_object())
            .collect();
        let part = |at: usize, name: &str| steps[at]["parts"][name].as_f64().unwrap();
        let n = steps.len() - 1;
        assert!(
            part(n, "router_distillation") < 0.7 * part(0, "router_distillation"),
            "{per_layer}: {} to {}",
            part(0, "router_distillation"),
            part(n, "router_distillation")
        );
        assert!(part(n, "router_agreement") > part(0, "router_agreement") + 0.1);

        let ours = Checkpoint::open(&whole.output.dir.join("model")).unwrap();
        let theirs = Checkpoint::open(&teacher).unwrap();
        let stored = ours.config().moe.decoupled_router.unwrap();
        assert_eq!((stored.per_layer, stored.hidden_size), (per_layer, 12));
        for (name, shape) in cadre_checkpoint::tensor_specs(theirs.config()) {
            if name.ends_with(".mlp.gate.weight") {
                continue;
            }
            let of = |checkpoint: &Checkpoint| checkpoint.tensor_f32(&name, &shape).unwrap();
            assert!(of(&ours) == of(&theirs), "{name} has moved");
        }
    }
}

/// A dense model of 8 neurons, and the changes of a recipe that cuts it into experts of `width`, one for each domain.
fn dense(folder: &Path, keys: &str) -> PathBuf {
    let of_experts = "n_experts = 4\n        top_k = 2\n        moe_intermediate_size = 8";
    let wide = format!("{MODEL}\ninitializer_range = 0.3\n{keys}");
    let changes = [
        (of_experts, "n_experts = 0\nintermediate_size = 8"),
        (MODEL, wide.as_str()),
    ];
    let recipe = recipe_with(folder, "dense", &changes);
    run(&recipe, None);
    recipe.output.dir.join("model")
}

/// The text of a recipe that cuts `dense` into `n` experts of `width`, taught by it.
fn cut(folder: &Path, name: &str, dense: &Path, [n, width]: [usize; 2]) -> String {
    let model = router(true);
    let tables = format!(
        "[cut]\ndense = {dense:?}\ntokens = 64\n[router_distill]\nteacher = {dense:?}\n[train]"
    );
    let experts = format!("n_experts = {n}\ntop_k = 1\nmoe_intermediate_size = {width}");
    let changes = [
        (
            "n_experts = 4\n        top_k = 2\n        moe_intermediate_size = 8",
            experts.as_str(),
        ),
        (MODEL, model.as_str()),
        ("[train]", tables.as_str()),
        ("eval_every = 4", "eval_every = 8"),
    ];
    text(folder, name, &changes)
}

fn losses(folder: &Path) -> f32 {
    let opened = export::open(folder, &Device::flex()).unwrap();
    let ids = |by: usize| Arc::new((0..16).map(|i| (i * 7 + by) as u32 % 280).collect());
    let batch = Batch {
        tokens: ids(0),
        targets: ids(3),
        seq_len: 8,
    };
    let losses = opened
        .model
        .losses(&opened.architecture, &batch, &Pass::default());
    losses.unwrap().cross_entropy.into_scalar()
}

#[test]
fn one_domain_and_all_neurons_are_the_dense_model() {
    for (keys, layout) in [
        ("", "qwen3"),
        ("qk_norm = false\nrms_norm_eps = 1e-5", "llama"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let dense = dense(folder.path(), keys);
        let text = cut(folder.path(), "whole", &dense, [1, 8])
            .replace("lr = 1e-2", "lr = 1e-30")
            .replace(MODEL, &format!("{MODEL}\n{keys}"));
        let lines = text.lines().filter(|line| !line.contains("domain = \"b\""));
        let text: Vec<&str> = lines.collect();
        let recipe = Recipe::parse(Path::new("tiny.toml"), &text.join("\n")).unwrap();
        run(&recipe, None);
        let model = recipe.output.dir.join("model");
        let (ours, theirs) = (losses(&model), losses(&dense));
        assert!((ours - theirs).abs() < 1e-5, "{layout}: {ours} {theirs}");
        let read = |folder: &Path| Checkpoint::open(folder).unwrap();
        assert_eq!(read(&dense).config().model_type, layout);
        assert_eq!(
            read(&model).config().attention,
            read(&dense).config().attention
        );
    }
}

#[test]
fn experts_are_neurons_of_the_dense_model_and_their_router_follows_it() {
    let folder = tempfile::tempdir().unwrap();
    let dense = dense(folder.path(), "");
    let frozen = "[start]\nfreeze = [\"experts\", \"dense\"]\n[cut]";
    let parse = |name: &str| {
        let text = cut(folder.path(), name, &dense, [2, 4])
            .replace("[cut]", frozen)
            .replace("        steps = 8", "        steps = 40")
            .replace("lr = 1e-2", "lr = 2e-2");
        Recipe::parse(Path::new("tiny.toml"), &text).unwrap()
    };
    let (whole, parts) = (parse("whole"), parse("parts"));
    run(&whole, None);
    for stop_after in [Some(13), None] {
        run(&parts, stop_after);
    }
    assert_eq!(trajectory(&whole), trajectory(&parts));
    let found: Vec<f64> = trajectory(&whole)
        .iter()
        .filter_map(|line| line["parts"]["router_distillation"].as_f64())
        .collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&found[..8]), mean(&found[found.len() - 8..]));
    assert!(0.0 < last && last < 0.9 * first, "{first} {last}");

    let open = |folder: &Path| Checkpoint::open(folder).unwrap();
    let (ours, theirs) = (open(&whole.output.dir.join("model")), open(&dense));
    let rows = |checkpoint: &Checkpoint, name: &str, n: usize| -> Vec<Vec<f32>> {
        let values = checkpoint.tensor_f32(name, &[n, 16]).unwrap();
        values.chunks_exact(16).map(<[f32]>::to_vec).collect()
    };
    for layer in 0..2 {
        let all = rows(
            &theirs,
            &format!("model.layers.{layer}.mlp.up_proj.weight"),
            8,
        );
        for expert in 0..2 {
            let name = format!("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight");
            let own = rows(&ours, &name, 4);
            let places = own
                .iter()
                .map(|row| all.iter().position(|other| other == row));
            let places: Vec<usize> = places.map(Option::unwrap).collect();
            assert!(
                places.windows(2).all(|pair| pair[0] < pair[1]),
                "{places:?}"
            );
        }
    }
}

#[test]
fn a_cut_that_makes_no_sense_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let dense = folder.path().join("dense");
    let refused = |from: &str, to: &str, expected: &str| {
        let text = cut(folder.path(), "run", &dense, [2, 4]);
        assert!(text.contains(from), "{from}");
        let error = Recipe::parse(Path::new("tiny.toml"), &text.replace(from, to)).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused(
        "n_experts = 2",
        "n_experts = 3",
        "`model.n_experts` has to be 2",
    );
    refused("top_k = 1", "top_k = 2", "`model.top_k` = 1");
    refused("tokens = 64", "tokens = 0", "cut.tokens");
    refused("tokens = 64", "sharpness = 0.0", "cut.sharpness");
    refused("tokens = 64", "by = \"chance\"", "activity");
    refused("[cut]", "[start]\nfrom = \"x\"\n[cut]", "start.from");
    refused(
        "[router_distill]\nteacher = ",
        "[router_distill]\nbeta = 1.0\nteacher = \"x\" #",
        "who teaches",
    );
}

/// With a guide the text does not reach the router, and without one it does, where weights follow from logits.
#[test]
fn the_text_reaches_the_router_unless_it_is_taught() {
    let folder = tempfile::tempdir().unwrap();
    let model = router(true);
    let recipe = recipe_with(folder.path(), "run", &[(MODEL, model.as_str())]);
    let architecture = recipe.architecture().unwrap();
    let init = Init {
        seed: 3,
        std: 0.3,
        device: Device::flex().autodiff(),
    };
    let model = LanguageModel::init(&architecture, &init);
    let ids = |by: usize| Arc::new((0..16).map(|i| (i * 7 + by) as u32 % 280).collect());
    let batch = Batch {
        tokens: ids(0),
        targets: ids(3),
        seq_len: 8,
    };
    let gradient = |detached: bool| {
        let pass = Pass {
            detached,
            ..Pass::default()
        };
        let losses = model.losses(&architecture, &batch, &pass).unwrap();
        let loss = losses.cross_entropy + losses.balance + losses.z;
        let mut sum = GradientSum::default();
        sum.add(&model, &mut loss.backward(), 1.0).unwrap();
        let of_router = sum.get("router.head").map(<[f32]>::to_vec);
        of_router.is_some_and(|values| values.iter().any(|x| x.abs() > 1e-6))
    };
    assert!(gradient(false) && !gradient(true));
}

#[test]
fn a_new_router_reads_the_embedding_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let (teacher, tables) = teacher(folder.path());
    let model = router(true);
    let changes = [
        (MODEL, model.as_str()),
        ("[train]", tables.as_str()),
        ("lr = 1e-2", "lr = 1e-30"),
        ("eval_every = 4", "eval_every = 8"),
    ];
    let recipe = recipe_with(folder.path(), "run", &changes);
    run(&recipe, None);
    let device = Device::flex();
    let opened = export::open(&recipe.output.dir.join("model"), &device).unwrap();
    let found = cadre_train::params::collect(&opened.model);
    let (_, table) = &found["router.embed_tokens"];
    let (_, embedding) = &found["embed_tokens"];
    for row in 0..280 {
        let (ours, theirs) = (&table[row * 12..][..12], &embedding[row * 16..][..12]);
        // Weight decay and bf16.
        let near = ours
            .iter()
            .zip(theirs)
            .all(|(a, b)| (a - b).abs() <= 1e-2 * b.abs());
        assert!(near, "row {row}: {ours:?} {theirs:?}");
    }
    assert!(teacher.exists());
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |changes: &[(&str, &str)], expected: &str| {
        let text = text(folder.path(), "run", changes);
        let error = Recipe::parse(Path::new("tiny.toml"), &text).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(expected), "{error}");
    };
    let (one, each) = (router(false), router(true));
    refused(
        &[("[train]", "[router_distill]\nteacher = \"x\"\n[train]")],
        "needs `model.decoupled_router`",
    );
    refused(
        &[(MODEL, &one), ("n_experts = 4", "n_experts = [4, 3]")],
        "set `per_layer = true`",
    );
    refused(
        &[
            (MODEL, &each),
            ("lr = 1e-2", "lr = 1e-2\nrecompute = \"layer\""),
        ],
        "train.recompute",
    );
    refused(
        &[
            (MODEL, &each),
            ("[train]", "[router]\nname = \"uniform\"\n[train]"),
        ],
        "does not look at",
    );
    refused(
        &[(MODEL, &each), ("top_k = 2", "top_k = 1")],
        "does not learn from the text",
    );
    let both = format!("{each}\nrecurrent_router = 3");
    refused(&[(MODEL, &both)], "recurrent_router");
    let odd = each.replace("head_dim = 6", "head_dim = 5");
    refused(&[(MODEL, &odd)], "decoupled_router.head_dim");
}
