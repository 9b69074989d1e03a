//! The whole model in f64, written from its definition and sharing no code with the engine.

use std::collections::HashMap;

use cadre_checkpoint::{Checkpoint, ModelConfig};

/// Weights and configuration of a checkpoint, widened.
pub(crate) struct Reference {
    config: ModelConfig,
    tensors: HashMap<String, Vec<f64>>,
    /// Ranks of the experts that a token gets, from 1; those of the model unless changed.
    pub(crate) ranks: Vec<usize>,
}

impl Reference {
    pub(crate) fn new(checkpoint: &Checkpoint) -> Self {
        let read = |name: &str| {
            let values = checkpoint.tensor(name).unwrap().to_f32();
            (name.to_owned(), values.into_iter().map(f64::from).collect())
        };
        let tensors = checkpoint.tensor_names().map(read).collect();
        Self {
            config: checkpoint.config().clone(),
            tensors,
            ranks: (1..=checkpoint.config().moe.top_k).collect(),
        }
    }

    fn tensor(&self, name: &str) -> &[f64] {
        &self.tensors[&format!("{name}.weight")]
    }

    /// `w x` for the named matrix.
    fn product(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let rows = self.tensor(name).chunks_exact(x.len());
        rows.map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum())
            .collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + self.config.norm_eps).sqrt();
        x.iter()
            .zip(self.tensor(name))
            .map(|(x, w)| x * scale * w)
            .collect()
    }

    /// A projection cut into heads, each normed and rotated for `position`.
    fn heads(&self, name: &str, norm: &str, x: &[f64], position: usize) -> Vec<Vec<f64>> {
        let half = self.config.head_dim / 2;
        let place = |head: &[f64]| {
            let head = self.norm(norm, head);
            let rotated = |i: usize| {
                let pair = i % half;
                let exponent = -2.0 * pair as f64 / self.config.head_dim as f64;
                let angle = position as f64 * self.config.rope.theta.powf(exponent);
                let (sin, cos) = angle.sin_cos();
                if i < half {
                    head[i] * cos - head[i + half] * sin
                } else {
                    head[i] * cos + head[i - half] * sin
                }
            };
            (0..head.len()).map(rotated).collect()
        };
        self.product(name, x)
            .chunks_exact(self.config.head_dim)
            .map(place)
            .collect()
    }

    fn attention(&self, prefix: &str, xs: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let config = &self.config;
        let name = |part: &str| format!("{prefix}.self_attn.{part}");
        let (q_norm, k_norm) = (name("q_norm"), name("k_norm"));
        let placed = |(t, x): (usize, &Vec<f64>)| self.heads(&name("k_proj"), &k_norm, x, t);
        let keys: Vec<Vec<Vec<f64>>> = xs.iter().enumerate().map(placed).collect();
        let values: Vec<Vec<f64>> = xs
            .iter()
            .map(|x| self.product(&name("v_proj"), x))
            .collect();
        let attend = |(t, x): (usize, &Vec<f64>)| {
            let mut mixed = Vec::new();
            for (h, q) in self
                .heads(&name("q_proj"), &q_norm, x, t)
                .iter()
                .enumerate()
            {
                let kv_head = h / (config.n_heads / config.n_kv_heads);
                let score = |key: &Vec<Vec<f64>>| {
                    let dot: f64 = key[kv_head].iter().zip(q).map(|(a, b)| a * b).sum();
                    (dot / (config.head_dim as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = keys[..=t].iter().map(score).collect();
                let total: f64 = scores.iter().sum();
                for c in 0..config.head_dim {
                    let value = |s: usize| values[s][kv_head * config.head_dim + c];
                    mixed.push((0..=t).map(|s| scores[s] / total * value(s)).sum());
                }
            }
            self.product(&name("o_proj"), &mixed)
        };
        xs.iter().enumerate().map(attend).collect()
    }

    fn swiglu(&self, prefix: &str, x: &[f64]) -> Vec<f64> {
        let gate = self.product(&format!("{prefix}.gate_proj"), x);
        let up = self.product(&format!("{prefix}.up_proj"), x);
        let inner: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
            .collect();
        self.product(&format!("{prefix}.down_proj"), &inner)
    }

    fn moe(&self, prefix: &str, x: &[f64]) -> Vec<f64> {
        let logits = self.product(&format!("{prefix}.gate"), x);
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        let mut picks: Vec<usize> = (0..logits.len()).collect();
        picks.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let picks: Vec<usize> = self.ranks.iter().map(|rank| picks[rank - 1]).collect();
        let p = |e: usize| logits[e].exp() / total;
        let norm = match self.config.moe.norm_topk_prob() {
            true => picks.iter().map(|e| p(*e)).sum::<f64>(),
            false => 1.0,
        };
        let mut out = vec![0.0; x.len()];
        for e in picks {
            let y = self.swiglu(&format!("{prefix}.experts.{e}"), x);
            for (out, y) in out.iter_mut().zip(y) {
                *out += p(e) / norm * y;
            }
        }
        out
    }

    /// Logits of every position, `[n_tokens, vocab_size]`.
    pub(crate) fn logits(&self, tokens: &[u32]) -> Vec<f32> {
        let d = self.config.hidden_size;
        let embedding = self.tensor("model.embed_tokens");
        let row = |t: &u32| embedding[*t as usize * d..][..d].to_vec();
        let mut xs: Vec<Vec<f64>> = tokens.iter().map(row).collect();
        for layer in 0..self.config.n_layers {
            let prefix = format!("model.layers.{layer}");
            let name = format!("{prefix}.input_layernorm");
            let normed: Vec<Vec<f64>> = xs.iter().map(|x| self.norm(&name, x)).collect();
            for (x, y) in xs.iter_mut().zip(self.attention(&prefix, &normed)) {
                add(x, &y);
            }
            for x in &mut xs {
                let normed = self.norm(&format!("{prefix}.post_attention_layernorm"), x);
                let mlp = format!("{prefix}.mlp");
                let y = match self.config.is_moe_layer(layer) {
                    true => self.moe(&mlp, &normed),
                    false => self.swiglu(&mlp, &normed),
                };
                add(x, &y);
            }
        }
        let head = match self.config.tie_word_embeddings {
            true => "model.embed_tokens",
            false => "lm_head",
        };
        let row = |x: &Vec<f64>| self.product(head, &self.norm("model.norm", x));
        xs.iter().flat_map(row).map(|v| v as f32).collect()
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
