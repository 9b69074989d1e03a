//! Baking: a written model says what the model says when it is steered so.
#![expect(clippy::unwrap_used, reason = "tests")]

use cadre_checkpoint::{
    Checkpoint, Conversion, ConvertOptions, ConvertTo, Dtype, QuantizeOptions, TargetDtype,
    tensor_specs,
};
use cadre_engine::{LoadOptions, Logits, NoObserver, SessionOptions, Steering, load};
use cadre_reshape::{Applying, bake};
use cadre_testkit::{TinyMoe, golden_dir};

const TOKENS: [u32; 9] = [3, 141, 59, 26, 53, 58, 97, 93, 23];

fn steering(json: &str) -> Steering {
    serde_json::from_str(json).unwrap()
}

fn logits(checkpoint: &Checkpoint, steering: &Steering) -> Vec<f32> {
    let options = LoadOptions {
        steering: steering.clone(),
        ..LoadOptions::default()
    };
    let model = load(checkpoint, &options).unwrap();
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let vocab = model.info().vocab_size as u32;
    let tokens = TOKENS.map(|token| token % vocab);
    let logits = model.forward(&mut session, &tokens, Logits::All, &mut NoObserver);
    logits.unwrap().to_vec()
}

/// Whether the model takes a steering at all.
fn can_be_steered(checkpoint: &Checkpoint) -> bool {
    let options = LoadOptions {
        steering: steering(r#"{"gain": {"*": {"0": 2}}}"#),
        ..LoadOptions::default()
    };
    load(checkpoint, &options).is_ok()
}

/// The largest difference, relative to the largest logit.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let most = a.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let pairs = a.iter().zip(b);
    pairs.fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs())) / most
}

fn target(source: &Checkpoint) -> ConvertTo {
    match source.is_gguf() {
        true => ConvertTo::Gguf {
            max_part_bytes: None,
        },
        false => ConvertTo::Folder {
            max_shard_bytes: 1 << 20,
        },
    }
}

/// Writes the steered model, and compares it with the model that is steered: at most `tolerance` apart. Also says how far
/// both are from the model as it was.
#[track_caller]
fn check(source: &Checkpoint, json: &str, tolerance: f32) -> (Checkpoint, f32) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(match source.is_gguf() {
        true => "out.gguf",
        false => "out",
    });
    let steering = steering(json);
    let options = Applying {
        target: target(source),
        pad: false,
    };
    let baked = bake(source, &steering, options).unwrap();
    let paths = baked.conversion.write(&path, &mut |_| true).unwrap();
    let made = Checkpoint::open(&paths[0]).unwrap();
    made.expect_exactly(&tensor_specs(made.config())).unwrap();
    let expected = logits(source, &steering);
    let apart = difference(&expected, &logits(&made, &Steering::default()));
    let what = source.origin();
    assert!(apart <= tolerance, "{what}: {json}: {apart}");
    let plain = logits(source, &Steering::default());
    (made, difference(&plain, &expected))
}

