//! Planning a GGUF file: names, stacked experts, the layouts that llama.cpp wants, and what it would compute otherwise.

use bytes::Bytes;

use super::formats::{self, TargetDtype};
use super::forms::{differences, gguf_form};
use super::given::{self, Given};
use super::recipe::{Order, Recipe, Rows};
use super::{
    Conversion, ConvertOptions, Output, Planned, in_layer, note_formats, permuted_head, vocab,
};
use crate::Dtype;
use crate::checkpoint::Checkpoint;
use crate::config::{ModelConfig, NormKind};
use crate::error::{CheckpointError, Result};
use crate::gguf::{Gguf, GgufTensor, TensorPlan, Value};
use crate::gguf_models::{self, PROJECTIONS, Target};
use crate::specs::tensor_specs;

/// Plans to write `source` as GGUF.
pub(super) fn plan<'a>(
    source: &'a Checkpoint,
    name: &str,
    options: &ConvertOptions,
) -> Result<Conversion<'a>> {
    let quantize = &options.quantize;
    let target = gguf_models::target(source.origin(), source.config())?;
    let form = gguf_form(source.origin(), target, source.config())?;
    let mut planner = Planner {
        source,
        target,
        form: &form,
        dtype: options.dtype,
        tensors: Vec::new(),
        changed: Vec::new(),
        given: Given::new(source, quantize),
    };
    planner.all()?;
    let Planner {
        tensors,
        changed,
        given,
        ..
    } = planner;
    let mut notes = Vec::new();
    given.finish(options.dtype, &mut notes)?;
    let mut entries = gguf_models::entries(target, &form);
    let differences = check(source, target, &form, &entries, &tensors)?;
    note_formats(&mut notes, &changed);
    if source.config().tie_word_embeddings && !form.tie_word_embeddings {
        notes.push(
            "the output head is written although it is the embedding: llama.cpp wants it"
                .to_owned(),
        );
    }
    general(&mut entries, source, (name, options.dtype), &tensors);
    entries.extend(vocab::entries(source, &mut notes)?);
    let mut settings = String::new();
    if let Some(importance) = &quantize.importance {
        entries.extend(given::entries(importance));
        settings = format!("importance {}", importance.digest());
    }
    Ok(Conversion {
        source,
        options: options.clone(),
        tensors,
        notes,
        differences,
        output: Output::Gguf { entries },
        settings,
        layout: None,
    })
}

struct Planner<'a> {
    source: &'a Checkpoint,
    target: &'static Target,
    form: &'a ModelConfig,
    dtype: TargetDtype,
    tensors: Vec<Planned>,
    changed: Vec<(Dtype, &'static str, String)>,
    given: Given<'a>,
}

