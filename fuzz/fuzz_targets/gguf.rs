//! Any bytes as a GGUF file: opening it and asking for everything it offers must not panic.
#![no_main]

use bytes::Bytes;
use cadre_checkpoint::gguf::{Gguf, Value};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(gguf) = Gguf::from_bytes("fuzz.gguf", Bytes::copy_from_slice(data)) else {
        return;
    };
    for (key, value) in gguf.entries() {
        drop((gguf.size(key), gguf.u32(key), gguf.f32(key), gguf.flag(key)));
        drop((
            gguf.text(key).map(str::len),
            gguf.strings(key).map(|texts| texts.len()),
        ));
        drop((gguf.i32s(key), gguf.f32s(key)));
        drop((
            gguf.sizes_per_layer(key, 3),
            gguf.flags_per_layer(key, 3),
            gguf.f32s_per_layer(key, 3),
        ));
        if let Value::Array(array) = value {
            assert_eq!(array.iter().count(), array.len());
        }
    }
    for tensor in gguf.tensors() {
        let n_values = tensor.shape.iter().product();
        assert_eq!(
            tensor.dtype.n_bytes(n_values),
            Some(tensor.bytes.len()),
            "{}",
            tensor.name
        );
    }
});
