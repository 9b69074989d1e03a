//! Recordings and plans of a model in one format, for the same model in another.

use std::fs;
use std::path::Path;

use cadre_testkit::TinyMoe;
use serde_json::Value;

use crate::common::{arg, failure, json, stdout, tiny, trace};
use crate::reshape::Bench;

#[test]
fn a_recording_of_one_format_serves_another_when_the_values_agree() {
    let bench = Bench::new(tiny());
    let (folder, gguf) = (bench.model.path(), bench.path("model.gguf"));
    stdout(&[
        "convert",
        "-m",
        arg(folder),
        "-o",
        arg(&gguf),
        "--dtype",
        "q8_0",
    ]);
    let digest = |model: &Path| {
        json(&["inspect", "-m", arg(model), "--digest", "-o", "json"])["digest"].clone()
    };
    let (data, of_gguf) = (bench.path("data.jsonl"), bench.path("gguf.parquet"));
    trace([&gguf, &data, &of_gguf], &[]);
    let of_folder = bench.path("trace.parquet");
    for (at, (trace, recorded, model)) in [
        (&of_gguf, gguf.as_path(), folder),
        (&of_folder, folder, gguf.as_path()),
    ]
    .into_iter()
    .enumerate()
    {
        let plan = bench.path(&format!("plan{at}.json"));
        let mut args = vec!["plan", "prune", "-m", arg(model), "--trace", arg(trace)];
        args.extend(["--keep", "0.5", "-o", arg(&plan)]);
        let (_, errors) = failure(&args);
        assert!(errors.contains("--same-model"), "{errors}");
        args.extend(["--same-model", arg(recorded)]);
        stdout(&args);
        let made: Value = serde_json::from_str(&fs::read_to_string(&plan).unwrap()).unwrap();
        assert_eq!(made["model"]["digest"], digest(model));
        let output = bench.path(["out", "out.gguf"][at]);
        stdout(&[
            "apply",
            "-m",
            arg(model),
            "--plan",
            arg(&plan),
            "-o",
            arg(&output),
        ]);
        // It is a plan for this one still, and for no other.
        let again = bench.path(["again", "again.gguf"][1 - at]);
        let (_, errors) = failure(&[
            "apply",
            "-m",
            arg(recorded),
            "--plan",
            arg(&plan),
            "-o",
            arg(&again),
        ]);
        assert!(errors.contains("another model"), "{errors}");
    }
    // Another model of the same sizes is none, whatever is said.
    let other = TinyMoe::default().seed(2).build().unwrap();
    let plan = bench.path("other.json");
    let mut args = vec![
        "plan",
        "prune",
        "-m",
        arg(other.path()),
        "--trace",
        arg(&of_folder),
    ];
    args.extend([
        "--keep",
        "0.5",
        "-o",
        arg(&plan),
        "--same-model",
        arg(folder),
    ]);
    let (_, errors) = failure(&args);
    assert!(
        errors.contains("are not the same model") && errors.contains("differ by"),
        "{errors}"
    );
    // Nor is the one that is named the one that was recorded.
    let last = args.len() - 1;
    args[last] = arg(&gguf);
    let (_, errors) = failure(&args);
    assert!(errors.contains("was not recorded from"), "{errors}");
    assert!(!plan.exists());
}
