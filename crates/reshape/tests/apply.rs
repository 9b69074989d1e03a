//! Applying plans: what is kept is copied to the byte in every layout, the rest follows, and unfinished work is gone on with.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use cadre_checkpoint::{
    Checkpoint, CheckpointError, Conversion, ConvertOptions, ConvertTo, Dtype, QuantizeOptions,
    TargetDtype, tensor_specs,
};
use cadre_engine::{LoadOptions, Logits, NoObserver, SessionOptions, load};
use cadre_reshape::{Applying, apply, plan_json, shape_of};
use cadre_routing::plan::{ModelShape, Plan, PlanExpert};
use cadre_testkit::{TinyMoe, golden_dir};

const GGUF: ConvertTo = ConvertTo::Gguf {
    max_part_bytes: None,
};
const FOLDER: ConvertTo = ConvertTo::Folder {
    max_shard_bytes: 20_000,
};

fn target(source: &Checkpoint) -> ConvertTo {
    if source.is_gguf() { GGUF } else { FOLDER }
}

/// A plan whose layers keep what `kept` gives for their number of experts.
fn plan_of(shape: &ModelShape, kept: impl Fn(usize, usize) -> Vec<u16>) -> Plan {
    let experts = shape.layers.iter().enumerate().map(|(at, (_, of))| {
        let ids = kept(at, *of).into_iter();
        ids.map(PlanExpert::kept).collect()
    });
    Plan::of(shape, "test", experts)
}

fn all(shape: &ModelShape) -> Plan {
    plan_of(shape, |_, of| (0..of as u16).collect())
}

/// The last experts of every group, as few as the model can be left with.
fn fewest(shape: &ModelShape) -> Plan {
    let n_groups = shape.groups.n.max(1);
    let each = shape.least() / n_groups;
    plan_of(shape, |_, of| {
        let size = of / n_groups;
        let groups = (0..n_groups).flat_map(|group| (group + 1) * size - each..(group + 1) * size);
        groups.map(|id| id as u16).collect()
    })
}

fn write(source: &Checkpoint, plan: &Plan, path: &Path, pad: bool) -> Checkpoint {
    let options = Applying {
        target: target(source),
        pad,
    };
    let conversion = apply(source, plan, options).unwrap();
    let paths = conversion.write(path, &mut |_| true).unwrap();
    let made = Checkpoint::open(&paths[0]).unwrap();
    made.expect_exactly(&tensor_specs(made.config())).unwrap();
    made
}

fn output(folder: &Path, source: &Checkpoint, name: &str) -> PathBuf {
    folder.join(if source.is_gguf() {
        format!("{name}.gguf")
    } else {
        name.to_owned()
    })
}

/// All golden checkpoints with experts: folders and GGUF files.
fn goldens() -> Vec<Checkpoint> {
    let mut found = Vec::new();
    for family in std::fs::read_dir(golden_dir()).unwrap() {
        let Ok(entries) = std::fs::read_dir(family.unwrap().path()) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            let file = path.join("model.gguf");
            if path.join("config.json").is_file() {
                found.push(path);
            } else if file.is_file() {
                found.push(file);
            }
        }
    }
    found.sort();
    let opened = found.iter().map(|path| Checkpoint::open(path).unwrap());
    let with_experts = opened.filter(|one| !one.config().moe.layers.is_empty());
    let list: Vec<Checkpoint> = with_experts.collect();
    assert!(list.len() > 40, "{}", list.len());
    list
}

/// The canonical name with another expert, if it is about one.
fn of_expert(name: &str) -> Option<(usize, usize, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (expert, part) = rest.strip_prefix("mlp.experts.")?.split_once('.')?;
    Some((layer.parse().ok()?, expert.parse().ok()?, part))
}

