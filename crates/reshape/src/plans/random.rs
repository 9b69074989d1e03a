//! `random`: any experts, for comparison; what a seed keeps depends on nothing but the seed and the sizes.

use cadre_routing::filters::mix;
use cadre_routing::plan::ModelShape;

/// Uniform scores above 0, per layer and expert.
pub(super) fn scores(shape: &ModelShape, seed: u64) -> Vec<Vec<f64>> {
    let layers = shape.layers.iter();
    layers
        .map(|(layer, n)| {
            let score = |expert: usize| {
                let word = mix(mix(mix(seed) ^ *layer as u64) ^ expert as u64);
                ((word >> 11) + 1) as f64 / (1u64 << 53) as f64
            };
            (0..*n).map(score).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use cadre_routing::plan::Groups;

    use super::*;

    #[test]
    fn seeds_and_layers_differ_and_repeat() {
        let shape = ModelShape {
            digest: String::new(),
            architecture: String::new(),
            layers: vec![(0, 64), (1, 64)],
            top_k: 1,
            n_null: 0,
            groups: Groups::NONE,
            same_picks: false,
        };
        let (one, two) = (scores(&shape, 1), scores(&shape, 2));
        assert_eq!(one, scores(&shape, 1));
        assert_ne!(one, two);
        assert_ne!(one[0], one[1]);
        let mean = one.iter().flatten().sum::<f64>() / 128.0;
        assert!((0.4..0.6).contains(&mean), "{mean}");
    }
}
