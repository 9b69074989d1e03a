//! The cheap, stable identity of a model; its definition is documented at `Checkpoint::digest`.

use sha2::{Digest, Sha256};

use crate::config::{Factors, ModelConfig};
use crate::rope::RopeScaling;
use crate::tensors::{Data, Entry};

/// Bytes per sample. Part of the definition: changing it changes every digest.
const SAMPLE: usize = 64;

/// Hashes `config` and `tensors`, which come sorted by name. `looked_at` hears of the bytes of each tensor once they are no
/// longer needed.
pub(crate) fn digest<'a>(
    config: &ModelConfig,
    tensors: impl Iterator<Item = (&'a String, &'a Entry)>,
    looked_at: impl Fn(&[u8]),
) -> String {
    let mut hasher = Sha256::new();
    // A version first, so that a later definition cannot collide with this one by accident.
    put(&mut hasher, b"cadre-digest-1");
    put(&mut hasher, config_line(config).as_bytes());
    for (name, entry) in tensors {
        put(&mut hasher, name.as_bytes());
        put(
            &mut hasher,
            format!("{} {:?}", entry.dtype, entry.shape).as_bytes(),
        );
        // Pieces that are gathered share the samples of their source and differ in where they start.
        if let Data::Strided { first, .. } | Data::Mxfp4 { first, .. } = entry.data {
            put(&mut hasher, &(first as u64).to_le_bytes());
        }
        for sample in samples(entry.source()) {
            put(&mut hasher, sample);
        }
        looked_at(entry.source());
        let scales = entry.scales.iter().flat_map(|scales| &scales.values);
        for scale in scales {
            put(&mut hasher, &scale.to_le_bytes());
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

/// What the configuration says about the computation. Shapes already cover the sizes.
fn config_line(config: &ModelConfig) -> String {
    use crate::config::RouterConfig::TopK;
    let mut line = format!(
        "{} top_k={} norm={} eps={:e} theta={:e} heads={}/{} tied={}",
        config.model_type,
        config.moe.top_k,
        config.moe.norm_topk_prob(),
        config.norm_eps,
        config.rope.theta,
        config.n_heads,
        config.n_kv_heads,
        config.tie_word_embeddings,
    );
    // What only some models have, each in its own words, so that a new feature leaves old digests alone.
    let attention = &config.attention;
    let windows = attention.windows.iter().any(Option::is_some);
    let plain_scale = 1.0 / (config.head_dim as f64).sqrt();
    let extras = [
        (config.rope.scaling != RopeScaling::None || config.rope.interleaved)
            .then(|| format!("{:?}", config.rope)),
        config.local_rope.as_ref().map(|rope| format!("{rope:?}")),
        windows.then(|| format!("{:?}", attention.windows)),
        (attention.scale != plain_scale).then(|| format!("{:e}", attention.scale)),
        attention.clip_qkv.map(|clip| format!("clip {clip:e}")),
        (!matches!(config.moe.router, TopK { .. })).then(|| format!("{:?}", config.moe.router)),
        (config.activation != crate::Activation::Silu).then(|| format!("{:?}", config.activation)),
        (config.scales != crate::Scales::default()).then(|| format!("{:?}", config.scales)),
        config.moe.factors.as_ref().map(factors),
        (!config.moe.shared_weights.is_empty())
            .then(|| format!("shared {:?}", config.moe.shared_weights)),
        (config.moe.n_null > 0).then(|| format!("null {}", config.moe.n_null)),
        config.moe.residual.map(|residual| format!("{residual:?}")),
        (config.moe.recurrent_router).map(|width| format!("recurrent {width}")),
        (config.moe.decoupled_router).map(|router| format!("{router:?}")),
        attention.experts.map(|experts| format!("{experts:?}")),
    ];
    for extra in extras.into_iter().flatten() {
        line.push(' ');
        line += &extra;
    }
    line
}

/// As a derived `Debug` writes what all factors have, so that digests stay; rows that differ follow.
fn factors(factors: &Factors) -> String {
    let Factors {
        rank,
        up_rows,
        down_rows,
        uneven,
    } = factors;
    let mut text =
        format!("Factors {{ rank: {rank}, up_rows: {up_rows}, down_rows: {down_rows} }}");
    if !uneven.is_empty() {
        text += &format!(" {uneven:?}");
    }
    text
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
