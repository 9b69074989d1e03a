//! What a trace says about every expert: how often it is picked, with what weight and what output, and which experts'
//! router logits go together. Read block by block; memory does not grow with the trace.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cadre_trace::{Row, TraceMeta, TraceReader};

use crate::cluster::Gram;
use crate::error::{ReshapeError, Result};

/// What is read of a trace.
#[derive(Debug, Clone, Default)]
pub struct UsageOptions {
    /// Only these domains; empty: all.
    pub domains: Vec<String>,
    /// Whether similarities of router logits are wanted, which the trace must hold.
    pub similarity: bool,
}

/// Usage of the experts of a model.
#[derive(Debug, Clone)]
pub struct Usage {
    /// The trace file, for messages.
    pub origin: String,
    /// The model that it was recorded from.
    pub meta: TraceMeta,
    /// The domains that were counted.
    pub domains: Vec<String>,
    /// The layers that have experts, ascending.
    pub layers: Vec<LayerUsage>,
}

/// Usage of the experts of one layer, null ones left out.
#[derive(Debug, Clone)]
pub struct LayerUsage {
    /// Decoder layer.
    pub layer: usize,
    /// Tokens that were seen.
    pub n_tokens: u64,
    /// Picks of each expert.
    pub picks: Vec<u64>,
    /// Sum of the weights with which each expert was picked.
    pub mass: Vec<f64>,
    /// Sum of weight x norm of the output over the picks of each expert, the weights of a token made to sum to 1; absent
    /// where the trace has no norms.
    pub output: Option<Vec<f64>>,
    /// Products of the router logits of every two experts, where similarities were asked for.
    pub(crate) gram: Option<Gram>,
}

impl LayerUsage {
    fn new(layer: usize, n_experts: usize, has_norms: bool, similarity: bool) -> Self {
        Self {
            layer,
            n_tokens: 0,
            picks: vec![0; n_experts],
            mass: vec![0.0; n_experts],
            output: has_norms.then(|| vec![0.0; n_experts]),
            gram: similarity.then(|| Gram::new(n_experts)),
        }
    }

    /// What counts of picks alone say: all picks weigh the same.
    pub(crate) fn counted(layer: usize, picks: Vec<u64>, top_k: usize) -> Self {
        Self {
            layer,
            n_tokens: picks.iter().sum::<u64>() / top_k.max(1) as u64,
            mass: picks.iter().map(|n| *n as f64).collect(),
            picks,
            output: None,
            gram: None,
        }
    }

    /// Experts of the layer, null ones left out.
    #[must_use]
    pub fn n_experts(&self) -> usize {
        self.picks.len()
    }

    /// Each expert's part of the layer's picks; all 0 where there are none.
    #[must_use]
    pub fn shares(&self) -> Vec<f64> {
        let all = self.picks.iter().sum::<u64>().max(1) as f64;
        self.picks.iter().map(|n| *n as f64 / all).collect()
    }

    fn add(&mut self, row: &Row<'_>) {
        self.n_tokens += 1;
        let sum: f64 = row.weights.iter().map(|w| f64::from(*w)).sum();
        for (at, (expert, weight)) in row.experts.iter().zip(row.weights).enumerate() {
            let (expert, weight) = (usize::from(*expert), f64::from(*weight));
            // What is beyond is a null expert, which computes nothing.
            let Some(picks) = self.picks.get_mut(expert) else {
                continue;
            };
            *picks += 1;
            self.mass[expert] += weight;
            if let (Some(output), Some(norms)) = (&mut self.output, row.norms)
                && sum > 0.0
            {
                output[expert] += weight / sum * f64::from(norms[at]);
            }
        }
        if let (Some(gram), Some(logits)) = (&mut self.gram, row.logits) {
            gram.add(&logits[..self.picks.len()]);
        }
    }
}

impl Usage {
    /// Counts a trace.
    ///
    /// # Errors
    /// A trace that cannot be read, that was recorded while routing was changed, that lacks a domain that is asked for or
    /// the logits that similarities need, or that is empty.
    pub fn read(path: &Path, options: &UsageOptions) -> Result<Self> {
        let mut reader = TraceReader::open(path)?;
        let origin = path.display().to_string();
        let lacks = |problem: String, hint: &str| ReshapeError::TraceLacks {
            origin: origin.clone(),
            problem,
            hint: hint.to_owned(),
        };
        let (meta, columns) = (reader.meta().clone(), reader.columns());
        if let Some(lossy) = &meta.lossy {
            let problem = format!("was recorded with changed routing ({lossy})");
            let hint = "record one without lossy options";
            return Err(lacks(problem, hint));
        }
        if options.similarity && !columns.logits {
            let problem = "has no router logits, which similarities are made of".to_owned();
            return Err(lacks(problem, "record it with `cadre trace --logits`"));
        }
        let wanted: BTreeSet<&str> = options.domains.iter().map(String::as_str).collect();
        let mut seen: BTreeMap<String, bool> = BTreeMap::new();
        let mut layers: BTreeMap<usize, LayerUsage> = BTreeMap::new();
        while let Some(block) = reader.next_block()? {
            for row in block.rows() {
                let counts = wanted.is_empty() || wanted.contains(row.domain);
                if !seen.contains_key(row.domain) {
                    seen.insert(row.domain.to_owned(), counts);
                }
                if !counts {
                    continue;
                }
                let layer = usize::from(row.layer);
                let usage = layers.entry(layer).or_insert_with(|| {
                    let n_experts = meta.n_real_in(layer);
                    LayerUsage::new(layer, n_experts, columns.norms, options.similarity)
                });
                usage.add(&row);
            }
        }
        if let Some(missing) = wanted.iter().find(|domain| !seen.contains_key(**domain)) {
            let known: Vec<&str> = seen.keys().map(String::as_str).collect();
            let problem = format!("has no domain `{missing}`; it has {}", known.join(", "));
            return Err(lacks(
                problem,
                "record one of text of that domain, or name another",
            ));
        }
        if layers.is_empty() {
            return Err(lacks(
                "holds no token".to_owned(),
                "record one of more text",
            ));
        }
        let counted = seen.into_iter().filter(|(_, counts)| *counts);
        Ok(Self {
            origin,
            meta,
            domains: counted.map(|(domain, _)| domain).collect(),
            layers: layers.into_values().collect(),
        })
    }

    /// Experts, all layers together, that were picked fewer than `least` times, and how many there are in all.
    #[must_use]
    pub fn thin(&self, least: u64) -> (usize, usize) {
        let picks = || self.layers.iter().flat_map(|layer| &layer.picks);
        (picks().filter(|n| **n < least).count(), picks().count())
    }
}
