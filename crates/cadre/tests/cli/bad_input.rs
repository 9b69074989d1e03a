//! Bad input: one clear error that names the thing, the right exit code, and nothing left behind.

use std::fs;
use std::path::Path;

use crate::common::{arg, cadre, failure, output, tiny};
use cadre_checkpoint::TensorData;
use cadre_testkit::{TinyFolder, TinyMoe};

/// Fails with `code` and names every one of `words`.
#[track_caller]
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let (found, errors) = failure(args);
    assert_eq!(found, code, "{args:?}: {errors}");
    for word in words {
        assert!(
            errors.contains(word),
            "{args:?}: {word:?} is not in {errors}"
        );
    }
}

#[track_caller]
fn run_refused(model: &Path, words: &[&str]) {
    refused(&["run", "-m", arg(model), "-p", "the cat"], 1, words);
}

fn damaged(edit: impl FnOnce(&mut Vec<TensorData<'_>>)) -> TinyFolder {
    let folder = tiny();
    folder.edit_tensors(edit).unwrap();
    folder
}

fn entries(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap();
    names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn prompts() {
    let model = tiny();
    let path = arg(model.path());
    refused(
        &["run", "-m", path, "-p", ""],
        2,
        &["prompt is empty", "hint: "],
    );
    // Standard input is empty here.
    refused(&["run", "-m", path], 2, &["prompt is empty"]);
    refused(
        &["run", "-m", path, "-f", "/no/such/prompt"],
        1,
        &["/no/such/prompt"],
    );
    let long = "12345678 ".repeat(40);
    refused(
        &["run", "-m", path, "-p", &long],
        1,
        &["context holds 128", "shorten"],
    );
    refused(
        &["run", "-m", path, "-c", "8", "-p", "123456789"],
        1,
        &["holds 8", "-c 128"],
    );
    refused(
        &["run", "-m", path, "-c", "4096", "-p", "x"],
        1,
        &["4096", "1 to 128"],
    );
    refused(
        &["run", "-m", path, "-p", "x", "-f", "y"],
        2,
        &["cannot be used with"],
    );
}

#[test]
fn options() {
    let model = tiny();
    let path = arg(model.path());
    refused(
        &["run", "-m", path, "-p", "x", "--temp", "-1"],
        2,
        &["temp"],
    );
    refused(
        &["run", "-m", path, "-p", "x", "--top-p", "1.5"],
        2,
        &["top-p", "1.5"],
    );
    refused(
        &["run", "-m", path, "-p", "x", "--quant", "q9"],
        2,
        &["q9", "q8_0"],
    );
    refused(
        &["run", "-m", path, "-p", "x", "--experts", "--layer", "7"],
        2,
        &["layer 7"],
    );
    refused(&["logits", "-m", path, "--tokens", "1,two"], 2, &["`two`"]);
    refused(
        &["logits", "-m", path, "--tokens", "384"],
        1,
        &["token 384", "vocabulary of 384"],
    );
    refused(
        &["eval", "perplexity", "-m", path, "--data", "/no/data.jsonl"],
        1,
        &["/no/data.jsonl"],
    );
    refused(&["trace", "-m", path], 2, &["--data"]);
    refused(&["nonsense"], 2, &["nonsense"]);
    let dense = TinyMoe::default().mlp_only_layers(&[0, 1]).build().unwrap();
    refused(
        &["run", "-m", arg(dense.path()), "-p", "x", "--experts"],
        1,
        &["no layers with experts"],
    );
}

#[test]
fn paths_and_folders() {
    run_refused(Path::new("/no/such/model"), &["/no/such/model"]);
    run_refused(
        Path::new("someorg/somemodel"),
        &[
            "someorg/somemodel",
            "offline",
            "/no/such/cache",
            "hint: ",
            "cadre pull",
        ],
    );
    let empty = tempfile::tempdir().unwrap();
    run_refused(empty.path(), &["config.json", "pass the folder"]);
    let model = tiny();
    run_refused(
        &model.path().join("model.safetensors"),
        &["pass the folder"],
    );
    fs::remove_file(model.path().join("tokenizer.json")).unwrap();
    run_refused(model.path(), &["tokenizer.json"]);
    fs::write(model.path().join("config.json"), "{").unwrap();
    run_refused(model.path(), &["config.json", "not valid JSON"]);
}

#[test]
fn configurations() {
    let model = tiny();
    model
        .set_config(
            "rope_scaling",
            serde_json::json!({"type": "dynamic", "factor": 4}),
        )
        .unwrap();
    run_refused(model.path(), &["rope_scaling", "dynamic"]);
    let model = tiny();
    model
        .set_config("model_type", "switch_transformers".into())
        .unwrap();
    run_refused(model.path(), &["switch_transformers", "qwen3_moe"]);
    let model = tiny();
    model
        .set_config("hidden_size", serde_json::Value::Null)
        .unwrap();
    run_refused(model.path(), &["`hidden_size`", "missing"]);
}

#[test]
fn truncated_files() {
    let model = tiny();
    let path = model.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [3, 50, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        run_refused(
            model.path(),
            &["model.safetensors", "not a complete safetensors file"],
        );
    }
}

#[test]
fn tensors() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let model = damaged(|tensors| tensors.retain(|tensor| tensor.name != name));
    run_refused(model.path(), &[name, "missing"]);
    let model = damaged(|tensors| {
        let extra = TensorData {
            name: "model.extra.weight".into(),
            ..tensors[0].clone()
        };
        tensors.push(extra);
    });
    run_refused(model.path(), &["model.extra.weight", "unexpected"]);
    let model = damaged(|tensors| {
        let tensor = tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .unwrap();
        tensor.shape.reverse();
    });
    run_refused(model.path(), &[name, "[32, 16]", "[16, 32]"]);
    let model = damaged(|tensors| {
        let tensor = tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .unwrap();
        tensor.values.to_mut()[5] = f32::NAN;
    });
    run_refused(model.path(), &[name, "NaN"]);
    refused(
        &["run", "-m", arg(model.path()), "-p", "x", "--quant", "q8_0"],
        1,
        &[name, "NaN"],
    );
}

#[test]
fn data_files() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.jsonl");
    let model = tiny();
    let out = folder.path().join("out.parquet");
    for (text, words) in [
        (
            "{\"text\": \"a\"}\n{\"txet\": 1}\n",
            ["data.jsonl:2", "text"],
        ),
        ("", ["data.jsonl", "no text"]),
        ("{\"text\": \"a\"\n", ["data.jsonl:1", "EOF"]),
    ] {
        fs::write(&data, text).unwrap();
        let path = arg(model.path());
        refused(
            &["trace", "-m", path, "--data", arg(&data), "-o", arg(&out)],
            1,
            &words,
        );
        refused(
            &["eval", "perplexity", "-m", path, "--data", arg(&data)],
            1,
            &words,
        );
    }
    fs::write(&data, [0xff, 0xfe]).unwrap();
    refused(&["eval", "perplexity", "--data", arg(&data)], 1, &["UTF-8"]);
    assert_eq!(entries(folder.path()), ["data.jsonl"]);
}

