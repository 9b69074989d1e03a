//! `cadre chat`: templates, turns, commands, and how it stops.

use std::fs;
use std::io::{Read, Write};
use std::process::{Output, Stdio};

use cadre_testkit::{TinyFolder, TinyMoe};

use crate::common::{arg, cadre, failure, stdout};

const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
    {% if add_generation_prompt %}[assistant]{% endif %}";

/// A tiny model with a template, long enough for a few turns.
fn chatty() -> TinyFolder {
    let folder = TinyMoe::default()
        .configure(|config| {
            config.max_position_embeddings = 100_000;
            config.eos_token_ids.clear();
        })
        .build()
        .unwrap();
    fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    // A spelling that ends no answer, so that answers are as long as they may be.
    let tokenizer = folder.path().join("tokenizer.json");
    let text = fs::read_to_string(&tokenizer).unwrap();
    fs::write(&tokenizer, text.replace("<|endoftext|>", "<|nothing|>")).unwrap();
    folder
}

/// Runs with `input` on standard input.
fn with_input(args: &[&str], input: &str) -> Output {
    let mut child = cadre(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    child.wait_with_output().unwrap()
}

/// What `run` makes of a rendered conversation.
fn continued(model: &str, text: &str) -> String {
    stdout(&[
        "run",
        "-m",
        model,
        "-p",
        text,
        "-n",
        "6",
        "--temp",
        "0",
        "--no-echo",
    ])
}

const FEW: [&str; 4] = ["-n", "6", "--temp", "0"];

#[test]
fn one_question_is_the_rendered_text_continued() {
    let folder = chatty();
    let model = arg(folder.path());
    let expected = continued(model, "[user] the cat\n[assistant]");
    let asked = [&["chat", "-m", model, "-p", "the cat"], &FEW[..]].concat();
    assert_eq!(stdout(&asked), expected);
    // All of a pipe is one question.
    let piped = [&["chat", "-m", model], &FEW[..]].concat();
    let output = with_input(&piped, "the cat\n");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    assert!(output.stderr.is_empty());
    let two_lines = String::from_utf8(with_input(&piped, "the\ncat\n").stdout).unwrap();
    assert_eq!(two_lines, continued(model, "[user] the\ncat\n[assistant]"));
    let system = [&asked[..], &["--system", "be brief"]].concat();
    let rendered = "[system] be brief\n[user] the cat\n[assistant]";
    assert_eq!(stdout(&system), continued(model, rendered));
    let (code, errors) = failure(&["chat", "-m", model]);
    assert_eq!(code, 2);
    assert!(errors.contains("question is empty"), "{errors}");
}

#[test]
fn turns_build_on_each_other_and_can_be_saved_and_forgotten() {
    let folder = chatty();
    let model = arg(folder.path());
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("talk.json");
    let args = [&["chat", "-m", model, "-i", "-v"], &FEW[..]].concat();
    let input = format!(
        "the cat\nand the\\\nmill\n/save {}\n/nonsense\n/clear\nthe cat\n/exit\nnot read\n",
        file.display()
    );
    let output = with_input(&args, &input);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{errors}");

    let messages: Vec<serde_json::Value> =
        serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let roles: Vec<_> = messages
        .iter()
        .map(|one| one["role"].as_str().unwrap())
        .collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    assert_eq!(messages[2]["content"], "and the\nmill");
    let first = messages[1]["content"].as_str().unwrap();
    let second = messages[3]["content"].as_str().unwrap();
    // What the session kept from the first turn changes nothing in the second.
    let rendered =
        format!("[user] the cat\n[assistant] {first}\n[user] and the\nmill\n[assistant]");
    assert_eq!(format!("{second}\n"), continued(model, &rendered));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, format!("{first}\n{second}\n{first}\n"));
    assert!(errors.contains("4 messages are in"), "{errors}");
    assert!(
        errors.contains("/nonsense") && errors.contains("forgotten"),
        "{errors}"
    );
    // Only what is new is read: the rates on the log say how many tokens.
    let read: Vec<usize> = errors
        .lines()
        .filter_map(|line| {
            line.split_once("prompt ")?
                .1
                .split(' ')
                .next()?
                .parse()
                .ok()
        })
        .collect();
    assert_eq!(read.len(), 3, "{errors}");
    assert_eq!(
        read[2], 1,
        "the same question again is known but for its last token"
    );
}

#[test]
fn a_model_without_a_template_says_so() {
    let (code, errors) = failure(&["chat", "-p", "hello"]);
    assert_eq!(code, 1);
    for word in [
        "nano",
        "no chat template",
        "cadre run",
        "--chat-template-file",
    ] {
        assert!(errors.contains(word), "{word:?} is not in {errors}");
    }
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("t.jinja");
    fs::write(&file, TEMPLATE).unwrap();
    let with_file = ["chat", "-p", "hello", "--chat-template-file", arg(&file)];
    assert!(!stdout(&[&with_file[..], &FEW[..]].concat()).is_empty());
    fs::write(&file, "{% if %}").unwrap();
    assert!(failure(&with_file).1.contains("t.jinja"));
    fs::write(&file, "{{ raise_exception('no system here') }}").unwrap();
    let (_, errors) = failure(&[&with_file[..], &["--system", "x"]].concat());
    assert!(
        errors.contains("no system here") && errors.contains("--system"),
        "{errors}"
    );
}

#[test]
fn a_full_context_is_said_and_does_not_end_the_conversation() {
    let folder = chatty();
    let model = arg(folder.path());
    let long = "the cat ".repeat(60);
    let args = ["chat", "-m", model, "-i", "-c", "64", "--temp", "0"];
    let output = with_input(&args, &format!("{long}\nthe cat\n"));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(
        errors.contains("context holds 64") && errors.contains("-c 100000"),
        "{errors}"
    );
    assert!(errors.contains("context of 64 tokens is full"), "{errors}");
    assert!(!output.stdout.is_empty());
    let (code, _) = failure(&["chat", "-m", model, "-c", "64", "-p", &long]);
    assert_eq!(code, 1);
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_answer_and_not_the_conversation() {
    let folder = chatty();
    let args = ["chat", "-m", arg(folder.path()), "-i", "-c", "100000"];
    let mut child = cadre(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdin.write_all(b"the cat\n").unwrap();
    let mut text = vec![0; 16];
    stdout.read_exact(&mut text).unwrap();
    let id = child.id().to_string();
    let kill = std::process::Command::new("kill")
        .args(["-INT", &id])
        .status();
    assert!(kill.unwrap().success());
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("talk.json");
    let rest = format!("/save {}\n/exit\n", file.display());
    stdin.write_all(rest.as_bytes()).unwrap();
    stdout.read_to_end(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let messages: Vec<serde_json::Value> =
        serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(
        messages.len(),
        2,
        "the part of the answer that was shown is kept"
    );
}
