//! Real vocabularies against the ids that their references give, for those who have run
//! `recipes/data/vocabs.sh`; without its files these tests say so and pass.

#![expect(clippy::print_stderr, reason = "a test that skips says so")]

use std::path::{Path, PathBuf};

use cadre_checkpoint::gguf::Gguf;
use cadre_checkpoint::{EncodeOptions, GgufVocab, Tokenizer};

/// The folder of fetched vocabularies, if there is one.
fn vocabs() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/data/vocabs");
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: run recipes/data/vocabs.sh");
    None
}

/// Vocabularies with llama.cpp's own vectors that are of kinds Cadre reads.
const NAMES: &[&str] = &[
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
];

#[test]
fn vectors_of_llama_cpp() {
    let Some(folder) = vocabs() else { return };
    let mut wrong = Vec::new();
    for name in NAMES {
        let path = folder.join(format!("ggml-vocab-{name}.gguf"));
        let gguf = Gguf::open(&path).unwrap();
        let vocab = GgufVocab::read(&gguf).unwrap();
        let tokenizer = Tokenizer::from_gguf_vocab(&vocab).unwrap();
        let read =
            |suffix: &str| std::fs::read_to_string(format!("{}{suffix}", path.display())).unwrap();
        let (inputs, outputs) = (read(".inp"), read(".out"));
        let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
        let outputs: Vec<&str> = outputs.lines().collect();
        for (text, expected) in inputs.iter().zip(&outputs) {
            let expected: Vec<u32> = expected
                .split_whitespace()
                .map(|id| id.parse().unwrap())
                .collect();
            let options = EncodeOptions {
                add_special: false,
                parse_special: false,
            };
            let ids = tokenizer.encode_with(text, options).unwrap();
            if ids != expected {
                wrong.push(format!(
                    "{name}: {text:?}\n  ours {ids:?}\n  expected {expected:?}"
                ));
            }
            let decoded = tokenizer.decode(&ids);
            if decoded != *text {
                wrong.push(format!("{name}: {text:?} decodes to {decoded:?}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
