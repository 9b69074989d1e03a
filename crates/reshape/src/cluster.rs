//! Which experts are alike: cosine or correlation of their router logits over all tokens, and clusters by average linkage.

/// Sums and products of the router logits of a layer, over tokens.
#[derive(Debug, Clone)]
pub(crate) struct Gram {
    n: usize,
    n_tokens: u64,
    sums: Vec<f64>,
    /// `[n, n]`, the upper half with the diagonal.
    products: Vec<f64>,
}

impl Gram {
    pub(crate) fn new(n: usize) -> Self {
        Self {
            n,
            n_tokens: 0,
            sums: vec![0.0; n],
            products: vec![0.0; n * n],
        }
    }

    /// Adds one token's logits `[n]`.
    pub(crate) fn add(&mut self, logits: &[f32]) {
        self.n_tokens += 1;
        for (i, a) in logits.iter().enumerate() {
            let a = f64::from(*a);
            self.sums[i] += a;
            let row = &mut self.products[i * self.n + i..(i + 1) * self.n];
            for (product, b) in row.iter_mut().zip(&logits[i..]) {
                *product += a * f64::from(*b);
            }
        }
    }

    /// Similarity of every two experts, `[n, n]`, from 0 to 1: `(cos + 1) / 2` of their logits, which are made to have
    /// mean 0 first if `centred` (the correlation then).
    pub(crate) fn similarity(&self, centred: bool) -> Vec<f64> {
        let (n, tokens) = (self.n, self.n_tokens.max(1) as f64);
        let product = |i: usize, j: usize| {
            let (i, j) = (i.min(j), i.max(j));
            let plain = self.products[i * n + j];
            match centred {
                true => plain - self.sums[i] * self.sums[j] / tokens,
                false => plain,
            }
        };
        let mut similarity = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                let length = (product(i, i) * product(j, j)).sqrt();
                // Logits that never change are like nothing but themselves.
                let cos = match length > 0.0 {
                    true => product(i, j) / length,
                    false => f64::from(u8::from(i == j)),
                };
                similarity[i * n + j] = (cos.clamp(-1.0, 1.0) + 1.0) / 2.0;
            }
        }
        similarity
    }
}

/// Clusters `members` into `n_clusters` by average linkage over `similarity` (`[n, n]`, `n` in all): the two clusters whose
/// members are most alike on average are joined until so many are left. Ties go to the lower ids. Clusters and their
/// members are ascending.
pub(crate) fn average_linkage(
    similarity: &[f64],
    n: usize,
    members: &[usize],
    n_clusters: usize,
) -> Vec<Vec<usize>> {
    let mut clusters: Vec<Vec<usize>> = members.iter().map(|id| vec![*id]).collect();
    // Sums of similarities between clusters; joined ones add up.
    let mut sums: Vec<Vec<f64>> = members
        .iter()
        .map(|i| members.iter().map(|j| similarity[i * n + j]).collect())
        .collect();
    while clusters.len() > n_clusters.max(1) {
        let mut best = (f64::NEG_INFINITY, 0, 1);
        for i in 0..clusters.len() {
            for j in i + 1..clusters.len() {
                let mean = sums[i][j] / (clusters[i].len() * clusters[j].len()) as f64;
                if mean > best.0 {
                    best = (mean, i, j);
                }
            }
        }
        let (_, i, j) = best;
        let joined = clusters.remove(j);
        clusters[i].extend(joined);
        let row = sums.remove(j);
        for (at, line) in sums.iter_mut().enumerate() {
            let other = if at < j { at } else { at + 1 };
            line[i] += row[other];
            line.remove(j);
        }
        let mut own = row;
        own.remove(j);
        for (sum, more) in sums[i].iter_mut().zip(own) {
            *sum += more;
        }
    }
    for cluster in &mut clusters {
        cluster.sort_unstable();
    }
    clusters.sort_unstable();
    clusters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarity_is_the_cosine_of_columns() {
        let rows = [[1.0f32, 2.0, -1.0], [3.0, 6.0, 0.0], [-2.0, -4.0, 5.0]];
        let mut gram = Gram::new(3);
        rows.iter().for_each(|row| gram.add(row));
        let plain = gram.similarity(false);
        assert!((plain[1] - 1.0).abs() < 1e-12 && (plain[0] - 1.0).abs() < 1e-12);
        // (-1 - 10) / sqrt(14 * 26), from a calculator.
        let cos = -11.0 / 364f64.sqrt();
        assert!((plain[2] - (cos + 1.0) / 2.0).abs() < 1e-12);
        assert_eq!(plain[2], plain[6]);
        // An offset common to all tokens is no similarity.
        let mut shifted = Gram::new(3);
        for row in &rows {
            shifted.add(&[row[0], row[1] + 100.0, row[2] - 7.0]);
        }
        let (a, b) = (gram.similarity(true), shifted.similarity(true));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-9));
        let mut constant = Gram::new(2);
        constant.add(&[0.0, 1.0]);
        assert_eq!(constant.similarity(false), [1.0, 0.5, 0.5, 1.0]);
    }

    #[test]
    fn the_most_alike_are_joined_first() {
        let mut similarity = vec![0.0; 25];
        let mut set = |i: usize, j: usize, value: f64| {
            similarity[i * 5 + j] = value;
            similarity[j * 5 + i] = value;
        };
        set(0, 3, 0.9);
        set(1, 4, 0.8);
        set(3, 4, 0.7);
        set(0, 1, 0.1);
        set(2, 0, 0.3);
        let all = [0, 1, 2, 3, 4];
        let clusters = |n| average_linkage(&similarity, 5, &all, n);
        assert_eq!(clusters(5).len(), 5);
        assert_eq!(clusters(4), [vec![0, 3], vec![1], vec![2], vec![4]]);
        assert_eq!(clusters(3), [vec![0, 3], vec![1, 4], vec![2]]);
        // 0-1 0.1, 0-4 0, 3-1 0, 3-4 0.7: 0.2 on average, above the 0.15 of 2 with 0 and 3.
        assert_eq!(clusters(2), [vec![0, 1, 3, 4], vec![2]]);
        assert_eq!(clusters(1), [all.to_vec()]);
        assert_eq!(
            average_linkage(&similarity, 5, &[1, 2, 4], 2),
            [vec![1, 4], vec![2]]
        );
    }
}
