//! A matrix as a product of two thin ones plus a few rows: the compression of MC-SMoE.
//!
//! Paper: Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, Li et al., 2023, arXiv
//! 2310.01334.
//! Rule: `W = U V + S`, `U V` nearest to `W` among products of that rank, `S` the rest, of which the rows that matter most
//! stay.
//! Differs from paper: nothing is tuned here, so that rows are ranked by their size and the same number stays in every matrix.
//! With all rows, `cadre tune --recover --rest` goes on as the paper does (`train/src/methods/prune_rows.rs`).
//! Check: below; `tests/factor.rs`.

use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};
use cadre_routing::filters::mix;

/// Rounds of subspace iteration; the error of the product is then that of the best one to a few digits.
const ROUNDS: usize = 12;

/// `[n_out, n_in]`, row-major throughout.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Factors {
    /// `[rank + rows, n_in]`: the inner matrix of the product, then the rows.
    pub(crate) inner: Vec<f32>,
    /// `[n_out, rank]`.
    pub(crate) outer: Vec<f32>,
    /// Where the rows belong, ascending.
    pub(crate) rows: Vec<usize>,
}

/// `values`, `[n_out, n_in]`, as a product of rank `rank`, at most either size, and `n_rows` rows.
pub(crate) fn factor(
    values: &[f32],
    [n_out, n_in]: [usize; 2],
    (rank, n_rows): (usize, usize),
) -> Factors {
    let whole = || Mat::new(values, n_out, n_in);
    // Subspace iteration from fixed numbers (Halko et al., 2011, arXiv 0909.4061).
    let mut right: Vec<f32> = (0..n_in * rank)
        .map(|at| (mix(at as u64) >> 40) as f32 / (1u64 << 24) as f32 - 0.5)
        .collect();
    let mut left = vec![0.0; n_out * rank];
    for round in 0..=ROUNDS {
        let c = MatMut::new(&mut left, n_out, rank);
        gemm(c, Write::Set, 1.0, whole(), Mat::new(&right, n_in, rank), 1);
        orthonormal(&mut left, rank);
        if round < ROUNDS {
            let c = MatMut::new(&mut right, n_in, rank);
            gemm(
                c,
                Write::Set,
                1.0,
                whole().t(),
                Mat::new(&left, n_out, rank),
                1,
            );
            orthonormal(&mut right, rank);
        }
    }
    let mut inner = vec![0.0; rank * n_in];
    let c = MatMut::new(&mut inner, rank, n_in);
    gemm(
        c,
        Write::Set,
        1.0,
        Mat::new(&left, n_out, rank).t(),
        whole(),
        1,
    );
    let mut rest = values.to_vec();
    let c = MatMut::new(&mut rest, n_out, n_in);
    let (a, b) = (Mat::new(&left, n_out, rank), Mat::new(&inner, rank, n_in));
    gemm(c, Write::Add, -1.0, a, b, 1);
    let sizes: Vec<f64> = rest
        .chunks_exact(n_in)
        .map(|row| row.iter().map(|v| f64::from(*v).powi(2)).sum())
        .collect();
    let mut rows: Vec<usize> = (0..n_out).collect();
    rows.sort_by(|a, b| sizes[*b].total_cmp(&sizes[*a]).then(a.cmp(b)));
    rows.truncate(n_rows);
    rows.sort_unstable();
    for row in &rows {
        inner.extend_from_slice(&rest[row * n_in..(row + 1) * n_in]);
    }
    Factors {
        inner,
        outer: left,
        rows,
    }
}

impl Factors {
    /// The matrix that they stand for, `[n_out, n_in]`.
    pub(crate) fn multiplied(&self, [n_out, n_in]: [usize; 2]) -> Vec<f32> {
        let rank = self.outer.len() / n_out.max(1);
        let mut values = vec![0.0; n_out * n_in];
        let c = MatMut::new(&mut values, n_out, n_in);
        let (thin, rest) = self.inner.split_at(rank * n_in);
        let (a, b) = (
            Mat::new(&self.outer, n_out, rank),
            Mat::new(thin, rank, n_in),
        );
        gemm(c, Write::Set, 1.0, a, b, 1);
        for (row, rest) in self.rows.iter().zip(rest.chunks_exact(n_in)) {
            for (value, rest) in values[row * n_in..].iter_mut().zip(rest) {
                *value += rest;
            }
        }
        values
    }
}

