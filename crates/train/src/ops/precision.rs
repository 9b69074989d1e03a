//! Which numbers the large products of training are made of.

use cadre_kernels::bf16_gemm::Bf16Gemm;
use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};
use cadre_kernels::zeros;
use serde::{Deserialize, Serialize};

/// Numbers that are multiplied. Sums, weights, gradients, norms, softmax and router are f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bf16, where the CPU multiplies those; f32 elsewhere.
    Bf16,
}

/// What the forward pass leaves to the backward pass to compute again; the numbers are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// The gate and up products of experts: a ninth more work in them, and as many values less per layer as picks times
    /// twice an expert's width.
    Experts,
    /// Whole decoder layers: of the forward pass stay the inputs of layers, and each layer is computed twice.
    Layer,
}

/// How experts are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numerics {
    /// What products are made of.
    pub precision: Precision,
    /// What is computed again.
    pub recompute: Recompute,
}

impl From<Precision> for Numerics {
    fn from(precision: Precision) -> Self {
        let recompute = Recompute::None;
        Self {
            precision,
            recompute,
        }
    }
}

impl Precision {
    /// The kernels, where this is bf16 and the CPU has them.
    pub(super) fn bf16(self) -> Option<Bf16Gemm> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Bf16Gemm::native(),
        }
    }

    /// As recipes write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// What this CPU makes of it.
    #[must_use]
    pub fn here(self) -> Self {
        self.bf16().map_or(Self::F32, |_| Self::Bf16)
    }

    /// `a b`, row after row.
    pub(super) fn product(self, a: Mat<'_>, b: Mat<'_>, threads: usize) -> Vec<f32> {
        let Some(bf16) = self.bf16() else {
            let (m, n) = (a.dims()[0], b.dims()[1]);
            let mut c = zeros(m * n);
            gemm(MatMut::new(&mut c, m, n), Write::Set, 1.0, a, b, threads);
            return c;
        };
        bf16.product(a, b, threads)
    }
}
