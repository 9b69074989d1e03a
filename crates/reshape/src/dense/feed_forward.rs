//! Neurons of a stored feed-forward: its matrices, and the rows and columns that belong to a list of neurons.

use cadre_checkpoint::{Checkpoint, CheckpointError};

/// The values of `part` (`gate_proj.weight`) of the dense feed-forward of `layer`.
pub(crate) fn values(
    source: &Checkpoint,
    layer: usize,
    part: &str,
) -> Result<Vec<f32>, CheckpointError> {
    let view = source.tensor(&format!("model.layers.{layer}.mlp.{part}"))?;
    let values = view.to_f32();
    source.release(&view.bytes);
    Ok(values)
}

/// Of a matrix `[f, d]` or a bias `[f]` the rows of `neurons`, of a matrix `[d, f]` (`down_proj`) their columns; a bias of
/// the output belongs to no neuron and is refused before.
pub(crate) fn of_neurons(part: &str, values: &[f32], width: usize, neurons: &[usize]) -> Vec<f32> {
    if part == "down_proj.weight" {
        let rows = values.chunks_exact(width);
        return rows
            .flat_map(|row| neurons.iter().map(|neuron| row[*neuron]))
            .collect();
    }
    let d = values.len() / width;
    let rows = neurons.iter().map(|neuron| &values[neuron * d..][..d]);
    rows.flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_gate_and_columns_of_down() {
        let gate = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(
            of_neurons("gate_proj.weight", &gate, 3, &[2, 0]),
            [5.0, 6.0, 1.0, 2.0]
        );
        assert_eq!(
            of_neurons("down_proj.weight", &gate, 3, &[2, 0]),
            [3.0, 1.0, 6.0, 4.0]
        );
    }
}
