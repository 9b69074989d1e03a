//! Any bytes as a safetensors file: what is accepted must be consistent.
#![no_main]

use bytes::Bytes;
use cadre_checkpoint::read_safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::copy_from_slice(data);
    for tensor in read_safetensors("fuzz.safetensors", &bytes).unwrap_or_default() {
        let n_values = tensor.shape.iter().product();
        assert_eq!(
            tensor.dtype.n_bytes(n_values),
            Some(tensor.bytes.len()),
            "{}",
            tensor.name
        );
    }
});
