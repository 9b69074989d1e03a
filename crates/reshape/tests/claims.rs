//! On the embedded model, with its own domains as tasks: choosing by what experts do on the task beats chance, a recording
//! of another task is worse than one of the task, and a merge by usage with aligned neurons beats a plain mean.

mod task;

use cadre_checkpoint::{Checkpoint, ConvertTo};
use cadre_engine::load;
use cadre_reshape::{
    Amount, Applying, MergeMethod, MergeOptions, Method, PruneOptions, Scope, Similarity, Usage,
    apply, merge, prune, shape_of,
};
use cadre_routing::plan::{Plan, PlanFactor};
use task::{TASKS, cost, halves, moments, nll, options, root, usage};

const SEEDS: u64 = 5;

#[test]
fn usage_on_the_task_beats_chance_and_usage_on_another_task() {
    let checkpoint = Checkpoint::open(&root().join("models/nano")).unwrap();
    let shape = shape_of(&checkpoint);
    let model = load(&checkpoint, &options()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let tasks = ["german", "math"].map(|domain| {
        let [record, judge] = halves(&checkpoint, domain);
        let path = folder.path().join(format!("{domain}.parquet"));
        (usage(&checkpoint, &*model, &record, &path), judge)
    });
    for part in [0.5, 0.25] {
        for at in 0..2 {
            let (usage, judge) = &tasks[at];
            let run = |usage: &Usage, method, seed| {
                let options = PruneOptions {
                    amount: Amount::Share(part),
                    scope: Scope::Layer,
                    seed,
                    similarity: Similarity::Cosine,
                };
                let plan = prune(&shape, usage, method, &options).unwrap();
                cost(&checkpoint, &plan, judge)
            };
            let random: Vec<f64> = (1..=SEEDS)
                .map(|seed| run(usage, Method::Random, seed))
                .collect();
            let (mean, deviation) = moments(&random);
            let whole = nll(&checkpoint, judge);
            let by_mass = run(usage, Method::RouterMass, 0);
            let others = run(&tasks[1 - at].0, Method::RouterMass, 0);
            let rows = [
                ("router-mass", by_mass),
                ("frequency", run(usage, Method::Frequency, 0)),
                ("reap", run(usage, Method::Reap, 0)),
                ("uncurl", run(usage, Method::Uncurl, 0)),
            ];
            println!(
                "keep {part}, task {at}: whole {whole:.3}, random {mean:.3} +- {deviation:.3}, other {others:.3}, {rows:?}"
            );
            for (method, nll) in rows {
                assert!(nll > whole && nll < mean, "{method} at {part}: {nll}");
                let is_close = method == "reap";
                assert!(
                    is_close || nll < mean - deviation,
                    "{method} at {part}: {nll} against {mean} +- {deviation}"
                );
            }
            let merged = |method| {
                let options = MergeOptions {
                    amount: Amount::Share(part),
                    scope: Scope::Layer,
                    similarity: Similarity::Cosine,
                    keep_rows: false,
                    align: None,
                };
                let plan = merge(&shape, usage, method, &options).unwrap();
                cost(&checkpoint, &plan, judge)
            };
            let (by_usage, uniform) = (merged(MergeMethod::MSmoe), merged(MergeMethod::Mean));
            println!("merged by usage and aligned {by_usage:.3}, uniform {uniform:.3}");
            assert!(by_usage < uniform, "{by_usage} {uniform}");
            assert!(by_mass < others, "{by_mass} {others}");
        }
    }
}

#[test]
fn merged_experts_that_keep_their_rows_beat_those_that_do_not() {
    let checkpoint = Checkpoint::open(&root().join("models/nano")).unwrap();
    let shape = shape_of(&checkpoint);
    let model = load(&checkpoint, &options()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    // What each way of merging loses against merging by usage with aligned neurons and all rows, nats per token.
    let mut behind: [Vec<f64>; 5] = Default::default();
    let names = [
        "unaligned",
        "unweighted",
        "ties",
        "one row",
        "pruned by mass",
    ];
    for domain in TASKS {
        let [record, judge] = halves(&checkpoint, domain);
        let path = folder.path().join(format!("{domain}.parquet"));
        let usage = usage(&checkpoint, &*model, &record, &path);
        let merged = |method, keep_rows, align| {
            let options = MergeOptions {
                amount: Amount::Share(0.5),
                scope: Scope::Layer,
                similarity: Similarity::Cosine,
                keep_rows,
                align: Some(align),
            };
            let plan = merge(&shape, &usage, method, &options).unwrap();
            cost(&checkpoint, &plan, &judge)
        };
        let options = PruneOptions {
            amount: Amount::Share(0.5),
            scope: Scope::Layer,
            seed: 0,
            similarity: Similarity::Cosine,
        };
        let pruned = prune(&shape, &usage, Method::RouterMass, &options).unwrap();
        let best = merged(MergeMethod::MSmoe, true, true);
        let others = [
            merged(MergeMethod::MSmoe, true, false),
            merged(MergeMethod::Mean, true, true),
            merged(MergeMethod::Ties, true, true),
            merged(MergeMethod::MSmoe, false, true),
            cost(&checkpoint, &pruned, &judge),
        ];
        println!(
            "{domain}: whole {:.3}, best {best:.3}, {names:?} {others:.3?}",
            nll(&checkpoint, &judge)
        );
        for (list, other) in behind.iter_mut().zip(others) {
            list.push(other - best);
        }
    }
    for (name, list) in names.iter().zip(&behind) {
        let (mean, deviation) = moments(list);
        println!("{name}: {mean:+.4} +- {deviation:.4} nats behind");
    }
    // Over the five tasks, by more than the error of the mean.
    let error = |list: &[f64]| moments(list).1 / (list.len() as f64).sqrt();
    for (name, list) in names.iter().zip(&behind).take(4) {
        let (mean, _) = moments(list);
        assert!(mean > error(list), "{name}: {list:?}");
    }
}

#[test]
fn merging_and_factoring_save_four_fifths_of_the_experts() {
    let checkpoint = Checkpoint::open(&root().join("models/nano")).unwrap();
    let shape = shape_of(&checkpoint);
    let model = load(&checkpoint, &options()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [record, judge] = halves(&checkpoint, "german");
    let usage = usage(
        &checkpoint,
        &*model,
        &record,
        &folder.path().join("t.parquet"),
    );
    let (keep, rank, rest) = (0.5, 16, 0.1);
    let options = MergeOptions {
        amount: Amount::Share(keep),
        scope: Scope::Layer,
        similarity: Similarity::Cosine,
        keep_rows: true,
        align: None,
    };
    let merged = merge(&shape, &usage, MergeMethod::MSmoe, &options).unwrap();
    let factored = Plan {
        factor: Some(PlanFactor { rank, rest }),
        ..merged.clone()
    };
    let rows = Plan {
        // About as many numbers, nearly all of them in rows.
        factor: Some(PlanFactor {
            rank: 1,
            rest: 0.33,
        }),
        ..merged.clone()
    };
    let whole = nll(&checkpoint, &judge);
    let costs = [&merged, &factored, &rows].map(|plan| cost(&checkpoint, plan, &judge));
    println!("whole {whole:.3}, merged, with factors, with rows alone: {costs:.3?}");
    let made = folder.path().join("made");
    let applying = Applying {
        target: ConvertTo::Folder {
            max_shard_bytes: 1 << 30,
        },
        pad: false,
    };
    let paths = apply(&checkpoint, &factored, applying).unwrap();
    let paths = paths.write(&made, &mut |_| true).unwrap();
    let experts = |checkpoint: &Checkpoint| -> u64 {
        let infos = checkpoint.tensor_infos();
        let of = infos.filter(|(name, ..)| name.contains(".mlp.experts."));
        of.map(|(_, dtype, shape)| dtype.n_bytes(shape.iter().product()).unwrap() as u64)
            .sum()
    };
    let saved =
        1.0 - experts(&Checkpoint::open(&paths[0]).unwrap()) as f64 / experts(&checkpoint) as f64;
    println!("{:.1} % of the bytes of experts are saved", 100.0 * saved);
    assert!(saved >= 0.8, "{saved}");
    assert!(costs[0] > whole && costs[1] > costs[0], "{costs:?}");
    assert!(costs[1] < costs[2], "{costs:?}");
}
