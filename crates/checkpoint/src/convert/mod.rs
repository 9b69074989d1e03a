//! Converting checkpoints: a Hugging Face folder to a GGUF file, back, or to the same kind in another number format.
//!
//! A conversion is planned whole before a byte is written: every tensor's name, format and recipe, what had to be
//! changed, and what the target would compute otherwise. Then it is written tensor by tensor in bounded memory, under
//! a hidden name until it is complete, and goes on where it was killed.

mod dense;
mod experts;
mod folder;
pub(crate) mod formats;
pub(crate) mod forms;
mod given;
mod mixture;
mod recipe;
mod reshape;
pub(crate) mod reshape_meta;
mod to_folder;
mod to_gguf;
mod vocab;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Dtype;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result};
use crate::gguf::{GgufPlan, GgufWriter, TensorPlan, WriteOptions};
use crate::importance::Importance;
pub use dense::NewFeedForwards;
pub use experts::{Mixer, NewExpert, NewExperts};
pub use formats::TargetDtype;
pub use mixture::Mixture;
use recipe::{Recipe, Weights};

/// Buffers of writers, and what the system maps around what is read.
const BUFFERS: u64 = 16 << 20;

/// What a conversion makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConvertTo {
    /// A GGUF file, in parts of at most this many bytes.
    Gguf {
        /// `None`: one file.
        max_part_bytes: Option<u64>,
    },
    /// A Hugging Face folder with files of tensors of at most this many bytes.
    Folder {
        /// A tensor that is larger gets a file of its own.
        max_shard_bytes: u64,
    },
}

/// How to convert.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// What to make.
    pub target: ConvertTo,
    /// The format of matrices. Norms, biases and routers of GGUF files stay f32.
    pub dtype: TargetDtype,
    /// Write even what the target's programs compute otherwise than the source; [`Conversion::differences`] lists it.
    pub allow_differences: bool,
    /// How matrices of GGUF files are quantised.
    pub quantize: QuantizeOptions,
}

/// How the matrices of a GGUF file are quantised, beside their formats.
#[derive(Debug, Clone, Default)]
pub struct QuantizeOptions {
    /// Which errors count more.
    pub importance: Option<Arc<Importance>>,
    /// Formats of single tensors, by their names in the output, where `*` stands for anything; the first that fits
    /// counts. Each must fit one.
    pub formats: Vec<(String, Dtype)>,
    /// Formats of the matrices of single experts, by decoder layer and expert. A layer whose experts differ is written
    /// with a tensor for each of them (`blk.3.ffn_up.7.weight`), because a stack has one format: Cadre reads such files,
    /// llama.cpp does not.
    pub experts: BTreeMap<(usize, usize), Dtype>,
    /// Whether matrices that are in a block format already may not be put into another: both lose something.
    pub only_plain: bool,
}

/// A tensor to be written.
#[derive(Debug, Clone)]
struct Planned {
    plan: TensorPlan,
    recipe: Recipe,
}

/// A planned conversion.
#[derive(Debug)]
pub struct Conversion<'a> {
    source: &'a Checkpoint,
    options: ConvertOptions,
    tensors: Vec<Planned>,
    notes: Vec<String>,
    differences: Vec<String>,
    output: Output,
    /// What the bytes depend on beside the source and the headers of the output.
    settings: String,
    /// The architecture of the output where it is another than that of the source.
    layout: Option<String>,
}

/// What is written beside tensors.
#[derive(Debug)]
enum Output {
    Gguf {
        entries: Vec<(String, crate::gguf::Value)>,
    },
    Folder {
        files: Vec<(String, String)>,
    },
}

impl<'a> Conversion<'a> {
    /// Plans to convert `source`. `name` is the model's, for the metadata.
    ///
    /// # Errors
    /// The architecture cannot be written, a tensor has no place in the target, or the target's programs would compute
    /// something else and [`ConvertOptions::allow_differences`] is off.
    pub fn plan(source: &'a Checkpoint, name: &str, options: ConvertOptions) -> Result<Self> {
        source.expect_exactly(&crate::tensor_specs(source.config()))?;
        let mut conversion = match options.target {
            ConvertTo::Gguf { .. } => to_gguf::plan(source, name, &options)?,
            ConvertTo::Folder { .. } => to_folder::plan(source, &options)?,
        };
        conversion.note_ignored();
        if !options.allow_differences && !conversion.differences.is_empty() {
            let who = match options.target {
                ConvertTo::Gguf { .. } => "llama.cpp would compute this model otherwise",
                ConvertTo::Folder { .. } => "transformers would compute this model otherwise",
            };
            return Err(CheckpointError::Unsupported {
                file: source.origin().to_owned(),
                key: "model_type".to_owned(),
                value: source.config().model_type.clone(),
                reason: format!(
                    "{who} ({}); differences can be allowed",
                    conversion.differences.join("; ")
                ),
            });
        }
        Ok(conversion)
    }

