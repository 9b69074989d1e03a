//! Attention of one query over the stored positions: a softmax with a running maximum, block by block.

use cadre_kernels::Kernels;

use super::LayerKv;

/// Keys that are scored together. Their scores live on the stack, and the cut depends on positions
/// only, so that a token's result does not depend on how the tokens before it came in.
const KEY_BLOCK: usize = 64;

/// One query, and what it may look at.
pub(crate) struct Query<'a> {
    /// Multiplied with the keys, `[key_dim]`.
    pub(crate) on_keys: &'a [f32],
    /// Multiplied with the values as well, `[value_dim]`, where keys come from both (latent attention).
    pub(crate) on_values: Option<&'a [f32]>,
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// A logit that takes part in the softmax and adds nothing.
    pub(crate) sink: Option<f32>,
    /// Stored head.
    pub(crate) head: usize,
    /// Positions `from..to`.
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// `out = softmax(scale * query . keys) . values`.
///
/// Earlier sums are scaled down when a larger score turns up.
pub(crate) fn attend(kernels: Kernels, query: &Query<'_>, kv: &LayerKv, out: &mut [f32]) {
    let mut scores = [0.0f32; KEY_BLOCK];
    let mut shared = [0.0f32; KEY_BLOCK];
    // A sink is a score that came before all others.
    let mut highest = query.sink.unwrap_or(f32::NEG_INFINITY);
    let mut total = if query.sink.is_some() { 1.0f32 } else { 0.0 };
    out.fill(0.0);
    for from in (query.from..query.to).step_by(KEY_BLOCK) {
        let to = query.to.min(from + KEY_BLOCK);
        let (keys, values) = kv.rows(query.head, from, to);
        let scores = &mut scores[..to - from];
        kernels.matvec(keys, query.on_keys, scores);
        if let Some(on_values) = query.on_values {
            let shared = &mut shared[..to - from];
            kernels.matvec(values, on_values, shared);
            for (score, shared) in scores.iter_mut().zip(shared) {
                *score += *shared;
            }
        }
        for score in scores.iter_mut() {
            *score *= query.scale;
        }
        let new_highest = highest.max(kernels.max(scores));
        if new_highest > highest && total > 0.0 {
            let shrink = (highest - new_highest).exp();
            total *= shrink;
            for value in out.iter_mut() {
                *value *= shrink;
            }
        }
        highest = new_highest;
        total += kernels.exp_sum(scores, highest);
        kernels.add_weighted_rows(scores, values, out);
    }
    let inverse = 1.0 / total;
    for value in out {
        *value *= inverse;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::KvShape;

    fn shape(key_dim: usize, value_dim: usize) -> KvShape {
        KvShape {
            n_layers: 1,
            n_kv_heads: 1,
            key_dim,
            value_dim,
        }
    }

    fn query(on_keys: &[f32], to: usize) -> Query<'_> {
        Query {
            on_keys,
            on_values: None,
            scale: 1.0 / (on_keys.len() as f32).sqrt(),
            sink: None,
            head: 0,
            from: 0,
            to,
        }
    }

    #[test]
    fn blocks_of_keys_agree_with_one_softmax() {
        for (n_keys, from, sink) in [
            (1, 0, None),
            (5, 2, None),
            (64, 0, Some(0.5)),
            (65, 0, None),
            (200, 70, Some(30.0)),
            (200, 0, Some(-40.0)),
        ] {
            let mut kv = LayerKv::new(&shape(3, 3), n_keys);
            // The largest score comes last, so every block rescales.
            let row = |j: usize, s: f32| [j as f32 * 0.02 * s, (j as f32).sin(), s];
            for j in 0..n_keys {
                kv.store(0, j, &row(j, 1.0), &row(j, -1.0));
            }
            let on_keys = [1.5f32, 0.5, -1.0];
            let score = |j| {
                let products = row(j, 1.0)
                    .into_iter()
                    .zip(on_keys)
                    .map(|(a, b)| f64::from(a * b));
                products.sum::<f64>() / 3f64.sqrt()
            };
            let weight = |j: usize| if j < from { 0.0 } else { score(j).exp() };
            let total: f64 = (0..n_keys).map(weight).sum::<f64>()
                + sink.map_or(0.0, |sink: f32| f64::from(sink).exp());
            let mut out = [0.0; 3];
            let asked = Query {
                sink,
                from,
                ..query(&on_keys, n_keys)
            };
            attend(Kernels::detect(), &asked, &kv, &mut out);
            for (c, got) in out.iter().enumerate() {
                let sum: f64 = (0..n_keys)
                    .map(|j| weight(j) * f64::from(row(j, -1.0)[c]))
                    .sum();
                let expected = (sum / total) as f32;
                assert!(
                    (got - expected).abs() < 1e-5,
                    "{n_keys} keys: {got} {expected}"
                );
            }
        }
    }

    #[test]
    fn latent_scores_come_from_keys_and_values() {
        let mut kv = LayerKv::new(&shape(1, 2), 2);
        kv.store(0, 0, &[1.0], &[2.0, 0.0]);
        kv.store(0, 1, &[0.0], &[0.0, 4.0]);
        let asked = Query {
            on_values: Some(&[0.5, 0.25]),
            ..query(&[1.0], 2)
        };
        // Scores 1 + 1 and 0 + 1.
        let mut out = [0.0; 2];
        attend(Kernels::detect(), &asked, &kv, &mut out);
        let first = 1.0 / (1.0 + (-1f32).exp());
        assert!((out[0] - 2.0 * first).abs() < 1e-6, "{out:?}");
        assert!((out[1] - 4.0 * (1.0 - first)).abs() < 1e-6, "{out:?}");
    }

    #[test]
    fn a_nan_key_is_not_hidden() {
        let mut kv = LayerKv::new(&shape(2, 2), 100);
        kv.store(0, 3, &[f32::NAN, 0.0], &[1.0, 1.0]);
        let mut out = [0.0; 2];
        attend(Kernels::detect(), &query(&[1.0, 1.0], 100), &kv, &mut out);
        assert!(out.iter().all(|v| v.is_nan()), "{out:?}");
    }
}
