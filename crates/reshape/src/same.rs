//! Whether two checkpoints hold the same model in other formats, such as a folder and the GGUF file that was made of it.
//!
//! The digests of two formats differ, and no number that both share can stand for values that one of them has rounded. So
//! sizes and the rule of routing have to be equal, and values are compared at the same places: routers and their biases, which
//! both formats hold unrounded or nearly so, and matrices of every expert that is looked at, which may differ by what their
//! coarser format rounds. Values of two unrelated models differ by 1.4 times their size.

use cadre_checkpoint::{Checkpoint, CheckpointError, Dtype};

use crate::error::{ReshapeError, Result};

/// Rows that are compared of a tensor.
const ROWS: usize = 4;

/// Experts of every layer whose matrices are compared.
const EXPERTS: usize = 4;

/// What was compared of two checkpoints of the same model.
#[derive(Debug, Clone, PartialEq)]
pub struct Sameness {
    /// Tensors that were looked at.
    pub n_tensors: usize,
    /// Values that were compared.
    pub n_values: usize,
    /// The largest difference of a tensor, as a part of its size: the root of the mean squares of both.
    pub worst: f64,
    /// The tensor that it is of.
    pub worst_tensor: String,
}

/// Compares two checkpoints.
///
/// # Errors
/// They are of another architecture, size or rule of routing, or a tensor differs by more than its format explains: the text
/// names it.
pub fn same_model(one: &Checkpoint, other: &Checkpoint) -> Result<Sameness> {
    let differ = |problem: String| ReshapeError::OtherModel {
        one: one.origin().to_owned(),
        other: other.origin().to_owned(),
        problem,
    };
    if let Some(problem) = other_sizes(one, other) {
        return Err(differ(problem));
    }
    let mut found = Sameness {
        n_tensors: 0,
        n_values: 0,
        worst: 0.0,
        worst_tensor: String::new(),
    };
    for name in names(one) {
        let (Some((a, shape)), Some((b, other_shape))) =
            (one.tensor_info(&name), other.tensor_info(&name))
        else {
            return Err(differ(format!("tensor `{name}` is in one of them only")));
        };
        if shape != other_shape {
            return Err(differ(format!(
                "tensor `{name}` has shape {shape:?} in one and {other_shape:?} in the other"
            )));
        }
        let (difference, n) = difference(one, other, &name)?;
        let allowed = allowed(a).max(allowed(b));
        if difference > allowed {
            return Err(differ(format!(
                "values of tensor `{name}` differ by {:.1} % of their size, {:.1} % is what {a} and {b} explain",
                100.0 * difference,
                100.0 * allowed
            )));
        }
        found.n_tensors += 1;
        found.n_values += n;
        if difference > found.worst {
            found.worst = difference;
            found.worst_tensor = name;
        }
    }
    Ok(found)
}

/// What is not alike of the computation.
fn other_sizes(one: &Checkpoint, other: &Checkpoint) -> Option<String> {
    let (a, b) = (one.config(), other.config());
    if a.model_type != b.model_type {
        return Some(format!(
            "one is {}, the other {}",
            a.model_type, b.model_type
        ));
    }
    let sizes = |c: &cadre_checkpoint::ModelConfig| {
        [
            ("hidden_size", c.hidden_size),
            ("num_hidden_layers", c.n_layers),
            ("vocab_size", c.vocab_size),
            ("experts per token", c.moe.top_k),
            ("width of experts", c.moe.intermediate_size),
        ]
    };
    let mut pairs = sizes(a).into_iter().zip(sizes(b));
    if let Some(((key, a), (_, b))) = pairs.find(|((_, a), (_, b))| a != b) {
        return Some(format!("{key} is {a} in one and {b} in the other"));
    }
    let counts = |c: &cadre_checkpoint::ModelConfig| -> Vec<(usize, usize)> {
        c.moe.layers.iter().copied().zip(c.moe.counts()).collect()
    };
    (counts(a) != counts(b)).then(|| "their layers have different numbers of experts".to_owned())
}

/// The tensors that are compared.
fn names(checkpoint: &Checkpoint) -> Vec<String> {
    let config = checkpoint.config();
    let mut names = vec!["model.embed_tokens.weight".to_owned()];
    for layer in &config.moe.layers {
        let mlp = format!("model.layers.{layer}.mlp");
        let n = config.n_experts_in(*layer);
        let step = n.div_ceil(EXPERTS).max(1);
        for part in ["gate.weight", "gate.bias", "gate.e_score_correction_bias"] {
            names.push(format!("{mlp}.{part}"));
        }
        for expert in (0..n).step_by(step) {
            for part in ["gate_proj", "up_proj", "down_proj"] {
                names.push(format!("{mlp}.experts.{expert}.{part}.weight"));
            }
        }
    }
    names.retain(|name| checkpoint.tensor_info(name).is_some());
    names
}

