//! Every command does its work on a tiny checkpoint, and its JSON keeps its promises.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use crate::common::{arg, cadre, json, output, stdout, tiny};
use cadre_testkit::{TinyFolder, TinyMoe, assert_close};
use serde_json::Value;

const DATA: &str = "{\"domain\": \"code\", \"text\": \"let x = 12 + 30; let y = x * 2;\"}\n\
    {\"domain\": \"prose\", \"text\": \"The cat sat with the miller and the king.\"}\n\
    {\"domain\": \"prose\", \"text\": \"The youngest was sad.\"}\n";

fn numbers(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one.as_f64().unwrap() as f32)
        .collect()
}

fn data_file(folder: &TinyFolder) -> String {
    let path = folder.path().parent().unwrap().join("data.jsonl");
    fs::write(&path, DATA).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn run_is_reproducible_and_independent_of_threads() {
    let model = tiny();
    let run = |threads: &str, seed: &str| {
        let path = arg(model.path());
        stdout(&[
            "run", "-m", path, "-p", "the cat", "-n", "30", "--seed", seed, "-t", threads,
        ])
    };
    let first = run("1", "7");
    assert!(first.starts_with("the cat") && first.ends_with('\n'));
    assert_eq!(run("2", "7"), first);
    assert_ne!(run("1", "8"), first);
}

#[test]
fn run_reports_as_json() {
    let model = tiny();
    let path = arg(model.path());
    let base = [
        "run", "-m", path, "-p", "the cat", "-n", "12", "--temp", "0", "-o", "json",
    ];
    let report = json(&base);
    assert_eq!(report["prompt"], "the cat");
    let finish = report["finish"].as_str().unwrap();
    let n_tokens = report["tokens"].as_array().unwrap().len();
    assert!(
        n_tokens == 12 && finish == "length" || finish == "stop_token",
        "{report}"
    );
    assert!(report["tokens_per_second"].is_number() && report["seed"].is_number());
    assert_eq!(report.get("experts"), None);
    // A stop string from the middle of the same text cuts it there.
    let text = report["text"].as_str().unwrap();
    let stop: String = text.chars().skip(3).take(2).collect();
    let stopped = json(&[&base[..], &["--stop", &stop]].concat());
    assert_eq!(stopped["finish"], "stop_string");
    let before = text.split(&stop).next().unwrap();
    assert_eq!(stopped["text"].as_str().unwrap(), before);
}

#[test]
fn run_reads_prompts_from_everywhere() {
    let model = tiny();
    let path = arg(model.path());
    let args = ["run", "-m", path, "-n", "8", "--temp", "0"];
    let expected = stdout(&[&args[..], &["-p", "the miller"]].concat());
    let file = model.path().parent().unwrap().join("prompt.txt");
    fs::write(&file, "the miller\n").unwrap();
    assert_eq!(stdout(&[&args[..], &["-f", arg(&file)]].concat()), expected);
    let mut child = cadre(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"the miller")
        .unwrap();
    assert_eq!(
        child.wait_with_output().unwrap().stdout,
        expected.as_bytes()
    );
    let bare = stdout(&[&args[..], &["-p", "the miller", "--no-echo"]].concat());
    assert_eq!(format!("the miller{bare}"), expected);
    assert_eq!(
        stdout(&["run", "-m", path, "-n", "0", "-p", "the miller"]),
        "the miller\n"
    );
}

#[test]
fn run_shows_its_experts() {
    let model = tiny();
    let path = arg(model.path());
    let args = [
        "run",
        "-m",
        path,
        "-p",
        "the cat",
        "-n",
        "10",
        "--experts",
        "--seed",
        "3",
    ];
    let plain = stdout(&args);
    assert!(!plain.contains('\u{1b}'), "no colours when they are off");
    assert!(
        plain.contains("layer x expert") && plain.contains("experts of layer 1"),
        "{plain}"
    );
    let coloured = stdout(&[&args[..], &["--color", "always", "--layer", "0"]].concat());
    assert!(coloured.contains("\u{1b}[38;5;") && coloured.contains("experts of layer 0"));
    let report = json(&[&args[..], &["-o", "json"]].concat());
    let layers = report["experts"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    // The last token is drawn but not routed.
    let n_routed = report["prompt_tokens"].as_array().unwrap().len()
        + report["tokens"].as_array().unwrap().len();
    let routed = layers[0]["n_tokens"].as_u64().unwrap() as usize;
    assert!(
        routed == n_routed - 1 || report["finish"] == "stop_token",
        "{report}"
    );
}

#[test]
fn every_command_has_the_embedded_model() {
    let text = stdout(&["run", "-p", "Once upon a time", "-n", "4"]);
    assert!(text.starts_with("Once upon a time"));
    assert_eq!(
        json(&["inspect", "-o", "json"])["architecture"],
        "qwen3_moe"
    );
    assert_eq!(
        json(&["logits", "--tokens", "1", "-o", "json"])["tokens"],
        serde_json::json!([1])
    );
}

#[test]
fn logits_follow_the_contract() {
    let model = tiny();
    let path = arg(model.path());
    let all = json(&[
        "logits",
        "-m",
        path,
        "--tokens",
        "5,6,7",
        "--routing",
        "-o",
        "json",
    ]);
    assert_eq!(all["tokens"], serde_json::json!([5, 6, 7]));
    let rows = all["logits"].as_array().unwrap();
    assert_eq!((rows.len(), rows[0].as_array().unwrap().len()), (3, 384));
    let routing = all["routing"].as_array().unwrap();
    assert_eq!((routing.len(), &routing[1]["layer"]), (2, &Value::from(1)));
    let experts = routing[0]["experts"].as_array().unwrap();
    assert_eq!(
        (experts.len(), experts[0].as_array().unwrap().len()),
        (3, 2)
    );
    let weights: f32 = numbers(&routing[0]["weights"][2]).iter().sum();
    assert!((weights - 1.0).abs() < 1e-5);

    let ids = model.path().parent().unwrap().join("ids");
    fs::write(&ids, "5 6\n7\n").unwrap();
    let from_file = format!("@{}", ids.display());
    let last = json(&[
        "logits", "-m", path, "--tokens", &from_file, "--last", "-o", "json",
    ]);
    assert_eq!(last["logits"].as_array().unwrap().len(), 1);
    assert_eq!(last["logits"][0], rows[2]);
    assert_eq!(last.get("routing"), None);
    assert_eq!(
        stdout(&["logits", "-m", path, "--tokens", "5,6,7"])
            .lines()
            .count(),
        3
    );
}

#[test]
fn logits_of_many_chunks_equal_those_of_a_prefix() {
    let model = tiny();
    let path = arg(model.path());
    let ids: Vec<String> = (0..100).map(|at| (at * 7 % 384).to_string()).collect();
    let long = json(&[
        "logits",
        "-m",
        path,
        "--tokens",
        &ids.join(","),
        "-o",
        "json",
    ]);
    let short = json(&[
        "logits",
        "-m",
        path,
        "--tokens",
        &ids[..70].join(","),
        "-o",
        "json",
    ]);
    assert_eq!(long["logits"].as_array().unwrap().len(), 100);
    assert_eq!(long["logits"][69], short["logits"][69]);
    let quant = [
        "logits", "-m", path, "--tokens", "1,2,3", "--quant", "q8_0", "-o", "json",
    ];
    let exact = json(&["logits", "-m", path, "--tokens", "1,2,3", "-o", "json"]);
    let (got, want) = (
        numbers(&json(&quant)["logits"][2]),
        numbers(&exact["logits"][2]),
    );
    assert_ne!(got, want, "q8_0 is lossy");
    assert_close("q8_0", &got, &want, 0.15);
}

#[test]
fn smaller_caches_change_logits_a_little() {
    let folder = TinyMoe::default().build().unwrap();
    let path = arg(folder.path());
    let logits = |more: &[&str]| {
        let args = [
            &["logits", "-m", path, "--tokens", "1,2,3,4,5", "-o", "json"],
            more,
        ]
        .concat();
        numbers(&json(&args)["logits"][4])
    };
    let exact = logits(&[]);
    assert_eq!(logits(&["--cache-type-k", "f32"]), exact);
    let half = logits(&["-ctk", "f16", "-ctv", "q8_0"]);
    assert_ne!(half, exact);
    let long = ["--cache-type-k", "f16", "--cache-type-v", "q8_0"];
    assert_eq!(logits(&long), half);
    let sum = |values: &mut dyn Iterator<Item = f32>| values.map(f32::abs).sum::<f32>();
    let error = sum(&mut half.iter().zip(&exact).map(|(a, b)| a - b));
    assert!(error < 0.1 * sum(&mut exact.iter().copied()));
    let run = [
        "run", "-p", "Once", "-n", "3", "--temp", "0", "-ctv", "q8_0",
    ];
    assert!(!stdout(&run).is_empty());
}

#[test]
fn inspect_counts_by_hand() {
    let model = TinyMoe::default().tied(true).build().unwrap();
    let report = json(&["inspect", "-m", arg(model.path()), "-o", "json"]);
    // Embedding 384 x 32; per layer attention 32 x (32 + 16 + 16) + 32 x 32, norms 2 x 32 + 2 x 8,
    // router 8 x 32; one expert 3 x 16 x 32; final norm 32.
    let expert = 3 * 16 * 32;
    let rest = 384 * 32 + 2 * (32 * 64 + 32 * 32 + 80 + 256) + 32;
    let parameters = &report["parameters"];
    assert_eq!(parameters["one_expert"], expert);
    assert_eq!(parameters["total"], rest + 2 * 8 * expert);
    assert_eq!(parameters["active"], rest + 2 * 2 * expert);
    assert_eq!(report["bytes"]["total"], 4 * (rest + 2 * 8 * expert));
    assert_eq!(report["kv_bytes_per_token"], 4 * 2 * 2 * 2 * 8);
    assert_eq!(report["dtypes"]["F32"], 2 * (9 + 3 * 8) + 2);
    let text = stdout(&["inspect", "-m", arg(model.path())]);
    assert!(text.contains("8 per layer, 2 per token"), "{text}");
}

#[test]
fn perplexity_follows_the_contract() {
    let model = tiny();
    let (path, data) = (arg(model.path()), data_file(&model));
    let report = json(&[
        "eval",
        "perplexity",
        "-m",
        path,
        "--data",
        &data,
        "-o",
        "json",
    ]);
    let nll = report["nll"].as_f64().unwrap();
    let perplexity = report["perplexity"].as_f64().unwrap();
    assert!((nll.exp() / perplexity - 1.0).abs() < 1e-9);
    let domains = report["domains"].as_object().unwrap();
    assert_eq!(domains.keys().collect::<Vec<_>>(), ["code", "prose"]);
    let (mut tokens, mut sum) = (0, 0.0);
    for one in domains.values() {
        tokens += one["tokens"].as_u64().unwrap();
        sum += one["tokens"].as_f64().unwrap() * one["nll"].as_f64().unwrap();
    }
    assert_eq!(report["tokens"], tokens);
    assert!((sum / tokens as f64 - nll).abs() < 1e-9);
    let text = stdout(&[
        "eval",
        "perplexity",
        "-m",
        path,
        "--data",
        &data,
        "--stride",
        "64",
    ]);
    assert!(
        text.contains("prose") && text.contains("perplexity"),
        "{text}"
    );
}

#[test]
fn traces_are_recorded_and_shown() {
    let model = tiny();
    let (path, data) = (arg(model.path()), data_file(&model));
    let folder = model.path().parent().unwrap();
    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (trace, html) = (file("t.parquet"), file("t.html"));
    let (svg, profile) = (
        file("t.svg"),
        arg(&model.path().join("profile.json")).to_owned(),
    );
    let record = [
        "trace", "-m", path, "--data", &data, "-o", &trace, "--logits", "--norms",
    ];
    assert_eq!(stdout(&record), "");
    let show = ["trace", "show", &trace];
    let text = stdout(
        &[
            &show[..],
            &["--html", &html, "--svg", &svg, "--profile", &profile],
        ]
        .concat(),
    );
    assert!(
        text.contains("qwen3_moe: 2 layers x 8 experts, top-2"),
        "{text}"
    );
    assert!(fs::read_to_string(&html).unwrap().starts_with("<!"));
    assert!(fs::read_to_string(&svg).unwrap().starts_with("<svg"));
    let stats = json(&[&show[..], &["-o", "json"]].concat());
    assert_eq!(
        stats["meta"]["digest"],
        json(&["inspect", "-m", path, "--digest", "-o", "json"])["digest"]
    );
    let names: Vec<_> = stats["domains"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["name"])
        .collect();
    assert_eq!(names, ["code", "prose"]);
    assert!(stats["layers"][0]["token_entropy"].is_number() && stats["n_sequences"] == 3);
    // The profile is next to the weights, so that `run` knows what the experts are for.
    let run = stdout(&["run", "-m", path, "-p", "the cat", "-n", "5", "--experts"]);
    assert!(
        run.contains("top experts per domain") && run.contains("prose"),
        "{run}"
    );
    let shorter = [
        "trace", "-m", path, "--data", &data, "-o", &trace, "-c", "4",
    ];
    assert_eq!(stdout(&shorter), "");
    assert!(json(&[&show[..], &["-o", "json"]].concat())["n_sequences"].as_u64() > Some(3));
    replays(path, &trace);
}

/// What caches would have done with a trace of a model of 2 layers and 8 experts.
fn replays(model: &str, trace: &str) {
    let replay = ["trace", "replay", trace, "--budgets", "25%,100%"];
    let text = stdout(&replay);
    for word in ["belady", "layer-partition", "25 %", "edgemoe", "control"] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    let more = [
        "-m",
        model,
        "--policies",
        "lru,lfu",
        "--prompt",
        "3",
        "--ahead",
        "2",
        "-o",
        "json",
    ];
    let report = json(&[&replay[..], &more].concat());
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 2 * 4);
    let inspect = json(&["inspect", "-m", model, "-o", "json"]);
    assert_eq!(report["total_bytes"], inspect["bytes"]["experts"]);
    assert_eq!(report["sizes"][0][0], inspect["bytes"]["one_expert"]);
    for row in results {
        let all_fits = row["share"] == 1.0;
        assert_eq!(row["n_slots"], if all_fits { 16 } else { 4 });
        assert!(row["of_bound"].as_f64() <= Some(1.0) || row["prompt"]["lookups"] != 0);
        if all_fits {
            // Every expert misses once at most.
            assert!(row["decode"]["hit_rate"].as_f64() > Some(0.5), "{row}");
            assert_eq!(row["evictions"], 0);
        }
    }
    let control = report["predictors"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&control["predictor"], &control["overlap"]),
        (&"control".into(), &1.0.into())
    );
}

