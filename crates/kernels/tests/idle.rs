//! A pool without work takes no processor time. In a program of its own, because it looks at all threads of the process.
#![expect(clippy::unwrap_used, reason = "tests")]
#![cfg(target_os = "linux")]

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use cadre_kernels::ThreadPool;
use cadre_kernels::doctor::default_threads;

/// Time on a processor that the pool's threads have had.
fn taken() -> Duration {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let of_thread = |task: fs::DirEntry| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        if !name.starts_with("cadre-") {
            return None;
        }
        // The first number: nanoseconds on a processor.
        let stat = fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse::<u64>().ok()
    };
    let nanoseconds = tasks.filter_map(|task| of_thread(task.unwrap())).sum();
    Duration::from_nanos(nanoseconds)
}

#[test]
fn idle_threads_sleep() {
    let n_threads = 4 * default_threads();
    let pool = ThreadPool::new(n_threads);
    let done = AtomicUsize::new(0);
    for _ in 0..200 {
        pool.run(64, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
    }
    assert_eq!(done.load(Ordering::Relaxed), 200 * 64);
    // Time to stop spinning.
    thread::sleep(Duration::from_millis(50));
    let before = taken();
    assert!(before > Duration::ZERO, "threads that have worked");
    thread::sleep(Duration::from_millis(300));
    let idle = taken() - before;
    // A thread that spins would have taken 300 ms.
    assert!(idle < Duration::from_millis(3), "{idle:?} while idle");
    // They wake up again.
    pool.run(64, &|_| {
        done.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(done.into_inner(), 201 * 64);
}
