//! The bytes of a GGUF header: the inverse of `header`.

use cadre_kernels::Format;

use super::header::{MAGIC, VERSION};
use super::value::{Value, write_text};

/// A line of the tensor table to be.
pub(super) struct EncodedTensor<'a> {
    pub(super) name: &'a str,
    /// Slowest first.
    pub(super) shape: &'a [usize],
    /// One that has an id in GGUF.
    pub(super) dtype: Format,
    /// From the start of the data.
    pub(super) offset: u64,
}

/// Magic, version, metadata and tensor table, padded to `alignment`: the data comes next.
pub(super) fn encode_header<'a>(
    entries: &[(&str, &Value)],
    tensors: impl ExactSizeIterator<Item = EncodedTensor<'a>>,
    alignment: usize,
) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        write_text(key, &mut out);
        value.write(&mut out);
    }
    for tensor in tensors {
        write_text(tensor.name, &mut out);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for dim in tensor.shape.iter().rev() {
            out.extend((*dim as u64).to_le_bytes());
        }
        let id = tensor
            .dtype
            .gguf_id()
            .expect("only formats of GGUF are written");
        out.extend(id.to_le_bytes());
        out.extend(tensor.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(alignment), 0);
    out
}
