//! `cadre quantize`: the types of llama-quantize on a tiny model, what is refused, and formats by expert from plan to model.

use std::fs;

use cadre_testkit::{TinyFolder, TinyMoe};
use serde_json::Value;

use crate::common::{arg, failure, json, stdout};

/// Rows of experts are whole blocks of 32.
fn model() -> TinyFolder {
    let model = TinyMoe::default().configure(|config| config.moe.intermediate_size = 32);
    model.build().unwrap()
}

fn logits(model: &str, more: &[&str]) -> Value {
    let mut args = vec![
        "logits",
        "-m",
        model,
        "--tokens",
        "5,17,200,3,99",
        "-o",
        "json",
    ];
    args.extend(more);
    json(&args)["logits"].clone()
}

#[test]
fn a_type_makes_a_file_that_runs() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let model = arg(folder.path());
    let said = stdout(&["quantize", "Q4_0", "-m", model, "-o", &path("q4.gguf")]);
    assert!(said.contains("q4.gguf") && said.contains("Q4_0"), "{said}");
    stdout(&["run", "-m", &path("q4.gguf"), "-p", "the cat", "-n", "4"]);
    let dry = stdout(&["quantize", "q8_0", "-m", model, "--dry-run"]);
    assert!(dry.contains("Q8_0") && dry.contains(" of "), "{dry}");
    let router = ["--tensor-type", "blk.*.ffn_gate_inp.weight=bf16"];
    let args = [
        "quantize",
        "q8_0",
        "-m",
        model,
        "--token-embedding-type",
        "f16",
        "-o",
        &path("e.gguf"),
    ];
    let said = stdout(&[&args[..], &router].concat());
    assert!(said.contains("1 F16") && said.contains("2 BF16"), "{said}");
}

#[test]
fn what_cannot_be_is_said_with_what_to_do() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let model = arg(folder.path());
    let refused = |args: &[&str], code: i32, words: &str| {
        let (found, errors) = failure(&[&["quantize"], args].concat());
        assert!(
            found == code && errors.contains(words),
            "{args:?}: {errors}"
        );
    };
    let out = path("out.gguf");
    let to_q4_0 = |more: &[&str], code: i32, words: &str| {
        let args = ["q4_0", "-m", model, "-o", &out];
        refused(&[&args[..], more].concat(), code, words);
    };
    refused(&["q9", "-m", model, "-o", &out], 2, "MXFP4_MOE");
    refused(
        &["q4_0", "-m", model, "-o", &path("folder")],
        2,
        "does not end in .gguf",
    );
    to_q4_0(&["--tensor-type", "output.weight"], 2, "NAME=FORMAT");
    let router = "blk.*.ffn_gate_inp.weight=q4_0";
    to_q4_0(&["--tensor-type", router], 1, "at least 8 bits");
    to_q4_0(&["--imatrix", &path("none")], 1, "none");
    fs::write(path("no.dat"), b"no matrix").unwrap();
    to_q4_0(&["--imatrix", &path("no.dat")], 1, "cut off");
    stdout(&["quantize", "q4_0", "-m", model, "-o", &path("q4.gguf")]);
    refused(
        &["q5_0", "-m", &path("q4.gguf"), "-o", &out],
        1,
        "quantised already",
    );
    assert!(!fs::exists(&out).unwrap());
    stdout(&[
        "quantize",
        "q5_0",
        "-m",
        &path("q4.gguf"),
        "-o",
        &out,
        "--allow-requantize",
    ]);
}

