//! Real vocabularies against the ids that their references give, for those who have run
//! `recipes/data/vocabs.sh`; without its files these tests say so and pass.

#![expect(
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test that skips says so"
)]

use std::path::{Path, PathBuf};

use cadre_checkpoint::gguf::Gguf;
use cadre_checkpoint::{EncodeOptions, GgufVocab, Tokenizer};
use serde_json::Value;

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

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../golden/text")
        .join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Texts of the corpus whose ids are not those of a golden.
fn differences(tokenizer: &Tokenizer, expected: &Value) -> Vec<Difference> {
    let corpus: Vec<String> = serde_json::from_value(golden("corpus.json")).unwrap();
    let mut wrong = Vec::new();
    for (i, text) in corpus.iter().enumerate() {
        let rendered = ids(&expected["rendered"][i]);
        let literal = expected["literal"].get(i.to_string());
        let literal = literal.map_or(rendered.clone(), ids);
        for (options, wanted) in [
            (EncodeOptions::RENDERED, rendered),
            (EncodeOptions::TEXT, literal),
        ] {
            let found = tokenizer.encode_with(text, options).unwrap();
            if found != wanted {
                wrong.push(Difference {
                    text: text.clone(),
                    options,
                    found,
                    wanted,
                });
            }
        }
    }
    wrong
}

#[derive(Debug)]
#[expect(dead_code, reason = "shown when the test fails")]
struct Difference {
    text: String,
    options: EncodeOptions,
    found: Vec<u32>,
    wanted: Vec<u32>,
}

#[test]
fn tokenizers_of_moe_models() {
    let Some(folder) = vocabs() else { return };
    for name in ["qwen3", "deepseek_v3", "gptoss"] {
        let read = |file: &str| std::fs::read_to_string(folder.join(name).join(file)).unwrap();
        let config: Value = serde_json::from_str(&read("tokenizer_config.json")).unwrap();
        let tokenizer = Tokenizer::from_files(name, &read("tokenizer.json"), &config).unwrap();
        let expected = golden(&format!("real/{name}.json"));
        let wrong = differences(&tokenizer, &expected);
        assert!(wrong.is_empty(), "{name}: {wrong:#?}");
        // Of these only DeepSeek asks for something at the start of a prompt.
        let bos = tokenizer.token_id("<\u{ff5c}begin\u{2581}of\u{2581}sentence\u{ff5c}>");
        let x = tokenizer.encode_with("x", EncodeOptions::TEXT).unwrap();
        let prompt: Vec<u32> = bos.into_iter().chain(x).collect();
        assert_eq!(tokenizer.encode("x").unwrap(), prompt, "{name}");
    }
}

/// Vocabularies in which llama.cpp takes a normal or user-defined `</s>` for a control token because of its spelling.
/// Cadre goes by the type in the file, as the model's own tokenizer does.
const OTHER_END: &[(&str, EncodeOptions)] = &[
    ("phi-3", EncodeOptions::TEXT),
    ("qwen2", EncodeOptions::RENDERED),
    ("qwen35", EncodeOptions::RENDERED),
];

#[test]
fn vocabularies_as_llama_cpp_reads_them() {
    let Some(folder) = vocabs() else { return };
    for name in NAMES.iter().filter(|name| **name != "mpt") {
        let gguf = Gguf::open(&folder.join(format!("ggml-vocab-{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::from_gguf_vocab(&GgufVocab::read(&gguf).unwrap()).unwrap();
        let mut wrong = differences(&tokenizer, &golden(&format!("real/gguf/{name}.json")));
        wrong.retain(|wrong| {
            !wrong.text.contains("</s>") || !OTHER_END.contains(&(name, wrong.options))
        });
        assert!(wrong.is_empty(), "{name}: {wrong:#?}");
    }
}
