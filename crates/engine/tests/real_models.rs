//! Real models against llama.cpp, those that `recipes/data/*.sh` have fetched.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

use std::path::PathBuf;
use std::sync::Arc;

use cadre_checkpoint::Checkpoint;
use cadre_engine::{LoadOptions, Logits, Model, NoObserver, SessionOptions, load};
use cadre_testkit::golden_dir;
use serde::Deserialize;
use serde_json::Value;

/// A prompt and what llama.cpp continues it with.
#[derive(Deserialize)]
struct Prompt {
    text: String,
    tokens: Vec<u32>,
    next: Vec<u32>,
}

fn read(name: &str) -> Value {
    let file = std::fs::read(golden_dir().join("real_models").join(name)).unwrap();
    serde_json::from_slice(&file).unwrap()
}

fn greedy(model: &Arc<dyn Model>, prompt: &Prompt) -> Vec<u32> {
    let options = SessionOptions {
        n_ctx: Some(prompt.tokens.len() + prompt.next.len()),
        ..SessionOptions::default()
    };
    let mut session = model.session(&options).unwrap();
    let mut read = prompt.tokens.clone();
    let mut found = Vec::new();
    while found.len() < prompt.next.len() {
        let row = model
            .forward(&mut session, &read, Logits::Last, &mut NoObserver)
            .unwrap();
        let best = (0..row.len())
            .reduce(|best, i| if row[i] > row[best] { i } else { best })
            .unwrap();
        read = vec![u32::try_from(best).unwrap()];
        found.extend_from_slice(&read);
    }
    found
}

/// The model's file, if it has been fetched.
fn fetched(name: &str) -> Option<PathBuf> {
    let manifest = read("MANIFEST.json");
    let model = &manifest["models"][name];
    let file = golden_dir()
        .join("../.cache/data/models")
        .join(model["file"].as_str().unwrap());
    if !file.is_file() {
        println!("skipped: run {} to fetch the model", model["fetch"]);
        return None;
    }
    Some(file)
}

fn continues_prompts_as_llama_cpp_does(name: &str) {
    let prompts: Vec<Prompt> =
        serde_json::from_value(read(&format!("{name}.json"))["prompts"].take()).unwrap();
    assert_eq!(prompts.len(), 10);
    let Some(file) = fetched(name) else {
        return;
    };
    let checkpoint = Checkpoint::open(&file).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let model = load(&checkpoint, &LoadOptions::default()).unwrap();
    for prompt in &prompts {
        let text = &prompt.text;
        assert_eq!(tokenizer.encode(text).unwrap(), prompt.tokens, "{text}");
        assert_eq!(prompt.next.len(), 64, "{text}");
        assert_eq!(greedy(&model, prompt), prompt.next, "{text}");
    }
}

#[test]
fn smollm2() {
    continues_prompts_as_llama_cpp_does("smollm2");
}

#[test]
fn gemma3_270m() {
    continues_prompts_as_llama_cpp_does("gemma3-270m");
}

#[test]
fn qwen25_coder() {
    continues_prompts_as_llama_cpp_does("qwen25-coder");
}
