//! A card trains what the processor trains: losses and norms of gradients of every step, for every kind of layer, rule and
//! method; resuming, what is written, and what is refused.
//!
//! `cargo test --release --features vulkan -p cadre -p cadre-train --test card`, on a machine with a card, or with a
//! Vulkan driver that computes on the processor (`bash crates/train/tests/card/software.sh`). Without either it fails, unless
//! `CADRE_WITHOUT_CARD` is set.
#![cfg(feature = "vulkan")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod runs;

use cadre_checkpoint::Checkpoint;
use cadre_train::device::Place;
use cadre_train::recipe::Recipe;
use cadre_train::trainer::{self, Outcome};
use runs::{Watch, recipe_with, trajectory};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Numbers of a step that a device computes.
const NUMBERS: [&str; 5] = ["loss", "cross_entropy", "balance", "z", "grad_norm"];

/// Relative to the processor's. What the two round differently grows from step to step.
const TOLERANCE: f64 = 2e-3;

const STEPS: u64 = 20;

/// Model keys in the place of the tiny recipe's, and tables before `[train]`.
const VARIANTS: &[(&str, &str, &str)] = &[
    ("top-k", "n_experts = 4\ntop_k = 2", ""),
    (
        "without norms of queries",
        "n_experts = 4\ntop_k = 2\nqk_norm = false",
        "",
    ),
    (
        "as many heads of keys as of queries",
        "n_experts = 4\ntop_k = 2\nn_kv_heads = 2\ninitializer_range = 0.2",
        "",
    ),
    ("dense", "n_experts = 0\nintermediate_size = 24", ""),
    (
        "shared experts and bias (DeepSeek)",
        "n_experts = 6\ntop_k = 2\nshared_intermediate_size = 8",
        "[router]\nname = 'group_limited'\nscore = 'sigmoid'\nn_groups = 3\nkeep_groups = 2\nscale = 1.5\n[balance_bias]\nrate = 0.01\n\
         [losses]\nsequence = 0.01\ndevice = 0.02\ncommunication = 0.02\ndevices = 3",
    ),
    (
        "top-p",
        "n_experts = 5",
        "[router]\nname = 'top_p'\ntop_p = 0.5\n[losses]\nentropy = 0.01",
    ),
    (
        "null experts, layers of several sizes (AdaMoE)",
        "n_experts = [4, 3]\ntop_k = 3",
        "[router]\nname = 'null_experts'\nn_null = 3\n[losses]\nbalance = 0.01\nz = 0.001",
    ),
    (
        "recurrent router (RMoE)",
        "n_experts = 4\ntop_k = 2\nrecurrent_router = 6",
        "",
    ),
    (
        "union of experts, attention too (UoE)",
        "n_experts = 4\ntop_k = 2\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 1 }",
        "[router]\nname = 'union'",
    ),
    (
        "experts of attention alone",
        "n_experts = 0\nintermediate_size = 24\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 1 }",
        "",
    ),
    (
        "router before the layers",
        "n_experts = 4\ntop_k = 2\ndecoupled_router = { hidden_size = 8, n_heads = 2, head_dim = 4, intermediate_size = 8 }\ninitializer_range = 0.2",
        "",
    ),
    (
        "switch with dropping",
        "n_experts = 4",
        "[router]\nname = 'switch'\ncapacity = { factor = 0.6 }\n[losses]\nbalance = 0.01\nz = 0.001",
    ),
    (
        "gshard",
        "n_experts = 4",
        "[router]\nname = 'top_2'\nsecond = 'random'",
    ),
    (
        "sparse mixer",
        "n_experts = 4",
        "[router]\nname = 'sparse_mixer'",
    ),
    (
        "expert choice",
        "n_experts = 4",
        "[router]\nname = 'expert_choice'\nallow_non_causal = true",
    ),
    (
        "two passes that agree (THOR)",
        "n_experts = 4\ntop_k = 1",
        "[router]\nname = 'uniform'\n[losses]\nconsistency = 2.0",
    ),
    (
        "dense, then sparse (EvoMoE)",
        "n_experts = 4",
        "[router]\nname = 'dense_to_sparse'\ndecay_steps = 10\n[evolve]\ndense_steps = 5\nspawn = { mask = 0.1 }",
    ),
    (
        "residual, smaller layers first (PR-MoE)",
        "n_experts = [3, 4]\nresidual = 'learned'\nintermediate_size = 12",
        "[router]\nname = 'switch'",
    ),
    (
        "experts that share weights",
        "n_experts = 4\ntop_k = 2\nshared_weights = [[0, 0, 1, 2], [0, 1, 1, 0]]",
        "",
    ),
    (
        "matrices in factors",
        "n_experts = 4\ntop_k = 2\nfactors = { rank = 3, up_rows = 2, down_rows = 2 }",
        "",
    ),
];

