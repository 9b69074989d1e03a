//! Experts in factors: every matrix is a product of two thin ones plus a few rows of its own.
//!
//! Paper: Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, Li et al., 2023, arXiv
//! 2310.01334, whose compressed experts are tuned as such.
//! Rule: `W = outer inner[..rank] + P inner[rank..]`, with P adding each of the rows behind the first `rank` to an output of
//! its own. Which outputs these are is given by the checkpoint and does not move.
//! Shapes: E experts, inner `[E, rank + rows, n_in]`, outer `[E, n_out, rank]`, W `[E, n_out, n_in]`. Experts with fewer rows
//! than others have values behind theirs that nothing reads.
//! Differs from paper: it is multiplied out for each pass, which costs memory and not what is stored.
//! Check: layers::factored::tests, tests/recover.rs.

use crate::init::Init;
use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use cadre_checkpoint::Factors;

/// A matrix of every expert of a layer.
#[derive(Module, Debug)]
pub struct Factored {
    /// `[E, rank + rows, n_in]`
    pub inner: Param<Tensor<3>>,
    /// `[E, n_out, rank]`
    pub outer: Param<Tensor<3>>,
    /// For each expert the outputs that its rows are added to, below `n_out`
    #[module(skip)]
    pub rows: Vec<Vec<usize>>,
}

/// The matrices of all experts of a layer.
#[derive(Module, Debug)]
pub struct Thin {
    /// `[E, I, d_model]`
    pub gate: Factored,
    /// `[E, I, d_model]`
    pub up: Factored,
    /// `[E, d_model, I]`
    pub down: Factored,
}

impl Factored {
    fn init(
        [n, n_out, n_in]: [usize; 3],
        (rank, rows): (usize, Vec<usize>),
        init: &Init,
        (name, scale): (&str, f32),
    ) -> Self {
        let matrix = |part: &str, shape, scale| {
            Param::from_tensor(init.normal(&format!("{name}.{part}"), shape, scale))
        };
        let most = rows.iter().copied().max().unwrap_or(0);
        Self {
            inner: matrix("inner", [n, rank + most, n_in], 1.0),
            outer: matrix("outer", [n, n_out, rank], scale),
            rows: rows.into_iter().map(|n| (0..n).collect()).collect(),
        }
    }

    /// The matrices multiplied, `[E, n_out, n_in]`.
    #[must_use]
    pub fn whole(&self) -> Tensor<3> {
        let (inner, outer) = (self.inner.val(), self.outer.val());
        let [n, n_out, rank] = outer.dims();
        let n_rows = inner.dims()[1] - rank;
        if n_rows == 0 {
            return outer.matmul(inner);
        }
        let mut places = vec![0.0_f32; n * n_out * n_rows];
        for (expert, rows) in self.rows.iter().enumerate() {
            for (at, row) in rows.iter().enumerate() {
                places[(expert * n_out + row) * n_rows + at] = 1.0;
            }
        }
        let places = TensorData::new(places, [n, n_out, n_rows]);
        let places = Tensor::from_data(places, &outer.device());
        Tensor::cat(vec![outer, places], 2).matmul(inner)
    }
}

impl Thin {
    /// Random parameters of `n` experts of width `width`, of the `at`-th layer with experts.
    #[must_use]
    pub fn init(
        [n, d, width]: [usize; 3],
        (factors, at): (&Factors, usize),
        init: &Init,
        (name, residual_scale): (&str, f32),
    ) -> Self {
        let part = |part: usize, [n_out, n_in]: [usize; 2], scale| {
            let rows = (0..n).map(|expert| factors.rows_of(at, expert)[part]);
            let sizes = (factors.rank, rows.collect());
            let name = format!("{name}.{}", Factors::PARTS[part]);
            Factored::init([n, n_out, n_in], sizes, init, (&name, scale))
        };
        Self {
            gate: part(0, [width, d], 1.0),
            up: part(1, [width, d], 1.0),
            down: part(2, [d, width], residual_scale),
        }
    }

    /// `[E, 2 I, d_model]`, gate rows first, and `[E, d_model, I]`.
    #[must_use]
    pub fn whole(&self) -> [Tensor<3>; 2] {
        let gate_up = Tensor::cat(vec![self.gate.whole(), self.up.whole()], 1);
        [gate_up, self.down.whole()]
    }

    /// The matrices with the names of their parts in checkpoints.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, &Factored); 3] {
        [
            ("gate_proj", &self.gate),
            ("up_proj", &self.up),
            ("down_proj", &self.down),
        ]
    }

    /// As [`Self::parts`], to be changed.
    pub fn parts_mut(&mut self) -> [(&'static str, &mut Factored); 3] {
        [
            ("gate_proj", &mut self.gate),
            ("up_proj", &mut self.up),
            ("down_proj", &mut self.down),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn rows_are_added_where_they_belong() {
        let device = Device::flex();
        let three = |values: &[f32], dims: [usize; 3]| {
            Param::from_tensor(Tensor::from_data(
                TensorData::new(values.to_vec(), dims),
                &device,
            ))
        };
        // Two experts, three outputs of two inputs, rank 1 and one row.
        let matrix = Factored {
            inner: three(&[1.0, 2.0, 10.0, 20.0, 3.0, 4.0, 30.0, 40.0], [2, 2, 2]),
            outer: three(&[1.0, 2.0, 3.0, -1.0, 0.0, 1.0], [2, 3, 1]),
            rows: vec![vec![1], vec![2]],
        };
        let whole: Vec<f32> = matrix.whole().try_into_vec_as().unwrap();
        let first = [1.0, 2.0, 12.0, 24.0, 3.0, 6.0];
        let second = [-3.0, -4.0, 0.0, 0.0, 33.0, 44.0];
        assert_eq!(whole, [first, second].concat());
        let without = Factored {
            inner: three(&[1.0, 2.0], [1, 1, 2]),
            outer: three(&[2.0, 0.5], [1, 2, 1]),
            rows: vec![Vec::new()],
        };
        let whole: Vec<f32> = without.whole().try_into_vec_as().unwrap();
        assert_eq!(whole, [2.0, 4.0, 0.5, 1.0]);
    }
}
