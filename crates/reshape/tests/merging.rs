//! What merging must keep and what it must gain, on models that are made for it: copies with their neurons in another order,
//! usage that differs between layers, groups at random; and the rank of what comes out.
#![expect(clippy::unwrap_used, reason = "tests")]

mod task;

use std::borrow::Cow;
use std::path::Path;

use cadre_checkpoint::{Checkpoint, ConvertTo, Dtype, FolderContents, TensorData, write_folder};
use cadre_engine::{Logits, NoObserver, SessionOptions, load};
use cadre_reshape::{
    Amount, Applying, MergeMethod, MergeOptions, Scope, Similarity, apply, merge, shape_of,
};
use cadre_routing::plan::{Plan, PlanExpert};
use cadre_testkit::{Random, TinyMoe};
use task::{TASKS, cost, halves, moments, options, root, usage};

/// Writes `source` again, its tensors changed by `change`, which is told each name.
fn changed(
    source: &Checkpoint,
    folder: &Path,
    mut change: impl FnMut(&str, Vec<f32>) -> Vec<f32>,
) -> Checkpoint {
    let tensors: Vec<TensorData<'static>> = source
        .tensor_names()
        .map(|name| {
            let view = source.tensor(name).unwrap();
            TensorData {
                name: name.to_owned(),
                shape: view.shape.to_vec(),
                values: Cow::Owned(change(name, view.to_f32())),
            }
        })
        .collect();
    let tokenizer = source.file_text("tokenizer.json").unwrap();
    let contents = FolderContents {
        config: source.config(),
        tensors: &tensors,
        dtype: Dtype::F32,
        tokenizer_json: tokenizer.as_deref(),
    };
    write_folder(folder, &contents).unwrap();
    Checkpoint::open(folder).unwrap()
}

/// Expert and part of a tensor of a routed expert, with the name as that of expert `other`.
fn expert_of(name: &str) -> Option<(usize, String, String)> {
    let (layer, rest) = name.split_once(".mlp.experts.")?;
    let (expert, part) = rest.split_once('.')?;
    Some((expert.parse().ok()?, layer.to_owned(), part.to_owned()))
}

/// `values`, whose neurons are rows, or columns in `down_proj`, in the order `order`.
fn reordered(part: &str, values: &[f32], order: &[usize]) -> Vec<f32> {
    let width = order.len();
    match part {
        "down_proj.weight" => {
            let rows = values.chunks_exact(width);
            rows.flat_map(|row| order.iter().map(|from| row[*from]))
                .collect()
        }
        _ => {
            let n_in = values.len() / width;
            let row = |from: &usize| &values[from * n_in..][..n_in];
            order.iter().flat_map(row).copied().collect()
        }
    }
}

/// The upper half of the experts become copies of the lower half with their neurons in another order and noise of the size
/// `noise` beside the values'; rows of the router stay.
fn planted(source: &Checkpoint, folder: &Path, noise: f32) -> Checkpoint {
    let moe = source.config().moe.clone();
    let (half, width) = (moe.n_experts / 2, moe.intermediate_size);
    let mut random = Random::new(11);
    changed(source, folder, |name, values| {
        let Some((expert, layer, part)) = expert_of(name).filter(|(expert, ..)| *expert >= half)
        else {
            return values;
        };
        let twin = format!("{layer}.mlp.experts.{}.{part}", expert - half);
        let twin = source.tensor(&twin).unwrap().to_f32();
        // The same order for the three matrices of an expert; 5 has no divisor in common with the width.
        let order: Vec<usize> = (0..width).map(|i| (i * 5 + expert) % width).collect();
        let size = (twin.iter().map(|v| v * v).sum::<f32>() / twin.len() as f32).sqrt();
        let mut copy = reordered(&part, &twin, &order);
        let off = random.values(copy.len(), noise * size);
        copy.iter_mut().zip(off).for_each(|(v, n)| *v += n);
        copy
    })
}

/// Every expert of the lower half merged with its copy in the upper one, rows of the router kept.
fn pairs(checkpoint: &Checkpoint, align: bool) -> Plan {
    let shape = shape_of(checkpoint);
    let experts = shape.layers.iter().map(|(_, of)| {
        let half = *of as u16 / 2;
        (0..half)
            .map(|id| PlanExpert {
                from: vec![id, id + half],
                align,
                ..PlanExpert::kept(id)
            })
            .collect()
    });
    let mut plan = Plan::of(&shape, "test", experts);
    for layer in &mut plan.layers {
        layer.keep_rows = true;
    }
    plan
}

