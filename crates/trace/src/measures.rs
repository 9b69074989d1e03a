//! The formulas: shares, entropy and specialisation of histograms of picks, as pure functions.
//!
//! Load balance (CV, MaxVio) and router entropy are `cadre_routing::Loads`, shared with the trainer.

/// Counts as fractions of their sum; all zeros when nothing was counted.
pub(crate) fn shares(counts: &[u64]) -> Vec<f64> {
    let sum: u64 = counts.iter().sum();
    counts
        .iter()
        .map(|&count| {
            if sum == 0 {
                0.0
            } else {
                count as f64 / sum as f64
            }
        })
        .collect()
}

/// Entropy of a distribution in nats; zero entries add nothing.
pub(crate) fn entropy(shares: &[f64]) -> f64 {
    -shares
        .iter()
        .filter(|&&share| share > 0.0)
        .map(|share| share * share.ln())
        .sum::<f64>()
}

/// Entropy as a fraction of the largest possible, `ln n`: 1 is even, 0 is a single expert. With one entry it is 1.
pub(crate) fn normalised_entropy(shares: &[f64]) -> f64 {
    if shares.len() < 2 {
        1.0
    } else {
        entropy(shares) / (shares.len() as f64).ln()
    }
}

/// Jensen-Shannon divergence of several distributions with equal weights, as a fraction of its largest value, `ln d`:
/// 0 when all are equal, 1 when no two overlap. `None` for fewer than two.
pub(crate) fn js_divergence(distributions: &[Vec<f64>]) -> Option<f64> {
    let n = distributions.len();
    if n < 2 {
        return None;
    }
    let mean_entropy = distributions
        .iter()
        .map(|shares| entropy(shares))
        .sum::<f64>()
        / n as f64;
    let divergence = entropy(&mean_distribution(distributions)) - mean_entropy;
    Some((divergence / (n as f64).ln()).clamp(0.0, 1.0))
}

/// The mean of several distributions, with equal weights.
pub(crate) fn mean_distribution(distributions: &[Vec<f64>]) -> Vec<f64> {
    let n = distributions.len().max(1) as f64;
    let n_entries = distributions.first().map_or(0, Vec::len);
    (0..n_entries)
        .map(|e| distributions.iter().map(|shares| shares[e]).sum::<f64>() / n)
        .collect()
}

/// Mutual information between domain and expert in bits, from counts `[domain][expert]`: how much a pick tells about
/// the domain. Few picks push it up, by about `(d - 1)(n - 1) / (2 picks ln 2)` bits.
pub(crate) fn mutual_information(counts: &[Vec<u64>]) -> f64 {
    let total: u64 = counts.iter().flatten().sum();
    if total == 0 {
        return 0.0;
    }
    let n_experts = counts.first().map_or(0, Vec::len);
    let per_expert: Vec<u64> = (0..n_experts)
        .map(|e| counts.iter().map(|domain| domain[e]).sum())
        .collect();
    let mut bits = 0.0;
    for domain in counts {
        let in_domain: u64 = domain.iter().sum();
        for (&count, &of_expert) in domain.iter().zip(&per_expert) {
            if count > 0 {
                let ratio = count as f64 * total as f64 / (in_domain as f64 * of_expert as f64);
                bits += count as f64 / total as f64 * ratio.log2();
            }
        }
    }
    bits.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    }

    #[test]
    fn shares_of_a_small_histogram() {
        assert_eq!(shares(&[3, 1, 0]), [0.75, 0.25, 0.0]);
        assert_eq!(shares(&[0, 0]), [0.0, 0.0]);
    }

    #[test]
    fn entropy_is_one_when_even_and_zero_when_single() {
        close(normalised_entropy(&[0.25; 4]), 1.0);
        close(normalised_entropy(&[1.0, 0.0]), 0.0);
        close(normalised_entropy(&[0.5, 0.5, 0.0, 0.0]), 0.5);
        close(normalised_entropy(&[1.0]), 1.0);
    }

    #[test]
    fn divergence_is_zero_for_equal_and_one_for_disjoint() {
        close(
            js_divergence(&[vec![0.5, 0.5], vec![0.5, 0.5]]).unwrap(),
            0.0,
        );
        close(
            js_divergence(&[vec![1.0, 0.0], vec![0.0, 1.0]]).unwrap(),
            1.0,
        );
        assert_eq!(js_divergence(&[vec![1.0]]), None);
    }

    #[test]
    fn mutual_information_of_a_perfect_and_of_no_relation() {
        close(mutual_information(&[vec![4, 0], vec![0, 4]]), 1.0);
        close(mutual_information(&[vec![1, 3], vec![2, 6]]), 0.0);
        close(mutual_information(&[]), 0.0);
    }
}
