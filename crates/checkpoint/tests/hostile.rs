//! Damaged and hostile files: whatever the bytes, readers neither panic, nor hang, nor allocate more than the input
//! accounts for.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cadre_checkpoint::gguf::{Array, Gguf, GgufPlan, GgufWriter, TensorPlan, Value, WriteOptions};
use cadre_checkpoint::{Checkpoint, ModelConfig, read_safetensors};
use cadre_kernels::Format;
use cadre_testkit::golden_dir;
use proptest::prelude::*;
use serde_json::{Value as Json, json};

const HOSTILE_U32: [u32; 9] = [0, 1, 2, 3, 7, 1 << 16, i32::MAX as u32, 1 << 31, u32::MAX];

const HOSTILE_F32: [f32; 6] = [f32::NAN, f32::INFINITY, 0.0, -1.0, 1e38, 1e-40];

thread_local! {
    /// Bytes that this thread has allocated in all, freed or not.
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is done by the system's allocator; counting touches only a `Cell` without a destructor.
#[expect(unsafe_code, reason = "allocators are unsafe to implement")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get().saturating_add(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Result, allocated bytes and time of `work`.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize, Duration) {
    let (before, start) = (ALLOCATED.get(), Instant::now());
    let result = work();
    (result, ALLOCATED.get() - before, start.elapsed())
}

/// Reads everything that a GGUF file offers.
fn exhaust_gguf(bytes: &Bytes) -> bool {
    let Ok(gguf) = Gguf::from_bytes("m.gguf", bytes.clone()) else {
        return false;
    };
    for (key, value) in gguf.entries() {
        drop((gguf.size(key), gguf.f32(key), gguf.flag(key), gguf.u32(key)));
        drop((gguf.i32s(key), gguf.f32s(key), gguf.sizes_per_layer(key, 3)));
        drop((
            gguf.text(key).map(str::len),
            gguf.strings(key).map(|texts| texts.len()),
        ));
        if let Value::Array(array) = value {
            assert!(array.iter().count() == array.len());
        }
    }
    for tensor in gguf.tensors() {
        let n_values: usize = tensor.shape.iter().product();
        assert_eq!(tensor.dtype.n_bytes(n_values), Some(tensor.bytes.len()));
        assert_eq!(gguf.tensor(&tensor.name).unwrap().name, tensor.name);
    }
    true
}

fn exhaust_safetensors(bytes: &Bytes) -> bool {
    let Ok(tensors) = read_safetensors("m.safetensors", bytes) else {
        return false;
    };
    for tensor in tensors {
        let n_values: usize = tensor.shape.iter().product();
        assert_eq!(tensor.dtype.n_bytes(n_values), Some(tensor.bytes.len()));
    }
    true
}

fn exhaust_config(bytes: &Bytes) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| ModelConfig::parse("m", text, None).is_ok())
}

fn exhaust_gguf_model(bytes: &Bytes) -> bool {
    let gguf = Gguf::from_bytes("m.gguf", bytes.clone());
    gguf.and_then(Checkpoint::from_gguf).is_ok()
}

/// A reader that is fed with hostile bytes.
type Reader = fn(&Bytes) -> bool;

/// Reads `bytes` within limits that depend on their length alone.
#[track_caller]
fn check(read: Reader, bytes: Vec<u8>) {
    let bytes = Bytes::from(bytes);
    let (_, allocated, time) = measured(|| read(&bytes));
    let most = (64 << 10) + 512 * bytes.len();
    assert!(
        allocated <= most,
        "{allocated} bytes allocated for {} read",
        bytes.len()
    );
    assert!(time < Duration::from_secs(5), "{time:?}");
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(golden_dir().join(name)).unwrap()
}

