//! Initial values: every tensor from its own random stream, named by seed and tensor.
//!
//! A tensor's values do not depend on the order in which tensors are made, nor on how many there are.

use burn::tensor::{Device, Tensor, TensorData};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Makes the initial tensors of a model.
#[derive(Clone, Debug)]
pub struct Init {
    /// Seed of the run.
    pub seed: u64,
    /// Standard deviation of matrices.
    pub std: f32,
    /// Where the tensors live.
    pub device: Device,
}

impl Init {
    /// Normal values with standard deviation `self.std * scale`.
    #[must_use]
    pub fn normal<const D: usize>(&self, name: &str, shape: [usize; D], scale: f32) -> Tensor<D> {
        let mut rng = stream(self.seed, name);
        let std = self.std * scale;
        let mut values = cadre_kernels::zeros(shape.iter().product());
        for pair in values.chunks_mut(2) {
            for (value, drawn) in pair.iter_mut().zip(normal_pair(&mut rng)) {
                *value = drawn * std;
            }
        }
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// Ones, for norm weights.
    #[must_use]
    pub fn ones(&self, size: usize) -> Tensor<1> {
        Tensor::ones([size], &self.device)
    }
}

/// A random stream of its own for every `(seed, name)`.
#[must_use]
pub(crate) fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    // FNV-1a: the stream number only has to differ between names.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(hash);
    rng
}

/// Two independent standard normal values (Box and Muller 1958).
pub(crate) fn normal_pair(rng: &mut ChaCha8Rng) -> [f32; 2] {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    let angle = std::f64::consts::TAU * rng.random::<f64>();
    [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_normal_reproducible_and_differ_by_name() {
        let init = Init {
            seed: 1,
            std: 2.0,
            device: Device::flex(),
        };
        let values = |name: &str| init.normal(name, [1000, 101], 0.5).into_data();
        let a = values("a");
        assert_eq!(a, values("a"));
        assert_ne!(a, values("b"));
        let a = a.try_to_vec::<f32>().unwrap();
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let variance = a.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03);
    }
}
