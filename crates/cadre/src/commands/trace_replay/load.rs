//! Reading what `cadre trace replay` works on: a whole trace, and the sizes of a model's experts.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cadre_checkpoint::Checkpoint;
use cadre_store::replay::ExpertSizes;
use cadre_store::{ExpertId, Recording};
use cadre_trace::{TraceMeta, TraceReader};

use super::{Args, Budget};
use crate::cli::App;
use crate::failure::Failure;

/// Picks of one layer and sequence.
#[derive(Default)]
struct Picks {
    experts: Vec<u16>,
    ends: Vec<usize>,
}

impl Picks {
    fn tokens(&self) -> Vec<&[u16]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ranges = starts.zip(&self.ends);
        ranges
            .map(|(start, &end)| &self.experts[start..end])
            .collect()
    }
}

/// Reads the whole trace: the decoder layers that are in it, and their picks.
pub(super) fn recording(path: &Path, reader: &mut TraceReader) -> Result<(Vec<usize>, Recording)> {
    let mut sequences: BTreeMap<u32, BTreeMap<usize, Picks>> = BTreeMap::new();
    let shown = path.display();
    let meta = reader.meta().clone();
    let n_real = |layer| meta.n_real_in(layer);
    while let Some(block) = reader.next_block()? {
        for row in block.rows() {
            let layers = sequences.entry(row.seq).or_default();
            let picks = layers.entry(usize::from(row.layer)).or_default();
            if row.pos as usize != picks.ends.len() {
                let message = format!(
                    "{shown}: sequence {} goes on at position {} in layer {}, and {} was to come",
                    row.seq,
                    row.pos,
                    row.layer,
                    picks.ends.len()
                );
                return Err(Failure::new(message)
                    .hint("a replay needs all tokens in order: record it again")
                    .into());
            }
            // There is nothing to read for a null expert.
            let n_real = n_real(usize::from(row.layer));
            let real = row
                .experts
                .iter()
                .filter(|expert| usize::from(**expert) < n_real);
            picks.experts.extend(real);
            picks.ends.push(picks.experts.len());
        }
    }
    let mut layers: Vec<usize> = sequences
        .values()
        .flat_map(|one| one.keys().copied())
        .collect();
    layers.sort_unstable();
    layers.dedup();
    let mut recording = Recording::new(layers.len(), meta.n_experts);
    for (seq, picks) in &sequences {
        let tokens: Vec<_> = picks.values().map(Picks::tokens).collect();
        if !recording.push_sequence(&tokens) {
            let message = format!("{shown}: not all layers have all tokens of sequence {seq}");
            return Err(Failure::new(message).hint("record it again").into());
        }
    }
    if recording.n_tokens() == 0 {
        return Err(Failure::new(format!("{shown} has no tokens")).into());
    }
    Ok((layers, recording))
}

/// The sizes of the recorded experts: those of the model that was named, or 1 each.
pub(super) fn sizes(
    app: &App,
    args: &Args,
    (meta, layers): (&TraceMeta, &[usize]),
) -> Result<ExpertSizes> {
    let shape = (layers.len(), meta.n_experts);
    if !args.checkpoint.is_given() {
        if args
            .budgets
            .iter()
            .any(|one| matches!(one, Budget::Bytes(_)))
        {
            return Err(
                Failure::usage("a budget in bytes needs the sizes of the experts")
                    .hint("pass -m MODEL, or a share such as 25%")
                    .into(),
            );
        }
        return Ok(ExpertSizes::new(shape.0, shape.1, |id: ExpertId| {
            let n_real = meta.n_real_in(layers[usize::from(id.layer)]);
            usize::from(usize::from(id.expert) < n_real)
        }));
    }
    let checkpoint = args.checkpoint.open_outline(app)?;
    let config = checkpoint.config();
    let is_other = config.n_layers != meta.n_layers
        || !layers.iter().all(|&layer| {
            config.is_moe_layer(layer) && config.n_experts_in(layer) == meta.n_real_in(layer)
        });
    if is_other {
        let message = format!(
            "{} has {} layers x {} experts, and the trace is of a {} of {} x {}",
            checkpoint.origin(),
            config.n_layers,
            config.moe.n_logits(),
            meta.architecture,
            meta.n_layers,
            meta.n_experts
        );
        return Err(Failure::usage(message)
            .hint("pass the model that was recorded, in any format, or leave -m out")
            .into());
    }
    let bytes = expert_bytes(&checkpoint);
    Ok(ExpertSizes::new(shape.0, shape.1, |id: ExpertId| {
        let layer = layers[usize::from(id.layer)];
        let n_bytes = bytes.get(&(layer, usize::from(id.expert)));
        n_bytes.copied().unwrap_or(0)
    }))
}

/// Bytes of every expert, by decoder layer and number, as stored.
fn expert_bytes(checkpoint: &Checkpoint) -> BTreeMap<(usize, usize), usize> {
    let mut bytes = BTreeMap::new();
    for (name, format, shape) in checkpoint.tensor_infos() {
        let place = name.strip_prefix("model.layers.").and_then(|rest| {
            let (layer, rest) = rest.split_once(".mlp.experts.")?;
            let (expert, _) = rest.split_once('.')?;
            Some((layer.parse().ok()?, expert.parse().ok()?))
        });
        if let Some(place) = place {
            let n_bytes = format.n_bytes(shape.iter().product());
            *bytes.entry(place).or_default() += n_bytes.unwrap_or(0);
        }
    }
    bytes
}
