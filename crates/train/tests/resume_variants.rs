//! Stopped and resumed is never stopped, for every kind of MoE layer: what is random or scheduled follows from the step.

mod runs;

use cadre_train::trainer::{self, Outcome};
use runs::{Watch, recipe_with, trajectory};

/// Model keys instead of the tiny recipe's, and its router table.
const VARIANTS: &[(&str, &str)] = &[
    (
        "n_experts = 4",
        "name = 'top_2'\nsecond = 'random'\ncapacity = { factor = 1.0, min = 0 }\ndrop_order = 'random'\nallow_non_causal = true",
    ),
    (
        "n_experts = 4\nresidual = 'learned'\nintermediate_size = 8",
        "name = 'dense_to_sparse'\ntemperature = 0.6\ndecay_steps = 6\nhard_from = 7",
    ),
    ("n_experts = 4", "name = 'uniform'"),
    (
        "n_experts = [4, 3]\ntop_k = 3\nrecurrent_router = 3\nshared_intermediate_size = 4",
        "name = 'null_experts'\nn_null = 3",
    ),
    (
        "n_experts = [4, 3]\ntop_k = 2\ndecoupled_router = { hidden_size = 8, n_heads = 2, head_dim = 4, intermediate_size = 8, per_layer = true }",
        "name = 'top_k'",
    ),
    (
        "n_experts = 4\ntop_k = 2\nattention_experts = { n_experts = 2, top_k = 1 }",
        "name = 'union'",
    ),
];

/// What nothing can generate with is trained and scored all the same; the reason is part of the outcome.
#[test]
fn experts_that_choose_their_tokens_train_and_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let router = "[router]\nname = 'expert_choice'\nallow_non_causal = true\n[output]";
    let recipe = recipe_with(folder.path(), "run", &[("[output]", router)]);
    let outcome = trainer::train(&recipe, &mut Watch::default()).unwrap();
    let Outcome::Finished { model, eval } = outcome else {
        panic!("not stopped");
    };
    assert!(model.unwrap_err().to_string().contains("expert_choice"));
    assert_eq!(eval.eval.len(), 2);
    assert!(!recipe.output.dir.join("model").exists());
}

#[test]
fn every_variant_resumes_exactly() {
    let folder = tempfile::tempdir().unwrap();
    for (i, (model, router)) in VARIANTS.iter().enumerate() {
        let output = format!("[router]\n{router}\n        [output]");
        let of_attention = model.contains("attention_experts");
        let heads = format!("n_kv_heads = {}", if of_attention { 2 } else { 1 });
        let changes = [
            ("n_kv_heads = 1", heads.as_str()),
            ("n_experts = 4\n        top_k = 2", *model),
            ("[output]", output.as_str()),
            ("eval_every = 4", "eval_every = 8"),
        ];
        let whole = recipe_with(folder.path(), &format!("whole-{i}"), &changes);
        trainer::train(&whole, &mut Watch::default()).unwrap();
        let parts = recipe_with(folder.path(), &format!("parts-{i}"), &changes);
        for stop_after in [Some(3), None] {
            let mut watch = Watch {
                stop_after,
                ..Watch::default()
            };
            trainer::train(&parts, &mut watch).unwrap();
        }
        assert_eq!(trajectory(&whole), trajectory(&parts), "{router}");
        let bytes = |recipe: &cadre_train::recipe::Recipe| {
            std::fs::read(recipe.output.dir.join("model/model.safetensors")).unwrap()
        };
        assert!(bytes(&whole) == bytes(&parts), "{router}");
        let last = trajectory(&whole).remove(7);
        assert!(last["layers"][0]["picks"].as_f64().unwrap() > 0.0);
        let attention = last["attention"].as_array().map(Vec::len);
        assert_eq!(attention, of_attention.then_some(2), "layers of attention");
        let dropped = last["layers"][0]["dropped"].as_f64().unwrap_or_default();
        assert_eq!(dropped > 0.0, i == 0, "{router}: {dropped} dropped");
    }
}
