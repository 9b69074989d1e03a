//! Which neurons of a dense feed-forward every expert gets; each neuron is in exactly one place.

use super::activity::Activity;
use super::balanced::clusters;
use super::draws::Draws;
use crate::error::{ReshapeError, Result};

/// By what neurons are parted.
#[derive(Debug, Clone)]
pub enum PartitionBy {
    /// As they lie: the first to the first expert, and so on.
    Contiguous,
    /// At random; the baseline.
    Random,
    /// Those that are active on the same tokens into one expert; the shared ones are those that are active most often.
    Activity(Activity),
}

impl PartitionBy {
    /// Its name on the command line.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Contiguous => "contiguous",
            Self::Random => "random",
            Self::Activity(_) => "activity",
        }
    }
}

/// The neurons of one layer, parted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Those that every token uses.
    pub shared: Vec<usize>,
    /// Those of every expert, all of one number.
    pub experts: Vec<Vec<usize>>,
}

/// Parts the `width` neurons of `layer` into `n_shared` for all tokens and the rest for `n_experts`.
pub(super) fn partition(
    by: &PartitionBy,
    layer: usize,
    (width, n_shared, n_experts): (usize, usize, usize),
    seed: u64,
) -> Result<Partition> {
    let draws = Draws::new(seed).of(layer as u64);
    let size = (width - n_shared) / n_experts;
    let in_order = |order: &[usize]| {
        let (shared, rest) = order.split_at(n_shared);
        let sorted = |part: &[usize]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part
        };
        Partition {
            shared: sorted(shared),
            experts: rest.chunks(size.max(1)).map(sorted).collect(),
        }
    };
    Ok(match by {
        PartitionBy::Contiguous => in_order(&(0..width).collect::<Vec<_>>()),
        PartitionBy::Random => in_order(&draws.shuffled(width)),
        PartitionBy::Activity(activity) => {
            let bits = activity.layer(layer)?;
            if bits.width != width {
                return Err(ReshapeError::Option {
                    name: "the activity",
                    problem: format!(
                        "has {} neurons in layer {layer}, expected {width}",
                        bits.width
                    ),
                });
            }
            let mut order: Vec<usize> = (0..width).collect();
            order.sort_by_cached_key(|neuron| (std::cmp::Reverse(bits.count(*neuron)), *neuron));
            let (shared, rest) = order.split_at(n_shared);
            let mut shared = shared.to_vec();
            shared.sort_unstable();
            Partition {
                shared,
                experts: clusters(bits, rest, n_experts, draws),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_neuron_is_in_one_place() {
        for by in [PartitionBy::Contiguous, PartitionBy::Random] {
            let made = partition(&by, 3, (22, 4, 3), 9).unwrap();
            assert_eq!(made.shared.len(), 4);
            assert!(made.experts.iter().all(|expert| expert.len() == 6));
            let mut all: Vec<usize> = made.experts.concat();
            all.extend(&made.shared);
            all.sort_unstable();
            assert_eq!(all, (0..22).collect::<Vec<_>>());
        }
        let one = partition(&PartitionBy::Random, 0, (8, 0, 2), 1).unwrap();
        assert_eq!(
            one,
            partition(&PartitionBy::Random, 0, (8, 0, 2), 1).unwrap()
        );
        assert_ne!(
            one,
            partition(&PartitionBy::Random, 1, (8, 0, 2), 1).unwrap()
        );
    }
}
