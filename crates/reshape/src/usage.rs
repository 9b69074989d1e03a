//! What a trace says about every expert: how often it is picked, with what weight and what output, and which experts'
//! router logits go together. Read block by block; memory does not grow with the trace.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cadre_routing::plan::ModelShape;
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

/// Which experts a recording has hardly seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// Picks that are enough.
    pub least: u64,
    /// Experts of all layers.
    pub n_experts: usize,
    /// Decoder layers and those of their experts that were picked less often; no others.
    pub thin: Vec<(usize, Vec<usize>)>,
}

impl Coverage {
    /// Layers, and experts of a layer, that are named; the others are counted.
    const NAMED: usize = 8;

    /// A warning that names layers and experts; nothing when all have been seen.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let n: usize = self.thin.iter().map(|(_, ids)| ids.len()).sum();
        if n == 0 {
            return None;
        }
        let named = self.thin.iter().take(Self::NAMED).map(|(layer, ids)| {
            let first: Vec<String> = ids.iter().take(Self::NAMED).map(usize::to_string).collect();
            let more = ids.len().saturating_sub(Self::NAMED);
            let more = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            format!("layer {layer}: {}{more}", first.join(", "))
        });
        let mut named = named.collect::<Vec<_>>().join("; ");
        let more = self.thin.len().saturating_sub(Self::NAMED);
        if more > 0 {
            named += &format!("; and in {more} more layers");
        }
        Some(format!(
            "{n} of {} experts were picked fewer than {} times in the recording ({named}); more text makes a better choice",
            self.n_experts, self.least
        ))
    }
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

    /// Whether it is that of the model of this `shape`.
    ///
    /// # Errors
    /// It was recorded from another model, or its layers are not those of the model.
    pub fn check(&self, shape: &ModelShape) -> Result<()> {
        let lacks = |problem: String| {
            ReshapeError::TraceLacks {
            origin: self.origin.clone(),
            problem,
            hint: "record one of this model with `cadre trace`; if both are the same model in other formats, pass the one that was \
                   recorded as --same-model"
                .to_owned(),
        }
        };
        if self.meta.digest != shape.digest {
            let short = |digest: &str| digest.get(..12).unwrap_or(digest).to_owned();
            return Err(lacks(format!(
                "was recorded from another model: {} {} there, {} {} here",
                self.meta.architecture,
                short(&self.meta.digest),
                shape.architecture,
                short(&shape.digest)
            )));
        }
        let seen = self.layers.iter().map(|one| (one.layer, one.n_experts()));
        let seen: Vec<(usize, usize)> = seen.collect();
        if seen == shape.layers {
            return Ok(());
        }
        Err(lacks(format!(
            "has rows of {} layers with experts, expected {}",
            seen.len(),
            shape.layers.len()
        )))
    }

    /// What a choice among the experts can rest on: which of them were picked fewer than `least` times.
    #[must_use]
    pub fn coverage(&self, least: u64) -> Coverage {
        let layers = self.layers.iter().map(|layer| {
            let picks = layer.picks.iter().enumerate();
            let few = picks.filter(|(_, n)| **n < least).map(|(id, _)| id);
            (layer.layer, few.collect::<Vec<usize>>())
        });
        Coverage {
            least,
            n_experts: self.layers.iter().map(LayerUsage::n_experts).sum(),
            thin: layers.filter(|(_, ids)| !ids.is_empty()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warning_names_what_was_hardly_seen() {
        let coverage = |thin: Vec<(usize, Vec<usize>)>| Coverage {
            least: 32,
            n_experts: 64,
            thin,
        };
        assert_eq!(coverage(Vec::new()).warning(), None);
        let text = coverage(vec![(3, vec![0, 7]), (5, (0..10).collect())]).warning();
        let text = text.unwrap();
        assert!(
            text.starts_with("12 of 64 experts were picked fewer than 32 times"),
            "{text}"
        );
        assert!(
            text.contains("layer 3: 0, 7; layer 5: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"),
            "{text}"
        );
        let many = coverage((0..20).map(|layer| (layer, vec![1])).collect()).warning();
        assert!(many.unwrap().contains("and in 12 more layers"));
    }
}
