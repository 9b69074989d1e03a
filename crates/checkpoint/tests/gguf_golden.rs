//! GGUF files as the gguf Python package writes them (golden/gguf): read, compared, written again.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::PathBuf;

use cadre_checkpoint::gguf::{
    Gguf, GgufPlan, GgufTensor, GgufWriter, TensorPlan, Value, WriteOptions,
};
use cadre_testkit::golden_dir;
use serde_json::Value as Json;

fn path(name: &str) -> PathBuf {
    golden_dir().join("gguf").join(name)
}

fn expected() -> Json {
    serde_json::from_slice(&std::fs::read(path("expected.json")).unwrap()).unwrap()
}

/// Type and value as the script writes them.
fn show(value: &Value) -> (String, Json) {
    let kind = value.kind().name().to_owned();
    let json = match value {
        Value::Array(array) => {
            let items = array.iter().map(|item| show(&item.unwrap()).1).collect();
            return (
                format!("array of {}", array.item_type().name()),
                Json::Array(items),
            );
        }
        Value::Text(text) => text.as_str().into(),
        Value::Bool(flag) => (*flag).into(),
        Value::U64(large) => (*large).into(),
        Value::F32(_) | Value::F64(_) => value.as_f64().unwrap().into(),
        _ => i64::try_from(value.as_integer().unwrap()).unwrap().into(),
    };
    (kind, json)
}

fn check_tensors(found: &[GgufTensor]) {
    let expected = expected();
    let expected = expected["tensors"].as_array().unwrap();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.name, expected["name"].as_str().unwrap());
        assert_eq!(found.dtype.name(), expected["dtype"].as_str().unwrap());
        assert_eq!(serde_json::json!(found.shape), expected["shape"]);
        let hex: String = found
            .bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, expected["hex"].as_str().unwrap(), "{}", found.name);
    }
}

#[test]
fn every_type_of_metadata_is_read() {
    let gguf = Gguf::open(&path("all.gguf")).unwrap();
    let expected = expected();
    let expected = expected["entries"].as_array().unwrap();
    assert_eq!(gguf.entries().len(), expected.len());
    for ((key, value), expected) in gguf.entries().iter().zip(expected) {
        assert_eq!(key, expected["key"].as_str().unwrap());
        let (kind, mut json) = show(value);
        let mut wanted = expected["value"].clone();
        if kind.ends_with("f32") {
            // The script's decimals name f32 values; as f64 they differ beyond the 8th digit.
            for json in [&mut json, &mut wanted] {
                *json = match &json {
                    Json::Array(items) => items
                        .iter()
                        .map(|item| item.as_f64().unwrap() as f32)
                        .collect(),
                    number => (number.as_f64().unwrap() as f32).into(),
                };
            }
        }
        assert_eq!(
            (kind.as_str(), json),
            (expected["type"].as_str().unwrap(), wanted),
            "{key}"
        );
    }
}

#[test]
fn tensors_of_whole_aligned_and_split_files_are_the_same() {
    for name in [
        "all.gguf",
        "aligned.gguf",
        "split-00001-of-00003.gguf",
        "split-00003-of-00003.gguf",
    ] {
        let gguf = Gguf::open(&path(name)).unwrap();
        check_tensors(gguf.tensors());
        assert_eq!(
            gguf.entries(),
            Gguf::open(&path("all.gguf")).unwrap().entries()
        );
    }
}

/// Our writer and theirs agree to the byte, so they can read ours.
#[test]
fn what_is_read_and_written_again_is_the_same_file() {
    for (name, alignment) in [("all.gguf", None), ("aligned.gguf", Some(64u32))] {
        let gguf = Gguf::open(&path(name)).unwrap();
        let mut entries = gguf.entries().to_vec();
        if let Some(alignment) = alignment {
            entries.push(("general.alignment".to_owned(), alignment.into()));
        }
        let tensors = gguf.tensors().iter().map(|tensor| TensorPlan {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        });
        let plan = GgufPlan {
            entries,
            tensors: tensors.collect(),
            max_part_bytes: None,
        };
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("again.gguf");
        let mut writer =
            GgufWriter::create_or_resume(&target, plan, &WriteOptions::default()).unwrap();
        for tensor in gguf.tensors() {
            writer.write(&tensor.name, &tensor.bytes).unwrap();
        }
        writer.finish().unwrap();
        assert!(
            std::fs::read(&target).unwrap() == std::fs::read(path(name)).unwrap(),
            "{name}"
        );
    }
}
