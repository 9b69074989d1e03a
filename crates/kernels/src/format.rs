//! Number formats of stored weights: their names, ids, block sizes, and the reference conversions.
//!
//! A row of a matrix is a whole number of blocks; the plain formats have blocks of one value. Names and ids of the
//! quantised formats are those of GGUF.

use half::{bf16, f16};

use crate::blocks::{BlockQ8_0, Q8_BLOCK, quantize_q8_0};

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit float with 4 exponent and 3 mantissa bits, no infinities (`e4m3fn`); its scale is stored apart.
    F8E4M3,
    /// Raw bytes: packed weights of a checkpoint dialect. As numbers, 0 to 255.
    U8,
    /// Blocks of 32 signed bytes with an f16 scale.
    Q8_0,
}

/// What is known about one format.
struct Row {
    format: Format,
    name: &'static str,
    gguf_id: Option<u32>,
    block_len: usize,
    block_bytes: usize,
}

const fn row(
    format: Format,
    name: &'static str,
    gguf_id: Option<u32>,
    (block_len, block_bytes): (usize, usize),
) -> Row {
    Row {
        format,
        name,
        gguf_id,
        block_len,
        block_bytes,
    }
}

/// Every format, in the order of the enum.
const ROWS: &[Row] = &[
    row(Format::F32, "F32", Some(0), (1, 4)),
    row(Format::F16, "F16", Some(1), (1, 2)),
    row(Format::Bf16, "BF16", Some(30), (1, 2)),
    row(Format::F8E4M3, "F8_E4M3", None, (1, 1)),
    row(Format::U8, "U8", None, (1, 1)),
    row(Format::Q8_0, "Q8_0", Some(8), (32, 34)),
];

impl Format {
    fn info(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// Every format.
    pub fn all() -> impl Iterator<Item = Self> {
        ROWS.iter().map(|row| row.format)
    }

    /// Its name in GGUF and safetensors: `F32`, `BF16`, `Q8_0`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.info().name
    }

