//! Flags that change the choice of experts, per layer and expert, and the file that says the same.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cadre_checkpoint::Checkpoint;
use cadre_engine::Steering;
use cadre_reshape::{read_plan, shape_of};
use cadre_routing::steer::{Experts, Layers, Numbers};

use crate::commands::apply::misfit;
use crate::failure::Failure;

/// Other experts than the model picks. The same for every token that is read or written.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Steering (other results than the model's own; all off by default)")]
#[group(id = "steering", multiple = true)]
pub(crate) struct SteerArgs {
    /// Use the best K experts per token in place of the model's number, fewer or more.
    #[arg(long, value_name = "K")]
    top_k_experts: Option<usize>,
    /// Use the fewest experts that have more than P of the token's total score, 0 to 1; at most K, or the model's number.
    #[arg(long, value_name = "P")]
    top_p_experts: Option<f32>,
    /// Leave out experts whose weight is below T times the token's largest, T from 0 to 1.
    #[arg(long, value_name = "T")]
    min_expert_weight: Option<f32>,
    /// Keep at least so many of them; 1 unless said.
    #[arg(long, value_name = "N", requires = "min_expert_weight")]
    min_experts: Option<usize>,
    /// Never pick these experts; the next best take their places. Layers and experts such as `3:5,7`, `0-11:4` or `*:12`;
    /// several by `/` or by repeating the flag.
    #[arg(long, value_name = "LAYERS:EXPERTS")]
    mask_experts: Vec<Experts>,
    /// Always pick these experts, in place of the lowest ranked ones.
    #[arg(long, value_name = "LAYERS:EXPERTS")]
    force_experts: Vec<Experts>,
    /// Leave out these experts when they are picked; nothing takes their places.
    #[arg(long, value_name = "LAYERS:EXPERTS")]
    mute_experts: Vec<Experts>,
    /// Take this part of the weight of these experts away when they are picked, as in `3:5=0.5`, and give it to the other picks;
    /// 1 is what --mute-experts does.
    #[arg(long, value_name = "LAYERS:EXPERT=D")]
    damp_experts: Vec<Numbers>,
    /// Add this to the router logits that experts are ranked by, as in `3:5=1.5,7=-2`; weights stay what they are.
    #[arg(long, value_name = "LAYERS:EXPERT=B")]
    bias_experts: Vec<Numbers>,
    /// Multiply the weights of these experts when they are picked, as in `3:5=0.5`; 0 leaves them out.
    #[arg(long, value_name = "LAYERS:EXPERT=G")]
    gain_experts: Vec<Numbers>,
    /// JSON file with any of top_k, top_p, ranks, min_weight, min_experts, mask, force, mute, damp, bias and gain. Flags add to
    /// what it says of experts, and replace its numbers.
    #[arg(long, value_name = "FILE")]
    steer: Option<PathBuf>,
    /// How much of what the file of --steer says: biases, dampings, and what gains differ from 1 by are multiplied by it, and
    /// what is muted is damped by it.
    #[arg(long, value_name = "S", requires = "steer")]
    steer_scale: Option<f32>,
    /// Never pick the experts that this plan of `cadre plan prune` drops: what `cadre apply` would make, without writing it.
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
}

impl SteerArgs {
    /// What is asked for of `checkpoint`; empty when nothing is.
    pub(crate) fn steering(&self, checkpoint: &Checkpoint) -> Result<Steering> {
        Ok(self.planned(checkpoint)?.and(&self.said()?))
    }

    /// What a plan for `checkpoint` leaves out.
    fn planned(&self, checkpoint: &Checkpoint) -> Result<Steering> {
        match &self.plan {
            None => Ok(Steering::default()),
            Some(path) => of_plan(path, checkpoint),
        }
    }

