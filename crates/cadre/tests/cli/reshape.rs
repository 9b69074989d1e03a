//! From a recording to a plan to a smaller model, on the embedded model and on tiny ones; and what is refused on the way.

use std::fs;
use std::path::{Path, PathBuf};

use cadre_testkit::{TinyFolder, TinyMoe, assert_close};
use serde_json::Value;

use crate::common::{arg, failure, json, logits, stdout, tiny};

const DATA: &str = "{\"domain\": \"code\", \"text\": \"let x = 12 + 30; let y = x * 2; fn main() { print(x); }\"}\n\
    {\"domain\": \"prose\", \"text\": \"The cat sat with the miller and the king. The youngest was sad.\"}\n";

/// A folder with a recording of `model`, with everything that methods ask for.
pub(crate) struct Bench {
    folder: tempfile::TempDir,
    pub(crate) model: TinyFolder,
}

impl Bench {
    pub(crate) fn new(model: TinyFolder) -> Self {
        let bench = Self {
            folder: tempfile::tempdir().unwrap(),
            model,
        };
        fs::write(bench.path("data.jsonl"), DATA).unwrap();
        bench.record("trace.parquet", &["--logits", "--norms"]);
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn record(&self, name: &str, more: &[&str]) {
        let (data, trace) = (self.path("data.jsonl"), self.path(name));
        let mut args = vec!["trace", "-m", arg(self.model.path())];
        args.extend(["--data", arg(&data), "-o", arg(&trace)]);
        args.extend(more);
        stdout(&args);
    }

    /// Makes `plan.json` with these options; the picture of it.
    fn prune(&self, options: &[&str]) -> String {
        let (trace, plan) = (self.path("trace.parquet"), self.path("plan.json"));
        let mut args = vec!["plan", "prune", "--trace", arg(&trace), "-o", arg(&plan)];
        args.extend(options);
        stdout(&args)
    }

    fn plan(&self) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path("plan.json")).unwrap()).unwrap()
    }

    fn apply_args<'a>(&'a self, plan: &'a Path, output: &'a Path) -> Vec<&'a str> {
        let model = arg(self.model.path());
        vec!["apply", "-m", model, "--plan", arg(plan), "-o", arg(output)]
    }
}

fn kept(plan: &Value) -> Vec<Vec<u64>> {
    let layers = plan["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| {
            let experts = layer["experts"].as_array().unwrap().iter();
            experts
                .map(|one| one["from"][0].as_u64().unwrap())
                .collect()
        })
        .collect()
}

#[test]
fn every_method_makes_a_plan_that_applies_and_runs() {
    let bench = Bench::new(tiny());
    let mut seen = Vec::new();
    for method in ["frequency", "router-mass", "reap", "uncurl", "random"] {
        let picture = bench.prune(&["--method", method, "--keep", "0.5"]);
        assert!(
            picture.contains(&format!("{method} for qwen3_moe")),
            "{picture}"
        );
        assert!(picture.contains("8 of 16 experts stay"), "{picture}");
        let plan = bench.plan();
        assert!(kept(&plan).iter().all(|layer| layer.len() == 4));
        seen.push(kept(&plan));
        let (plan, output) = (bench.path("plan.json"), bench.path(method));
        let said = stdout(&bench.apply_args(&plan, &output));
        assert!(said.contains("8 of 16 experts"), "{said}");
        let report = json(&["inspect", "-m", arg(&output), "-o", "json"]);
        assert_eq!(report["n_experts"], 4, "{report}");
        stdout(&["run", "-m", arg(&output), "-p", "the cat", "-n", "4"]);
    }
    seen.dedup();
    assert!(seen.len() > 1, "methods differ");
    let shown = stdout(&["plan", "show", arg(&bench.path("plan.json"))]);
    assert!(shown.contains("seed       0") && shown.contains("domains    code, prose"));
    let shown = json(&["plan", "show", arg(&bench.path("plan.json")), "-o", "json"]);
    assert_eq!((&shown["kept"], &shown["experts"]), (&8.into(), &16.into()));
}