/// Every tensor of `made` is the one of `source` that the plan says, to the byte.
fn assert_is_cut(source: &Checkpoint, plan: &Plan, made: &Checkpoint) {
    let what = source.origin();
    let kept = |layer: usize| {
        let found = plan.layers.iter().find(|one| one.layer == layer).unwrap();
        let ids = found.experts.iter().map(|one| usize::from(one.from[0]));
        ids.collect::<Vec<usize>>()
    };
    for name in made.tensor_names() {
        let ours = made.tensor(name).unwrap();
        if let Some((layer, expert, part)) = of_expert(name) {
            let old = kept(layer)[expert];
            let theirs = format!("model.layers.{layer}.mlp.experts.{old}.{part}");
            let theirs = source.tensor(&theirs).unwrap();
            assert_eq!(ours.dtype, theirs.dtype, "{what}: {name}");
            assert!(ours.bytes == theirs.bytes, "{what}: {name}");
            assert_eq!(ours.to_f32(), theirs.to_f32(), "{what}: {name}");
            continue;
        }
        let theirs = source.tensor(name).unwrap();
        if name == "model.router.head.weight" {
            assert_head_is_cut(source, plan, (&ours.to_f32(), &theirs.to_f32()));
            continue;
        }
        let layer = name
            .split('.')
            .nth(2)
            .and_then(|layer| layer.parse::<usize>().ok());
        if ours.shape == theirs.shape || !name.contains(".mlp.gate.") {
            assert!(ours.bytes == theirs.bytes, "{what}: {name}");
            continue;
        }
        let layer = layer.unwrap();
        let (ours_f32, theirs_f32) = (ours.to_f32(), theirs.to_f32());
        let cols: usize = ours.shape.iter().skip(1).product();
        let n_old = source.config().n_experts_in(layer);
        let null = n_old..theirs.shape[0];
        let rows: Vec<usize> = kept(layer).into_iter().chain(null).collect();
        assert_eq!(rows.len(), ours.shape[0], "{what}: {name}");
        for (row, old) in rows.iter().enumerate() {
            assert_eq!(
                ours_f32[row * cols..(row + 1) * cols],
                theirs_f32[old * cols..(old + 1) * cols],
                "{what}: {name}, row {row}"
            );
        }
    }
}

/// The router before the layers has the rows of the experts that are left, of one layer after the other.
fn assert_head_is_cut(source: &Checkpoint, plan: &Plan, (ours, theirs): (&[f32], &[f32])) {
    let moe = &source.config().moe;
    let router = moe.decoupled_router.unwrap();
    let n_layers = if router.per_layer {
        plan.layers.len()
    } else {
        1
    };
    let (mut rows, mut first) = (Vec::new(), 0);
    for layer in &plan.layers[..n_layers] {
        let kept = layer.experts.iter().map(|one| usize::from(one.from[0]));
        rows.extend(
            kept.chain(layer.of..layer.of + moe.n_null)
                .map(|id| first + id),
        );
        first += layer.of + moe.n_null;
    }
    let d = router.hidden_size;
    assert_eq!((ours.len(), theirs.len()), (rows.len() * d, first * d));
    for (ours, row) in ours.chunks_exact(d).zip(rows) {
        assert_eq!(ours, &theirs[row * d..(row + 1) * d]);
    }
}

/// Layers that pick alike have to keep alike.
#[test]
fn one_router_for_all_layers_keeps_the_same_experts_in_all() {
    let source = golden_dir().join("cadre_moe/decoupled");
    let source = Checkpoint::open(&source).unwrap();
    let plan = plan_of(&shape_of(&source), |at, _| vec![at as u16, 4, 5]);
    let options = Applying {
        target: FOLDER,
        pad: false,
    };
    let error = apply(&source, &plan, options).unwrap_err().to_string();
    assert!(
        error.contains("one router picks the same experts in all layers"),
        "{error}"
    );
}

