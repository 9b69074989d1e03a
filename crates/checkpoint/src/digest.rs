//! The cheap, stable identity of a model; its definition is documented at `Checkpoint::digest`.

use sha2::{Digest, Sha256};

use crate::checkpoint::TensorView;
use crate::config::ModelConfig;

/// Bytes per sample. Part of the definition: changing it changes every digest.
const SAMPLE: usize = 64;

/// Hashes `config` and `tensors`, which come sorted by name.
pub(crate) fn digest<'a>(
    config: &ModelConfig,
    tensors: impl Iterator<Item = (&'a str, TensorView<'a>)>,
) -> String {
    let mut hasher = Sha256::new();
    // A version first, so that a later definition cannot collide with this one by accident.
    put(&mut hasher, b"cadre-digest-1");
    put(&mut hasher, config_line(config).as_bytes());
    for (name, tensor) in tensors {
        put(&mut hasher, name.as_bytes());
        put(
            &mut hasher,
            format!("{} {:?}", tensor.dtype, tensor.shape).as_bytes(),
        );
        for sample in samples(tensor.bytes) {
            put(&mut hasher, sample);
        }
    }
    hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Length-prefixed, so that neighbouring fields cannot run into each other.
fn put(hasher: &mut Sha256, bytes: &[u8]) {
    hasher.update((bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

/// What `config.json` says about the computation. Shapes already cover the sizes.
fn config_line(config: &ModelConfig) -> String {
    format!(
        "{} top_k={} norm={} eps={:e} theta={:e} heads={}/{} tied={}",
        config.model_type,
        config.top_k,
        config.norm_topk_prob,
        config.rms_norm_eps,
        config.rope_theta,
        config.n_heads,
        config.n_kv_heads,
        config.tie_word_embeddings,
    )
}

fn samples(bytes: &[u8]) -> Vec<&[u8]> {
    if bytes.len() <= 3 * SAMPLE {
        return vec![bytes];
    }
    let middle = (bytes.len() - SAMPLE) / 2;
    vec![
        &bytes[..SAMPLE],
        &bytes[middle..middle + SAMPLE],
        &bytes[bytes.len() - SAMPLE..],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_tensors_are_hashed_entirely_and_large_ones_at_three_places() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(samples(&bytes[..192]), [&bytes[..192]]);
        assert_eq!(
            samples(&bytes),
            [&bytes[..64], &bytes[96..160], &bytes[192..]]
        );
    }
}
