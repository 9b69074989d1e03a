//! The forward pass against transformers: logits and routing of the folders under `golden/qwen3_moe`.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use cadre_checkpoint::Checkpoint;
use cadre_engine::{LoadOptions, Logits, Observer, RoutingEvent, SessionOptions, load};
use cadre_testkit::{assert_close, golden_dir};
use serde_json::Value;

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

fn f32s(value: &Value) -> Vec<f32> {
    let rows = value
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap());
    rows.map(|v| v.as_f64().unwrap() as f32).collect()
}

#[test]
fn logits_and_routing_are_those_of_transformers() {
    let root = golden_dir().join("qwen3_moe");
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(root.join("MANIFEST.json")).unwrap()).unwrap();
    let variants = manifest["variants"].as_object().unwrap();
    assert!(variants.len() >= 8, "the manifest lists the folders");
    for name in variants.keys() {
        let folder = root.join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let model = load(&checkpoint, &LoadOptions::default()).unwrap();
        let expected: Value =
            serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        for case in expected["cases"].as_array().unwrap() {
            let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
            let mut session = model.session(&SessionOptions::default()).unwrap();
            let mut recorded = Recorded::default();
            let got = model
                .forward(&mut session, &tokens, Logits::All, &mut recorded)
                .unwrap();
            assert_close(&format!("{name} logits"), got, &f32s(&case["logits"]), 1e-4);

            let routing = case["routing"].as_array().unwrap();
            assert_eq!(routing.len(), recorded.layers.len(), "{name}: MoE layers");
            for (expected, (layer, experts, weights)) in routing.iter().zip(&recorded.layers) {
                let what = format!("{name} layer {layer}");
                assert_eq!(expected["layer"].as_u64().unwrap(), *layer as u64);
                let ids: Vec<Vec<u16>> =
                    serde_json::from_value(expected["experts"].clone()).unwrap();
                assert_eq!(&ids, experts, "{what}");
                assert_close(&what, weights, &f32s(&expected["weights"]), 1e-5);
            }
        }
    }
}
