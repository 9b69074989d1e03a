//! Steering and self-contrast on the command line: the flags, the file, what outputs say, and refusals.

use serde_json::Value;

use crate::common::{arg, failure, json, output, stdout, tiny};

const LOGITS: [&str; 6] = ["logits", "--tokens", "1,2,3", "--routing", "-o", "json"];

/// Ids and weights of every position in layer 1.
fn picks(report: &Value) -> Vec<Vec<u64>> {
    let layers = report["routing"].as_array().unwrap();
    let layer = layers.iter().find(|one| one["layer"] == 1).unwrap();
    serde_json::from_value(layer["experts"].clone()).unwrap()
}

#[test]
fn flags_and_the_file_do_the_same_and_outputs_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("steer.json");
    let tiny = tiny();
    let command = [&LOGITS[..], &["-m", arg(tiny.path())]].concat();
    let plain = json(&command);
    assert_eq!(plain["lossy"], false);
    for (flags, text, said) in [
        (
            &["--mask-experts", "1:0-4", "--mask-experts", "0:1"][..],
            r#"{"mask":{"1":[0,1,2,3,4],"0":[1]}}"#,
            "mask-experts=1:0,1,2,3,4/0:1",
        ),
        (
            &["--force-experts", "1:6", "--bias-experts", "*:2=-1.5"],
            r#"{"force":{"1":[6]},"bias":{"*":{"2":-1.5}}}"#,
            "force-experts=1:6 bias-experts=*:2=-1.5",
        ),
        (
            &[
                "--top-k-experts",
                "4",
                "--top-p-experts",
                "0.5",
                "--gain-experts",
                "0-1:3=0.5",
            ],
            r#"{"top_k":4,"top_p":0.5,"gain":{"0-1":{"3":0.5}}}"#,
            "top-k-experts=4 top-p-experts=0.5 gain-experts=0-1:3=0.5",
        ),
    ] {
        let by_flags = json(&[&command, flags].concat());
        assert_eq!(by_flags["lossy"], said);
        assert_ne!(by_flags["logits"], plain["logits"]);
        std::fs::write(&file, text).unwrap();
        assert_eq!(
            json(&[&command, &["--steer", arg(&file)][..]].concat()),
            by_flags
        );
        let warned = output(&[&command, flags].concat()).stderr;
        let warned = String::from_utf8(warned).unwrap();
        assert!(
            warned.contains(&format!("not the model's own: lossy {said}")),
            "{warned}"
        );
    }
    let masked = json(&[&command, &["--mask-experts", "1:0-5"][..]].concat());
    assert!(
        picks(&masked)
            .iter()
            .all(|ids| ids.iter().all(|id| *id > 5))
    );
    let forced = json(&[&command, &["--force-experts", "1:4,6"][..]].concat());
    assert!(
        picks(&forced)
            .iter()
            .all(|ids| matches!(ids[..], [4, 6] | [6, 4]))
    );
    let more = json(&[&command, &["--top-k-experts", "8"][..]].concat());
    assert!(picks(&more).iter().all(|ids| ids.len() == 8));
}

#[test]
fn a_file_may_be_followed_in_part() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("steer.json");
    let tiny = tiny();
    let command = [&LOGITS[..], &["-m", arg(tiny.path())]].concat();
    std::fs::write(&file, r#"{"mute":{"*":[1,2]},"bias":{"1":{"3":4}}}"#).unwrap();
    let scaled = |scale: &str| {
        let flags = ["--steer", arg(&file), "--steer-scale", scale];
        json(&[&command, &flags[..]].concat())
    };
    let half = scaled("0.25");
    let flags = [
        "--damp-experts",
        "*:1=0.25,2=0.25",
        "--bias-experts",
        "1:3=1",
    ];
    let by_flags = json(&[&command, &flags[..]].concat());
    assert_eq!(half, by_flags);
    assert_eq!(
        half["lossy"],
        "damp-experts=*:1=0.25,2=0.25 bias-experts=1:3=1"
    );
    assert_eq!(scaled("0"), json(&command));
    assert_eq!(
        scaled("1"),
        json(&[&command, &["--steer", arg(&file)][..]].concat())
    );
    let flags = ["--steer", arg(&file), "--steer-scale", "2"];
    let (code, errors) = failure(&[&command, &flags[..]].concat());
    assert!(
        code == 1 && errors.contains("at most 1 where one is muted"),
        "{errors}"
    );
}

#[test]
fn every_command_with_a_model_can_be_steered() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.txt");
    std::fs::write(&data, "a b c d e f g h").unwrap();
    let tiny = tiny();
    let model = ["-m", arg(tiny.path()), "--mask-experts", "*:0"];
    let said = "mask-experts=*:0";
    let eval = ["eval", "perplexity", "--data", arg(&data), "-o", "json"];
    assert_eq!(json(&[&eval[..], &model].concat())["lossy"], said);
    let run = ["run", "-p", "a b", "-n", "3", "--temp", "0", "-o", "json"];
    assert_eq!(json(&[&run[..], &model].concat())["lossy"], said);
    let bench = [
        "bench",
        "-p",
        "4",
        "-n",
        "2",
        "-r",
        "1",
        "--no-warmup",
        "-o",
        "json",
    ];
    assert_eq!(json(&[&bench[..], &model].concat())[0]["lossy"], said);
    let trace = folder.path().join("t.parquet");
    stdout(
        &[
            &["trace", "--data", arg(&data), "-o", arg(&trace)][..],
            &model,
        ]
        .concat(),
    );
    let shown = stdout(&["trace", "show", arg(&trace)]);
    assert!(shown.contains(&format!("lossy  {said}")), "{shown}");
}

