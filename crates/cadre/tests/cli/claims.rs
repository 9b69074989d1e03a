//! Every recipe of `recipes/claims` and `recipes/read-me`: a few steps on a little text, resumed to the same bits, and a
//! model that runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::common::{arg, stdout};

const DOMAINS: [&str; 4] = ["north", "east", "south", "west"];
/// Long enough for warm-up, both phases of those recipes that have phases, and a snapshot before the end.
const STEPS: usize = 4;
/// Recipes whose routers no checkpoint can name.
const NOT_WRITTEN: [&str; 2] = ["expert-choice", "rmoe-no-passing"];
/// The recipe that reads another one's model, and that one.
const STUDENT: (&str, &str) = ("mos", "mos-teacher");

/// Text of a domain in the form of `recipes/data/synthetic`: lines of a capital and seven letters.
fn document(domain: usize, seed: usize) -> String {
    let line = |i: usize| {
        let capital = [b'N', b'E', b'S', b'W'].map(char::from)[domain];
        let letter = |at: usize| char::from(b'a' + ((i * i + at * (domain + 3) + seed) % 26) as u8);
        let letters: String = (0..7).map(letter).collect();
        format!("{capital}{letters}")
    };
    (0..40).map(line).collect()
}

/// A folder with text.
struct Bed {
    folder: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (index, domain) in DOMAINS.iter().enumerate() {
            let line = |seed| format!("{{\"text\": \"{}\"}}\n", document(index, seed));
            let lines: String = (0..6).map(line).collect();
            fs::write(folder.path().join(format!("{domain}.jsonl")), lines).unwrap();
            // Little, because all of it is scored at the end of every run.
            fs::write(
                folder.path().join(format!("{domain}.heldout.jsonl")),
                line(6),
            )
            .unwrap();
        }
        Self { folder }
    }

    fn run_folder(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Arguments that train the recipe called `name` for `steps` steps of a few tokens.
    fn train(&self, name: &str, steps: usize) -> Vec<String> {
        self.train_with("claims", name, steps, &[])
    }

    /// As [`Bed::train`], with a recipe of another folder, and more that is set.
    fn train_with(&self, folder: &str, name: &str, steps: usize, more: &[String]) -> Vec<String> {
        let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
        let recipe = recipes.join(folder).join(format!("{name}.toml"));
        let sources = DOMAINS.map(|domain| {
            let train = self.folder.path().join(format!("{domain}.jsonl"));
            let heldout = self.folder.path().join(format!("{domain}.heldout.jsonl"));
            format!("{{domain={domain:?},train={train:?},heldout={heldout:?}}}")
        });
        let mut set = vec![
            format!("data.sources=[{}]", sources.join(",")),
            format!("train.steps={steps}"),
            "train.warmup_steps=2".to_owned(),
            "train.batch_size=2".to_owned(),
            format!("output.dir={:?}", self.run_folder(name)),
            "output.snapshot_every=2".to_owned(),
            "output.eval_every=0".to_owned(),
        ];
        let text = fs::read_to_string(&recipe).unwrap();
        if text.contains("accumulate") {
            set.push("train.accumulate=2".to_owned());
        }
        if text.contains("[evolve]") {
            set.push("evolve.dense_steps=2".to_owned());
        }
        if name == STUDENT.0 {
            let teacher = self.run_folder(STUDENT.1).join("model");
            set.push(format!("distill.teacher={teacher:?}"));
            set.push("distill.until_step=3".to_owned());
        }
        set.extend_from_slice(more);
        let mut args = vec!["train".to_owned(), recipe.to_str().unwrap().to_owned()];
        args.extend(set.into_iter().flat_map(|one| ["--set".to_owned(), one]));
        args
    }

    /// Loss by step, as it was written.
    fn losses(&self, name: &str) -> Vec<f64> {
        let log = fs::read_to_string(self.run_folder(name).join("log.jsonl")).unwrap();
        log.lines()
            .filter_map(|line| {
                serde_json::from_str::<serde_json::Value>(line).ok()?["loss"].as_f64()
            })
            .collect()
    }
}

