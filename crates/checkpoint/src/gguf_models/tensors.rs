//! The tensors of a GGUF file under canonical names: slices of the map, whatever the file stacks or fuses.

use bytes::Bytes;

use super::rope;
use super::{GgufArchitecture, names};
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result};
use crate::gguf::{Gguf, GgufTensor};
use crate::tensors::{Data, Entry, Tensors};

/// The projections of an expert, as GGUF and as canonical names call them.
pub(crate) const PROJECTIONS: &[(&str, &str)] = &[
    ("ffn_gate", "gate_proj"),
    ("ffn_up", "up_proj"),
    ("ffn_down", "down_proj"),
];

/// Files every tensor of `gguf` under its canonical name.
///
/// # Errors
/// A tensor that the architecture does not know, or whose shape does not split as its name says.
pub(crate) fn canonical_tensors(
    architecture: &GgufArchitecture,
    config: &ModelConfig,
    gguf: &Gguf,
) -> Result<Tensors> {
    let mut filing = Filing {
        architecture,
        config,
        gguf,
        tensors: Tensors::default(),
    };
    for tensor in gguf.tensors() {
        filing.file(tensor)?;
    }
    Ok(filing.tensors)
}

struct Filing<'a> {
    architecture: &'a GgufArchitecture,
    config: &'a ModelConfig,
    gguf: &'a Gguf,
    tensors: Tensors,
}

