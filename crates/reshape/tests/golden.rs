//! A model from which experts have been cut out computes what transformers computes with the whole model when it may not
//! pick them (`golden/reshape/`, made by `golden/make/reshape.py`).
#![expect(clippy::unwrap_used, reason = "tests")]

use cadre_checkpoint::{
    Checkpoint, Conversion, ConvertOptions, ConvertTo, Dtype, QuantizeOptions, TargetDtype,
};
use cadre_engine::{LoadOptions, Logits, NoObserver, SessionOptions, load};
use cadre_reshape::{Applying, apply, shape_of};
use cadre_routing::plan::{Plan, PlanExpert};
use cadre_testkit::{assert_close, golden_dir};
use serde_json::Value;

const FOLDER: ConvertTo = ConvertTo::Folder {
    max_shard_bytes: 1 << 20,
};
const GGUF: ConvertTo = ConvertTo::Gguf {
    max_part_bytes: None,
};

/// Relative to the largest logit.
const TOLERANCE: f32 = 1e-4;

fn plan(checkpoint: &Checkpoint, keep: &[Vec<u16>]) -> Plan {
    let shape = shape_of(checkpoint);
    let experts = keep
        .iter()
        .map(|ids| ids.iter().copied().map(PlanExpert::kept).collect());
    Plan::of(&shape, "golden", experts)
}

fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    let options = LoadOptions {
        n_threads: Some(1),
        ..LoadOptions::default()
    };
    let model = load(checkpoint, &options).unwrap();
    let session = SessionOptions {
        n_ctx: Some(tokens.len()),
        ..SessionOptions::default()
    };
    let mut session = model.session(&session).unwrap();
    let all = model.forward(&mut session, tokens, Logits::All, &mut NoObserver);
    all.unwrap().to_vec()
}

fn cut(
    source: &Checkpoint,
    plan: &Plan,
    target: ConvertTo,
    name: &str,
) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let conversion = apply(source, plan, Applying { target, pad: false }).unwrap();
    let paths = conversion
        .write(&folder.path().join(name), &mut |_| true)
        .unwrap();
    let made = Checkpoint::open(&paths[0]).unwrap();
    (folder, made)
}

#[test]
fn cut_models_compute_what_the_whole_does_without_those_experts() {
    let text = std::fs::read(golden_dir().join("reshape/expected.json")).unwrap();
    let golden: Value = serde_json::from_slice(&text).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 9);
    let mut n_gguf = 0;
    for case in cases {
        let name = case["checkpoint"].as_str().unwrap();
        let keep: Vec<Vec<u16>> = serde_json::from_value(case["keep"].clone()).unwrap();
        let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        let rows: Vec<Vec<f32>> = serde_json::from_value(case["logits"].clone()).unwrap();
        let expected: Vec<f32> = rows.concat();
        let source = Checkpoint::open(&golden_dir().join(name)).unwrap();
        let (_folder, made) = cut(&source, &plan(&source, &keep), FOLDER, "cut");
        assert_close(name, &logits(&made, &tokens), &expected, TOLERANCE);
        // The same through a GGUF file in f32, where that computes the same as the folder.
        let options = ConvertOptions {
            target: GGUF,
            dtype: TargetDtype::Is(Dtype::F32),
            allow_differences: false,
            quantize: QuantizeOptions::default(),
        };
        let Ok(conversion) = Conversion::plan(&source, "whole", options) else {
            continue;
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("whole.gguf");
        conversion.write(&path, &mut |_| true).unwrap();
        let whole = Checkpoint::open(&path).unwrap();
        let (_folder, made) = cut(&whole, &plan(&whole, &keep), GGUF, "cut.gguf");
        assert_close(name, &logits(&made, &tokens), &expected, TOLERANCE);
        n_gguf += 1;
    }
    assert!(n_gguf > 4, "{n_gguf}");
}
