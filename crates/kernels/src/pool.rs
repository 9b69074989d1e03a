//! A small persistent thread pool: spin briefly, then park; no allocation per call.
//!
//! Each thread works through neighbouring tasks from the first to the last, which is the order in which memory is read
//! best. Who has none left takes the last one of somebody else.
//!
//! One call at a time runs on the workers. A call made while another is running, or from inside a task,
//! runs on its own thread, so calls never wait for each other and cannot deadlock.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Rounds of spinning before a worker parks: tens of microseconds, longer than the gap between two
/// products of a layer.
const SPINS: u32 = 4000;
/// Rounds of spinning before a caller that waits for the last task lets others run.
const SPINS_BEFORE_YIELD: u32 = 20_000;

/// A fixed set of threads that share the tasks of a call.
#[derive(Debug)]
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a call uses the workers.
    busy: Mutex<()>,
}

type Task = dyn Fn(usize) + Sync;

struct Shared {
    /// Tasks of the current call that nobody has taken, for each thread; the caller's come first.
    shares: Box<[Share]>,
    /// Counts calls.
    round: AtomicUsize,
    /// Tasks of the current call that have not ended.
    unfinished: AtomicUsize,
    /// The current call's function. Written only when `unfinished` is 0, read only by who took a task.
    task: UnsafeCell<*const Task>,
    /// What the first failed task of the current call panicked with.
    failure: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

/// Tasks `first..end`, as `first | end << 32`. Alone in its pair of cache lines.
#[derive(Default)]
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn put(&self, first: u32, end: u32) {
        self.0
            .store(u64::from(first) | u64::from(end) << 32, Ordering::Release);
    }

    /// Takes the first task, or the last one.
    fn take(&self, is_first: bool) -> Option<u32> {
        let rest = |tasks: u64| {
            let (first, end) = (tasks as u32, (tasks >> 32) as u32);
            (first < end).then(|| match is_first {
                true => tasks + 1,
                false => tasks - (1 << 32),
            })
        };
        let before = self
            .0
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, rest)
            .ok()?;
        Some(match is_first {
            true => before as u32,
            false => (before >> 32) as u32 - 1,
        })
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("round", &self.round)
            .finish_non_exhaustive()
    }
}

