//! Number formats of stored weights: their names, ids, block sizes, and the reference conversions.
//!
//! A row of a matrix is a whole number of blocks; the plain formats have blocks of one value. Names and ids of the
//! quantised formats are those of GGUF.

use half::{bf16, f16};

use crate::blocks::{
    self, Block, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1,
    BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K,
};
use crate::quantize::{encode_blocks, encode_weighted};

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
    /// Blocks of 32 four-bit integers with an f16 scale.
    Q4_0,
    /// [`Format::Q4_0`] with a minimum.
    Q4_1,
    /// Blocks of 32 five-bit integers with an f16 scale.
    Q5_0,
    /// [`Format::Q5_0`] with a minimum.
    Q5_1,
    /// Super-blocks of 256 two-bit integers with a 4-bit scale and minimum per 16.
    Q2K,
    /// Super-blocks of three-bit integers with a 6-bit scale per 16.
    Q3K,
    /// Super-blocks of four-bit integers with a 6-bit scale and minimum per 32.
    Q4K,
    /// Super-blocks of five-bit integers with a 6-bit scale and minimum per 32.
    Q5K,
    /// Super-blocks of six-bit integers with an 8-bit scale per 16.
    Q6K,
    /// Super-blocks of 256 signed bytes with an f32 scale.
    Q8K,
    /// Blocks of 32 codes of 16 uneven values, with an f16 scale.
    Iq4Nl,
    /// Super-blocks of the same codes with a 6-bit scale per 32.
    Iq4Xs,
    /// Blocks of 32 four-bit floats with a shared power of two.
    Mxfp4,
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
    row(Format::Q4_0, "Q4_0", Some(2), (32, 18)),
    row(Format::Q4_1, "Q4_1", Some(3), (32, 20)),
    row(Format::Q5_0, "Q5_0", Some(6), (32, 22)),
    row(Format::Q5_1, "Q5_1", Some(7), (32, 24)),
    row(Format::Q2K, "Q2_K", Some(10), (256, 84)),
    row(Format::Q3K, "Q3_K", Some(11), (256, 110)),
    row(Format::Q4K, "Q4_K", Some(12), (256, 144)),
    row(Format::Q5K, "Q5_K", Some(13), (256, 176)),
    row(Format::Q6K, "Q6_K", Some(14), (256, 210)),
    row(Format::Q8K, "Q8_K", Some(15), (256, 292)),
    row(Format::Iq4Nl, "IQ4_NL", Some(20), (32, 18)),
    row(Format::Iq4Xs, "IQ4_XS", Some(23), (256, 136)),
    row(Format::Mxfp4, "MXFP4", Some(39), (32, 17)),
];

/// Evaluates `$body` with `$block` standing for the block type of `$format`, which is a block format.
macro_rules! for_block {
    ($format:expr, $block:ident => $body:expr) => {
        match $format {
            // Of activations only: nothing is written in it.
            Format::Q8K => {
                type $block = BlockQ8K;
                $body
            }
            format => for_written!(format, $block => $body),
        }
    };
}