    /// The format of this name, in any case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all().find(|format| format.name().eq_ignore_ascii_case(name))
    }

    /// Its number in GGUF files; `None` when they cannot hold it.
    #[must_use]
    pub fn gguf_id(self) -> Option<u32> {
        self.info().gguf_id
    }

    /// The format with this number in GGUF files.
    #[must_use]
    pub fn from_gguf_id(id: u32) -> Option<Self> {
        Self::all().find(|format| format.gguf_id() == Some(id))
    }

    /// Name used by PyTorch and `config.json`, for the three formats that have one there: `float32`, `float16`,
    /// `bfloat16`.
    #[must_use]
    pub fn torch_name(self) -> Option<&'static str> {
        match self {
            Self::F32 => Some("float32"),
            Self::F16 => Some("float16"),
            Self::Bf16 => Some("bfloat16"),
            _ => None,
        }
    }

    /// Values per block; 1 for the plain formats.
    #[must_use]
    pub fn block_len(self) -> usize {
        self.info().block_len
    }

    /// Bytes per block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        self.info().block_bytes
    }

    /// Whether a block holds more than one value.
    #[must_use]
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of `n_values` values; `None` when they are not whole blocks, or too many.
    #[must_use]
    pub fn n_bytes(self, n_values: usize) -> Option<usize> {
        if !n_values.is_multiple_of(self.block_len()) {
            return None;
        }
        (n_values / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Expands `bytes` (whole blocks) to f32.
    ///
    /// # Panics
    /// When `bytes` is not whole blocks.
    #[must_use]
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.block_bytes() * self.block_len()];
        self.decode_into(bytes, &mut values);
        values
    }

    /// [`Format::decode`] into `out`.
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn decode_into(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(
            self.n_bytes(out.len()),
            Some(bytes.len()),
            "{} bytes for {} values of {}",
            bytes.len(),
            out.len(),
            self.name()
        );
        match self {
            Self::F32 => decode_words::<4>(bytes, out, f32::from_le_bytes),
            Self::F16 => decode_words::<2>(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => decode_words::<2>(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Self::F8E4M3 => decode_words::<1>(bytes, out, |[b]| f8_e4m3(b)),
            Self::U8 => decode_words::<1>(bytes, out, |[b]| f32::from(b)),
            Self::Q8_0 => {
                for (block, out) in bytes.chunks_exact(34).zip(out.chunks_exact_mut(Q8_BLOCK)) {
                    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    for (out, q) in out.iter_mut().zip(&block[2..]) {
                        *out = f32::from(*q as i8) * d;
                    }
                }
            }
        }
    }

    /// Stores `values`, rounding plain formats to nearest even; `None` when they are not whole blocks, when the format
    /// cannot be written, or when a value is not representable (NaN and infinities in a quantised format).
    #[must_use]
    pub fn encode(self, values: &[f32]) -> Option<Vec<u8>> {
        self.n_bytes(values.len())?;
        match self {
            Self::F32 => Some(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            Self::F16 => {
                let words = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes());
                Some(words.collect())
            }
            Self::Bf16 => {
                let words = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes());
                Some(words.collect())
            }
            Self::F8E4M3 | Self::U8 => None,
            Self::Q8_0 => {
                let mut blocks = vec![BlockQ8_0::ZERO; values.len() / Q8_BLOCK];
                let bytes = |block: &BlockQ8_0| {
                    let mut bytes = block.d.to_le_bytes().to_vec();
                    bytes.extend(block.qs.iter().map(|q| *q as u8));
                    bytes
                };
                quantize_q8_0(values, &mut blocks).then(|| blocks.iter().flat_map(bytes).collect())
            }
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn decode_words<const N: usize>(bytes: &[u8], out: &mut [f32], word: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = word(*bytes);
    }
}

/// `e4m3fn`: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; 0x7f and 0xff are NaN, there are no infinities.
fn f8_e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum_and_names_are_unique() {
        for (at, row) in ROWS.iter().enumerate() {
            assert_eq!(row.format as usize, at);
            assert_eq!(
                Format::from_name(&row.name.to_lowercase()),
                Some(row.format)
            );
            if let Some(id) = row.gguf_id {
                assert_eq!(Format::from_gguf_id(id), Some(row.format));
            }
        }
    }

    #[test]
    fn plain_formats_by_hand() {
        assert_eq!(
            Format::F32.encode(&[1.0]).unwrap(),
            [0x00, 0x00, 0x80, 0x3f]
        );
        assert_eq!(Format::Bf16.encode(&[1.0]).unwrap(), [0x80, 0x3f]);
        assert_eq!(Format::F16.encode(&[1.0]).unwrap(), [0x00, 0x3c]);
        for format in [Format::F32, Format::F16, Format::Bf16] {
            let values = [0.0, -2.5, 0.5, 96.0];
            assert_eq!(format.decode(&format.encode(&values).unwrap()), values);
        }
        // 1 + 2^-8 lies midway between 1 and 1 + 2^-7: the even one is 1.
        let even = Format::Bf16.encode(&[1.0 + 1.0 / 256.0]).unwrap();
        assert_eq!(Format::Bf16.decode(&even), [1.0]);
    }

    #[test]
    fn eight_bit_floats_by_hand() {
        // 0x38 = exponent 7: 1; 0x01: the smallest, 2^-9; 0x7e: the largest, 448; 0xb9: -1.125.
        let values = Format::F8E4M3.decode(&[0x38, 0x01, 0x7e, 0xb9, 0x00]);
        assert_eq!(values, [1.0, 1.0 / 512.0, 448.0, -1.125, 0.0]);
        assert!(Format::F8E4M3.decode(&[0x7f])[0].is_nan());
    }

    #[test]
    fn odd_lengths_are_refused() {
        assert_eq!(Format::Q8_0.n_bytes(33), None);
        assert!(Format::Q8_0.encode(&[0.0; 33]).is_none());
        assert_eq!(Format::Q8_0.n_bytes(64), Some(68));
    }
}
