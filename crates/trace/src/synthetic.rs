//! Test traces: small, deterministic, with domains that visibly prefer their own experts.

use crate::meta::TraceMeta;
use crate::row::Row;
use crate::schema::Columns;
use crate::stats::{Stats, StatsBuilder, StatsOptions};

/// A row that owns its slices.
#[derive(Debug, Clone)]
pub(crate) struct OwnedRow {
    seq: u32,
    pos: u32,
    domain: &'static str,
    layer: u16,
    experts: Vec<u16>,
    weights: Vec<f32>,
    logits: Option<Vec<f32>>,
    norms: Option<Vec<f32>>,
}

impl OwnedRow {
    pub(crate) fn view(&self) -> Row<'_> {
        Row {
            seq: self.seq,
            pos: self.pos,
            token: 100 + self.pos,
            domain: self.domain,
            layer: self.layer,
            experts: &self.experts,
            weights: &self.weights,
            logits: self.logits.as_deref(),
            norms: self.norms.as_deref(),
        }
    }
}

/// What [`rows`] makes.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) meta: TraceMeta,
    pub(crate) domains: &'static [&'static str],
    pub(crate) tokens_per_domain: u32,
    pub(crate) columns: Columns,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            meta: meta(),
            domains: &["prose", "code"],
            tokens_per_domain: 40,
            columns: Columns::default(),
        }
    }
}

/// Two layers of four experts, top-2.
pub(crate) fn meta() -> TraceMeta {
    TraceMeta {
        digest: "sha256:feed".into(),
        architecture: "qwen3_moe".into(),
        n_layers: 2,
        n_experts: 4,
        top_k: 2,
        layer_experts: Vec::new(),
        n_null: 0,
        attention: None,
        lossy: None,
    }
}

/// One sequence per domain. Expert `e` of layer `l` is favoured by domain `(e + l) mod n_domains`; the preference
/// grows with the layer.
pub(crate) fn rows(recipe: &Recipe) -> Vec<OwnedRow> {
    let mut state = 7_u64;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 24) as f32
    };
    let (n_experts, top_k, n_layers) = (
        recipe.meta.n_experts,
        recipe.meta.top_k,
        recipe.meta.n_layers,
    );
    let mut rows = Vec::new();
    for (seq, domain) in recipe.domains.iter().enumerate() {
        for layer in 0..n_layers {
            for pos in 0..recipe.tokens_per_domain {
                let strength = 1.0 + 2.0 * layer as f32 / n_layers as f32;
                let logits: Vec<f32> = (0..n_experts)
                    .map(|e| {
                        let own = (e + layer) % recipe.domains.len() == seq;
                        let popularity = if e + 1 == n_experts {
                            -9.0
                        } else {
                            0.6 * ((e * 7 + layer) % 5) as f32 / 4.0
                        };
                        f32::from(u8::from(own)) * strength + popularity + 2.5 * uniform()
                    })
                    .collect();
                let mut order: Vec<u16> = (0..n_experts as u16).collect();
                order.sort_by(|&a, &b| logits[usize::from(b)].total_cmp(&logits[usize::from(a)]));
                order.truncate(top_k);
                let exps: Vec<f32> = order
                    .iter()
                    .map(|&e| logits[usize::from(e)].exp())
                    .collect();
                let sum: f32 = exps.iter().sum();
                rows.push(OwnedRow {
                    seq: seq as u32,
                    pos,
                    domain,
                    layer: layer as u16,
                    weights: exps.iter().map(|e| e / sum).collect(),
                    norms: recipe
                        .columns
                        .norms
                        .then(|| order.iter().map(|&e| f32::from(e) + 0.5).collect()),
                    logits: recipe.columns.logits.then_some(logits),
                    experts: order,
                });
            }
        }
    }
    rows
}

/// The statistics of [`rows`].
pub(crate) fn stats(recipe: &Recipe, options: &StatsOptions) -> Stats {
    let mut builder = StatsBuilder::new(&recipe.meta, options).expect("the recipe's meta is sound");
    for row in rows(recipe) {
        builder
            .push_row(&row.view())
            .expect("synthetic rows are sound");
    }
    builder.finish().expect("there are rows")
}
