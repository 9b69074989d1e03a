//! The store over real files: whatever the budget, policy, reader, faults and order of completion, an expert is its own
//! bytes or an error that names it.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use cadre_store::reader::{Fault, FaultyReader, PoolReader, Reader, ReaderKind, When};
use cadre_store::{AheadKind, ExpertId, Form, Piece, PolicyKind, Store, StoreError, StoreOptions};
use proptest::prelude::*;

const N_LAYERS: usize = 3;
const N_EXPERTS: usize = 10;

/// Experts that are copies of their bytes. The pieces of an expert lie in two files, at odd places.
#[derive(Debug)]
struct Copies {
    pieces: Vec<Vec<Piece>>,
    /// Expert that no weights can be made of.
    broken: Option<ExpertId>,
}

impl Copies {
    fn at(&self, id: ExpertId) -> &[Piece] {
        &self.pieces[usize::from(id.layer) * N_EXPERTS + usize::from(id.expert)]
    }
}

impl Form for Copies {
    type Expert = Vec<u8>;
    type Memory = usize;
    type Error = StoreError;

    fn pieces(&self, expert: ExpertId) -> &[Piece] {
        self.at(expert)
    }

    fn n_bytes(&self, expert: ExpertId) -> usize {
        let pieces = self.at(expert).iter();
        pieces
            .map(|piece| (piece.range.end - piece.range.start) as usize)
            .sum()
    }

    fn memory(&self, n_bytes: usize) -> Option<usize> {
        Some(n_bytes)
    }

    fn make(
        &self,
        expert: ExpertId,
        pieces: &[Bytes],
        memory: &mut usize,
    ) -> Result<Vec<u8>, StoreError> {
        if self.broken == Some(expert) {
            return Err(StoreError::NoMemory { n_bytes: 0 });
        }
        let bytes = pieces.concat();
        assert!(bytes.len() <= *memory);
        Ok(bytes)
    }
}

struct Files {
    _folder: tempfile::TempDir,
    paths: Vec<PathBuf>,
    contents: Vec<Vec<u8>>,
}

/// Two files of noise, and experts of two sizes in them, also within a layer.
fn files() -> (Files, Copies) {
    let folder = tempfile::tempdir().unwrap();
    let mut state = 1_u32;
    let mut noise = |n: usize| -> Vec<u8> {
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        std::iter::repeat_with(next).take(n).collect()
    };
    let sizes = |layer: usize, expert: usize| {
        if (layer + expert) % 3 == 1 {
            5000
        } else {
            9001
        }
    };
    let contents: Vec<Vec<u8>> = (0..2).map(|_| noise(300_000)).collect();
    let paths: Vec<PathBuf> = (0..2)
        .map(|i| folder.path().join(format!("part-{i}")))
        .collect();
    for (path, contents) in paths.iter().zip(&contents) {
        std::fs::File::create(path)
            .unwrap()
            .write_all(contents)
            .unwrap();
    }
    let mut next = [17_u64, 4095];
    let mut pieces = Vec::new();
    for layer in 0..N_LAYERS {
        for expert in 0..N_EXPERTS {
            let of = |file: usize, n: u64, next: &mut [u64; 2]| {
                let start = next[file];
                next[file] += n;
                Piece {
                    file,
                    range: start..start + n,
                }
            };
            let half = sizes(layer, expert) / 2;
            pieces.push(vec![
                of(0, half, &mut next),
                of(1, sizes(layer, expert) - half, &mut next),
            ]);
        }
    }
    let files = Files {
        _folder: folder,
        paths,
        contents,
    };
    (
        files,
        Copies {
            pieces,
            broken: None,
        },
    )
}

impl Files {
    fn expected(&self, form: &Copies, id: ExpertId) -> Vec<u8> {
        let pieces = form.at(id).iter();
        let bytes =
            pieces.map(|p| &self.contents[p.file][p.range.start as usize..p.range.end as usize]);
        bytes.collect::<Vec<_>>().concat()
    }
}

/// Computes a layer: every expert has to be its bytes.
fn pass(
    store: &Store<Copies>,
    files: &Files,
    (layer, experts): (u16, &[u16]),
    ahead: &[u16],
) -> Result<(), StoreError> {
    let mut pass = store.begin(layer, experts.iter().map(|e| (*e, 1)), 1);
    pass.expect((layer + 1) % N_LAYERS as u16, ahead.iter().copied());
    let order = pass.order().to_vec();
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, experts);
    let mut seen = vec![false; order.len()];
    while let Some(batch) = pass.next_batch()? {
        for at in batch {
            assert!(!std::mem::replace(&mut seen[at], true), "once");
            let id = ExpertId {
                layer,
                expert: order[at],
            };
            assert!(
                *pass.expert(at) == files.expected(store.form(), id),
                "{id:?}"
            );
        }
    }
    assert!(seen.iter().all(|seen| *seen));
    Ok(())
}

