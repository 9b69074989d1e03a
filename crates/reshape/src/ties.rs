//! TIES: a merge that looks at what most of the largest differences agree in.

use cadre_checkpoint::CheckpointError;

/// TIES-Merging (Yadav et al., 2023, arXiv 2306.01708), with the mean of the experts in place of a common ancestor: of each
/// one's differences to it the part `kept` of largest magnitude stays; of each value the sign that has more in all is
/// taken; and the differences of that sign are averaged by `shares`.
///
/// `read(m)` gives the values of member `m`. It is asked for each of them three times, so that one is in memory at a time
/// however many are merged.
pub(crate) fn ties(
    mut read: impl FnMut(usize) -> Result<Vec<f32>, CheckpointError>,
    shares: &[f32],
    kept: f32,
) -> Result<Vec<f32>, CheckpointError> {
    let shares: Vec<f64> = shares.iter().map(|share| f64::from(*share)).collect();
    let mut mean: Vec<f64> = Vec::new();
    for (member, share) in shares.iter().enumerate() {
        let values = read(member)?;
        mean.resize(values.len(), 0.0);
        for (mean, value) in mean.iter_mut().zip(values) {
            *mean += f64::from(value) * share;
        }
    }
    // The least magnitude of each member that stays, and the weighted sums of what stays.
    let mut least = Vec::with_capacity(shares.len());
    let mut all = vec![0.0; mean.len()];
    for (member, share) in shares.iter().enumerate() {
        let values = read(member)?;
        let bound = bound(&values, &mean, kept);
        for ((all, value), mean) in all.iter_mut().zip(&values).zip(&mean) {
            *all += trimmed(*value, *mean, bound) * share;
        }
        least.push(bound);
    }
    let (mut sum, mut weight) = (vec![0.0; mean.len()], vec![0.0; mean.len()]);
    for ((member, share), bound) in shares.iter().enumerate().zip(least) {
        for (at, value) in read(member)?.into_iter().enumerate() {
            let off = trimmed(value, mean[at], bound);
            if off * all[at] > 0.0 {
                sum[at] += off * share;
                weight[at] += share;
            }
        }
    }
    let merged = mean.into_iter().zip(sum.into_iter().zip(weight));
    let merged = merged.map(|(mean, (sum, weight))| match weight > 0.0 {
        true => (mean + sum / weight) as f32,
        false => mean as f32,
    });
    Ok(merged.collect())
}

/// The least magnitude of a difference that is among the part `kept` of the largest.
fn bound(values: &[f32], mean: &[f64], kept: f32) -> f64 {
    let n = values.len();
    let n_kept = ((n as f64 * f64::from(kept)).ceil() as usize).clamp(1, n.max(1));
    if n_kept >= n {
        return 0.0;
    }
    let pairs = values.iter().zip(mean);
    let mut magnitudes: Vec<f64> = pairs.map(|(v, m)| (f64::from(*v) - m).abs()).collect();
    let (_, least, _) = magnitudes.select_nth_unstable_by(n - n_kept, f64::total_cmp);
    *least
}

/// The difference of a value to the mean, or nothing where it is below `bound`.
fn trimmed(value: f32, mean: f64, bound: f64) -> f64 {
    let off = f64::from(value) - mean;
    if off.abs() < bound { 0.0 } else { off }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(members: &[Vec<f32>], shares: &[f32], kept: f32) -> Vec<f32> {
        ties(|at| Ok(members[at].clone()), shares, kept).unwrap()
    }

    #[test]
    fn ties_by_hand() {
        let members = [
            vec![2.0, 3.0, 0.0, 3.5],
            vec![2.0, -1.0, 1.5, 3.5],
            vec![2.0, -2.0, 1.5, 2.0],
        ];
        // By shares that favour the first, means are 2, 0.75, 0.75, 3.125. The largest difference of each is that of the
        // second value: 2.25, -1.75 and -2.75, which weigh 1.125 against 1.125: nothing is added.
        let tied = of(&members, &[0.5, 0.25, 0.25], 0.25);
        assert_eq!(tied, [2.0, 0.75, 0.75, 3.125]);
        // Means 2 and 9.5 / 3. The largest difference of the first is 4, of value 0, and nobody else's is; those of the
        // others are 9 - 9.5 / 3 and 0.5 - 9.5 / 3, of which the first is larger and stays.
        let members = [vec![6.0, 0.0], vec![0.0, 9.0], vec![0.0, 0.5]];
        assert_eq!(of(&members, &[1.0 / 3.0; 3], 0.5), [6.0, 9.0]);
        // One expert is itself.
        assert_eq!(of(&members[..1], &[1.0], 0.2), members[0]);
    }
}
