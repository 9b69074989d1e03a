//! Number formats of tensors on disk and their conversion to and from `f32`.

use half::{bf16, f16};

/// Number format of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    Bf16,
}

impl Dtype {
    /// Bytes per value.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Name used by PyTorch and `config.json`: `float32`, `float16`, `bfloat16`.
    #[must_use]
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(Self::F32),
            safetensors::Dtype::F16 => Some(Self::F16),
            safetensors::Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Decodes little-endian `bytes` (a multiple of [`Dtype::size`]) into `f32`.
    #[must_use]
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            Self::F16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).to_f32())
                .collect(),
            Self::Bf16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect(),
        }
    }

    /// Encodes `values` as little-endian bytes, rounding to nearest even.
    #[must_use]
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => values
                .iter()
                .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                .collect(),
            Self::Bf16 => values
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_and_decodes_by_hand() {
        assert_eq!(Dtype::F32.encode(&[1.0]), [0, 0, 0x80, 0x3f]);
        assert_eq!(Dtype::Bf16.encode(&[1.0]), [0x80, 0x3f]);
        assert_eq!(Dtype::F16.encode(&[1.0]), [0, 0x3c]);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let values = [0.0, -2.5, 0.5, 96.0];
            assert_eq!(dtype.decode(&dtype.encode(&values)), values);
            assert_eq!(dtype.encode(&values).len(), 4 * dtype.size());
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        // 1 + 2^-8 lies midway between 1 and 1 + 2^-7: the even one is 1.
        assert_eq!(
            Dtype::Bf16.decode(&Dtype::Bf16.encode(&[1.0 + 1.0 / 256.0])),
            [1.0]
        );
    }
}
