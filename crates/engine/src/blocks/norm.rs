//! Norms: rows scaled to unit size, then by a learned weight.

use cadre_kernels::Compute;

/// A norm of one width.
#[derive(Debug)]
pub(crate) enum Norm {
    /// `x / rms(x) * weight`.
    Rms { weight: Vec<f32>, eps: f32 },
    /// `(x - mean(x)) / std(x) * weight + bias` when `centred` (LayerNorm), otherwise `x / rms(x) * weight + bias`.
    Biased {
        weight: Vec<f32>,
        bias: Vec<f32>,
        centred: bool,
        eps: f32,
    },
}

impl Norm {
    /// Values of a row.
    pub(crate) fn width(&self) -> usize {
        match self {
            Self::Rms { weight, .. } | Self::Biased { weight, .. } => weight.len(),
        }
    }

    /// `out_td = norm(x_td)`, row by row.
    pub(crate) fn forward(&self, compute: &Compute, x_td: &[f32], out_td: &mut [f32]) {
        let width = self.width();
        assert_eq!(x_td.len(), out_td.len(), "input and output of one shape");
        // Four operations per value, counted like multiplications.
        compute.for_each_chunk(out_td, width, 4 * width, |t, out| {
            out.copy_from_slice(&x_td[t * width..][..width]);
            self.row(compute, out);
        });
    }

    /// Norms every row of `x_td` in place.
    pub(crate) fn forward_in_place(&self, compute: &Compute, x_td: &mut [f32]) {
        let width = self.width();
        compute.for_each_chunk(x_td, width, 4 * width, |_, row| self.row(compute, row));
    }

    /// Norms one row in place.
    pub(crate) fn row(&self, compute: &Compute, x: &mut [f32]) {
        match self {
            Self::Rms { weight, eps } => compute.kernels().rms_norm_in_place(x, weight, *eps),
            Self::Biased {
                weight,
                bias,
                centred,
                eps,
            } => {
                let n = x.len() as f32;
                if *centred {
                    let mean = x.iter().sum::<f32>() / n;
                    x.iter_mut().for_each(|v| *v -= mean);
                }
                let variance = x.iter().map(|v| v * v).sum::<f32>() / n;
                let scale = 1.0 / (variance + eps).sqrt();
                for ((x, weight), bias) in x.iter_mut().zip(weight).zip(bias) {
                    *x = *x * scale * weight + bias;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cadre_kernels::Kernels;

    #[test]
    fn a_layer_norm_by_hand() {
        let compute = Compute::new(Kernels::detect(), 1);
        let norm = Norm::Biased {
            weight: vec![2.0, 1.0, 1.0],
            bias: vec![0.5, 0.0, -1.0],
            centred: true,
            eps: 0.0,
        };
        // Mean 2, variance 2/3.
        let mut out = [0.0; 3];
        norm.forward(&compute, &[1.0, 2.0, 3.0], &mut out);
        let unit = 1.5f32.sqrt();
        let expected = [0.5 - 2.0 * unit, 0.0, unit - 1.0];
        for (got, expected) in out.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{out:?}");
        }
    }
}
