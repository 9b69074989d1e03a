//! Every golden checkpoint of every architecture: it opens, has exactly the tensors that its configuration asks for, and
//! its configuration survives being written and read.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cadre_checkpoint::{Checkpoint, Dtype, ModelConfig, tensor_specs};
use cadre_testkit::golden_dir;

/// Folders under `folder` with a `config.json`.
fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.join("config.json").exists());
    paths.sort();
    paths
}

/// All golden checkpoints with the name of the folder that they are in.
fn all() -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(golden_dir()).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_dir() {
            let name = entry.file_name().into_string().unwrap();
            let paths = checkpoints(&entry.path()).into_iter();
            found.extend(paths.map(|path| (name.clone(), path)));
        }
    }
    found
}

#[test]
fn every_golden_checkpoint_opens_complete_and_its_configuration_survives_writing() {
    let mut architectures = BTreeSet::new();
    for (name, path) in all() {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let config = checkpoint.config();
        // What mergekit is compared on is of several.
        if name != "mergekit" {
            assert_eq!(config.model_type, name);
        }
        checkpoint.expect_exactly(&tensor_specs(config)).unwrap();
        let dtype = config.dtype.unwrap_or(Dtype::F32);
        let text = config.to_config_json(dtype).unwrap();
        let again = ModelConfig::parse("written", &text, Some(&config.to_generation_json()));
        let mut expected = config.clone();
        expected.dtype = Some(dtype);
        assert_eq!(again.unwrap(), expected, "{}: {text}", path.display());
        architectures.insert(config.model_type.clone());
    }
    assert_eq!(architectures.len(), 16, "{architectures:?}");
}
