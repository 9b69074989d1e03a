//! Flags that say how keys and values are stored, shared by the commands that make sessions or count their memory.

use std::ffi::OsString;

use cadre_engine::{KvFormat, KvFormats};
use clap::ValueEnum;

/// The formats of the cache.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct CacheArgs {
    /// How keys are stored; anything but f32 saves memory and changes results a little. Also spelled -ctk.
    #[arg(long, value_name = "FORMAT", default_value = "f32")]
    cache_type_k: KvArg,
    /// How values are stored. Also spelled -ctv.
    #[arg(long, value_name = "FORMAT", default_value = "f32")]
    cache_type_v: KvArg,
}

/// How keys or values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KvArg {
    /// 32-bit floats.
    #[value(name = "f32")]
    F32,
    /// 16-bit floats.
    #[value(name = "f16")]
    F16,
    /// 8 bits in groups of 32.
    #[value(name = "q8_0")]
    Q8_0,
}

impl CacheArgs {
    /// The formats.
    pub(crate) fn formats(self) -> KvFormats {
        let format = |arg| match arg {
            KvArg::F32 => KvFormat::F32,
            KvArg::F16 => KvFormat::F16,
            KvArg::Q8_0 => KvFormat::Q8_0,
        };
        KvFormats {
            keys: format(self.cache_type_k),
            values: format(self.cache_type_v),
        }
    }
}

/// llama.cpp's short spellings, of several letters after one hyphen, as the long flags that they stand for.
pub(crate) fn spelled_out(arg: OsString) -> OsString {
    match arg.to_str() {
        Some("-ctk") => "--cache-type-k".into(),
        Some("-ctv") => "--cache-type-v".into(),
        Some("-np") => "--parallel".into(),
        _ => arg,
    }
}
