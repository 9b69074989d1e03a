//! One file per architecture, named as its `model_type`. The list of them is in `load.rs`.

pub(crate) mod qwen3_moe;
