//! What is trained is what is written: every kind of model goes into a checkpoint folder and comes back with the same
//! losses, bit for bit, in the layout of a published architecture where one holds it.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod tiny;

use burn::tensor::Device;
use cadre_checkpoint::{Checkpoint, Dtype};
use cadre_train::architecture::Architecture;
use cadre_train::export::{self, Exported};
use cadre_train::init::Init;
use cadre_train::lm::{Batch, LanguageModel, Pass};
use std::sync::Arc;
use tiny::recipe;

fn losses(model: &LanguageModel, architecture: &Architecture, biases: &[Vec<f32>]) -> [f32; 2] {
    let ids = |a: u32| Arc::new((0..10).map(|i| (i * i * 7 + a) % 40).collect::<Vec<u32>>());
    let batch = Batch {
        tokens: ids(3),
        targets: ids(11),
        seq_len: 5,
    };
    let pass = Pass {
        step: 9,
        biases,
        ..Pass::default()
    };
    let losses = model.losses(architecture, &batch, &pass).unwrap();
    [losses.cross_entropy, losses.z].map(|loss| loss.into_scalar::<f32>())
}

/// Model keys, router table, whether there are biases, and the layout that is expected.
const KINDS: &[(&str, &str, bool, &str)] = &[
    ("n_experts = 0", "", false, "qwen3"),
    ("n_experts = 4\ntop_k = 2", "", false, "qwen3_moe"),
    (
        "n_experts = 4\ntop_k = 2\nnorm_topk_prob = false",
        "",
        false,
        "qwen3_moe",
    ),
    ("n_experts = 4", "name = 'switch'", false, "qwen3_moe"),
    (
        "n_experts = 4",
        "name = 'top_2'\nsecond = 'gumbel'",
        false,
        "qwen3_moe",
    ),
    (
        "n_experts = 4",
        "name = 'dense_to_sparse'",
        false,
        "qwen3_moe",
    ),
    (
        "n_experts = 4",
        "name = 'dense_to_sparse'\ndense_eval = true\ntemperature = 1.5\nmin_temperature = 0.4\ndecay_steps = 12",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4",
        "name = 'dense_to_sparse'\ndense_eval = true\nhard_from = 3",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4",
        "name = 'top_p'\ntop_p = 0.6",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 5",
        "name = 'null_experts'\nn_null = 3",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2",
        "name = 'uniform'\nseed = 3",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2\nnorm_topk_prob = false",
        "name = 'group_limited'",
        false,
        "qwen3_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2\nnorm_topk_prob = false",
        "name = 'group_limited'\nn_groups = 2\nkeep_groups = 1\nscale = 16.0",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2\nshared_intermediate_size = 12",
        "name = 'group_limited'\nscore = 'sigmoid'\nscale = 2.5",
        true,
        "glm4_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2",
        "name = 'group_limited'\nscore = 'sigmoid'",
        true,
        "cadre_moe",
    ),
    (
        "n_experts = 4",
        "name = 'sparse_mixer'\neps = 0.2",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2",
        "name = 'union'\neps = 0.5",
        false,
        "cadre_moe",
    ),
    ("n_experts = [2, 5]\ntop_k = 2", "", false, "cadre_moe"),
    (
        "n_experts = 4\ntop_k = 2\nshared_intermediate_size = 5",
        "",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\nresidual = 'sum'",
        "name = 'switch'",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = [2, 4]\nresidual = 'learned'\nresidual_intermediate_size = 7",
        "name = 'switch'",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2\nrecurrent_router = 3",
        "",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\nrecurrent_router = 3\nresidual = 'sum'\nshared_intermediate_size = 4",
        "name = 'top_p'",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 1, eps = 0.1 }",
        "name = 'union'",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2\ndecoupled_router = { hidden_size = 10, n_heads = 2, head_dim = 6, intermediate_size = 7 }",
        "",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = [2, 5]\ntop_k = 3\nshared_intermediate_size = 4\ndecoupled_router = { hidden_size = 6, n_layers = 2, n_heads = 1, head_dim = 4, intermediate_size = 5, per_layer = true }",
        "name = 'null_experts'\nn_null = 2",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 0\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 2 }",
        "",
        false,
        "cadre_moe",
    ),
    // Attention as in Llama; the first layer is dense, which Mixtral does not say.
    (
        "n_experts = 0\nqk_norm = false\nrms_norm_eps = 1e-4",
        "",
        false,
        "llama",
    ),
    (
        "n_experts = 4\ntop_k = 2\nqk_norm = false",
        "",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 2\nqk_norm = false\nnorm_topk_prob = false",
        "",
        false,
        "cadre_moe",
    ),
    (
        "n_experts = 4\ntop_k = 1\nqk_norm = false\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 2 }\nnorm_topk_prob = false\ndecoupled_router = { hidden_size = 10, n_heads = 2, head_dim = 6, intermediate_size = 7 }",
        "",
        false,
        "cadre_moe",
    ),
];

