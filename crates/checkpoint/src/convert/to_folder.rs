//! Planning a Hugging Face folder: the tensor names and layouts that transformers knows, and the small files.

use super::dense::{self, NewFeedForwards};
use super::formats::{self, TargetDtype};
use super::forms::{differences, folder_form};
use super::recipe::{Order, Recipe, Rows};
use super::to_gguf::is_rotated;
use super::{
    Conversion, ConvertOptions, Output, Planned, in_layer, note_formats, permuted_head, vocab,
};
use crate::Dtype;
use crate::checkpoint::Checkpoint;
use crate::config::{ModelConfig, NormKind};
use crate::error::Result;
use crate::gguf::TensorPlan;
use crate::specs::tensor_specs;

/// Plans to write `source` as a folder.
pub(super) fn plan<'a>(source: &'a Checkpoint, options: &ConvertOptions) -> Result<Conversion<'a>> {
    plan_form(source, folder_form(source.config()), None, options)
}

/// Plans to write `source` as the folder of `form`, with `new` in place of its feed-forwards where there is something new.
pub(super) fn plan_form<'a>(
    source: &'a Checkpoint,
    form: ModelConfig,
    new: Option<&NewFeedForwards>,
    options: &ConvertOptions,
) -> Result<Conversion<'a>> {
    formats::check_folder(source.origin(), options)?;
    let mut planner = Planner {
        source,
        form: &form,
        new,
        dtype: options.dtype,
        tensors: Vec::new(),
        changed: Vec::new(),
    };
    planner.all();
    let Planner {
        tensors, changed, ..
    } = planner;
    let mut notes = Vec::new();
    note_formats(&mut notes, &changed);
    let dtype = tensors.iter().max_by_key(|tensor| tensor.n_bytes());
    let dtype = dtype.map_or(Dtype::F32, |tensor| tensor.plan.dtype);
    let config = form.to_config_json(dtype)?;
    let generation = form.to_generation_json();
    let theirs = ModelConfig::parse(source.origin(), &config, Some(&generation))?;
    let differences = differences(&form, &theirs);
    let mut files = vocab::files(source, &form, &mut notes)?;
    files.push(("generation_config.json".to_owned(), generation));
    // Last, because its presence is what makes a folder a checkpoint.
    files.push(("config.json".to_owned(), config));
    Ok(Conversion {
        source,
        options: options.clone(),
        tensors,
        notes,
        differences,
        output: Output::Folder { files },
        settings: String::new(),
        layout: None,
    })
}

struct Planner<'a> {
    source: &'a Checkpoint,
    form: &'a ModelConfig,
    new: Option<&'a NewFeedForwards>,
    dtype: TargetDtype,
    tensors: Vec<Planned>,
    changed: Vec<(Dtype, &'static str, String)>,
}

