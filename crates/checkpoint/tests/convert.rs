//! Conversions there and back over all golden checkpoints; resuming; refusals.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use cadre_checkpoint::{
    Checkpoint, CheckpointError, Conversion, ConvertOptions, ConvertTo, Dtype, Holding, Mixture,
    QuantizeOptions, TargetDtype, held_sizes, tensor_specs,
};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden")
}

fn options(target: ConvertTo, dtype: TargetDtype, allow_differences: bool) -> ConvertOptions {
    ConvertOptions {
        target,
        dtype,
        allow_differences,
        quantize: QuantizeOptions::default(),
    }
}

const GGUF: ConvertTo = ConvertTo::Gguf {
    max_part_bytes: None,
};
const FOLDER: ConvertTo = ConvertTo::Folder {
    max_shard_bytes: 20_000,
};
const F32: TargetDtype = TargetDtype::Is(Dtype::F32);

fn convert(source: &Checkpoint, options: ConvertOptions, target: &Path) -> Checkpoint {
    let conversion = Conversion::plan(source, "golden", options).unwrap();
    let paths = conversion.write(target, &mut |_| true).unwrap();
    let made = Checkpoint::open(&paths[0]).unwrap();
    made.expect_exactly(&tensor_specs(made.config())).unwrap();
    made
}

/// The golden Hugging Face folders.
fn folders() -> Vec<PathBuf> {
    let mut list = Vec::new();
    for family in std::fs::read_dir(golden()).unwrap() {
        let family = family.unwrap().path();
        for folder in std::fs::read_dir(&family).into_iter().flatten() {
            let folder = folder.unwrap().path();
            if folder.join("config.json").is_file() && folder.join("expected.json").is_file() {
                list.push(folder);
            }
        }
    }
    list.sort();
    assert!(list.len() > 40, "{}", list.len());
    list
}

/// What llama.cpp has no way to compute; everything else must convert.
const DIFFERENT: &[(&str, &str)] = &[
    ("deepseek_v2/groups", "routing"),
    ("deepseek_v3/mtp", "rope"),
    ("gemma3_text/layer_types", "attention.scale"),
    ("gemma3_text/pattern_v4", "attention.scale"),
    ("gpt_oss/bf16", "rope"),
    ("gpt_oss/odd_sizes", "activation"),
    ("llama/yarn_v4", "rope"),
    ("mistral/window", "windows"),
    ("mixtral/window", "windows"),
    ("olmoe/bias", "o_proj"),
    ("olmoe/clip", "clip_qkv"),
    ("phimoe/", "routing"),
    ("qwen2/window", "windows"),
    ("qwen2_moe/norm_yarn", "routing"),
    ("qwen2_moe/window", "windows"),
    ("qwen3/bias", "o_proj"),
    ("qwen3/window", "windows"),
    ("qwen3_moe/raw_topk", "routing"),
    ("qwen3_moe/runtime_window", "windows"),
    ("qwen3_moe/top1", "routing"),
];

/// What cannot be held at all: dense layers among layers with experts, biases and rotations of latent attention, and
/// all of `cadre_moe`.
const IMPOSSIBLE: &[&str] = &[
    "deepseek_v2/runtime",
    "deepseek_v3/no_q_lora",
    "deepseek_v3/runtime",
    "qwen2_moe/dense_layers",
    "qwen3_moe/dense_layer",
    "qwen3_moe/sparse_step",
];

