//! `cadre plan factor`: merged experts as products of thin matrices plus a few rows, run as they are and multiplied.

use std::fs;
use std::path::{Path, PathBuf};

use cadre_testkit::{TinyMoe, assert_close};
use serde_json::{Value, json};

use crate::common::{self, arg, failure, logits, output, stdout};

const DATA: &str = "{\"domain\": \"code\", \"text\": \"let x = 12 + 30; let y = x * 2; fn main() { print(x); }\"}\n";

fn values(report: &Value) -> Vec<f32> {
    let rows = report["logits"].as_array().unwrap().iter();
    rows.flat_map(|row| row.as_array().unwrap())
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

/// Mixtral calls an expert's matrices w1, w3 and w2; its factors have the names that are documented.
#[test]
fn factors_of_another_dialect_run_too() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/mixtral/plain");
    let digest = common::json(&["inspect", "-m", arg(&source), "--digest", "-o", "json"]);
    let logits = |factor: Value, name: &str| {
        let layers = [0, 1].map(|layer| {
            let experts = json!([{"from": [0, 5], "weights": [1.0, 3.0], "align": true}, {"from": [1]}, {"from": [2]}]);
            json!({"layer": layer, "of": 6, "experts": experts})
        });
        let mut plan = json!({
            "version": 1,
            "model": {"digest": digest["digest"], "architecture": "mixtral"},
            "method": "m-smoe",
            "options": {},
            "layers": layers,
        });
        if factor != Value::Null {
            plan["factor"] = factor;
        }
        let (plan_file, made) = (path("plan.json"), path(name));
        fs::write(&plan_file, plan.to_string()).unwrap();
        stdout(&[
            "apply",
            "-m",
            arg(&source),
            "--plan",
            arg(&plan_file),
            "-o",
            arg(&made),
        ]);
        let tokens = ["--tokens", "5,17,20,3,9,7,8", "-o", "json"];
        values(&common::json(
            &[&["logits", "-m", arg(&made)][..], &tokens].concat(),
        ))
    };
    let merged = logits(Value::Null, "merged");
    let whole = logits(json!({"rank": 8, "rest": 0.0}), "whole");
    // Factors are rounded to bf16, as the matrices are.
    assert_close("rank 8 of 8", &whole, &merged, 5e-3);
    let stored = fs::read(path("whole").join("model.safetensors")).unwrap();
    let header = String::from_utf8_lossy(&stored[..4096]).into_owned();
    assert!(
        header.contains(".experts.0.gate_proj.inner.weight"),
        "{header}"
    );
}

