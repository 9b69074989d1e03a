//! `cadre inspect`: what it counts and says, on folders and GGUF files, without reading the data.

use cadre_testkit::{TinyMoe, golden_dir};

use crate::common::{arg, cadre, failure, json, stdout, tiny};

#[test]
fn layers_memory_and_text_are_reported() {
    let model = TinyMoe::default().mlp_only_layers(&[0]).build().unwrap();
    let path = arg(model.path());
    let report = json(&["inspect", "-m", path, "--layers", "-c", "100", "-o", "json"]);
    assert_eq!(report["container"], "safetensors");
    assert_eq!(report["router"]["kind"], "top_k");
    assert_eq!(report["attention"]["kind"], "grouped");
    assert_eq!(report["rope"]["scaling"], "none");
    assert_eq!(report["memory"]["n_ctx"], 100);
    // Two layers, keys and values of 2 heads of width 8, f32.
    assert_eq!(report["memory"]["kv_bytes"], 100 * 2 * 2 * 2 * 8 * 4);
    assert_eq!(report["formats"]["F32"]["bytes"], report["bytes"]["total"]);
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[0]["n_experts"], 0);
    // Attention as in the other layer, and a dense feed-forward of 3 x 48 x 32.
    assert_eq!(
        layers[0]["parameters"],
        32 * 64 + 32 * 32 + 80 + 3 * 48 * 32
    );
    assert_eq!(layers[1]["expert_parameters"], 8 * 3 * 16 * 32);
    let stops = report["text"]["stop_tokens"].as_array().unwrap();
    assert!(
        stops
            .iter()
            .any(|stop| stop["id"] == 0 && stop["sources"][0].is_string())
    );
    let text = stdout(&["inspect", "-m", path, "--layers"]);
    assert!(
        text.contains("in experts") && text.contains("top_k of softmax"),
        "{text}"
    );
}

#[test]
fn the_digest_is_only_made_when_asked_for() {
    let model = tiny();
    let path = arg(model.path());
    assert!(json(&["inspect", "-m", path, "-o", "json"])["digest"].is_null());
    let digest = json(&["inspect", "-m", path, "--digest", "-o", "json"])["digest"].clone();
    assert_eq!(digest.as_str().unwrap().len(), 64);
    assert!(stdout(&["inspect", "-m", path, "--digest"]).contains(digest.as_str().unwrap()));
}

#[test]
fn a_context_that_no_session_can_have_is_wrong_usage() {
    let model = tiny();
    for n_ctx in ["0", "129"] {
        let (code, errors) = failure(&["inspect", "-m", arg(model.path()), "-c", n_ctx]);
        assert_eq!(code, 2);
        assert!(errors.contains("1 to 128"), "{errors}");
    }
}

/// Every architecture has a golden checkpoint, of both kinds of files.
#[test]
fn every_architecture_is_described() {
    let mut n_described = 0;
    for folder in std::fs::read_dir(golden_dir()).unwrap() {
        for path in checkpoints(&folder.unwrap().path()) {
            let report = json(&["inspect", "-m", arg(&path), "--layers", "-o", "json"]);
            let total = report["parameters"]["total"].as_u64().unwrap();
            let active = report["parameters"]["active"].as_u64().unwrap();
            assert!(total >= active && active > 0, "{path:?}");
            let text = stdout(&["inspect", "-m", arg(&path), "--layers"]);
            assert_eq!(
                text.contains("router"),
                report["n_moe_layers"] != 0,
                "{text}"
            );
            n_described += 1;
        }
    }
    assert!(n_described > 10, "{n_described}");
}

/// Checkpoints in `folder`: of its folders the first, of its GGUF files all, which are of different architectures.
fn checkpoints(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    let (mut folders, mut files) = (Vec::new(), Vec::new());
    for path in paths {
        if path.join("model.gguf").exists() {
            files.push(path.join("model.gguf"));
        } else if path.join("config.json").exists() {
            folders.push(path);
        }
    }
    folders.sort();
    folders.truncate(1);
    [folders, files].concat()
}

/// A file of 1 GiB, nearly all of it a hole: reading it would show in the resident memory.
#[cfg(target_os = "linux")]
#[test]
fn the_data_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    let model = TinyMoe::default().configure(|config| {
        config.hidden_size = 4096;
        config.vocab_size = 65_536;
        config.tie_word_embeddings = true;
    });
    sparse(&model, folder.path());
    let path = arg(folder.path());
    let before = peak(&["inspect", "-o", "json"]);
    let after = peak(&["inspect", "-m", path, "-o", "json"]);
    assert!(after < before + (8 << 20), "{before} {after}");
}

/// Writes the checkpoint of `model` in f32 with a header that is true and zeros that take no room on the disk.
#[cfg(target_os = "linux")]
fn sparse(model: &TinyMoe, folder: &std::path::Path) {
    let mut lines = Vec::new();
    let mut end = 0u64;
    for (name, shape) in cadre_checkpoint::tensor_specs(model.config()) {
        let from = end;
        end += 4 * shape.iter().map(|n| *n as u64).product::<u64>();
        let line = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [from, end]});
        lines.push(format!("{name:?}:{line}"));
    }
    assert!(end > 1 << 30);
    let header = format!("{{{}}}", lines.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    let file = folder.join("model.safetensors");
    std::fs::write(&file, &bytes).unwrap();
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.set_len(bytes.len() as u64 + end).unwrap();
    let tiny = tiny();
    let text = std::fs::read_to_string(tiny.path().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["hidden_size"] = model.config().hidden_size.into();
    config["vocab_size"] = model.config().vocab_size.into();
    config["tie_word_embeddings"] = true.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// Peak resident bytes of a run.
#[cfg(target_os = "linux")]
fn peak(args: &[&str]) -> u64 {
    crate::common::peak_rss(&mut cadre(args))
}
