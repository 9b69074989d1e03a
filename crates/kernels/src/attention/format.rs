//! The formats that keys and values may be stored in.

use std::fmt;

use crate::arch::attention::SCALE_GROUP;

/// How a number of the cache is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 32-bit floats: nothing is lost.
    #[default]
    F32,
    /// 16-bit floats. Numbers above 65504 become infinite, which the logits then show.
    F16,
    /// 8-bit integers; every 32 numbers of a key or value share a 16-bit scale.
    Q8_0,
}

impl KvFormat {
    /// Every format, largest first.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Q8_0];

    /// Its name in flags and reports: `f32`, `f16`, `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes of a key or value of `n` numbers.
    pub fn n_bytes(self, n: usize) -> usize {
        match self {
            Self::F32 => 4 * n,
            Self::F16 => 2 * n,
            Self::Q8_0 => n + 2 * n.div_ceil(SCALE_GROUP),
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The formats of keys and of values; of latent attention, of the rotary keys and of the latents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct KvFormats {
    /// Of keys.
    pub keys: KvFormat,
    /// Of values.
    pub values: KvFormat,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_formats() {
        assert_eq!(KvFormat::ALL.map(|f| f.n_bytes(64)), [256, 128, 68]);
        assert_eq!(KvFormat::Q8_0.n_bytes(33), 33 + 4);
        assert_eq!(KvFormat::Q8_0.to_string(), "q8_0");
    }
}
