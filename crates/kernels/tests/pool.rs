//! The thread pool under unusual numbers of threads, and what it takes of the machine while nothing is to be done.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use cadre_kernels::ThreadPool;
use cadre_kernels::doctor::default_threads;
use proptest::prelude::*;

/// Many small calls one after the other, each of which must see the sums of the one before.
fn chain(pool: &ThreadPool, n_calls: usize, n_values: usize) -> Vec<u64> {
    let mut values: Vec<u64> = (0..n_values as u64).collect();
    for _ in 0..n_calls {
        let before = values.clone();
        pool.for_each_chunk(&mut values, 3, |i, chunk| {
            for (j, value) in chunk.iter_mut().enumerate() {
                let next = before[(i * 3 + j + 1) % before.len()];
                *value = value.wrapping_mul(31).wrapping_add(next);
            }
        });
    }
    values
}

#[test]
fn one_thread_and_far_more_than_cores_compute_the_same() {
    let expected = chain(&ThreadPool::new(1), 200, 50);
    for n_threads in [2, 4 * default_threads(), 33] {
        let pool = ThreadPool::new(n_threads);
        assert_eq!(pool.n_threads(), n_threads);
        assert_eq!(chain(&pool, 200, 50), expected, "{n_threads} threads");
    }
}

#[test]
fn calls_inside_of_tasks_and_from_many_threads_complete() {
    let pool = ThreadPool::new(4 * default_threads());
    let total = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..40 {
                    pool.run(5, &|i| {
                        pool.run(3, &|j| {
                            pool.run(2, &|_| {
                                total.fetch_add((i * j) as u64, Ordering::Relaxed);
                            });
                        });
                    });
                }
            });
        }
    });
    // The sum of i * j over 0..5 and 0..3 is 10 * 3.
    assert_eq!(total.into_inner(), 6 * 40 * 2 * 30);
}

#[test]
fn pools_come_and_go() {
    for round in 0..50 {
        let pool = ThreadPool::new(round % 7);
        let n = AtomicUsize::new(0);
        pool.run(round, &|_| {
            n.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(n.into_inner(), round);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_index_once(n_threads in 0usize..20, sizes in proptest::collection::vec(0usize..200, 1..20)) {
        let pool = ThreadPool::new(n_threads);
        for n_tasks in sizes {
            let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(n_tasks, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            prop_assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) == 1));
        }
    }
}
