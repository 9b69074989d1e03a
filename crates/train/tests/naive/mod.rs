//! Naive f64 forms of the fused operations: one loop per sum, written from the formulas, sharing nothing with the crate.

/// Sizes of an attention case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionSizes {
    pub(crate) batch: usize,
    pub(crate) seq_len: usize,
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rope_theta: f64,
    pub(crate) eps: f64,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn rms_normed(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let rms = (dot(x, x) / x.len() as f64 + eps).sqrt();
    x.iter().zip(w).map(|(x, w)| x / rms * w).collect()
}

/// `-log softmax(logits)[target]`.
fn surprise(logits: &[f64], target: usize) -> f64 {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
    top + sum.ln() - logits[target]
}

/// `x [T, n_in] w[n_out, n_in]^T`.
pub(crate) fn linear(x: &[f64], w: &[f64], n_in: usize) -> Vec<f64> {
    let row = |x: &[f64]| w.chunks(n_in).map(|w| dot(x, w)).collect::<Vec<f64>>();
    x.chunks(n_in).flat_map(row).collect()
}

/// RMSNorm of every row of `x`, which is as long as `w`.
pub(crate) fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    x.chunks(w.len())
        .flat_map(|x| rms_normed(x, w, eps))
        .collect()
}

/// Rows `ids` of `w [V, d]`.
pub(crate) fn embedding(w: &[f64], ids: &[u32], d: usize) -> Vec<f64> {
    ids.iter()
        .flat_map(|&id| w[id as usize * d..(id as usize + 1) * d].to_vec())
        .collect()
}

/// Mean surprise of the targets under the logits `x w^T`, `x [T, d]`.
pub(crate) fn cross_entropy(x: &[f64], w: &[f64], targets: &[u32], d: usize) -> f64 {
    let logits = linear(x, w, d);
    let rows = logits.chunks(w.len() / d).zip(targets);
    rows.map(|(row, &target)| surprise(row, target as usize))
        .sum::<f64>()
        / targets.len() as f64
}

fn rotated(x: &[f64], position: usize, theta: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let mut y = vec![0.0; x.len()];
    for i in 0..half {
        let angle = position as f64 / theta.powf(2.0 * i as f64 / x.len() as f64);
        y[i] = x[i] * angle.cos() - x[i + half] * angle.sin();
        y[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin();
    }
    y
}

/// Causal grouped-query attention; inputs are q, k, v, q_norm, k_norm, the latter two empty where nothing is normed.
pub(crate) fn attention(inputs: &[Vec<f64>], s: AttentionSizes) -> Vec<f64> {
    let [q, k, v, q_norm, k_norm] = inputs else {
        panic!("five inputs")
    };
    let at = |x: &[f64], token: usize, head: usize, n_heads: usize| {
        let start = (token * n_heads + head) * s.head_dim;
        x[start..start + s.head_dim].to_vec()
    };
    let prepared = |x: &[f64], w: &[f64], n_heads: usize| -> Vec<Vec<f64>> {
        let of = |i: usize| {
            let (token, head) = (i / n_heads, i % n_heads);
            let row = at(x, token, head, n_heads);
            let normed = match w {
                [] => row,
                _ => rms_normed(&row, w, s.eps),
            };
            rotated(&normed, token % s.seq_len, s.rope_theta)
        };
        (0..s.batch * s.seq_len * n_heads).map(of).collect()
    };
    let (q_hat, k_hat) = (
        prepared(q, q_norm, s.n_heads),
        prepared(k, k_norm, s.n_kv_heads),
    );
    let mut y = Vec::new();
    for token in 0..s.batch * s.seq_len {
        let first = token / s.seq_len * s.seq_len;
        for head in 0..s.n_heads {
            let kv = head * s.n_kv_heads / s.n_heads;
            let query = &q_hat[token * s.n_heads + head];
            let score = |key: usize| {
                dot(query, &k_hat[key * s.n_kv_heads + kv]) / (s.head_dim as f64).sqrt()
            };
            let scores: Vec<f64> = (first..=token).map(score).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exps: Vec<f64> = scores.iter().map(|x| (x - top).exp()).collect();
            let total: f64 = exps.iter().sum();
            let mut out = vec![0.0; s.head_dim];
            for (i, e) in exps.iter().enumerate() {
                let start = ((first + i) * s.n_kv_heads + kv) * s.head_dim;
                for (out, v) in out.iter_mut().zip(&v[start..start + s.head_dim]) {
                    *out += e / total * v;
                }
            }
            y.extend(out);
        }
    }
    y
}

/// SwiGLU experts; inputs are x, gate_up, down, weights, and `pairs` are token and expert of each weight, `None` for a
/// pair that is not computed.
pub(crate) fn experts(
    inputs: &[Vec<f64>],
    pairs: &[Option<(usize, usize)>],
    [d, width]: [usize; 2],
) -> Vec<f64> {
    let [x, gate_up, down, weights] = inputs else {
        panic!("four inputs")
    };
    let mut y = vec![0.0; x.len()];
    for (pair, &place) in pairs.iter().enumerate() {
        let Some((t, e)) = place else { continue };
        let products = linear(
            &x[t * d..(t + 1) * d],
            &gate_up[e * 2 * width * d..(e + 1) * 2 * width * d],
            d,
        );
        let (gate, up) = products.split_at(width);
        let act: Vec<f64> = gate
            .iter()
            .zip(up)
            .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
            .collect();
        let out = linear(&act, &down[e * d * width..(e + 1) * d * width], width);
        for (y, out) in y[t * d..(t + 1) * d].iter_mut().zip(out) {
            *y += weights[pair] * out;
        }
    }
    y
}
