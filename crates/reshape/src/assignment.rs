//! The linear assignment problem: which column goes to which row so that the sum is largest.

/// For every row of the square matrix `values` (`[n, n]`, row-major, finite) its column, each once, with the largest sum.
///
/// Shortest augmenting paths with potentials (Jonker and Volgenant, 1987, without its initial reductions): `O(n^3)` time,
/// `O(n)` memory beside the matrix. Of equal solutions it gives one that depends on nothing but the matrix.
pub(crate) fn assignment(values: &[f64], n: usize) -> Vec<usize> {
    // Columns and rows count from 1, 0 being none; the cost is the value with its sign turned.
    let mut of_row = vec![0.0; n + 1];
    let mut of_column = vec![0.0; n + 1];
    let mut row_of = vec![0usize; n + 1];
    let mut before = vec![0usize; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        let mut column = 0;
        let mut least = vec![f64::INFINITY; n + 1];
        let mut used = vec![false; n + 1];
        loop {
            used[column] = true;
            let (here, mut delta, mut next) = (row_of[column], f64::INFINITY, 0);
            let line = &values[(here - 1) * n..here * n];
            for at in 1..=n {
                if used[at] {
                    continue;
                }
                let reduced = -line[at - 1] - of_row[here] - of_column[at];
                if reduced < least[at] {
                    least[at] = reduced;
                    before[at] = column;
                }
                if least[at] < delta {
                    delta = least[at];
                    next = at;
                }
            }
            for at in 0..=n {
                if used[at] {
                    of_row[row_of[at]] += delta;
                    of_column[at] -= delta;
                } else {
                    least[at] -= delta;
                }
            }
            column = next;
            if row_of[column] == 0 {
                break;
            }
        }
        while column != 0 {
            let previous = before[column];
            row_of[column] = row_of[previous];
            column = previous;
        }
    }
    let mut columns = vec![0; n];
    for column in 1..=n {
        columns[row_of[column] - 1] = column - 1;
    }
    columns
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(values: &[f64], n: usize, columns: &[usize]) -> f64 {
        let rows = columns.iter().enumerate();
        rows.map(|(row, column)| values[row * n + column]).sum()
    }

    /// The largest sum over all permutations of `left`.
    fn best(values: &[f64], n: usize, row: usize, left: &[usize]) -> f64 {
        if row == n {
            return 0.0;
        }
        let take = |column: &usize| {
            let rest: Vec<usize> = left.iter().copied().filter(|c| c != column).collect();
            values[row * n + column] + best(values, n, row + 1, &rest)
        };
        left.iter().map(take).fold(f64::NEG_INFINITY, f64::max)
    }

    #[test]
    fn permutations_are_found_again() {
        let hidden = [3, 0, 4, 1, 2];
        let mut values = vec![0.0; 25];
        for (row, column) in hidden.iter().enumerate() {
            values[row * 5 + column] = 1.0;
        }
        assert_eq!(assignment(&values, 5), hidden);
        assert_eq!(assignment(&[], 0), [0usize; 0]);
        assert_eq!(assignment(&[-3.0], 1), [0]);
    }

    proptest! {
        #[test]
        fn no_permutation_is_better(n in 1usize..7, seed in prop::collection::vec(-100i32..100, 49)) {
            let values: Vec<f64> = seed[..n * n].iter().map(|v| f64::from(*v)).collect();
            let found = assignment(&values, n);
            let mut sorted = found.clone();
            sorted.sort_unstable();
            let all: Vec<usize> = (0..n).collect();
            prop_assert_eq!(&sorted, &all);
            prop_assert_eq!(sum(&values, n, &found), best(&values, n, 0, &all));
        }
    }
}