impl Planner<'_> {
    fn all(&mut self) -> Result<()> {
        for (name, values) in gguf_models::rope_tensors(self.form) {
            let shape = vec![values.len()];
            self.add(
                name,
                &shape,
                (name.to_owned(), shape.clone()),
                Recipe::Values(values),
            )?;
        }
        for (name, shape) in tensor_specs(self.form) {
            let gguf = match in_layer(&name) {
                None => gguf_models::outside_gguf(&name).map(str::to_owned),
                Some((layer, rest)) => {
                    if let Some(expert) = rest.strip_prefix("mlp.experts.") {
                        self.stack(layer, expert, &shape)?;
                        continue;
                    }
                    self.target.norms.gguf(layer, rest)
                }
            };
            let recipe = self.recipe(&name);
            let written = (self.known(gguf, &name)?, shape.clone());
            self.add(&name, &shape, written, recipe)?;
        }
        Ok(())
    }

    fn known(&self, gguf: Option<String>, name: &str) -> Result<String> {
        gguf.ok_or_else(|| CheckpointError::UnexpectedTensor {
            origin: self.source.origin().to_owned(),
            name: self.source.stored_name(name).to_owned(),
            shape: Vec::new(),
            n_unexpected: 1,
        })
    }

    /// One stack per projection, at its first expert: `0.gate_proj.weight`; or a tensor for each where formats differ.
    fn stack(&mut self, layer: usize, expert: &str, shape: &[usize]) -> Result<()> {
        let n_experts = self.form.n_experts_in(layer);
        let (id, part) = expert.split_once('.').unwrap_or_default();
        let canonical = format!("model.layers.{layer}.mlp.experts.{expert}");
        // Biases have one format, and no file has them one by one.
        if part.ends_with(".weight") && self.given.differ(layer, n_experts) {
            let mut name = format!("blk.{layer}.{part}");
            for (gguf, canonical) in PROJECTIONS {
                name = name.replace(canonical, &format!("{gguf}.{id}"));
            }
            let recipe = Recipe::whole(&canonical);
            return self.add(&canonical, shape, (name, shape.to_vec()), recipe);
        }
        if id != "0" {
            return Ok(());
        }
        let rows = (0..n_experts).map(|expert| Rows {
            name: format!("model.layers.{layer}.mlp.experts.{expert}.{part}"),
            order: Order::All,
        });
        let recipe = Recipe::Rows(rows.collect());
        let mut name = format!("blk.{layer}.{part}");
        for (gguf, canonical) in PROJECTIONS {
            name = name.replace(canonical, &format!("{gguf}_exps"));
        }
        let written = (name, [&[n_experts], shape].concat());
        self.add(&canonical, shape, written, recipe)
    }

    /// How a canonical tensor of the GGUF form is made of those of the source.
    fn recipe(&self, name: &str) -> Recipe {
        let config = self.source.config();
        if name == "lm_head.weight" && config.tie_word_embeddings {
            return Recipe::whole("model.embed_tokens.weight");
        }
        let whole = Recipe::whole(name);
        if name.ends_with("norm.weight") && config.norm == NormKind::RmsPlusOne {
            return Recipe::Shifted {
                name: name.to_owned(),
                by: 1.0,
            };
        }
        if let Some(mla) = config.attention.mla.filter(|mla| !mla.split_kv_b) {
            let (nope, v) = (mla.qk_nope_head_dim, mla.v_head_dim);
            if let Some(prefix) = name.strip_suffix("k_b_proj.weight") {
                let name = format!("{prefix}kv_b_proj.weight");
                return Recipe::KeysOfLatent { name, nope, v };
            }
            if let Some(prefix) = name.strip_suffix("v_b_proj.weight") {
                return Recipe::Rows(vec![Rows {
                    name: format!("{prefix}kv_b_proj.weight"),
                    order: Order::Tail {
                        period: nope + v,
                        from: nope,
                    },
                }]);
            }
        }
        match permuted_head(config, self.form) {
            Some(head) if is_rotated(name) => Recipe::Rows(vec![Rows {
                name: name.to_owned(),
                order: Order::ToNeighbours { head },
            }]),
            _ => whole,
        }
    }

    /// Plans the tensor `written` (name and shape), which is `name` of `one` shape here, or all experts of which that is
    /// the first.
    fn add(
        &mut self,
        name: &str,
        one: &[usize],
        written: (String, Vec<usize>),
        recipe: Recipe,
    ) -> Result<()> {
        let info = recipe
            .source()
            .and_then(|name| self.source.tensor_info(name));
        let stored = info.map_or(Dtype::F32, |(dtype, _)| dtype);
        let (gguf, shape) = written;
        let choice = match self.given.format(&gguf, (name, one))? {
            Some(choice) => choice,
            None => {
                let wanted = (self.dtype, self.given.has_importance());
                formats::for_gguf(wanted, self.form, stored, (name, one))
            }
        };
        if let Some(reason) = choice.reason {
            self.changed.push((choice.dtype, reason, gguf.clone()));
        }
        let plan = TensorPlan {
            name: gguf,
            dtype: choice.dtype,
            shape,
        };
        self.given.check(&plan, stored)?;
        self.tensors.push(Planned { plan, recipe });
        Ok(())
    }
}

/// Whether rope acts on the rows of a tensor.
pub(super) fn is_rotated(name: &str) -> bool {
    name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.")
}

