//! A real model against llama.cpp: SmolLM2-135M-Instruct in Q4_1, if `recipes/data/smollm2.sh` has fetched it.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::path::PathBuf;
use std::sync::Arc;

use cadre_checkpoint::Checkpoint;
use cadre_engine::{LoadOptions, Logits, Model, NoObserver, SessionOptions, load};
use cadre_testkit::golden_dir;
use serde_json::Value;

/// A prompt and what llama.cpp continues it with.
struct Prompt {
    text: String,
    tokens: Vec<u32>,
    next: Vec<u32>,
}

fn prompts() -> Vec<Prompt> {
    let file = std::fs::read(golden_dir().join("smollm2/expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&file).unwrap();
    let prompts = expected["prompts"].as_array().unwrap().iter();
    prompts
        .map(|prompt| Prompt {
            text: prompt["text"].as_str().unwrap().to_owned(),
            tokens: serde_json::from_value(prompt["tokens"].clone()).unwrap(),
            next: serde_json::from_value(prompt["next"].clone()).unwrap(),
        })
        .collect()
}

fn model_file() -> PathBuf {
    golden_dir().join("../.cache/data/models/SmolLM2-135M-Instruct.Q4_1.gguf")
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

#[test]
fn continues_prompts_as_llama_cpp_does() {
    let file = model_file();
    if !file.is_file() {
        println!("skipped: run recipes/data/smollm2.sh to fetch the model");
        return;
    }
    let checkpoint = Checkpoint::open(&file).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let model = load(&checkpoint, &LoadOptions::default()).unwrap();
    let prompts = prompts();
    assert_eq!(prompts.len(), 10);
    for prompt in &prompts {
        assert_eq!(
            tokenizer.encode(&prompt.text).unwrap(),
            prompt.tokens,
            "{}",
            prompt.text
        );
        assert_eq!(greedy(&model, prompt), prompt.next, "{}", prompt.text);
    }
}