/// Evaluates `$body` with `$block` standing for the block type of `$format`, which can be written.
macro_rules! for_written {
    ($format:expr, $block:ident => $body:expr) => {{
        macro_rules! with {
            ($type:ty) => {{
                type $block = $type;
                $body
            }};
        }
        match $format {
            Format::Q8_0 => with!(BlockQ8_0),
            Format::Q4_0 => with!(BlockQ4_0),
            Format::Q4_1 => with!(BlockQ4_1),
            Format::Q5_0 => with!(BlockQ5_0),
            Format::Q5_1 => with!(BlockQ5_1),
            Format::Q2K => with!(BlockQ2K),
            Format::Q3K => with!(BlockQ3K),
            Format::Q4K => with!(BlockQ4K),
            Format::Q5K => with!(BlockQ5K),
            Format::Q6K => with!(BlockQ6K),
            Format::Iq4Nl => with!(BlockIq4Nl),
            Format::Iq4Xs => with!(BlockIq4Xs),
            Format::Mxfp4 => with!(BlockMxfp4),
            Format::F32
            | Format::F16
            | Format::Bf16
            | Format::F8E4M3
            | Format::U8
            | Format::Q8K => {
                unreachable!("a block format that is written")
            }
        }
    }};
}

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

    /// [`Block::PRODUCT_ERROR`] of a block format.
    pub(crate) fn product_error(self) -> f64 {
        for_block!(self, B => <B as Block>::PRODUCT_ERROR)
    }

    /// [`Block::mass`] of every block of a block format, each at the place of the block's first value in `out`.
    pub(crate) fn masses(self, bytes: &[u8], out: &mut [f32]) {
        for_block!(self, B => {
            let blocks = bytes.chunks_exact(size_of::<B>());
            for (block, out) in blocks.zip(out.chunks_exact_mut(<B as Block>::LEN)) {
                out[0] = blocks::read::<B>(block).mass() as f32;
            }
        });
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
            Self::F8E4M3 => decode_f8(bytes, out),
            Self::U8 => decode_words::<1>(bytes, out, |[b]| f32::from(b)),
            _ => for_block!(self, B => decode_blocks::<B>(bytes, out)),
        }
    }

    /// Index of the first value of `bytes` (whole blocks) that is NaN or infinite. Looks at the scales of blocks alone
    /// until they raise a doubt.
    ///
    /// # Panics
    /// When `bytes` is not whole blocks.
    #[must_use]
    pub fn first_non_finite(self, bytes: &[u8]) -> Option<usize> {
        assert!(
            bytes.len().is_multiple_of(self.block_bytes()),
            "whole blocks"
        );
        match self {
            Self::F32 => position::<4>(bytes, |b| !f32::from_le_bytes(b).is_finite()),
            Self::F16 => position::<2>(bytes, |b| !f16::from_le_bytes(b).is_finite()),
            Self::Bf16 => position::<2>(bytes, |b| !bf16::from_le_bytes(b).is_finite()),
            Self::F8E4M3 => position::<1>(bytes, |[b]| b & 0x7f == 0x7f),
            Self::U8 => None,
            _ => for_block!(self, B => non_finite_block::<B>(bytes)),
        }
    }

    /// Whether values can be stored in it: [`Format::encode`] is there.
    #[must_use]
    pub fn can_encode(self) -> bool {
        !matches!(self, Self::F8E4M3 | Self::U8 | Self::Q8K)
    }

    /// Stores `values`, rounding plain formats to nearest even, and block formats byte for byte as ggml's quantisers do
    /// without an importance matrix. `None` when they are not whole blocks, when the format
    /// cannot be written, or when a value is not representable (NaN and infinities in a quantised format).
    #[must_use]
    pub fn encode(self, values: &[f32]) -> Option<Vec<u8>> {
        let mut bytes = vec![0; self.n_bytes(values.len())?];
        self.encode_into(values, &mut bytes).then_some(bytes)
    }

    /// [`Format::encode`] into `out`; false instead of `None`, and then `out` is unusable.
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn encode_into(self, values: &[f32], out: &mut [u8]) -> bool {
        assert_eq!(self.n_bytes(values.len()), Some(out.len()), "whole blocks");
        match self {
            Self::F32 => encode_words::<4>(values, out, f32::to_le_bytes),
            Self::F16 => encode_words::<2>(values, out, |v| f16::from_f32(v).to_le_bytes()),
            Self::Bf16 => encode_words::<2>(values, out, |v| bf16::from_f32(v).to_le_bytes()),
            Self::F8E4M3 | Self::U8 | Self::Q8K => false,
            _ => for_written!(self, B => encode_blocks::<B>(values, out)),
        }
    }

    /// [`Format::encode_into`] of rows of `importance.len()` values, where the squared error of column `j` counts
    /// `importance[j]`, which is from 0: what `x_j^2` is on average over the inputs `x` of the matrix. Byte for byte as
    /// ggml's quantisers do with an importance matrix; formats that are made without a search (plain ones, Q8_0, MXFP4)
    /// are what they are without.
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn encode_weighted_into(self, values: &[f32], importance: &[f32], out: &mut [u8]) -> bool {
        let cols = importance.len();
        assert!(
            cols > 0 && values.len().is_multiple_of(cols) && self.n_bytes(cols).is_some(),
            "rows of {cols} values in whole blocks"
        );
        assert_eq!(self.n_bytes(values.len()), Some(out.len()), "whole blocks");
        match self {
            _ if !self.is_quantized() || self == Self::Q8K => self.encode_into(values, out),
            _ => for_written!(self, B => encode_weighted::<B>(values, importance, out)),
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

fn decode_blocks<B: Block>(bytes: &[u8], out: &mut [f32]) {
    let blocks = bytes.chunks_exact(size_of::<B>());
    for (bytes, out) in blocks.zip(out.chunks_exact_mut(B::LEN)) {
        blocks::read::<B>(bytes).decode(out);
    }
}

/// Index of the first word that `is_bad`.
fn position<const N: usize>(bytes: &[u8], is_bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    /// Looked at together, without a way out between them: that is what becomes vectors.
    const PIECE: usize = 256;
    let units = bytes.as_chunks::<N>().0;
    let has_bad = |piece: &[[u8; N]]| piece.iter().fold(false, |bad, b| bad | is_bad(*b));
    let from = units.chunks(PIECE).position(has_bad)? * PIECE;
    let within = units[from..].iter().position(|b| is_bad(*b))?;
    Some(from + within)
}

fn non_finite_block<B: Block>(bytes: &[u8]) -> Option<usize> {
    let mut values = vec![0.0; B::LEN];
    let mut blocks = bytes.chunks_exact(size_of::<B>()).enumerate();
    blocks.find_map(|(at, bytes)| {
        let block = blocks::read::<B>(bytes);
        if block.is_surely_finite() {
            return None;
        }
        block.decode(&mut values);
        let within = values.iter().position(|v| !v.is_finite())?;
        Some(at * B::LEN + within)
    })
}

fn encode_words<const N: usize>(
    values: &[f32],
    out: &mut [u8],
    word: impl Fn(f32) -> [u8; N],
) -> bool {
    for (out, value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *out = word(*value);
    }
    true
}

/// Expands 8-bit floats, as many as both slices hold.
#[inline(always)]
pub(crate) fn decode_f8(bytes: &[u8], out: &mut [f32]) {
    for (out, byte) in out.iter_mut().zip(bytes) {
        *out = f8_e4m3(*byte);
    }
}

/// `e4m3fn`: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; 0x7f and 0xff are NaN, there are no infinities.
///
/// Exponent and mantissa are moved to where f32 has them, and the difference of the biases is multiplied in, which
/// makes the numbers below the normal ones come out right too.
#[inline(always)]
fn f8_e4m3(byte: u8) -> f32 {
    const BIASES: f32 = f32::from_bits((127 + 127 - 7) << 23);
    let (sign, magnitude) = (u32::from(byte & 0x80), u32::from(byte & 0x7f));
    let value = f32::from_bits(sign << 24 | magnitude << 20) * BIASES;
    if magnitude == 0x7f { f32::NAN } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_several_broken_values_is_found_anywhere() {
        for format in [Format::F32, Format::F16, Format::Bf16, Format::F8E4M3] {
            for at in [0, 255, 256, 600] {
                let mut bytes = vec![0; 700 * format.block_bytes()];
                for broken in [at, 699] {
                    bytes[broken * format.block_bytes()..][..format.block_bytes()].fill(0xff);
                }
                assert_eq!(format.first_non_finite(&bytes), Some(at), "{format}");
            }
        }
    }

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
    fn what_can_be_encoded_comes_back_and_nan_does_not_pass() {
        let values: Vec<f32> = (0..256).map(|i| (i % 16) as f32 - 8.0).collect();
        let mut nan = values.clone();
        nan[200] = f32::NAN;
        for format in Format::all() {
            let bytes = format.encode(&values);
            assert_eq!(bytes.is_some(), format.can_encode(), "{format}");
            let Some(bytes) = bytes else { continue };
            // Two bits have four levels for these 16 values.
            let most = if format == Format::Q2K { 2.7 } else { 1.0 };
            for (a, b) in format.decode(&bytes).iter().zip(&values) {
                assert!((a - b).abs() <= most, "{format}: {a} {b}");
            }
            assert_eq!(format.encode(&nan).is_none(), format.is_quantized());
        }
    }

    #[test]
    fn odd_lengths_are_refused() {
        assert_eq!(Format::Q8_0.n_bytes(33), None);
        assert!(Format::Q8_0.encode(&[0.0; 33]).is_none());
        assert_eq!(Format::Q8_0.n_bytes(64), Some(68));
    }
}
