//! The limits that the system sets on processors: how many threads are made by default, and that more of them still work.

use std::path::PathBuf;
use std::process::Command;
use std::{fs, process};

use crate::common::{cadre, stdout};

/// A group of processes that get at most some share of the processors' time; removed when it is dropped.
struct Group(PathBuf);

impl Group {
    /// `None` where this process may not make one.
    fn new(name: &str, percent: u32) -> Option<Self> {
        let name = format!("cadre-test-{}-{name}", process::id());
        let period = 100_000;
        let quota = period / 100 * percent;
        let v2 = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .map(|root| (root, "cpu.max", format!("{quota} {period}")));
        // The period is 100 ms already.
        let v1 = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"]
            .map(|root| (root, "cpu.cfs_quota_us", quota.to_string()));
        v2.into_iter().chain(v1).find_map(|(root, file, limit)| {
            let folder = PathBuf::from(root).join(&name);
            fs::create_dir(&folder).ok()?;
            let group = Self(folder);
            // Creating the file would not be setting a limit.
            let file = group.0.join(file);
            (file.exists() && fs::write(file, limit).is_ok()).then_some(group)
        })
    }

    /// `cadre` with these arguments, inside of the group.
    fn cadre(&self, args: &[&str]) -> Command {
        let inside = format!(
            "echo $$ > '{}/cgroup.procs' && exec \"$@\"",
            self.0.display()
        );
        let mut command = Command::new("sh");
        command.args(["-c", &inside, "sh", env!("CARGO_BIN_EXE_cadre")]);
        command
            .args(args)
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG");
        command
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It is empty: its processes were waited for.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Standard output of a run that must succeed.
fn said(command: &mut Command) -> String {
    let output = command.stdin(process::Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn n_threads(report: &str) -> u64 {
    let report: serde_json::Value = serde_json::from_str(report).unwrap();
    report["threads"].as_u64().unwrap()
}

const DOCTOR: [&str; 3] = ["doctor", "-o", "json"];
const RUN: [&str; 9] = [
    "run",
    "-p",
    "Once upon a time",
    "-n",
    "12",
    "--temp",
    "0",
    "-t",
    "8",
];

#[test]
fn threads_are_as_many_as_the_affinity_allows() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .unwrap();
    let first = list.trim().split([',', '-']).next().unwrap();
    let mut command = Command::new("taskset");
    command
        .args(["-c", first, env!("CARGO_BIN_EXE_cadre")])
        .args(DOCTOR);
    if Command::new("taskset").arg("--version").output().is_err() {
        println!("SKIPPED: there is no `taskset` to bind a process to a processor");
        return;
    }
    assert_eq!(n_threads(&said(&mut command)), 1);
}

#[test]
fn a_limit_of_the_control_group_bounds_the_threads() {
    let Some(group) = Group::new("one", 100) else {
        println!("SKIPPED: no control group with a limit can be made here");
        return;
    };
    assert_eq!(n_threads(&said(&mut group.cadre(&DOCTOR))), 1);
}

#[test]
fn more_threads_than_the_limit_pays_for_give_the_same_text() {
    let Some(group) = Group::new("half", 50) else {
        println!("SKIPPED: no control group with a limit can be made here");
        return;
    };
    // Less than one processor is one thread.
    assert_eq!(n_threads(&said(&mut group.cadre(&DOCTOR))), 1);
    let text = stdout(&RUN);
    assert_eq!(said(&mut group.cadre(&RUN)), text);
    let alone = [&RUN[..8], &["1"]].concat();
    assert_eq!(said(&mut cadre(&alone)), text);
}