#[test]
fn folders_survive_the_way_to_gguf_and_back() {
    let mut problems = Vec::new();
    for folder in folders() {
        let name = folder.strip_prefix(golden()).unwrap().display().to_string();
        let source = Checkpoint::open(&folder).unwrap();
        let strict = Conversion::plan(&source, "golden", options(GGUF, F32, false));
        let lenient = Conversion::plan(&source, "golden", options(GGUF, F32, true));
        let lenient = match lenient {
            Ok(plan) => plan,
            Err(error) => {
                if !IMPOSSIBLE.contains(&name.as_str()) && !name.starts_with("cadre_moe/") {
                    problems.push(format!("{name}: {error}"));
                }
                continue;
            }
        };
        let expected = DIFFERENT
            .iter()
            .find(|(prefix, _)| name.starts_with(prefix));
        match (expected, &strict) {
            (None, Ok(_)) => {}
            (None, Err(error)) => problems.push(format!("{name}: refused: {error}")),
            (Some((_, word)), Err(error)) if error.to_string().contains(word) => {}
            (Some((_, word)), _) => {
                problems.push(format!(
                    "{name}: not refused for {word}: {:?}",
                    lenient.differences()
                ));
            }
        }
        let scratch = tempfile::tempdir().unwrap();
        let gguf = convert(
            &source,
            options(GGUF, F32, true),
            &scratch.path().join("m.gguf"),
        );
        let plan = Conversion::plan(&gguf, "golden", options(FOLDER, F32, true));
        if let Err(error) = &plan {
            problems.push(format!("{name}: back: {error}"));
            continue;
        }
        let back = convert(
            &gguf,
            options(FOLDER, F32, true),
            &scratch.path().join("back"),
        );
        if expected.is_none() {
            same_config(&name, &source, &back, &mut problems);
        }
        same_values(&name, &source, &back, &mut problems);
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// What the refusal of a GGUF file of each `cadre_moe` model says.
const OURS: &[(&str, &str)] = &[
    ("top_p", "`top_p`"),
    ("null_experts", "null experts (4 per layer)"),
    ("shared_raw", "GGUF is written for"),
    ("group_limited", "GGUF is written for"),
    ("residual_sum", "a feed-forward beside the experts, added"),
    ("residual_learned", "mixed by learned coefficients"),
    ("pyramid", "[3, 7]"),
    ("pyramid_null", "null experts (2 per layer)"),
    ("recurrent", "a state from layer to layer"),
    ("recurrent_top_p", "a state from layer to layer"),
    ("switch", "GGUF is written for"),
    ("dense_to_sparse_soft", "`dense_to_sparse`"),
    ("dense_to_sparse_hard", "`dense_to_sparse`"),
    ("uniform", "`uniform`"),
    ("union", "`union`"),
    (
        "attention_experts",
        "attention cut into 4 experts of which a token takes 2",
    ),
    ("attention_experts_dense", "attention cut into 2 experts"),
    ("decoupled", "a router that runs before the model"),
    ("decoupled_per_layer", "a router that runs before the model"),
    ("sparse_mixer", "GGUF is written for"),
];

#[test]
fn our_own_models_become_folders_and_no_gguf_file() {
    for (name, expected) in OURS {
        let source = Checkpoint::open(&golden().join("cadre_moe").join(name)).unwrap();
        let refused = Conversion::plan(&source, "golden", options(GGUF, F32, true));
        let text = refused.unwrap_err().to_string();
        assert!(text.contains(expected), "{name}: {text}");
        let scratch = tempfile::tempdir().unwrap();
        let back = convert(
            &source,
            options(FOLDER, F32, false),
            &scratch.path().join("m"),
        );
        let mut problems = Vec::new();
        same_config(name, &source, &back, &mut problems);
        same_values(name, &source, &back, &mut problems);
        assert!(problems.is_empty(), "{}", problems.join("\n"));
    }
    let folders = std::fs::read_dir(golden().join("cadre_moe")).unwrap();
    let n_folders = folders.filter(|entry| entry.as_ref().unwrap().path().is_dir());
    assert_eq!(n_folders.count(), OURS.len());
}

fn same_config(name: &str, source: &Checkpoint, back: &Checkpoint, problems: &mut Vec<String>) {
    let mut theirs = back.config().clone();
    let mut ours = source.config().clone();
    // Not kept: which plain format the configuration names, ids of a vocabulary that is not there.
    ours.dtype = theirs.dtype;
    (ours.eos_token_ids, theirs.eos_token_ids) = (Vec::new(), Vec::new());
    (ours.bos_token_id, theirs.bos_token_id) = (None, None);
    (ours.pad_token_id, theirs.pad_token_id) = (None, None);
    if ours.model_type == "mistral" {
        // Without a window it is Llama, and GGUF has one name for both.
        ours.model_type = "llama".to_owned();
    }
    // Some architectures of GGUF have the output head in a tensor of its own.
    ours.tie_word_embeddings = theirs.tie_word_embeddings;
    if format!("{ours:?}") != format!("{theirs:?}") {
        problems.push(format!("{name}: config\n  {ours:?}\n  {theirs:?}"));
    }
}

fn same_values(name: &str, source: &Checkpoint, back: &Checkpoint, problems: &mut Vec<String>) {
    for tensor in source.tensor_names() {
        let ours = source.tensor(tensor).unwrap();
        let Ok(theirs) = back.tensor(tensor) else {
            problems.push(format!("{name}: {tensor} is missing"));
            continue;
        };
        let (a, b) = (ours.to_f32(), theirs.to_f32());
        // Gemma's norms are stored plus one, which rounds.
        let tolerance = if name.starts_with("gemma3") && tensor.ends_with("norm.weight") {
            1e-7
        } else {
            0.0
        };
        let close = a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= tolerance);
        if !close || ours.shape != theirs.shape {
            problems.push(format!("{name}: {tensor} has other values"));
            return;
        }
    }
}

#[test]
fn files_of_llama_cpp_are_written_again_with_the_same_tensors_and_meaning() {
    for entry in std::fs::read_dir(golden().join("gguf_models")).unwrap() {
        let path = entry.unwrap().path().join("model.gguf");
        if !path.exists() {
            continue;
        }
        let source = Checkpoint::open(&path).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let keep = options(GGUF, TargetDtype::Keep, false);
        let made = convert(&source, keep, &scratch.path().join("m.gguf"));
        assert_eq!(made.config(), source.config(), "{}", path.display());
        for theirs in source.gguf().unwrap().tensors() {
            if source
                .ignored()
                .any(|(name, reason)| name == theirs.name && reason.contains("prediction"))
            {
                continue;
            }
            let ours = made.gguf().unwrap().tensor(&theirs.name).unwrap();
            assert_eq!(
                (&ours.shape, &ours.bytes),
                (&theirs.shape, &theirs.bytes),
                "{}",
                theirs.name
            );
        }
    }
}

/// The folders that llama.cpp's converter made golden files of become the same tensors, to the byte.
#[test]
fn tensors_are_those_of_llama_cpps_converter() {
    let manifest = std::fs::read_to_string(golden().join("gguf_models/MANIFEST.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    for (name, about) in manifest["files"].as_object().unwrap() {
        let folder = golden().join("..").join(about["from"].as_str().unwrap());
        let source = Checkpoint::open(&folder).unwrap();
        let theirs =
            Checkpoint::open(&golden().join("gguf_models").join(name).join("model.gguf")).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let dtype = if name.contains("mxfp4") {
            TargetDtype::Keep
        } else {
            F32
        };
        let ours = convert(
            &source,
            options(GGUF, dtype, true),
            &scratch.path().join("m.gguf"),
        );
        for tensor in ours.gguf().unwrap().tensors() {
            let expected = theirs.gguf().unwrap().tensor(&tensor.name).unwrap();
            if tensor.name == "rope_freqs.weight" {
                let (a, b) = (
                    tensor.dtype.decode(&tensor.bytes),
                    expected.dtype.decode(&expected.bytes),
                );
                assert!(
                    a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5 * b),
                    "{a:?} {b:?}"
                );
                continue;
            }
            let (a, b) = (
                tensor.dtype.decode(&tensor.bytes),
                expected.dtype.decode(&expected.bytes),
            );
            assert_eq!(a, b, "{name}: {}", tensor.name);
            let squeezed = |shape: &[usize]| {
                shape
                    .iter()
                    .copied()
                    .filter(|n| *n != 1)
                    .collect::<Vec<_>>()
            };
            assert_eq!(
                squeezed(&tensor.shape),
                squeezed(&expected.shape),
                "{name}: {}",
                tensor.name
            );
        }
        let n = ours.gguf().unwrap().tensors().len();
        let ignored = theirs
            .ignored()
            .filter(|(_, reason)| reason.contains("prediction"))
            .count();
        assert_eq!(
            n,
            theirs.gguf().unwrap().tensors().len() - ignored,
            "{name}"
        );
    }
}

#[test]
fn an_interrupted_conversion_goes_on_and_ends_the_same() {
    let source = Checkpoint::open(&golden().join("mixtral/plain")).unwrap();
    for (target, name) in [(GGUF, "m.gguf"), (FOLDER, "m")] {
        let scratch = tempfile::tempdir().unwrap();
        let conversion = Conversion::plan(&source, "m", options(target, F32, false)).unwrap();
        let whole = scratch.path().join("whole").join(name);
        std::fs::create_dir_all(whole.parent().unwrap()).unwrap();
        conversion.write(&whole, &mut |_| true).unwrap();
        let path = scratch.path().join(name);
        let half = conversion.n_bytes() / 2;
        let error = conversion
            .write(&path, &mut |done| done < half)
            .unwrap_err();
        assert!(
            matches!(error, CheckpointError::Interrupted { .. }),
            "{error}"
        );
        assert!(!path.exists());
        let mut first = None;
        conversion
            .write(&path, &mut |done| {
                first.get_or_insert(done);
                true
            })
            .unwrap();
        let files = |path: &Path| -> Vec<(String, Vec<u8>)> {
            if path.is_file() {
                return vec![(String::new(), std::fs::read(path).unwrap())];
            }
            let mut files: Vec<_> = std::fs::read_dir(path)
                .unwrap()
                .map(|entry| {
                    let entry = entry.unwrap();
                    let name = entry.file_name().to_string_lossy().into_owned();
                    (name, std::fs::read(entry.path()).unwrap())
                })
                .collect();
            files.sort();
            files
        };
        assert!(files(&path) == files(&whole), "{name}");
        let leftovers = std::fs::read_dir(scratch.path()).unwrap().count();
        assert_eq!(leftovers, 2, "{name}");
        let error = conversion
            .write(&path, &mut |_| true)
            .unwrap_err()
            .to_string();
        assert!(error.contains("exists already"), "{error}");
    }
}

#[test]
fn formats_that_do_not_fit_are_reported() {
    let source = Checkpoint::open(&golden().join("qwen3_moe/plain")).unwrap();
    let q4_k = options(GGUF, TargetDtype::Is(Dtype::Q4K), false);
    let conversion = Conversion::plan(&source, "m", q4_k.clone()).unwrap();
    let notes = conversion.notes().join("\n");
    assert!(notes.contains("Q5_0") && notes.contains("block"), "{notes}");
    assert!(notes.contains("F16") && notes.contains("32"), "{notes}");
    assert!(notes.contains("token ids only"), "{notes}");
    let scratch = tempfile::tempdir().unwrap();
    let made = convert(&source, q4_k, &scratch.path().join("m.gguf"));
    let router = made.tensor_info("model.layers.0.mlp.gate.weight").unwrap();
    assert_eq!(router.0, Dtype::F32);
    let q8 = options(FOLDER, TargetDtype::Is(Dtype::Q8_0), false);
    let error = Conversion::plan(&source, "m", q8).unwrap_err().to_string();
    assert!(error.contains("f16"), "{error}");
}

#[test]
fn a_tokenizer_goes_along() {
    let source = Checkpoint::open(&golden().join("../models/nano")).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let keep = |target| options(target, TargetDtype::Keep, false);
    let gguf = convert(&source, keep(GGUF), &scratch.path().join("m.gguf"));
    let text = "Once upon a time, in 1999:\n\n  it's done.";
    let (ours, theirs) = (source.tokenizer().unwrap(), gguf.tokenizer().unwrap());
    assert_eq!(ours.encode(text).unwrap(), theirs.encode(text).unwrap());
    assert_eq!(gguf.config().eos_token_ids, source.config().eos_token_ids);
    let back = convert(&gguf, keep(FOLDER), &scratch.path().join("back"));
    assert_eq!(
        back.tokenizer_json().unwrap(),
        source.tokenizer_json().unwrap()
    );
    let files = |name| std::fs::exists(scratch.path().join("back").join(name)).unwrap();
    assert!(files("model.safetensors.index.json") && !files(".cadre-conversion"));
}

#[test]
fn the_size_of_a_file_is_known_before_it_is_converted() {
    let formats = [
        TargetDtype::Is(Dtype::Q8_0),
        TargetDtype::Is(Dtype::Q6K),
        TargetDtype::Mix(Mixture::Q4KM),
        TargetDtype::Mix(Mixture::Q5KM),
    ];
    let mut n = 0;
    for folder in folders() {
        let source = Checkpoint::open(&folder).unwrap();
        for dtype in formats {
            let Ok(conversion) = Conversion::plan(&source, "m", options(GGUF, dtype, true)) else {
                continue;
            };
            let sizes = held_sizes(&source, Holding::File(dtype));
            // Factors of the rope are no weights.
            let factors = conversion.n_bytes() - sizes.total;
            assert!(factors <= 2 * 4 * 64, "{}: {factors}", folder.display());
            n += 1;
        }
    }
    assert!(n > 150, "{n}");
}
