//! Quantised GGUF files: formats of mixtures, of single tensors and of single experts; importance; refusals.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;

use cadre_checkpoint::gguf::{GgufPlan, GgufWriter, TensorPlan, WriteOptions};
use cadre_checkpoint::{
    Checkpoint, CheckpointError, Conversion, ConvertOptions, ConvertTo, Dtype, Importance, Mixture,
    QuantizeOptions, TargetDtype, tensor_specs,
};
use cadre_testkit::{Random, TinyFolder, TinyMoe};

const HIDDEN: usize = 256;
const EXPERTS: usize = 4;

/// Rows of all matrices of experts and of most others are whole super-blocks.
fn model() -> TinyFolder {
    let model = TinyMoe::default().n_experts(EXPERTS).configure(|config| {
        config.hidden_size = HIDDEN;
        config.moe.intermediate_size = HIDDEN;
    });
    model.build().unwrap()
}

fn options(dtype: TargetDtype, quantize: QuantizeOptions) -> ConvertOptions {
    ConvertOptions {
        target: ConvertTo::Gguf {
            max_part_bytes: None,
        },
        dtype,
        allow_differences: false,
        quantize,
    }
}

fn mixture(name: &str) -> TargetDtype {
    TargetDtype::Mix(Mixture::from_name(name).unwrap())
}

fn write(source: &Checkpoint, options: ConvertOptions, path: &Path) -> Checkpoint {
    let conversion = Conversion::plan(source, "tiny", options).unwrap();
    conversion.write(path, &mut |_| true).unwrap();
    let made = Checkpoint::open(path).unwrap();
    made.expect_exactly(&tensor_specs(made.config())).unwrap();
    made
}

fn format(checkpoint: &Checkpoint, name: &str) -> Dtype {
    checkpoint.tensor_info(name).unwrap().0
}

fn expert(layer: usize, expert: usize, part: &str) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight")
}

#[test]
fn mixtures_have_their_formats_and_the_router_stays() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let source = folder.open().unwrap();
    // Layer, part, and the formats of two layers (one eighth of two layers is none; every third and the last get more).
    let cases = [
        ("q4_k_m", Dtype::Q4K, Dtype::Q4K, Dtype::Q6K, 15),
        ("q4_k_s", Dtype::Q4K, Dtype::Q4K, Dtype::Q4K, 14),
        ("q2_k", Dtype::Q2K, Dtype::Q3K, Dtype::Q3K, 10),
        ("q3_k_m", Dtype::Q3K, Dtype::Q4K, Dtype::Q4K, 12),
        ("iq4_xs", Dtype::Iq4Xs, Dtype::Iq4Xs, Dtype::Iq4Xs, 30),
        ("mxfp4_moe", Dtype::Mxfp4, Dtype::Mxfp4, Dtype::Mxfp4, 38),
        ("q4_0", Dtype::Q4_0, Dtype::Q4_0, Dtype::Q4_0, 2),
    ];
    for (name, up, first_down, last_down, file_type) in cases {
        let path = scratch.path().join(format!("{name}.gguf"));
        let options = options(mixture(name), QuantizeOptions::default());
        let made = write(&source, options, &path);
        assert_eq!(format(&made, &expert(0, 2, "up")), up, "{name}");
        assert_eq!(format(&made, &expert(0, 2, "down")), first_down, "{name}");
        assert_eq!(format(&made, &expert(1, 2, "down")), last_down, "{name}");
        let head = match name {
            "mxfp4_moe" => Dtype::Q8_0,
            _ => Dtype::Q6K,
        };
        assert_eq!(format(&made, "lm_head.weight"), head, "{name}");
        let router = "model.layers.1.mlp.gate.weight";
        assert_eq!(format(&made, router), Dtype::F32, "{name}");
        let values = |checkpoint: &Checkpoint| checkpoint.tensor(router).unwrap().to_f32();
        assert_eq!(values(&made), values(&source));
        let gguf = made.gguf().unwrap();
        assert_eq!(gguf.u32("general.file_type").unwrap(), file_type, "{name}");
    }
}

/// An importance matrix for the stacks of up projections and down projections; `of(matrix, column)` for all layers.
fn imatrix(path: &Path, counts: &[f32], of: impl Fn(usize, usize) -> f32) -> Importance {
    let mut tensors = Vec::new();
    let mut data = Vec::new();
    for layer in 0..2 {
        for part in ["ffn_up_exps", "ffn_down_exps"] {
            let name = format!("blk.{layer}.{part}.weight");
            tensors.push(TensorPlan {
                name: format!("{name}.in_sum2"),
                dtype: Dtype::F32,
                shape: vec![counts.len(), HIDDEN],
            });
            let sums = (0..counts.len())
                .flat_map(|matrix| (0..HIDDEN).map(move |col| (matrix, col)))
                .map(|(matrix, col)| of(matrix, col) * counts[matrix]);
            data.push(sums.collect::<Vec<f32>>());
            tensors.push(TensorPlan {
                name: format!("{name}.counts"),
                dtype: Dtype::F32,
                shape: vec![counts.len(), 1],
            });
            data.push(counts.to_vec());
        }
    }
    let plan = GgufPlan {
        entries: vec![
            ("general.type".to_owned(), "imatrix".into()),
            ("imatrix.chunk_count".to_owned(), 5u32.into()),
        ],
        tensors,
        max_part_bytes: None,
    };
    let names: Vec<String> = plan.tensors.iter().map(|one| one.name.clone()).collect();
    let mut writer = GgufWriter::create_or_resume(path, plan, &WriteOptions::default()).unwrap();
    for (name, values) in names.iter().zip(&data) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    Importance::open(path).unwrap()
}

