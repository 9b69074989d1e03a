//! Chat templates of real models against transformers (`golden/text/chat/`, made by
//! `golden/make/text_templates.py`).
#![expect(clippy::unwrap_used, reason = "goldens, and a test that skips says so")]

use std::path::{Path, PathBuf};

use cadre_checkpoint::{ChatTemplate, CheckpointError, DateTime, RenderInput};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn json(path: &str) -> Value {
    let path = root().join("golden/text/chat").join(path);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// What came of a conversation, in the words of the goldens.
#[derive(Debug, PartialEq)]
enum Outcome {
    Text(String),
    Refused(String),
    Error(String),
}

fn render(template: &ChatTemplate, case: &Value, manifest: &Value) -> Outcome {
    let rendered = template.render(&RenderInput {
        messages: &case["messages"],
        tools: Some(&case["tools"]).filter(|tools| !tools.is_null()),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
        extra: case["extra"].as_object().unwrap(),
        bos_token: manifest["bos"].as_str(),
        eos_token: manifest["eos"].as_str(),
        now: DateTime::from_unix(manifest["now"].as_i64().unwrap()),
    });
    match rendered {
        Ok(text) => Outcome::Text(text),
        Err(CheckpointError::ChatRefused { message, .. }) => Outcome::Refused(message),
        Err(error) => Outcome::Error(error.to_string()),
    }
}

#[test]
fn conversations_render_as_in_transformers() {
    let (cases, manifest) = (json("conversations.json"), json("MANIFEST.json"));
    let mut n_texts = 0;
    for entry in std::fs::read_dir(root().join("golden/text/chat/rendered")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let expected = json(&format!("rendered/{name}.json"));
        let source = root().join(format!("golden/text/chat/templates/{name}.jinja"));
        let source = std::fs::read_to_string(source).unwrap();
        let template = ChatTemplate::parse(&name, &source).unwrap();
        for case in cases.as_array().unwrap() {
            let conversation = case["name"].as_str().unwrap();
            let expected = &expected[conversation];
            let found = render(&template, case, &manifest);
            if let Some(text) = expected["text"].as_str() {
                assert_eq!(
                    found,
                    Outcome::Text(text.to_owned()),
                    "{name}: {conversation}"
                );
                n_texts += 1;
            } else if let Some(words) = expected["refused"].as_str() {
                assert_eq!(
                    found,
                    Outcome::Refused(words.to_owned()),
                    "{name}: {conversation}"
                );
            } else {
                assert!(
                    matches!(found, Outcome::Error(_)),
                    "{name}: {conversation}: {found:?}"
                );
            }
        }
    }
    assert!(n_texts > 200, "{n_texts}");
}

/// Templates that rely on Python's `Markup`: what is added to a text marked `safe` is escaped.
const KNOWN_DIFFERENCES: &[&str] = &["meetkai-functionary-medium-v3.1"];

/// All templates that `recipes/data/vocabs.sh` fetches.
#[test]
fn fetched_templates_render_as_in_transformers() {
    let folder = root().join(".cache/data/vocabs/templates");
    if !folder.is_dir() {
        eprintln!("skipped: run recipes/data/vocabs.sh");
        return;
    }
    let (cases, manifest, real) = (
        json("conversations.json"),
        json("MANIFEST.json"),
        json("real.json"),
    );
    let digest = |text: &str| -> String {
        let hash = Sha256::digest(text.as_bytes());
        hash.iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let mut wrong = Vec::new();
    for (name, expected) in real.as_object().unwrap() {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        assert_eq!(
            expected["sha256"],
            digest(&source),
            "{name} is another template"
        );
        let template = match ChatTemplate::parse(name, &source) {
            Ok(template) => template,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        for case in cases.as_array().unwrap() {
            let conversation = case["name"].as_str().unwrap();
            let (short, shown) = match render(&template, case, &manifest) {
                Outcome::Text(text) => (digest(&text), text),
                Outcome::Refused(words) => ("refused".to_owned(), words),
                Outcome::Error(error) => ("error".to_owned(), error),
            };
            // Where Python fails (say, on a loop over `none`), there is no text to be equal to.
            let expected = expected[conversation].as_str().unwrap();
            let known = KNOWN_DIFFERENCES.contains(&name.as_str());
            if expected != short && expected != "error" && !known {
                wrong.push(format!(
                    "{name}: {conversation}: {expected}, found {short}: {shown:?}"
                ));
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