// SAFETY: `task` is the only field that is not Sync. It is written by the one caller that holds `busy`
// while every task is taken and has ended, and read only between taking a task and ending it, so a write
// and a read never overlap; taking (acquire) pairs with publishing (release).
unsafe impl Sync for Shared {}
// SAFETY: the pointer is only used as described above, while the caller keeps the function alive.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// A pool of `n_threads` in all: the caller and `n_threads - 1` workers. Zero counts as one.
    ///
    /// When the system refuses a thread, the pool has as many as it could get.
    pub fn new(n_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            shares: (0..n_threads.max(1)).map(|_| Share::default()).collect(),
            round: AtomicUsize::new(0),
            unfinished: AtomicUsize::new(0),
            task: UnsafeCell::new(&raw const *NO_TASK),
            failure: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..n_threads)
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("cadre-{i}"))
                    .spawn(move || shared.work(i))
                    .ok()
            })
            .collect();
        Self {
            shared,
            workers,
            busy: Mutex::new(()),
        }
    }

    /// Threads that share a call, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for every `i < n_tasks`, in any order and on any of the threads.
    ///
    /// # Panics
    /// With the first panic of a task, after all tasks have ended.
    pub fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let count = u32::try_from(n_tasks).ok().filter(|n| *n > 1);
        let guard = (!self.workers.is_empty()).then(|| self.busy.try_lock().ok());
        let (Some(count), Some(guard)) = (count, guard.flatten()) else {
            (0..n_tasks).for_each(task);
            return;
        };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used only by threads that took a task of this
        // call, and this function does not return before all of them have ended.
        let task: *const Task =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(task) };
        // SAFETY: `busy` is held and the last call's tasks have ended, so nobody reads the pointer.
        unsafe { *shared.task.get() = task };
        shared.unfinished.store(n_tasks, Ordering::Relaxed);
        let n_shares = self.n_threads() as u64;
        let from = |at: u64| (u64::from(count) * at / n_shares) as u32;
        for (at, share) in (0..n_shares).zip(&shared.shares) {
            share.put(from(at), from(at + 1));
        }
        // Sequentially consistent with the workers' `sleepers`: either a worker that is about to park
        // sees the call, or this thread sees the sleeper.
        shared.round.fetch_add(1, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _lock = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        while shared.take_and_run(0) {}
        let mut spins = 0u32;
        while shared.unfinished.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
        let failure = shared
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(failure) = failure {
            // Unlock first, or the panic would poison the lock and later calls would run alone.
            drop(guard);
            panic::resume_unwind(failure);
        }
    }

    /// Cuts `data` into chunks of `chunk_len` (the last may be shorter) and calls `task(i, chunk i)` for
    /// each, as [`Self::run`] does. Panics when `chunk_len` is 0.
    pub fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(chunk_len > 0, "chunks of at least one value");
        let len = data.len();
        let start = SendPtr(data.as_mut_ptr());
        self.run(len.div_ceil(chunk_len), &|i| {
            let from = i * chunk_len;
            let n = chunk_len.min(len - from);
            // SAFETY: chunk i lies inside `data`, which is borrowed mutably until all tasks end; chunks
            // do not overlap and each index is called once.
            let chunk = unsafe { std::slice::from_raw_parts_mut(start.get().add(from), n) };
            task(i, chunk);
        });
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        {
            let _lock = self
                .shared
                .lock
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            self.shared.stop.store(true, Ordering::SeqCst);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

static NO_TASK: &Task = &|_| {};

impl Shared {
    /// Takes one task and runs it, as thread `me`; false when none is left.
    fn take_and_run(&self, me: usize) -> bool {
        let others = self.shares[me + 1..].iter().chain(&self.shares[..me]);
        let mut stolen = others.filter_map(|share| share.take(false));
        let Some(index) = self.shares[me].take(true).or_else(|| stolen.next()) else {
            return false;
        };
        // SAFETY: having taken a task, this thread may read the pointer until it ends the task; the
        // caller keeps the function alive until then.
        let task = unsafe { &**self.task.get() };
        if let Err(failure) = panic::catch_unwind(AssertUnwindSafe(|| task(index as usize))) {
            self.failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(failure);
        }
        self.unfinished.fetch_sub(1, Ordering::Release);
        true
    }

    fn work(&self, me: usize) {
        let (mut spins, mut seen) = (0, 0);
        while !self.stop.load(Ordering::Relaxed) {
            let round = self.round.load(Ordering::Acquire);
            if round != seen {
                seen = round;
                while self.take_and_run(me) {}
                spins = 0;
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.park(seen);
                spins = 0;
            }
        }
    }

    /// Sleeps until there is another call than `seen`.
    fn park(&self, seen: usize) {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.round.load(Ordering::SeqCst) == seen && !self.stop.load(Ordering::SeqCst) {
            lock = self.wake.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A pointer that tasks on other threads may use; who makes one says why that is sound.
pub(crate) struct SendPtr<T>(pub(crate) *mut T);

impl<T> SendPtr<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: moving the address is harmless; every use is an unsafe block with its own reason.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for n_threads in [0, 1, 2, 3, 8] {
            let pool = ThreadPool::new(n_threads);
            for n_tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                    "{n_threads} {n_tasks}"
                );
            }
        }
    }

    #[test]
    fn tasks_are_taken_from_the_front_and_stolen_from_the_back() {
        let share = Share::default();
        assert_eq!((share.take(true), share.take(false)), (None, None));
        share.put(3, 6);
        assert_eq!((share.take(false), share.take(true)), (Some(5), Some(3)));
        assert_eq!((share.take(true), share.take(false)), (Some(4), None));
    }

    #[test]
    fn chunks_cover_the_data_after_parking_too() {
        let pool = ThreadPool::new(3);
        for round in 0..3 {
            let mut data = vec![0usize; 1001];
            pool.for_each_chunk(&mut data, 10, |i, chunk| chunk.fill(i + 1));
            assert!(
                data.iter().enumerate().all(|(i, v)| *v == i / 10 + 1),
                "round {round}"
            );
            thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    #[test]
    fn nested_and_concurrent_calls_complete() {
        let pool = ThreadPool::new(2);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(4, &|_| {
                            pool.run(5, &|_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 3 * 50 * 4 * 5);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_survives() {
        let pool = ThreadPool::new(2);
        let result = panic::catch_unwind(AssertUnwindSafe(|| {
            pool.run(10, &|i| assert_ne!(i, 3, "task three fails"));
        }));
        assert!(result.is_err());
        let done = AtomicUsize::new(0);
        pool.run(10, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 10);
    }
}
