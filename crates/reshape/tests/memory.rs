//! What writing takes of memory is what is foretold, however many experts are merged into one.
//!
//! Counted over all threads, which is why this file has a process of its own and one test.

use std::alloc::System;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use cadre_checkpoint::ConvertTo;
use cadre_reshape::{Applying, apply, shape_of};
use cadre_routing::plan::{Plan, PlanExpert, PlanFactor};
use cadre_testkit::TinyMoe;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const FOLDER: ConvertTo = ConvertTo::Folder {
    max_shard_bytes: 1 << 30,
};
const N_EXPERTS: u16 = 24;
/// Values of a matrix of an expert.
const SIZES: [usize; 2] = [256, 1024];
/// What is foretold for a part that does not grow with the matrices.
const FIXED: u64 = 16 << 20;

fn allocated() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated.wrapping_sub(stats.bytes_deallocated)
}

/// The most that is allocated at a time while `work` runs, beside what was before. A thread looks many times a millisecond.
fn most_while(work: impl FnOnce()) -> u64 {
    let (stop, most) = (AtomicBool::new(false), AtomicUsize::new(0));
    let before = allocated();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(allocated().saturating_sub(before), Ordering::Relaxed);
                std::hint::spin_loop();
            }
        });
        work();
        stop.store(true, Ordering::Relaxed);
    });
    most.into_inner() as u64
}

#[test]
fn merging_takes_what_is_foretold_however_many_are_merged() {
    let folder = TinyMoe::default()
        .n_layers(1)
        .n_experts(N_EXPERTS as usize)
        .top_k(2)
        .configure(|config| {
            (config.hidden_size, config.moe.intermediate_size) = (SIZES[0], SIZES[1]);
        })
        .build()
        .unwrap();
    let source = folder.open().unwrap();
    let shape = shape_of(&source);
    let all: Vec<u16> = (1..N_EXPERTS).collect();
    let merged = |edit: &dyn Fn(&mut PlanExpert)| {
        let mut one = PlanExpert {
            from: all.clone(),
            ..PlanExpert::default()
        };
        edit(&mut one);
        one
    };
    let plan = |one: PlanExpert, factor| {
        let mut plan = Plan::of(&shape, "test", [vec![PlanExpert::kept(0), one]]);
        plan.factor = factor;
        plan
    };
    let factor = PlanFactor {
        rank: 16,
        rest: 0.1,
    };
    let cases = [
        ("mean", plan(merged(&|_| {}), None)),
        ("ties", plan(merged(&|one| one.ties = Some(0.2)), None)),
        ("aligned", plan(two(true), None)),
        ("factors", plan(merged(&|_| {}), Some(factor))),
    ];
    for (what, plan) in cases {
        let output = tempfile::tempdir().unwrap();
        let options = Applying {
            target: FOLDER,
            pad: false,
        };
        let conversion = apply(&source, &plan, options).unwrap();
        let foretold = conversion.memory();
        let most = most_while(|| {
            let path = output.path().join("made");
            conversion.write(&path, &mut |_| true).unwrap();
        });
        assert!(most <= foretold, "{what}: {most} of {foretold}");
        // Not a number that is always enough.
        assert!(foretold - FIXED < 4 * most, "{what}: {most} of {foretold}");
    }
}

/// Two experts whose neurons are brought into one order, which takes time that grows with the cube of their number.
fn two(align: bool) -> PlanExpert {
    PlanExpert {
        from: vec![1, 2],
        align,
        ..PlanExpert::default()
    }
}
