//! Planning a checkpoint with other experts: the files of the source, tensor by tensor, under their own names and in their
//! own formats and layouts. Experts and the rows of routers are cut out of stored bytes; all else is copied.

use std::sync::Arc;

use super::experts::{MixedPart, NewExpert, NewExperts, Piece};
use super::formats::TargetDtype;
use super::recipe::Recipe;
use super::reshape_meta::{self, MTP};
use super::{Conversion, ConvertOptions, ConvertTo, Output, Planned, QuantizeOptions, in_layer};
use crate::Dtype;
use crate::checkpoint::Checkpoint;
use crate::config::{Activation, Factors, ModelConfig};
use crate::decoupled_router::HEAD;
use crate::error::{CheckpointError, Result};
use crate::gguf::TensorPlan;
use crate::gguf_models::{lone_expert, stacked};
use crate::names::{Fused, FusedPart, Meaning, meaning};
use crate::shards::Shards;
use crate::tensors::Raw;

/// The matrices of an expert.
const PARTS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Added to the logit of an expert that is never to be picked; all formats of routers hold it.
const NEVER: f32 = -30_000.0;

/// Plans to write `source` with other experts.
pub(super) fn plan<'a>(
    source: &'a Checkpoint,
    experts: &NewExperts,
    target: ConvertTo,
    settings: String,
) -> Result<Conversion<'a>> {
    let is_gguf = matches!(target, ConvertTo::Gguf { .. });
    if is_gguf != source.is_gguf() {
        let problem = match source.is_gguf() {
            true => "a GGUF file stays one: give the output a name in .gguf, and convert it then",
            false => "a folder stays one: give the output another name, and convert it then",
        };
        return Err(CheckpointError::experts(
            source.origin(),
            problem.to_owned(),
        ));
    }
    let new = new_config(source, experts)?;
    // The digest has looked into every tensor, and the system maps more around each look.
    source.release_all();
    let mut planner = Planner {
        source,
        experts,
        changes: new.moe != source.config().moe,
        tensors: Vec::new(),
        n_dropped: 0,
    };
    for raw in stored(source)? {
        match source.is_gguf() {
            true => planner.gguf(&raw)?,
            false => planner.folder(&raw)?,
        }
    }
    let Planner {
        tensors, n_dropped, ..
    } = planner;
    let mut notes = Vec::new();
    if n_dropped > 0 {
        notes.push(format!(
            "{n_dropped} tensors are left out: {MTP}, whose experts have not been seen"
        ));
    }
    let output = match source.gguf() {
        Some(gguf) => Output::Gguf {
            entries: reshape_meta::entries(gguf, &new, n_dropped > 0, &tensors)?,
        },
        None => Output::Folder {
            files: reshape_meta::files(source, &new, n_dropped > 0)?,
        },
    };
    Ok(Conversion {
        source,
        options: ConvertOptions {
            target,
            dtype: TargetDtype::Keep,
            allow_differences: true,
            quantize: QuantizeOptions::default(),
        },
        tensors,
        notes,
        differences: Vec::new(),
        output,
        settings,
        layout: None,
    })
}

/// The tensors of the source's files, in their order.
fn stored(source: &Checkpoint) -> Result<Vec<Raw>> {
    let Some(gguf) = source.gguf() else {
        return Ok(Shards::load(source.origin(), |name| source.blob(name))?.tensors);
    };
    let file: Arc<str> = gguf.origin().into();
    let raw = |tensor: &crate::gguf::GgufTensor| Raw {
        file: Arc::clone(&file),
        name: tensor.name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
        bytes: tensor.bytes.clone(),
    };
    Ok(gguf.tensors().iter().map(raw).collect())
}

