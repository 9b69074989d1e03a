//! GGUF files: written, read back, interrupted and resumed.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::io::Write;
use std::path::Path;

use cadre_checkpoint::gguf::{Array, Gguf, GgufPlan, GgufWriter, TensorPlan, Value, WriteOptions};
use cadre_kernels::Format;
use proptest::prelude::*;

const SIZES: [usize; 4] = [3, 64, 8, 1];

fn plan(max_part_bytes: Option<u64>) -> GgufPlan {
    let tensor = |(at, len): (usize, &usize)| TensorPlan {
        name: format!("blk.{at}.x.weight"),
        dtype: if *len == 64 {
            Format::Q8_0
        } else {
            Format::F32
        },
        shape: if *len == 8 { vec![2, 4] } else { vec![*len] },
    };
    GgufPlan {
        entries: vec![
            ("general.architecture".to_owned(), "olmoe".into()),
            ("a.list".to_owned(), Array::of_texts(["x", "y"]).into()),
        ],
        tensors: SIZES.iter().enumerate().map(tensor).collect(),
        max_part_bytes,
    }
}

/// Any bytes, as many as the tensor needs.
fn data(tensor: &TensorPlan) -> Vec<u8> {
    let n = tensor.dtype.n_bytes(tensor.shape.iter().product()).unwrap();
    (0..n)
        .map(|at| (at * 7 + tensor.name.len()) as u8)
        .collect()
}

/// Writes up to `n` tensors in pieces of three bytes and a last one in part.
fn write_some(writer: &mut GgufWriter, n: usize) {
    while let Some(tensor) = writer.next_tensor().cloned() {
        let bytes = data(&tensor);
        if writer.n_done() == n {
            writer
                .write(&tensor.name, &bytes[..bytes.len() / 2])
                .unwrap();
            return;
        }
        for piece in bytes.chunks(3) {
            writer.write(&tensor.name, piece).unwrap();
        }
    }
}

fn begin(target: &Path, max_part_bytes: Option<u64>) -> GgufWriter {
    GgufWriter::create_or_resume(target, plan(max_part_bytes), &WriteOptions::default()).unwrap()
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        (
            path.file_name().unwrap().to_str().unwrap().to_owned(),
            fs::read(path).unwrap(),
        )
    };
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(entry).collect();
    files.sort();
    files
}

/// What an uninterrupted writer makes.
fn reference(max_part_bytes: Option<u64>) -> Vec<(String, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = begin(&folder.path().join("m.gguf"), max_part_bytes);
    write_some(&mut writer, SIZES.len());
    let paths = writer.finish().unwrap();
    let files = files(folder.path());
    assert_eq!(files.len(), paths.len(), "no partial file or journal stays");
    let planned = plan(max_part_bytes)
        .files(&folder.path().join("m.gguf"))
        .unwrap();
    let made: Vec<_> = files
        .iter()
        .map(|(name, bytes)| (folder.path().join(name), bytes.len() as u64))
        .collect();
    assert_eq!(planned, made);
    files
}

#[test]
fn what_is_written_is_read_back() {
    for (most, n_files) in [(None, 1), (Some(420), 2), (Some(350), 3)] {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = begin(&folder.path().join("m.gguf"), most);
        write_some(&mut writer, SIZES.len());
        let paths = writer.finish().unwrap();
        assert_eq!(paths.len(), n_files, "{most:?}");
        for path in &paths {
            assert!(fs::metadata(path).unwrap().len() <= most.unwrap_or(u64::MAX));
            let gguf = Gguf::open(path).unwrap();
            assert_eq!(gguf.entries(), plan(None).entries);
            for (found, expected) in gguf.tensors().iter().zip(plan(None).tensors) {
                assert_eq!(found.bytes, data(&expected), "{}", expected.name);
                let found = TensorPlan {
                    name: found.name.clone(),
                    dtype: found.dtype,
                    shape: found.shape.clone(),
                };
                assert_eq!(found, expected);
            }
        }
    }
}

#[test]
fn alignment_is_honoured_in_every_part() {
    let folder = tempfile::tempdir().unwrap();
    let mut plan = plan(Some(650));
    plan.entries
        .push(("general.alignment".to_owned(), Value::U32(128)));
    let target = folder.path().join("m.gguf");
    let mut writer = GgufWriter::create_or_resume(&target, plan, &WriteOptions::default()).unwrap();
    write_some(&mut writer, SIZES.len());
    let paths = writer.finish().unwrap();
    assert!(paths.len() > 1);
    assert_eq!(fs::metadata(&paths[0]).unwrap().len() % 128, 0);
    assert_eq!(Gguf::open(&paths[0]).unwrap().tensors().len(), SIZES.len());
}

#[test]
fn existing_files_are_not_replaced_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.gguf");
    fs::write(&target, "mine").unwrap();
    let again =
        |options: &WriteOptions<'_>| GgufWriter::create_or_resume(&target, plan(None), options);
    let error = again(&WriteOptions::default()).unwrap_err().to_string();
    assert!(error.contains("m.gguf: it exists already"), "{error}");
    assert_eq!(files(folder.path()).len(), 1);
    let mut writer = again(&WriteOptions {
        replace: true,
        ..WriteOptions::default()
    })
    .unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"mine");
    write_some(&mut writer, SIZES.len());
    writer.finish().unwrap();
    assert_eq!(files(folder.path()), reference(None));
}

