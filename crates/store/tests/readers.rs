//! What all readers promise, over random files and requests: the bytes of the file, each request once, in any order.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use cadre_store::reader::{
    ALIGN, Completion, Fault, FaultyReader, OpenFile, PoolReader, Reader, ReaderKind, Request,
    SyncReader, When, aligned, best,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

/// Neither periodic in pages nor zero.
fn content(n_bytes: usize) -> Vec<u8> {
    let mixed = |at: usize| (at as u32).wrapping_mul(2_654_435_761) >> 13;
    (0..n_bytes).map(|at| mixed(at) as u8 | 1).collect()
}

fn file_in(folder: &Path, bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new_in(folder).unwrap();
    file.write_all(bytes).unwrap();
    // Direct reads see what is on the disk.
    file.as_file().sync_all().unwrap();
    file
}

/// One of every kind that works here.
fn readers(n_lanes: usize) -> Vec<Box<dyn Reader>> {
    let mut readers: Vec<Box<dyn Reader>> = ReaderKind::ALL
        .into_iter()
        .filter_map(|kind| kind.open(n_lanes).ok())
        .collect();
    let pool = PoolReader::new(n_lanes).unwrap();
    let disturbed = FaultyReader::new(pool)
        .with(When::Every(2), Fault::Overtaken(3))
        .with(When::Every(3), Fault::Delay(Duration::from_millis(1)))
        .with(When::Every(5), Fault::EndsAfter(usize::MAX));
    readers.push(Box::new(disturbed));
    readers
}

fn request(file: &OpenFile, tag: u64, page: usize, n_pages: usize) -> Request {
    Request {
        tag,
        file: file.file().clone(),
        offset: (page * ALIGN) as u64,
        memory: aligned(n_pages * ALIGN),
    }
}

/// Checks what came back for pages `wanted` of a file with the content `bytes`.
fn check(done: Completion, bytes: &[u8], wanted: &[(usize, usize)]) -> TestCaseResult {
    let (page, n_pages) = wanted[done.tag as usize];
    let start = (page * ALIGN).min(bytes.len());
    let end = ((page + n_pages) * ALIGN).min(bytes.len());
    prop_assert_eq!(done.memory.len(), n_pages * ALIGN);
    let n_read = done.result.unwrap();
    prop_assert_eq!(n_read, end - start);
    prop_assert!(done.memory[..n_read] == bytes[start..end]);
    Ok(())
}

/// Submits everything, taking what is finished after every `eager`th request, and the rest at the end.
fn read_all(
    reader: &mut dyn Reader,
    file: &OpenFile,
    (bytes, wanted): (&[u8], &[(usize, usize)]),
    eager: usize,
) -> TestCaseResult {
    let mut seen = BTreeMap::new();
    for (tag, &(page, n_pages)) in wanted.iter().enumerate() {
        reader.submit(request(file, tag as u64, page, n_pages));
        if tag % eager == 0 {
            while let Some(done) = reader.next(Duration::ZERO) {
                *seen.entry(done.tag).or_insert(0) += 1;
                check(done, bytes, wanted)?;
            }
        }
    }
    while let Some(done) = reader.next(Duration::from_secs(60)) {
        *seen.entry(done.tag).or_insert(0) += 1;
        check(done, bytes, wanted)?;
    }
    prop_assert_eq!(reader.n_pending(), 0);
    prop_assert_eq!(seen.len(), wanted.len());
    prop_assert!(seen.values().all(|&times| times == 1));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_reader_gives_the_bytes_of_the_file(
        n_bytes in 0usize..150_000,
        wanted in prop::collection::vec((0usize..45, 0usize..24), 1..40),
        n_lanes in 1usize..6,
        eager in 1usize..9,
        is_direct: bool,
    ) {
        let bytes = content(n_bytes);
        let folder = tempfile::tempdir().unwrap();
        let file = file_in(folder.path(), &bytes);
        let open = match is_direct {
            true => OpenFile::open(file.path()),
            false => OpenFile::open_buffered(file.path()),
        }
        .unwrap();
        for mut reader in readers(n_lanes) {
            read_all(&mut *reader, &open, (&bytes, &wanted), eager)?;
            // It can be used again.
            read_all(&mut *reader, &open, (&bytes, &wanted), 2 * eager)?;
        }
    }
}

#[test]
fn files_in_memory_are_read_whether_or_not_they_can_be_direct() {
    let memory = Path::new("/dev/shm");
    let folder = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    };
    let bytes = content(5 * ALIGN + 123);
    let file = file_in(folder.path(), &bytes);
    let open = OpenFile::open(file.path()).unwrap();
    let wanted = [(0, 3), (3, 10), (5, 1), (6, 1)];
    for mut reader in readers(2) {
        read_all(&mut *reader, &open, (&bytes, &wanted), 9).unwrap();
    }
    open.read_done(0..bytes.len() as u64);
}

