//! Formats by expert on the embedded model: the limit holds, sizes are those of files, and ranking by measured sensitivity
//! beats chance and its own reverse.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use cadre_checkpoint::{
    Checkpoint, Conversion, ConvertOptions, ConvertTo, Dtype, QuantizeOptions, TargetDtype,
};
use cadre_engine::LoadOptions;
use cadre_engine::eval::Document;
use cadre_reshape::bits::{
    BitsOptions, Formats, Sensitivity, Trial, Trials, Unit, choose, plan, relative_error,
};
use cadre_reshape::{Applying, apply, shape_of};
use cadre_testkit::Random;

const SEEDS: u64 = 5;
/// Tokens that formats are judged by.
const JUDGED: usize = 300;
const GGUF: ConvertTo = ConvertTo::Gguf {
    max_part_bytes: None,
};
/// Blocks of 32, which rows of 192 and 96 are whole numbers of; the first as stored.
const FORMATS: [Option<Dtype>; 3] = [None, Some(Dtype::Q8_0), Some(Dtype::Q4_0)];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The model with all of its experts in one format.
fn write(source: &Checkpoint, format: Option<Dtype>, folder: &Path) -> PathBuf {
    let mut quantize = QuantizeOptions::default();
    for layer in source.config().moe_layers() {
        for expert in 0..source.config().n_experts_in(layer) {
            if let Some(format) = format {
                quantize.experts.insert((layer, expert), format);
            }
        }
    }
    let options = ConvertOptions {
        target: GGUF,
        dtype: TargetDtype::Keep,
        allow_differences: false,
        quantize,
    };
    let path = folder.join(format!("{}.gguf", format.map_or("stored", Dtype::name)));
    let conversion = Conversion::plan(source, "nano", options).unwrap();
    conversion.write(&path, &mut |_| true).unwrap();
    path
}

#[test]
fn what_is_measured_beats_chance_and_keeps_the_limit() {
    let source = Checkpoint::open(&root().join("models/nano")).unwrap();
    let (shape, folder) = (shape_of(&source), tempfile::tempdir().unwrap());
    let text = std::fs::read_to_string(root().join("recipes/data/sample.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let tokens = source.tokenizer().unwrap();
    let tokens = tokens.encode(first["text"].as_str().unwrap()).unwrap();
    let documents = [Document {
        domain: "task".to_owned(),
        tokens: tokens.into_iter().take(JUDGED).collect(),
    }];
    let paths = FORMATS.map(|format| write(&source, format, folder.path()));
    let load = LoadOptions {
        in_place: true,
        ..LoadOptions::default()
    };
    let go_on = &mut |_: u64| ControlFlow::Continue(());
    let mut trials = Trials::new(paths.to_vec(), (&documents, JUDGED), load, go_on).unwrap();

    // The limit: half of what it costs to have all experts in the fewest bits.
    let uniform = |format: usize| -> Formats {
        let layers = shape.layers.iter();
        layers.map(|(_, n)| vec![format; *n]).collect()
    };
    let (stored, high, low) = (
        trials.nll(&uniform(0)).unwrap(),
        trials.nll(&uniform(1)).unwrap(),
        trials.nll(&uniform(2)).unwrap(),
    );
    let max_increase = 0.5 * (low.max(high) - stored).exp_m1();
    println!("stored {stored:.4}, q8_0 {high:.4}, q4_0 {low:.4}");
    let options = BitsOptions {
        max_increase,
        unit: Unit::Expert,
        sensitivity: Sensitivity::Measured,
    };
    let chosen = choose(&shape, FORMATS.len(), &options, &mut trials).unwrap();
    assert_eq!(chosen.between, [1, 2]);
    assert!(chosen.increase() <= max_increase, "{}", chosen.increase());
    let [n, all] = chosen.lowered;
    assert!(n > 0 && n < all, "{n} of {all}");
    println!(
        "{n} of {all} experts in q4_0: {:+.5} of {max_increase:.5}",
        chosen.increase()
    );

    // The same number of experts, chosen otherwise.
    let places: Vec<(usize, usize)> = (0..shape.layers.len())
        .flat_map(|at| (0..shape.layers[at].1).map(move |expert| (at, expert)))
        .collect();
    let mut lowered = |order: &[usize]| {
        let mut formats = uniform(1);
        for unit in &order[..all / 2] {
            let (layer, expert) = places[*unit];
            formats[layer][expert] = 2;
        }
        trials.nll(&formats).unwrap()
    };
    let mut order: Vec<usize> = (0..all).collect();
    let sensitivity = |unit: &usize| chosen.sensitivities[*unit];
    order.sort_by(|a, b| sensitivity(a).total_cmp(&sensitivity(b)));
    let best = lowered(&order);
    order.reverse();
    let worst = lowered(&order);
    let random: Vec<f64> = (0..SEEDS)
        .map(|seed| {
            let mut random = Random::new(seed + 1);
            let mut order: Vec<usize> = (0..all).collect();
            (1..all)
                .rev()
                .for_each(|at| order.swap(at, random.below(at + 1)));
            lowered(&order)
        })
        .collect();
    let mean = random.iter().sum::<f64>() / SEEDS as f64;
    let squares: f64 = random.iter().map(|v| (v - mean).powi(2)).sum();
    let deviation = (squares / (SEEDS as f64 - 1.0)).sqrt();
    println!(
        "half in q4_0: by sensitivity {best:.5}, random {mean:.5} +- {deviation:.5}, reversed {worst:.5}"
    );
    assert!(best < mean - deviation && mean < worst);

    // The file: formats and bytes as planned, and a model that loads.
    let names = FORMATS.map(|format| format.unwrap_or(Dtype::Bf16));
    let plan = plan(&shape, &chosen, &names, BTreeMap::new());
    let options = Applying {
        target: GGUF,
        pad: false,
    };
    let path = folder.path().join("chosen.gguf");
    let conversion = apply(&source, &plan, options).unwrap();
    conversion.write(&path, &mut |_| true).unwrap();
    let made = Checkpoint::open(&path).unwrap();
    let expert = |format: Dtype| 3 * format.n_bytes(192 * 96).unwrap() as u64;
    let experts = (all - n) as u64 * expert(Dtype::Q8_0) + n as u64 * expert(Dtype::Q4_0);
    let beside = source.data_bytes() - all as u64 * expert(Dtype::Bf16);
    // Routers and norms are written in f32.
    assert!(made.data_bytes() >= beside + experts);
    let whole = Checkpoint::open(&paths[1]).unwrap().data_bytes();
    assert_eq!(
        whole - made.data_bytes(),
        n as u64 * (expert(Dtype::Q8_0) - expert(Dtype::Q4_0))
    );
    let at = chosen.formats[0].iter().position(|format| *format == 2);
    if let Some(expert) = at {
        let low = Checkpoint::open(&paths[2]).unwrap();
        assert_eq!(relative_error([&made, &low], 0, expert).unwrap(), 0.0);
        assert!(relative_error([&source, &low], 0, expert).unwrap() > 0.01);
    }
}
