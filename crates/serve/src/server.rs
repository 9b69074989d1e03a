//! A running server: its start, and its end in good order.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use cadre_checkpoint::{ChatTemplate, Checkpoint};
use cadre_engine::{Model, SessionOptions, Steering};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use crate::access::Access;
use crate::app::{App, answers};
use crate::error::{Result, ServeError};
use crate::listen::{HttpLimits, accept};
use crate::metrics::Metrics;
use crate::schedule::{ScheduleOptions, Scheduler, StepOptions};
use crate::served::Served;

/// Threads that talk with clients; computing has its own.
const TALKERS: usize = 2;
/// Threads that tokenize and render.
const READERS: usize = 4;
/// How long clients may take to hear that the server ends.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How to serve.
pub struct ServeOptions {
    /// Where to listen; port 0 takes any that is free.
    pub address: SocketAddr,
    /// Names that requests may call the model; at least one, which is the one that answers tell.
    pub names: Vec<String>,
    /// Keys, of which requests need one; none lets everybody in.
    pub keys: Vec<String>,
    /// Origins whose web pages may ask; `*` for all, none for pages of this server alone.
    pub origins: Vec<String>,
    /// A chat template in place of the checkpoint's.
    pub template: Option<ChatTemplate>,
    /// The sessions of sequences.
    pub session: SessionOptions,
    /// Sequences that are computed together; each has a session.
    pub parallel: usize,
    /// The most bytes of keys and values of all of them together; by default what they take when all are full.
    pub kv_memory: Option<usize>,
    /// How many of the sequences that generate take part in a pass, and which; by default all.
    pub steps: Option<StepOptions>,
    /// Steerings that requests may name.
    pub plans: Vec<(String, Steering)>,
    /// Tokens that are computed in one pass.
    pub batch: usize,
    /// Of these, tokens of prompts in a pass in which somebody generates: fewer let generated tokens wait less, more read prompts faster. By
    /// default a 64th of what is left of all prompts, at least 8 for a dense model and `n_experts / top_k` times as many for one with
    /// experts, at most a quarter of `batch`.
    pub prompt_batch: Option<usize>,
    /// Sequences that may wait for a session.
    pub queue: usize,
    /// What clients may send, and how long they may take.
    pub http: HttpLimits,
    /// Whether SIGTERM ends the server in good order, see [`Server::was_told_to_end`].
    pub heeds_sigterm: bool,
}

/// A server that runs until it is dropped or ended.
pub struct Server {
    address: SocketAddr,
    app: Arc<App>,
    ending: watch::Sender<bool>,
    /// Hears when the last connection has ended.
    done: mpsc::Receiver<()>,
    told: Arc<AtomicBool>,
    runtime: Runtime,
}

impl Server {
    /// Starts to serve `model` with the text side of `checkpoint`.
    ///
    /// # Errors
    /// The address is taken, sessions cannot be made as asked, or the text side cannot be read.
    pub fn start(
        checkpoint: &Checkpoint,
        model: Arc<dyn Model>,
        options: ServeOptions,
    ) -> Result<Self> {
        check(&options)?;
        let n_ctx = options.session.context(model.info().max_context);
        let metrics = Arc::new(Metrics::default());
        let schedule = ScheduleOptions {
            n_slots: options.parallel,
            n_batch: options.batch,
            n_beside: options.prompt_batch,
            n_waiting: options.queue,
            session: options.session,
            kv_bytes: options.kv_memory,
            steps: options.steps,
        };
        let template = options.template;
        let served = Served::new(
            checkpoint,
            Arc::clone(&model),
            template,
            (options.names, options.plans),
            n_ctx,
        )?;
        let bind = |source| ServeError::Bind {
            address: options.address,
            source,
        };
        let listener = TcpListener::bind(options.address).map_err(bind)?;
        listener.set_nonblocking(true).map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        let app = Arc::new(App {
            served: Arc::new(served),
            scheduler: Scheduler::start(model, &schedule, Arc::clone(&metrics))?,
            metrics,
            access: Access::new(options.keys, options.origins, address.ip()),
            limits: options.http,
            ending: AtomicBool::new(false),
        });
        let runtime = Builder::new_multi_thread()
            .worker_threads(TALKERS)
            .max_blocking_threads(READERS)
            .thread_name("cadre-serve")
            .enable_all()
            .build()
            .map_err(ServeError::Runtime)?;
        let (ending, told_to_end) = watch::channel(false);
        let (sender, done) = mpsc::channel();
        let answers = answers(&app);
        let inside = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener).map_err(ServeError::Runtime)?;
        let told = Arc::new(AtomicBool::new(false));
        if options.heeds_sigterm {
            watch_sigterm(&told)?;
        }
        drop(inside);
        runtime.spawn(async move {
            accept(listener, answers, options.http, told_to_end).await;
            // Whoever waits for the end has given up otherwise.
            let _ = sender.send(());
        });
        Ok(Self {
            address,
            app,
            ending,
            done,
            told,
            runtime,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether SIGTERM came; [`Server::end`] is for whoever watches.
    #[must_use]
    pub fn was_told_to_end(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// Ends: takes nothing new, lets what runs come to an end for `grace`, and breaks off the rest. Whether nothing had to be
    /// broken off.
    pub fn end(self, grace: Duration) -> bool {
        self.app.ending.store(true, Ordering::Relaxed);
        // Nobody listens any more where all connections have ended.
        let _ = self.ending.send(true);
        self.app.scheduler.finish();
        let in_time = self.done.recv_timeout(grace).is_ok();
        self.app.scheduler.stop();
        if !in_time {
            let _ = self.done.recv_timeout(LAST_WORDS);
        }
        self.runtime.shutdown_timeout(LAST_WORDS);
        self.app.scheduler.join();
        in_time
    }
}

#[cfg(unix)]
fn watch_sigterm(told: &Arc<AtomicBool>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Runtime)?;
    let told = Arc::clone(told);
    tokio::spawn(async move {
        terminate.recv().await;
        told.store(true, Ordering::Relaxed);
    });
    Ok(())
}

#[cfg(not(unix))]
fn watch_sigterm(_told: &Arc<AtomicBool>) -> Result<()> {
    Ok(())
}

fn check(options: &ServeOptions) -> Result<()> {
    let checks = [
        ("parallel", options.parallel),
        ("batch size", options.batch),
        ("prompt batch size", options.prompt_batch.unwrap_or(1)),
        ("queue", options.queue),
    ];
    match checks.into_iter().find(|(_, value)| *value == 0) {
        None => Ok(()),
        Some((name, value)) => Err(ServeError::BadOption {
            name,
            value,
            expected: "at least 1",
        }),
    }
}