#[test]
fn a_contrast_is_said_and_without_a_difference_it_is_none() {
    let tiny = tiny();
    let run = |more: &[&str]| {
        let command = [
            "run",
            "-m",
            arg(tiny.path()),
            "-p",
            "a b c",
            "-n",
            "12",
            "--temp",
            "0",
        ];
        json(&[&command[..], &["-o", "json"], more].concat())
    };
    let plain = run(&[]);
    let same = run(&["--contrast", "0.9", "--contrast-ranks", "1,2"]);
    assert_eq!(same["tokens"], plain["tokens"]);
    assert_eq!(
        same["lossy"],
        "contrast=0.9 contrast-ranks=1,2 contrast-alpha=0.1"
    );
    let other = run(&[
        "--contrast",
        "0.9",
        "--contrast-alpha",
        "0.001",
        "--top-k-experts",
        "3",
    ]);
    assert_eq!(
        other["lossy"],
        "top-k-experts=3 contrast=0.9 contrast-ranks=2 contrast-alpha=0.001"
    );
    let watched = run(&["--contrast", "0.5", "--experts"]);
    assert_eq!(
        watched["experts"]["n_tokens"],
        run(&["--experts"])["experts"]["n_tokens"]
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("list.json");
    std::fs::write(&list, "[]").unwrap();
    let file = folder.path().join("steer.json");
    std::fs::write(&file, r#"{"mask":{"1":[0]},"masks":{}}"#).unwrap();
    let tiny = tiny();
    let command = [&LOGITS[..], &["-m", arg(tiny.path())]].concat();
    for (more, code, said) in [
        (&["--mask-experts", "3"][..], 2, "`3:5,7`, `*:12`"),
        (&["--bias-experts", "3:5"], 2, "`3:5=1.5,7=-2`"),
        (
            &["--mask-experts", "9:0"],
            1,
            "layer 9 has no experts; layers with experts: 0-1",
        ),
        (
            &["--force-experts", "*:8"],
            1,
            "layer 0 has no expert 8; its experts are 0 to 7",
        ),
        (&["--mask-experts", "0:0-6"], 1, "layer 0 keeps 1 experts"),
        (&["--force-experts", "0:1,2,3"], 1, "a token gets at most 2"),
        (
            &["--mask-experts", "0:1", "--force-experts", "*:1"],
            1,
            "both mask and force",
        ),
        (&["--steer", arg(&file)], 1, "unknown field `masks`"),
        (&["--steer", arg(&list)], 1, "expected a JSON object"),
        (&["--steer", "/no/such/file"], 1, "/no/such/file"),
        (&["--top-p-experts", "2"], 1, "top_p = 2: expected 0 to 1"),
    ] {
        let (got, text) = failure(&[&command, more].concat());
        assert_eq!(got, code, "{text}");
        assert!(text.contains(said), "{text}");
    }
    let run = ["run", "-m", arg(tiny.path()), "-p", "a", "-n", "1"];
    for (more, code, said) in [
        (&["--contrast=-1"][..], 1, "beta of the contrast = -1"),
        (&["--contrast-ranks", "3"], 2, "--contrast"),
        (
            &["--contrast", "0.5", "--contrast-ranks", "9"],
            1,
            "a token is to get 9",
        ),
        (
            &["--contrast", "0.5", "--contrast-alpha", "2"],
            1,
            "above 0, up to 1",
        ),
    ] {
        let (got, text) = failure(&[&run[..], more].concat());
        assert_eq!(got, code, "{text}");
        assert!(text.contains(said), "{text}");
    }
}

/// `ln softmax` of every row.
fn log_softmax(logits: &Value) -> Vec<Vec<f64>> {
    let rows: Vec<Vec<f64>> = serde_json::from_value(logits.clone()).unwrap();
    let normed = |row: &Vec<f64>| -> Vec<f64> {
        let max = row.iter().copied().fold(f64::MIN, f64::max);
        let log_sum = max + row.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        row.iter().map(|l| l - log_sum).collect()
    };
    rows.iter().map(normed).collect()
}

#[test]
fn the_lower_the_rank_of_the_only_expert_the_further_from_what_the_model_says() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rank.json");
    let prompt = "It was the best of times, it was the worst of times, it was the age of wisdom";
    let run = json(&["run", "-p", prompt, "-n", "1", "-o", "json"]);
    let tokens = run["prompt_tokens"].to_string();
    let command = ["logits", "--tokens", &tokens, "-o", "json"];
    let model = log_softmax(&json(&command)["logits"]);
    let mut last = 0.0;
    for rank in [1, 2, 4, 16] {
        std::fs::write(&file, format!(r#"{{"ranks":[{rank}]}}"#)).unwrap();
        let report = json(&[&command[..], &["--steer", arg(&file)]].concat());
        assert_eq!(report["lossy"], format!("rank-experts={rank}"));
        let steered = log_softmax(&report["logits"]);
        let rows = model.iter().zip(&steered);
        let pairs = rows.flat_map(|(p, q)| p.iter().zip(q));
        let divergence = pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>() / model.len() as f64;
        assert!(
            divergence > last,
            "rank {rank}: {divergence}, before {last}"
        );
        last = divergence;
    }
}