/// Says nothing of interest here.
const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
    "pre_tokenizer":null,"post_processor":null,
    "decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false},
    "model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;

#[test]
fn every_kind_of_model_comes_back_from_its_folder() {
    let device = Device::flex();
    for (model, router, biased, layout) in KINDS {
        let what = format!("{model}; {router}");
        let architecture = recipe(model, router).architecture().unwrap();
        let init = Init {
            seed: 5,
            std: 0.3,
            device: device.clone(),
        };
        let trained = LanguageModel::init(&architecture, &init);
        let bias = |moe: usize| (0..4).map(|e| ((moe + e) as f32).sin() / 3.0).collect();
        let biases: Vec<Vec<f32>> = match biased {
            true => (0..architecture.moe.len()).map(bias).collect(),
            false => Vec::new(),
        };
        let exported = Exported {
            architecture: &architecture,
            biases: &biases,
            step: 9,
        };
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("model");
        export::export(&trained, exported, TOKENIZER, Dtype::F32, &folder).unwrap();

        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert_eq!(checkpoint.config().model_type, *layout, "{what}");
        let specs = cadre_checkpoint::tensor_specs(checkpoint.config());
        let n: usize = specs
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let n_biases: usize = biases.iter().map(Vec::len).sum();
        assert_eq!(n - n_biases, architecture.n_parameters(), "{what}");

        let again = Architecture::of(checkpoint.config()).unwrap();
        let read = export::import(&checkpoint, &device).unwrap();
        let read_biases = export::import_biases(&checkpoint).unwrap();
        assert_eq!(read_biases, biases, "{what}");
        assert_eq!(
            losses(&read, &again, &read_biases),
            losses(&trained, &architecture, &biases),
            "{what}"
        );
    }
}

#[test]
fn what_nothing_can_generate_with_is_refused() {
    let plain = "n_experts = 4\ntop_k = 2";
    let keep = "n_experts = 0\nn_kv_heads = 2\nattention_experts = { n_experts = 2, top_k = 1, keep = 0.5 }";
    for (model, router, name) in [
        (
            plain,
            "name = 'expert_choice'\nallow_non_causal = true",
            "expert_choice",
        ),
        (
            plain,
            "name = 'union'\nkeep = 0.5\nallow_non_causal = true",
            "union",
        ),
        (
            keep,
            "allow_non_causal = true",
            "attention experts that keep",
        ),
    ] {
        let architecture = recipe(model, router).architecture().unwrap();
        let exported = Exported {
            architecture: &architecture,
            biases: &[],
            step: 1,
        };
        let text = export::stored_config(exported).unwrap_err().to_string();
        assert!(text.contains(name), "{text}");
    }
}

#[test]
fn a_mixture_in_every_layer_with_the_attention_of_llama_is_mixtral() {
    let mut config = recipe("n_experts = 4\ntop_k = 2\nqk_norm = false", "").model_config();
    config.moe.layers = (0..config.n_layers).collect();
    let router = cadre_train::routers::RouterOptions::named("top_k");
    let architecture = Architecture::new(config, &router).unwrap();
    let exported = Exported {
        architecture: &architecture,
        biases: &[],
        step: 1,
    };
    let stored = export::stored_config(exported).unwrap();
    assert_eq!(stored.model_type, "mixtral");
    assert_eq!(stored.intermediate_size, 6);
}
