//! The trainer computes what others compute: golden checkpoints of every layout that it reads, scored with the logits that
//! transformers and plain torch (`golden/make/checkpoints.py`, `golden/make/cadre_moe.py`) have for them.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use burn::tensor::Device;
use cadre_checkpoint::{Checkpoint, QkNorm};
use cadre_train::architecture::Architecture;
use cadre_train::export::{import, import_biases};
use cadre_train::lm::{Batch, Pass};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The layouts that the trainer reads.
const LAYOUTS: [&str; 7] = [
    "qwen3",
    "qwen3_moe",
    "glm4_moe",
    "llama",
    "mistral",
    "mixtral",
    "cadre_moe",
];

/// Checkpoint folders with expected logits.
fn folders() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden");
    let mut folders: Vec<PathBuf> = LAYOUTS
        .iter()
        .flat_map(|layout| std::fs::read_dir(golden.join(layout)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("expected.json").is_file())
        .collect();
    folders.sort();
    folders
}

/// Mean next-token cross-entropy of `tokens` under `logits`, one row per token; nats.
fn cross_entropy(tokens: &[u32], logits: &[Vec<f64>]) -> f64 {
    let rows = logits.iter().zip(&tokens[1..]);
    let losses = rows.map(|(row, target)| {
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|l| (l - most).exp()).sum();
        most + sum.ln() - row[*target as usize]
    });
    losses.sum::<f64>() / (tokens.len() - 1) as f64
}

#[test]
fn what_would_be_computed_otherwise_is_refused() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden");
    for name in [
        "llama/bias",
        "llama/llama3",
        "mistral/window",
        "mixtral/window",
    ] {
        let checkpoint = Checkpoint::open(&golden.join(name)).unwrap();
        let error = import(&checkpoint, &Device::flex())
            .unwrap_err()
            .to_string();
        assert!(error.contains("training continues"), "{name}: {error}");
    }
}

#[test]
fn losses_are_those_of_the_reference_logits() {
    let device = Device::flex();
    let (mut n_compared, mut without_norms) = (0, 0);
    for folder in folders() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        // Biases, windows and scaled positions, which the trainer refuses.
        let Ok(model) = import(&checkpoint, &device) else {
            assert!(
                checkpoint.config().model_type != "cadre_moe",
                "{} is ours, but the trainer does not read it",
                folder.display()
            );
            continue;
        };
        let architecture = Architecture::of(checkpoint.config()).unwrap();
        let biases = import_biases(&checkpoint).unwrap();
        let expected = std::fs::read(folder.join("expected.json")).unwrap();
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        for case in expected["cases"].as_array().unwrap() {
            let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
            let logits: Vec<Vec<f64>> = serde_json::from_value(case["logits"].clone()).unwrap();
            if tokens.len() < 2 {
                continue;
            }
            let last = tokens.len() - 1;
            let batch = Batch {
                tokens: Arc::new(tokens[..last].to_vec()),
                targets: Arc::new(tokens[1..].to_vec()),
                seq_len: last,
            };
            let pass = Pass {
                biases: &biases,
                ..Pass::default()
            };
            let losses = model.losses(&architecture, &batch, &pass).unwrap();
            let got = f64::from(losses.cross_entropy.into_scalar::<f32>());
            let wanted = cross_entropy(&tokens, &logits);
            assert!(
                (got - wanted).abs() < 1e-4 * wanted,
                "{}: {got} instead of {wanted}",
                folder.display()
            );
            n_compared += 1;
            without_norms += usize::from(checkpoint.config().attention.qk_norm == QkNorm::None);
        }
    }
    assert!(n_compared >= 24, "only {n_compared} cases were compared");
    assert!(without_norms >= 4, "only {without_norms} as Llama");
}