fn applied(checkpoint: &Checkpoint, plan: &Plan, folder: &Path) -> Checkpoint {
    let options = Applying {
        target: ConvertTo::Folder {
            max_shard_bytes: 1 << 30,
        },
        pad: false,
    };
    let conversion = apply(checkpoint, plan, options).unwrap();
    let paths = conversion.write(folder, &mut |_| true).unwrap();
    Checkpoint::open(&paths[0]).unwrap()
}

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let model = load(checkpoint, &options()).unwrap();
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let tokens: Vec<u32> = (0..48).map(|at| (at * 37 + 5) % 384).collect();
    let read = model.forward(&mut session, &tokens, Logits::All, &mut NoObserver);
    read.unwrap().to_vec()
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    let pairs = a.iter().zip(b);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn copies_in_another_order_are_recovered_with_alignment_and_only_then() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = TinyMoe::default().build().unwrap().open().unwrap();
    for (at, noise) in [0.0, 1e-4].into_iter().enumerate() {
        let path = |name: &str| folder.path().join(format!("{name}-{at}"));
        let twins = planted(&tiny, &path("twins"), noise);
        let before = logits(&twins);
        let merged = |align, name| {
            let made = applied(&twins, &pairs(&twins, align), &path(name));
            farthest(&before, &logits(&made))
        };
        let (aligned, unaligned) = (merged(true, "aligned"), merged(false, "unaligned"));
        println!("noise {noise}: {aligned} aligned, {unaligned} unaligned");
        // Copies without noise are found exactly, so that their mean is themselves but for rounding.
        let bound = if noise > 0.0 { 1e-3 } else { 1e-5 };
        assert!(aligned < bound && unaligned > 0.05, "{aligned} {unaligned}");
    }
}

fn merging(share: f64, scope: Scope) -> MergeOptions {
    MergeOptions {
        amount: Amount::Share(share),
        scope,
        similarity: Similarity::Cosine,
        keep_rows: true,
        align: None,
    }
}

/// Layers whose usage is skewed.
const SKEWED: [usize; 2] = [2, 4];

/// In two layers of six, half of the experts have router rows that are three times those of the others. Logits there are
/// mostly negative, so that these are hardly picked, while other layers use all of theirs. A number of groups for each layer
/// by its usage is then worth more than the same number in all.
#[test]
fn groups_by_usage_cost_less_than_the_same_number_in_all_layers() {
    let folder = tempfile::tempdir().unwrap();
    let nano = Checkpoint::open(&root().join("models/nano")).unwrap();
    let skewed = changed(&nano, &folder.path().join("skewed"), |name, mut values| {
        let layer = name.strip_prefix("model.layers.");
        let layer = layer.and_then(|rest| rest.strip_suffix(".mlp.gate.weight"));
        if layer.is_some_and(|layer| SKEWED.contains(&layer.parse().unwrap())) {
            let half = values.len() / 2;
            let (upper, lower) = values.split_at_mut(half);
            let pairs = lower.iter_mut().zip(upper);
            pairs.for_each(|(low, up)| *low = 3.0 * *up);
        }
        values
    });
    let shape = shape_of(&skewed);
    let model = load(&skewed, &options()).unwrap();
    let mut gained = Vec::new();
    for domain in TASKS {
        let [record, judge] = halves(&skewed, domain);
        let path = folder.path().join(format!("{domain}.parquet"));
        let usage = usage(&skewed, &*model, &record, &path);
        for at in SKEWED {
            let picks = &usage.layers[at].picks;
            let lower: u64 = picks[picks.len() / 2..].iter().sum();
            let part = lower as f64 / picks.iter().sum::<u64>() as f64;
            assert!(part < 0.4, "{domain}: {part} of the picks in layer {at}");
        }
        let run = |scope| {
            let plan = merge(&shape, &usage, MergeMethod::MSmoe, &merging(0.5, scope)).unwrap();
            let counts: Vec<usize> = plan.layers.iter().map(|one| one.experts.len()).collect();
            (cost(&skewed, &plan, &judge), counts)
        };
        let ((uniform, same), (adaptive, counts)) = (run(Scope::Layer), run(Scope::Global));
        println!("{domain}: {uniform:.3} with {same:?}, {adaptive:.3} with {counts:?}");
        assert_eq!(same.iter().sum::<usize>(), counts.iter().sum::<usize>());
        gained.push(uniform - adaptive);
    }
    let (mean, deviation) = moments(&gained);
    let error = deviation / (gained.len() as f64).sqrt();
    assert!(mean > error, "{gained:?}");
}