/// The device that the tests use, a card before what is none.
fn place() -> Option<Place> {
    let open = |place: Place| place.open().map(|_| place);
    let found = open(Place::Vulkan).or_else(|card| {
        open(Place::VulkanSoftware).map_err(|software| format!("{card}\n{software}"))
    });
    #[expect(clippy::disallowed_methods, reason = "asked of whoever runs the tests")]
    let without = std::env::var_os("CADRE_WITHOUT_CARD").is_some();
    match found {
        Ok(place) => Some(place),
        Err(_) if without => None,
        Err(problem) => panic!("{problem}\nset CADRE_WITHOUT_CARD=1 to leave these tests out"),
    }
}

/// The tiny recipe on `place`, its steps longer and fewer, and little to evaluate.
fn on(place: Place, folder: &Path, run: &str, changes: &[(&str, &str)]) -> Recipe {
    let mut recipe = recipe_with(folder, run, changes);
    recipe.train.device = place;
    recipe.train.lr = 3e-3;
    recipe.train.steps = STEPS;
    recipe.output.eval_every = 0;
    let heldout = folder.join("heldout.jsonl");
    let words = ["one two three four five"; 5].join(" ");
    std::fs::write(&heldout, format!("{{\"text\":\"{words}\"}}\n")).unwrap();
    for source in &mut recipe.data.as_mut().unwrap().sources {
        source.heldout.clone_from(&heldout);
    }
    recipe
}

/// The steps of `recipe`, without checkpoints, on bytes of a text that repeats itself.
fn steps(recipe: &Recipe, folder: &Path) -> Vec<Value> {
    let path = folder.join("tokens.u32");
    let train = &recipe.train;
    let n = STEPS as usize * train.accumulate * train.batch_size * (train.seq_len + 1);
    let text = "the router of a layer picks two experts, and their outputs are summed. ".bytes();
    let tokens: Vec<u8> = text
        .cycle()
        .take(n)
        .flat_map(|id| u32::from(id).to_le_bytes())
        .collect();
    std::fs::write(&path, tokens).unwrap();
    let records = trainer::bench(recipe, STEPS, Some(&path)).unwrap();
    let records = records
        .iter()
        .map(|record| serde_json::to_value(record).unwrap());
    records.collect()
}

fn train(recipe: &Recipe, stop_after: Option<u64>) -> Option<PathBuf> {
    let mut watch = Watch {
        stop_after,
        ..Watch::default()
    };
    match trainer::train(recipe, &mut watch).unwrap() {
        Outcome::Finished { model, .. } => Some(model.unwrap()),
        Outcome::Stopped { .. } => None,
    }
}

/// What differs most between the numbers of two runs: by how much, where, and both values.
fn furthest(ours: &[Value], theirs: &[Value]) -> (f64, String) {
    assert_eq!(ours.len(), theirs.len());
    let mut worst = (0.0, String::from("nothing"));
    let mut compare = |what: String, a: &Value, b: &Value| {
        let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
        let off = (a - b).abs() / a.abs().max(1e-2);
        if off > worst.0 {
            worst = (off, format!("{what}: {b} there, {a} on the processor"));
        }
    };
    for (a, b) in ours.iter().zip(theirs) {
        let step = &a["step"];
        assert_eq!(*step, b["step"]);
        for name in NUMBERS.into_iter().filter(|name| !a[name].is_null()) {
            compare(format!("{name} of step {step}"), &a[name], &b[name]);
        }
        for (domain, score) in a["eval"].as_object().into_iter().flatten() {
            compare(
                format!("held-out {domain}"),
                &score["nll"],
                &b["eval"][domain]["nll"],
            );
        }
        for (name, part) in a["parts"].as_object().into_iter().flatten() {
            compare(format!("{name} of step {step}"), part, &b["parts"][name]);
        }
    }
    worst
}

/// Takes the steps of a recipe on both, and says how far they are apart when that is too far.
fn compared(
    card: Place,
    folder: &Path,
    name: &str,
    changes: &[(&str, &str)],
) -> Result<(), String> {
    let [ours, theirs] =
        [Place::Cpu, card].map(|place| steps(&on(place, folder, "run", changes), folder));
    let (off, what) = furthest(&ours, &theirs);
    let at = |step: usize| {
        let of = |run: &[Value]| run[step]["cross_entropy"].as_f64().unwrap();
        format!("{:.6} and {:.6}", of(&ours), of(&theirs))
    };
    println!(
        "{name}: {}, then {}; at most {off:.1e} apart, {what}",
        at(0),
        at(ours.len() - 1)
    );
    // Another rounding, or the card was not asked.
    assert!(off > 0.0, "{name}: the same device twice");
    match off < TOLERANCE {
        true => Ok(()),
        false => Err(format!("{name}: {what}, {off:.1e} apart")),
    }
}

