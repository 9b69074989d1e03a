//! The cache folder of one repository, laid out as the hub's Python client does, so that both find
//! each other's downloads: `models--org--name/{blobs,refs,snapshots}`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// One repository in the cache.
pub(super) struct RepoCache {
    /// Cache of all repositories.
    root: PathBuf,
    /// Name of the repository's folder.
    name: String,
}

impl RepoCache {
    /// The place of `repo` (`org/name`) below `root`; nothing is created.
    pub(super) fn new(root: &Path, repo: &str) -> Self {
        Self {
            root: root.to_owned(),
            name: format!("models--{}", repo.replace('/', "--")),
        }
    }

    /// Cache of all repositories.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of the repository.
    pub(super) fn folder(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    /// The file with the content that `etag` names.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder().join("blobs").join(etag)
    }

    /// What of that content is here while it is downloaded.
    pub(super) fn partial(&self, etag: &str) -> PathBuf {
        self.blob(&format!("{etag}.incomplete"))
    }

    /// Locked while that content is downloaded.
    pub(super) fn lock(&self, etag: &str) -> PathBuf {
        let locks = self.root.join(".locks").join(&self.name);
        locks.join(format!("{etag}.lock"))
    }

    /// The files of one commit under their own names.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }

    /// The commit that a branch or tag meant when it was last looked up; a commit is itself.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        let file = self.folder().join("refs").join(revision);
        let commit = fs::read_to_string(file).map(|text| text.trim().to_owned());
        let known = commit.ok().filter(|commit| is_commit(commit));
        known.or_else(|| is_commit(revision).then(|| revision.to_owned()))
    }

    /// Remembers what a branch or tag means.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let file = self.folder().join("refs").join(revision);
        create_parent(&file)?;
        fs::write(&file, commit).with_context(|| format!("cannot write {}", file.display()))
    }

    /// Names of the files of a commit that are here, with `/` between folders.
    pub(super) fn files(&self, commit: &str) -> Vec<String> {
        let mut files = Vec::new();
        collect(&self.snapshot(commit), "", &mut files);
        files.sort();
        files
    }

    /// Lets `file` of a commit be the content that `etag` names.
    pub(super) fn point(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let pointer = self.snapshot(commit).join(file);
        create_parent(&pointer)?;
        match fs::remove_file(&pointer) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot replace {}", pointer.display()));
            }
            _ => {}
        }
        let up = "../".repeat(2 + file.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{etag}"));
        link(&target, &self.blob(etag), &pointer)
            .with_context(|| format!("cannot create {}", pointer.display()))
    }
}

/// The name of a commit: a SHA-1 or SHA-256 in hexadecimal.
pub(super) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Creates the folder of a file.
pub(super) fn create_parent(file: &Path) -> Result<()> {
    let Some(folder) = file.parent() else {
        return Ok(());
    };
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}

/// Adds the names of all files below `folder`. Links whose target is gone do not count, and what
/// cannot be read is not there.
fn collect(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = entry.path();
        if path.is_dir() {
            collect(&path, &format!("{prefix}{name}/"), files);
        } else if path.is_file() {
            files.push(format!("{prefix}{name}"));
        }
    }
}

#[cfg(unix)]
fn link(target: &Path, _blob: &Path, pointer: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, pointer)
}

/// Symbolic links need a privilege on Windows; a second name for the same file does not.
#[cfg(windows)]
fn link(target: &Path, blob: &Path, pointer: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, pointer).or_else(|_| fs::hard_link(blob, pointer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_hubs() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(root.path(), "org/name");
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(cache.commit("main"), None);
        cache.set_commit("main", commit).unwrap();
        cache.set_commit("refs/pr/1", commit).unwrap();
        assert_eq!(cache.commit("main").as_deref(), Some(commit));
        assert_eq!(cache.commit("refs/pr/1").as_deref(), Some(commit));
        assert_eq!(cache.commit(commit).as_deref(), Some(commit));
        let blob = cache.blob("abc");
        create_parent(&blob).unwrap();
        fs::write(&blob, "x").unwrap();
        for file in ["a.json", "sub/b.gguf"] {
            cache.point(commit, file, "abc").unwrap();
            cache.point(commit, file, "abc").unwrap();
            assert_eq!(fs::read(cache.snapshot(commit).join(file)).unwrap(), b"x");
        }
        cache.point(commit, "gone", "no-such-blob").unwrap();
        assert_eq!(cache.files(commit), ["a.json", "sub/b.gguf"]);
        let folder = root.path().join("models--org--name");
        assert_eq!(
            fs::read_to_string(folder.join("refs/main")).unwrap(),
            commit
        );
        assert!(folder.join("snapshots").join(commit).join("sub").is_dir());
    }

    #[test]
    fn a_damaged_ref_is_no_commit() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(root.path(), "a/b");
        let file = cache.folder().join("refs/main");
        create_parent(&file).unwrap();
        fs::write(file, "../../etc").unwrap();
        assert_eq!(cache.commit("main"), None);
    }
}
