//! Any text as config.json: it is understood or refused, without panic.
#![no_main]

use cadre_checkpoint::ModelConfig;
use libfuzzer_sys::fuzz_target;

const CONFIG: &str = include_str!("../../golden/qwen3_moe/plain/config.json");

fuzz_target!(|data: &str| {
    drop(ModelConfig::parse("fuzz/config.json", data, None));
    // As generation_config.json, which is reached only behind a configuration that is fine.
    drop(ModelConfig::parse("fuzz/config.json", CONFIG, Some(data)));
});