impl Filing<'_> {
    fn file(&mut self, tensor: &GgufTensor) -> Result<()> {
        if let Some(reason) = self.ignored(&tensor.name) {
            self.tensors.ignored.push((tensor.name.clone(), reason));
            return Ok(());
        }
        if let Some(name) = names::outside(&tensor.name) {
            return self.whole(name.to_owned(), tensor);
        }
        let Some((layer, name)) = in_block(&tensor.name) else {
            return Err(self.unknown(tensor));
        };
        if let Some((stem, ending)) = name.rsplit_once('.')
            && matches!(ending, "weight" | "bias")
        {
            if stem == "attn_qkv" {
                return self.fused_attention(layer, ending, tensor);
            }
            if let Some(parts) = stacked(stem) {
                return self.experts(layer, &parts, ending, tensor);
            }
        }
        if let Some(name) = lone_expert(layer, name) {
            return self.whole(name, tensor);
        }
        match self.architecture.norms.canonical(layer, name) {
            Some(name) => self.whole(name, tensor),
            None => Err(self.unknown(tensor)),
        }
    }

    /// Why a tensor plays no part, if it does not.
    fn ignored(&self, name: &str) -> Option<&'static str> {
        if rope::TENSORS.contains(&name) {
            return Some("part of the rotary positions in the configuration");
        }
        if name.starts_with("nextn.") {
            return Some("multi-token prediction");
        }
        let (layer, rest) = in_block(name)?;
        if layer >= self.config.n_layers {
            return Some("multi-token prediction");
        }
        let split = self.config.attention.mla.is_some_and(|mla| mla.split_kv_b);
        match rest {
            "attn_kv_b.weight" if split => Some("stored twice: attn_k_b and attn_v_b are used"),
            "attn_rot_embd.weight" | "rope_freqs.weight" => Some("derived from the configuration"),
            _ => None,
        }
    }

    fn insert(
        &mut self,
        name: String,
        tensor: &GgufTensor,
        shape: Vec<usize>,
        bytes: Bytes,
    ) -> Result<()> {
        let entry = Entry {
            stored: tensor.name.clone(),
            dtype: tensor.dtype,
            shape,
            data: Data::Plain(bytes),
            scales: None,
        };
        self.tensors.insert(self.gguf.origin(), name, entry)
    }

    fn whole(&mut self, name: String, tensor: &GgufTensor) -> Result<()> {
        let mut shape = tensor.shape.clone();
        // A matrix of one row is stored as a vector.
        if name.ends_with(".shared_expert_gate.weight") && shape.len() == 1 {
            shape.insert(0, 1);
        }
        self.insert(name, tensor, shape, tensor.bytes.clone())
    }

    /// Rows of queries, keys and values, one after the other.
    fn fused_attention(&mut self, layer: usize, ending: &str, tensor: &GgufTensor) -> Result<()> {
        let config = self.config;
        let q = config.n_heads * config.head_dim;
        let kv = config.n_kv_heads * config.head_dim;
        let row = self.rows(tensor, q + 2 * kv)?;
        let mut from = 0;
        for (part, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            let name = format!("model.layers.{layer}.self_attn.{part}.{ending}");
            let bytes = tensor.bytes.slice(from * row..(from + rows) * row);
            let shape = [&[rows], &tensor.shape[1..]].concat();
            self.insert(name, tensor, shape, bytes)?;
            from += rows;
        }
        Ok(())
    }

    /// `[E, rows, cols]` or `[E, rows]`: experts one after the other, fused parts after each other within.
    fn experts(
        &mut self,
        layer: usize,
        parts: &[&str],
        ending: &str,
        tensor: &GgufTensor,
    ) -> Result<()> {
        let dims = if ending == "weight" { 3 } else { 2 };
        let n_experts = self.config.n_stored_in(layer);
        let shape = &tensor.shape;
        let is_whole = shape.len() == dims && shape[0] == n_experts;
        if !is_whole || !shape[1].is_multiple_of(parts.len()) {
            return Err(CheckpointError::Index {
                file: self.gguf.origin().to_owned(),
                problem: format!(
                    "tensor `{}` has shape {shape:?}, expected {dims} dimensions with {n_experts} experts in the first \
                     and {} parts in the second",
                    tensor.name,
                    parts.len()
                ),
            });
        }
        let piece = [&[shape[1] / parts.len()], &shape[2..]].concat();
        let size = self.rows(tensor, n_experts * parts.len())?;
        for expert in 0..n_experts {
            for (at, part) in parts.iter().enumerate() {
                let from = (expert * parts.len() + at) * size;
                let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}.{ending}");
                let bytes = tensor.bytes.slice(from..from + size);
                self.insert(name, tensor, piece.clone(), bytes)?;
            }
        }
        Ok(())
    }

    /// Bytes of one of `n` equal pieces of a tensor.
    fn rows(&self, tensor: &GgufTensor, n: usize) -> Result<usize> {
        let values: usize = tensor.shape.iter().product();
        let whole = n > 0 && values.is_multiple_of(n);
        let size = whole.then(|| tensor.dtype.n_bytes(values / n)).flatten();
        size.ok_or_else(|| CheckpointError::Index {
            file: self.gguf.origin().to_owned(),
            problem: format!(
                "tensor `{}` of {:?} does not split into {n} pieces of whole {} blocks",
                tensor.name, tensor.shape, tensor.dtype
            ),
        })
    }

    fn unknown(&self, tensor: &GgufTensor) -> CheckpointError {
        CheckpointError::UnexpectedTensor {
            origin: self.gguf.origin().to_owned(),
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            n_unexpected: 1,
        }
    }
}

/// `blk.3.attn_q.weight` is `attn_q.weight` of layer 3.
fn in_block(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// The projections that a stacked tensor holds.
pub(crate) fn stacked(stem: &str) -> Option<Vec<&'static str>> {
    if stem == "ffn_gate_up_exps" {
        return Some(vec!["gate_proj", "up_proj"]);
    }
    let stem = stem.strip_suffix("_exps")?;
    let (_, part) = PROJECTIONS.iter().find(|(gguf, _)| *gguf == stem)?;
    Some(vec![part])
}

/// The canonical name of one expert in a tensor of its own, as very old files have it: `ffn_gate.5.weight`.
pub(crate) fn lone_expert(layer: usize, name: &str) -> Option<String> {
    let (stem, rest) = name.split_once('.')?;
    let (expert, ending) = rest.split_once('.')?;
    let expert: usize = expert.parse().ok()?;
    let (_, part) = PROJECTIONS.iter().find(|(gguf, _)| *gguf == stem)?;
    (ending == "weight").then(|| format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight"))
}
