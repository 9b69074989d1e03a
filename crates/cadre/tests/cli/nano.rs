//! The embedded model computes what transformers computes from the same folder (`golden/nano`).

use std::path::{Path, PathBuf};

use cadre_checkpoint::Checkpoint;
use cadre_testkit::{Golden, assert_close, golden_dir};
use serde::Deserialize;

use crate::common::json;

/// Relative to the largest logit, as the comparison promises.
const TOLERANCE: f32 = 1e-4;
/// Every so many logits of each position are in the golden file.
const COLUMN_STRIDE: usize = 64;

#[derive(Deserialize)]
struct Expected {
    prompts: Vec<Text>,
    texts: Vec<Text>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    tokens: Vec<u32>,
    #[serde(default)]
    decoded: String,
}

/// The golden files, unless they were not made for the model in this checkout yet.
fn golden() -> Option<(Expected, PathBuf)> {
    let folder = golden_dir().join("nano");
    let Ok(text) = std::fs::read_to_string(folder.join("expected.json")) else {
        println!("skipped: run golden/make/nano.py");
        return None;
    };
    Some((
        serde_json::from_str(&text).unwrap(),
        folder.join("expected.safetensors"),
    ))
}

#[test]
fn logits_are_those_of_transformers() {
    let Some((expected, path)) = golden() else {
        return;
    };
    let golden = Golden::at(&path).unwrap();
    for (at, prompt) in expected.prompts.iter().enumerate() {
        let ids: Vec<String> = prompt.tokens.iter().map(u32::to_string).collect();
        let report = json(&["logits", "--tokens", &ids.join(","), "-o", "json"]);
        let rows: Vec<Vec<f32>> = serde_json::from_value(report["logits"].clone()).unwrap();
        let (_, last) = golden.f32(&format!("{at}.last")).unwrap();
        assert_close("last", &rows[rows.len() - 1], &last, TOLERANCE);
        let (_, columns) = golden.f32(&format!("{at}.columns")).unwrap();
        let ours: Vec<f32> = rows
            .iter()
            .flat_map(|row| row.iter().step_by(COLUMN_STRIDE))
            .copied()
            .collect();
        assert_close("columns", &ours, &columns, TOLERANCE);
    }
}

#[test]
fn tokens_are_those_of_transformers() {
    let Some((expected, _)) = golden() else {
        return;
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    let tokenizer = Checkpoint::open(&folder).unwrap().tokenizer().unwrap();
    for text in expected.prompts.iter().chain(&expected.texts) {
        assert_eq!(
            tokenizer.encode(&text.text).unwrap(),
            text.tokens,
            "{:?}",
            text.text
        );
    }
    for text in &expected.texts {
        assert_eq!(
            tokenizer.decode(&text.tokens),
            text.decoded,
            "{:?}",
            text.text
        );
    }
}