    /// Plans to write `source`, a folder or a GGUF file, as the same with `experts` in place of its own. All that is not
    /// about experts is copied as it is stored, and so are experts that are kept. `settings` is what mixtures depend on:
    /// an unfinished output is gone on with only when it is the same.
    ///
    /// # Errors
    /// A model without experts, experts that it does not have or that its router cannot be left with, a kind of output that
    /// is not that of the source, and layouts whose experts cannot be mixed.
    pub fn with_experts(
        source: &'a Checkpoint,
        experts: &NewExperts,
        target: ConvertTo,
        settings: String,
    ) -> Result<Self> {
        source.expect_exactly(&crate::tensor_specs(source.config()))?;
        reshape::plan(source, experts, target, settings)
    }

    /// Plans to write the dense model `source` as a Hugging Face folder with `new` in place of its feed-forwards, in files of
    /// at most `max_shard_bytes`; all else stays. The layout is the first of `mixtral`, `qwen3_moe`, `qwen2_moe` and
    /// `cadre_moe` that says all of the model. `settings` is what the new tensors depend on: an unfinished output is gone on
    /// with only when it is the same.
    ///
    /// # Errors
    /// A model with experts, one that no layout can say together with experts, and block formats.
    pub fn with_feed_forwards(
        source: &'a Checkpoint,
        new: &NewFeedForwards,
        (dtype, max_shard_bytes): (TargetDtype, u64),
        settings: String,
    ) -> Result<Self> {
        source.expect_exactly(&crate::tensor_specs(source.config()))?;
        dense::plan(source, new, (dtype, max_shard_bytes), settings)
    }

    /// What is different from what was asked for, and why: formats that tensors cannot have, tensors left out.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What the target's programs compute otherwise than the source; empty unless allowed.
    #[must_use]
    pub fn differences(&self) -> &[String] {
        &self.differences
    }

    /// Architecture of the output.
    #[must_use]
    pub fn model_type(&self) -> &str {
        match &self.layout {
            Some(layout) => layout,
            None => &self.source.config().model_type,
        }
    }

    /// Bytes of tensor data to be written.
    #[must_use]
    pub fn n_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.n_bytes()).sum()
    }

    /// Bytes of memory that [`Conversion::write`] takes at most, beside the program, what is open of the source, and the plan.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let tensors = self.tensors.iter();
        let most = tensors.map(|tensor| tensor.recipe.memory(self.source, &tensor.plan));
        most.max().unwrap_or(0) + BUFFERS
    }

    /// Bytes that an unfinished output at `target` takes already: they are written on, or given back first.
    #[must_use]
    pub fn unfinished_bytes(&self, target: &Path) -> u64 {
        match self.options.target {
            ConvertTo::Gguf { .. } => crate::gguf::unfinished_bytes(target),
            ConvertTo::Folder { .. } => folder::unfinished_bytes(target),
        }
    }

    /// Number of tensors to be written.
    #[must_use]
    pub fn n_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Number format and number of tensors of it, the most bytes first.
    #[must_use]
    pub fn formats(&self) -> Vec<(Dtype, usize)> {
        let mut list: Vec<(Dtype, usize, u64)> = Vec::new();
        for tensor in &self.tensors {
            let dtype = tensor.plan.dtype;
            match list.iter_mut().find(|(known, ..)| *known == dtype) {
                Some(row) => (row.1, row.2) = (row.1 + 1, row.2 + tensor.n_bytes()),
                None => list.push((dtype, 1, tensor.n_bytes())),
            }
        }
        list.sort_by_key(|row| std::cmp::Reverse(row.2));
        list.into_iter().map(|(dtype, n, _)| (dtype, n)).collect()
    }

    /// Writes to `target`, which must not exist. `progress` gets the bytes of tensor data that are done (those of an
    /// interrupted run at once); when it returns false, writing stops and what is there is kept for the next run.
    ///
    /// # Errors
    /// Something is at the target, values that the format cannot hold, failures of the file system, or
    /// [`CheckpointError::Interrupted`].
    pub fn write(
        &self,
        target: &Path,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Vec<PathBuf>> {
        match &self.output {
            Output::Gguf { entries } => self.write_gguf(target, entries, progress),
            Output::Folder { files } => folder::write(self, target, files, progress),
        }
    }

    fn write_gguf(
        &self,
        target: &Path,
        entries: &[(String, crate::gguf::Value)],
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Vec<PathBuf>> {
        let ConvertTo::Gguf { max_part_bytes } = self.options.target else {
            return Ok(Vec::new());
        };
        let plan = GgufPlan {
            entries: entries.to_vec(),
            tensors: self
                .tensors
                .iter()
                .map(|tensor| tensor.plan.clone())
                .collect(),
            max_part_bytes,
        };
        let options = WriteOptions {
            source: &self.identity(),
            ..WriteOptions::default()
        };
        let mut writer = GgufWriter::create_or_resume(target, plan, &options)?;
        let mut meter = Meter::new(target, progress);
        for (at, tensor) in self.tensors.iter().enumerate() {
            if at < writer.n_done() {
                meter.add(tensor.n_bytes())?;
                continue;
            }
            let name = &tensor.plan.name;
            let mut sink = |bytes: &[u8]| {
                writer.write(name, bytes)?;
                meter.add(bytes.len() as u64)
            };
            tensor
                .recipe
                .make(self.source, &tensor.plan, self.weights(tensor)?, &mut sink)?;
        }
        writer.finish()
    }

    /// How much the errors of the columns of `tensor` count, where that is known.
    fn weights(&self, tensor: &Planned) -> Result<Option<Weights<'_>>> {
        let Some(importance) = &self.options.quantize.importance else {
            return Ok(None);
        };
        let size = matrices(&tensor.plan.shape);
        let of = importance.of(&tensor.plan.name, size)?;
        Ok(of.map(|of| Weights {
            of,
            cols: size[1],
            matrix: tensor.plan.shape.iter().product::<usize>() / size[0].max(1),
        }))
    }

    /// What tensor data depends on beside the headers of the output.
    fn identity(&self) -> String {
        match self.settings.as_str() {
            "" => self.source.digest().to_owned(),
            settings => format!("{} {settings}", self.source.digest()),
        }
    }

    /// Tensors of the source that have no place in the target.
    fn note_ignored(&mut self) {
        let mut reasons: Vec<(&str, usize)> = Vec::new();
        for (_, reason) in self.source.ignored() {
            match reasons.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, n)) => *n += 1,
                None => reasons.push((reason, 1)),
            }
        }
        for (reason, n) in reasons {
            self.notes
                .push(format!("{n} tensors are left out: {reason}"));
        }
    }
}