/// The root of the mean square of the differences over that of the values, and how many were compared.
fn difference(
    one: &Checkpoint,
    other: &Checkpoint,
    name: &str,
) -> Result<(f64, usize), CheckpointError> {
    let (a, b) = (rows(one, name)?, rows(other, name)?);
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let apart = squares(&mut a.iter().zip(&b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let size = squares(&mut a.iter().map(|x| f64::from(*x)))
        .max(squares(&mut b.iter().map(|x| f64::from(*x))));
    let relative = if size > 0.0 {
        (apart / size).sqrt()
    } else {
        0.0
    };
    // Not a number is never close.
    Ok((
        if relative.is_finite() {
            relative
        } else {
            f64::INFINITY
        },
        a.len(),
    ))
}

/// Values of a few rows, spread over the tensor.
fn rows(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>, CheckpointError> {
    let view = checkpoint.tensor(name)?;
    let cols = view.shape.last().copied().unwrap_or(1);
    let n_rows = view.len() / cols.max(1);
    let row_bytes = view.dtype.n_bytes(cols).unwrap_or(0);
    let values = if n_rows <= ROWS || row_bytes == 0 || view.scales.is_some() {
        let all = view.to_f32();
        match n_rows <= ROWS {
            true => all,
            false => picked(n_rows)
                .flat_map(|row| all[row * cols..][..cols].to_vec())
                .collect(),
        }
    } else {
        picked(n_rows)
            .flat_map(|row| {
                view.dtype
                    .decode(&view.bytes[row * row_bytes..][..row_bytes])
            })
            .collect()
    };
    checkpoint.release(&view.bytes);
    Ok(values)
}

fn picked(n_rows: usize) -> impl Iterator<Item = usize> {
    (0..ROWS).map(move |at| at * (n_rows - 1) / (ROWS - 1))
}

/// How far values of a format may be from those that it was made of: about twice what it rounds normal values by.
fn allowed(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => 0.004,
        // Three bits of mantissa.
        Dtype::F8E4M3 => 0.06,
        _ => {
            let bits = dtype.n_bytes(256).map_or(8.0, |bytes| bytes as f64 / 32.0);
            3.0 * 2.0_f64.powf(-bits).max(0.004)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cadre_checkpoint::{Conversion, ConvertOptions, ConvertTo, QuantizeOptions, TargetDtype};
    use cadre_testkit::TinyMoe;

    #[test]
    fn every_format_that_is_written_is_the_same_model_and_no_other_is() {
        let wide = |seed: u64| {
            TinyMoe::default()
                .seed(seed)
                .configure(|config| config.moe.intermediate_size = 256)
        };
        let wide = |seed| {
            wide(seed)
                .configure(|config| config.hidden_size = 256)
                .build()
                .unwrap()
        };
        let (one, two) = (wide(1), wide(2));
        let (one, two) = (one.open().unwrap(), two.open().unwrap());
        let folder = tempfile::tempdir().unwrap();
        for format in Dtype::all().filter(|format| format.can_encode()) {
            let target = ConvertTo::Gguf {
                max_part_bytes: None,
            };
            let options = ConvertOptions {
                target,
                dtype: TargetDtype::Is(format),
                allow_differences: true,
                quantize: QuantizeOptions::default(),
            };
            let Ok(conversion) = Conversion::plan(&one, "one", options) else {
                continue;
            };
            let path = folder.path().join(format!("{format}.gguf"));
            conversion.write(&path, &mut |_| true).unwrap();
            let made = Checkpoint::open(&path).unwrap();
            let same = same_model(&made, &one).unwrap();
            println!("{format}: {:.4} of {:.4}", same.worst, allowed(format));
            assert!(same.n_tensors == 1 + 2 * (1 + 12) && same.n_values > 10_000);
            let error = same_model(&made, &two).unwrap_err().to_string();
            assert!(error.contains("model.embed_tokens.weight"), "{error}");
            std::fs::remove_file(&path).unwrap();
        }
        let other = TinyMoe::default().build().unwrap();
        let error = same_model(&one, &other.open().unwrap()).unwrap_err();
        assert!(error.to_string().contains("hidden_size"), "{error}");
    }
}
