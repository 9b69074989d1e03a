//! The feed-forward beside the experts of PR-MoE: every token uses it, and the experts correct it.
//!
//! Source: DeepSpeed-MoE, Rajbhandari et al., 2022, arXiv 2201.05596. The learned mixture is that of DeepSpeed's code: the
//! experts' part is weighted by the first of two softmax values, the feed-forward by the second.

use cadre_kernels::{Compute, MatmulScratch};

use super::{FeedForward, FeedForwardScratch};

/// A feed-forward and how it joins the experts.
#[derive(Debug)]
pub(crate) struct Residual {
    pub(crate) mlp: FeedForward,
    /// Weight `[2, d]` and bias of the two coefficients; the parts are added without.
    pub(crate) coefficient: Option<(Vec<f32>, [f32; 2])>,
}

impl Residual {
    /// `out_td = c0 * out_td + c1 * self(x_td)`, with the feed-forward's output in `y_td`; both 1 without coefficients.
    pub(crate) fn add(
        &self,
        compute: &Compute,
        (x_td, y_td): (&[f32], &mut [f32]),
        out_td: &mut [f32],
        scratch: (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        self.mlp.forward(compute, x_td, y_td, scratch);
        let kernels = compute.kernels();
        let d = self.mlp.down_proj.n_out();
        compute.for_each_chunk(out_td, d, 4 * d, |row, out| {
            let mut of_mlp = 1.0;
            if let Some((weight, bias)) = &self.coefficient {
                let x = &x_td[row * d..][..d];
                let logit = |at: usize| kernels.dot(&weight[at * d..][..d], x) + bias[at];
                // A softmax of two is a sigmoid of their difference.
                let of_experts = 1.0 / (1.0 + (logit(1) - logit(0)).exp());
                of_mlp = 1.0 / (1.0 + (logit(0) - logit(1)).exp());
                out.iter_mut().for_each(|value| *value *= of_experts);
            }
            kernels.axpy(of_mlp, &y_td[row * d..][..d], out);
        });
    }
}