#[derive(Debug, Clone)]
enum Damage {
    Flip {
        at: prop::sample::Index,
        bit: u8,
    },
    Truncate {
        at: prop::sample::Index,
    },
    Splice {
        at: prop::sample::Index,
        number: u64,
        width: usize,
    },
    Insert {
        at: prop::sample::Index,
        byte: u8,
        n: usize,
    },
    Copy {
        from: prop::sample::Index,
        to: prop::sample::Index,
        n: usize,
    },
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    let number = prop_oneof![
        Just(u64::MAX),
        Just(1 << 60),
        Just(1 << 63),
        Just(u64::from(u32::MAX)),
        Just(1 << 31),
        0..64u64,
        any::<u64>(),
    ];
    let width = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    prop_oneof![
        (at(), 0..8u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        at().prop_map(|at| Damage::Truncate { at }),
        (at(), number, width).prop_map(|(at, number, width)| Damage::Splice { at, number, width }),
        (at(), any::<u8>(), 1..40usize).prop_map(|(at, byte, n)| Damage::Insert { at, byte, n }),
        (at(), at(), 1..80usize).prop_map(|(from, to, n)| Damage::Copy { from, to, n }),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    if bytes.is_empty() {
        return;
    }
    let len = bytes.len();
    match damage {
        Damage::Flip { at, bit } => bytes[at.index(len)] ^= 1 << bit,
        Damage::Truncate { at } => bytes.truncate(at.index(len)),
        Damage::Splice { at, number, width } => {
            let at = at.index(len);
            let to = (at + width).min(len);
            bytes[at..to].copy_from_slice(&number.to_le_bytes()[..to - at]);
        }
        Damage::Insert { at, byte, n } => {
            let at = at.index(len);
            bytes.splice(at..at, std::iter::repeat_n(*byte, *n));
        }
        Damage::Copy { from, to, n } => {
            let (from, to) = (from.index(len), to.index(len));
            let n = (*n).min(len - from).min(len - to);
            bytes.copy_within(from..from + n, to);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8000))]

    #[test]
    fn damaged_gguf(damages in prop::collection::vec(damage(), 1..5), header_only: bool) {
        let mut bytes = golden("gguf/all.gguf");
        if header_only {
            // Damage to the data is seen by nobody; most cases are to hit what is parsed.
            let data = bytes.split_off(2100);
            damages.iter().for_each(|damage| apply(&mut bytes, damage));
            bytes.extend(data);
        } else {
            damages.iter().for_each(|damage| apply(&mut bytes, damage));
        }
        check(exhaust_gguf, bytes);
    }

    #[test]
    fn damaged_safetensors(damages in prop::collection::vec(damage(), 1..5)) {
        let json = concat!(
            r#"{"__metadata__":{"format":"pt"},"model.norm.weight":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"#,
            r#""a":{"dtype":"BF16","shape":[2,2],"data_offsets":[12,20]},"b":{"dtype":"U8","shape":[1],"data_offsets":[20,21]}}"#
        );
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.bytes());
        bytes.extend([0; 21]);
        assert!(exhaust_safetensors(&bytes.clone().into()));
        damages.iter().for_each(|damage| apply(&mut bytes, damage));
        check(exhaust_safetensors, bytes);
    }
}

/// Values that no key expects, or none larger.
fn hostile_json() -> impl Strategy<Value = Json> {
    prop_oneof![
        Just(Json::Null),
        Just(json!(true)),
        Just(json!("")),
        Just(json!("yarn")),
        Just(json!([])),
        Just(json!({})),
        Just(json!([u64::MAX, -1, 0])),
        Just(json!(1e308)),
        Just(json!(1e-320)),
        Just(json!(-1)),
        (0..64u32).prop_map(|shift| json!(1u64 << shift)),
        Just(json!(u64::MAX)),
        (0..9u64).prop_map(|small| json!(small)),
    ]
}

/// Every golden config.json.
fn configs() -> Vec<Json> {
    let folders = |path: &Path| -> Vec<_> {
        let entries = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).collect()
    };
    let mut files: Vec<_> = folders(&golden_dir())
        .iter()
        .flat_map(|path| folders(path))
        .collect();
    files.sort();
    let texts = files
        .iter()
        .filter_map(|path| std::fs::read(path.join("config.json")).ok());
    texts
        .map(|text| serde_json::from_slice(&text).unwrap())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// All golden configurations with up to three keys, at the top or one level down, given other values.
    #[test]
    fn damaged_config(changes in prop::collection::vec((any::<prop::sample::Index>(), hostile_json()), 1..4)) {
        for mut config in configs() {
            for (at, value) in &changes {
                let mut slots: Vec<&mut Json> = Vec::new();
                for slot in config.as_object_mut().unwrap().values_mut() {
                    if slot.as_object().is_some_and(|inner| !inner.is_empty()) {
                        slots.extend(slot.as_object_mut().unwrap().values_mut());
                    } else {
                        slots.push(slot);
                    }
                }
                let at = at.index(slots.len());
                *slots[at] = value.clone();
            }
            check(exhaust_config, config.to_string().into_bytes());
        }
    }
}

/// Inputs on which a fuzzer once found something, and starting points that are worth keeping: `fuzz/corpus-found`.
#[test]
fn inputs_that_found_something_stay_harmless() {
    let readers: [(&str, Reader); 2] =
        [("gguf", exhaust_gguf), ("safetensors", exhaust_safetensors)];
    for (folder, read) in readers {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../fuzz/corpus-found")
            .join(folder);
        let mut n_files = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            check(read, std::fs::read(entry.unwrap().path()).unwrap());
            n_files += 1;
        }
        assert!(n_files > 0, "{}", folder.display());
    }
}