#[test]
fn grouping_by_routing_beats_uniform_means_of_random_groups() {
    let folder = tempfile::tempdir().unwrap();
    let nano = Checkpoint::open(&root().join("models/nano")).unwrap();
    let shape = shape_of(&nano);
    let model = load(&nano, &options()).unwrap();
    let [record, judge] = halves(&nano, "german");
    let usage = usage(&nano, &*model, &record, &folder.path().join("t.parquet"));
    let options = merging(0.5, Scope::Layer);
    let best = merge(&shape, &usage, MergeMethod::MSmoe, &options).unwrap();
    let best_cost = cost(&nano, &best, &judge);
    let random: Vec<f64> = (1..=5)
        .map(|seed| {
            let mut random = Random::new(seed);
            let mut plan = best.clone();
            for layer in &mut plan.layers {
                let mut ids: Vec<u16> = (0..layer.of as u16).collect();
                for at in (1..ids.len()).rev() {
                    ids.swap(at, random.below(at + 1));
                }
                let groups = layer.experts.len();
                layer.experts = (0..groups)
                    .map(|group| PlanExpert {
                        from: ids.iter().skip(group).step_by(groups).copied().collect(),
                        ..PlanExpert::kept(0)
                    })
                    .collect();
            }
            cost(&nano, &plan, &judge)
        })
        .collect();
    let (mean, deviation) = moments(&random);
    println!("m-smoe {best_cost:.3}, random groups {mean:.3} +- {deviation:.3}");
    assert!(best_cost < mean - deviation, "{best_cost} {random:?}");
}

/// `sum s^2 / max s^2` of the singular values of a matrix `[n_out, n_in]`.
fn stable_rank(values: &[f32], n_in: usize) -> f64 {
    let all: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
    // Power iteration on W^T W.
    let (mut x, mut largest) = (vec![1.0f64; n_in], 0.0);
    for _ in 0..60 {
        let mut next = vec![0.0; n_in];
        for row in values.chunks_exact(n_in) {
            let y: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum();
            let pairs = next.iter_mut().zip(row);
            pairs.for_each(|(n, w)| *n += f64::from(*w) * y);
        }
        largest = next.iter().map(|v| v * v).sum::<f64>().sqrt();
        x = next.iter().map(|v| v / largest).collect();
    }
    all / largest
}

/// Figure 4 of the paper: what comes out of a merge has no higher rank than what went into it.
#[test]
fn merging_does_not_raise_the_stable_rank() {
    let folder = tempfile::tempdir().unwrap();
    let nano = Checkpoint::open(&root().join("models/nano")).unwrap();
    let shape = shape_of(&nano);
    let model = load(&nano, &options()).unwrap();
    let [record, _] = halves(&nano, "german");
    let usage = usage(&nano, &*model, &record, &folder.path().join("t.parquet"));
    let options = merging(0.5, Scope::Layer);
    let plan = merge(&shape, &usage, MergeMethod::MSmoe, &options).unwrap();
    let made = applied(&nano, &plan, &folder.path().join("merged"));
    let rank = |from: &Checkpoint, layer: usize, expert: usize, part: &str| {
        let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight");
        let view = from.tensor(&name).unwrap();
        stable_rank(&view.to_f32(), view.shape[1])
    };
    for part in ["gate_proj", "up_proj", "down_proj"] {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for layer in &plan.layers {
            for (at, expert) in layer.experts.iter().enumerate() {
                if expert.from.len() < 2 {
                    continue;
                }
                after.push(rank(&made, layer.layer, at, part));
                let members = expert.from.iter().map(|id| usize::from(*id));
                let ranks: Vec<f64> = members
                    .map(|id| rank(&nano, layer.layer, id, part))
                    .collect();
                before.push(moments(&ranks).0);
            }
        }
        let (before, after) = (moments(&before).0, moments(&after).0);
        println!("{part}: stable rank {before:.2} of members, {after:.2} merged");
        assert!(after <= before, "{part}: {before} to {after}");
    }
}
