//! Number formats as safetensors files spell them.

use cadre_kernels::Format;

/// The format of a safetensors tensor; `None` when it is not one that Cadre reads.
pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Format> {
    match dtype {
        safetensors::Dtype::F32 => Some(Format::F32),
        safetensors::Dtype::F16 => Some(Format::F16),
        safetensors::Dtype::BF16 => Some(Format::Bf16),
        safetensors::Dtype::F8_E4M3 => Some(Format::F8E4M3),
        safetensors::Dtype::U8 => Some(Format::U8),
        _ => None,
    }
}
