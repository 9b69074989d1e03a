//! Experts out of dense models: split, upcycled, and as configurations of mergekit-moe say.

use std::fs;
use std::path::Path;

use cadre_testkit::{assert_close, golden_dir};
use serde_json::Value;

use crate::common::{arg, cadre, failure, json, stdout};

/// Logits of a few tokens, one row after the other.
fn logits(model: &Path) -> Vec<f32> {
    logits_of(model, &[3, 1, 4, 1, 5])
}

fn logits_of(model: &Path, tokens: &[u32]) -> Vec<f32> {
    let tokens: Vec<String> = tokens.iter().map(u32::to_string).collect();
    let tokens = tokens.join(",");
    let said = json(&[
        "logits",
        "-m",
        arg(model),
        "--tokens",
        &tokens,
        "-o",
        "json",
    ]);
    let rows = said["logits"]
        .as_array()
        .unwrap_or_else(|| panic!("{said}"));
    let rows = rows
        .iter()
        .map(|row| serde_json::from_value::<Vec<f32>>(row.clone()).unwrap());
    rows.flatten().collect()
}

#[test]
fn a_dense_model_is_split_and_copied() {
    let folder = tempfile::tempdir().unwrap();
    let dense = golden_dir().join("qwen3/plain");
    let before = logits(&dense);
    let path = |name: &str| folder.path().join(name);
    let run = |command: &str, name: &str, more: &[&str]| {
        let out = path(name);
        let mut args = vec![command, "-m", arg(&dense), "-o", arg(&out)];
        args.extend(more);
        let said = stdout(&args);
        assert!(said.contains("qwen3_moe: 2 layers of"), "{said}");
        out
    };
    let split = run("split", "split", &["--experts", "4", "--by", "random"]);
    assert_close("split", &logits(&split), &before, 1e-5);
    let copies = run("upcycle", "copies", &["--experts", "4"]);
    assert_close("copies", &logits(&copies), &before, 1e-5);
    let new = run(
        "upcycle",
        "new",
        &["--experts", "4", "--drop", "0.5", "--seed", "3"],
    );
    let worst = logits(&new)
        .iter()
        .zip(&before)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst > 1e-3, "{worst}");
    // Through a GGUF file too.
    let gguf = path("split.gguf");
    stdout(&[
        "convert",
        "-m",
        arg(&split),
        "-o",
        arg(&gguf),
        "--dtype",
        "f32",
    ]);
    assert_close("gguf", &logits(&gguf), &before, 1e-4);
}

/// `golden/dense/`, made by `golden/make/dense.py`: transformers loads what is written, and computes this from it.
#[test]
fn transformers_computes_the_same_from_what_is_written() {
    let text = fs::read(golden_dir().join("dense/expected.json")).unwrap();
    let golden: Value = serde_json::from_slice(&text).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 10);
    for (at, case) in cases.iter().enumerate() {
        let command = case["command"].as_array().unwrap().iter();
        let command: Vec<&str> = command.map(|part| part.as_str().unwrap()).collect();
        let dense = golden_dir().join(case["checkpoint"].as_str().unwrap());
        let out = folder.path().join(at.to_string());
        let paths = ["-m", arg(&dense), "-o", arg(&out)];
        let said = stdout(&[&command[..], &paths].concat());
        assert!(
            said.contains(case["model_type"].as_str().unwrap()),
            "{said}"
        );
        let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        let rows: Vec<Vec<f32>> = serde_json::from_value(case["logits"].clone()).unwrap();
        assert_close(
            &command.join(" "),
            &logits_of(&out, &tokens),
            &rows.concat(),
            1e-4,
        );
    }
}

#[test]
fn text_tells_which_neurons_go_together() {
    let folder = tempfile::tempdir().unwrap();
    // The only dense goldens with a tokenizer.
    let dense = golden_dir().join("mergekit/qwen3_a");
    let data = folder.path().join("d.txt");
    fs::write(
        &data,
        "The cat sat with the miller; let x = 12 + 30; ".repeat(20),
    )
    .unwrap();
    let out = folder.path().join("out");
    let mut args = vec![
        "split",
        "-m",
        arg(&dense),
        "--experts",
        "4",
        "--by",
        "activity",
    ];
    args.extend(["--tokens", "300", "-o", arg(&out)]);
    let (code, errors) = failure(&args);
    assert!(code == 2 && errors.contains("--data"), "{errors}");
    args.extend(["--data", arg(&data)]);
    stdout(&args);
    let before = logits(&dense);
    assert_close("activity", &logits(&out), &before, 1e-5);
}

#[test]
fn configurations_of_mergekit_are_followed() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("moe");
    let run = |more: &[&str]| {
        let mut command = cadre(&["upcycle", "--mergekit"]);
        // Models are paths from the current folder, as for mergekit.
        command
            .current_dir(golden_dir().join("mergekit"))
            .args(more)
            .output()
            .unwrap()
    };
    let made = run(&["llama_hidden.yml", "-o", arg(&out)]);
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let config: Value =
        serde_json::from_str(&fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["model_type"], "mixtral");
    assert_eq!(config["num_local_experts"], 2);
    for (args, words) in [
        (
            &["llama_hidden.yml", "--dtype", "f16", "-o", "/tmp/never"][..],
            "both say a format",
        ),
        (&["nothing.yml", "-o", "/tmp/never"], "nothing.yml"),
        (
            &["expected.json", "-o", "/tmp/never"],
            "unknown field `cases`",
        ),
    ] {
        let refused = run(args);
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert!(
            !refused.status.success() && errors.contains(words),
            "{errors}"
        );
    }
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let dense = golden_dir().join("qwen3/plain");
    let mixture = golden_dir().join("qwen3_moe/plain");
    let out = folder.path().join("out");
    let gguf = folder.path().join("out.gguf");
    for (args, words) in [
        (
            vec![
                "split",
                "-m",
                arg(&dense),
                "--experts",
                "7",
                "-o",
                arg(&out),
            ],
            "does not divide",
        ),
        (
            vec![
                "split",
                "-m",
                arg(&mixture),
                "--experts",
                "2",
                "-o",
                arg(&out),
            ],
            "has experts already",
        ),
        (
            vec![
                "split",
                "-m",
                arg(&dense),
                "--experts",
                "4",
                "-o",
                arg(&gguf),
            ],
            "written into a folder",
        ),
        (
            vec![
                "split",
                "-m",
                arg(&dense),
                "--experts",
                "4",
                "--data",
                "x",
                "-o",
                arg(&out),
            ],
            "by activity",
        ),
        (vec!["upcycle", "-o", arg(&out)], "no dense model"),
        (
            vec![
                "upcycle",
                "-m",
                arg(&dense),
                "--top-k",
                "9",
                "-o",
                arg(&out),
            ],
            "top-k is 9",
        ),
        (
            vec![
                "upcycle",
                "-m",
                arg(&dense),
                "--drop",
                "1.5",
                "-o",
                arg(&out),
            ],
            "drop is 1.5",
        ),
    ] {
        let (_, errors) = failure(&args);
        assert!(errors.contains(words), "{words}: {errors}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{words}");
    }
}
