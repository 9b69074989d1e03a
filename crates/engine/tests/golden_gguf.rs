//! The forward pass of GGUF files against llama.cpp: the files under `golden/gguf_models/`, which its converter wrote.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::path::Path;
use std::sync::Arc;

use cadre_checkpoint::Checkpoint;
use cadre_engine::{LoadOptions, Logits, Model, NoObserver, SessionOptions, load};
use cadre_testkit::{assert_close, golden_dir};
use serde_json::Value;

/// How far from llama.cpp's logits a file may be, relative to the largest one.
fn tolerance(name: &str) -> f32 {
    match name {
        // llama.cpp looks the GELU up in a table of 16-bit floats.
        "gemma3_text-pattern_6" => 1e-3,
        _ => 1e-4,
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn rows(value: &Value) -> Vec<f32> {
    let rows: Vec<Vec<f32>> = serde_json::from_value(value.clone()).unwrap();
    rows.concat()
}

fn open(path: &Path) -> Arc<dyn Model> {
    let checkpoint = Checkpoint::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    load(&checkpoint, &LoadOptions::default()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Logits of all positions, read `chunk` tokens at a time.
///
/// llama.cpp chooses PhiMoE's long factors by the size of the context, which was 512 when the files were made.
fn logits(model: &Arc<dyn Model>, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let options = SessionOptions::default();
    let mut session = model.session(&options).unwrap();
    let mut all = Vec::new();
    for part in tokens.chunks(chunk) {
        let rows = model
            .forward(&mut session, part, Logits::All, &mut NoObserver)
            .unwrap();
        all.extend_from_slice(rows);
    }
    all
}

#[test]
fn logits_are_those_of_llama_cpp() {
    let root = golden_dir().join("gguf_models");
    let manifest = read(&root.join("MANIFEST.json"));
    let files = manifest["files"].as_object().unwrap();
    assert!(files.len() >= 19, "the manifest lists the files");
    for name in files.keys() {
        let folder = root.join(name);
        let model = open(&folder.join("model.gguf"));
        for (index, case) in read(&folder.join("expected.json"))["cases"]
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
        {
            let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
            for chunk in [tokens.len(), 1] {
                let got = logits(&model, &tokens, chunk);
                let what = format!("{name} case {index} by {chunk}");
                assert_close(&what, &got, &rows(&case["logits"]), tolerance(name));
            }
        }
    }
}
