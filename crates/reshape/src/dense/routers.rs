//! Routers for experts that come out of a dense model, before anything is trained.

use cadre_checkpoint::{Checkpoint, CheckpointError};

use super::draws::Draws;
use super::feed_forward::values;

/// Standard deviation of random rows, that of most models' initial values.
const STD: f64 = 0.02;

/// Largest router logit that rows along gate directions give, about. Weights of picked experts then differ by as little,
/// which is what keeps their sum that of the dense model's neurons.
const LOGIT: f64 = 0.01;

/// Rows from a normal distribution, `[n_experts, d]`.
pub(super) fn random(draws: Draws, n_experts: usize, d: usize) -> Vec<f32> {
    (0..n_experts * d)
        .map(|i| (STD * draws.normal(i)) as f32)
        .collect()
}

/// For every expert the mean direction of its neurons' gates, `[n_experts, d]`: the token that opens many of them scores high
/// (the centre of an expert's parameters of MoEfication, Zhang et al., 2022, arXiv 2110.01786). All rows are scaled by one
/// number, so that logits stay near [`LOGIT`].
pub(super) fn gate_centres(
    source: &Checkpoint,
    layer: usize,
    experts: &[Vec<usize>],
) -> Result<Vec<f32>, CheckpointError> {
    let d = source.config().hidden_size;
    let gate = values(source, layer, "gate_proj.weight")?;
    let mut rows = Vec::with_capacity(experts.len() * d);
    for expert in experts {
        let mut sum = vec![0.0_f64; d];
        for neuron in expert {
            let row = &gate[neuron * d..][..d];
            let length = row
                .iter()
                .map(|x| f64::from(*x).powi(2))
                .sum::<f64>()
                .sqrt();
            if length > 0.0 {
                let cells = sum.iter_mut().zip(row);
                cells.for_each(|(sum, x)| *sum += f64::from(*x) / length);
            }
        }
        rows.extend(sum);
    }
    let norm = format!("model.layers.{layer}.post_attention_layernorm.weight");
    let norm = source.tensor(&norm)?.to_f32();
    // What a row meets has the norm's weights times numbers of mean square 1.
    let squares = rows.chunks_exact(d).map(|row| {
        let cells = row.iter().zip(&norm);
        cells
            .map(|(x, norm)| (x * f64::from(*norm)).powi(2))
            .sum::<f64>()
    });
    let spread = squares.fold(0.0, f64::max).sqrt();
    let scale = if spread > 0.0 { LOGIT / spread } else { 0.0 };
    Ok(rows.into_iter().map(|x| (x * scale) as f32).collect())
}
