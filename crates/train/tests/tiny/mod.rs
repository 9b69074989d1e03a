//! Tiny models in all their variants, without a run.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use cadre_train::recipe::Recipe;
use std::path::Path;

/// A recipe of two MoE layers after a dense one, with `model` added to its model and `router` as its router table.
pub(crate) fn recipe(model: &str, router: &str) -> Recipe {
    let mut text = String::from(
        r#"
        name = "tiny"
        [model]
        vocab_size = 40
        hidden_size = 8
        n_layers = 3
        n_heads = 2
        head_dim = 4
        mlp_only_layers = [0]
        intermediate_size = 12
        moe_intermediate_size = 6
        max_position_embeddings = 16
        initializer_range = 0.3
        "#,
    );
    text.push_str(model);
    if !model.contains("n_kv_heads") {
        text.push_str("\nn_kv_heads = 1");
    }
    text.push_str("\n[train]\nsteps = 4\nbatch_size = 2\nseq_len = 5\nlr = 1e-3\n");
    text.push_str("[output]\ndir = \"runs/tiny\"\n");
    if !router.is_empty() {
        text.push_str("[router]\n");
        text.push_str(router);
    }
    Recipe::parse(Path::new("tiny.toml"), &text).unwrap()
}