impl Planned {
    fn n_bytes(&self) -> u64 {
        let n_values = self.plan.shape.iter().product();
        self.plan.dtype.n_bytes(n_values).unwrap_or(0) as u64
    }
}

/// Matrices that are stacked in a tensor of this shape, and the columns of each.
fn matrices(shape: &[usize]) -> [usize; 2] {
    let stacked = &shape[..shape.len().saturating_sub(2)];
    [stacked.iter().product(), shape.last().copied().unwrap_or(1)]
}

/// Counts bytes and asks whether to go on.
struct Meter<'a, 'b> {
    target: &'a Path,
    done: u64,
    progress: &'b mut dyn FnMut(u64) -> bool,
}

impl<'a, 'b> Meter<'a, 'b> {
    fn new(target: &'a Path, progress: &'b mut dyn FnMut(u64) -> bool) -> Self {
        Self {
            target,
            done: 0,
            progress,
        }
    }

    fn add(&mut self, n_bytes: u64) -> Result<()> {
        self.done += n_bytes;
        if (self.progress)(self.done) {
            return Ok(());
        }
        Err(CheckpointError::Interrupted {
            path: self.target.to_owned(),
        })
    }
}

/// Notes how many tensors do not have the format that was asked for.
fn note_formats(notes: &mut Vec<String>, changed: &[(Dtype, &'static str, String)]) {
    let mut groups: Vec<(Dtype, &str, usize, &str)> = Vec::new();
    for (dtype, reason, name) in changed {
        match groups
            .iter_mut()
            .find(|group| (group.0, group.1) == (*dtype, *reason))
        {
            Some(group) => group.2 += 1,
            None => groups.push((*dtype, reason, 1, name)),
        }
    }
    for (dtype, reason, n, name) in groups {
        notes.push(format!(
            "{n} tensors (such as {name}) are written as {dtype}: {reason}"
        ));
    }
}

/// Width of a head whose rows must be permuted between the forms of `from` and `to`.
fn permuted_head(from: &ModelConfig, to: &ModelConfig) -> Option<usize> {
    let differ = from.rope.interleaved != to.rope.interleaved;
    (differ && from.attention.mla.is_none()).then_some(from.head_dim)
}

/// `model.layers.3.mlp.gate.weight` is `mlp.gate.weight` of layer 3.
pub(super) fn in_layer(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}
