//! RMSNorm: rows scaled to a root mean square of 1, then by a learned weight.

use cadre_kernels::Compute;

/// The norm's weight and epsilon.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    pub(crate) fn new(weight: Vec<f32>, eps: f32) -> Self {
        Self { weight, eps }
    }

    /// `out_td = norm(x_td)`, row by row.
    pub(crate) fn forward(&self, compute: &Compute, x_td: &[f32], out_td: &mut [f32]) {
        let width = self.weight.len();
        assert_eq!(x_td.len(), out_td.len(), "input and output of one shape");
        // Four operations per value, counted like multiplications.
        compute.for_each_chunk(out_td, width, 4 * width, |t, out| {
            let x = &x_td[t * width..][..width];
            compute.kernels().rms_norm(x, &self.weight, self.eps, out);
        });
    }

    /// Norms one row in place.
    pub(crate) fn forward_row(&self, compute: &Compute, x: &mut [f32]) {
        compute
            .kernels()
            .rms_norm_in_place(x, &self.weight, self.eps);
    }
}
