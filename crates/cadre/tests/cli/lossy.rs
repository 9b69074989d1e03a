//! Lossy routing: refused where it makes no sense, and said by every output when it is on.

use serde_json::Value;

use crate::common::{arg, failure, json, output, stdout, tiny};

const TOP_1: [&str; 2] = ["--top-k-experts", "1"];
const LOGITS: [&str; 5] = ["logits", "--tokens", "1,2,3", "-o", "json"];

#[test]
fn logits_differ_and_say_so() {
    let plain = json(&LOGITS);
    assert_eq!(plain["lossy"], false);
    let lossy = json(&[&LOGITS[..], &TOP_1].concat());
    assert_eq!(lossy["lossy"], "top-k-experts=1");
    assert_ne!(lossy["logits"], plain["logits"]);
    let text = stdout(&[&LOGITS[..3], &TOP_1].concat());
    assert!(text.ends_with("lossy=top-k-experts=1\n"), "{text}");
}

#[test]
fn every_report_says_lossy() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.txt");
    std::fs::write(&data, "a b c d e f g h").unwrap();
    let tiny = tiny();
    let path = arg(tiny.path());
    let run = ["run", "-m", path, "-p", "a b", "-n", "2"];
    let eval = "eval perplexity -m".split(' ');
    let eval: Vec<&str> = eval.chain([path, "--data", arg(&data)]).collect();
    for command in [&run[..], &eval] {
        let json = |more: &[&str]| json(&[command, more, &["-o", "json"]].concat());
        assert_eq!(json(&[])["lossy"], false);
        let more = [
            "--min-expert-weight",
            "0.5",
            "--prefer-cached",
            "1,8",
            "--drop-cold",
            "0.75",
            "--low-bit",
            path,
            "--mem-budget",
            "64MiB",
        ];
        let said = "min-expert-weight=0.5 min-experts=1 prefer-cached=1,8 drop-cold=0.75 low-bit=1";
        assert_eq!(json(&more)["lossy"], said);
        let text = output(&[command, &more, &["--stats"]].concat());
        let text = String::from_utf8(text.stderr).unwrap();
        assert!(text.contains(&format!("; lossy={said}")), "{text}");
        // All of the model fits, so that no expert is ever cold.
        let more = ["--drop-cold", "0.75", "--mem-budget", "auto"];
        assert_eq!(json(&more)["lossy"], false);
    }
    let trace = folder.path().join("t.parquet");
    let record = ["trace", "-m", path, "--data", arg(&data), "-o", arg(&trace)];
    stdout(&[&record[..], &TOP_1].concat());
    let shown = stdout(&["trace", "show", arg(&trace)]);
    assert!(shown.contains("lossy  top-k-experts=1"), "{shown}");
    let bench: Vec<&str> = "bench -p 4 -n 2 -r 1 --no-warmup -o jsonl"
        .split(' ')
        .collect();
    let low_bit = ["-m", path, "--mem-budget", "64MiB", "--low-bit", path];
    for (more, said) in [
        (&[][..], Value::Bool(false)),
        (&TOP_1, "top-k-experts=1".into()),
        (&low_bit, "low-bit=1".into()),
    ] {
        for line in stdout(&[&bench, more].concat()).lines() {
            let record: Value = serde_json::from_str(line).unwrap();
            assert_eq!(record["lossy"], said);
        }
    }
}

#[test]
fn one_line_warns() {
    let folder = tiny();
    let warning = |more: &[&str]| {
        let command = ["logits", "-m", arg(folder.path()), "--tokens", "1,2"];
        let output = output(&[&command, more].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(warning(&[]), "");
    let said = warning(&["--drop-cold", "1", "--mem-budget", "1GiB"]);
    assert_eq!(said.lines().count(), 1, "{said}");
    for part in ["lossy drop-cold=1", "read before", "few picks"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (more, said) in [
        (&["--drop-cold", "1"][..], "--mem-budget"),
        (&["--prefer-cached", "1,2"], "--mem-budget"),
        (
            &["--prefer-cached", "1", "--mem-budget", "1GiB"],
            "two whole numbers",
        ),
        (&["--min-experts", "2"], "--min-expert-weight"),
    ] {
        let (code, text) = failure(&[&LOGITS[..], more].concat());
        assert_eq!(code, 2);
        assert!(text.contains(said), "{text}");
    }
    let (code, text) = failure(&[&LOGITS[..], &["--top-k-experts", "99"]].concat());
    assert_eq!(code, 1);
    assert!(text.contains("top_k = 99"), "{text}");
}
