//! A small model on a device and on the processor: drivers exist that answer with zeros and say nothing.

use crate::data;
use crate::init::Init;
use crate::lm::{LanguageModel, Pass};
use crate::objective::value;
use crate::optimizer::GradientSum;
use crate::recipe::Recipe;
use burn::tensor::Device;
use cadre_routing::RoutingError;
use std::path::Path;

/// How far the numbers may be apart, relative to them; a device rounds differently, by about a millionth.
const TOLERANCE: f64 = 1e-3;

/// Something of everything that the trainer asks of a device.
const RECIPE: &str = r#"
    name = "trial"
    seed = 1
    [model]
    vocab_size = 24
    hidden_size = 8
    n_layers = 2
    n_heads = 2
    n_kv_heads = 1
    head_dim = 4
    n_experts = 3
    top_k = 2
    moe_intermediate_size = 6
    shared_intermediate_size = 4
    mlp_only_layers = [0]
    intermediate_size = 6
    max_position_embeddings = 8
    initializer_range = 0.4
    [train]
    steps = 1
    batch_size = 2
    seq_len = 7
    lr = 1e-3
    [output]
    dir = "trial"
"#;

/// Whether `device` computes the losses of a small model, and the norm of their gradient, as the processor does.
///
/// # Errors
/// What came out instead.
pub(super) fn run(device: &Device) -> Result<(), String> {
    let ours = losses(&Device::flex()).map_err(|e| e.to_string())?;
    let theirs = losses(device).map_err(|e| e.to_string())?;
    compare(ours, theirs)
}

/// Cross entropy, balance, z, and the norm of the gradient of their sum.
fn losses(device: &Device) -> Result<[f64; 4], RoutingError> {
    let recipe = Recipe::parse(Path::new("trial.toml"), RECIPE).expect("a whole recipe");
    let architecture = recipe.architecture().expect("sizes that fit");
    let init = Init {
        seed: recipe.seed,
        std: recipe.model.initializer_range,
        device: device.clone().autodiff(),
    };
    let model = LanguageModel::init(&architecture, &init);
    let batch = data::random_batch(&recipe, 1, 0);
    let parts = model.losses(&architecture, &batch, &Pass::default())?;
    let loss = parts.cross_entropy.clone() + parts.balance.clone() + parts.z.clone();
    let mut sum = GradientSum::default();
    sum.add(&model, &mut loss.backward(), 1.0)?;
    Ok([
        value(parts.cross_entropy)?,
        value(parts.balance)?,
        value(parts.z)?,
        sum.norm(),
    ])
}

fn compare(ours: [f64; 4], theirs: [f64; 4]) -> Result<(), String> {
    let names = ["cross entropy", "balance", "z-loss", "gradient norm"];
    for ((name, a), b) in names.iter().zip(ours).zip(theirs) {
        let off = (a - b).abs() / a.abs();
        // Also false for what is not a number.
        let close = off < TOLERANCE;
        if !close {
            return Err(format!(
                "it computes something else than the processor does: of a small model, the {name} is {b} there and {a} \
                 here; a newer driver may help"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_passes_and_zeros_do_not() {
        run(&Device::flex()).unwrap();
        let ours = losses(&Device::flex()).unwrap();
        assert!(ours.iter().all(|x| *x > 0.05), "{ours:?}");
        for place in 0..ours.len() {
            for wrong in [0.0, f64::NAN, ours[place] * 1.01] {
                let mut theirs = ours;
                theirs[place] = wrong;
                let problem = compare(ours, theirs).unwrap_err();
                assert!(problem.contains(&wrong.to_string()), "{problem}");
            }
        }
    }
}