fn options(budget: u64, policy: PolicyKind) -> StoreOptions {
    StoreOptions {
        budget,
        policy,
        ahead: AheadKind::Off,
        request_bytes: 4096,
        ..StoreOptions::default()
    }
}

fn open(form: Copies, files: &Files, options: StoreOptions) -> Store<Copies> {
    Store::new(form, [N_LAYERS, N_EXPERTS], &files.paths, &options).unwrap()
}

fn subset() -> impl Strategy<Value = Vec<u16>> {
    proptest::collection::btree_set(0..N_EXPERTS as u16, 0..=N_EXPERTS)
        .prop_map(|set| set.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_expert_is_its_bytes(
        budget in prop_oneof![Just(0_u64), 0_u64..400_000],
        policy in 0..PolicyKind::all().len(),
        reader in 0..ReaderKind::ALL.len(),
        passes in proptest::collection::vec((subset(), subset()), 1..30),
    ) {
        let (files, form) = files();
        let reader = ReaderKind::ALL[reader].open(3);
        // A kind that this system does not have is tested where it is.
        let reader = reader.or_else(|_| ReaderKind::Pread.open(3)).unwrap();
        let options = options(budget, PolicyKind::all()[policy]);
        let store = Store::with_reader(form, [N_LAYERS, N_EXPERTS], &files.paths, (&options, reader)).unwrap();
        for (at, (experts, ahead)) in passes.iter().enumerate() {
            pass(&store, &files, ((at % N_LAYERS) as u16, experts), ahead).unwrap();
        }
        let stats = store.stats();
        prop_assert_eq!(stats.lookups, passes.iter().map(|(experts, _)| experts.len() as u64).sum::<u64>());
        // What was wanted was in memory, or has been read; nothing was read twice for one want.
        let read_for_others = stats.lookups + passes.iter().map(|(_, ahead)| ahead.len() as u64).sum::<u64>();
        prop_assert!(stats.hits + stats.reads >= stats.lookups && stats.reads <= read_for_others);
    }

    #[test]
    fn faults_are_errors_and_the_store_survives_them(
        at in 0_u64..12,
        fault in 0..3_usize,
        experts in subset(),
    ) {
        let (files, form) = files();
        let fault = [Fault::Errno(5), Fault::EndsAfter(100), Fault::Delay(Duration::from_millis(20))][fault];
        let reader = FaultyReader::new(PoolReader::new(2).unwrap()).with(When::Nth(at), fault);
        let options = options(100_000, PolicyKind::default());
        let store = Store::with_reader(form, [N_LAYERS, N_EXPERTS], &files.paths, (&options, Box::new(reader) as Box<dyn Reader>)).unwrap();
        match pass(&store, &files, (0, &experts), &[1, 2, 3]) {
            Ok(()) => {}
            Err(error) => {
                let said = error.to_string();
                prop_assert!(said.contains("part-") && said.contains("expert"), "{}", said);
                prop_assert!(!matches!(fault, Fault::Delay(_)), "waiting is no error: {}", said);
            }
        }
        // The fault came once; from then on all is well, also for what failed.
        for layer in [1, 0, 2, 0] {
            let all: Vec<u16> = (0..N_EXPERTS as u16).collect();
            let result = pass(&store, &files, (layer, &all), &[]);
            prop_assert!(result.is_ok() || layer == 1, "{:?}", result);
        }
    }
}

#[test]
fn what_cannot_be_made_is_an_error_and_not_kept() {
    let (files, mut form) = files();
    let broken = ExpertId {
        layer: 0,
        expert: 4,
    };
    form.broken = Some(broken);
    let store = open(form, &files, options(1 << 20, PolicyKind::Lru));
    for _ in 0..2 {
        assert!(matches!(
            pass(&store, &files, (0, &[1, 4, 5]), &[]),
            Err(StoreError::NoMemory { .. })
        ));
        pass(&store, &files, (0, &[1, 5]), &[4]).unwrap();
    }
}

#[test]
fn a_file_that_is_cut_off_or_written_to_is_noticed() {
    let (files, form) = files();
    let store = open(form, &files, options(0, PolicyKind::Lru));
    pass(&store, &files, (0, &[0, 1]), &[]).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&files.paths[1])
        .unwrap();
    file.set_len(5000).unwrap();
    let error = pass(&store, &files, (2, &[9]), &[]).unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::Truncated { .. } | StoreError::Changed { .. }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("part-1"), "{error}");
}