#[test]
fn frequency_keeps_what_the_recording_shows() {
    let bench = Bench::new(tiny());
    bench.prune(&["--method", "frequency", "--keep", "0.5", "--domain", "code"]);
    let trace = bench.path("code.parquet");
    let data = bench.path("data.jsonl");
    fs::write(&data, DATA.lines().next().unwrap()).unwrap();
    let model = arg(bench.model.path());
    stdout(&[
        "trace",
        "-m",
        model,
        "--data",
        arg(&data),
        "-o",
        arg(&trace),
    ]);
    let stats = json(&["trace", "show", arg(&trace), "-o", "json"]);
    let plan = bench.plan();
    for (layer, kept) in stats["layers"].as_array().unwrap().iter().zip(kept(&plan)) {
        let load: Vec<u64> = serde_json::from_value(layer["load"].clone()).unwrap();
        let least_kept = kept.iter().map(|id| load[*id as usize]).min().unwrap();
        let dropped = (0..8u64).filter(|id| !kept.contains(id));
        let most_dropped = dropped.map(|id| load[id as usize]).max().unwrap();
        assert!(least_kept >= most_dropped, "{load:?} {kept:?}");
    }
    assert_eq!(plan["options"]["domains"], "code");
}

#[test]
fn budgets_give_models_of_that_size() {
    let bench = Bench::new(tiny());
    let size = |path: &Path| fs::metadata(path.join("model.safetensors")).unwrap().len();
    let before = size(bench.model.path());
    let budget = (before * 7 / 10).to_string();
    let model = arg(bench.model.path()).to_owned();
    for scope in ["layer", "global"] {
        bench.prune(&["-m", &model, "--budget", &budget, "--scope", scope]);
        let (plan, output) = (bench.path("plan.json"), bench.path(scope));
        stdout(&bench.apply_args(&plan, &output));
        // Beside the tensors there is a header of some thousand bytes.
        let after = size(&output);
        assert!(
            after < before * 7 / 10 + 12_000 && after > before / 2,
            "{after} of {before}"
        );
    }
    let (trace, plan) = (bench.path("trace.parquet"), bench.path("plan.json"));
    let args = [
        "plan",
        "prune",
        "-m",
        &model,
        "--trace",
        arg(&trace),
        "--budget",
        "1000",
        "-o",
        arg(&plan),
    ];
    let (code, error) = failure(&args);
    assert!(
        code == 3 && error.contains("more than the budget"),
        "{error}"
    );
}

#[test]
fn merged_experts_apply_and_groups_of_one_are_untouched() {
    let bench = Bench::new(tiny());
    let (trace, plan) = (bench.path("trace.parquet"), bench.path("plan.json"));
    for (method, align) in [("m-smoe", true), ("mean", false), ("ties", false)] {
        let args = [
            "plan",
            "merge",
            "--trace",
            arg(&trace),
            "--keep",
            "0.5",
            "--rows",
            "one",
            "--method",
            method,
            "-o",
            arg(&plan),
        ];
        let picture = stdout(&args);
        assert!(
            picture.contains('+') && picture.contains("8 of 16 experts stay"),
            "{picture}"
        );
        let made = bench.plan();
        let experts = made["layers"][0]["experts"].as_array().unwrap();
        let all: usize = experts
            .iter()
            .map(|one| one["from"].as_array().unwrap().len())
            .sum();
        assert_eq!(all, 8, "every expert goes somewhere");
        let merged = experts
            .iter()
            .find(|one| one["from"].as_array().unwrap().len() > 1)
            .unwrap();
        assert_eq!(merged["align"].as_bool().unwrap_or(false), align);
        assert_eq!(merged["weights"].is_array(), align);
        assert_eq!(merged["ties"].is_number(), method == "ties");
        let output = bench.path(method);
        stdout(&bench.apply_args(&plan, &output));
        stdout(&["run", "-m", arg(&output), "-p", "the cat", "-n", "4"]);
    }
    stdout(&[
        "plan",
        "merge",
        "--trace",
        arg(&trace),
        "--keep",
        "1",
        "-o",
        arg(&plan),
    ]);
    let output = bench.path("same");
    stdout(&bench.apply_args(&plan, &output));
    let read = |folder: &Path| fs::read(folder.join("config.json")).unwrap();
    assert_eq!(read(&output), read(bench.model.path()));
}