fn by(importance: Importance) -> QuantizeOptions {
    QuantizeOptions {
        importance: Some(Arc::new(importance)),
        ..QuantizeOptions::default()
    }
}

/// Sum of squared errors of a tensor in the columns for which `counts` holds.
fn error([a, b]: [&Checkpoint; 2], name: &str, counts: impl Fn(usize) -> bool) -> f64 {
    let values = [a, b].map(|checkpoint| checkpoint.tensor(name).unwrap().to_f32());
    let pairs = values[0].iter().zip(&values[1]).enumerate();
    pairs
        .filter(|(at, _)| counts(at % HIDDEN))
        .map(|(_, (a, b))| f64::from(a - b).powi(2))
        .sum()
}

#[test]
fn columns_that_count_more_lose_less_each_expert_by_its_own() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let source = folder.open().unwrap();
    let path = |name: &str| scratch.path().join(name);
    // Expert 0 is about even columns, expert 1 about odd ones, and expert 3 was never picked.
    let importance = imatrix(&path("i.gguf"), &[10.0, 20.0, 5.0, 0.0], |matrix, col| {
        if matrix < 2 && col % 2 == matrix {
            1.0
        } else {
            0.01
        }
    });
    assert_eq!(importance.unseen(), (4, 16));
    for name in [
        "q4_0", "q2_k", "q3_k_s", "q4_k_s", "q5_k_s", "q6_k", "iq4_nl", "iq4_xs",
    ] {
        let plain = options(mixture(name), QuantizeOptions::default());
        let plain = write(&source, plain, &path(&format!("{name}.gguf")));
        let weighted = options(mixture(name), by(importance.clone()));
        let weighted = write(&source, weighted, &path(&format!("{name}-i.gguf")));
        for (id, parity) in [(0, 0), (1, 1)] {
            let tensor = expert(1, id, "up");
            let of = |made, counts: &dyn Fn(usize) -> bool| error([&source, made], &tensor, counts);
            let (before, after) = (
                of(&plain, &|col| col % 2 == parity),
                of(&weighted, &|col| col % 2 == parity),
            );
            assert!(after < before, "{name}, expert {id}: {after} {before}");
        }
        // What has no importance is what it is without.
        let gate = expert(1, 0, "gate");
        let bytes = |made: &Checkpoint| made.tensor(&gate).unwrap().bytes.to_vec();
        assert_eq!(bytes(&plain), bytes(&weighted), "{name}");
        let gguf = weighted.gguf().unwrap();
        assert_eq!(gguf.text("quantize.imatrix.file").unwrap(), "i.gguf");
        assert_eq!(gguf.u32("quantize.imatrix.chunks_count").unwrap(), 5);
    }
    let conversion = options(mixture("q4_k_m"), by(importance));
    let conversion = Conversion::plan(&source, "tiny", conversion).unwrap();
    let notes = conversion.notes().join("; ");
    assert!(
        notes.contains("4 of 16 matrices of experts got no token"),
        "{notes}"
    );
    assert!(notes.contains("without importance"), "{notes}");
}

#[test]
fn another_importance_begins_anew() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let source = folder.open().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let [one, other] = ["a", "b"].map(|name| {
        let mut random = Random::new(name.len() as u64 + u64::from(name == "b"));
        let values = random.values(HIDDEN, 1.0);
        imatrix(&path(&format!("{name}.gguf")), &[1.0; EXPERTS], |_, col| {
            values[col].abs()
        })
    });
    let plan = |importance: &Importance| {
        let options = options(mixture("q4_k_s"), by(importance.clone()));
        Conversion::plan(&source, "tiny", options).unwrap()
    };
    let mut left = 3;
    let half = plan(&one).write(&path("out.gguf"), &mut |_| {
        left -= 1;
        left > 0
    });
    assert!(matches!(half, Err(CheckpointError::Interrupted { .. })));
    assert!(!path("out.gguf").exists());
    plan(&other)
        .write(&path("out.gguf"), &mut |_| true)
        .unwrap();
    plan(&other)
        .write(&path("whole.gguf"), &mut |_| true)
        .unwrap();
    let read = |name: &str| std::fs::read(path(name)).unwrap();
    // The names of the files differ by nothing but the model's.
    assert!(read("out.gguf") == read("whole.gguf"));
}

