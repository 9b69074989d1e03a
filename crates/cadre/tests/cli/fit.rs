//! `cadre fit`: the verdict, what it suggests, and that it bounds what `run` really takes.

use cadre_checkpoint::Dtype;
use cadre_testkit::TinyMoe;

use crate::common::{arg, failure, json, output, stdout};

const RATE: [&str; 2] = ["--bandwidth", "10GB/s"];

/// 16-bit weights of about 27 MB.
fn model() -> cadre_testkit::TinyFolder {
    let model = TinyMoe::default().dtype(Dtype::Bf16).configure(|config| {
        config.hidden_size = 256;
        config.moe.intermediate_size = 512;
        config.max_position_embeddings = 65_536;
    });
    model.n_experts(16).n_layers(2).build().unwrap()
}

fn fit(path: &str, more: &[&str]) -> serde_json::Value {
    let args = [&["fit", "-m", path, "-o", "json"], &RATE[..], more].concat();
    let output = output(&args);
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_fits_says_how_fast() {
    let model = model();
    let path = arg(model.path());
    let report = fit(path, &["--mem-budget", "1GiB"]);
    assert_eq!(report["fits"], true);
    assert_eq!(report["budget_bytes"], 1 << 30);
    assert_eq!(report["missing_bytes"], 0);
    assert_eq!(report["suggestions"], serde_json::json!([]));
    let number = |key: &str| report[key].as_u64().unwrap();
    let parts = [
        "weights_bytes",
        "kv_bytes",
        "scratch_bytes",
        "program_bytes",
    ];
    assert_eq!(
        parts.map(number).iter().sum::<u64>(),
        number("needed_bytes")
    );
    let inspect = json(&["inspect", "-m", path, "-o", "json"]);
    assert_eq!(report["parameters"], inspect["parameters"]["total"]);
    assert_eq!(report["active_parameters"], inspect["parameters"]["active"]);
    assert_eq!(report["weights_bytes"], inspect["memory"]["weights_bytes"]);
    let rate = 1e10 / report["active_bytes_per_token"].as_f64().unwrap();
    let forecast = report["forecast_tokens_per_s"].as_f64().unwrap();
    assert!((forecast / rate - 1.0).abs() < 1e-9);
    assert!(
        report["forecast_tokens_per_s_full_context"]
            .as_f64()
            .unwrap()
            < forecast
    );
    let half = fit(
        path,
        &["--mem-budget", "1GiB", "-ctk", "f16", "-ctv", "f16"],
    );
    assert_eq!(half["kv_bytes"].as_u64().unwrap() * 2, number("kv_bytes"));
    // 8 bits in blocks of 34 bytes for 32 values; a little is not quantised.
    let smaller = fit(path, &["--mem-budget", "1GiB", "--quant", "q8_0"]);
    let share = smaller["weights_bytes"].as_f64().unwrap() / number("weights_bytes") as f64;
    assert!((0.52..0.56).contains(&share), "{share}");
    let text = stdout(&[&["fit", "-m", path], &RATE[..], &["--mem-budget", "1GiB"]].concat());
    assert!(
        text.contains("yes: needs") && text.contains("decide whether it fits"),
        "{text}"
    );
}

#[test]
fn what_does_not_fit_says_what_would() {
    let model = model();
    let path = arg(model.path());
    let needed = fit(path, &["--mem-budget", "1GiB"])["needed_bytes"]
        .as_u64()
        .unwrap();
    let budget = (needed - (4 << 20)).to_string();
    let report = fit(path, &["--mem-budget", &budget]);
    assert_eq!(report["fits"], false);
    assert_eq!(report["missing_bytes"], 4 << 20);
    let suggestions = report["suggestions"].as_array().unwrap();
    let of_kind = |kind: &str| suggestions.iter().find(|one| one["kind"] == kind).unwrap();
    for suggestion in suggestions {
        let is_memory = suggestion["kind"] == "memory";
        let needed = suggestion["needed_bytes"].as_u64().unwrap();
        assert_eq!(needed <= budget.parse::<u64>().unwrap(), !is_memory);
    }
    // What is suggested does fit, and one token more does not.
    let n_ctx = of_kind("context")["n_ctx"].as_u64().unwrap();
    assert!(n_ctx < 4096);
    let at = |n_ctx: u64| {
        fit(path, &["--mem-budget", &budget, "-c", &n_ctx.to_string()])["fits"].clone()
    };
    assert_eq!((at(n_ctx), at(n_ctx + 1)), (true.into(), false.into()));
    let quantised = fit(path, &["--mem-budget", &budget, "--quant", "q8_0"]);
    assert_eq!(quantised["needed_bytes"], of_kind("quant")["needed_bytes"]);
    let files: Vec<_> = suggestions
        .iter()
        .filter(|one| one["kind"] == "file")
        .map(|one| &one["format"])
        .collect();
    assert_eq!(files, ["q8_0", "q6_k", "q4_k_m"]);

    let (code, errors) = failure(&[
        "fit",
        "-m",
        path,
        "--mem-budget",
        &budget,
        "--bandwidth",
        "1GB/s",
    ]);
    assert_eq!(code, 3);
    assert!(errors.contains("does not fit"), "{errors}");
}

#[test]
fn what_does_not_fit_is_forecast_from_its_disk() {
    let model = model();
    let path = arg(model.path());
    let whole = fit(path, &["--mem-budget", "1GiB", "--disk-bandwidth", "1GB/s"]);
    assert_eq!(whole["streamed"], serde_json::Value::Null, "it fits");
    // The program is beside the budget of a streamed model.
    let needed = whole["needed_bytes"].as_u64().unwrap() - whole["program_bytes"].as_u64().unwrap();
    let at = |budget: u64, rate: &str| {
        let budget = budget.to_string();
        let report = fit(path, &["--mem-budget", &budget, "--disk-bandwidth", rate]);
        assert_eq!(report["fits"], false);
        report["streamed"].clone()
    };
    let (less, more) = (
        at(needed - (12 << 20), "1GB/s"),
        at(needed - (4 << 20), "1GB/s"),
    );
    let number = |of: &serde_json::Value, key: &str| of[key].as_f64().unwrap();
    assert!(number(&less, "hit_rate") < number(&more, "hit_rate"));
    assert!(number(&more, "hit_rate") < 1.0);
    for key in ["forecast_tokens_per_s", "bound_tokens_per_s"] {
        assert!(number(&less, key) < number(&more, key), "{key}");
        let slower = at(needed - (12 << 20), "100MB/s");
        assert!(number(&slower, key) < number(&less, key), "{key}");
    }
    // A token misses so many bytes, and they come from a disk of that speed.
    let bound = 1e9 / number(&less, "disk_bytes_per_token");
    assert!((number(&less, "bound_tokens_per_s") / bound - 1.0).abs() < 1e-6);
    let forecast = number(&less, "forecast_tokens_per_s");
    assert!(forecast < bound && forecast > 0.5 * bound, "{less}");
    assert_eq!(
        at(1 << 20, "1GB/s"),
        serde_json::Value::Null,
        "not even the rest fits"
    );
}

#[test]
fn the_machine_is_measured_without_being_asked() {
    let report = json(&["fit", "-o", "json"]);
    assert_eq!(
        (&report["budget_source"], &report["bandwidth_source"]),
        (&"available".into(), &"measured".into())
    );
    assert!(report["budget_bytes"].as_u64() > Some(1 << 20));
    let number = |key: &str| report[key].as_f64().unwrap();
    let by_bytes = number("bandwidth_bytes_per_s") / number("active_bytes_per_token");
    let forecast = number("forecast_tokens_per_s");
    assert!(forecast > 0.0 && forecast < by_bytes);
    assert!(number("forecast_prompt_tokens_per_s") > 0.0);
}

#[test]
fn wrong_sizes_are_wrong_usage() {
    for bad in [
        ["--mem-budget", "lots"],
        ["--bandwidth", "-1"],
        ["--disk-bandwidth", "fast"],
        ["-c", "0"],
    ] {
        assert_eq!(
            output(&[&["fit"], &bad[..]].concat()).status.code(),
            Some(2),
            "{bad:?}"
        );
    }
}

/// The forecast must be a bound, or people run out of memory; and not far above, or they believe that nothing fits.
#[cfg(target_os = "linux")]
#[test]
fn the_forecast_bounds_what_a_run_takes() {
    let model = model();
    let prompt = "the cat sat on the mat ".repeat(60);
    for (source, n_ctx) in [(&["-m", arg(model.path())][..], "1024"), (&[], "512")] {
        let run = [&["run", "-p", &prompt, "-n", "8", "-c", n_ctx], source].concat();
        let options = ["fit", "-c", n_ctx, "-o", "json", "--mem-budget", "8GiB"];
        let fit = json(&[&options, &RATE[..], source].concat());
        let taken = crate::common::peak_rss(&mut crate::common::cadre(&run));
        let needed = fit["needed_bytes"].as_u64().unwrap();
        println!("needed {needed}, taken {taken}");
        assert!(taken <= needed, "{taken} is over {needed}");
        // The program's share is estimated generously; the rest is counted.
        let counted = needed - fit["program_bytes"].as_u64().unwrap();
        assert!(taken >= counted / 2, "{taken} is far below {counted}");
    }
}
