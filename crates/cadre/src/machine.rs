//! What has been measured of this machine before, kept in the user's cache folder: so far the speed of its disks.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::env::Env;

/// Of the file. A file of another version is measured anew.
const VERSION: u32 = 1;

/// The profile of a machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    version: u32,
    /// By the name that the system gives to the device.
    disks: BTreeMap<String, Disk>,
}

/// Reading from one device in random pieces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) bytes_per_second: f64,
    /// Of one small read.
    pub(crate) latency_seconds: f64,
    /// Requests at a time that this takes.
    pub(crate) lanes: usize,
    /// Bytes of each.
    pub(crate) request_bytes: usize,
    pub(crate) reader: String,
    /// Whether the cache of the system was out of the way.
    pub(crate) direct: bool,
}

impl Machine {
    /// What is known; nothing when nothing was measured, or the file cannot be used.
    pub(crate) fn load(env: &Env) -> Self {
        let text = file(env).and_then(|path| fs::read_to_string(path).ok());
        let known: Option<Self> = text.and_then(|text| serde_json::from_str(&text).ok());
        known
            .filter(|machine| machine.version == VERSION)
            .unwrap_or_default()
    }

    /// The disk that holds `path`, if it has been measured.
    pub(crate) fn disk_of(&self, path: &Path) -> Option<&Disk> {
        self.disks.get(&device_of(path)?)
    }

    /// Remembers a disk for later runs; where, or `None` where no folder for it is known.
    pub(crate) fn remember(env: &Env, device: &str, disk: Disk) -> Result<Option<PathBuf>> {
        let Some(path) = file(env) else {
            return Ok(None);
        };
        let mut machine = Self::load(env);
        machine.version = VERSION;
        machine.disks.insert(device.to_owned(), disk);
        machine
            .write(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Some(path))
    }

    /// Writes under another name first, so that no run ever sees half a file.
    fn write(&self, path: &Path) -> Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        file.persist(path)?;
        Ok(())
    }
}

fn file(env: &Env) -> Option<PathBuf> {
    Some(env.cache.as_ref()?.join("machine.json"))
}

/// The name of the device that holds a file, such as `nvme0n1p2`; its number where it has no name, and `None` where the
/// system says neither.
#[cfg(unix)]
pub(crate) fn device_of(path: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;

    let device = fs::metadata(path).ok()?.dev();
    Some(name_of(device).unwrap_or_else(|| device.to_string()))
}

#[cfg(target_os = "linux")]
fn name_of(device: u64) -> Option<String> {
    let number = format!("{}:{}", libc::major(device), libc::minor(device));
    let link = fs::canonicalize(Path::new("/sys/dev/block").join(number)).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

#[cfg(all(unix, not(target_os = "linux")))]
fn name_of(_device: u64) -> Option<String> {
    None
}

/// The drive that holds a file, such as `C:`.
#[cfg(not(unix))]
pub(crate) fn device_of(path: &Path) -> Option<String> {
    let path = fs::canonicalize(path).ok()?;
    match path.components().next()? {
        std::path::Component::Prefix(prefix) => prefix.as_os_str().to_str().map(str::to_owned),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes_per_second: f64) -> Disk {
        Disk {
            bytes_per_second,
            latency_seconds: 1e-4,
            lanes: 4,
            request_bytes: 1 << 20,
            reader: "pread".to_owned(),
            direct: true,
        }
    }

    #[test]
    fn what_was_measured_is_found_again_and_damage_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let env = Env {
            cache: Some(folder.path().join("cadre")),
            ..Env::read()
        };
        assert_eq!(Machine::load(&env), Machine::default());
        let device = device_of(folder.path()).unwrap();
        Machine::remember(&env, "other", disk(1e9)).unwrap();
        let path = Machine::remember(&env, &device, disk(2e9))
            .unwrap()
            .unwrap();
        let known = Machine::load(&env);
        assert_eq!(known.disk_of(folder.path()), Some(&disk(2e9)));
        assert_eq!(known.disks["other"], disk(1e9));
        assert_eq!(known.disk_of(Path::new("/no/such/file")), None);
        fs::write(&path, "{").unwrap();
        assert_eq!(Machine::load(&env), Machine::default());
        Machine::remember(&env, &device, disk(3e9)).unwrap();
        assert_eq!(Machine::load(&env).disks.len(), 1);
        let nowhere = Env { cache: None, ..env };
        assert!(
            Machine::remember(&nowhere, &device, disk(1e9))
                .unwrap()
                .is_none()
        );
    }
}
