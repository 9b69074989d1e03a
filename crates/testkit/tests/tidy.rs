//! The house rules of ARCHITECTURE.md that a program can check, over the whole workspace.
//!
//! Each test names the rule it guards and lists every place that breaks it.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each crate may depend on among ours. Nothing points up; testkit is for tests only.
const MAY_USE: &[(&str, &[&str])] = &[
    ("kernels", &[]),
    ("checkpoint", &["kernels"]),
    ("store", &[]),
    ("routing", &[]),
    ("trace", &["routing"]),
    ("engine", &["checkpoint", "kernels", "routing", "store"]),
    ("serve", &["checkpoint", "engine", "routing"]),
    ("train", &["checkpoint", "kernels", "routing"]),
    (
        "reshape",
        &["checkpoint", "engine", "kernels", "routing", "trace"],
    ),
    ("testkit", &["checkpoint"]),
    (
        "cadre",
        &[
            "checkpoint",
            "engine",
            "kernels",
            "reshape",
            "routing",
            "serve",
            "store",
            "trace",
            "train",
        ],
    ),
];

/// Crates in which `unsafe` is allowed.
const UNSAFE: &[&str] = &["kernels", "checkpoint", "store"];

/// External crates that have exactly one home.
const HOMES: &[(&str, &[&str])] = &[
    ("burn", &["train"]),
    ("clap", &["cadre"]),
    ("anyhow", &["cadre", "testkit"]),
    ("indicatif", &["cadre"]),
    ("tokio", &["serve"]),
    ("http", &["serve"]),
    ("llguidance", &["serve"]),
    ("axum", &["serve"]),
    ("hyper", &["serve"]),
    ("reqwest", &[]),
    ("hf-hub", &[]),
    ("ureq", &["cadre"]),
];

/// Folders whose files do not import each other; what they share lives one level up.
const SIBLINGS: &[&str] = &["models", "policies", "routers", "plans", "strategies"];

const MAX_LINES: usize = 700;

/// `cfg(target_arch)` outside of `arch/`: more means that logic is growing accelerator branches.
const MAX_ARCH_CFGS: usize = 10;

struct Source {
    /// Folder name under `crates/`.
    room: String,
    /// Path from the repository root, with `/`.
    path: String,
    text: String,
}

impl Source {
    /// The part that is compiled into the product: up to the tests at the bottom.
    fn code(&self) -> &str {
        if !self.path.contains("/src/") {
            return "";
        }
        self.text.split("#[cfg(test)]\nmod tests").next().unwrap()
    }

    /// Lines of [`Source::code`] that are not comments, numbered from 1.
    fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let numbered = self
            .code()
            .lines()
            .enumerate()
            .map(|(at, line)| (at + 1, line));
        numbered.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn rooms() -> Vec<String> {
    let entries = fs::read_dir(root().join("crates")).unwrap();
    let mut rooms: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    rooms.sort();
    rooms
}

fn manifest(room: &str) -> toml::Table {
    let path = root().join("crates").join(room).join("Cargo.toml");
    fs::read_to_string(path).unwrap().parse().unwrap()
}

fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for room in rooms() {
        collect(&room, &root().join("crates").join(&room), &mut sources);
    }
    assert!(
        sources.len() > 20,
        "the walk over crates/ finds the sources"
    );
    sources
}

fn collect(room: &str, folder: &Path, sources: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(room, &path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path
                .strip_prefix(root())
                .unwrap()
                .to_string_lossy()
                .replace('\\', "/");
            let text = fs::read_to_string(&path).unwrap().replace("\r\n", "\n");
            sources.push(Source {
                room: room.to_owned(),
                path: relative,
                text,
            });
        }
    }
}

fn assert_none(rule: &str, mut broken: Vec<String>) {
    broken.sort();
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

fn dependency_names(manifest: &toml::Table, section: &str) -> BTreeSet<String> {
    let table = manifest.get(section).and_then(toml::Value::as_table);
    table
        .into_iter()
        .flatten()
        .map(|(name, _)| name.clone())
        .collect()
}

#[test]
fn dependencies_never_point_up() {
    let mut broken = Vec::new();
    for room in rooms() {
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == room) else {
            broken.push(format!("crates/{room} has no line in MAY_USE"));
            continue;
        };
        for section in ["dependencies", "build-dependencies"] {
            for name in dependency_names(&manifest(&room), section) {
                let Some(used) = name.strip_prefix("cadre-") else {
                    continue;
                };
                if !allowed.contains(&used) {
                    broken.push(format!("crates/{room} may not depend on {name}"));
                }
            }
        }
    }
    assert_none("dependency direction", broken);
}

#[test]
fn external_crates_stay_in_their_homes() {
    let mut broken = Vec::new();
    for room in rooms() {
        for name in dependency_names(&manifest(&room), "dependencies") {
            let family = name.split('-').next().unwrap();
            for (external, homes) in HOMES {
                let same = name == *external || (family == *external && family != "anyhow");
                if same && !homes.contains(&room.as_str()) {
                    broken.push(format!("crates/{room} depends on {name}"));
                }
            }
        }
    }
    assert_none(
        "Burn only in train, clap and the hub only in cadre, servers only in serve",
        broken,
    );
}