#[test]
fn every_kind_of_layer_trains_as_on_the_processor() {
    let Some(card) = place() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut far = Vec::new();
    for (name, model, tables) in VARIANTS {
        let tables = format!("{tables}\n[train]");
        let heads = match model.contains("n_kv_heads") {
            true => "",
            false => "n_kv_heads = 1",
        };
        let changes = [
            ("n_kv_heads = 1", heads),
            ("n_experts = 4\n        top_k = 2", *model),
            ("[train]", &tables),
        ];
        far.extend(compared(card, folder.path(), name, &changes).err());
    }
    assert!(far.is_empty(), "{}", far.join("\n"));
}

#[test]
fn methods_that_need_a_model_train_as_on_the_processor() {
    let Some(card) = place() else { return };
    let folder = tempfile::tempdir().unwrap();
    let first = on(Place::Cpu, folder.path(), "first", &[]);
    let model = train(&first, None).unwrap();
    let before = "decoupled_router = { hidden_size = 8, n_heads = 2, head_dim = 4, intermediate_size = 8 }\ninitializer_range = 0.2";
    let mut far = Vec::new();
    for (name, keys, tables) in [
        (
            "frozen parts, and a teacher",
            "",
            format!(
                "[start]\nfrom = {model:?}\nfreeze = ['experts']\n[distill]\nteacher = {model:?}\ntemperature = 2.0\n[train]"
            ),
        ),
        (
            "a router before the layers that follows those of layers",
            before,
            format!(
                "[start]\nfrom = {model:?}\nfreeze = ['experts', 'dense']\n[router_distill]\nteacher = {model:?}\n[train]"
            ),
        ),
        (
            "layers computed again",
            "recurrent_router = 6",
            "[losses]\nbalance = 0.02\nz = 0.001\nscope = 'global'\n[train]\nrecompute = 'layer'"
                .to_owned(),
        ),
    ] {
        let keys = format!("{keys}\ntie_word_embeddings = true");
        let changes = [
            ("tie_word_embeddings = true", keys.as_str()),
            ("[train]", tables.as_str()),
        ];
        far.extend(compared(card, folder.path(), name, &changes).err());
    }
    assert!(far.is_empty(), "{}", far.join("\n"));
}

#[test]
fn a_run_on_a_card_resumes_exactly_and_writes_what_the_processor_writes() {
    let Some(card) = place() else { return };
    let folder = tempfile::tempdir().unwrap();
    let run = |place: Place, name: &str| on(place, folder.path(), name, &[]);
    let (whole, parts, ours) = (
        run(card, "whole"),
        run(card, "parts"),
        run(Place::Cpu, "ours"),
    );
    let model = train(&whole, None).unwrap();
    for stop_after in [Some(3), Some(2)] {
        assert!(train(&parts, stop_after).is_none());
    }
    // What was computed elsewhere is not gone on with unsaid.
    let elsewhere = run(Place::Cpu, "parts");
    let refused = trainer::train(&elsewhere, &mut Watch::default()).unwrap_err();
    assert!(refused.to_string().contains("device"), "{refused}");
    let again = train(&parts, None).unwrap();
    assert_eq!(trajectory(&whole), trajectory(&parts));
    let bytes = |model: &Path| std::fs::read(model.join("model.safetensors")).unwrap();
    assert!(bytes(&model) == bytes(&again), "other weights");

    let other = train(&ours, None).unwrap();
    let (off, what) = furthest(&trajectory(&ours), &trajectory(&whole));
    assert!(off < TOLERANCE, "{what}");
    let open = |model: &Path| Checkpoint::open(model).unwrap();
    let (theirs, ours) = (open(&model), open(&other));
    for (name, shape) in cadre_checkpoint::tensor_specs(ours.config()) {
        let of = |checkpoint: &Checkpoint| checkpoint.tensor_f32(&name, &shape).unwrap();
        for (a, b) in of(&ours).iter().zip(&of(&theirs)) {
            // Written as bf16, which has three digits; AdamW moves weights without gradient by what rounding is left of it.
            assert!(
                (a - b).abs() < 4e-3 * a.abs().max(0.1),
                "{name}: {b}, not {a}"
            );
        }
    }
}

#[test]
fn more_than_a_card_can_hold_is_an_error_that_says_what_to_do() {
    let Some(card) = place() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut recipe = on(
        card,
        folder.path(),
        "large",
        &[("vocab_size = 280", "vocab_size = 1000000")],
    );
    // Logits of 260 GB.
    recipe.train.batch_size = 4096;
    let error = trainer::bench(&recipe, 1, None).unwrap_err().to_string();
    for part in [card.name(), "step 1", "train.batch_size"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn without_a_card_a_driver_that_computes_on_the_processor_is_not_taken_for_one() {
    if place() != Some(Place::VulkanSoftware) {
        return;
    }
    let error = Place::Vulkan.open().unwrap_err().to_string();
    for part in [
        "train.device = \"vulkan\"",
        "computes on the processor",
        "\"vulkan-software\"",
    ] {
        assert!(error.contains(part), "{error}");
    }
}
