//! GGUF models of every architecture open under canonical names; what llama.cpp hard-codes is in their configurations.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use cadre_checkpoint::{
    Activation, Checkpoint, NormKind, QkNorm, RopeScaling, RouterConfig, Score, tensor_specs,
};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden")
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&golden().join("gguf_models").join(name).join("model.gguf")).unwrap()
}

#[test]
fn every_file_holds_exactly_the_tensors_of_its_configuration() {
    let mut n_files = 0;
    for entry in std::fs::read_dir(golden().join("gguf_models")).unwrap() {
        let path = entry.unwrap().path().join("model.gguf");
        if !path.exists() {
            continue;
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        let exact = checkpoint.expect_exactly(&tensor_specs(checkpoint.config()));
        exact.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for name in checkpoint.tensor_names() {
            checkpoint.check_finite(name).unwrap();
        }
        n_files += 1;
    }
    assert!(n_files >= 19, "{n_files}");
}

#[test]
fn llama_files_rotate_neighbours_and_may_store_factors() {
    let config = open("mixtral-plain").config().clone();
    assert_eq!(
        (config.model_type.as_str(), config.rope.interleaved),
        ("mixtral", true)
    );
    assert_eq!(config.moe.router, RouterConfig::TopK { norm: true });
    let config = open("llama-llama3").config().clone();
    assert_eq!(config.model_type, "llama");
    let RopeScaling::Factors(factors) = &config.rope.scaling else {
        panic!("{:?}", config.rope);
    };
    assert_eq!(factors.len(), config.head_dim / 2);
    assert!(open("llama-smollm").config().tie_word_embeddings);
}

#[test]
fn what_llama_cpp_hard_codes_is_in_the_configuration() {
    let router = |name| open(name).config().moe.router;
    for (name, norm) in [
        ("qwen3_moe-plain", true),
        ("qwen3_moe-raw_topk", true),
        ("qwen2_moe-plain", false),
        ("olmoe-plain", false),
        ("phimoe-plain", true),
        ("granitemoe-plain", true),
        ("gpt_oss-bf16", true),
    ] {
        assert_eq!(router(name), RouterConfig::TopK { norm }, "{name}");
    }
    let phimoe = open("phimoe-plain").config().clone();
    assert_eq!(
        (phimoe.norm, phimoe.lm_head_bias),
        (NormKind::RmsWithBias, true)
    );
    assert_eq!(
        open("olmoe-plain").config().attention.qk_norm,
        QkNorm::WholeProjection
    );
    let shared = open("qwen2_moe-plain").config().moe.shared.unwrap();
    assert_eq!((shared.intermediate_size, shared.gated), (12, true));
    assert_eq!(
        router("deepseek_v2-groups"),
        RouterConfig::GroupLimited {
            score: Score::Softmax,
            n_groups: 4,
            keep_groups: 2,
            sum_of_best_two: true,
            norm: false,
            scale: 4.0,
            correction_bias: false,
        }
    );
}

#[test]
fn latent_attention_scales_its_scores() {
    let checkpoint = open("deepseek_v3-yarn");
    let config = checkpoint.config();
    assert_eq!(config.model_type, "deepseek_v3");
    let mla = config.attention.mla.unwrap();
    assert!(mla.split_kv_b);
    assert_eq!(
        (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim),
        (6, 4, 7)
    );
    assert_eq!(config.moe_layers(), [1]);
    // Factor 8 and mscale_all_dim 1.
    let mscale = 0.1 * 8f64.ln() + 1.0;
    let expected = mscale * mscale / 10f64.sqrt();
    assert!((config.attention.scale - expected).abs() < 1e-12);
    let RopeScaling::Yarn {
        attention_factor, ..
    } = config.rope.scaling
    else {
        panic!("{:?}", config.rope);
    };
    assert_eq!(attention_factor, 1.0);
}

#[test]
fn windows_follow_the_pattern_of_the_architecture() {
    let config = open("gpt_oss-bf16").config().clone();
    assert_eq!(config.attention.windows, [Some(4), None]);
    assert!(config.attention.sinks && config.moe.expert_bias && config.moe.router_bias);
    assert!(matches!(
        config.activation,
        Activation::SwigluOai { limit: 7.0, .. }
    ));
    let config = open("gemma3_text-pattern_6").config().clone();
    let full: Vec<usize> = (0..7)
        .filter(|l| config.attention.windows[*l].is_none())
        .collect();
    assert_eq!(full, [5]);
    assert_eq!(config.local_rope.map(|rope| rope.theta), Some(1e4));
    assert_eq!(config.norm, NormKind::Rms);
}

#[test]
fn messages_say_what_the_file_calls_a_tensor() {
    let checkpoint = open("qwen3_moe-plain");
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    assert_eq!(checkpoint.stored_name(name), "blk.1.ffn_up_exps.weight");
    let error = checkpoint.tensor_f32(name, &[1]).unwrap_err().to_string();
    assert!(
        error.contains("blk.1.ffn_up_exps.weight") && error.contains(name),
        "{error}"
    );
    let error = checkpoint.tokenizer().unwrap_err().to_string();
    assert!(error.contains("tokenizer.ggml.model"), "{error}");
}

/// A GGUF file holds the values of the folder it was made of, under the same canonical names, except where llama.cpp
/// stores them otherwise: rows of queries and keys permuted, keys and values of latent attention split, norms plus one.
#[test]
fn values_are_those_of_the_folder() {
    for (file, folder) in [
        ("qwen3_moe-plain", "qwen3_moe/plain"),
        ("qwen3_moe-raw_topk", "qwen3_moe/raw_topk"),
    ] {
        let (file, folder) = (
            open(file),
            Checkpoint::open(&golden().join(folder)).unwrap(),
        );
        for name in folder.tensor_names() {
            let (got, expected) = (file.tensor(name).unwrap(), folder.tensor(name).unwrap());
            assert_eq!(
                (got.shape, got.to_f32()),
                (expected.shape, expected.to_f32()),
                "{name}"
            );
        }
    }
}

/// Real files, where a recipe has fetched them.
#[test]
fn real_files_hold_exactly_their_tensors() {
    let folder = golden().join("../.cache/data/models");
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            let checkpoint = Checkpoint::open(&path).unwrap();
            let exact = checkpoint.expect_exactly(&tensor_specs(checkpoint.config()));
            exact.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let tokenizer = checkpoint.tokenizer().unwrap();
            assert!(!checkpoint.chat(&tokenizer).unwrap().stop_tokens.is_empty());
        }
    }
}