#[test]
fn dropping_a_reader_in_the_middle_frees_everything() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = content(100 * ALIGN);
    let file = file_in(folder.path(), &bytes);
    let open = OpenFile::open(file.path()).unwrap();
    for mut reader in readers(3) {
        (0..200).for_each(|tag| reader.submit(request(&open, tag, tag as usize % 100, 8)));
        drop(reader);
        assert_eq!(std::sync::Arc::strong_count(open.file()), 1);
    }
}

#[test]
fn a_reader_may_be_used_from_one_thread_after_another() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = content(64 * ALIGN);
    let file = file_in(folder.path(), &bytes);
    let open = OpenFile::open(file.path()).unwrap();
    let wanted: Vec<_> = (0..64).map(|page| (page, 1)).collect();
    for mut reader in readers(4) {
        for (tag, &(page, n_pages)) in wanted.iter().enumerate() {
            reader.submit(request(&open, tag as u64, page, n_pages));
        }
        std::thread::scope(|scope| {
            let checked = scope.spawn(|| {
                while let Some(done) = reader.next(Duration::from_secs(60)) {
                    check(done, &bytes, &wanted).unwrap();
                }
                reader.n_pending()
            });
            assert_eq!(checked.join().unwrap(), 0);
        });
    }
}

#[test]
fn the_system_can_refuse_and_something_still_reads() {
    let (mut reader, _) = best(2);
    let folder = tempfile::tempdir().unwrap();
    let file = file_in(folder.path(), &content(10));
    let open = OpenFile::open(file.path()).unwrap();
    reader.submit(request(&open, 0, 0, 1));
    check(
        reader.next(Duration::from_secs(60)).unwrap(),
        &content(10),
        &[(0, 1)],
    )
    .unwrap();
}

#[cfg(unix)]
#[test]
fn what_the_disk_refuses_is_an_error_of_that_request_alone() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = content(ALIGN);
    let file = file_in(folder.path(), &bytes);
    let open = OpenFile::open(file.path()).unwrap();
    let directory = std::sync::Arc::new(std::fs::File::open(folder.path()).unwrap());
    for mut reader in readers(2) {
        let mut wrong = request(&open, 1, 0, 1);
        wrong.file = directory.clone();
        reader.submit(wrong);
        reader.submit(request(&open, 0, 0, 1));
        for _ in 0..2 {
            let done = reader.next(Duration::from_secs(60)).unwrap();
            match done.tag {
                0 => check(done, &bytes, &[(0, 1)]).unwrap(),
                _ => assert!(done.result.is_err(), "{} reads a folder", reader.name()),
            }
        }
    }
}

#[test]
fn faults_strike_what_the_script_names() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = content(8 * ALIGN);
    let file = file_in(folder.path(), &bytes);
    let open = OpenFile::open(file.path()).unwrap();
    let third = 2 * ALIGN as u64..3 * ALIGN as u64;
    let delay = Duration::from_millis(30);
    let mut reader = FaultyReader::new(SyncReader::default())
        .with(When::Nth(0), Fault::Errno(5))
        .with(When::Nth(1), Fault::EndsAfter(100))
        .with(When::Touches(third), Fault::Refused)
        .with(When::Nth(3), Fault::Delay(delay))
        .with(When::Nth(4), Fault::Overtaken(4));
    let start = std::time::Instant::now();
    (0..7).for_each(|at| reader.submit(request(&open, 10 + at, at as usize, 1)));
    assert_eq!(reader.n_pending(), 7);
    let mut order = Vec::new();
    while let Some(done) = reader.next(Duration::from_secs(10)) {
        let page = done.tag as usize - 10;
        order.push(page);
        let right = &bytes[page * ALIGN..(page + 1) * ALIGN];
        match page {
            0 => assert_eq!(done.result.unwrap_err().raw_os_error(), Some(5)),
            1 => {
                assert_eq!(done.result.unwrap(), 100);
                assert_eq!(done.memory[..100], right[..100]);
                assert_ne!(done.memory[100..], right[100..]);
            }
            2 => assert_eq!(
                done.result.unwrap_err().kind(),
                std::io::ErrorKind::InvalidInput
            ),
            _ => {
                assert_eq!(done.result.unwrap(), ALIGN);
                assert_eq!(done.memory, right);
            }
        }
        assert!(page != 3 || start.elapsed() >= delay);
    }
    assert_eq!(order.len(), 7);
    let place = |page| order.iter().position(|&one| one == page).unwrap();
    assert_eq!(place(3), 6, "delayed: {order:?}");
    assert!(place(4) > place(5), "overtaken: {order:?}");
    assert_eq!(reader.n_pending(), 0);
}
