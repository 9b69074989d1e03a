//! The names of the parts of a split GGUF file: `model-00002-of-00009.gguf`.

use std::path::{Path, PathBuf};

pub(super) const NO_KEY: &str = "split.no";
pub(super) const COUNT_KEY: &str = "split.count";
pub(super) const TENSORS_KEY: &str = "split.tensors.count";

/// Whether `key` describes the split and not the model.
pub(super) fn is_split_key(key: &str) -> bool {
    [NO_KEY, COUNT_KEY, TENSORS_KEY].contains(&key)
}

/// Name of part `no` (from 0) of `count`.
pub(super) fn part_name(prefix: &str, no: usize, count: usize) -> String {
    format!("{prefix}-{:05}-of-{count:05}.gguf", no + 1)
}

/// The paths of all parts, when `path` is named as part `no` (from 0) of `count`.
pub(super) fn all_parts(path: &Path, no: usize, count: usize) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?;
    let prefix = name.strip_suffix(&part_name("", no, count))?;
    let part = |no| path.with_file_name(part_name(prefix, no, count));
    Some((0..count).map(part).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_from_any_of_them() {
        let parts = all_parts(Path::new("m/x-00002-of-00003.gguf"), 1, 3).unwrap();
        let names = [
            "m/x-00001-of-00003.gguf",
            "m/x-00002-of-00003.gguf",
            "m/x-00003-of-00003.gguf",
        ];
        assert_eq!(parts, names.map(PathBuf::from));
        assert_eq!(all_parts(Path::new("m/x-00002-of-00003.gguf"), 0, 3), None);
        assert_eq!(all_parts(Path::new("m/x.gguf"), 0, 1), None);
    }
}