#[test]
fn routers_keep_their_rows_and_merged_experts_share_weights() {
    let bench = Bench::new(tiny());
    let gguf = bench.path("model.gguf");
    stdout(&["convert", "-m", arg(bench.model.path()), "-o", arg(&gguf)]);
    for (source, extension) in [(bench.model.path(), ""), (&*gguf, ".gguf")] {
        let path = |name: &str| bench.path(&format!("{name}{extension}"));
        let (data, trace, plan) = (bench.path("data.jsonl"), path("t.parquet"), path("p.json"));
        let model = ["-m", arg(source)];
        let record = ["trace", "--data", arg(&data), "-o", arg(&trace), "--logits"];
        stdout(&[&record[..], &model].concat());
        let merge = [
            "plan",
            "merge",
            "--trace",
            arg(&trace),
            "--keep",
            "0.25",
            "-o",
            arg(&plan),
        ];
        let picture = stdout(&merge);
        assert!(
            picture.contains("routers keep the rows of all experts"),
            "{picture}"
        );
        let apply = |output: &Path, more: &[&str]| {
            let args = ["apply", "--plan", arg(&plan), "-o", arg(output)];
            stdout(&[&args[..], &model, more].concat());
        };
        let (shared, copies) = (path("shared"), path("copies"));
        apply(&shared, &["--data", arg(&data)]);
        apply(&copies, &["--compat"]);
        let logits = |model: &Path, more: &[&str]| logits(model, &[&["--routing"], more].concat());
        // The same picks as of all experts, by the same weights, whether they are there once or once for each.
        let own = logits(&shared, &[]);
        assert_eq!(own, logits(&copies, &[]));
        assert_eq!(own, logits(&shared, &["--mem-budget", "900KiB"]));
        let before = logits(source, &[]);
        assert_eq!(own["routing"][0], before["routing"][0]);
        assert_ne!(own["logits"], before["logits"]);
        let inspected = json(&["inspect", "-m", arg(&shared), "-o", "json"]);
        assert_eq!(inspected["n_experts"], 8, "{inspected}");
        let bytes = |model: &Path| {
            json(&["inspect", "-m", arg(model), "-o", "json"])["bytes"]["total"].clone()
        };
        assert!(
            bytes(&shared).as_u64() < bytes(&copies).as_u64(),
            "{inspected}"
        );
        // Two picks of one merged expert are one.
        stdout(&["run", "-m", arg(&shared), "-p", "the cat", "-n", "4"]);
        let refused = failure(&[
            "convert",
            "-m",
            arg(&shared),
            "-o",
            arg(&path("other.gguf")),
        ])
        .1;
        assert!(refused.contains("experts that share weights"), "{refused}");
        let again = failure(&[
            "apply",
            "-m",
            arg(&shared),
            "--plan",
            arg(&plan),
            "-o",
            arg(&path("x")),
        ])
        .1;
        assert!(again.contains("another model"), "{again}");
    }
}

#[test]
fn the_embedded_model_goes_through_the_whole_workflow() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("data.jsonl"), DATA).unwrap();
    stdout(&[
        "trace",
        "--data",
        &path("data.jsonl"),
        "-o",
        &path("t.parquet"),
    ]);
    stdout(&[
        "plan",
        "prune",
        "--trace",
        &path("t.parquet"),
        "--keep",
        "0.5",
        "-o",
        &path("half.json"),
    ]);
    stdout(&["apply", "--plan", &path("half.json"), "-o", &path("half")]);
    let report = json(&["inspect", "-m", &path("half"), "-o", "json"]);
    assert_eq!(report["n_experts"], 8);
    stdout(&["run", "-m", &path("half"), "-p", "Once", "-n", "4"]);
    // A trace of the whole model is not one of the half.
    let args = [
        "plan",
        "prune",
        "-m",
        &path("half"),
        "--trace",
        &path("t.parquet"),
        "--keep",
        "0.5",
        "-o",
        &path("x.json"),
    ];
    let (code, error) = failure(&args);
    assert!(
        code == 1 && error.contains("recorded from another model"),
        "{error}"
    );
    let args = [
        "apply",
        "-m",
        &path("half"),
        "--plan",
        &path("half.json"),
        "-o",
        &path("x"),
    ];
    let (code, error) = failure(&args);
    assert!(
        code == 1 && error.contains("made for another model"),
        "{error}"
    );
}

