//! `cadre eval choices` and `eval answers` score as lm_eval does with transformers (`golden/lm_eval`), and refuse what they cannot ask.

use std::fs;

use cadre_testkit::golden_dir;
use serde_json::Value;

use crate::common::{arg, failure, json, stdout, tiny};

/// Of log likelihoods, which transformers sums in f32.
const TOLERANCE: f64 = 1e-3;

/// What `task` comes to, and what it should.
fn asked(task: &str, options: &[&str]) -> (Value, Value) {
    let folder = golden_dir().join("lm_eval");
    let expected = fs::read_to_string(folder.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let data = folder.join(format!("{task}.jsonl"));
    let args = [
        "eval",
        task,
        "--data",
        arg(&data),
        "-o",
        "json",
        "--samples",
    ];
    (json(&[&args, options].concat()), expected[task].clone())
}

#[test]
fn choices_score_as_lm_eval_scores_transformers() {
    let (report, expected) = asked("choices", &[]);
    assert_eq!(report["acc"], expected["scores"]["acc"]);
    assert_eq!(report["acc_norm"], expected["scores"]["acc_norm"]);
    assert_ne!(report["acc"], report["acc_norm"]);
    let samples = report["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 30);
    for (sample, expected) in samples.iter().zip(expected["samples"].as_array().unwrap()) {
        let numbers =
            |value: &Value| -> Vec<f64> { serde_json::from_value(value.clone()).unwrap() };
        let (ours, theirs) = (numbers(&sample["log_likelihoods"]), numbers(expected));
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert!((ours - theirs).abs() < TOLERANCE, "{ours} {theirs}");
        }
    }
    let math = &report["domains"]["math"];
    assert_eq!(math["questions"], 7);
    // Small pieces of a prompt, and none that the session knows already, give the same bits.
    let (again, _) = asked("choices", &["-c", "64", "-t", "1"]);
    assert_eq!(again, report);
    let file = golden_dir().join("lm_eval/choices.jsonl");
    let text = stdout(&["eval", "choices", "--data", arg(&file)]);
    let all = text.lines().find(|line| line.starts_with("all")).unwrap();
    let words: Vec<&str> = all.split_whitespace().collect();
    assert_eq!(words, ["all", "30", "0.4000", "0.0910", "0.3667", "0.0895"]);
}

#[test]
fn answers_score_as_lm_eval_scores_transformers() {
    let (report, expected) = asked("answers", &["-n", "8", "--stop", "\n"]);
    assert_eq!(report["exact_match"], expected["scores"]["exact_match"]);
    let samples = report["samples"].as_array().unwrap();
    let texts: Vec<&Value> = samples.iter().map(|sample| &sample["text"]).collect();
    let expected: Vec<&Value> = expected["samples"].as_array().unwrap().iter().collect();
    assert_eq!(texts, expected);
}

#[test]
fn questions_that_cannot_be_asked_are_named() {
    let model = tiny();
    let path = arg(model.path());
    let data = model.path().parent().unwrap().join("questions.jsonl");
    let refused = |task: &str, line: &str, words: &[&str]| {
        fs::write(&data, line).unwrap();
        let (code, errors) = failure(&["eval", task, "-m", path, "--data", arg(&data)]);
        assert_eq!(code, 1, "{errors}");
        for word in words {
            assert!(errors.contains(word), "{word}: {errors}");
        }
    };
    refused("choices", "", &["questions.jsonl is empty", "\"choices\""]);
    let line = r#"{"prompt": "the cat", "choices": ["sat"], "answer": 0}"#;
    refused("choices", line, &["the cat", "two or more"]);
    let line = r#"{"prompt": "the cat", "choices": ["sat", "is"], "gold": 0}"#;
    refused("choices", line, &["questions.jsonl:1", "gold"]);
    let long = format!(
        r#"{{"prompt": "{}", "choices": ["sat", "is"], "answer": 0}}"#,
        "the cat ".repeat(500)
    );
    refused("choices", &long, &["the cat", "context"]);
    let line = r#"{"prompt": "", "answer": "x"}"#;
    refused("answers", line, &["a prompt needs text"]);
    let line = r#"{"prompt": "the cat", "answer": "x"}"#;
    refused("answers", line, &["the cat", "context", "-n"]);
}
