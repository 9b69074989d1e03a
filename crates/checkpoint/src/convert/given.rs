//! What is asked for beside the formats of a mixture: formats of single tensors, an importance matrix, and that blocks are
//! not made of blocks.

use super::formats::{Choice, TargetDtype, fitting, stays_f32};
use super::mixture::Mixture;
use super::{QuantizeOptions, in_layer, matrices};
use crate::Dtype;
use crate::checkpoint::Checkpoint;
use crate::error::{CheckpointError, Result};
use crate::gguf::{TensorPlan, Value};
use crate::importance::Importance;

/// The part of experts whose inputs were not seen above which a warning is due.
const MANY_UNSEEN: f64 = 0.05;

/// The options, and what has been found of them.
pub(super) struct Given<'a> {
    source: &'a Checkpoint,
    options: &'a QuantizeOptions,
    /// Whether each of the formats of single tensors has fitted one.
    used: Vec<bool>,
    /// Tensors that are quantised by importance, and those that could be and have none.
    n_weighted: usize,
    unweighted: Vec<String>,
}

impl<'a> Given<'a> {
    pub(super) fn new(source: &'a Checkpoint, options: &'a QuantizeOptions) -> Self {
        Self {
            source,
            options,
            used: vec![false; options.formats.len()],
            n_weighted: 0,
            unweighted: Vec::new(),
        }
    }

    pub(super) fn has_importance(&self) -> bool {
        self.options.importance.is_some()
    }

    /// Whether the experts of a layer do not all have one format.
    pub(super) fn differ(&self, layer: usize, n_experts: usize) -> bool {
        let format = |expert| self.options.experts.get(&(layer, expert));
        (1..n_experts).any(|expert| format(expert) != format(0))
    }

    /// The format that is given for the tensor `gguf`, which is `name` of shape `one` here, or the first of a stack.
    pub(super) fn format(
        &mut self,
        gguf: &str,
        (name, one): (&str, &[usize]),
    ) -> Result<Option<Choice>> {
        let formats = &self.options.formats;
        let found = formats.iter().position(|(glob, _)| fits(glob, gguf));
        let Some(at) = found else {
            let of_expert = expert_of(name).filter(|_| one.len() > 1);
            let dtype = of_expert.and_then(|place| self.options.experts.get(&place));
            let cols = one.last().copied().unwrap_or(1);
            return Ok(dtype.map(|dtype| fitting(*dtype, cols)));
        };
        self.used[at] = true;
        let dtype = formats[at].1;
        let is_router = stays_f32(name, one) && one.len() > 1;
        let expected = match (one.len() > 1, is_router) {
            (false, _) if dtype != Dtype::F32 => "F32: it is no matrix",
            (true, true) if dtype.is_quantized() && dtype != Dtype::Q8_0 => {
                "at least 8 bits (Q8_0, F16, BF16, F32): it decides which experts are picked"
            }
            _ if !dtype.can_encode() || dtype.gguf_id().is_none() => "a format that is written",
            _ => return Ok(Some(fitting(dtype, one.last().copied().unwrap_or(1)))),
        };
        Err(self.refuse(gguf, dtype.name(), format!("expected {expected}")))
    }

    /// Whether `plan` may be made of what is `stored`, and whether its importance is known.
    pub(super) fn check(&mut self, plan: &TensorPlan, stored: Dtype) -> Result<()> {
        let changes = plan.dtype.is_quantized() && plan.dtype != stored;
        if changes && stored.is_quantized() && self.options.only_plain {
            return Err(self.refuse(
                &plan.name,
                stored.name(),
                format!(
                    "it is quantised already, and would lose more as {}; quantise the model in F16, BF16 or F32",
                    plan.dtype
                ),
            ));
        }
        let Some(importance) = &self.options.importance else {
            return Ok(());
        };
        let known = importance.of(&plan.name, matrices(&plan.shape))?.is_some();
        let searches = !matches!(plan.dtype, Dtype::Q8_0 | Dtype::Mxfp4);
        if known {
            self.n_weighted += 1;
        } else if changes && searches && !is_embedding(&plan.name) {
            self.unweighted.push(plan.name.clone());
        }
        Ok(())
    }

