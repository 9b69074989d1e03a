//! The scheduler's door: where jobs are handed in, and what the worker finds behind it.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use cadre_engine::{KV_BLOCK, Model};
use tokio::sync::mpsc::unbounded_channel;

use super::ScheduleOptions;
use super::job::{Client, Job, Jobs, Refusal, Teller};
use super::queue::FairQueue;
use super::room::KvLimits;
use super::worker::Worker;
use crate::metrics::Metrics;

/// Longest time that a client is told to wait, in seconds.
const LONGEST_WAIT: f64 = 60.0;

/// A handle on the worker. The last one ends it.
pub(crate) struct Scheduler {
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    worker: Mutex<Option<JoinHandle<()>>>,
    n_slots: usize,
    n_waiting: usize,
    kv: KvLimits,
}

/// What the handle and the worker share.
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    pub(super) wake: Condvar,
}

/// What the worker finds when it looks for work.
#[derive(Default)]
pub(super) struct Inbox {
    pub(super) queue: FairQueue<Waiting>,
    pub(super) ending: Option<Ending>,
}

/// A job in the queue.
pub(super) struct Waiting {
    pub(super) job: Job,
    pub(super) teller: Teller,
    pub(super) since: Instant,
}

/// How the worker ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// When everything that was taken is done.
    WhenDone,
    /// Before the next pass.
    Now,
}

impl Shared {
    /// What is inside stays usable when somebody panicked while holding it: every change of it is one step.
    pub(super) fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scheduler {
    /// Starts the worker.
    ///
    /// # Errors
    /// Sessions or a workspace of these sizes cannot be made, a session does not fit into the memory for keys and values, or the
    /// system gives no thread.
    pub(crate) fn start(
        model: Arc<dyn Model>,
        options: &ScheduleOptions,
        metrics: Arc<Metrics>,
    ) -> crate::Result<Self> {
        let shared = Arc::new(Shared {
            inbox: Mutex::new(Inbox::default()),
            wake: Condvar::new(),
        });
        let kv = limits(&*model, options)?;
        let share = (Arc::clone(&metrics), Arc::clone(&shared));
        let mut worker = Worker::new(model, (options, kv), share.0, share.1)?;
        let thread = thread::Builder::new()
            .name("cadre-engine".to_owned())
            .spawn(move || worker.run())
            .map_err(crate::ServeError::Runtime)?;
        Ok(Self {
            shared,
            metrics,
            worker: Mutex::new(Some(thread)),
            n_slots: options.n_slots,
            n_waiting: options.n_waiting,
            kv,
        })
    }

    /// Refuses a job that would not fit into the memory alone.
    fn check_size(&self, job: &Job) -> Result<(), Refusal> {
        let n_lanes = 1 + usize::from(job.contrast.is_some());
        let n_tokens = (job.prompt.len() + job.max_new_tokens).min(self.kv.n_ctx);
        let n_all = self.kv.n_ctx.div_ceil(KV_BLOCK);
        let per_block = self.kv.session / n_all.max(1);
        let bytes = n_lanes * per_block * n_tokens.div_ceil(KV_BLOCK);
        match bytes > self.kv.limit {
            false => Ok(()),
            true => Err(Refusal::TooLarge {
                bytes,
                limit: self.kv.limit,
            }),
        }
    }

    /// Jobs that may wait.
    pub(crate) fn n_waiting(&self) -> usize {
        self.n_waiting
    }

    /// Puts jobs into the queue: all of them, or none.
    ///
    /// # Errors
    /// There is no room.
    pub(crate) fn submit(&self, client: Client, jobs: Vec<Job>) -> Result<Jobs, Refusal> {
        jobs.iter().try_for_each(|job| self.check_size(job))?;
        let mut inbox = self.shared.inbox();
        if inbox.ending.is_some() {
            return Err(Refusal::Ending);
        }
        let waiting = inbox.queue.len();
        if waiting + jobs.len() > self.n_waiting {
            let seconds = self.patience(waiting);
            let own = inbox.queue.len_of(client);
            // Who has more than an even share is asked to slow down; others meet a server that is full.
            let is_greedy = own * inbox.queue.n_clients().max(1) >= waiting && own > 0;
            return Err(match is_greedy {
                true => Refusal::TooMany {
                    waiting: own,
                    seconds,
                },
                false => Refusal::Full { waiting, seconds },
            });
        }
        let (sender, events) = unbounded_channel();
        let since = Instant::now();
        let mut cancelled = Vec::with_capacity(jobs.len());
        for (index, job) in jobs.into_iter().enumerate() {
            let flag = Arc::new(AtomicBool::new(false));
            cancelled.push(Arc::clone(&flag));
            let teller = Teller {
                index,
                events: sender.clone(),
                cancelled: flag,
            };
            inbox.queue.push(client, Waiting { job, teller, since });
        }
        drop(inbox);
        self.shared.wake.notify_one();
        Ok(Jobs { events, cancelled })
    }

    /// Seconds until the queue will have moved on.
    fn patience(&self, n_waiting: usize) -> u32 {
        let rounds = n_waiting as f64 / self.n_slots as f64;
        let seconds = rounds * self.metrics.job_seconds();
        seconds.clamp(1.0, LONGEST_WAIT).ceil() as u32
    }

    /// Takes no more jobs, and ends when those that it has are done.
    pub(crate) fn finish(&self) {
        self.end(Ending::WhenDone);
    }

    /// Ends before the next pass; whoever waits hears that.
    pub(crate) fn stop(&self) {
        self.end(Ending::Now);
    }

    fn end(&self, ending: Ending) {
        self.shared.inbox().ending = Some(ending);
        self.shared.wake.notify_one();
    }

    /// Waits for the worker's end.
    pub(crate) fn join(&self) {
        let worker = self
            .worker
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // A panic of the worker has been logged.
        let _ = worker.map(JoinHandle::join);
    }
}

/// The memory of keys and values, which has to hold one session at least.
fn limits(model: &dyn Model, options: &ScheduleOptions) -> crate::Result<KvLimits> {
    let session = model.session(&options.session)?;
    let (n_ctx, bytes) = (session.n_ctx(), session.kv_bytes());
    let limit = options
        .kv_bytes
        .unwrap_or(bytes.saturating_mul(options.n_slots));
    if limit < bytes {
        return Err(crate::ServeError::KvMemory {
            limit,
            needed: bytes,
            n_ctx,
        });
    }
    Ok(KvLimits {
        limit,
        session: bytes,
        n_ctx,
    })
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}