#[test]
fn unlike_experts_of_a_layer_get_tensors_of_their_own() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let source = folder.open().unwrap();
    let mut quantize = QuantizeOptions::default();
    let formats = [Dtype::Q8_0, Dtype::Q4K, Dtype::Q2K];
    for (id, dtype) in formats.into_iter().enumerate() {
        quantize.experts.insert((0, id), dtype);
    }
    for id in 0..EXPERTS {
        quantize.experts.insert((1, id), Dtype::Q6K);
    }
    let keep = options(TargetDtype::Keep, quantize);
    let made = write(&source, keep, &scratch.path().join("mixed.gguf"));
    for (id, dtype) in formats.into_iter().chain([Dtype::F32]).enumerate() {
        for part in ["gate", "up", "down"] {
            assert_eq!(format(&made, &expert(0, id, part)), dtype);
        }
    }
    let gguf = made.gguf().unwrap();
    assert!(gguf.tensor("blk.0.ffn_up.2.weight").is_some());
    assert!(gguf.tensor("blk.0.ffn_up_exps.weight").is_none());
    assert_eq!(
        gguf.tensor("blk.1.ffn_up_exps.weight").unwrap().dtype,
        Dtype::Q6K
    );
    let exact = |name: &str| error([&source, &made], name, |_| true);
    assert_eq!(exact(&expert(0, 3, "down")), 0.0);
    assert!(exact(&expert(0, 2, "down")) > exact(&expert(0, 0, "down")));
    assert_eq!(exact("model.embed_tokens.weight"), 0.0);
}

#[test]
fn experts_are_taken_from_another_file() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let source = folder.open().unwrap();
    let low = options(TargetDtype::Is(Dtype::Q4_0), QuantizeOptions::default());
    let low = write(&source, low, &scratch.path().join("low.gguf"));
    let keep = options(TargetDtype::Keep, QuantizeOptions::default());
    let mut whole = write(&source, keep, &scratch.path().join("whole.gguf"));
    whole.take_experts(&low, [(1, 2)]).unwrap();
    assert_eq!(format(&whole, &expert(1, 2, "up")), Dtype::Q4_0);
    assert_eq!(format(&whole, &expert(1, 1, "up")), Dtype::F32);
    let values = |from: &Checkpoint| from.tensor(&expert(1, 2, "up")).unwrap().to_f32();
    assert_eq!(values(&whole), values(&low));
    let range = whole.tensor_on_disk(&expert(1, 2, "up")).unwrap();
    assert_eq!(&*range.sources()[0].path, scratch.path().join("low.gguf"));
    let narrow = TinyMoe::default().n_experts(EXPERTS).build().unwrap();
    let error = whole
        .take_experts(&narrow.open().unwrap(), [(0, 0)])
        .unwrap_err();
    assert!(error.to_string().contains("has shape"), "{error}");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let (folder, scratch) = (model(), tempfile::tempdir().unwrap());
    let source = folder.open().unwrap();
    let refused = |source: &Checkpoint, dtype, quantize: QuantizeOptions, words: &str| {
        let error = Conversion::plan(source, "tiny", options(dtype, quantize)).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    };
    let single = |name: &str, dtype| QuantizeOptions {
        formats: vec![(name.to_owned(), dtype)],
        ..QuantizeOptions::default()
    };
    let q4 = mixture("q4_k_m");
    refused(
        &source,
        q4,
        single("blk.0.ffn_gate_inp.weight", Dtype::Q4K),
        "at least 8 bits",
    );
    refused(
        &source,
        q4,
        single("blk.*.attn_norm.weight", Dtype::Q8_0),
        "no matrix",
    );
    refused(
        &source,
        q4,
        single("blk.9.*", Dtype::Q8_0),
        "no tensor has this name",
    );
    refused(
        &source,
        q4,
        single("output.weight", Dtype::Q8K),
        "a format that is written",
    );
    refused(
        &source,
        mixture("q2_k_s"),
        QuantizeOptions::default(),
        "importance matrix",
    );
    let wide = imatrix(&scratch.path().join("w.gguf"), &[1.0; 5], |_, _| 1.0);
    refused(&source, q4, by(wide), "expected 4 x 256");

    // A router may have 8 bits, and then it is read back.
    let router = single("blk.*.ffn_gate_inp.weight", Dtype::Q8_0);
    let made = write(&source, options(q4, router), &scratch.path().join("r.gguf"));
    assert_eq!(format(&made, "model.layers.0.mlp.gate.weight"), Dtype::Q8_0);

    let again = QuantizeOptions {
        only_plain: true,
        ..QuantizeOptions::default()
    };
    refused(&made, mixture("q3_k_s"), again.clone(), "quantised already");
    let plain = TargetDtype::Is(Dtype::F16);
    assert!(Conversion::plan(&made, "tiny", options(plain, again)).is_ok());

    let mut to_folder = options(TargetDtype::Keep, single("output.weight", Dtype::F16));
    to_folder.target = ConvertTo::Folder {
        max_shard_bytes: 1 << 30,
    };
    let error = Conversion::plan(&source, "tiny", to_folder).unwrap_err();
    assert!(error.to_string().contains("a GGUF file does"), "{error}");
}
