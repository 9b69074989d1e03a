//! The forward pass against transformers, and against plain torch where transformers has no such model: logits and
//! routing of the checkpoints under `golden/MODEL_TYPE/`.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::path::Path;
use std::sync::Arc;

use cadre_checkpoint::Checkpoint;
use cadre_engine::{
    LoadOptions, Logits, Model, NoObserver, Observer, RoutingEvent, Session, SessionOptions,
    known_model_types, load,
};
use cadre_testkit::{assert_close, golden_dir};
use serde_json::Value;

/// Relative to the largest logit of the case.
const TOLERANCE: f32 = 1e-4;

/// Experts and weights of every position, by layer.
#[derive(Default)]
struct Recorded {
    layers: Vec<(usize, Vec<Vec<u16>>, Vec<f32>)>,
}

impl Observer for Recorded {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let experts = event
            .routing
            .iter()
            .map(|(experts, _)| experts.to_vec())
            .collect();
        self.layers
            .push((event.layer, experts, event.routing.weights().to_vec()));
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn f32s(value: &Value) -> Vec<f32> {
    let rows = value
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap());
    rows.map(|v| v.as_f64().unwrap() as f32).collect()
}

/// A session of exactly this many tokens: its size is what chooses between the factors of LongRoPE, and transformers
/// goes by the length of what it is given.
fn session(model: &Arc<dyn Model>, n_ctx: usize) -> Session {
    let options = SessionOptions {
        n_ctx: Some(n_ctx),
        ..SessionOptions::default()
    };
    model.session(&options).unwrap()
}

/// All tokens at once: logits of every position, experts and weights of every layer.
fn check_prefill(what: &str, model: &Arc<dyn Model>, case: &Value) {
    let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
    let mut session = session(model, tokens.len());
    let mut recorded = Recorded::default();
    let got = model
        .forward(&mut session, &tokens, Logits::All, &mut recorded)
        .unwrap();
    assert_close(
        &format!("{what} logits"),
        got,
        &f32s(&case["logits"]),
        TOLERANCE,
    );

    let routing = case["routing"].as_array().unwrap();
    assert_eq!(routing.len(), recorded.layers.len(), "{what}: MoE layers");
    for (expected, (layer, experts, weights)) in routing.iter().zip(&recorded.layers) {
        let what = format!("{what} layer {layer}");
        assert_eq!(expected["layer"].as_u64().unwrap(), *layer as u64);
        let ids: Vec<Vec<u16>> = serde_json::from_value(expected["experts"].clone()).unwrap();
        assert_eq!(&ids, experts, "{what}");
        assert_close(&what, weights, &f32s(&expected["weights"]), TOLERANCE);
    }
}

/// One token at a time through the session's cache: the same logits.
fn check_steps(what: &str, model: &Arc<dyn Model>, case: &Value) {
    if case["prefill_only"].as_bool() == Some(true) {
        return;
    }
    let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
    let mut session = session(model, tokens.len());
    let mut got = Vec::new();
    for token in tokens {
        let row = model
            .forward(&mut session, &[token], Logits::All, &mut NoObserver)
            .unwrap();
        got.extend_from_slice(row);
    }
    let what = format!("{what} logits step by step");
    assert_close(&what, &got, &f32s(&case["logits"]), TOLERANCE);
}

fn check_folder(what: &str, folder: &Path) {
    let checkpoint = Checkpoint::open(folder).unwrap_or_else(|e| panic!("{what}: {e}"));
    let model =
        load(&checkpoint, &LoadOptions::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let expected = read(&folder.join("expected.json"));
    for (index, case) in expected["cases"].as_array().unwrap().iter().enumerate() {
        let what = format!("{what} case {index}");
        check_prefill(&what, &model, case);
        check_steps(&what, &model, case);
    }
}

#[test]
fn logits_and_routing_are_those_of_transformers() {
    let known = known_model_types();
    let mut checked = Vec::new();
    let mut folders: Vec<_> = std::fs::read_dir(golden_dir())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    folders.sort();
    for root in folders {
        let manifest = root.join("MANIFEST.json");
        if !manifest.is_file() {
            continue;
        }
        let manifest = read(&manifest);
        let scripts = ["golden/make/checkpoints.py", "golden/make/cadre_moe.py"];
        if !scripts.contains(&manifest["script"].as_str().unwrap_or_default()) {
            continue;
        }
        let model_type = root.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(known.contains(&model_type.as_str()), "{model_type}");
        for variant in manifest["variants"].as_object().unwrap().keys() {
            let what = format!("{model_type}/{variant}");
            check_folder(&what, &root.join(variant));
        }
        checked.push(model_type);
    }
    for model_type in known {
        assert!(
            checked.iter().any(|found| found == model_type),
            "no golden for {model_type}"
        );
    }
}