/// Trains to the end. What no engine could run is trained and scored, but not written.
fn run(args: &[String], written: bool) {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let said = stdout(&args);
    assert_eq!(said.contains("cannot be written"), !written, "{said}");
}

/// Names of all recipes, teachers before students.
fn names() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/claims");
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort_by_key(|name| (name == STUDENT.0, name.clone()));
    names
}

#[test]
fn every_recipe_of_the_claims_trains_resumes_exactly_and_runs() {
    let bed = Bed::new();
    let names = names();
    assert!(names.len() >= 25, "{names:?}");
    for name in names {
        let start = Instant::now();
        let train = bed.train(&name, STEPS);
        let written = !NOT_WRITTEN.contains(&&*name);
        run(&train, written);
        let losses = bed.losses(&name);
        assert_eq!(losses.len(), STEPS, "{name}");
        assert!(
            losses.iter().all(|loss| loss.is_finite()),
            "{name}: {losses:?}"
        );
        let folder = bed.run_folder(&name);
        let model = folder.join("model");
        let weights = fs::read(model.join("model.safetensors")).ok();
        assert_eq!(weights.is_some(), written, "{name}");

        // As if it had been killed after the snapshot before the last.
        fs::remove_dir_all(folder.join(format!("snapshots/step-{STEPS:08}"))).unwrap();
        let _ = fs::remove_dir_all(&model);
        run(&train, written);
        assert_eq!(bed.losses(&name), losses, "{name}");
        let again = fs::read(model.join("model.safetensors")).ok();
        assert!(again == weights, "{name}: the resumed run ends elsewhere");
        if written {
            let prompt = ["-p", "Nbc", "-n", "3", "--temp", "0"];
            stdout(&[&["run", "-m", arg(&model)], &prompt[..]].concat());
        }
        println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
    }
}

/// Read-ME whole: a dense model, its neurons as experts with a router before the layers, and these tuned; then a mixture
/// that has such a router from the start. What is trained streams with every pick known.
#[test]
fn read_me_trains_resumes_exactly_and_streams() {
    let bed = Bed::new();
    let model = |name: &str| bed.run_folder(name).join("model");
    let dense = model("dense");
    let of_router = [
        format!("cut.dense={dense:?}"),
        "cut.tokens=128".to_owned(),
        format!("router_distill.teacher={dense:?}"),
    ];
    let of_experts = [format!("start.from={:?}", model("router"))];
    let runs: [(&str, &[String]); 4] = [
        ("dense", &[]),
        ("router", &of_router),
        ("experts", &of_experts),
        ("scratch", &[]),
    ];
    for (name, more) in runs {
        let train = bed.train_with("read-me", name, STEPS, more);
        run(&train, true);
        let losses = bed.losses(name);
        assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
        let weights = fs::read(model(name).join("model.safetensors")).unwrap();
        let last = bed
            .run_folder(name)
            .join(format!("snapshots/step-{STEPS:08}"));
        fs::remove_dir_all(last).unwrap();
        fs::remove_dir_all(model(name)).unwrap();
        run(&train, true);
        assert_eq!(bed.losses(name), losses, "{name}");
        let again = fs::read(model(name).join("model.safetensors")).unwrap();
        assert!(again == weights, "{name}: the resumed run ends elsewhere");
        let folder = model(name);
        let generate = [
            "run",
            "-m",
            arg(&folder),
            "-p",
            "Nbc",
            "-n",
            "6",
            "--temp",
            "0",
        ];
        let resident = stdout(&generate);
        if name != "dense" {
            let budget = ["--mem-budget", "4MiB", "--read-ahead", "exact"];
            assert_eq!(stdout(&[&generate[..], &budget].concat()), resident);
        }
    }
}