#[test]
fn every_crate_obeys_the_workspace_lints() {
    let mut broken = Vec::new();
    for room in rooms() {
        let manifest = manifest(&room);
        let lints = &manifest["lints"];
        let inherits = lints.get("workspace") == Some(&toml::Value::Boolean(true));
        // Cargo cannot override one lint of an inherited table, so a crate full of `unsafe` repeats
        // the table; it must still demand a reason for every block.
        let reasons = lints
            .get("clippy")
            .and_then(|clippy| clippy.get("undocumented_unsafe_blocks"));
        let repeats = UNSAFE.contains(&room.as_str()) && reasons.is_some();
        if !inherits && !repeats {
            broken.push(format!("crates/{room}/Cargo.toml"));
        }
    }
    assert_none("[lints] workspace = true", broken);
}

#[test]
fn unsafe_is_forbidden_outside_of_its_rooms() {
    let mut broken = Vec::new();
    for room in rooms()
        .iter()
        .filter(|room| !UNSAFE.contains(&room.as_str()))
    {
        let file = if room == "cadre" { "main.rs" } else { "lib.rs" };
        let path = root().join("crates").join(room).join("src").join(file);
        if !fs::read_to_string(&path)
            .unwrap()
            .contains("#![forbid(unsafe_code)]")
        {
            broken.push(format!("crates/{room}/src/{file}"));
        }
    }
    assert_none("#![forbid(unsafe_code)]", broken);
}

#[test]
fn only_the_binary_prints_and_reads_argv_or_environment() {
    let prints = [
        "println!(",
        "print!(",
        "eprintln!(",
        "eprint!(",
        "dbg!(",
        "io::stdout(",
    ];
    let environment = ["std::env", "env::var", "env::args"];
    let mut broken = Vec::new();
    for source in sources() {
        for (number, line) in source.code_lines() {
            let has = |words: &[&str]| words.iter().any(|word| line.contains(word));
            let prints = has(&prints) && source.room != "cadre";
            let reads = has(&environment)
                && !line.contains("env::consts")
                && source.path != "crates/cadre/src/env.rs";
            if prints || reads {
                broken.push(format!("{}:{number}: {}", source.path, line.trim()));
            }
        }
    }
    assert_none("libraries take values and return values", broken);
}

#[test]
fn every_file_says_what_it_owns() {
    let silent = |source: &Source| !source.text.starts_with("//! ");
    let broken = sources()
        .iter()
        .filter(|s| silent(s))
        .map(|s| s.path.clone())
        .collect();
    assert_none("every .rs file starts with `//! `", broken);
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let mut broken = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        if lines > MAX_LINES {
            broken.push(format!("{}: {lines} lines", source.path));
        }
    }
    assert_none("at most 700 lines", broken);
}

#[test]
fn siblings_do_not_import_each_other() {
    let sources = sources();
    let mut broken = Vec::new();
    for source in &sources {
        let Some((folder, file)) = source.path.rsplit_once('/') else {
            continue;
        };
        let family = folder.rsplit('/').next().unwrap();
        if !SIBLINGS.contains(&family) || file == "mod.rs" {
            continue;
        }
        for sibling in &sources {
            let Some((of, name)) = sibling.path.rsplit_once('/') else {
                continue;
            };
            let stem = name.trim_end_matches(".rs");
            if of != folder || name == file || name == "mod.rs" {
                continue;
            }
            let imports = [format!("super::{stem}::"), format!("{family}::{stem}::")];
            for (number, line) in source.code_lines() {
                if imports.iter().any(|import| line.contains(import.as_str())) {
                    broken.push(format!("{}:{number}: {}", source.path, line.trim()));
                }
            }
        }
    }
    assert_none("siblings share through the level above", broken);
}

#[test]
fn accelerators_stay_in_arch() {
    let mut found = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| !source.path.contains("/arch/"))
    {
        for (number, line) in source.code_lines() {
            if line.contains("target_arch") || line.contains("target_feature") {
                found.push(format!("{}:{number}", source.path));
            }
        }
    }
    let n_found = found.len();
    assert!(
        n_found <= MAX_ARCH_CFGS,
        "{n_found} of at most {MAX_ARCH_CFGS}: {found:#?}"
    );
}

#[test]
fn no_test_is_skipped_and_comments_are_ascii() {
    let mut broken = Vec::new();
    for source in sources() {
        for (at, line) in source.text.lines().enumerate() {
            let line = line.trim_start();
            let ignored = line.starts_with("#[ignore");
            if ignored || (line.starts_with("//") && !line.is_ascii()) {
                broken.push(format!("{}:{}: {line}", source.path, at + 1));
            }
        }
    }
    assert_none("no #[ignore], ASCII comments", broken);
}
