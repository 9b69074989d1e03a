//! `--mem-budget`: the same results in less memory, what is said about it, and refusals.

use cadre_testkit::{TinyFolder, TinyMoe};

use crate::common::{arg, failure, json, output, stdout, tiny};

const RUN: [&str; 9] = [
    "run", "-p", "a b c", "-n", "12", "--temp", "0", "--seed", "1",
];

fn run<'a>(folder: &'a TinyFolder, more: &[&'a str]) -> Vec<&'a str> {
    [&RUN[..], &["-m", arg(folder.path())], more].concat()
}

#[test]
fn a_budget_changes_no_token() {
    let folder = tiny();
    let plain = stdout(&run(&folder, &[]));
    for more in [
        &["--mem-budget", "64MiB"][..],
        &[
            "--mem-budget",
            "64MiB",
            "--cache-policy",
            "lru",
            "--reader",
            "pread",
        ],
        &[
            "--mem-budget",
            "8MiB",
            "-c",
            "64",
            "--read-ahead",
            "edgemoe",
            "--read-ahead-always",
        ],
        &[
            "--mem-budget",
            "8MiB",
            "-c",
            "64",
            "--read-ahead",
            "off",
            "--reader",
            "sync",
        ],
        &["--mem-budget", "64MiB", "--preload"],
        // All of it fits into what this machine has left.
        &["--mem-budget", "auto"],
    ] {
        assert_eq!(stdout(&run(&folder, more)), plain, "{more:?}");
    }
}

#[test]
fn what_was_read_is_said_where_it_is_asked_for() {
    let folder = tiny();
    let budget = ["--mem-budget", "64MiB", "--stats"];
    let said = String::from_utf8(output(&run(&folder, &budget)).stderr).unwrap();
    assert!(
        said.contains("lookups in memory") && said.contains("lossy=no"),
        "{said}"
    );
    assert!(said.contains("control 100 %"), "{said}");
    let report = json(&run(&folder, &[&budget[..], &["-o", "json"]].concat()));
    let streaming = &report["streaming"];
    assert!(streaming["reads"].as_u64().unwrap() > 0);
    assert!(streaming["lookups"].as_u64() >= streaming["reads"].as_u64());
    assert_eq!(streaming["lossy"], false);
    assert!(
        json(&run(&folder, &["-o", "json"]))
            .get("streaming")
            .is_none()
    );
}

#[test]
fn bench_says_what_the_disk_gave() {
    let folder = tiny();
    let args = [
        "bench", "-p", "16", "-n", "4", "-r", "1", "-t", "1", "-o", "json",
    ];
    let records = json(
        &[
            &args[..],
            &["--mem-budget", "64MiB", "-m", arg(folder.path())],
        ]
        .concat(),
    );
    for record in records.as_array().unwrap() {
        let number = |key: &str| record[key].as_f64().unwrap();
        assert!(number("hit_rate") <= 1.0 && record.get("disk_bytes_per_s").is_some());
        assert!(number("vm_hwm_bytes") >= number("peak_rss_bytes"));
        assert!(number("weights_budget_bytes") < f64::from(64 << 20));
    }
    let plain = json(&[&args[..], &["-m", arg(folder.path())]].concat());
    assert!(plain[0].get("hit_rate").is_none());
}

#[test]
fn budgets_that_hold_nothing_are_refused() {
    let folder = tiny();
    let (code, said) = failure(&run(&folder, &["--mem-budget", "100KiB"]));
    assert!(
        code == 1 && said.contains("cache of") && said.contains("-c"),
        "{said}"
    );
    let (code, said) = failure(&run(&folder, &["--mem-budget", "60KiB", "-c", "8"]));
    assert!(code == 1 && said.contains("budget"), "{said}");
    let (code, said) = failure(&[&RUN[..], &["--mem-budget", "64MiB"]].concat());
    assert!(code == 1 && said.contains("part of the program"), "{said}");
    for wrong in [
        &["--mem-budget", "much"][..],
        &["--mem-budget", "8MiB", "--cache-policy", "fifo"],
        &["--mem-budget", "8MiB", "--read-ahead", "oracle"],
        &["--mem-budget", "8MiB", "--no-repack"],
        &["--stats"],
    ] {
        let output = output(&run(&folder, wrong));
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
}

/// The process stays under its budget and the constant that `docs/streaming.md` names, however long the prompt.
#[cfg(target_os = "linux")]
#[test]
fn memory_stays_under_the_budget() {
    use crate::common::{cadre, peak_rss};

    // 100 MB of experts.
    let folder = TinyMoe::default()
        .n_experts(32)
        .n_layers(4)
        .configure(|c| (c.hidden_size, c.moe.intermediate_size) = (256, 256))
        .build()
        .unwrap();
    let constant = (64 << 20) + 1024 * 1024;
    let ids = |n: usize| {
        (0..n)
            .map(|i| (i % 50).to_string())
            .collect::<Vec<_>>()
            .join(",")
    };
    for n in [1, 60] {
        let ids = ids(n);
        let args = [
            "logits",
            "--last",
            "-t",
            "2",
            "--tokens",
            &ids,
            "-m",
            arg(folder.path()),
        ];
        let whole = peak_rss(&mut cadre(&args));
        for budget in [16_u64 << 20, 40 << 20] {
            let size = budget.to_string();
            let streamed = [&args[..], &["--mem-budget", &size]].concat();
            let peak = peak_rss(&mut cadre(&streamed));
            assert!(
                peak <= budget + constant,
                "{peak} bytes with a budget of {budget}"
            );
            assert!(peak < whole, "{peak} bytes and {whole} with all in memory");
        }
    }
}