#[test]
fn formats_by_expert_are_planned_applied_and_served_from_memory_and_disk_alike() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let model = arg(folder.path());
    let text = "{\"domain\": \"code\", \"text\": \"let x = 12 + 30; let y = x * 2; print(x);\"}\n";
    fs::write(path("data.jsonl"), text).unwrap();
    let data = path("data.jsonl");
    let plan = |name: &str, more: &[&str]| {
        let args = [
            "plan",
            "bits",
            "-m",
            model,
            "--data",
            &data,
            "-o",
            &path(name),
        ];
        stdout(&[&args[..], more].concat())
    };
    let said = plan(
        "p.json",
        &["--formats", "q8_0,q4_0", "--max-ppl-increase", "0.0005"],
    );
    assert!(
        said.contains("all experts q4_0") && said.contains("measurements"),
        "{said}"
    );
    let text = fs::read_to_string(path("p.json")).unwrap();
    let mut edited: Value = serde_json::from_str(&text).unwrap();
    let increase: f64 = edited["options"]["ppl-increase"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(increase <= 0.0005, "{text}");
    // Nothing of the measuring is left beside the plan.
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 2);

    for (expert, format) in [(0, "q4_0"), (1, "q8_0"), (2, "mxfp4")] {
        edited["layers"][0]["experts"][expert]["format"] = format.into();
    }
    for expert in 3..8 {
        let one = edited["layers"][0]["experts"][expert]
            .as_object_mut()
            .unwrap();
        one.remove("format");
    }
    fs::write(path("p.json"), edited.to_string()).unwrap();
    let shown = stdout(&["plan", "show", &path("p.json"), "-m", model]);
    assert!(
        shown.contains("b as q4_0") || shown.contains("a as q4_0") || shown.contains("c as q4_0")
    );
    let apply = [
        "apply",
        "-m",
        model,
        "--plan",
        &path("p.json"),
        "-o",
        &path("mixed.gguf"),
    ];
    let said = stdout(&[&apply[..], &["--data", &data]].concat());
    assert!(
        said.contains("16 of 16 experts") && said.contains("perplexity"),
        "{said}"
    );
    let report: Value =
        serde_json::from_str(&fs::read_to_string(path("mixed.quality.json")).unwrap()).unwrap();
    assert!(report["total"]["kl"].as_f64().unwrap() > 0.0, "{report}");
    let resident = logits(&path("mixed.gguf"), &[]);
    assert_eq!(resident, logits(&path("mixed.gguf"), &["--no-repack"]));
    assert_eq!(
        resident,
        logits(&path("mixed.gguf"), &["--mem-budget", "900KiB"])
    );
    let size = fs::metadata(path("mixed.gguf")).unwrap().len();
    assert!(
        size < fs::metadata(folder.path().join("model.safetensors"))
            .unwrap()
            .len()
    );

    let refused = |args: &[&str], words: &str| {
        let (_, errors) = failure(args);
        assert!(errors.contains(words), "{args:?}: {errors}");
    };
    let to_folder = [
        "apply",
        "-m",
        model,
        "--plan",
        &path("p.json"),
        "-o",
        &path("folder"),
    ];
    refused(&to_folder, ".gguf");
    refused(&[&apply[..], &["--compat"]].concat()[..], "--unit layer");
    refused(
        &["run", "-m", model, "--plan", &path("p.json"), "-p", "x"],
        "number formats",
    );
    edited["layers"][1]["experts"][0]["format"] = "q9".into();
    fs::write(path("p.json"), edited.to_string()).unwrap();
    let again = [
        "apply",
        "-m",
        model,
        "--plan",
        &path("p.json"),
        "-o",
        &path("n.gguf"),
    ];
    refused(&again, "layer 1, entry 0: has the format `q9`");
    refused(
        &[
            "plan",
            "bits",
            "-m",
            model,
            "--data",
            &data,
            "-o",
            &path("q"),
            "--formats",
            "q4_k",
        ],
        "no multiples of 256",
    );

    // By layer, from a recording: stacks of one format, which other programs load.
    let trace = path("trace.parquet");
    stdout(&[
        "trace", "-m", model, "--data", &data, "-o", &trace, "--norms",
    ]);
    let said = plan(
        "layers.json",
        &[
            "--formats",
            "q8_0,q4_0",
            "--unit",
            "layer",
            "--trace",
            &trace,
            "--max-ppl-increase",
            "9",
        ],
    );
    assert!(said.contains("q4_0 does for all"), "{said}");
    let compat = [
        "apply",
        "-m",
        model,
        "--plan",
        &path("layers.json"),
        "-o",
        &path("l.gguf"),
        "--compat",
    ];
    stdout(&compat);
    let inspected = json(&["inspect", "-m", &path("l.gguf"), "-o", "json"]);
    assert!(inspected.to_string().contains("Q4_0"), "{inspected}");
}