#[test]
fn edited_plans_are_followed_or_refused_with_the_place() {
    let bench = Bench::new(tiny());
    bench.prune(&["--keep", "0.5"]);
    let edited = bench.path("edited.json");
    let output = bench.path("out");
    let attempt = |edit: &dyn Fn(&mut Value)| {
        let mut plan = bench.plan();
        edit(&mut plan);
        fs::write(&edited, plan.to_string()).unwrap();
        bench
            .apply_args(&edited, &output)
            .iter()
            .map(|one| (*one).to_owned())
            .collect::<Vec<_>>()
    };
    let refused = |edit: &dyn Fn(&mut Value), words: &str| {
        let args = attempt(edit);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (code, error) = failure(&args);
        assert!(code == 1 && error.contains(words), "{error}");
        assert!(error.contains("edited.json"), "{error}");
        assert!(!output.exists());
    };
    let experts = |plan: &Value| plan["layers"][1]["experts"].as_array().unwrap().clone();
    refused(
        &|plan| plan["layers"][1]["experts"] = serde_json::json!([]),
        "layer 1: drops all experts",
    );
    refused(
        &|plan| {
            let first = experts(plan)[0].clone();
            plan["layers"][1]["experts"][1] = first;
        },
        "layer 1, entry 1: expert",
    );
    refused(
        &|plan| plan["layers"][1]["experts"] = serde_json::json!([{"from": [3]}]),
        "keeps 1 of 8 experts, but a token is sent to 2",
    );
    refused(
        &|plan| plan["layers"][0]["experts"][0]["from"] = serde_json::json!([]),
        "layer 0, entry 0: is made of no expert",
    );
    refused(
        &|plan| plan["layers"][0]["experts"][0]["bits"] = serde_json::json!(4),
        "unknown field `bits`",
    );
    refused(
        &|plan| plan["layers"][0]["of"] = 9.into(),
        "said to have 9 experts",
    );
    let args = attempt(&|plan| {
        plan["layers"][1]["experts"] =
            serde_json::json!([{"from": [6]}, {"from": [0]}, {"from": [7]}]);
    });
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    stdout(&args);
    stdout(&["run", "-m", arg(&output), "-p", "the cat", "-n", "4"]);
}

#[test]
fn what_a_recording_lacks_is_said_with_what_to_do() {
    let bench = Bench::new(tiny());
    bench.record("bare.parquet", &[]);
    let (bare, plan) = (bench.path("bare.parquet"), bench.path("plan.json"));
    let refused = |more: &[&str], code: i32, words: &[&str]| {
        let mut args = vec!["plan", "prune", "--trace", arg(&bare), "-o", arg(&plan)];
        args.extend(more);
        let (found, error) = failure(&args);
        assert_eq!(found, code, "{error}");
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(!plan.exists());
    };
    refused(
        &["--keep", "0.5", "--method", "reap"],
        1,
        &["no norms", "--norms"],
    );
    refused(
        &["--keep", "0.5", "--method", "uncurl"],
        1,
        &["no router logits", "--logits"],
    );
    refused(
        &["--keep", "0.5", "--domain", "poetry"],
        1,
        &["no domain `poetry`", "code, prose"],
    );
    refused(
        &["--keep", "0.1"],
        1,
        &["layer 0 would keep 1 of 8 experts, but needs 2"],
    );
    refused(&["--keep", "1.5"], 1, &["expected a part above 0"]);
    refused(
        &["--keep", "0.5", "--method", "magic"],
        2,
        &["known: frequency, router-mass"],
    );
    refused(&[], 2, &["--keep"]);
    let dense = TinyMoe::default().mlp_only_layers(&[0, 1]).build().unwrap();
    bench.prune(&["--keep", "0.5"]);
    let output = bench.path("out");
    let args = [
        "apply",
        "-m",
        arg(dense.path()),
        "--plan",
        arg(&plan),
        "-o",
        arg(&output),
    ];
    let (_, error) = failure(&args);
    assert!(error.contains("no layers with experts"), "{error}");
}