#[test]
fn a_file_that_is_replaced_stays_the_old_one() {
    let (files, form) = files();
    let store = open(form, &files, options(0, PolicyKind::Lru));
    let other = files.paths[0].with_extension("new");
    std::fs::write(&other, vec![7; 300_000]).unwrap();
    std::fs::rename(&other, &files.paths[0]).unwrap();
    pass(&store, &files, (0, &[0, 1, 2]), &[]).unwrap();
}

#[test]
fn a_second_pass_comes_from_memory() {
    let (files, form) = files();
    let store = open(form, &files, options(1 << 20, PolicyKind::Lfu));
    let all: Vec<u16> = (0..N_EXPERTS as u16).collect();
    for _ in 0..2 {
        for layer in 0..N_LAYERS as u16 {
            pass(&store, &files, (layer, &all), &all).unwrap();
        }
    }
    let stats = store.stats();
    assert_eq!((stats.reads, stats.hits), (30, 30));
    // The first layer could not be foreseen.
    assert!(stats.read_ahead > 0 && stats.read_ahead <= 20);
    assert_eq!(stats.wasted, 0);
    assert!(store.n_bytes() <= 1 << 20);
}

#[test]
fn preloading_fills_what_is_empty_and_nothing_else() {
    let (files, form) = files();
    let all = options(1 << 20, PolicyKind::Lfu);
    let store = open(form, &files, all);
    let n_read = std::cell::Cell::new(0);
    store.preload(&|n| n_read.set(n_read.get() + n)).unwrap();
    assert_eq!(n_read.get(), 30);
    let before = store.stats();
    let every: Vec<u16> = (0..N_EXPERTS as u16).collect();
    pass(&store, &files, (1, &every), &[]).unwrap();
    store.preload(&|_| panic!("nothing is missing")).unwrap();
    let since = store.stats().since(&before);
    assert_eq!((since.reads, since.hits), (0, 10));

    let (files, form) = self::files();
    let few = options(100_000, PolicyKind::Lfu);
    let store = open(form, &files, few);
    store.preload(&|_| {}).unwrap();
    let stats = store.stats();
    assert!(stats.reads as usize <= store.n_cached() && stats.evictions == 0);
    pass(&store, &files, (0, &every), &[]).unwrap();
    assert!(store.stats().hits > 0);
}

/// Random picks of three layers, told before every pass: nothing is read in vain, every miss but the first layer's is
/// asked for before its turn, and fewer experts are read than without, since what is awaited is not given up.
#[test]
fn what_is_foreseen_is_read_early_and_kept() {
    let run = |ahead: AheadKind| {
        let (files, form) = files();
        let store = StoreOptions {
            ahead,
            foreseen: true,
            scored: true,
            ..options(120_000, PolicyKind::Lru)
        };
        let store = open(form, &files, store);
        let mut state = 7_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as usize % N_EXPERTS
        };
        for _ in 0..60 {
            let picks: Vec<Vec<u16>> = (0..N_LAYERS)
                .map(|_| {
                    let mut picks = vec![next() as u16, next() as u16];
                    picks.sort_unstable();
                    picks.dedup();
                    picks
                })
                .collect();
            let mut foresight = store.foresee();
            for (layer, picks) in (0..).zip(&picks) {
                foresight.wants(layer, picks);
            }
            drop(foresight);
            for (layer, picks) in (0..).zip(&picks) {
                pass(&store, &files, (layer, picks), &[]).unwrap();
            }
        }
        (store.stats(), store.scores()[0].clone())
    };
    let (exact, score) = run(AheadKind::Exact);
    let (off, _) = run(AheadKind::Off);
    assert_eq!((score.name, score.overall().whole_sets()), ("exact", 1.0));
    assert_eq!(exact.lookups, off.lookups);
    assert_eq!(exact.wasted, 0);
    assert!(
        exact.read_ahead as f64 > 0.9 * exact.reads as f64,
        "{exact:?}"
    );
    assert!(exact.reads < off.reads, "{exact:?} {off:?}");
    assert_eq!(off.read_ahead, 0);
}
