//! Block formats against gguf and ggml: dequantised and quantised bit for bit, multiplied up to the order of sums.
#![expect(clippy::unwrap_used, reason = "tests")]

use cadre_kernels::{
    ActQ8, ActQ8K, Bytes, Compute, Format, Isa, Kernels, MatmulScratch, Matrix, Q8_BLOCK,
    SUPER_BLOCK, f16,
};
use safetensors::SafeTensors;

fn golden(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/quant/");
    std::fs::read(format!("{folder}{name}.safetensors")).unwrap()
}

fn bytes(file: &[u8], name: &str) -> Vec<u8> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    tensors.tensor(name).unwrap().data().to_vec()
}

fn values(file: &[u8], name: &str) -> Vec<f32> {
    Format::F32.decode(&bytes(file, name))
}

/// Formats that the file has a tensor `FORMAT.what` of.
fn formats(file: &[u8], what: &str) -> Vec<Format> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let has = |format: &Format| tensors.tensor(&format!("{format}.{what}")).is_ok();
    Format::all().filter(has).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_format_dequantises_as_gguf_does() {
    let file = golden("decode");
    let formats = formats(&file, "values");
    let quantized = Format::all().filter(|format| format.is_quantized());
    assert_eq!(formats, quantized.collect::<Vec<_>>());
    for format in formats {
        let got = format.decode(&bytes(&file, &format!("{format}.bytes")));
        let expected = values(&file, &format!("{format}.values"));
        assert_eq!(bits(&got), bits(&expected), "{format}");
    }
}

#[test]
fn rows_quantise_to_the_bytes_of_ggml() {
    let file = golden("encode");
    let rows = values(&file, "rows");
    let formats = formats(&file, "bytes");
    let written = Format::all().filter(|format| format.is_quantized() && format.can_encode());
    assert_eq!(formats, written.collect::<Vec<_>>());
    for format in formats {
        let expected = bytes(&file, &format!("{format}.bytes"));
        rows_become((format, &rows, &expected), |_, row| format.encode(row));
    }
}

/// Whether rows of `encode.safetensors` become the `expected` bytes by `encode`; refusals are rows that ggml gives an
/// infinite scale.
fn rows_become(
    (format, rows, expected): (Format, &[f32], &[u8]),
    encode: impl Fn(usize, &[f32]) -> Option<Vec<u8>>,
) {
    let row_bytes = format.n_bytes(SUPER_BLOCK).unwrap();
    let mut n_refused = 0;
    let rows = rows.chunks_exact(SUPER_BLOCK);
    for (at, (row, expected)) in rows.zip(expected.chunks_exact(row_bytes)).enumerate() {
        match encode(at, row) {
            Some(got) => assert_eq!(got, expected, "{format}, row {at}"),
            None => {
                let values = format.decode(expected);
                assert!(values.iter().any(|v| !v.is_finite()), "{format}, row {at}");
                n_refused += 1;
            }
        }
    }
    assert!(n_refused <= 1, "{format}: {n_refused}");
}

#[test]
fn rows_quantise_by_importance_to_the_bytes_of_ggml() {
    let file = golden("importance");
    let (rows, importance) = (
        values(&golden("encode"), "rows"),
        values(&file, "importance"),
    );
    let written = Format::all().filter(|format| format.is_quantized() && format.can_encode());
    assert_eq!(formats(&file, "bytes"), written.collect::<Vec<_>>());
    for format in formats(&file, "bytes") {
        let expected = bytes(&file, &format!("{format}.bytes"));
        rows_become((format, &rows, &expected), |at, row| {
            let importance = &importance[at * SUPER_BLOCK..][..SUPER_BLOCK];
            let mut out = vec![0; format.n_bytes(SUPER_BLOCK).unwrap()];
            format
                .encode_weighted_into(row, importance, &mut out)
                .then_some(out)
        });
    }
}

#[test]
fn activations_quantise_to_the_bytes_of_ggml() {
    let file = golden("dot");
    let x = values(&file, "x");
    for isa in Isa::available() {
        let kernels = Kernels::for_isa(isa).unwrap();
        let mut acts = vec![ActQ8::ZERO; x.len() / Q8_BLOCK];
        kernels.quantize_act(&x, &mut acts);
        let (mut q8_0, mut q8_1, mut q8_k) = (Vec::<u8>::new(), Vec::<u8>::new(), Vec::<u8>::new());
        for act in &acts {
            let quants = act.qs.map(|q| q as u8);
            let (d, sum) = (f16::from_f32(act.d), f16::from_f32(act.sum));
            q8_0.extend(d.to_le_bytes().iter().chain(&quants));
            q8_1.extend(d.to_le_bytes().iter().chain(&sum.to_le_bytes()));
            q8_1.extend(quants);
        }
        let mut acts = vec![ActQ8K::ZERO; x.len() / SUPER_BLOCK];
        kernels.quantize_act_k(&x, &mut acts);
        for act in &acts {
            q8_k.extend(act.d.to_le_bytes());
            q8_k.extend(act.qs.map(|q| q as u8));
            q8_k.extend(act.sums.iter().flat_map(|sum| sum.to_le_bytes()));
        }
        assert!(q8_0 == bytes(&file, "x.Q8_0"), "{isa}");
        assert!(q8_1 == bytes(&file, "x.Q8_1"), "{isa}");
        assert!(q8_k == bytes(&file, "x.Q8_K"), "{isa}");
    }
}

#[test]
fn products_are_those_of_ggml() {
    const N_TOKENS: usize = 3;
    let file = golden("dot");
    let x = values(&file, "x");
    let n_in = x.len() / N_TOKENS;
    for format in formats(&file, "products") {
        let expected = values(&file, &format!("{format}.products"));
        let n_out = expected.len() / N_TOKENS;
        let weights = Bytes::from(bytes(&file, &format!("{format}.bytes")));
        let w = Matrix::new(format, n_out, n_in, weights).unwrap();
        let mut row = vec![0.0; n_in];
        for isa in Isa::available() {
            let compute = Compute::new(Kernels::for_isa(isa).unwrap(), 1);
            let mut got = vec![0.0; expected.len()];
            compute.matmul(&w, &x, &mut got, &mut MatmulScratch::default());
            for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let (token, out) = (at / n_out, at % n_out);
                w.row(out, &mut row);
                let x = &x[token * n_in..][..n_in];
                let magnitude: f32 = row.iter().zip(x).map(|(w, x)| (w * x).abs()).sum();
                // The integers are the same; what is left is the order in which blocks are added.
                assert!(
                    (got - expected).abs() <= 1e-6 * magnitude,
                    "{isa} {format} [{token}, {out}]: {got} {expected}"
                );
            }
        }
    }
}