#[test]
fn masks_and_gains_are_what_they_are_at_run_time() {
    let folder = TinyMoe::default().dtype(Dtype::F32).build().unwrap();
    let source = folder.open().unwrap();
    for (json, tolerance) in [
        (r#"{"mask": {"*": [1, 6]}}"#, 1e-6),
        (
            r#"{"gain": {"*": {"0": 0.5, "3": 2}, "1": {"5": 0}}}"#,
            1e-6,
        ),
        (r#"{"gain": {"0": {"2": 0.7}, "1": {"4": -1.3}}}"#, 1e-6),
        (
            r#"{"mask": {"0-1": [0]}, "gain": {"*": {"0": 3, "7": 0.3}}}"#,
            1e-6,
        ),
    ] {
        let (made, effect) = check(&source, json, tolerance);
        assert!(effect > 1e-3, "{json}: {effect}");
        let mask = steering(json).mask;
        let n_masked: usize = mask.iter().map(|(_, experts)| experts.len()).sum();
        assert_eq!(made.config().moe.n_experts, 8 - n_masked);
    }
    // A gain that bf16 cannot hold is rounded with the matrix: 8 bits.
    let folder = TinyMoe::default().dtype(Dtype::Bf16).build().unwrap();
    let source = folder.open().unwrap();
    check(&source, r#"{"gain": {"*": {"0": 0.5, "3": 2}}}"#, 1e-6);
    check(&source, r#"{"gain": {"*": {"0": 0.7, "3": 1.9}}}"#, 4e-3);
}

#[test]
fn a_gguf_file_is_baked_in_its_own_formats() {
    let folder = TinyMoe::default()
        .configure(|config| {
            (config.hidden_size, config.moe.intermediate_size) = (64, 64);
        })
        .build()
        .unwrap();
    let options = ConvertOptions {
        target: ConvertTo::Gguf {
            max_part_bytes: None,
        },
        dtype: TargetDtype::parse("q8_0").unwrap(),
        allow_differences: false,
        quantize: QuantizeOptions::default(),
    };
    let source = folder.open().unwrap();
    let conversion = Conversion::plan(&source, "q8_0", options).unwrap();
    let out = tempfile::tempdir().unwrap();
    let paths = conversion
        .write(&out.path().join("q8_0.gguf"), &mut |_| true)
        .unwrap();
    let source = Checkpoint::open(&paths[0]).unwrap();
    // Halves are halves of the scales. Other numbers round the scales to 11 bits, and activations that meet such blocks to 8.
    for (json, tolerance) in [
        (r#"{"mask": {"*": [0, 1, 2, 3]}}"#, 1e-6),
        (
            r#"{"gain": {"*": {"0": 0.5, "1": 0.25, "2": 0, "3": 4, "4": 0.5}}}"#,
            1e-6,
        ),
        (
            r#"{"gain": {"*": {"0": 0.3, "1": 0.2, "2": 2.7, "3": 0.1, "5": 3.3}}}"#,
            2e-2,
        ),
    ] {
        let (_, effect) = check(&source, json, tolerance);
        assert!(effect > 2.0 * tolerance, "{json}: {effect}");
    }
}

#[test]
fn every_layout_of_folders_takes_a_gain_or_says_why_not() {
    let (mut n_written, mut n_refused, mut n_changed) = (0, 0, 0);
    for family in std::fs::read_dir(golden_dir()).unwrap() {
        let Ok(entries) = std::fs::read_dir(family.unwrap().path()) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            if !path.join("config.json").is_file() {
                continue;
            }
            let source = Checkpoint::open(&path).unwrap();
            // Some rules choose for all tokens together, or at random: those cannot be steered at run time.
            if source.config().moe.layers.is_empty() || !can_be_steered(&source) {
                continue;
            }
            // Powers of two change no digit of a float.
            let json = r#"{"gain": {"*": {"0": 0.25, "1": 4}}}"#;
            let options = Applying {
                target: target(&source),
                pad: false,
            };
            match bake(&source, &steering(json), options) {
                Ok(_) => {
                    let (_, effect) = check(&source, json, 1e-5);
                    n_written += 1;
                    // In some the few tokens go to neither.
                    n_changed += usize::from(effect > 1e-4);
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(
                        error.contains("convert the model first"),
                        "{}: {error}",
                        path.display()
                    );
                    n_refused += 1;
                }
            }
        }
    }
    assert!(
        n_written > 15 && n_changed > 10 && n_refused > 0,
        "{n_written} written, {n_changed} changed, {n_refused} refused"
    );
}

fn golden(name: &str) -> Checkpoint {
    Checkpoint::open(&golden_dir().join(name)).unwrap()
}

#[test]
fn the_number_of_experts_is_written_into_the_configuration() {
    let folder = TinyMoe::default().dtype(Dtype::F32).build().unwrap();
    let tiny = folder.open().unwrap();
    for (source, json, top_k) in [
        (&tiny, r#"{"top_k": 1}"#, 1),
        (
            &tiny,
            r#"{"top_k": 5, "mask": {"*": [3]}, "gain": {"*": {"0": 2}}}"#,
            5,
        ),
        (&golden("cadre_moe/group_limited"), r#"{"top_k": 1}"#, 1),
        (&golden("glm4_moe/plain"), r#"{"top_k": 4}"#, 4),
        (&golden("mixtral/plain"), r#"{"top_k": 1}"#, 1),
        (
            &golden("gguf_models/qwen3_moe-plain/model.gguf"),
            r#"{"top_k": 1}"#,
            1,
        ),
    ] {
        let (made, effect) = check(source, json, 1e-6);
        assert!(effect > 1e-4, "{}: {json}: {effect}", source.origin());
        assert_eq!(made.config().moe.top_k, top_k, "{}", source.origin());
    }
}

#[test]
fn a_forced_expert_is_one_whose_choice_is_corrected() {
    for (name, json) in [
        (
            "deepseek_v3/no_q_lora",
            r#"{"force": {"*": [5], "0": [0]}}"#,
        ),
        ("glm4_moe/plain", r#"{"force": {"1": [3]}}"#),
        (
            "glm4_moe/plain",
            r#"{"force": {"1": [3, 5]}, "mask": {"1": [0]}, "top_k": 3}"#,
        ),
        (
            "gguf_models/glm4_moe-plain/model.gguf",
            r#"{"force": {"1": [3]}}"#,
        ),
    ] {
        let (_, effect) = check(&golden(name), json, 1e-6);
        assert!(effect > 1e-4, "{name}: {json}: {effect}");
    }
    let options = |source: &Checkpoint| Applying {
        target: target(source),
        pad: false,
    };
    for (name, json, said) in [
        (
            "deepseek_v3/yarn",
            r#"{"force": {"1": [3]}}"#,
            "compete in groups",
        ),
        (
            "glm4_moe/plain",
            r#"{"force": {"1": [0, 1, 2]}}"#,
            "layer 1 has 3 forced experts, and a token gets 2",
        ),
        (
            "glm4_moe/plain",
            r#"{"force": {"1": [3]}, "mask": {"*": [3]}}"#,
            "expert 3 of layer 1 is masked, too",
        ),
        ("glm4_moe/plain", r#"{"top_k": 7}"#, "num_experts_per_tok"),
        (
            "cadre_moe/top_p",
            r#"{"top_k": 2}"#,
            "as many experts as a token needs",
        ),
    ] {
        let source = golden(name);
        let error = bake(&source, &steering(json), options(&source)).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(said), "{name}: {json}: {error}");
    }
}

#[test]
fn what_a_checkpoint_cannot_say_is_refused_by_name() {
    let folder = TinyMoe::default().build().unwrap();
    let source = folder.open().unwrap();
    let options = Applying {
        target: target(&source),
        pad: false,
    };
    for (json, said) in [
        (
            r#"{"top_p": 0.5}"#,
            "`top_p` of the steering cannot be written into a checkpoint: the rule",
        ),
        (
            r#"{"mute": {"0": [1]}}"#,
            "a gain of 0 leaves an expert out",
        ),
        (r#"{"damp": {"0": {"1": 0.5}}}"#, "`damp`"),
        (r#"{"force": {"0": [1]}}"#, "no correction of the choice"),
        (
            r#"{"bias": {"0": {"1": 2}}}"#,
            "moves the logit that experts are ranked by and no weight",
        ),
        (
            r#"{"mask": {"7": [1]}}"#,
            "layer 7 has no experts; layers with experts: 0, 1",
        ),
        (
            r#"{"mask": {"*": [8]}}"#,
            "layer 0 has no expert 8 with weights: it has 8",
        ),
        (
            r#"{"gain": {"*": {"1": 2}, "0": {"1": 3}}}"#,
            "expert 1 of layer 0 has two numbers",
        ),
        (r#"{"mask": {"0": [0, 1, 2, 3, 4, 5, 6]}}"#, "layer 0"),
    ] {
        let error = bake(&source, &steering(json), options)
            .unwrap_err()
            .to_string();
        assert!(error.contains(said), "{json}: {error}");
    }
}
