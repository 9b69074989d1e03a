//! Models by hub name: downloading, resuming, the cache, working offline, and what can go wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cadre_testkit::TinyFolder;
use tempfile::TempDir;

use crate::common::{arg, cadre, json, tiny};
use crate::hub_server::{COMMIT, Hub, MODEL, etag, sha256};

/// A hub with one model, and a cache that is empty at first.
struct World {
    hub: Hub,
    home: TempDir,
}

impl World {
    fn new(hub: Hub) -> Self {
        Self {
            hub,
            home: tempfile::tempdir().unwrap(),
        }
    }

    /// A hub with a tiny checkpoint, and things beside it that nobody needs.
    fn tiny() -> (Self, TinyFolder) {
        let folder = tiny();
        let world = Self::new(Hub::serve_folder(folder.path()));
        let extra = ["pytorch_model.bin", "picture.png", "README.md"];
        for name in extra {
            world
                .hub
                .state()
                .files
                .insert(name.to_owned(), vec![1; 9000]);
        }
        (world, folder)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = cadre(args);
        command
            .env("HF_HOME", self.home.path())
            .env("HF_ENDPOINT", self.hub.endpoint())
            .env("NO_PROXY", "*")
            .env_remove("HF_HUB_OFFLINE")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HUGGINGFACE_HUB_CACHE")
            .env_remove("HF_TOKEN")
            .env_remove("HF_TOKEN_PATH")
            .stdin(Stdio::null());
        command
    }

    fn ok(&self, args: &[&str]) -> String {
        succeeded(args, self.command(args).output().unwrap())
    }

    /// Standard error of a run that must fail with exit code 1.
    fn refused(&self, args: &[&str], words: &[&str]) {
        failed(self.command(args).output().unwrap(), words);
    }

    fn repo(&self) -> PathBuf {
        self.home.path().join("hub/models--org--tiny")
    }

    fn snapshot(&self) -> PathBuf {
        self.repo().join("snapshots").join(COMMIT)
    }

    fn weights(&self) -> Vec<u8> {
        self.hub.state().files["model.safetensors"].clone()
    }

    /// What is in the cache of the weights, while they are not complete.
    fn partial(&self) -> PathBuf {
        let name = format!("{}.incomplete", sha256(&self.weights()));
        self.repo().join("blobs").join(name)
    }
}

