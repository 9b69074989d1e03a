//! Importance matrices of llama.cpp as usage: they count, per layer and expert, the tokens that were sent there.
//!
//! Only the GGUF form has counts per expert: tensor `WEIGHT.counts`, one f32 for each matrix of the weight. Nothing in the
//! file says which model it was made with, so the sizes are all that can be checked.

use std::path::Path;

use cadre_checkpoint::gguf::Gguf;
use cadre_routing::plan::ModelShape;
use cadre_trace::TraceMeta;

use crate::error::{ReshapeError, Result};
use crate::usage::{LayerUsage, Usage};

/// Weights of stacked experts, any of which has the counts.
const STACKS: &[&str] = &[
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
    "ffn_gate_up_exps",
];

impl Usage {
    /// The counts of an importance matrix as usage of the model of this `shape`. It tells how often experts were picked,
    /// and nothing of weights, outputs or similarities.
    ///
    /// # Errors
    /// A file that cannot be read, is no importance matrix in GGUF, or has no counts for a layer or of other sizes.
    pub fn from_imatrix(path: &Path, shape: &ModelShape) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let lacks = |problem: String| ReshapeError::TraceLacks {
            origin: path.display().to_string(),
            problem,
            hint: "make one of this model with llama-imatrix, as GGUF".to_owned(),
        };
        let kind = gguf.text_opt("general.type")?.unwrap_or("a model");
        if kind != "imatrix" {
            return Err(lacks(format!("is no importance matrix but {kind}")));
        }
        let mut layers = Vec::with_capacity(shape.layers.len());
        for (layer, n) in &shape.layers {
            let mut counts = STACKS
                .iter()
                .filter_map(|stack| gguf.tensor(&format!("blk.{layer}.{stack}.weight.counts")));
            let Some(tensor) = counts.next() else {
                return Err(lacks(format!(
                    "has no counts for the experts of layer {layer}"
                )));
            };
            let values = tensor.dtype.decode(&tensor.bytes);
            if values.len() != *n || values.iter().any(|v| !(v.is_finite() && *v >= 0.0)) {
                return Err(lacks(format!(
                    "has {} counts for layer {layer}, expected {n} numbers from 0",
                    values.len()
                )));
            }
            let picks: Vec<u64> = values.iter().map(|v| v.round() as u64).collect();
            layers.push(LayerUsage::counted(*layer, picks, shape.top_k));
        }
        let n_experts = shape.layers.iter().map(|(_, n)| *n).max().unwrap_or(0);
        Ok(Self {
            origin: path.display().to_string(),
            meta: TraceMeta {
                digest: shape.digest.clone(),
                architecture: shape.architecture.clone(),
                n_layers: shape.layers.last().map_or(0, |(layer, _)| layer + 1),
                n_experts: n_experts + shape.n_null,
                layer_experts: Vec::new(),
                n_null: shape.n_null,
                top_k: shape.top_k,
                attention: None,
                lossy: None,
            },
            domains: vec!["imatrix".to_owned()],
            layers,
        })
    }
}

#[cfg(test)]
mod tests {
    use cadre_checkpoint::Dtype;
    use cadre_checkpoint::gguf::{GgufPlan, GgufWriter, TensorPlan, WriteOptions};
    use cadre_routing::plan::Groups;

    use super::*;

    fn write(path: &Path, kind: &str, layers: &[(usize, &[f32])]) {
        let tensor = |(layer, counts): &(usize, &[f32])| TensorPlan {
            name: format!("blk.{layer}.ffn_up_exps.weight.counts"),
            dtype: Dtype::F32,
            shape: vec![counts.len(), 1],
        };
        let plan = GgufPlan {
            entries: vec![("general.type".to_owned(), kind.into())],
            tensors: layers.iter().map(tensor).collect(),
            max_part_bytes: None,
        };
        let mut writer =
            GgufWriter::create_or_resume(path, plan.clone(), &WriteOptions::default()).unwrap();
        for (tensor, (_, counts)) in plan.tensors.iter().zip(layers) {
            let bytes: Vec<u8> = counts.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.write(&tensor.name, &bytes).unwrap();
        }
        writer.finish().unwrap();
    }

    #[test]
    fn counts_are_read_and_must_fit() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let shape = ModelShape {
            digest: "d".to_owned(),
            architecture: "qwen3_moe".to_owned(),
            layers: vec![(0, 4), (2, 4)],
            top_k: 2,
            n_null: 0,
            groups: Groups::NONE,
            same_picks: false,
        };
        let (a, b): (&[f32], &[f32]) = (&[5.0, 0.0, 3.0, 2.0], &[1.0, 1.0, 7.0, 1.0]);
        write(&path("i.gguf"), "imatrix", &[(0, a), (2, b)]);
        let usage = Usage::from_imatrix(&path("i.gguf"), &shape).unwrap();
        assert_eq!(usage.layers[0].picks, [5, 0, 3, 2]);
        assert_eq!((usage.layers[1].layer, usage.layers[1].n_tokens), (2, 5));
        let refused = |name: &str, words: &str| {
            let error = Usage::from_imatrix(&path(name), &shape).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        };
        write(&path("model.gguf"), "model", &[(0, a), (2, b)]);
        refused("model.gguf", "no importance matrix");
        write(&path("one.gguf"), "imatrix", &[(0, a)]);
        refused("one.gguf", "no counts for the experts of layer 2");
        write(&path("short.gguf"), "imatrix", &[(0, &a[..3]), (2, b)]);
        refused("short.gguf", "has 3 counts for layer 0, expected 4");
        refused("none.gguf", "none.gguf");
    }
}
