//! Small tokenizers of every family against the tokenizers package and llama.cpp (`golden/text/`, made by
//! `golden/make/text_tokenizers.py` and `golden/make/text_vocabs.py`).

#![expect(
    clippy::unwrap_used,
    reason = "a golden that does not read is a broken test"
)]

use std::path::{Path, PathBuf};

use cadre_checkpoint::gguf::Gguf;
use cadre_checkpoint::{EncodeOptions, GgufVocab, Tokenizer};
use serde_json::Value;

/// Families whose expressions llama.cpp approximates; for their GGUF files too Cadre follows the model's own tokenizer.
/// For all others a GGUF file gives llama.cpp's ids.
const FOLLOW_THE_MODEL: &[&str] = &["o200k", "tekken"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/text")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&read(path)).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Folders of `golden/text` that hold `file`.
fn families(file: &str) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(golden()).unwrap() {
        let folder = entry.unwrap().path();
        if folder.join(file).exists() {
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            found.push((name, folder));
        }
    }
    found.sort();
    found
}

fn corpus() -> Vec<String> {
    serde_json::from_value(json(&golden().join("corpus.json"))).unwrap()
}

/// Text of `ids` token by token, without special tokens.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
    text += &stream.finish();
    text
}

#[test]
fn tokenizer_json_gives_the_ids_of_the_tokenizers_package() {
    let corpus = corpus();
    let families = families("tokenizer.json");
    assert!(families.len() >= 12);
    for (name, folder) in families {
        let tokenizer = Tokenizer::from_json(&name, &read(&folder.join("tokenizer.json"))).unwrap();
        let expected = json(&folder.join("expected.json"));
        let (before, after) = (
            ids(&expected["prompt"]["before"]),
            ids(&expected["prompt"]["after"]),
        );
        for (i, text) in corpus.iter().enumerate() {
            let key = i.to_string();
            let rendered = ids(&expected["rendered"][i]);
            let found = tokenizer
                .encode_with(text, EncodeOptions::RENDERED)
                .unwrap();
            assert_eq!(found, rendered, "{name}: {text:?}");
            let prompt = [&before[..], &rendered, &after].concat();
            assert_eq!(tokenizer.encode(text).unwrap(), prompt, "{name}: {text:?}");
            let literal = expected["literal"].get(&key).map_or(rendered.clone(), ids);
            let found = tokenizer.encode_with(text, EncodeOptions::TEXT).unwrap();
            assert_eq!(found, literal, "{name}: {text:?} as text");
            let decoded = expected["decoded"]
                .get(&key)
                .map_or(text.as_str(), |t| t.as_str().unwrap());
            assert_eq!(
                streamed(&tokenizer, &rendered),
                decoded,
                "{name}: {text:?} decoded"
            );
        }
    }
}

#[test]
fn gguf_vocabularies_give_the_ids_of_llama_cpp() {
    let corpus = corpus();
    let families = families("vocab.gguf");
    assert!(families.len() >= 10);
    for (name, folder) in families {
        let gguf = Gguf::open(&folder.join("vocab.gguf")).unwrap();
        let tokenizer = Tokenizer::from_gguf_vocab(&GgufVocab::read(&gguf).unwrap()).unwrap();
        let expected = json(&folder.join("expected.json"));
        let llama = json(&folder.join("llama.json"));
        let follows_model = FOLLOW_THE_MODEL.contains(&name.as_str());
        for (i, text) in corpus.iter().enumerate() {
            let key = i.to_string();
            let rendered = ids(&expected["rendered"][i]);
            let literal = expected["literal"].get(&key).map_or(rendered.clone(), ids);
            for (mode, options, model) in [
                ("rendered", EncodeOptions::RENDERED, rendered),
                ("literal", EncodeOptions::TEXT, literal),
            ] {
                let wanted = llama[mode]
                    .get(&key)
                    .filter(|_| !follows_model)
                    .map_or(model, ids);
                let found = tokenizer.encode_with(text, options).unwrap();
                assert_eq!(found, wanted, "{name}: {text:?} {mode}");
            }
        }
        let before = ids(&expected["prompt"]["before"]);
        let x = tokenizer.encode_with("x", EncodeOptions::TEXT).unwrap();
        assert_eq!(
            tokenizer.encode("x").unwrap(),
            [before, x].concat(),
            "{name}"
        );
    }
}

#[test]
fn the_same_vocabulary_gives_the_same_bytes_from_both_files() {
    for (name, folder) in families("vocab.gguf") {
        let from_json = Tokenizer::from_json(&name, &read(&folder.join("tokenizer.json"))).unwrap();
        let gguf = Gguf::open(&folder.join("vocab.gguf")).unwrap();
        let from_gguf = Tokenizer::from_gguf_vocab(&GgufVocab::read(&gguf).unwrap()).unwrap();
        assert_eq!(from_json.vocab_size(), from_gguf.vocab_size(), "{name}");
        for id in 0..from_json.vocab_size() as u32 {
            assert_eq!(
                from_json.token_bytes(id),
                from_gguf.token_bytes(id),
                "{name}: {id}"
            );
            assert_eq!(
                from_json.is_special(id),
                from_gguf.is_special(id),
                "{name}: {id}"
            );
        }
    }
}

#[test]
fn any_cut_of_the_ids_streams_to_the_same_text() {
    let corpus = corpus();
    for (name, folder) in families("tokenizer.json") {
        let tokenizer = Tokenizer::from_json(&name, &read(&folder.join("tokenizer.json"))).unwrap();
        for text in &corpus {
            let ids = tokenizer.encode_with(text, EncodeOptions::TEXT).unwrap();
            let whole = streamed(&tokenizer, &ids);
            for cut in [1, ids.len() / 2] {
                let (before, after) = ids.split_at(cut.min(ids.len()));
                let mut first = tokenizer.stream();
                let mut joined: String = before.iter().map(|id| first.push(*id)).collect();
                let mut rest = tokenizer.stream_after(before);
                joined.extend(after.iter().map(|id| rest.push(*id)));
                joined += &rest.finish();
                assert_eq!(joined, whole, "{name}: {text:?} cut at {cut}");
            }
        }
    }
}