/// Reads the planned metadata as llama.cpp would and lists what it says otherwise than `form`.
fn check(
    source: &Checkpoint,
    target: &Target,
    form: &ModelConfig,
    entries: &[(String, Value)],
    tensors: &[Planned],
) -> Result<Vec<String>> {
    let mut planned = Vec::new();
    for tensor in tensors {
        // Only the factors of the rope are asked for their values.
        let bytes: Vec<u8> = match &tensor.recipe {
            Recipe::Values(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => Vec::new(),
        };
        planned.push(GgufTensor {
            name: tensor.plan.name.clone(),
            dtype: tensor.plan.dtype,
            shape: tensor.plan.shape.clone(),
            bytes: Bytes::from(bytes),
        });
    }
    let gguf = Gguf::planned(source.origin(), entries.to_vec(), planned)?;
    let theirs = gguf_models::read_config(&gguf)?;
    let mut list = gguf_models::refusals(target, form);
    list.extend(differences(form, &theirs));
    if tensor_specs(&theirs) != tensor_specs(form) {
        return Err(CheckpointError::Unsupported {
            file: source.origin().to_owned(),
            key: "model_type".to_owned(),
            value: form.model_type.clone(),
            reason: format!("GGUF cannot hold this model: {}", list.join("; ")),
        });
    }
    Ok(list)
}

/// `general.*`, apart from the architecture.
fn general(
    entries: &mut Vec<(String, Value)>,
    source: &Checkpoint,
    (name, wanted): (&str, TargetDtype),
    tensors: &[Planned],
) {
    let mut put = |key: &str, value: Value| entries.push((format!("general.{key}"), value));
    let kept = source.gguf().map(Gguf::entries).unwrap_or_default();
    let mut has_name = false;
    for (key, value) in kept {
        let Some(key) = key.strip_prefix("general.") else {
            continue;
        };
        if !matches!(
            key,
            "architecture" | "file_type" | "quantization_version" | "alignment"
        ) {
            has_name |= key == "name";
            put(key, value.clone());
        }
    }
    if !has_name {
        put("name", name.into());
    }
    if kept.is_empty() {
        put("type", "model".into());
    }
    let matrices = tensors.iter().filter(|tensor| tensor.plan.shape.len() > 1);
    let mut sizes: Vec<(Dtype, u64)> = Vec::new();
    for tensor in matrices {
        match sizes
            .iter_mut()
            .find(|(dtype, _)| *dtype == tensor.plan.dtype)
        {
            Some((_, n)) => *n += tensor.n_bytes(),
            None => sizes.push((tensor.plan.dtype, tensor.n_bytes())),
        }
    }
    let most = sizes
        .iter()
        .max_by_key(|(_, n)| *n)
        .map_or(Dtype::F32, |(dtype, _)| *dtype);
    let file_type = match wanted {
        TargetDtype::Mix(mixture) => Some(mixture.file_type()),
        TargetDtype::Keep | TargetDtype::Is(_) => file_type(most),
    };
    if let Some(file_type) = file_type {
        put("file_type", file_type.into());
    }
    if sizes.iter().any(|(dtype, _)| dtype.is_quantized()) {
        put("quantization_version", 2u32.into());
    }
}

/// `general.file_type` of a file that is mostly of this format (`llama_ftype` of llama.cpp).
fn file_type(dtype: Dtype) -> Option<u32> {
    Some(match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Q4_0 => 2,
        Dtype::Q4_1 => 3,
        Dtype::Q8_0 => 7,
        Dtype::Q5_0 => 8,
        Dtype::Q5_1 => 9,
        Dtype::Q2K => 10,
        Dtype::Q3K => 11,
        Dtype::Q4K => 14,
        Dtype::Q5K => 16,
        Dtype::Q6K => 18,
        Dtype::Iq4Nl => 25,
        Dtype::Iq4Xs => 30,
        Dtype::Bf16 => 32,
        Dtype::Mxfp4 => 38,
        _ => return None,
    })
}
