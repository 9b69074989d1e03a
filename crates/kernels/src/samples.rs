//! Matrices for tests: noise in every format, with scales that keep values near one.

use bytes::Bytes;
use half::f16;

use crate::format::Format;
use crate::matrix::Matrix;

/// Reproducible bytes.
pub(crate) fn noise_bytes(n: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 11) as u8
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// Reproducible values in -1..1.
pub(crate) fn noise(n: usize, seed: u32) -> Vec<f32> {
    let words = noise_bytes(4 * n, seed);
    let words = words.as_chunks::<4>().0.iter();
    words
        .map(|word| u32::from_le_bytes(*word) as f32 / u32::MAX as f32 * 2.0 - 1.0)
        .collect()
}

/// Where the f16 scales of a block are, and a good value for them.
fn scales(format: Format) -> (&'static [usize], f32) {
    match format {
        Format::Q4_0 | Format::Q5_0 => (&[0], 0.1),
        Format::Q4_1 | Format::Q5_1 => (&[0, 2], 0.05),
        Format::Q8_0 | Format::Iq4Nl => (&[0], 0.01),
        Format::Q2K => (&[80, 82], 0.02),
        Format::Q3K => (&[108], 0.01),
        Format::Q4K | Format::Q5K => (&[0, 2], 0.001),
        Format::Q6K => (&[208], 0.0003),
        Format::Iq4Xs => (&[0], 0.0003),
        _ => (&[], 0.0),
    }
}

/// A matrix of noise in `format`; `None` when rows are not whole blocks, or for raw bytes.
pub(crate) fn matrix(format: Format, n_out: usize, n_in: usize, seed: u32) -> Option<Matrix> {
    let n_bytes = format.n_bytes(n_out * n_in)?;
    let bytes = if !format.is_quantized() && format.can_encode() {
        format.encode(&noise(n_out * n_in, seed))?
    } else {
        let mut bytes = noise_bytes(n_bytes, seed);
        for (i, block) in bytes.chunks_exact_mut(format.block_bytes()).enumerate() {
            let (offsets, scale) = scales(format);
            for offset in offsets {
                let scale = f16::from_f32(scale * (0.5 + (i % 7) as f32 / 7.0));
                block[*offset..offset + 2].copy_from_slice(&scale.to_le_bytes());
            }
            match format {
                Format::Mxfp4 => block[0] = 125 + (i % 3) as u8,
                Format::Q8K => block[..4].copy_from_slice(&0.01f32.to_le_bytes()),
                // Below 2, and not NaN.
                Format::F8E4M3 => block[0] &= 0xbf,
                _ => {}
            }
        }
        bytes
    };
    Matrix::new(format, n_out, n_in, Bytes::from(bytes)).ok()
}

/// A matrix in every format that holds rows of `n_in`.
pub(crate) fn matrices(n_out: usize, n_in: usize) -> Vec<Matrix> {
    Format::all()
        .filter_map(|format| matrix(format, n_out, n_in, 7 + format as u32))
        .collect()
}
