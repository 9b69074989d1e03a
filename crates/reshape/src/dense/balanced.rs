//! Clusters of one size among neurons that are active on the same tokens.
//!
//! Rule: spherical k-means (Dhillon and Modha, 2001) over rows of bits, every cluster with the same number of members: all
//! pairs of a neuron and a centre are taken by falling cosine, and a pair counts if the neuron is free and the cluster has
//! room. The result depends on the rows and the seed alone.

use super::activity::Bits;
use super::draws::Draws;

/// Passes over the neurons after which clusters are taken as they are.
const PASSES: usize = 20;

/// Times that centres are drawn anew; the clusters with the largest sum of cosines are taken.
const STARTS: u64 = 4;

/// `neurons` in `n` clusters of one size, each ascending. Their number is a multiple of `n`.
pub(super) fn clusters(bits: &Bits, neurons: &[usize], n: usize, draws: Draws) -> Vec<Vec<usize>> {
    let tried = (0..STARTS).map(|start| from_start(bits, neurons, n, draws.of(start)));
    let scored = tried.map(|clusters| {
        let own = |members: &Vec<usize>| {
            let centre = centre(bits, members);
            let near = members
                .iter()
                .map(|neuron| f64::from(cosine(bits, *neuron, &centre)));
            near.sum::<f64>()
        };
        (clusters.iter().map(own).sum::<f64>(), clusters)
    });
    // Of equals the last, as good as any.
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0));
    best.map(|(_, clusters)| clusters).unwrap_or_default()
}

fn from_start(bits: &Bits, neurons: &[usize], n: usize, draws: Draws) -> Vec<Vec<usize>> {
    let size = neurons.len() / n.max(1);
    let mut centres = first_centres(bits, neurons, n, draws);
    let mut before = Vec::new();
    for _ in 0..PASSES {
        let assigned = assign(bits, neurons, &centres, size);
        if assigned == before {
            break;
        }
        centres = assigned
            .iter()
            .map(|members| centre(bits, members))
            .collect();
        before = assigned;
    }
    before
}

/// A neuron that is far from those before, for every cluster: the first is drawn, the others are drawn with their distance
/// as weight (k-means++, Arthur and Vassilvitskii, 2007).
fn first_centres(bits: &Bits, neurons: &[usize], n: usize, draws: Draws) -> Vec<Vec<f32>> {
    let mut centres: Vec<Vec<f32>> = Vec::with_capacity(n);
    let mut distance = vec![1.0_f64; neurons.len()];
    for at in 0..n {
        let all: f64 = distance.iter().sum();
        let mut left = draws.uniform(at) * all;
        let found = distance.iter().position(|weight| {
            left -= weight;
            left <= 0.0
        });
        let found = found.unwrap_or(neurons.len() - 1);
        let chosen = centre(bits, &neurons[found..=found]);
        for (distance, neuron) in distance.iter_mut().zip(neurons) {
            let near = f64::from(cosine(bits, *neuron, &chosen));
            *distance = distance.min((1.0 - near).max(0.0));
        }
        centres.push(chosen);
    }
    centres
}

/// The sum of the members' rows, each of length 1, brought to length 1.
fn centre(bits: &Bits, members: &[usize]) -> Vec<f32> {
    let mut sum = vec![0.0_f32; bits.n_tokens()];
    for neuron in members {
        let share = 1.0 / (bits.count(*neuron).max(1) as f32).sqrt();
        bits.tokens(*neuron).for_each(|token| sum[token] += share);
    }
    let length = sum.iter().map(|x| x * x).sum::<f32>().sqrt();
    if length > 0.0 {
        sum.iter_mut().for_each(|x| *x /= length);
    }
    sum
}

fn cosine(bits: &Bits, neuron: usize, centre: &[f32]) -> f32 {
    let sum: f32 = bits.tokens(neuron).map(|token| centre[token]).sum();
    sum / (bits.count(neuron).max(1) as f32).sqrt()
}

fn assign(bits: &Bits, neurons: &[usize], centres: &[Vec<f32>], size: usize) -> Vec<Vec<usize>> {
    let mut pairs = Vec::with_capacity(neurons.len() * centres.len());
    for neuron in neurons {
        let near = centres.iter().enumerate();
        pairs.extend(near.map(|(at, centre)| (cosine(bits, *neuron, centre), *neuron, at)));
    }
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut is_taken = vec![false; bits.width];
    let mut clusters = vec![Vec::with_capacity(size); centres.len()];
    for (_, neuron, at) in pairs {
        if !is_taken[neuron] && clusters[at].len() < size {
            is_taken[neuron] = true;
            clusters[at].push(neuron);
        }
    }
    clusters
        .iter_mut()
        .for_each(|members| members.sort_unstable());
    clusters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neurons_that_fire_together_are_together() {
        // Neuron i fires on the tokens of group i % 3, with some noise.
        let mut bits = Bits::new(12, 90);
        for neuron in 0..12 {
            for token in 0..90 {
                let noise = Draws::new(5).of(neuron as u64).uniform(token) < 0.1;
                if (token / 30 == neuron % 3) != noise {
                    bits.set(neuron, token);
                }
            }
        }
        let neurons: Vec<usize> = (0..12).collect();
        for seed in 0..5 {
            let mut found = clusters(&bits, &neurons, 3, Draws::new(seed));
            found.sort();
            assert_eq!(found, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]);
        }
    }

    #[test]
    fn neurons_that_never_fire_fill_the_room_that_is_left() {
        let mut bits = Bits::new(6, 10);
        bits.set(2, 1);
        bits.set(4, 1);
        let found = clusters(&bits, &[0, 1, 2, 3, 4, 5], 3, Draws::new(0));
        assert!(found.iter().all(|members| members.len() == 2), "{found:?}");
        assert!(found.contains(&vec![2, 4]), "{found:?}");
    }
}