#[track_caller]
fn succeeded(args: &[&str], output: Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn failed(output: Output, words: &[&str]) {
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    for word in words {
        assert!(errors.contains(word), "{word:?} is not in {errors}");
    }
}

const LOGITS: [&str; 7] = ["logits", "-m", MODEL, "--tokens", "1,2,3", "-o", "json"];

#[test]
fn a_model_is_downloaded_once_and_runs() {
    let (world, folder) = World::tiny();
    let expected = json(&[
        "logits",
        "-m",
        arg(folder.path()),
        "--tokens",
        "1,2,3",
        "-o",
        "json",
    ]);
    let found: serde_json::Value = serde_json::from_str(&world.ok(&LOGITS)).unwrap();
    assert_eq!(found, expected);

    let commit = fs::read_to_string(world.repo().join("refs/main")).unwrap();
    assert_eq!(commit, COMMIT);
    let weights = world.snapshot().join("model.safetensors");
    assert_eq!(fs::read(&weights).unwrap(), world.weights());
    let blob = world.repo().join("blobs").join(etag(&world.weights()));
    assert_eq!(
        weights.canonicalize().unwrap(),
        blob.canonicalize().unwrap()
    );
    #[cfg(unix)]
    assert!(fs::read_link(&weights).unwrap().starts_with("../../blobs"));
    assert!(!world.snapshot().join("pytorch_model.bin").exists());
    assert!(!world.snapshot().join("picture.png").exists());
    let blobs = fs::read_dir(world.repo().join("blobs")).unwrap();
    let names = blobs.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(
        names.into_iter().all(|name| !name.contains('.')),
        "nothing incomplete"
    );

    world.hub.take_requests();
    world.ok(&LOGITS);
    let again = world.hub.take_requests();
    assert_eq!(again.len(), 1, "only the listing: {again:?}");
    assert!(again[0].path.starts_with("/api/"));
}

#[test]
fn pull_prints_only_the_path() {
    let (world, _folder) = World::tiny();
    let output = world.command(&["pull", MODEL]).output().unwrap();
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    let path = succeeded(&["pull"], output);
    assert_eq!(path, format!("{}\n", world.snapshot().display()));
    assert!(errors.contains("downloading org/tiny"), "{errors}");
    // A commit that is complete needs no hub.
    world.hub.take_requests();
    assert_eq!(world.ok(&["pull", &format!("{MODEL}@{COMMIT}")]), path);
    assert!(world.hub.take_requests().is_empty());
    let usage = world.command(&["pull", "nonsense"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn the_cache_may_be_elsewhere_and_weights_in_parts() {
    let folder = tiny();
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let world = World::new(Hub::serve_folder(folder.path()));
    {
        let mut state = world.hub.state();
        state.files.remove("model.safetensors");
        let part = "model-00001-of-00001.safetensors";
        state.files.insert(part.to_owned(), bytes);
        let map: serde_json::Map<String, serde_json::Value> = folder
            .open()
            .unwrap()
            .tensor_names()
            .map(|name| (name.to_owned(), part.into()))
            .collect();
        let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
        state.files.insert(
            "model.safetensors.index.json".to_owned(),
            index.into_bytes(),
        );
        // And a hub that answers listings with names alone.
        state.names_only = true;
    }
    let cache = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let mut command = world.command(&LOGITS);
        command.env(name, cache.path()).output().unwrap()
    };
    succeeded(&LOGITS, run("HUGGINGFACE_HUB_CACHE"));
    assert!(cache.path().join("models--org--tiny/refs/main").is_file());
    assert!(!world.repo().exists());
    assert!(
        world
            .hub
            .take_requests()
            .iter()
            .any(|request| request.method == "HEAD")
    );
    succeeded(&LOGITS, run("HF_HUB_CACHE"));
    assert_eq!(
        world
            .hub
            .take_requests()
            .iter()
            .filter(|one| one.method == "GET")
            .count(),
        1
    );
    // A part that the index names and the hub lacks.
    let mut state = world.hub.state();
    state.files.remove("model-00001-of-00001.safetensors");
    drop(state);
    world.refused(
        &LOGITS,
        &["model-00001-of-00001.safetensors", "no such file"],
    );
}

#[test]
fn a_cut_connection_is_resumed() {
    let (world, _folder) = World::tiny();
    world.hub.state().cut_after = Some(5000);
    world.ok(&LOGITS);
    let requests = world.hub.take_requests();
    let ranges: Vec<&str> = requests
        .iter()
        .filter_map(|one| one.range.as_deref())
        .collect();
    assert!(!ranges.is_empty());
    assert!(
        ranges.iter().all(|range| *range == "bytes=5000-"),
        "{ranges:?}"
    );
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_what_is_there_for_the_next_time() {
    let (world, _folder) = World::tiny();
    world.hub.state().stall_after = Some(6000);
    let child = world
        .command(&["pull", MODEL])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let size = || fs::metadata(world.partial()).map_or(0, |file| file.len());
    let start = Instant::now();
    while size() < 6000 {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "the download begins"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(!world.snapshot().join("model.safetensors").exists());
    world.hub.take_requests();
    world.ok(&LOGITS);
    let requests = world.hub.take_requests();
    let resumed = requests.iter().find(|one| one.range.is_some()).unwrap();
    assert_eq!(resumed.range.as_deref(), Some("bytes=6000-"));
    assert!(
        !requests.iter().any(|one| one.path.ends_with("config.json")),
        "{requests:?}"
    );
}

#[test]
fn a_server_that_does_not_resume_sends_all_again() {
    let (world, _folder) = World::tiny();
    world.hub.state().no_ranges = true;
    world.hub.state().cut_after = Some(5000);
    world.ok(&LOGITS);
}

#[test]
fn damaged_content_is_not_taken() {
    let (world, _folder) = World::tiny();
    world.hub.state().damage = true;
    world.refused(
        &LOGITS,
        &["model.safetensors", "damaged", "SHA-256", "hint: "],
    );
    assert!(!world.snapshot().join("model.safetensors").exists());
    assert!(!world.repo().join("refs/main").exists());
    // A beginning that is wrong is noticed, and replaced.
    world.hub.state().damage = false;
    fs::write(world.partial(), vec![7; 5000]).unwrap();
    world.ok(&LOGITS);
    assert_eq!(
        fs::read(world.snapshot().join("model.safetensors")).unwrap(),
        world.weights()
    );
    assert!(!world.partial().exists());
}

#[test]
fn offline_uses_the_cache_alone() {
    let (world, _folder) = World::tiny();
    let offline: Vec<&str> = LOGITS.iter().copied().chain(["--offline"]).collect();
    let words = [
        MODEL,
        "not in the hub cache",
        "models--org--tiny",
        "offline",
        "cadre pull",
    ];
    world.refused(&offline, &words);
    let online = world.ok(&LOGITS);
    world.hub.take_requests();
    assert_eq!(world.ok(&offline), online);
    let by_variable = world
        .command(&LOGITS)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert_eq!(succeeded(&LOGITS, by_variable), online);
    assert!(world.hub.take_requests().is_empty());
    // A hub that is out of reach is said, and does not matter.
    for (name, value) in [("HF_ENDPOINT", "http://127.0.0.1:1"), ("X", "")] {
        world.hub.state().broken = Some(503);
        let output = world.command(&LOGITS).env(name, value).output().unwrap();
        let errors = String::from_utf8(output.stderr.clone()).unwrap();
        assert_eq!(succeeded(&LOGITS, output), online);
        assert!(errors.contains("using the copy"), "{errors}");
    }
    fs::remove_file(world.snapshot().join("model.safetensors")).unwrap();
    world.refused(&offline, &["not complete", "model.safetensors"]);
}

#[test]
fn a_hub_out_of_reach_is_one_clear_error() {
    let (world, _folder) = World::tiny();
    let mut command = world.command(&LOGITS);
    let output = command
        .env("HF_ENDPOINT", "http://127.0.0.1:1")
        .output()
        .unwrap();
    failed(
        output,
        &["cannot reach http://127.0.0.1:1", "hint: ", "--offline"],
    );
    world.hub.state().broken = Some(503);
    world.refused(&LOGITS, &["503", "hint: "]);
}

#[test]
fn gated_private_and_missing_models_say_what_to_do() {
    let (world, _folder) = World::tiny();
    world.hub.state().gate = Some("secret".to_owned());
    world.refused(&LOGITS, &["gated", "HF_TOKEN", "(none is set)"]);
    let output = world
        .command(&LOGITS)
        .env("HF_TOKEN", "wrong")
        .output()
        .unwrap();
    failed(output, &["gated", "the present token has no access"]);
    world.hub.take_requests();
    fs::write(world.home.path().join("token"), "secret\n").unwrap();
    world.ok(&LOGITS);
    let requests = world.hub.take_requests();
    let (storage, hub): (Vec<_>, Vec<_>) = requests
        .iter()
        .partition(|one| one.path.starts_with("/cdn/"));
    assert!(hub.iter().all(|one| one.token.as_deref() == Some("secret")));
    assert!(!storage.is_empty() && storage.iter().all(|one| one.token.is_none()));

    let missing = ["logits", "-m", "org/other", "--tokens", "1"];
    world.refused(
        &missing,
        &[
            "org/other",
            "404",
            "no such model",
            "spelling",
            "no path here",
        ],
    );
    let revision = ["logits", "-m", "org/tiny@v9", "--tokens", "1"];
    world.refused(&revision, &["no revision `v9`"]);
}

#[test]
fn quants_choose_a_gguf_file() {
    let content = |byte: u8| vec![byte; 40_000];
    let (a, b, c, d) = (content(1), content(2), content(3), content(4));
    let world = World::new(Hub::serve(&[
        ("config.json", b"{}"),
        ("tiny-Q4_K_M.gguf", &a),
        ("tiny-Q8_0.gguf", &b),
        ("F16/tiny-F16-00001-of-00002.gguf", &c),
        ("F16/tiny-F16-00002-of-00002.gguf", &d),
        ("mmproj-Q8_0.gguf", &a),
    ]));
    let pull = |model: &str| PathBuf::from(world.ok(&["pull", model]).trim_end());
    let q8 = pull("org/tiny:q8_0");
    assert_eq!(q8, world.snapshot().join("tiny-Q8_0.gguf"));
    assert_eq!(fs::read(q8).unwrap(), b);
    assert!(!world.snapshot().join("tiny-Q4_K_M.gguf").exists());
    let f16 = pull("org/tiny:F16");
    assert_eq!(
        f16,
        world.snapshot().join("F16/tiny-F16-00001-of-00002.gguf")
    );
    assert_eq!(
        fs::read(f16.with_file_name("tiny-F16-00002-of-00002.gguf")).unwrap(),
        d
    );
    let output = world.command(&["pull", MODEL]).output().unwrap();
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(errors.contains("taking tiny-Q4_K_M.gguf"), "{errors}");
    assert!(succeeded(&["pull"], output).ends_with("tiny-Q4_K_M.gguf\n"));
    world.refused(
        &["pull", "org/tiny:Q5_K_M"],
        &["`Q5_K_M`", "tiny-Q4_K_M", "tiny-Q8_0", "F16/tiny-F16"],
    );
    // Offline the same names find the same files.
    let offline = |model: &str| PathBuf::from(world.ok(&["pull", model, "--offline"]).trim_end());
    assert_eq!(offline("org/tiny:f16"), f16);
    world.refused(
        &["pull", "org/tiny:Q5_K_M", "--offline"],
        &["`Q5_K_M`", "not complete"],
    );
}

/// `inspect` and `fit` of a model that is not in the cache, compared with those of the files themselves.
fn headers_are_enough(world: &World, path: &str, name: &str) {
    let options = ["--mem-budget", "1GiB", "--bandwidth", "10GB/s"];
    let reports = |model: &str| {
        [("inspect", &[][..]), ("fit", &options)].map(|(command, more)| {
            let args = [&[command, "-m", model, "-o", "json"], more].concat();
            let mut report: serde_json::Value = serde_json::from_str(&world.ok(&args)).unwrap();
            let report_map = report.as_object_mut().unwrap();
            let origins = ["model", "origin"].map(|key| report_map.remove(key));
            assert!(
                origins.iter().flatten().any(|origin| origin == model),
                "{origins:?}"
            );
            report
        })
    };
    let expected = reports(path);
    world.hub.take_requests();
    assert_eq!(reports(name), expected);
    for request in world.hub.take_requests() {
        let is_weights = request.path.contains("safetensors") || request.path.contains(".gguf");
        let is_index = request.path.ends_with(".json");
        assert!(
            !is_weights || is_index || request.range.is_some(),
            "{request:?}"
        );
    }
}

#[test]
fn inspect_and_fit_read_headers_only() {
    let (world, folder) = World::tiny();
    headers_are_enough(&world, arg(folder.path()), MODEL);
    assert!(!world.snapshot().join("model.safetensors").exists());
    assert!(!world.partial().exists());
    // Ranges that are ignored are no obstacle.
    world.hub.state().no_ranges = true;
    world.ok(&["inspect", "-m", MODEL]);
    world.hub.state().no_ranges = false;
    world.refused(&["inspect", "-m", MODEL, "--offline"], &["not complete"]);
    // The weights come when they are needed, and are used from then on.
    world.ok(&["inspect", "-m", MODEL, "--digest"]);
    world.hub.take_requests();
    world.ok(&["inspect", "-m", MODEL]);
    assert_eq!(world.hub.take_requests().len(), 1);
}

#[test]
fn headers_of_gguf_files_are_read_with_the_factors_of_the_rope() {
    let llama3 = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/llama/llama3");
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("tiny.gguf");
    let args = ["convert", "-m", arg(&llama3), "-o", arg(&file)];
    succeeded(&args, cadre(&args).output().unwrap());
    let bytes = fs::read(&file).unwrap();
    let world = World::new(Hub::serve(&[("tiny.gguf", &bytes)]));
    headers_are_enough(&world, arg(&file), "org/tiny:tiny");
    assert!(!world.snapshot().join("tiny.gguf").exists());
    let damaged = [&bytes[..40], &[0xff; 40_000]].concat();
    let world = World::new(Hub::serve(&[("tiny.gguf", &damaged)]));
    world.refused(&["inspect", "-m", "org/tiny:tiny"], &["tiny.gguf"]);
}

#[test]
fn a_full_disk_is_noticed_before_the_download() {
    let (world, _folder) = World::tiny();
    world.hub.state().exaggerate = 1 << 60;
    world.refused(
        &LOGITS,
        &["needs 10", "TiB more", "are free", "HF_HUB_CACHE"],
    );
    let requests = world.hub.take_requests();
    assert!(!requests.iter().any(|one| one.path.starts_with("/cdn/")));
}

#[test]
fn a_path_wins_over_a_name() {
    let (world, folder) = World::tiny();
    let here = tempfile::tempdir().unwrap();
    fs::create_dir(here.path().join("org")).unwrap();
    copy(folder.path(), &here.path().join("org/tiny"));
    let output = world
        .command(&LOGITS)
        .current_dir(here.path())
        .output()
        .unwrap();
    succeeded(&LOGITS, output);
    assert!(world.hub.take_requests().is_empty());
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
