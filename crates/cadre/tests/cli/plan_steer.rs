//! `cadre plan steer`: what it finds tells the sets apart, is written as a steering, and is compared with random experts.

use std::path::{Path, PathBuf};

use cadre_testkit::{Random, TinyMoe};

use crate::common::{arg, failure, json, stdout};

/// Eight prompts of letters from `first` on.
fn prompts(folder: &Path, name: &str, first: u8) -> PathBuf {
    let mut random = Random::new(u64::from(first));
    let mut line = |_| {
        let letter = |_| char::from(first + random.below(4) as u8).to_string();
        let text: Vec<String> = (0..12).map(letter).collect();
        serde_json::json!({"text": text.join(" ")}).to_string()
    };
    let lines: Vec<String> = (0..8).map(&mut line).collect();
    let path = folder.join(name);
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

#[test]
fn the_experts_of_one_set_are_found_and_steered() {
    let folder = tempfile::tempdir().unwrap();
    let model = TinyMoe::default()
        .n_experts(16)
        .n_layers(3)
        .build()
        .unwrap();
    let positive = prompts(folder.path(), "p.jsonl", b'a');
    let negative = prompts(folder.path(), "n.jsonl", b'u');
    let file = folder.path().join("steer.json");
    let command = [
        "plan",
        "steer",
        "-m",
        arg(model.path()),
        "--positive",
        arg(&positive),
        "--negative",
        arg(&negative),
        "--experts",
        "4",
        "-o",
        arg(&file),
    ];
    let report = json(&[&command[..], &["--report", "json"]].concat());
    assert_eq!(report["prompts"], serde_json::json!([6, 6]));
    assert_eq!(report["held_out"], serde_json::json!([2, 2]));
    let experts = report["experts"].as_array().unwrap();
    assert_eq!(experts.len(), 4);
    let deltas: Vec<f64> = experts
        .iter()
        .map(|one| one["delta"].as_f64().unwrap())
        .collect();
    assert!(
        deltas.is_sorted_by(|a, b| a >= b) && deltas[3] > 0.0,
        "{deltas:?}"
    );
    let of = |one: &serde_json::Value| one["separation"].as_f64().unwrap();
    let random = report["random"].as_array().unwrap();
    assert_eq!(random.len(), 5);
    assert!(random.iter().all(|one| of(one) >= 0.5), "either way");
    assert!(of(&report["chosen"]) > 0.99, "{report}");
    // Leaving them out changes the prompts that have them more than those that have not.
    let change = report["chosen"]["change"].as_array().unwrap();
    assert!(change[0].as_f64() > change[1].as_f64(), "{report}");

    let logits = [
        "logits",
        "-m",
        arg(model.path()),
        "--tokens",
        "97,98",
        "-o",
        "json",
    ];
    let steered = json(&[&logits[..], &["--steer", arg(&file)]].concat());
    assert!(
        steered["lossy"]
            .as_str()
            .unwrap()
            .starts_with("mute-experts="),
        "{steered}"
    );

    let text = stdout(&[&command[..], &["--rule", "mask", "--controls", "0"]].concat());
    assert!(
        text.contains("tells apart") && !text.contains("random"),
        "{text}"
    );
    assert!(std::fs::read_to_string(&file).unwrap().contains("\"mask\""));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = TinyMoe::default().build().unwrap();
    let one = prompts(folder.path(), "p.jsonl", b'a');
    let single = folder.path().join("single.txt");
    std::fs::write(&single, "a b c").unwrap();
    let file = folder.path().join("steer.json");
    let refused = |negative: &Path, more: &[&str]| {
        let command = [
            "plan",
            "steer",
            "-m",
            arg(model.path()),
            "--positive",
            arg(&one),
        ];
        let output = ["--negative", arg(negative), "-o", arg(&file)];
        failure(&[&command[..], &output, more].concat())
    };
    let (code, text) = refused(&one, &[]);
    assert_eq!(
        (code, text.contains("more often by the positive")),
        (1, true),
        "{text}"
    );
    let (_, text) = refused(&single, &[]);
    assert!(text.contains("single.txt holds one prompt"), "{text}");
    let (code, text) = refused(&one, &["--held-out", "1"]);
    assert_eq!((code, text.contains("--held-out 1")), (2, true), "{text}");
    assert!(!file.exists());
}
