//! `cadre bench`: records with llama-bench's keys, tables, and refusals.

use crate::common::{failure, json, stdout};

const SHORT: [&str; 8] = ["bench", "-n", "4", "-r", "2", "-t", "1", "--no-warmup"];

fn bench<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SHORT[..], more].concat()
}

#[test]
fn records_have_the_keys_of_llama_bench() {
    let records = json(&bench(&["-p", "16", "-d", "0,32", "-o", "json"]));
    let records = records.as_array().unwrap();
    assert_eq!(records.len(), 4);
    let keys = [
        "build_commit",
        "build_number",
        "cpu_info",
        "gpu_info",
        "backends",
        "model_filename",
        "model_type",
        "model_size",
        "model_n_params",
        "n_batch",
        "n_ubatch",
        "n_threads",
        "type_k",
        "type_v",
        "n_gpu_layers",
        "n_prompt",
        "n_gen",
        "n_depth",
        "test_time",
        "avg_ns",
        "stddev_ns",
        "avg_ts",
        "stddev_ts",
        "samples_ns",
        "samples_ts",
    ];
    for record in records {
        assert!(keys.iter().all(|key| record.get(key).is_some()), "{record}");
        assert_eq!(record["samples_ts"].as_array().unwrap().len(), 2);
        assert_eq!(record["n_threads"], 1);
        assert!(record["avg_ts"].as_f64().unwrap() > 0.0);
    }
    let (prompt, generated) = (&records[0], &records[3]);
    assert_eq!(prompt["n_prompt"], 16);
    assert!(prompt["gflops"].as_f64().unwrap() > 0.0 && prompt["bound_ts"].is_null());
    assert_eq!(
        (&generated["n_gen"], &generated["n_depth"]),
        (&4.into(), &32.into())
    );
    let number = |key: &str| generated[key].as_f64().unwrap();
    let bound = number("bandwidth_bytes_per_s") / number("bytes_per_token");
    assert!((number("bound_ts") / bound - 1.0).abs() < 1e-9);
    assert!((number("median_ts") / bound / number("bound_share") - 1.0).abs() < 1e-9);
    assert!(generated["gflops"].is_null());
}

#[test]
fn tables_have_a_line_per_test() {
    let text = stdout(&bench(&["-p", "8,16", "--seqs", "1,3"]));
    assert_eq!(text.lines().count(), 2 + 4, "{text}");
    for test in ["| pp16 |", "| tg4 |", "| tg4 x 3 |"] {
        assert!(text.contains(test), "{text}");
    }
    let lines = stdout(&bench(&["-p", "0", "-o", "jsonl"]));
    for line in lines.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
    assert_eq!(
        stdout(&bench(&["-p", "0", "-o", "csv"])).lines().count(),
        1 + 1
    );
}

#[test]
fn what_cannot_be_measured_is_refused() {
    for (words, reason) in [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-p", "99999999", "-r", "1"], "tokens of context"),
        (["-p", "8", "-r", "0"], "--repetitions"),
    ] {
        let (code, message) = failure(&[&["bench"][..], &words].concat());
        assert_eq!(code, 2, "{message}");
        assert!(message.contains(reason), "{message}");
    }
}