#[test]
fn what_a_plan_costs_is_measured_reported_and_may_be_too_much() {
    let bench = Bench::new(tiny());
    let (plan, data) = (bench.path("plan.json"), bench.path("data.jsonl"));
    let model = arg(bench.model.path());
    let eval = |path: &str| {
        json(&[
            "eval",
            "perplexity",
            "-m",
            path,
            "--data",
            arg(&data),
            "-o",
            "json",
        ])
    };
    bench.prune(&["--keep", "1"]);
    let same = bench.path("same");
    let mut args = bench.apply_args(&plan, &same);
    args.extend([
        "--data",
        arg(&data),
        "--max-kl",
        "0",
        "--max-ppl-increase",
        "0",
    ]);
    let said = stdout(&args);
    assert!(said.contains("(+0.0 %), KL 0.0000"), "{said}");
    assert!(said.contains("same best guess 100.0 %"), "{said}");

    bench.prune(&["--keep", "0.25"]);
    let small = bench.path("small");
    let mut args = bench.apply_args(&plan, &small);
    args.extend(["--data", arg(&data)]);
    stdout(&args);
    let text = fs::read_to_string(bench.path("small.quality.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    for (side, path) in [("before", model), ("after", arg(&small))] {
        let eval = eval(path);
        let close = |a: &Value, b: &Value| {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() < 1e-5 * b.abs(), "{a} {b}");
        };
        close(&report[side]["perplexity"], &eval["perplexity"]);
        let key = format!("perplexity_{side}");
        for domain in ["code", "prose"] {
            close(
                &report["domains"][domain][&key],
                &eval["domains"][domain]["perplexity"],
            );
        }
    }
    assert!(report["total"]["kl"].as_f64().unwrap() > 0.0);
    let layers = report["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| {
        let (kept, same) = (
            layer["kept"].as_f64().unwrap(),
            layer["same"].as_f64().unwrap(),
        );
        same <= kept && kept < 1.0 && same > 0.0
    }));
    let markdown = fs::read_to_string(bench.path("small.quality.md")).unwrap();
    assert!(
        markdown.contains("| experts | 16 | 4 | -75.0 % |"),
        "{markdown}"
    );
    let html = fs::read_to_string(bench.path("small.quality.html")).unwrap();
    assert!(html.contains("<svg") && !html.contains("src=") && !html.contains("://"));

    let refused = bench.path("refused");
    let report = bench.path("why");
    let mut args = bench.apply_args(&plan, &refused);
    args.extend([
        "--data",
        arg(&data),
        "--max-kl",
        "1e-9",
        "--report",
        arg(&report),
    ]);
    let (code, error) = failure(&args);
    assert!(
        code == 3 && error.contains("nats per token, more than"),
        "{error}"
    );
    assert!(!refused.exists() && bench.path("why.md").exists());
    assert_eq!(hidden(&bench), Vec::<String>::new());
}

#[test]
fn a_budget_bounds_writing_or_is_refused_with_what_is_needed() {
    let bench = Bench::new(tiny());
    bench.prune(&["--keep", "0.5"]);
    let (plan, small) = (bench.path("plan.json"), bench.path("small"));
    let mut args = bench.apply_args(&plan, &small);
    args.extend(["--mem-budget", "1MiB"]);
    let (code, error) = failure(&args);
    assert!(
        code == 3 && error.contains("more than the budget of 1.00 MiB"),
        "{error}"
    );
    // What it names is enough.
    let named = error.split("--mem-budget ").nth(1).unwrap();
    let named = named.split_whitespace().next().unwrap();
    assert!(!small.exists());
    let mut args = bench.apply_args(&plan, &small);
    args.extend(["--mem-budget", named]);
    stdout(&args);
    assert!(small.join("config.json").exists());
    // A model that cannot be measured with so little is refused before anything is written as well.
    let data = bench.path("data.jsonl");
    let other = bench.path("other");
    let mut args = bench.apply_args(&plan, &other);
    args.extend(["--mem-budget", named, "--data", arg(&data), "-c", "200000"]);
    let (code, error) = failure(&args);
    assert!(code == 1 && error.contains("half of the budget"), "{error}");
    assert_eq!(hidden(&bench), Vec::<String>::new());
}

