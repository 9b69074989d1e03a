//! The store: one cache, one reader and one ring of staging memory for all experts of a model.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ahead::{Ahead, AheadKind};
use crate::budget::{Division, SizeClass};
use crate::cache::Cache;
use crate::error::StoreError;
use crate::expert::{ExpertId, Now};
use crate::foresight::Foresight;
use crate::form::Form;
use crate::inner::{Inner, Slot};
use crate::pass::Pass;
use crate::policies::PolicyKind;
use crate::predictors::Score;
use crate::reader::{OpenFile, Reader, ReaderKind, whole_pages};
use crate::staging::{Staging, buffer_bytes};
use crate::stats::StoreStats;

/// How a store is made.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Bytes for experts: cached ones, and memory to read into. Less than the least that works is taken as that.
    pub budget: u64,
    /// What is kept.
    pub policy: PolicyKind,
    /// What is read before it is wanted.
    pub ahead: AheadKind,
    /// Whether that is tried and kept up only while it helps. What is certain needs no trial.
    pub adaptive: bool,
    /// Whether what a pass will want is told before it begins: [`Store::foresee`].
    pub foreseen: bool,
    /// Whether all ways of guessing what will be wanted are scored: [`Store::scores`].
    pub scored: bool,
    /// How files are read.
    pub reader: ReaderKind,
    /// Requests that the disk is given at once.
    pub lanes: usize,
    /// Bytes of a request.
    pub request_bytes: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            budget: 0,
            policy: PolicyKind::default(),
            ahead: AheadKind::default(),
            adaptive: true,
            foreseen: false,
            scored: false,
            reader: ReaderKind::default(),
            lanes: crate::reader::LANES,
            request_bytes: crate::reader::REQUEST_BYTES,
        }
    }
}

impl StoreOptions {
    /// The reader that is asked for.
    pub(crate) fn open_reader(&self) -> Result<Box<dyn Reader>, StoreError> {
        self.reader
            .open(self.lanes)
            .map_err(|source| StoreError::Reader {
                kind: self.reader.name(),
                source,
            })
    }
}

/// Experts that do not all fit into memory. See the crate's documentation.
///
/// One pass of one layer uses it at a time; others wait.
pub struct Store<F: Form> {
    form: F,
    inner: Mutex<Inner<F>>,
    n_bytes: u64,
    is_direct: bool,
    reader: &'static str,
    n_cached: usize,
    /// Experts of every layer.
    n_experts_of: Vec<u16>,
}

impl<F: Form> std::fmt::Debug for Store<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("n_bytes", &self.n_bytes)
            .field("n_cached", &self.n_cached)
            .field("reader", &self.reader)
            .finish_non_exhaustive()
    }
}

impl<F: Form> Store<F> {
    /// A store of up to `n_experts` experts in each of `n_layers` layers, whose pieces lie in `files`; see
    /// [`Form::exists`].
    ///
    /// # Errors
    /// A file cannot be opened.
    pub fn new(
        form: F,
        [n_layers, n_experts]: [usize; 2],
        files: &[PathBuf],
        options: &StoreOptions,
    ) -> Result<Self, StoreError> {
        let reader = options.open_reader()?;
        Self::with_reader(form, [n_layers, n_experts], files, (options, reader))
    }