    /// What the file and the flags say.
    fn said(&self) -> Result<Steering> {
        let file = match &self.steer {
            None => Steering::default(),
            Some(path) => from_file(path)?.scaled(self.steer_scale.unwrap_or(1.0))?,
        };
        let mut flags = Steering {
            top_k: self.top_k_experts,
            top_p: self.top_p_experts,
            min_weight: self.min_expert_weight,
            min_experts: self.min_experts,
            ..Steering::default()
        };
        for (all, more) in [
            (&mut flags.mask, &self.mask_experts),
            (&mut flags.force, &self.force_experts),
            (&mut flags.mute, &self.mute_experts),
        ] {
            more.iter().for_each(|one| all.extend(one));
        }
        for (all, more) in [
            (&mut flags.damp, &self.damp_experts),
            (&mut flags.bias, &self.bias_experts),
            (&mut flags.gain, &self.gain_experts),
        ] {
            more.iter().for_each(|one| all.extend(one));
        }
        Ok(file.and(&flags))
    }
}

/// A steering from a file that says one, or from a plan of experts to keep.
pub(crate) fn read(path: &Path, checkpoint: &Checkpoint) -> Result<Steering> {
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    let is_plan = serde_json::from_str::<serde_json::Value>(&text)
        .is_ok_and(|value| value.get("layers").is_some());
    match is_plan {
        true => of_plan(path, checkpoint),
        false => from_file(path),
    }
}

/// What a plan for `checkpoint` leaves out.
fn of_plan(path: &Path, checkpoint: &Checkpoint) -> Result<Steering> {
    let plan = read_plan(path)?;
    plan.check(&shape_of(checkpoint))
        .with_context(|| misfit(Some(path), checkpoint))?;
    if plan.merges() {
        let text = format!("{} merges experts, which needs new weights", path.display());
        let hint = "write the model with `cadre apply`";
        return Err(Failure::new(text).hint(hint).into());
    }
    if plan.factor.is_some() {
        let text = format!(
            "{} factors matrices, which needs new weights",
            path.display()
        );
        let hint = "write the model with `cadre apply`";
        return Err(Failure::new(text).hint(hint).into());
    }
    if plan.has_formats() {
        let text = format!(
            "{} changes number formats, which needs new weights",
            path.display()
        );
        let hint = "write the model with `cadre apply`";
        return Err(Failure::new(text).hint(hint).into());
    }
    let mut mask = Experts::default();
    for layer in &plan.layers {
        let dropped = layer.dropped();
        if !dropped.is_empty() {
            mask.add(Layers::Range(layer.layer, layer.layer), dropped);
        }
    }
    Ok(Steering {
        mask,
        ..Steering::default()
    })
}

/// What a steering file says.
pub(crate) fn from_file(path: &Path) -> Result<Steering> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the steering {shown}"))?;
    // A list would be read as the fields in order, and an empty one as nothing to do.
    ensure!(
        text.trim_start().starts_with('{'),
        "{shown} is not a steering: expected a JSON object such as {{\"mask\": {{\"3\": [5]}}}}"
    );
    serde_json::from_str(&text).with_context(|| format!("{shown} is not a steering"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_add_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("s.json");
        let json = r#"{"top_k":4,"mask":{"3":[5]},"gain":{"*":{"1":0.5}}}"#;
        std::fs::write(&file, json).unwrap();
        let args = SteerArgs {
            steer: Some(file.clone()),
            top_k_experts: Some(2),
            mask_experts: vec!["3:7".parse().unwrap(), "*:0/1:2".parse().unwrap()],
            ..SteerArgs::default()
        };
        let said = "top-k-experts=2 mask-experts=3:5,7/*:0/1:2 gain-experts=*:1=0.5";
        assert_eq!(args.said().unwrap().to_string(), said);
        std::fs::write(&file, r#"{"masks":{}}"#).unwrap();
        let error = format!("{:#}", args.said().unwrap_err());
        assert!(
            error.contains("s.json is not a steering: unknown field `masks`"),
            "{error}"
        );
        assert!(SteerArgs::default().said().unwrap().is_empty());
    }
}