#[test]
fn keeping_all_experts_changes_no_byte_of_any_golden() {
    let folder = tempfile::tempdir().unwrap();
    for (at, source) in goldens().iter().enumerate() {
        let plan = all(&shape_of(source));
        assert!(plan.is_identity());
        let path = output(folder.path(), source, &at.to_string());
        let made = write(source, &plan, &path, false);
        assert_eq!(made.digest(), source.digest(), "{}", source.origin());
        assert_eq!(made.config(), source.config(), "{}", source.origin());
        assert_is_cut(source, &plan, &made);
        match source.is_gguf() {
            true => {
                let entries = |one: &Checkpoint| one.gguf().unwrap().entries().to_vec();
                assert_eq!(entries(&made), entries(source));
            }
            false => {
                let config = |one: &Checkpoint| one.file_text("config.json").unwrap();
                assert_eq!(config(&made), config(source));
            }
        }
    }
}

#[test]
fn a_gguf_file_with_all_experts_is_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = TinyMoe::default().build().unwrap();
    let options = ConvertOptions {
        target: GGUF,
        dtype: TargetDtype::Is(Dtype::Q8_0),
        allow_differences: false,
        quantize: QuantizeOptions::default(),
    };
    let (a, b) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
    let tiny = tiny.open().unwrap();
    let conversion = Conversion::plan(&tiny, "tiny", options).unwrap();
    conversion.write(&a, &mut |_| true).unwrap();
    let source = Checkpoint::open(&a).unwrap();
    write(&source, &all(&shape_of(&source)), &b, false);
    assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap());
}

#[test]
fn every_layout_of_every_golden_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let mut n_cut = 0;
    for (at, source) in goldens().iter().enumerate() {
        let shape = shape_of(source);
        let plan = fewest(&shape);
        n_cut += usize::from(!plan.is_identity());
        let path = output(folder.path(), source, &at.to_string());
        let made = write(source, &plan, &path, false);
        assert_eq!(made.config().moe.n_experts_in_all(), plan.n_kept());
        assert_is_cut(source, &plan, &made);
        if !plan.is_identity() {
            assert_ne!(made.digest(), source.digest());
            let size = |one: &Checkpoint| one.data_bytes();
            assert!(size(&made) < size(source), "{}", source.origin());
        }
    }
    assert!(n_cut > 35, "{n_cut}");
}

#[test]
fn layers_may_keep_different_numbers() {
    let folder = tempfile::tempdir().unwrap();
    for (at, source) in goldens().iter().enumerate() {
        let shape = shape_of(source);
        // With one router for all layers these keep the same.
        let router = source.config().moe.decoupled_router;
        if shape.layers.len() < 2 || router.is_some_and(|router| !router.per_layer) {
            continue;
        }
        // All of the first layer, the fewest of the others, in falling order where that is free.
        let few = fewest(&shape);
        let plan = plan_of(&shape, |at, of| match at {
            0 => (0..of as u16).collect(),
            _ => {
                let ids = few.layers[at].experts.iter().map(|one| one.from[0]);
                match shape.groups.n {
                    1 => ids.rev().collect(),
                    _ => ids.collect(),
                }
            }
        });
        let path = output(folder.path(), source, &at.to_string());
        let made = write(source, &plan, &path, false);
        let counts: Vec<usize> = plan.layers.iter().map(|one| one.experts.len()).collect();
        assert_eq!(made.config().moe.counts().collect::<Vec<_>>(), counts);
        assert_is_cut(source, &plan, &made);
    }
}