#[cfg(feature = "train")]
#[test]
fn recipes() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("r.toml");
    refused(&["train", arg(&recipe)], 1, &["r.toml"]);
    fs::write(&recipe, "nonsense = 1\n").unwrap();
    refused(&["train", arg(&recipe)], 1, &["r.toml", "nonsense"]);
    refused(&["train"], 2, &["RECIPE"]);
    assert_eq!(entries(folder.path()), ["r.toml"]);
}

#[test]
fn traces() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.parquet");
    refused(&["trace", "show", arg(&file)], 1, &["x.parquet"]);
    fs::write(&file, "no parquet").unwrap();
    refused(
        &["trace", "show", arg(&file)],
        1,
        &["x.parquet", "not a readable Parquet"],
    );
    let data = folder.path().join("d.txt");
    fs::write(&data, "the cat").unwrap();
    let args = [
        "trace",
        "--data",
        arg(&data),
        "-o",
        "/no/such/folder/t.parquet",
    ];
    refused(&args, 1, &["/no/such/folder"]);
    refused(
        &["trace", "--data", arg(&data), "-o", arg(folder.path())],
        1,
        &["not a regular file"],
    );
    refused(
        &["trace", "replay", arg(&file)],
        1,
        &["x.parquet", "not a readable Parquet"],
    );
    for (budgets, word) in [("101%", "101%"), ("much", "much"), ("1GiB,", "no size")] {
        refused(
            &["trace", "replay", arg(&file), "--budgets", budgets],
            2,
            &[word],
        );
    }
    refused(
        &["trace", "replay", arg(&file), "--policies", "mru"],
        2,
        &["mru", "layer-partition"],
    );
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_one_error() {
    for args in [
        &["inspect"][..],
        &["run", "-p", "the cat", "-n", "5"],
        &["logits", "--tokens", "1", "-o", "json"],
    ] {
        let Ok(full) = fs::File::create("/dev/full") else {
            return;
        };
        let output = cadre(args).stdout(full).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {errors}");
        assert!(
            errors.contains("standard output") && errors.contains("No space"),
            "{errors}"
        );
    }
}

/// The shell limits the size of files, which fails like a full disk in the middle of writing.
#[cfg(unix)]
#[test]
fn a_trace_that_does_not_fit_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("d.txt");
    fs::write(&data, "the cat sat. ".repeat(2000)).unwrap();
    let script = "trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\"";
    let out = folder.path().join("t.parquet");
    let output = std::process::Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_cadre"), "trace"])
        .args(["--data", arg(&data), "-o", arg(&out)])
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("t.parquet"), "{errors}");
    assert_eq!(entries(folder.path()), ["d.txt"]);
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = cadre(&["completions", "bash"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}

#[test]
fn the_same_error_is_not_printed_twice() {
    let output = output(&["run", "-m", "/no/such/model", "-p", "x"]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(errors.matches("/no/such/model").count(), 1, "{errors}");
}