/// Every scalar of every golden GGUF model, one at a time, replaced by numbers that no key expects.
#[test]
fn damaged_gguf_models() {
    let folders = std::fs::read_dir(golden_dir().join("gguf_models")).unwrap();
    let files: Vec<_> = folders
        .map(|entry| entry.unwrap().path().join("model.gguf"))
        .collect();
    let mut n_models = 0;
    for file in files.iter().filter(|file| file.is_file()) {
        let whole = std::fs::read(file).unwrap();
        let gguf = Gguf::from_bytes("m.gguf", whole.clone().into()).unwrap();
        for (key, value) in gguf.entries() {
            let number: Vec<[u8; 4]> = match value {
                Value::U32(_) | Value::I32(_) => {
                    HOSTILE_U32.iter().map(|n| n.to_le_bytes()).collect()
                }
                Value::F32(_) => HOSTILE_F32.iter().map(|n| n.to_le_bytes()).collect(),
                _ => continue,
            };
            // The key with its length, then the type, then the value.
            let line = [&(key.len() as u64).to_le_bytes()[..], key.as_bytes()].concat();
            let at = whole
                .windows(line.len())
                .position(|bytes| bytes == line)
                .unwrap()
                + line.len()
                + 4;
            for number in number {
                let mut bytes = whole.clone();
                bytes[at..at + 4].copy_from_slice(&number);
                check(exhaust_gguf_model, bytes);
            }
        }
        assert!(exhaust_gguf_model(&whole.into()), "{}", file.display());
        n_models += 1;
    }
    assert!(n_models > 10);
}

#[test]
fn a_header_of_many_tensors_is_read_in_one_pass() {
    let n = 30_000;
    let line = |at| {
        format!(
            r#""layers.{at}.weight":{{"dtype":"BF16","shape":[1,2],"data_offsets":[{},{}]}}"#,
            4 * at,
            4 * at + 4
        )
    };
    let json = format!("{{{}}}", (0..n).map(line).collect::<Vec<_>>().join(","));
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.bytes());
    bytes.resize(bytes.len() + 4 * n, 0);
    let bytes = Bytes::from(bytes);
    let (tensors, allocated, time) = measured(|| read_safetensors("m", &bytes).unwrap());
    assert_eq!(tensors.len(), n);
    assert!(allocated < 30 << 20, "{allocated} bytes allocated");
    // Some 10 ms on an idle machine; the limit is for busy ones.
    assert!(time < Duration::from_secs(2), "{time:?}");
}

/// A table of contents of 30 000 tensors and a vocabulary of 150 000 words, for 10 GB of data that are not there.
#[cfg(target_os = "linux")]
#[test]
fn opening_a_large_file_touches_only_its_header() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.gguf");
    let words = Array::of_texts((0..150_000).map(|word| format!("word{word}")));
    let tensor = |at| TensorPlan {
        name: format!("blk.{at}.weight"),
        dtype: Format::Q8_0,
        shape: vec![320, 1024],
    };
    let plan = GgufPlan {
        entries: vec![("tokenizer.ggml.tokens".to_owned(), words.into())],
        tensors: (0..30_000).map(tensor).collect(),
        max_part_bytes: None,
    };
    let [(_, n_bytes)] = plan.files(&target).unwrap()[..] else {
        panic!("one file is planned");
    };
    assert!(n_bytes > 10_000_000_000);
    let mut writer = GgufWriter::create_or_resume(&target, plan, &WriteOptions::default()).unwrap();
    writer.write("blk.0.weight", &[0]).unwrap();
    drop(writer);
    // The unfinished file has the header; as a sparse file it has its full length without taking it.
    std::fs::rename(folder.path().join(".m.gguf.partial"), &target).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&target)
        .unwrap()
        .set_len(n_bytes)
        .unwrap();
    let (gguf, allocated, time) = measured(|| Gguf::open(&target).unwrap());
    assert_eq!(gguf.tensors().len(), 30_000);
    assert!(allocated < 50 << 20, "{allocated} bytes allocated");
    // Some 10 ms on an idle machine; the limit is for busy ones.
    assert!(time < Duration::from_secs(2), "{time:?}");
    let (words, ..) = measured(|| gguf.strings("tokenizer.ggml.tokens").unwrap().len());
    assert_eq!(words, 150_000);
}