#[test]
fn another_source_or_plan_starts_over_and_abandoning_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.gguf");
    let begin = |source, max_part_bytes| {
        let options = WriteOptions {
            source,
            ..WriteOptions::default()
        };
        GgufWriter::create_or_resume(&target, plan(max_part_bytes), &options).unwrap()
    };
    write_some(&mut begin("a", Some(350)), 2);
    assert_eq!(begin("a", Some(350)).n_done(), 2);
    write_some(&mut begin("b", Some(350)), 1);
    assert_eq!(begin("b", Some(350)).n_done(), 1);
    let mut writer = begin("b", None);
    assert_eq!(writer.n_done(), 0);
    write_some(&mut writer, 1);
    let names: Vec<String> = files(folder.path())
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(
        names,
        [".m.gguf.journal", ".m.gguf.partial"],
        "no stale parts"
    );
    writer.abandon().unwrap();
    assert!(files(folder.path()).is_empty());
}

#[test]
fn wrong_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = begin(&folder.path().join("m.gguf"), None);
    let error = writer.write("x", &[]).unwrap_err().to_string();
    assert!(
        error.contains("`x` came, but `blk.0.x.weight` is due"),
        "{error}"
    );
    let error = writer
        .write("blk.0.x.weight", &[0; 13])
        .unwrap_err()
        .to_string();
    assert!(error.contains("has 12 bytes, but 13 came"), "{error}");
    let error = writer.finish().unwrap_err().to_string();
    assert!(
        error.contains("`blk.0.x.weight` is not complete (0 of 4 are)"),
        "{error}"
    );
}

#[test]
fn plans_that_cannot_be_written_are_refused() {
    let refused = |change: &dyn Fn(&mut GgufPlan), words: &str| {
        let mut plan = plan(None);
        change(&mut plan);
        let error = plan.files(Path::new("m.gguf")).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(&|plan| plan.tensors[1].name = "x".repeat(64), "64 bytes");
    refused(
        &|plan| plan.tensors[1].name = plan.tensors[0].name.clone(),
        "twice",
    );
    refused(&|plan| plan.tensors[1].shape = vec![33], "blocks");
    refused(&|plan| plan.tensors[1].shape = vec![], "1 to 4 dimensions");
    refused(
        &|plan| plan.tensors[1].shape = vec![usize::MAX, 32],
        "larger",
    );
    refused(
        &|plan| plan.tensors[0].dtype = Format::U8,
        "no number format U8",
    );
    refused(
        &|plan| plan.entries[1].0 = "general.architecture".to_owned(),
        "twice",
    );
    refused(
        &|plan| plan.entries[1].0 = "split.no".to_owned(),
        "set by the writer",
    );
    refused(
        &|plan| plan.entries[1] = ("general.alignment".to_owned(), Value::U32(12)),
        "power of two",
    );
    refused(
        &|plan| plan.max_part_bytes = Some(200),
        "allow larger parts",
    );
    let error = plan(None)
        .files(Path::new("m.bin"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("does not end in .gguf"), "{error}");
}

#[test]
fn renames_that_were_interrupted_are_completed() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.gguf");
    write_some(&mut begin(&target, Some(350)), SIZES.len());
    let path = |name: &str| folder.path().join(name);
    let mut journal = fs::OpenOptions::new()
        .append(true)
        .open(path(".m.gguf.journal"))
        .unwrap();
    journal.write_all(b"publish\n").unwrap();
    drop(journal);
    let part = "m-00001-of-00003.gguf";
    fs::rename(path(&format!(".{part}.partial")), path(part)).unwrap();
    let writer = begin(&target, Some(350));
    assert_eq!(writer.n_done(), SIZES.len());
    writer.finish().unwrap();
    assert_eq!(files(folder.path()), reference(Some(350)));
}

#[test]
fn damaged_padding_is_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.gguf");
    write_some(&mut begin(&target, None), 1);
    let partial = folder.path().join(".m.gguf.partial");
    let mut bytes = fs::read(&partial).unwrap();
    // The first tensor has 12 bytes and 20 of padding, and half of the second, 34 bytes, follows.
    let padding = bytes.len() - 34 - 1;
    bytes[padding] = 1;
    fs::write(&partial, bytes).unwrap();
    let mut writer = begin(&target, None);
    assert_eq!(writer.n_done(), 0);
    write_some(&mut writer, SIZES.len());
    writer.finish().unwrap();
    assert_eq!(files(folder.path()), reference(None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Killed after any tensor, with any of the files cut or damaged anywhere: the outcome is the same to the byte.
    #[test]
    fn resuming_gives_the_same_bytes(
        is_split: bool, n in 0..4usize, victim in 0..4usize, at in 0..600usize, cuts: bool,
    ) {
        let most = is_split.then_some(350);
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("m.gguf");
        write_some(&mut begin(&target, most), n);
        if let Some((name, mut bytes)) = files(folder.path()).into_iter().nth(victim) {
            if cuts {
                bytes.truncate(at);
            } else if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 0x10;
            }
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let mut writer = begin(&target, most);
        prop_assert!(writer.n_done() <= n);
        write_some(&mut writer, SIZES.len());
        writer.finish().unwrap();
        prop_assert_eq!(files(folder.path()), reference(most));
    }
}
