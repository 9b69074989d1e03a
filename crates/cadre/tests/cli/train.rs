//! `cadre train`: killed and resumed, interrupted, full disk, bad recipes, speed, and a model that runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{arg, cadre, failure, json, logits, output, stdout};

/// A folder with a little text and a recipe for a very small model.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = |i: usize| {
            format!(
                "the {i} cats sat on {} mills and saw {} dogs. ",
                i * 7,
                i % 5
            )
        };
        let lines: String = (0..60)
            .map(|i| {
                let text: String = (0..12).map(|j| text(i * j)).collect();
                format!("{{\"domain\": \"cats\", \"text\": \"{text}\"}}\n")
            })
            .collect();
        fs::write(folder.path().join("cats.jsonl"), lines).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn recipe(&self, run: &str, steps: u64) -> PathBuf {
        let data = self.path("cats.jsonl");
        let text = format!(
            "name = \"{run}\"\n\
             [model]\nvocab_size = 300\nhidden_size = 32\nn_layers = 2\nn_heads = 2\nn_kv_heads = 1\n\
             head_dim = 16\nn_experts = 4\ntop_k = 2\nmoe_intermediate_size = 16\n\
             max_position_embeddings = 64\ntie_word_embeddings = true\n\
             [data]\nsources = [{{ domain = \"cats\", train = {data:?}, heldout = {data:?} }}]\n\
             [train]\nsteps = {steps}\nbatch_size = 2\nseq_len = 32\nlr = 1e-2\nwarmup_steps = 5\n\
             [output]\ndir = {:?}\nsnapshot_every = 7\n",
            self.path(run)
        );
        let path = self.path(&format!("{run}.toml"));
        fs::write(&path, text).unwrap();
        path
    }
}

/// Losses of a run by step.
fn losses(run: &Path) -> Vec<String> {
    let log = fs::read_to_string(run.join("log.jsonl")).unwrap_or_default();
    log.lines()
        .filter_map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(format!("{} {}", line["step"], line.get("loss")?))
        })
        .collect()
}