/// The model with its new numbers of experts.
fn new_config(source: &Checkpoint, experts: &NewExperts) -> Result<ModelConfig> {
    let old = source.config();
    if old.moe.layers.is_empty() {
        return Err(CheckpointError::experts(
            source.origin(),
            "it has no layers with experts".to_owned(),
        ));
    }
    if experts.layers.len() != old.moe.layers.len() {
        let problem = format!(
            "{} lists of experts for {} layers",
            experts.layers.len(),
            old.moe.layers.len()
        );
        return Err(CheckpointError::experts(source.origin(), problem));
    }
    let has_bias = old.moe.router_bias || old.moe.router.has_correction();
    for (list, layer) in experts.layers.iter().zip(&old.moe.layers) {
        let n = old.n_experts_in(*layer);
        for one in list {
            let problem = match one {
                NewExpert::Kept(id) | NewExpert::Mixed(id) if *id >= n => {
                    format!("layer {layer} has no expert {id}: it has {n}")
                }
                NewExpert::Never if !has_bias => {
                    "its router has no bias, so that no expert can be kept from being picked: layers cannot be filled up"
                        .to_owned()
                }
                NewExpert::Mixed(_) if experts.mixer.is_none() => {
                    format!("layer {layer} mixes experts, and nothing says how")
                }
                _ => continue,
            };
            return Err(CheckpointError::experts(source.origin(), problem));
        }
    }
    if old.moe.factors.is_some() {
        let problem = "they are in factors: apply this plan to the model that they were made of";
        return Err(CheckpointError::experts(
            source.origin(),
            problem.to_owned(),
        ));
    }
    if experts.factors.is_some() && source.is_gguf() {
        let problem = "GGUF has no place for factors: apply this plan to a folder, or with --compat, which multiplies them";
        return Err(CheckpointError::experts(
            source.origin(),
            problem.to_owned(),
        ));
    }
    if !old.moe.shared_weights.is_empty() {
        let problem =
            "they share weights already: apply this plan to the model that they were made of";
        return Err(CheckpointError::experts(
            source.origin(),
            problem.to_owned(),
        ));
    }
    let mut new = old.clone();
    new.moe.factors.clone_from(&experts.factors);
    if experts.rows.is_empty() {
        new.moe
            .set_counts(experts.layers.iter().map(Vec::len).collect());
    } else {
        new.moe.shared_weights.clone_from(&experts.rows);
    }
    match (new.moe.router.may_pick_all(), experts.top_k) {
        (true, None) => new.moe.top_k = new.moe.n_experts,
        (false, Some(top_k)) => new.moe.top_k = top_k,
        (false, None) => {}
        (true, Some(_)) => {
            let problem = "its routers pick as many experts as a token needs: there is no number of them to set";
            return Err(CheckpointError::experts(
                source.origin(),
                problem.to_owned(),
            ));
        }
    }
    if !experts.corrections.is_empty() && !old.moe.router.has_correction() {
        let problem = "its routers have no correction of the choice (`e_score_correction_bias`)";
        return Err(CheckpointError::experts(
            source.origin(),
            problem.to_owned(),
        ));
    }
    new.check(source.origin())?;
    Ok(new)
}

struct Planner<'a> {
    source: &'a Checkpoint,
    experts: &'a NewExperts,
    /// Whether the configuration changes.
    changes: bool,
    tensors: Vec<Planned>,
    /// Tensors for multi-token prediction that are left out.
    n_dropped: usize,
}

/// What a router has of each expert.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Row {
    Weight,
    /// Added to the logit.
    Bias,
    /// Added to the score that experts are chosen by.
    Correction,
}

/// A layer with experts.
#[derive(Clone, Copy)]
struct Place<'a> {
    layer: usize,
    n_old: usize,
    new: &'a [NewExpert],
}

/// A stored tensor that holds all experts of a layer, one after the other.
struct Stack<'a> {
    raw: &'a Raw,
    /// What each expert's piece holds, one after the other, in canonical names: `gate_proj.weight`.
    parts: Vec<String>,
    /// Whether the parts lie one after the other, row-major.
    is_plain: bool,
}

