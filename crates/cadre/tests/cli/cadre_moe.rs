//! Models of `cadre_moe` through the program: layers with different numbers of experts, null experts, and what runs
//! beside them.

use std::fs;

use cadre_checkpoint::{AttentionExperts, ResidualMlp, RouterConfig};
use cadre_testkit::{TinyFolder, TinyMoe};

use crate::common::{arg, failure, json, stdout};

/// Experts of layers 0, 2 and 3, and a dense layer between them; two null experts in each.
fn uneven() -> TinyFolder {
    let model = TinyMoe::default().n_layers(4).configure(|config| {
        config.model_type = "cadre_moe".to_owned();
        let moe = &mut config.moe;
        moe.layers = vec![0, 2, 3];
        moe.set_counts(vec![3, 4, 8]);
        (moe.n_null, moe.top_k) = (2, 3);
        moe.router = RouterConfig::NullExperts;
        moe.recurrent_router = Some(8);
        moe.residual = Some(ResidualMlp {
            intermediate_size: 24,
            learned: true,
        });
    });
    model.build().unwrap()
}

#[test]
fn sizes_are_those_of_every_layer() {
    let model = uneven();
    let path = arg(model.path());
    let report = json(&["inspect", "-m", path, "--layers", "-o", "json"]);
    assert_eq!(report["experts_per_layer"], serde_json::json!([3, 4, 8]));
    assert_eq!(
        (&report["n_null_experts"], &report["n_picks_differ"]),
        (&2.into(), &true.into())
    );
    let per_expert = 3 * 16 * 32;
    let (total, active) = (
        &report["parameters"]["total"],
        &report["parameters"]["active"],
    );
    // All three picks of a token may be real ones: none is left out of 3, one of 4, five of 8.
    assert_eq!(
        total.as_u64().unwrap() - active.as_u64().unwrap(),
        6 * per_expert
    );
    let layers = report["layers"].as_array().unwrap();
    let counts: Vec<u64> = layers
        .iter()
        .map(|l| l["n_experts"].as_u64().unwrap())
        .collect();
    assert_eq!(counts, [3, 0, 4, 8]);
    assert_eq!(layers[3]["expert_parameters"], 8 * per_expert);
    let text = stdout(&["inspect", "-m", path]);
    for word in [
        "[3, 4, 8]",
        "up to 3",
        "beside a feed-forward of width 24",
        "a state of 8",
        "null_experts of softmax",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(json(&["fit", "-m", path, "-o", "json"]).is_object());
}

#[test]
fn text_is_the_same_from_memory_and_from_disk() {
    let model = uneven();
    let run = [
        "run",
        "-m",
        arg(model.path()),
        "-p",
        "the cat",
        "-n",
        "12",
        "--temp",
        "0",
    ];
    let resident = stdout(&run);
    let streamed = stdout(&[&run[..], &["--mem-budget", "1MiB"]].concat());
    assert_eq!(resident, streamed);
    let watched = stdout(&[&run[..], &["--experts", "--layer", "0"]].concat());
    assert!(watched.contains("layer x expert"), "{watched}");
}

#[test]
fn traces_keep_null_picks_and_the_sizes_of_layers() {
    let model = uneven();
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| arg(&scratch.path().join(name)).to_owned();
    let (data, trace) = (at("text.txt"), at("trace.parquet"));
    fs::write(&data, "the quick brown fox jumps over the lazy dog").unwrap();
    let path = arg(model.path());
    let record = [
        "trace", "-m", path, "--data", &data, "-o", &trace, "--logits", "--norms",
    ];
    assert_eq!(stdout(&record), "");
    let stats = json(&["trace", "show", &trace, "-o", "json"]);
    assert_eq!(
        stats["meta"]["layer_experts"],
        serde_json::json!([5, 0, 6, 10])
    );
    assert_eq!(
        (&stats["meta"]["n_experts"], &stats["meta"]["n_null"]),
        (&10.into(), &2.into())
    );
    let first = &stats["layers"][0];
    let load: Vec<u64> = serde_json::from_value(first["load"].clone()).unwrap();
    assert_eq!(
        load.iter().sum::<u64>(),
        3 * stats["n_tokens"].as_u64().unwrap()
    );
    assert!(
        load[5..].iter().all(|n| *n == 0),
        "five ids in layer 0: {load:?}"
    );
    let weights: Vec<f64> = serde_json::from_value(first["mean_weight"].clone()).unwrap();
    assert_eq!(weights[3..5], [0.0, 0.0], "null picks weigh nothing");
    for more in [&[][..], &["-m", path, "--budgets", "20KiB,100%"]] {
        let replay = [&["trace", "replay", &trace], more].concat();
        assert!(stdout(&replay).contains("belady"));
    }
}

/// Attention in two experts, of which a token takes one.
fn of_attention() -> TinyFolder {
    let model = TinyMoe::default().configure(|config| {
        config.model_type = "cadre_moe".to_owned();
        config.attention.experts = Some(AttentionExperts {
            n_experts: 2,
            top_k: 1,
            eps: 1.0,
        });
    });
    model.build().unwrap()
}

/// Picks of each expert in the layers of what `logits --routing` says.
fn loads(routing: &serde_json::Value, n_experts: usize) -> Vec<Vec<u64>> {
    let layers = routing.as_array().unwrap().iter();
    let load = |layer: &serde_json::Value| {
        let picks: Vec<Vec<usize>> = serde_json::from_value(layer["experts"].clone()).unwrap();
        let mut load = vec![0; n_experts];
        picks.into_iter().flatten().for_each(|pick| load[pick] += 1);
        load
    };
    layers.map(load).collect()
}

/// Loads of all layers of statistics.
fn loads_of(stats: &serde_json::Value) -> Vec<Vec<u64>> {
    let layers = stats["layers"].as_array().unwrap().iter();
    let load = |layer: &serde_json::Value| serde_json::from_value(layer["load"].clone()).unwrap();
    layers.map(load).collect()
}

#[test]
fn experts_of_attention_are_shown_apart_and_not_planned_from() {
    let model = of_attention();
    let path = arg(model.path());
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| arg(&scratch.path().join(name)).to_owned();
    let (data, trace) = (at("text.txt"), at("trace.parquet"));
    fs::write(&data, "the quick brown fox jumps over the lazy dog").unwrap();

    // The tokens that are run are those that are traced: prompt and new tokens but the last.
    let run = [
        "run",
        "-m",
        path,
        "-p",
        "the cat sat",
        "-n",
        "9",
        "--temp",
        "0",
        "--experts",
    ];
    let ran = json(&[&run[..], &["-o", "json"]].concat());
    let numbers = |key: &str| -> Vec<u32> { serde_json::from_value(ran[key].clone()).unwrap() };
    let mut ids = [numbers("prompt_tokens"), numbers("tokens")].concat();
    let seen = ran["experts"]["n_tokens"].as_u64().unwrap() as usize;
    assert!(seen + 1 >= ids.len(), "{seen} of {}", ids.len());
    ids.truncate(seen);
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    let ids = ids.join(",");
    let logits = ["logits", "-m", path, "--tokens", &ids, "-o", "json"];
    let routing = json(&[&logits[..], &["--routing"]].concat());
    assert!(json(&logits).get("attention_routing").is_none());
    let (fed, attended) = (&routing["routing"], &routing["attention_routing"]);
    let weights: Vec<Vec<f64>> = serde_json::from_value(attended[1]["weights"].clone()).unwrap();
    // One of two by softmax: at least a half, over itself and 1.
    let possible = 0.5 / 1.5 - 1e-6..=0.5;
    assert!(weights.iter().flatten().all(|w| possible.contains(w)));
    assert_eq!(loads_of(&ran["experts"]), loads(fed, 8));
    let of_attention = &ran["experts"]["attention_experts"];
    assert_eq!(loads_of(of_attention), loads(attended, 2));
    let text = stdout(&run);
    assert!(text.contains("layer x expert of attention"), "{text}");

    let record = ["trace", "-m", path, "--data", &data, "-o", &trace];
    stdout(&[&record[..], &["--logits", "--norms"]].concat());
    let show = ["trace", "show", &trace, "-o", "json"];
    let both = json(&show);
    let apart = json(&[&show[..], &["--part", "attention"]].concat());
    assert_eq!(both["attention_experts"], apart);
    let n_tokens = both["n_tokens"].as_u64().unwrap();
    let n_picks = |stats: &serde_json::Value| -> Vec<u64> {
        let loads: Vec<Vec<u64>> = loads_of(stats);
        loads.iter().map(|load| load.iter().sum()).collect()
    };
    assert_eq!(
        (n_picks(&apart), &apart["n_tokens"]),
        (vec![n_tokens; 2], &n_tokens.into())
    );
    assert_eq!(n_picks(&both), [2 * n_tokens; 2]);
    assert_eq!(apart["meta"]["n_experts"], 2);
    assert!(apart["layers"][0]["mean_norm"][0].is_number());
    let text = stdout(&["trace", "show", &trace]);
    assert!(text.contains("Experts of the attention"), "{text}");
    let svg = at("a.svg");
    stdout(&[
        "trace",
        "show",
        &trace,
        "--part",
        "attention",
        "--svg",
        &svg,
    ]);
    let wrong = [
        "trace",
        "show",
        &trace,
        "--part",
        "attention",
        "--profile",
        &svg,
    ];
    assert!(failure(&wrong).1.contains("--profile"));

    // What is made of it is of the feed-forward's eight.
    assert!(stdout(&["trace", "replay", &trace]).contains("belady"));
    let plan = at("plan.json");
    let prune = ["plan", "prune", "-m", path, "--trace", &trace, "-o", &plan];
    stdout(&[&prune[..], &["--keep", "0.5", "--method", "frequency"]].concat());
    let plan: serde_json::Value = serde_json::from_str(&fs::read_to_string(plan).unwrap()).unwrap();
    for (layer, load) in plan["layers"]
        .as_array()
        .unwrap()
        .iter()
        .zip(loads_of(&both))
    {
        assert_eq!(layer["of"], 8);
        let kept: Vec<usize> = layer["experts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|expert| expert["from"][0].as_u64().unwrap() as usize)
            .collect();
        let least = kept.iter().map(|expert| load[*expert]).min().unwrap();
        let dropped = (0..8).filter(|expert| !kept.contains(expert));
        assert!(
            dropped
                .map(|expert| load[expert])
                .all(|load_of| load_of <= least)
        );
    }
}

#[test]
fn attention_experts_are_counted_and_streamed() {
    let model = of_attention();
    let path = arg(model.path());
    let parameters = json(&["inspect", "-m", path, "-o", "json"])["parameters"].clone();
    let unused = parameters["total"].as_u64().unwrap() - parameters["active"].as_u64().unwrap();
    // Two layers: six of eight experts, and half of four projections by 4 heads of queries and 2 of keys and values.
    assert_eq!(unused, 2 * (6 * 3 * 16 * 32 + 32 * 8 * (4 + 2)));
    let text = stdout(&["inspect", "-m", path]);
    assert!(
        text.contains("in 2 experts of which a token takes 1"),
        "{text}"
    );
    let run = [
        "run", "-m", path, "-p", "the cat", "-n", "12", "--temp", "0",
    ];
    let streamed = stdout(&[&run[..], &["--mem-budget", "1MiB"]].concat());
    assert_eq!(stdout(&run), streamed);
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("m.gguf");
    let (_, errors) = failure(&["convert", "-m", path, "-o", arg(&file)]);
    assert!(errors.contains("attention cut into 2 experts"), "{errors}");
}

/// One router before the layers.
fn decoupled() -> TinyFolder {
    let model = TinyMoe::default().n_layers(4).configure(|config| {
        TinyMoe::decouple(config);
        let router = config.moe.decoupled_router.as_mut().unwrap();
        (router.intermediate_size, router.per_layer) = (24, false);
    });
    model.build().unwrap()
}

/// Tokens take the same experts in every layer, which is known before the first of them.
#[test]
fn a_router_before_the_layers_is_shown_traced_and_streamed() {
    let model = decoupled();
    let path = arg(model.path());
    let text = stdout(&["inspect", "-m", path]);
    assert!(
        text.contains("width 16 before the layers; the same picks for all layers"),
        "{text}"
    );
    let report = json(&["inspect", "-m", path, "-o", "json"]);
    assert_eq!(report["decoupled_router"]["width"], 16);
    // 4 layers of 2 heads, as the default has them, and the router's one: keys and values in f32.
    assert_eq!(report["kv_bytes_per_token"], 4 * 2 * (4 * 2 * 8 + 16));
    let run = [
        "run", "-m", path, "-p", "the cat", "-n", "12", "--temp", "0",
    ];
    let resident = stdout(&run);
    for more in [
        &["--mem-budget", "1MiB"][..],
        &["--mem-budget", "1MiB", "--read-ahead", "exact"],
        &["--mem-budget", "1MiB", "--read-ahead", "off"],
    ] {
        assert_eq!(stdout(&[&run[..], more].concat()), resident, "{more:?}");
    }
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| arg(&scratch.path().join(name)).to_owned();
    let (data, trace) = (at("text.txt"), at("trace.parquet"));
    fs::write(&data, "the quick brown fox jumps over the lazy dog").unwrap();
    stdout(&["trace", "-m", path, "--data", &data, "-o", &trace]);
    let stats = json(&["trace", "show", &trace, "-o", "json"]);
    let loads: Vec<_> = stats["layers"].as_array().unwrap().iter().collect();
    assert_eq!(loads.len(), 4);
    assert!(loads.iter().all(|layer| layer["load"] == loads[0]["load"]));
    let (_, errors) = failure(&["convert", "-m", path, "-o", &at("m.gguf")]);
    assert!(
        errors.contains("a router that runs before the model"),
        "{errors}"
    );
    let folder = at("copy");
    stdout(&["convert", "-m", path, "-o", &folder]);
    let copied = [&["run", "-m", &folder], &run[3..]].concat();
    assert_eq!(stdout(&copied), resident);
}

#[test]
fn who_cannot_foresee_is_not_asked_to() {
    let usual = TinyMoe::default().build().unwrap();
    let run = |path: &str, who: &str| {
        let budget = ["--mem-budget", "1MiB", "--read-ahead", who];
        failure(&[&["run", "-m", path, "-p", "a", "-n", "1"][..], &budget].concat()).1
    };
    let said = run(arg(usual.path()), "exact");
    assert!(said.contains("wait for its layers"), "{said}");
    let said = run(arg(decoupled().path()), "gate");
    assert!(said.contains("runs before the layers"), "{said}");
}

#[test]
fn no_gguf_file_is_made_of_it() {
    let model = uneven();
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("m.gguf");
    let (_, errors) = failure(&["convert", "-m", arg(model.path()), "-o", arg(&file)]);
    for word in [
        "[3, 4, 8]",
        "null experts",
        "learned coefficients",
        "from layer to layer",
    ] {
        assert!(errors.contains(word), "{word}: {errors}");
    }
    assert!(!file.exists());
}