    /// [`Store::new`] with a reader of the caller's; the one that the options name is not opened.
    ///
    /// # Errors
    /// A file cannot be opened.
    pub fn with_reader(
        form: F,
        [n_layers, n_experts]: [usize; 2],
        files: &[PathBuf],
        (options, reader): (&StoreOptions, Box<dyn Reader>),
    ) -> Result<Self, StoreError> {
        let files = files
            .iter()
            .map(|path| OpenFile::open(path))
            .collect::<Result<Vec<_>, _>>()?;
        let ids = || {
            (0..n_layers as u16).flat_map(move |layer| {
                (0..n_experts as u16).map(move |expert| ExpertId { layer, expert })
            })
        };
        let mut n_experts_of = vec![0; n_layers];
        let mut classes: Vec<SizeClass> = Vec::new();
        let mut class_of = Vec::with_capacity(n_layers * n_experts);
        let mut buffer = 0;
        for id in ids() {
            if !form.exists(id) {
                // Never asked for.
                class_of.push(0);
                continue;
            }
            n_experts_of[usize::from(id.layer)] = id.expert + 1;
            let slot_bytes = form.n_bytes(id);
            buffer = buffer.max(buffer_bytes(form.pieces(id)));
            let known = classes
                .iter()
                .position(|class| class.slot_bytes == slot_bytes);
            let class = known.unwrap_or(classes.len());
            if known.is_none() {
                classes.push(SizeClass {
                    slot_bytes,
                    n_experts: 0,
                });
            }
            classes[class].n_experts += 1;
            class_of.push(class);
        }
        let buffer = whole_pages(buffer);
        let division = Division::new(options.budget, buffer, &classes);
        let n_cached = division.cache.iter().map(|capacity| capacity.n_slots).sum();
        let policy = options.policy.make(n_layers, n_experts, n_cached);
        let class =
            |id: ExpertId| class_of[usize::from(id.layer) * n_experts + usize::from(id.expert)];
        let cache = Cache::new(division.cache.clone(), class, (n_layers, n_experts), policy);
        let is_direct = files.iter().all(OpenFile::is_direct);
        let reader_name = reader.name();
        let slot = |class: usize| Slot {
            memory: None,
            expert: None,
            class,
            in_use: false,
            awaited: false,
        };
        let slots = division.cache.iter().enumerate();
        let slots: Vec<Slot<F>> = slots
            .flat_map(|(class, capacity)| (0..capacity.n_slots).map(move |_| class))
            .map(slot)
            .collect();
        let transit =
            (0..classes.len()).flat_map(|class| (0..division.transit).map(move |_| class));
        Ok(Self {
            n_bytes: division.n_bytes(buffer),
            is_direct,
            reader: reader_name,
            n_cached,
            inner: Mutex::new(Inner {
                files,
                reader,
                staging: Staging::new(division.staging_buffers, buffer, options.request_bytes),
                cache,
                slots,
                transit: transit.map(slot).collect(),
                n_transit: division.transit,
                now: Now::default(),
                n_tokens_of_pass: 0,
                order: Vec::with_capacity(n_experts),
                places: Vec::with_capacity(n_experts),
                n_hits: 0,
                n_quiet: 0,
                n_asked: 0,
                ahead: Ahead::new(
                    options.ahead,
                    (&n_experts_of, n_experts),
                    (options.adaptive, options.scored),
                    options.foreseen,
                ),
                expected: VecDeque::with_capacity(n_experts),
                foreseen: vec![Vec::with_capacity(n_experts); n_layers],
                pieces: Vec::new(),
                stats: StoreStats::default(),
            }),
            n_experts_of,
            form,
        })
    }

    /// How experts are made.
    pub fn form(&self) -> &F {
        &self.form
    }

    /// The most memory that the store takes, for experts and for reading.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Experts that can be in memory at once.
    pub fn n_cached(&self) -> usize {
        self.n_cached
    }

    /// Whether reading goes past the system's own cache of files.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// How files are read: `pread`, `io_uring`.
    pub fn reader(&self) -> &'static str {
        self.reader
    }

    /// Counts since the store was made.
    pub fn stats(&self) -> StoreStats {
        self.lock().stats
    }

    /// How well each way of guessing has done, where [`StoreOptions::scored`] asked for it.
    pub fn scores(&self) -> Vec<Score> {
        self.lock().ahead.scores().to_vec()
    }

    fn lock(&self) -> MutexGuard<'_, Inner<F>> {
        // A pass that panicked leaves the bookkeeping whole: what it wanted is forgotten by the next.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads experts in the order of the files into slots that are empty, until there is none; `progress` is told how many
    /// have been read. Worth while where everything fits.
    ///
    /// # Errors
    /// An expert cannot be read or made.
    pub fn preload(&self, progress: &dyn Fn(usize)) -> Result<(), F::Error> {
        for (layer, n_experts) in (0u16..).zip(&self.n_experts_of) {
            let missing = self.lock().room_for(layer, *n_experts);
            let mut pass = self.begin(layer, missing.iter().map(|expert| (*expert, 0)), 0);
            while let Some(batch) = pass.next_batch()? {
                progress(batch.len());
            }
        }
        Ok(())
    }

    /// Sets for every expert of `layer` whether it is in memory, in one go.
    pub fn mark_cached(&self, layer: u16, is_cached: &mut [bool]) {
        self.lock().mark_cached(layer, is_cached);
    }

    /// Takes what the layers of the next pass will want, before the first of them: where [`StoreOptions::foreseen`] says that
    /// this is known. With [`AheadKind::Exact`] it is acted on; it is scored in any case.
    pub fn foresee(&self) -> Foresight<'_, F> {
        Foresight::new(&self.form, self.lock())
    }

    /// Begins the pass of `layer`, with `experts` serving so many tokens each, ascending, out of `n_tokens` tokens.
    /// Reading of what is missing begins as well.
    pub fn begin(
        &self,
        layer: u16,
        experts: impl Iterator<Item = (u16, u32)>,
        n_tokens: usize,
    ) -> Pass<'_, F> {
        let mut inner = self.lock();
        inner.begin(layer, experts, n_tokens);
        inner.feed(&self.form);
        Pass::new(&self.form, inner)
    }
}