impl<'a> Planner<'a> {
    /// The experts of `layer`, if it has any.
    fn place(&self, layer: usize) -> Option<Place<'a>> {
        let layers = &self.source.config().moe.layers;
        let at = layers.binary_search(&layer).ok()?;
        Some(Place {
            layer,
            n_old: self.source.config().n_experts_in(layer),
            new: &self.experts.layers[at],
        })
    }

    fn folder(&mut self, raw: &Raw) -> Result<()> {
        let config = self.source.config();
        match meaning(&raw.name, config.n_layers) {
            Meaning::Ignored(reason) => self.ignored(raw, reason),
            Meaning::Fused(fused) => self.fused(raw, &fused)?,
            Meaning::Tensor(name) => {
                let part = in_layer(&name).and_then(|(layer, rest)| {
                    Some((self.place(layer)?, rest.strip_prefix("mlp.")?))
                });
                match (part, config.moe.decoupled_router) {
                    (Some((place, rest)), _) => self.in_moe(raw, place, rest)?,
                    (None, Some(router)) if name == HEAD => {
                        self.router_head(raw, router.per_layer)?;
                    }
                    _ => self.copy(raw),
                }
            }
            Meaning::Scales(name) => {
                let lone = in_layer(&name).and_then(|(layer, rest)| {
                    let (expert, part) = rest.strip_prefix("mlp.experts.")?.split_once('.')?;
                    Some((self.place(layer)?, expert.parse().ok()?, part))
                });
                match lone {
                    Some((place, expert, part)) => self.lone(raw, place, expert, (part, false))?,
                    None => self.copy(raw),
                }
            }
        }
        Ok(())
    }

    fn gguf(&mut self, raw: &Raw) -> Result<()> {
        let in_block = raw.name.strip_prefix("blk.").and_then(|rest| {
            let (layer, rest) = rest.split_once('.')?;
            Some((layer.parse::<usize>().ok()?, rest))
        });
        let Some((layer, rest)) = in_block else {
            match raw.name.starts_with("nextn.") {
                true => self.ignored(raw, MTP),
                false => self.copy(raw),
            }
            return Ok(());
        };
        if layer >= self.source.config().n_layers {
            self.ignored(raw, MTP);
            return Ok(());
        }
        let Some(place) = self.place(layer) else {
            self.copy(raw);
            return Ok(());
        };
        if let Some((stem, ending)) = rest.rsplit_once('.') {
            if let Some(parts) = stacked(stem) {
                let parts = parts.iter().map(|part| format!("{part}.{ending}"));
                let stack = Stack {
                    raw,
                    parts: parts.collect(),
                    is_plain: true,
                };
                return self.stack(&stack, place);
            }
            match stem {
                "ffn_gate_inp" if ending == "bias" => return self.rows(raw, place, Row::Bias),
                "ffn_gate_inp" => return self.rows(raw, place, Row::Weight),
                "exp_probs_b" => return self.rows(raw, place, Row::Correction),
                _ => {}
            }
        }
        if let Some(name) = lone_expert(layer, rest)
            && let Some((_, rest)) = in_layer(&name)
            && let Some(rest) = rest.strip_prefix("mlp.")
        {
            return self.in_moe(raw, place, rest);
        }
        self.copy(raw);
        Ok(())
    }

    /// What the computation does not use: kept, unless it is about experts that the configuration no longer describes.
    fn ignored(&mut self, raw: &Raw, reason: &str) {
        match self.changes && reason == MTP {
            true => self.n_dropped += 1,
            false => self.copy(raw),
        }
    }

    /// A tensor of a layer with experts, `rest` being its canonical name after `mlp.`.
    fn in_moe(&mut self, raw: &Raw, place: Place<'_>, rest: &str) -> Result<()> {
        match rest {
            "gate.weight" => return self.rows(raw, place, Row::Weight),
            "gate.bias" => return self.rows(raw, place, Row::Bias),
            "gate.e_score_correction_bias" => return self.rows(raw, place, Row::Correction),
            _ => {}
        }
        let lone = rest
            .strip_prefix("experts.")
            .and_then(|rest| rest.split_once('.'));
        match lone.and_then(|(expert, part)| Some((expert.parse().ok()?, part))) {
            Some((expert, part)) => self.lone(raw, place, expert, (part, true)),
            None => {
                self.copy(raw);
                Ok(())
            }
        }
    }

    /// A tensor of one expert: written for every expert of the output that it goes into. `part` is what it is, and whether that
    /// can be mixed.
    fn lone(
        &mut self,
        raw: &Raw,
        place: Place<'_>,
        expert: usize,
        (part, is_mixable): (&str, bool),
    ) -> Result<()> {
        if let Some(factors) = &self.experts.factors {
            return self.factored(raw, place, (expert, part), factors);
        }
        for (at, new) in place.new.iter().enumerate() {
            let piece = match new {
                NewExpert::Kept(id) if *id == expert => Piece::Stored(raw.bytes.clone()),
                NewExpert::Mixed(id) if *id == expert => {
                    if self.keeps(place.layer, at, part) {
                        Piece::Stored(raw.bytes.clone())
                    } else {
                        let part = Some(part).filter(|_| is_mixable && self.source_is_plain(raw));
                        self.mixed(raw, place.layer, at, part)?
                    }
                }
                NewExpert::Never if expert == 0 => Piece::Zeros(raw.bytes.len()),
                _ => continue,
            };
            let name = renamed(&raw.name, expert, at);
            self.add(name, raw.dtype, raw.shape.clone(), vec![piece]);
        }
        Ok(())
    }

    /// A matrix of one expert, in factors; `part` is its canonical name, which factors have in every dialect.
    fn factored(
        &mut self,
        raw: &Raw,
        place: Place<'_>,
        (expert, part): (usize, &str),
        factors: &Factors,
    ) -> Result<()> {
        let part = PARTS
            .iter()
            .find(|known| part.strip_suffix(".weight") == Some(**known));
        let Some(part) = part.filter(|_| raw.dtype.torch_name().is_some()) else {
            let problem = format!(
                "tensor `{}` ({}) cannot be written in factors: convert the model first, to a folder in bf16",
                raw.name, raw.dtype
            );
            return Err(CheckpointError::experts(self.source.origin(), problem));
        };
        let &[n_out, n_in] = raw.shape.as_slice() else {
            return Err(CheckpointError::experts(
                self.source.origin(),
                format!("tensor `{}` is no matrix", raw.name),
            ));
        };
        let (rank, n_rows) = (factors.rank, factors.most_rows(part));
        let written = [
            ("inner", ".weight", raw.dtype, vec![rank + n_rows, n_in]),
            ("outer", ".weight", raw.dtype, vec![n_out, rank]),
            ("rows", "", Dtype::F32, vec![n_rows]),
        ];
        for (at, new) in place.new.iter().enumerate() {
            if !matches!(new, NewExpert::Mixed(id) if *id == expert) {
                continue;
            }
            let name = renamed(&raw.name, expert, at);
            let stem = match name.rsplitn(3, '.').nth(2) {
                Some(prefix) => format!("{prefix}.{part}"),
                None => (*part).to_owned(),
            };
            for (what, ending, dtype, shape) in &written {
                if shape[0] == 0 {
                    continue;
                }
                let wanted = format!("{part}.{what}");
                let piece = self.mixed(raw, place.layer, at, Some(&wanted))?;
                self.add(
                    format!("{stem}.{what}{ending}"),
                    *dtype,
                    shape.clone(),
                    vec![piece],
                );
            }
        }
        Ok(())
    }

    /// Whether the values of a stored tensor are all that there is to know: no scales beside it.
    fn source_is_plain(&self, raw: &Raw) -> bool {
        raw.dtype != Dtype::F8E4M3 && raw.dtype.can_encode()
    }

    /// Whether a part of an expert that is mixed is as it was.
    fn keeps(&self, layer: usize, at: usize, part: &str) -> bool {
        let mixer = self.experts.mixer.as_ref();
        mixer.is_some_and(|mixer| mixer.keeps(layer, at, part))
    }

    fn mixed(&self, raw: &Raw, layer: usize, at: usize, part: Option<&str>) -> Result<Piece> {
        let (Some(part), Some(mixer)) = (part, &self.experts.mixer) else {
            return Err(CheckpointError::experts(
                self.source.origin(),
                format!(
                    "experts of tensor `{}` ({}) cannot be mixed, because its format or layout is not written here; {}",
                    raw.name,
                    raw.dtype,
                    match self.source.is_gguf() {
                        true => "convert the model first, such as to q8_0 or bf16",
                        false =>
                            "convert the model first, to a GGUF file in bf16 or q8_0, and record that",
                    }
                ),
            ));
        };
        Ok(Piece::Mixed(MixedPart {
            mixer: Arc::clone(mixer),
            layer,
            at,
            part: part.to_owned(),
        }))
    }

    fn fused(&mut self, raw: &Raw, fused: &Fused) -> Result<()> {
        let place = in_layer(&fused.prefix).and_then(|(layer, _)| self.place(layer));
        let Some(place) = place else {
            self.copy(raw);
            return Ok(());
        };
        let (ending, is_plain) = match fused.part {
            FusedPart::Weights => ("weight", true),
            FusedPart::Bias => ("bias", true),
            _ => ("", false),
        };
        let projections: &[&str] = match fused.is_gate_up {
            true => &["gate_proj", "up_proj"],
            false => &["down_proj"],
        };
        // gpt-oss interleaves gate and up and stores its matrices transposed.
        let config = self.source.config();
        let transposed = matches!(config.activation, Activation::SwigluOai { .. });
        let stack = Stack {
            raw,
            parts: projections
                .iter()
                .map(|part| format!("{part}.{ending}"))
                .collect(),
            is_plain: is_plain && !transposed,
        };
        self.stack(&stack, place)
    }

    /// All experts of a layer in one tensor, along its first dimension.
    fn stack(&mut self, stack: &Stack<'_>, place: Place<'_>) -> Result<()> {
        let raw = stack.raw;
        if self.experts.factors.is_some() {
            let problem = format!(
                "tensor `{}` holds several experts, which cannot be written in factors: convert the model first, to a \
                 folder in bf16",
                raw.name
            );
            return Err(CheckpointError::experts(self.source.origin(), problem));
        }
        let size = self.piece_bytes(raw, place, place.n_old)?;
        let mut pieces = Vec::with_capacity(place.new.len());
        for (at, new) in place.new.iter().enumerate() {
            match new {
                NewExpert::Kept(id) => {
                    pieces.push(Piece::Stored(raw.bytes.slice(id * size..(id + 1) * size)));
                }
                NewExpert::Never => pieces.push(Piece::Zeros(size)),
                NewExpert::Mixed(id)
                    if stack
                        .parts
                        .iter()
                        .all(|part| self.keeps(place.layer, at, part)) =>
                {
                    pieces.push(Piece::Stored(raw.bytes.slice(id * size..(id + 1) * size)));
                }
                NewExpert::Mixed(_) => {
                    let is_plain = stack.is_plain && self.source_is_plain(raw);
                    for part in &stack.parts {
                        let part = Some(part.as_str()).filter(|_| is_plain);
                        pieces.push(self.mixed(raw, place.layer, at, part)?);
                    }
                }
            }
        }
        let mut shape = raw.shape.clone();
        shape[0] = place.new.len();
        self.add(raw.name.clone(), raw.dtype, shape, pieces);
        Ok(())
    }

    /// The rows of a router, or its biases. Those of null experts follow the others and stay.
    fn rows(&mut self, raw: &Raw, place: Place<'_>, what: Row) -> Result<()> {
        if !self.experts.rows.is_empty() {
            self.copy(raw);
            return Ok(());
        }
        let n_null = self.source.config().moe.n_null;
        let n_rows = place.n_old + n_null;
        let n_rows = match raw.shape.first() {
            // A correction of the choice has none for null experts.
            Some(n) if *n == place.n_old => place.n_old,
            _ => n_rows,
        };
        let size = self.piece_bytes(raw, place, n_rows)?;
        let row = |row: usize| Piece::Stored(raw.bytes.slice(row * size..(row + 1) * size));
        let corrections = &self.experts.corrections;
        let corrected = |id: usize| {
            let value = corrections.get(&(place.layer, id));
            value.filter(|_| what == Row::Correction)
        };
        let new = place.new.iter().map(|new| match new {
            NewExpert::Kept(id) | NewExpert::Mixed(id) => match corrected(*id) {
                Some(value) => Piece::Values(vec![*value]),
                None => row(*id),
            },
            NewExpert::Never if what == Row::Weight => Piece::Zeros(size),
            NewExpert::Never => Piece::Values(vec![NEVER]),
        });
        let null = (place.n_old..n_rows).map(row);
        let pieces: Vec<Piece> = new.chain(null).collect();
        let mut shape = raw.shape.clone();
        shape[0] = pieces.len();
        self.add(raw.name.clone(), raw.dtype, shape, pieces);
        Ok(())
    }

    /// The head of a router that runs before the layers. Its rows are those of one layer after the other, or with the same
    /// picks for all layers those of each.
    fn router_head(&mut self, raw: &Raw, per_layer: bool) -> Result<()> {
        let (moe, lists) = (&self.source.config().moe, &self.experts.layers);
        if !self.experts.rows.is_empty() {
            self.copy(raw);
            return Ok(());
        }
        if !per_layer && lists.iter().any(|list| *list != lists[0]) {
            return Err(CheckpointError::experts(self.source.origin(),
                "its one router picks the same experts in all layers, so that all have to keep the same".to_owned(),
            ));
        }
        let n_lists = if per_layer { lists.len() } else { 1 };
        let counts: Vec<usize> = moe.counts().take(n_lists).collect();
        let n_rows: usize = counts.iter().map(|n| n + moe.n_null).sum();
        if raw.shape.first() != Some(&n_rows) || n_rows == 0 {
            let problem = format!(
                "tensor `{}` has shape {:?}, expected {n_rows} rows for the experts of all layers",
                raw.name, raw.shape
            );
            return Err(CheckpointError::experts(self.source.origin(), problem));
        }
        let size = raw.bytes.len() / n_rows;
        let row = |row: usize| Piece::Stored(raw.bytes.slice(row * size..(row + 1) * size));
        let (mut pieces, mut first) = (Vec::new(), 0);
        for (list, n_old) in lists.iter().zip(counts) {
            pieces.extend(list.iter().map(|new| match new {
                NewExpert::Kept(id) | NewExpert::Mixed(id) => row(first + id),
                NewExpert::Never => Piece::Zeros(size),
            }));
            let n_all = n_old + moe.n_null;
            pieces.extend((first + n_old..first + n_all).map(row));
            first += n_all;
        }
        let mut shape = raw.shape.clone();
        shape[0] = pieces.len();
        self.add(raw.name.clone(), raw.dtype, shape, pieces);
        Ok(())
    }

    /// Bytes of one of `n` pieces along the first dimension.
    fn piece_bytes(&self, raw: &Raw, place: Place<'_>, n: usize) -> Result<usize> {
        let fits = raw.shape.first() == Some(&n) && n > 0 && raw.bytes.len().is_multiple_of(n);
        if fits {
            return Ok(raw.bytes.len() / n);
        }
        Err(CheckpointError::experts(
            self.source.origin(),
            format!(
                "tensor `{}` has shape {:?}, expected {n} in the first dimension for the experts of layer {}",
                raw.name, raw.shape, place.layer
            ),
        ))
    }

    fn copy(&mut self, raw: &Raw) {
        let pieces = vec![Piece::Stored(raw.bytes.clone())];
        self.add(raw.name.clone(), raw.dtype, raw.shape.clone(), pieces);
    }

    fn add(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, pieces: Vec<Piece>) {
        self.tensors.push(Planned {
            plan: TensorPlan { name, dtype, shape },
            recipe: Recipe::Pieces(pieces),
        });
    }
}

/// The name of a tensor of expert `from` for expert `to`: `experts.3.` becomes `experts.1.`, `ffn_up.3.` `ffn_up.1.`.
fn renamed(name: &str, from: usize, to: usize) -> String {
    for stem in ["experts", "ffn_gate", "ffn_up", "ffn_down"] {
        let old = format!(".{stem}.{from}.");
        if name.contains(&old) {
            return name.replacen(&old, &format!(".{stem}.{to}."), 1);
        }
    }
    name.to_owned()
}