#[test]
fn padding_needs_a_bias_and_makes_layers_equal() {
    let folder = tempfile::tempdir().unwrap();
    let uneven = |source: &Checkpoint| {
        let shape = shape_of(source);
        let few = fewest(&shape);
        plan_of(&shape, |at, of| match at {
            0 => (0..of as u16).collect(),
            _ => few.layers[at]
                .experts
                .iter()
                .map(|one| one.from[0])
                .collect(),
        })
    };
    let golden = |name: &str| Checkpoint::open(&golden_dir().join(name)).unwrap();
    let plain = golden("qwen3_moe/plain");
    let options = Applying {
        target: FOLDER,
        pad: true,
    };
    let error = apply(&plain, &uneven(&plain), options).unwrap_err();
    assert!(error.to_string().contains("no bias"), "{error}");
    for (at, name) in ["gpt_oss/bf16", "gpt_oss/mxfp4"].iter().enumerate() {
        let source = golden(name);
        let plan = uneven(&source);
        let out = |kind: &str| folder.path().join(format!("{at}-{kind}"));
        let made = write(&source, &plan, &out("padded"), true);
        let moe = &made.config().moe;
        assert!(moe.uneven.is_empty() && moe.n_experts == source.config().moe.n_experts);
        let layer = plan.layers[1].layer;
        let last = moe.n_experts - 1;
        let down = format!("model.layers.{layer}.mlp.experts.{last}.down_proj.weight");
        let values = made.tensor(&down).unwrap().to_f32();
        assert!(values.iter().all(|v| *v == 0.0));
        let uneven = write(&source, &plan, &out("uneven"), false);
        assert_eq!(logits(&made), logits(&uneven), "{name}");
    }
}

/// Of a few tokens.
fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let model = load(checkpoint, &LoadOptions::default()).unwrap();
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let tokens = [3, 1, 4, 1, 5, 9, 2, 6];
    let all = model.forward(&mut session, &tokens, Logits::All, &mut NoObserver);
    all.unwrap().to_vec()
}

#[test]
fn stopped_work_is_gone_on_with_and_another_plan_begins_anew() {
    let folder = tempfile::tempdir().unwrap();
    let home = TinyMoe::default().build().unwrap();
    let tiny = home.open().unwrap();
    let gguf = folder.path().join("source.gguf");
    let options = ConvertOptions {
        target: GGUF,
        dtype: TargetDtype::Keep,
        allow_differences: false,
        quantize: QuantizeOptions::default(),
    };
    let conversion = Conversion::plan(&tiny, "tiny", options).unwrap();
    conversion.write(&gguf, &mut |_| true).unwrap();
    for source in [tiny, Checkpoint::open(&gguf).unwrap()] {
        let shape = shape_of(&source);
        let half = |from: u16| plan_of(&shape, |_, _| (from..from + 4).collect());
        let (first, second) = (half(0), half(4));
        assert_ne!(plan_json(&first), plan_json(&second));
        let options = Applying {
            target: target(&source),
            pad: false,
        };
        let path = output(folder.path(), &source, "out");
        let stop = |plan: &Plan| {
            let conversion = apply(&source, plan, options).unwrap();
            let half = conversion.n_bytes() / 2;
            let error = conversion
                .write(&path, &mut |done| done < half)
                .unwrap_err();
            assert!(matches!(error, CheckpointError::Interrupted { .. }));
            assert!(!path.exists());
        };
        // The headers of both outputs are the same.
        stop(&first);
        let made = write(&source, &second, &path, false);
        assert_is_cut(&source, &second, &made);
        drop(made);
        let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
        stop(&second);
        let made = write(&source, &second, &path, false);
        assert_is_cut(&source, &second, &made);
        drop(made);
        let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let home = TinyMoe::default().build().unwrap();
    let tiny = home.open().unwrap();
    let shape = shape_of(&tiny);
    let refused = |plan: &Plan, target: ConvertTo, words: &str| {
        let error = apply(&tiny, plan, Applying { target, pad: false }).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    };
    let plan = all(&shape);
    let mut other = plan.clone();
    other.model.digest = "0".repeat(64);
    refused(&other, FOLDER, "another model");
    let mut twice = plan.clone();
    twice.layers[1].experts[3] = PlanExpert::kept(0);
    refused(
        &twice,
        FOLDER,
        "layer 1, entry 3: expert 0 is in entry 0 already",
    );
    let mut few = plan.clone();
    few.layers[0].experts.truncate(1);
    refused(
        &few,
        FOLDER,
        "layer 0: keeps 1 of 8 experts, but a token is sent to 2",
    );
    refused(&plan, GGUF, "a folder stays one");
}
