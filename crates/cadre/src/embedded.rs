//! `nano`, the model that is part of the program.

use anyhow::{Context, Result};
use cadre_checkpoint::{Checkpoint, EmbeddedFiles};

/// Its name in messages.
pub(crate) const NAME: &str = "nano (embedded)";

macro_rules! embed {
    ($($file:literal),* $(,)?) => {
        &[$(($file, include_bytes!(concat!("../../../models/nano/", $file)))),*]
    };
}

const FILES: EmbeddedFiles = embed![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "profile.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Opens the embedded checkpoint.
pub(crate) fn open() -> Result<Checkpoint> {
    Checkpoint::from_embedded(NAME, FILES).context("the embedded model is damaged")
}
