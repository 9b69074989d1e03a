//! How much memory this process may still take: what the system has left, and the limits of its control groups.

use std::fs;
use std::path::{Path, PathBuf};

const CGROUPS: &str = "/sys/fs/cgroup";

/// The files of one version of control groups.
struct Files {
    limit: &'static str,
    used: &'static str,
    /// Line of `memory.stat`: cached file contents that the system gives up when memory is short.
    cached: [&'static str; 2],
}

const V2: Files = Files {
    limit: "memory.max",
    used: "memory.current",
    cached: ["inactive_file", "active_file"],
};

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cached: ["total_inactive_file", "total_active_file"],
};

/// Bytes that can be taken without swapping or being killed; `None` where the system does not say it in files.
pub(crate) fn available() -> Option<u64> {
    let system = meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:");
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = folders(&own)
        .into_iter()
        .filter_map(|(folder, files)| left(&folder, files));
    system.into_iter().chain(groups).min()
}

fn meminfo(text: &str, label: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes.saturating_mul(1024))
}

/// The groups that `/proc/self/cgroup` names, and all above them: every one may have a limit.
fn folders(own: &str) -> Vec<(PathBuf, &'static Files)> {
    let mut folders = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (root, files) = match controllers {
            "" => (PathBuf::from(CGROUPS), &V2),
            "memory" => (Path::new(CGROUPS).join("memory"), &V1),
            _ => continue,
        };
        // In a container the path may be that of the host; the root is then the container's own group.
        let path = Path::new(path.trim_start_matches('/'));
        folders.extend(path.ancestors().map(|group| (root.join(group), files)));
    }
    folders
}

/// What is left of the limit of one group, if it has one.
fn left(folder: &Path, files: &Files) -> Option<u64> {
    let number = |name| {
        fs::read_to_string(folder.join(name))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let limit: u64 = number(files.limit)?;
    let used = number(files.used).unwrap_or(0);
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cached: u64 = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| files.cached.contains(name))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .fold(0, u64::saturating_add);
    Some(limit.saturating_sub(used.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_groups_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(left(folder.path(), &V2), None);
        write("memory.max", "max\n");
        assert_eq!(left(folder.path(), &V2), None);
        write("memory.max", "1000\n");
        write("memory.current", "700\n");
        assert_eq!(left(folder.path(), &V2), Some(300));
        write(
            "memory.stat",
            "anon 100\ninactive_file 400\nactive_file 50\n",
        );
        assert_eq!(left(folder.path(), &V2), Some(750));
    }

    #[test]
    fn all_groups_above_count() {
        let paths = |own| -> Vec<String> {
            let folders = folders(own).into_iter();
            folders
                .map(|(path, _)| path.display().to_string())
                .collect()
        };
        let expected = ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup/"];
        assert_eq!(paths("0::/a/b\n"), expected);
        assert_eq!(paths("4:memory:/\n3:cpu:/x\n"), ["/sys/fs/cgroup/memory/"]);
        assert!(paths("nonsense").is_empty());
    }

    #[test]
    fn the_memory_of_the_system_is_in_kilobytes() {
        let text = "MemTotal:  9 kB\nMemAvailable:   12 kB\n";
        assert_eq!(meminfo(text, "MemAvailable:"), Some(12 * 1024));
        assert_eq!(meminfo("", "MemAvailable:"), None);
    }
}