impl Planner<'_> {
    fn all(&mut self) {
        for (name, shape) in tensor_specs(self.form) {
            let new = self
                .new
                .and_then(|new| dense::recipe(self.source, new, &name));
            if let Some((recipe, stored)) = new {
                self.add_as(
                    published(&self.form.model_type, &name),
                    shape,
                    recipe,
                    stored,
                );
                continue;
            }
            match in_layer(&name).and_then(|(layer, rest)| {
                Some((layer, rest.strip_prefix("mlp.experts.")?.to_owned()))
            }) {
                Some((layer, expert)) if self.fuses() => self.fused(layer, &expert, &shape),
                _ => {
                    let recipe = self.recipe(&name);
                    self.add(published(&self.form.model_type, &name), shape, recipe);
                }
            }
        }
    }

    /// Whether experts of a layer are stored in one tensor.
    fn fuses(&self) -> bool {
        matches!(self.form.model_type.as_str(), "granitemoe" | "gpt_oss")
    }

    /// The fused tensors of a layer, at the first expert's down projection, when all shapes are known.
    fn fused(&mut self, layer: usize, expert: &str, shape: &[usize]) {
        let Some(part) = expert.strip_prefix("0.down_proj.") else {
            return;
        };
        let (is_bias, n) = (part == "bias", self.form.n_experts_in(layer));
        let (hidden, width) = (self.form.hidden_size, self.form.moe.intermediate_size);
        let name = |expert: usize, projection: &str| {
            format!("model.layers.{layer}.mlp.experts.{expert}.{projection}.{part}")
        };
        let both = |expert| vec![name(expert, "gate_proj"), name(expert, "up_proj")];
        let down = |expert| vec![name(expert, "down_proj")];
        if self.form.model_type == "granitemoe" {
            let rows = |names: Vec<String>| {
                let rows = names.into_iter().map(|name| Rows {
                    name,
                    order: Order::All,
                });
                Recipe::Rows(rows.collect())
            };
            let prefix = format!("model.layers.{layer}.block_sparse_moe");
            self.add(
                format!("{prefix}.input_linear.weight"),
                vec![n, 2 * width, hidden],
                rows((0..n).flat_map(both).collect()),
            );
            let shape = [&[n], shape].concat();
            self.add(
                format!("{prefix}.output_linear.weight"),
                shape,
                rows((0..n).flat_map(down).collect()),
            );
            return;
        }
        let prefix = format!("model.layers.{layer}.mlp.experts");
        let shapes = match is_bias {
            true => (vec![n, 2 * width], vec![n, hidden]),
            false => (vec![n, hidden, 2 * width], vec![n, width, hidden]),
        };
        let ending = if is_bias { "_bias" } else { "" };
        for (projection, shape, groups) in [
            ("gate_up_proj", shapes.0, (0..n).map(both).collect()),
            ("down_proj", shapes.1, (0..n).map(down).collect()),
        ] {
            let name = format!("{prefix}.{projection}{ending}");
            self.add(name, shape, Recipe::TransposedInTurns(groups));
        }
    }

    /// How a canonical tensor of the folder's form is made of those of the source.
    fn recipe(&self, name: &str) -> Recipe {
        let config = self.source.config();
        if name.ends_with("norm.weight")
            && (config.norm, self.form.norm) == (NormKind::Rms, NormKind::RmsPlusOne)
        {
            return Recipe::Shifted {
                name: name.to_owned(),
                by: -1.0,
            };
        }
        let split = config.attention.mla.is_some_and(|mla| mla.split_kv_b);
        if let Some(prefix) = name.strip_suffix("kv_b_proj.weight").filter(|_| split) {
            return Recipe::JoinedLatent {
                keys: format!("{prefix}k_b_proj.weight"),
                values: format!("{prefix}v_b_proj.weight"),
            };
        }
        match permuted_head(config, self.form) {
            Some(head) if is_rotated(name) => Recipe::Rows(vec![Rows {
                name: name.to_owned(),
                order: Order::ToHalves { head },
            }]),
            _ => Recipe::whole(name),
        }
    }

    fn add(&mut self, name: String, shape: Vec<usize>, recipe: Recipe) {
        let info = recipe
            .source()
            .and_then(|name| self.source.tensor_info(name));
        let stored = info.map_or(Dtype::F32, |(dtype, _)| dtype);
        self.add_as(name, shape, recipe, stored);
    }

    /// A tensor whose values are those of a stored one of format `stored`.
    fn add_as(&mut self, name: String, shape: Vec<usize>, recipe: Recipe, stored: Dtype) {
        let choice = formats::for_folder(self.dtype, stored);
        if let Some(reason) = choice.reason {
            self.changed.push((choice.dtype, reason, name.clone()));
        }
        let dtype = choice.dtype;
        self.tensors.push(Planned {
            plan: TensorPlan { name, dtype, shape },
            recipe,
        });
    }
}

/// The name under which published checkpoints of `model_type` have a canonical tensor.
fn published(model_type: &str, name: &str) -> String {
    let spellings: &[(&str, &str)] = match model_type {
        "mixtral" | "phimoe" => &[
            (".mlp.", ".block_sparse_moe."),
            (".gate_proj.", ".w1."),
            (".up_proj.", ".w3."),
            (".down_proj.", ".w2."),
        ],
        "granitemoe" => &[(".mlp.gate.", ".block_sparse_moe.router.layer.")],
        "gpt_oss" => &[(".mlp.gate.", ".mlp.router.")],
        "qwen2_moe" => &[(".mlp.shared_experts.", ".mlp.shared_expert.")],
        _ => &[],
    };
    let mut name = name.to_owned();
    for (canonical, dialect) in spellings {
        name = name.replace(canonical, dialect);
    }
    name
}