/// Hidden files beside the outputs.
fn hidden(bench: &Bench) -> Vec<String> {
    let left = fs::read_dir(bench.folder.path()).unwrap();
    let names = left.map(|one| one.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_plan_that_is_tried_computes_what_the_smaller_model_does() {
    let bench = Bench::new(tiny());
    bench.prune(&["--keep", "0.5", "--scope", "global"]);
    let (plan, output) = (bench.path("plan.json"), bench.path("half"));
    stdout(&bench.apply_args(&plan, &output));
    let logits = |more: &[&str]| {
        let args = ["logits", "--tokens", "5,17,200,3,41,9", "-o", "json"];
        let report = json(&[&args[..], more].concat());
        let rows: Vec<Vec<f32>> = serde_json::from_value(report["logits"].clone()).unwrap();
        rows.concat()
    };
    let model = arg(bench.model.path());
    let whole = logits(&["-m", model]);
    let tried = logits(&["-m", model, "--plan", arg(&plan)]);
    let made = logits(&["-m", arg(&output)]);
    assert_close("tried", &tried, &made, 1e-6);
    assert_ne!(whole, tried);
    let merged = bench.path("merged.json");
    let trace = bench.path("trace.parquet");
    stdout(&[
        "plan",
        "merge",
        "--trace",
        arg(&trace),
        "--keep",
        "0.5",
        "-o",
        arg(&merged),
    ]);
    let run = ["run", "-p", "a", "-n", "1"];
    let (code, error) = failure(&[&run[..], &["-m", model, "--plan", arg(&merged)]].concat());
    assert!(code == 1 && error.contains("needs new weights"), "{error}");
    let (code, error) = failure(&[&run[..], &["--plan", arg(&plan)]].concat());
    assert!(
        code == 1 && error.contains("made for another model"),
        "{error}"
    );
}

#[test]
fn a_steering_is_written_into_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let (steer, output) = (folder.path().join("steer.json"), folder.path().join("out"));
    let model = tiny();
    fs::write(
        &steer,
        r#"{"mask": {"*": [2]}, "gain": {"1": {"3": 0.5, "4": 0}}, "top_k": 1}"#,
    )
    .unwrap();
    let apply = |steer: &str, output: &str| {
        let model = arg(model.path()).to_owned();
        ["apply", "-m", &model, "--steer", steer, "-o", output].map(str::to_owned)
    };
    let apply_args = apply(arg(&steer), arg(&output));
    let said = stdout(&apply_args.each_ref().map(String::as_str));
    assert!(said.contains("14 of 16 experts"), "{said}");
    let logits = |more: &[&str]| -> Vec<f32> {
        let report = json(&[&["logits", "--tokens", "1,2,3,4,5", "-o", "json"], more].concat());
        let rows: Vec<Vec<f32>> = serde_json::from_value(report["logits"].clone()).unwrap();
        rows.concat()
    };
    let steered = logits(&["-m", arg(model.path()), "--steer", arg(&steer)]);
    assert_close("baked", &logits(&["-m", arg(&output)]), &steered, 1e-5);
    fs::write(&steer, r#"{"mute": {"1": [3]}}"#).unwrap();
    let other = folder.path().join("other");
    let refused = apply(arg(&steer), arg(&other));
    let (code, errors) = failure(&refused.each_ref().map(String::as_str));
    assert!(
        code == 1 && errors.contains("`mute`") && errors.contains("gain of 0"),
        "{errors}"
    );
    assert!(!other.exists());
}