#[test]
fn the_disk_of_a_file_is_measured_and_remembered_for_fit() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("weights");
    fs::write(&file, vec![3; 80 << 20]).unwrap();
    let run = |args: &[&str]| {
        let mut command = crate::common::cadre(args);
        let output = command
            .env("XDG_CACHE_HOME", folder.path())
            .output()
            .unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let report = run(&["doctor", "-o", "json", "--disk", arg(&file)]);
    let disk = &report["disk"];
    assert!(disk["bytes_per_second"].as_f64() > Some(1e6), "{disk}");
    assert!(disk["latency_seconds"].as_f64() > Some(0.0));
    assert!(disk["lanes"].as_u64() > Some(0) && disk["request_bytes"].as_u64() > Some(0));
    assert!(disk["points"].as_array().unwrap().len() >= 8);
    let kept = fs::read(folder.path().join("cadre/machine.json")).unwrap();
    let kept: serde_json::Value = serde_json::from_slice(&kept).unwrap();
    let device = disk["device"].as_str().unwrap();
    assert_eq!(
        kept["disks"][device]["bytes_per_second"],
        disk["bytes_per_second"]
    );

    let model = folder.path().join("model");
    let tiny = cadre_testkit::TinyMoe::default().n_experts(64);
    tiny.write(&model).unwrap();
    let fit = |budget: &str| {
        run(&[
            "fit",
            "-o",
            "json",
            "-m",
            arg(&model),
            "--mem-budget",
            budget,
        ])
    };
    let needed = fit("1GiB")["needed_bytes"].as_u64().unwrap();
    let streamed = &fit(&(needed - 1000).to_string())["streamed"];
    assert_eq!(streamed["disk_source"], "measured");
    assert_eq!(streamed["disk_bytes_per_s"], disk["bytes_per_second"]);
}

#[test]
fn doctor_and_completions_work() {
    let report = json(&["doctor", "-o", "json"]);
    assert!(report["memory_bandwidth"][0]["median"].as_f64() > Some(0.0));
    let peaks = &report["peaks"];
    assert_eq!(peaks["threads"], report["threads"]);
    // Only the best kernels have instructions for them.
    for (name, needs) in [("int8", "avx512"), ("bf16", "avx512_bf16")] {
        let kernels = report["kernels_available"].as_array().unwrap();
        let has = kernels.iter().any(|kernel| kernel == needs);
        assert_eq!(peaks[name].as_f64().is_some_and(|rate| rate > 1e8), has);
    }
    assert!(report["model"]["bound_tokens_per_second"].as_f64() > Some(0.0));
    assert_eq!(report["disk"], serde_json::Value::Null, "none was named");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        assert!(
            stdout(&["completions", shell]).contains("perplexity"),
            "{shell}"
        );
    }
    assert_eq!(output(&["--version"]).status.code(), Some(0));
}
