//! The neurons of one expert in the order of another's: permuting them changes nothing that the expert computes, and
//! averages mean something only between neurons that do the same.

use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};

use crate::assignment::assignment;

/// The matrices of an expert, `gate` and `up` `[width, hidden]`, `down` `[hidden, width]`, row-major.
#[derive(Debug)]
pub(crate) struct Matrices {
    pub(crate) gate: Vec<f32>,
    pub(crate) up: Vec<f32>,
    pub(crate) down: Vec<f32>,
    pub(crate) width: usize,
    pub(crate) hidden: usize,
}

/// For every neuron of `reference` the neuron of `other` that takes its place: the assignment that makes the two experts
/// nearest, by the sum of the products of all rows of gate and up and of all columns of down (Li et al., arXiv 2310.01334,
/// for SwiGLU).
pub(crate) fn order(reference: &Matrices, other: &Matrices) -> Vec<usize> {
    let (f, d) = (reference.width, reference.hidden);
    let mut products = vec![0.0f32; f * f];
    let rows = [(&reference.gate, &other.gate), (&reference.up, &other.up)];
    for (at, (a, b)) in rows.into_iter().enumerate() {
        let write = if at == 0 { Write::Set } else { Write::Add };
        let c = MatMut::new(&mut products, f, f);
        gemm(c, write, 1.0, Mat::new(a, f, d), Mat::new(b, f, d).t(), 1);
    }
    let c = MatMut::new(&mut products, f, f);
    let (a, b) = (Mat::new(&reference.down, d, f), Mat::new(&other.down, d, f));
    gemm(c, Write::Add, 1.0, a.t(), b, 1);
    let values: Vec<f64> = products.iter().map(|v| f64::from(*v)).collect();
    assignment(&values, f)
}

/// Rows of a `[order.len(), cols]` matrix in another order: row `r` becomes row `order[r]` of `values`.
pub(crate) fn rows(values: &[f32], order: &[usize]) -> Vec<f32> {
    let cols = values.len() / order.len().max(1);
    let row = |from: &usize| &values[from * cols..(from + 1) * cols];
    order.iter().flat_map(row).copied().collect()
}

/// Columns of a `[rows, order.len()]` matrix in another order.
pub(crate) fn columns(values: &[f32], order: &[usize]) -> Vec<f32> {
    let lines = values.chunks_exact(order.len().max(1));
    lines
        .flat_map(|line| order.iter().map(|from| line[*from]))
        .collect()
}

#[cfg(test)]
mod tests {
    use cadre_testkit::Random;

    use super::*;

    fn expert(random: &mut Random, width: usize, hidden: usize) -> Matrices {
        let n = width * hidden;
        Matrices {
            gate: random.values(n, 1.0),
            up: random.values(n, 1.0),
            down: random.values(n, 1.0),
            width,
            hidden,
        }
    }

    fn permuted(expert: &Matrices, order: &[usize]) -> Matrices {
        Matrices {
            gate: rows(&expert.gate, order),
            up: rows(&expert.up, order),
            down: columns(&expert.down, order),
            ..*expert
        }
    }

    #[test]
    fn a_permuted_twin_is_brought_back() {
        let mut random = Random::new(7);
        let (width, hidden) = (24, 10);
        let one = expert(&mut random, width, hidden);
        let shuffle: Vec<usize> = (0..width).map(|i| (i * 7 + 3) % width).collect();
        let mut twin = permuted(&one, &shuffle);
        for values in [&mut twin.gate, &mut twin.up, &mut twin.down] {
            let noise = random.values(values.len(), 0.01);
            values.iter_mut().zip(noise).for_each(|(v, n)| *v += n);
        }
        let found = order(&one, &twin);
        let back = permuted(&twin, &found);
        let far = |a: &[f32], b: &[f32]| {
            let pairs = a.iter().zip(b);
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        assert!(far(&back.gate, &one.gate) < 0.02 && far(&back.down, &one.down) < 0.02);
        assert!(far(&twin.gate, &one.gate) > 0.5);
    }

    /// What an expert makes of `x`: `down (silu(gate x) * (up x))`.
    fn output(expert: &Matrices, x: &[f32]) -> Vec<f64> {
        let product = |rows: &[f32], x: &[f64]| -> Vec<f64> {
            let rows = rows.chunks_exact(x.len());
            rows.map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
                .collect()
        };
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let (gate, up) = (product(&expert.gate, &x), product(&expert.up, &x));
        let pairs = gate.iter().zip(&up);
        let inner: Vec<f64> = pairs.map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        product(&expert.down, &inner)
    }

    #[test]
    fn alignment_changes_no_output_and_never_moves_experts_apart() {
        let mut random = Random::new(21);
        for (width, hidden) in [(1, 3), (7, 5), (24, 10), (13, 29)] {
            let (one, other) = (
                expert(&mut random, width, hidden),
                expert(&mut random, width, hidden),
            );
            let aligned = permuted(&other, &order(&one, &other));
            let x = random.values(hidden, 1.0);
            for (a, b) in output(&other, &x).iter().zip(output(&aligned, &x)) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
            let apart = |to: &Matrices| -> f64 {
                let parts = [
                    (&one.gate, &to.gate),
                    (&one.up, &to.up),
                    (&one.down, &to.down),
                ];
                let pairs = parts.into_iter().flat_map(|(a, b)| a.iter().zip(b));
                pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum()
            };
            assert!(apart(&aligned) <= apart(&other) + 1e-6, "{width} {hidden}");
        }
    }

    #[test]
    fn rows_and_columns_move_together() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(rows(&values, &[2, 0, 1]), [5.0, 6.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(columns(&values, &[2, 0, 1]), [3.0, 1.0, 2.0, 6.0, 4.0, 5.0]);
    }
}
