//! Ctrl-C ends every long command with 130; what was unfinished goes on, or disappears.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cadre_trace::Trace;

use crate::common::{arg, cadre, tiny};

fn interrupt(child: &Child) {
    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
}

/// Waits until `ready` holds, and fails rather than hanging.
fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_trace_that_is_interrupted_goes_on() {
    let model = tiny();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("d.txt");
    fs::write(&data, "the cat sat on the mill. ".repeat(12_000)).unwrap();
    let path = |name: &str| folder.path().join(name);
    let run = |out: &Path| {
        let args = [
            "trace",
            "-m",
            arg(model.path()),
            "--data",
            arg(&data),
            "-o",
            arg(out),
        ];
        cadre(&args).stderr(Stdio::piped()).spawn().unwrap()
    };
    let (out, parts) = (path("t.parquet"), path(".t.parquet.recording"));
    let child = run(&out);
    let has_part = || {
        let entries = fs::read_dir(&parts).into_iter().flatten().flatten();
        let mut names = entries.map(|entry| entry.file_name());
        names.any(|name| name.to_string_lossy().starts_with("0000"))
    };
    wait_until("a part is finished", has_part);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(!out.exists());
    // The same command goes on, and the result is that of a run that was never stopped.
    let output = run(&out).wait_with_output().unwrap();
    assert!(output.status.success());
    let whole = path("whole.parquet");
    assert!(run(&whole).wait_with_output().unwrap().status.success());
    let rows = |path: &Path| {
        let trace = Trace::read(path).unwrap();
        trace
            .rows()
            .map(|row| format!("{row:?}"))
            .collect::<Vec<_>>()
    };
    assert!(rows(&out) == rows(&whole));
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        3,
        "no parts are left"
    );
}

#[test]
fn waiting_for_a_prompt_ends_at_once() {
    let mut child = cadre(&["run"]).stdin(Stdio::piped()).spawn().unwrap();
    // The handler is installed before anything else is done; a moment is enough.
    std::thread::sleep(Duration::from_millis(500));
    interrupt(&child);
    wait_until("the command ends", || child.try_wait().unwrap().is_some());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn running_text_ends_with_a_line_break() {
    let model = cadre_testkit::TinyMoe::default()
        .configure(|config| {
            config.max_position_embeddings = 100_000;
            config.eos_token_ids.clear();
        })
        .build()
        .unwrap();
    let path = arg(model.path());
    // Not by chance: a token that ends the text would end the command before it is interrupted.
    let args = [
        "run", "-m", path, "-p", "the", "-n", "99999", "-c", "100000", "--temp", "0",
    ];
    let mut child = cadre(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = vec![0; 16];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut text).unwrap();
    interrupt(&child);
    stdout.read_to_end(&mut text).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(text.last(), Some(&b'\n'));
}

#[test]
fn a_search_for_formats_that_is_killed_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("d.txt");
    // The embedded model, some of whose experts this format costs something.
    let text = "This was the light in which it appeared to those who knew the family, long before you returned to it; and \
                Colonel Wallis had his eye upon your father enough to be sensible of it, though he did not then visit in \
                Camden Place; but his regard for Mr Elliot gave him an interest in watching all that was going on there.";
    fs::write(&data, text).unwrap();
    let run = |out: &Path| {
        let mut args = vec!["plan", "bits", "-c", "64", "--max-ppl-increase", "0"];
        args.extend(["--data", arg(&data), "-o", arg(out)]);
        args.extend(["--formats", "mxfp4"]);
        cadre(&args).stderr(Stdio::piped()).spawn().unwrap()
    };
    let path = |name: &str| folder.path().join(name);
    let (out, measured) = (path("p.json"), path(".p.json.bits/measured.jsonl"));
    let mut child = run(&out);
    let lines = || {
        let text = fs::read_to_string(&measured).unwrap_or_default();
        text.lines().count()
    };
    wait_until("some are measured", || lines() > 4);
    child.kill().unwrap();
    child.wait().unwrap();
    let before = lines();
    assert!(!out.exists() && before > 4);
    assert!(run(&out).wait_with_output().unwrap().status.success());
    let whole = path("whole.json");
    assert!(run(&whole).wait_with_output().unwrap().status.success());
    assert_eq!(fs::read(&out).unwrap(), fs::read(&whole).unwrap());
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        3,
        "nothing is left beside the plans"
    );
}