fn wait_for_steps(run: &Path, n_steps: usize) {
    let start = Instant::now();
    while losses(run).len() < n_steps {
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "no step {n_steps}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn killed_at_any_step_and_resumed_is_the_run_without_the_kill() {
    let bench = Bench::new();
    let whole = bench.recipe("whole", 60);
    stdout(&["train", arg(&whole)]);
    let killed = bench.recipe("killed", 60);
    for n_steps in [3, 12, 31] {
        let mut child = cadre(&["train", arg(&killed)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for_steps(&bench.path("killed"), n_steps);
        // On Unix this is SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
    }
    stdout(&["train", arg(&killed)]);
    let expected = losses(&bench.path("whole"));
    assert_eq!(expected.len(), 60);
    assert_eq!(losses(&bench.path("killed")), expected);
    let weights = |run: &str| fs::read(bench.path(run).join("model/model.safetensors")).unwrap();
    assert_eq!(weights("killed"), weights("whole"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_exits_with_130() {
    let bench = Bench::new();
    let recipe = bench.recipe("run", 100_000);
    let child = cadre(&["train", arg(&recipe)])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_steps(&bench.path("run"), 2);
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{errors}");
    assert!(
        errors.contains("the same command goes on from there"),
        "{errors}"
    );
    let n_snapshots = fs::read_dir(bench.path("run/snapshots")).unwrap().count();
    assert!(n_snapshots >= 1);
}

#[test]
fn the_result_is_a_checkpoint_that_every_command_takes() {
    let bench = Bench::new();
    let recipe = bench.recipe("run", 10);
    let report = json(&["train", arg(&recipe), "-o", "json"]);
    assert!(report["eval"]["cats"]["perplexity"].as_f64().unwrap() < 300.0);
    let model = bench.path("run/model");
    let data = bench.path("cats.jsonl");
    let measured = json(&[
        "eval",
        "perplexity",
        "-m",
        arg(&model),
        "--data",
        arg(&data),
        "-o",
        "json",
    ]);
    assert!(measured["domains"]["cats"]["perplexity"].as_f64().unwrap() < 300.0);
    stdout(&["run", "-m", arg(&model), "-p", "the cats", "-n", "4"]);
    let curves = bench.path("curves.svg");
    stdout(&["train", arg(&recipe), "--plot", arg(&curves)]);
    assert!(fs::read_to_string(&curves).unwrap().contains("<svg"));
}

#[test]
fn runs_are_compared_on_a_page_and_as_numbers() {
    let bench = Bench::new();
    let (first, second) = (bench.recipe("first", 9), bench.recipe("second", 6));
    stdout(&["train", arg(&first)]);
    let set = "losses.balance=0.5";
    stdout(&["train", arg(&second), "--set", set]);
    let page = bench.path("page.html");
    let second = bench.path("second");
    let table = stdout(&[
        "train",
        "compare",
        arg(&first),
        arg(&second),
        "--html",
        arg(&page),
    ]);
    for text in ["first", "second", "held out", "MaxVio", "cats"] {
        assert!(table.contains(text), "{text}: {table}");
    }
    let page = fs::read_to_string(&page).unwrap();
    for text in [
        "<h1>2 runs</h1>",
        ">second</button>",
        "Dead experts",
        "<path class=\"s1\"",
    ] {
        assert!(page.contains(text), "{text}");
    }
    let numbers = json(&["train", "compare", arg(&first), arg(&second), "-o", "json"]);
    assert_eq!(numbers["runs"][0]["steps"], 9);
    assert_eq!(
        numbers["runs"][1]["curves"]["dead"]
            .as_array()
            .unwrap()
            .len(),
        6
    );
    let (code, error) = failure(&["train", "compare", arg(&bench.path("nowhere"))]);
    assert_eq!(code, 1);
    assert!(error.contains("nowhere"), "{error}");
    assert_eq!(output(&["train", "compare"]).status.code(), Some(2));
}

#[cfg(unix)]
#[test]
fn a_file_that_cannot_grow_stops_the_run_and_the_snapshot_before_it_is_taken_up() {
    let bench = Bench::new();
    let whole = bench.recipe("whole", 20);
    stdout(&["train", arg(&whole)]);
    let recipe = bench.recipe("full", 20);
    let child = cadre(&["train", arg(&recipe)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut child = child.unwrap();
    wait_for_steps(&bench.path("full"), 8);
    child.kill().unwrap();
    child.wait().unwrap();
    // Files may have 40 blocks of 512 bytes: log lines fit, a snapshot does not, as on a full disk.
    let script = "trap '' XFSZ; ulimit -f 40; exec \"$0\" \"$@\"";
    let output = Command::new("sh")
        .args([
            "-c",
            script,
            env!("CARGO_BIN_EXE_cadre"),
            "train",
            arg(&recipe),
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("step-00000014") && errors.contains("state.safetensors"),
        "{errors}"
    );
    let names: Vec<_> = fs::read_dir(bench.path("full/snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["step-00000007"]);
    stdout(&["train", arg(&recipe)]);
    assert_eq!(losses(&bench.path("full")), losses(&bench.path("whole")));
}

#[test]
fn speed_is_reported_without_writing_anything() {
    let bench = Bench::new();
    let recipe = bench.recipe("run", 10);
    let report = json(&[
        "train",
        "--bench",
        arg(&recipe),
        "--steps",
        "3",
        "-o",
        "json",
    ]);
    assert_eq!(report["samples"].as_array().unwrap().len(), 3);
    assert!(report["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(!bench.path("run").exists());
}

#[test]
fn speed_is_measured_on_the_tokens_of_a_file() {
    let bench = Bench::new();
    let recipe = bench.recipe("run", 10);
    let file = bench.path("tokens.u32");
    // Two steps of 2 rows of 32 + 1 ids.
    let ids = |id: u32| -> Vec<u8> { (0..2 * 2 * 33).flat_map(|_| id.to_le_bytes()).collect() };
    let args = |steps| {
        let fixed = ["train", "--bench", arg(&recipe), "-o", "json", "--tokens"];
        [&fixed[..], &[arg(&file), "--steps", steps]].concat()
    };
    fs::write(&file, ids(7)).unwrap();
    let report = json(&args("2"));
    let losses = report["losses"].as_array().unwrap().iter();
    let losses: Vec<f64> = losses.filter_map(serde_json::Value::as_f64).collect();
    // One id again and again is learnt at once; random ids are not.
    assert!(
        losses.len() == 2 && losses[1] < losses[0] - 0.05,
        "{losses:?}"
    );
    let (code, error) = failure(&args("3"));
    assert_eq!(code, 1);
    assert!(
        error.contains("tokens.u32: 528 bytes, expected 792"),
        "{error}"
    );
    fs::write(&file, ids(300)).unwrap();
    let (_, error) = failure(&args("2"));
    assert!(
        error.contains("id 300 in row 0") && error.contains("vocab_size"),
        "{error}"
    );
}

#[test]
fn bad_recipes_are_named() {
    let bench = Bench::new();
    let recipe = bench.recipe("run", 10);
    let recipe = arg(&recipe);
    let cases = [
        (vec!["train", "absent.toml"], "absent.toml"),
        (
            vec!["train", recipe, "--set", "train.learning_rate=1"],
            "learning_rate",
        ),
        (vec!["train", recipe, "--set", "train.steps=-1"], "steps"),
        (vec!["train", recipe, "--set", "model.top_k=9"], "9"),
        (vec!["train", recipe, "--set", "nonsense"], "key=value"),
        (vec!["train", recipe, "--plot", "x.svg"], "log.jsonl"),
    ];
    for (args, named) in cases {
        let (code, error) = failure(&args);
        assert_eq!(code, 1, "{error}");
        assert!(error.contains(named), "{args:?}: {error}");
    }
    assert!(!bench.path("run").exists(), "nothing was begun");
    assert_eq!(output(&["train"]).status.code(), Some(2));
}

#[test]
fn a_pruned_model_recovers() {
    let bench = Bench::new();
    let recipe = bench.recipe("whole", 40);
    stdout(&["train", arg(&recipe)]);
    let (whole, data) = (bench.path("whole/model"), bench.path("cats.jsonl"));
    let (trace, plan, half) = (
        bench.path("t.parquet"),
        bench.path("plan.json"),
        bench.path("half"),
    );
    stdout(&[
        "trace",
        "-m",
        arg(&whole),
        "--data",
        arg(&data),
        "-o",
        arg(&trace),
    ]);
    let args = [
        "plan",
        "prune",
        "--trace",
        arg(&trace),
        "--keep",
        "0.5",
        "--method",
        "random",
    ];
    stdout(&[&args[..], &["-o", arg(&plan)]].concat());
    stdout(&[
        "apply",
        "-m",
        arg(&whole),
        "--plan",
        arg(&plan),
        "-o",
        arg(&half),
    ]);
    let run = bench.path("tuned");
    let mut tune = vec![
        "tune",
        "--recover",
        "-m",
        arg(&half),
        "--teacher",
        arg(&whole),
    ];
    tune.extend([
        "--data",
        arg(&data),
        "--heldout",
        arg(&data),
        "-o",
        arg(&run),
    ]);
    tune.extend([
        "--steps",
        "20",
        "--batch-size",
        "2",
        "--seq-len",
        "32",
        "--lr",
        "1e-3",
    ]);
    let said = json(&[&tune[..], &["--format", "json"]].concat());
    let nll = |when: &str| said[when]["cats"]["nll"].as_f64().unwrap();
    assert!(nll("after") < nll("before"), "{said}");
    stdout(&["run", "-m", arg(&run.join("model")), "-p", "the", "-n", "4"]);
    // It is done: the same command tells the same again.
    let text = stdout(&tune);
    assert!(
        text.contains("nll before") && text.contains(&format!("{:.4}", nll("before"))),
        "{text}"
    );
    // Other options are another run, which may take the place of this one.
    let other = [&tune[..], &["--seed", "1"]].concat();
    let (_, errors) = failure(&other);
    assert!(
        errors.contains("seed: 0 in the run, 1 in the recipe") && errors.contains("--fresh"),
        "{errors}"
    );
    stdout(&[&other[..], &["--fresh"]].concat());
    let (code, errors) = failure(&[&tune[..], &["--heldout", arg(&data)]].concat());
    assert!(
        code == 2 && errors.contains("every text needs both"),
        "{errors}"
    );
    let (code, _) = failure(&[
        "tune",
        "-m",
        arg(&half),
        "--data",
        "x",
        "--heldout",
        "x",
        "-o",
        "y",
    ]);
    assert_eq!(code, 2, "--recover says what is meant");
}

/// The German text of the sample, in two files: to learn from, and to judge by.
fn german(bench: &Bench) -> [PathBuf; 2] {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = fs::read_to_string(root.join("recipes/data/sample.jsonl")).unwrap();
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let texts: Vec<String> = lines
        .filter(|one| one["domain"] == "german")
        .map(|one| one["text"].as_str().unwrap().to_owned())
        .collect();
    let all: Vec<char> = texts.join("\n").chars().collect();
    let (train, judge) = all.split_at(all.len() / 2);
    [("train", train), ("judge", judge)].map(|(name, chars)| {
        let path = bench.path(&format!("{name}.jsonl"));
        let text: String = chars.iter().collect();
        let line = serde_json::json!({"domain": "german", "text": text});
        fs::write(&path, format!("{line}\n")).unwrap();
        path
    })
}

/// MC-SMoE whole, on the embedded model: half of the experts merged, their matrices in factors, and these tuned as such.
#[test]
fn the_embedded_model_in_factors_recovers() {
    let bench = Bench::new();
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    let [text, judge] = german(&bench);
    let (trace, plan) = (bench.path("t.parquet"), bench.path("plan.json"));
    let (thin, folded) = (bench.path("thin"), bench.path("folded"));
    let (nano, text, judge) = (arg(&nano), arg(&text), arg(&judge));
    let (trace, plan) = (arg(&trace), arg(&plan));
    stdout(&["trace", "-m", nano, "--data", text, "-o", trace, "--logits"]);
    let factor = ["plan", "factor", "--trace", trace, "-o", plan];
    stdout(
        &[
            &factor[..],
            &["--keep", "0.5", "--rank", "16", "--rest", "0.1"],
        ]
        .concat(),
    );
    let apply = ["apply", "-m", nano, "--plan", plan, "-o"];
    stdout(&[&apply[..], &[arg(&thin)]].concat());
    stdout(&[&apply[..], &[arg(&folded), "--compat"]].concat());
    let tune = |model: &Path, run: &str, steps: &str, more: &[&str]| {
        let run = bench.path(run);
        let of = ["tune", "--recover", "-m", arg(model), "--teacher", nano];
        let on = ["--data", text, "--heldout", judge, "-o", arg(&run)];
        let how = ["--batch-size", "2", "--seq-len", "128", "--lr", "1e-3"];
        let form = ["--steps", steps, "--format", "json"];
        json(&[&of[..], &on, &how, &form, more].concat())
    };
    let nll = |said: &serde_json::Value, when: &str| said[when]["train"]["nll"].as_f64().unwrap();
    let (whole, tuned) = (tune(&folded, "a", "1", &[]), tune(&thin, "b", "12", &[]));
    let before = [&whole, &tuned].map(|said| nll(said, "before"));
    assert!((before[0] - before[1]).abs() < 0.02, "{before:?}");
    assert!(nll(&tuned, "after") < before[1] - 0.05, "{tuned}");
    // It is as small as it was, and runs.
    let model = bench.path("b/model");
    let size = |folder: &Path| {
        fs::metadata(folder.join("model.safetensors"))
            .unwrap()
            .len()
    };
    assert!(size(&model).abs_diff(size(&thin)) < 4096);
    let eval = ["eval", "perplexity", "-m", arg(&model), "--data", judge];
    let said = json(&[&eval[..], &["-c", "128", "-o", "json"]].concat());
    let found = said["nll"].as_f64().unwrap();
    assert!(
        (found - nll(&tuned, "after")).abs() < 0.1,
        "{found} {tuned}"
    );

    // With all rows it is the merged model at first, and gives up nine tenths of them while it is tuned, by the published loss.
    let full = bench.path("full");
    stdout(
        &[
            &factor[..],
            &["--keep", "0.5", "--rank", "16", "--rest", "1"],
        ]
        .concat(),
    );
    stdout(&[&apply[..], &[arg(&full)]].concat());
    let published = ["--beta", "0.05", "--temperature", "2", "--freeze", "router"];
    let pruned = tune(
        &full,
        "c",
        "12",
        &[&published[..], &["--rest", "0.1"]].concat(),
    );
    assert!(nll(&pruned, "before") < before[1] - 0.5, "{pruned}");
    assert!(nll(&pruned, "after") < before[1], "{pruned}");
    let model = bench.path("c/model");
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let rows = &config["cadre_factors"]["rows"];
    let counts = |matrix: usize| -> Vec<u64> {
        let layers = rows.as_array().unwrap().iter();
        let experts = layers.flat_map(|layer| layer.as_array().unwrap());
        experts
            .map(|expert| expert[matrix].as_u64().unwrap())
            .collect()
    };
    let all = [0, 1, 2].map(counts);
    assert_eq!(all[0].len(), 6 * 8);
    // A tenth of three matrices of 96 x 192 values for each expert, within a row.
    let held: u64 = (0..48)
        .map(|at| 192 * (all[0][at] + all[1][at]) + 96 * all[2][at])
        .sum();
    let (least, most) = ((48 * 3 * 96 * 192) / 10 - 192, (48 * 3 * 96 * 192) / 10);
    assert!((least..=most).contains(&held), "{held} of {most}");
    assert!(size(&model).abs_diff(size(&thin)) < 40_000);
    // The engine computes what was trained, from memory and from disk.
    let eval = ["eval", "perplexity", "-m", arg(&model), "--data", judge];
    let said = json(&[&eval[..], &["-c", "128", "-o", "json"]].concat());
    let found = said["nll"].as_f64().unwrap();
    assert!(
        (found - nll(&pruned, "after")).abs() < 0.1,
        "{found} {pruned}"
    );
    let own = logits(&model, &[]);
    assert_eq!(own, logits(&model, &["--mem-budget", "4MiB"]));
}