    /// Refuses what came to nothing, and notes what is known of few tensors.
    pub(super) fn finish(self, wanted: TargetDtype, notes: &mut Vec<String>) -> Result<()> {
        if let Some(at) = self.used.iter().position(|used| !used) {
            let (glob, dtype) = &self.options.formats[at];
            return Err(self.refuse(glob, dtype.name(), "no tensor has this name".to_owned()));
        }
        let Some(importance) = &self.options.importance else {
            return match wanted {
                TargetDtype::Mix(Mixture::Q2KS) => Err(self.refuse(
                    "the type",
                    "Q2_K_S",
                    "it needs an importance matrix, without which it is of no use; Q2_K does not"
                        .to_owned(),
                )),
                _ => Ok(()),
            };
        };
        if self.n_weighted == 0 {
            return Err(self.refuse(
                "the importance matrix",
                importance.file(),
                "it has numbers for none of the tensors; was it made with another model?"
                    .to_owned(),
            ));
        }
        if let Some(first) = self.unweighted.first() {
            notes.push(format!(
                "{} tensors (such as {first}) are quantised without importance: the matrix has no numbers for them",
                self.unweighted.len()
            ));
        }
        let (unseen, all) = importance.unseen();
        if unseen as f64 > MANY_UNSEEN * all as f64 {
            notes.push(format!(
                "{unseen} of {all} matrices of experts got no token in the importance matrix: all their columns count \
                 alike; more text makes a better one"
            ));
        }
        Ok(())
    }

    fn refuse(&self, key: &str, value: &str, reason: String) -> CheckpointError {
        CheckpointError::Unsupported {
            file: self.source.origin().to_owned(),
            key: key.to_owned(),
            value: value.to_owned(),
            reason,
        }
    }
}

/// The layer and the expert that a canonical tensor belongs to, if it is a part of one.
fn expert_of(name: &str) -> Option<(usize, usize)> {
    let (layer, rest) = in_layer(name)?;
    let (expert, _) = rest.strip_prefix("mlp.experts.")?.split_once('.')?;
    Some((layer, expert.parse().ok()?))
}

/// Tensors whose inputs llama-imatrix does not record.
fn is_embedding(gguf: &str) -> bool {
    matches!(gguf, "token_embd.weight" | "output.weight")
}

/// Metadata of a file that was made with an importance matrix, as llama-quantize writes it.
pub(super) fn entries(importance: &Importance) -> Vec<(String, Value)> {
    let path = std::path::Path::new(importance.file());
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let mut list = vec![("file", Value::from(&*file))];
    if let Some(dataset) = importance.datasets().first() {
        list.push(("dataset", dataset.as_str().into()));
    }
    list.push(("entries_count", (importance.n_entries() as u32).into()));
    if importance.n_chunks() > 0 {
        list.push(("chunks_count", importance.n_chunks().into()));
    }
    let key = |(key, value): (&str, Value)| (format!("quantize.imatrix.{key}"), value);
    list.into_iter().map(key).collect()
}

/// Whether `name` is `glob`, in which `*` stands for anything.
fn fits(glob: &str, name: &str) -> bool {
    let Some((first, rest)) = glob.split_once('*') else {
        return glob == name;
    };
    let Some(mut name) = name.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match name.find(part) {
            Some(at) => name = &name[at + part.len()..],
            None => return false,
        }
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_anything() {
        let name = "blk.3.ffn_down_exps.weight";
        for glob in [
            name,
            "*",
            "blk.*",
            "*.weight",
            "blk.*.ffn_down*",
            "*exps*",
            "blk.3.ffn_down_exps*.weight",
        ] {
            assert!(fits(glob, name), "{glob}");
        }
        for glob in [
            "",
            "blk.3",
            "*.bias",
            "blk.*.ffn_up*",
            "lk.*",
            "*exps",
            "*weight*weight",
        ] {
            assert!(!fits(glob, name), "{glob}");
        }
    }
}