/// Makes the columns of a `[n, cols]` matrix orthonormal; a column that the ones before span becomes 0.
fn orthonormal(values: &mut [f32], cols: usize) {
    let n = values.len() / cols.max(1);
    let column = |values: &[f32], col: usize| -> Vec<f64> {
        (0..n)
            .map(|row| f64::from(values[row * cols + col]))
            .collect()
    };
    let mut done: Vec<Vec<f64>> = Vec::with_capacity(cols);
    for col in 0..cols {
        let mut own = column(values, col);
        let size = |own: &[f64]| own.iter().map(|v| v * v).sum::<f64>().sqrt();
        let before = size(&own);
        // Twice is enough.
        for _ in 0..2 {
            for other in &done {
                let along: f64 = own.iter().zip(other).map(|(a, b)| a * b).sum();
                own.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
        }
        let after = size(&own);
        let scale = if after > 1e-10 * before {
            1.0 / after
        } else {
            0.0
        };
        own.iter_mut().for_each(|v| *v *= scale);
        for (row, value) in own.iter().enumerate() {
            values[row * cols + col] = *value as f32;
        }
        done.push(own);
    }
}

#[cfg(test)]
mod tests {
    use cadre_testkit::Random;

    use super::*;

    const SHAPE: [usize; 2] = [14, 22];

    fn error(a: &[f32], b: &[f32]) -> f64 {
        let pairs = a.iter().zip(b);
        pairs
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum::<f64>()
            .sqrt()
    }

    /// Random values of rank 3, with two rows of their own.
    fn planted() -> Vec<f32> {
        let mut random = Random::new(3);
        let (u, v) = (random.values(14 * 3, 1.0), random.values(3 * 22, 1.0));
        let mut values = vec![0.0; 14 * 22];
        for (row, values) in values.chunks_exact_mut(22).enumerate() {
            for (col, value) in values.iter_mut().enumerate() {
                *value = (0..3).map(|r| u[row * 3 + r] * v[r * 22 + col]).sum();
                if row == 4 || row == 9 {
                    *value += 0.1 * random.uniform();
                }
            }
        }
        values
    }

    #[test]
    fn what_is_planted_is_found() {
        let values = planted();
        let found = factor(&values, SHAPE, (3, 2));
        assert_eq!(found.rows, [4, 9]);
        assert_eq!((found.inner.len(), found.outer.len()), (5 * 22, 14 * 3));
        // The rows pull at the subspace, so that the others are near, not met.
        let whole = error(&values, &vec![0.0; values.len()]);
        assert!(error(&values, &found.multiplied(SHAPE)) < 0.02 * whole);
        // Rows that are kept are exact whatever the product is.
        let back = found.multiplied(SHAPE);
        assert!(error(&values[4 * 22..5 * 22], &back[4 * 22..5 * 22]) < 1e-4);
    }

    #[test]
    fn more_rank_and_more_rows_lose_less_down_to_nothing() {
        let mut random = Random::new(9);
        let values = random.values(14 * 22, 1.0);
        let loss = |rank, rows| {
            let found = factor(&values, SHAPE, (rank, rows));
            error(&values, &found.multiplied(SHAPE))
        };
        let (few, more, all) = (loss(2, 0), loss(6, 0), loss(14, 0));
        assert!(few > more && more > 0.5 && all < 1e-4, "{few} {more} {all}");
        assert!(loss(2, 5) < few && loss(2, 14) < 1e-4);
    }

    #[test]
    fn the_product_is_nearly_the_best_one() {
        // Singular values 2^-i: the best product of rank 3 misses the sum of squares of the others.
        let mut random = Random::new(5);
        let (mut u, mut v) = (random.values(14 * 14, 1.0), random.values(22 * 14, 1.0));
        orthonormal(&mut u, 14);
        orthonormal(&mut v, 14);
        let mut values = vec![0.0f32; 14 * 22];
        for (row, values) in values.chunks_exact_mut(22).enumerate() {
            for (col, value) in values.iter_mut().enumerate() {
                let sum =
                    (0..14).map(|r| 0.5f32.powi(r as i32) * u[row * 14 + r] * v[col * 14 + r]);
                *value = sum.sum();
            }
        }
        let best: f64 = (3..14).map(|r| 0.25f64.powi(r)).sum::<f64>().sqrt();
        let found = factor(&values, SHAPE, (3, 0));
        assert!((error(&values, &found.multiplied(SHAPE)) / best - 1.0).abs() < 1e-3);
    }

    #[test]
    fn zeros_are_zeros() {
        let found = factor(&[0.0; 12], [3, 4], (2, 1));
        assert_eq!(found.multiplied([3, 4]), [0.0; 12]);
    }
}