#[test]
fn factors_run_as_what_they_multiply_to() {
    let (model, scratch) = (
        TinyMoe::default().build().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let path = |name: &str| -> PathBuf { scratch.path().join(name) };
    let source = arg(model.path());
    fs::write(path("data.jsonl"), DATA).unwrap();
    let (data, trace, plan) = (path("data.jsonl"), path("t.parquet"), path("p.json"));
    common::trace([Path::new(source), &data, &trace], &["--logits"]);
    let make = |command: &str, more: &[&str]| {
        let args = [
            "plan",
            command,
            "--trace",
            arg(&trace),
            "--keep",
            "0.5",
            "-o",
            arg(&plan),
        ];
        stdout(&[&args[..], more].concat())
    };
    let apply = |output: &str, more: &[&str]| {
        let output = path(output);
        let args = [
            "apply",
            "-m",
            source,
            "--plan",
            arg(&plan),
            "-o",
            arg(&output),
        ];
        stdout(&[&args[..], more].concat());
        output
    };
    let logits = |model: &PathBuf, more: &[&str]| values(&logits(model, more));
    make("merge", &[]);
    let merged = logits(&apply("merged", &[]), &[]);
    // Width 16: products of that rank lose nothing.
    make("factor", &["--rank", "16", "--rest", "0"]);
    let whole = logits(&apply("whole", &[]), &[]);
    assert_close("rank 16", &whole, &merged, 2e-4);

    // All rows of what a product misses bring it back, whatever its rank.
    make("factor", &["--rank", "3", "--rest", "1"]);
    let whole = logits(&apply("all-rows", &[]), &[]);
    assert_close("all rows", &whole, &merged, 2e-4);

    let said = make("factor", &["--rank", "4", "--rest", "0.1"]);
    assert!(
        said.contains("products of rank 4 and 0.1 of the rows"),
        "{said}"
    );
    let text = fs::read_to_string(&plan).unwrap();
    assert!(
        text.contains("\"factor\": {\"rank\":4,\"rest\":0.1}"),
        "{text}"
    );
    let (thin, folded) = (
        apply("thin", &["--data", arg(&data)]),
        apply("folded", &["--compat"]),
    );
    let (thin_logits, folded_logits) = (logits(&thin, &[]), logits(&folded, &[]));
    assert_close("multiplied", &thin_logits, &folded_logits, 2e-4);
    let off = |a: &[f32]| {
        a.iter()
            .zip(&merged)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max)
    };
    assert!(off(&thin_logits) > 1e-3, "a rank of 4 loses something");
    // The same bits however many threads and tokens there are at once.
    assert_eq!(thin_logits, logits(&thin, &["-t", "1"]));
    stdout(&["run", "-m", arg(&thin), "-p", "the cat", "-n", "4"]);

    let size = |folder: &PathBuf| {
        fs::metadata(folder.join("model.safetensors"))
            .unwrap()
            .len()
    };
    assert!(size(&thin) < size(&path("merged")) && size(&path("merged")) < size(&folded));
    let config: Value =
        serde_json::from_str(&fs::read_to_string(thin.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["cadre_factors"]["rank"], 4, "{config}");
    assert_eq!(config["cadre_factors"]["up_rows"], 2);
    assert_eq!(config["cadre_factors"]["down_rows"], 4);

    let refused = |args: &[&str], words: &str| {
        let (_, errors) = failure(args);
        assert!(errors.contains(words), "{args:?}: {errors}");
    };
    // From disk they are the same to the bit, also in the least memory that will do.
    let run = |budget: usize| {
        let budget = format!("{budget}KiB");
        let args = [
            "-p",
            "the cat",
            "-n",
            "4",
            "--stats",
            "-o",
            "json",
            "--mem-budget",
        ];
        output(
            &[
                &["run", "-m", arg(&thin)][..],
                &args[..],
                &[budget.as_str()][..],
            ]
            .concat(),
        )
    };
    let (mut too_small, mut enough) = (0, 4096);
    while enough - too_small > 1 {
        let half = (too_small + enough) / 2;
        match run(half).status.success() {
            true => enough = half,
            false => too_small = half,
        }
    }
    for budget in [enough, 4096] {
        let budget = format!("{budget}KiB");
        assert_eq!(thin_logits, logits(&thin, &["--mem-budget", &budget]));
    }
    let said: Value = serde_json::from_slice(&run(enough).stdout).unwrap();
    let streamed = |key: &str| said["streaming"][key].as_u64().unwrap();
    assert!(streamed("evictions") + streamed("refused") > 0, "{said}");
    let thin = arg(&thin);
    let gguf = path("x.gguf");
    refused(
        &["convert", "-m", thin, "-o", arg(&gguf)],
        "experts in factors",
    );
    refused(
        &["run", "-m", source, "--plan", arg(&plan), "-p", "x"],
        "needs new weights",
    );
    stdout(&["convert", "-m", source, "-o", arg(&gguf)]);
    let (of_gguf, own) = (path("g.parquet"), path("g.json"));
    common::trace([&gguf, &data, &of_gguf], &["--logits"]);
    let factor = [
        "plan",
        "factor",
        "--trace",
        arg(&of_gguf),
        "--keep",
        "0.5",
        "-o",
        arg(&own),
    ];
    stdout(&[&factor[..], &["--rank", "4"]].concat());
    let out = path("y.gguf");
    let of_gguf = [
        "apply",
        "-m",
        arg(&gguf),
        "--plan",
        arg(&own),
        "-o",
        arg(&out),
    ];
    refused(&of_gguf, "GGUF has no place for factors");
    stdout(&[&of_gguf[..], &["--compat"]].concat());
    stdout(&[&factor[..], &["--rank", "99"]].concat());
    refused(&of_gguf, "rank is 99, expected at most 16");
}
