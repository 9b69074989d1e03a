//! What attention remembers of the tokens that a session holds, in every layer.

use cadre_kernels::{Kernels, KvFormats, KvLayer, KvSizes};

use super::DecoupledShape;

/// Keys and values of one layer.
pub(crate) type LayerKv = KvLayer;

/// Sizes of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub(crate) n_layers: usize,
    /// Experts that every layer's attention is cut into, each with a cache of its own; 0 where it is whole.
    pub(crate) n_experts: usize,
    /// Heads that are stored, of one expert where there are some; 1 where all share (latent attention).
    pub(crate) n_kv_heads: usize,
    /// Width of a key; of latent attention, of its rotary part.
    pub(crate) key_dim: usize,
    /// Width of a value; of latent attention, of the latent that keys and values come from.
    pub(crate) value_dim: usize,
}

/// One [`LayerKv`] per layer, or per expert of each layer, and behind these one per layer of a router that runs before
/// the model.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub(crate) layers: Vec<LayerKv>,
    /// Positions of the tokens that each expert of attention holds, ascending; empty where attention is whole. Those from
    /// the session's position on are forgotten.
    pub(crate) held: Vec<Vec<u32>>,
}

impl KvCache {
    pub(crate) fn new(kernels: Kernels, shape: &KvShape, formats: KvFormats, n_ctx: usize) -> Self {
        let sizes = KvSizes {
            n_heads: shape.n_kv_heads,
            key_dim: shape.key_dim,
            value_dim: shape.value_dim,
        };
        let layer = || LayerKv::new(kernels, sizes, formats, n_ctx);
        let n_layers = Self::first_of_router(shape);
        let n_held = shape.n_layers * shape.n_experts;
        Self {
            layers: std::iter::repeat_with(layer).take(n_layers).collect(),
            held: (0..n_held).map(|_| Vec::with_capacity(n_ctx)).collect(),
        }
    }

    /// With caches for a router that runs before the model. Its picks should not depend on how the model's keys and values
    /// are stored, so that these are f32.
    pub(crate) fn with_router(
        mut self,
        kernels: Kernels,
        shape: &DecoupledShape,
        n_ctx: usize,
    ) -> Self {
        let sizes = KvSizes {
            n_heads: shape.n_heads,
            key_dim: shape.head_dim,
            value_dim: shape.head_dim,
        };
        let layer = || LayerKv::new(kernels, sizes, KvFormats::default(), n_ctx);
        self.layers
            .extend(std::iter::repeat_with(layer).take(shape.n_layers));
        self
    }

    /// Where the caches of such a router begin.
    pub(crate) fn first_of_router(shape: &KvShape) -> usize {
        shape.n_layers * shape.n_experts.max(1)
    }

    /// Bytes when every position is filled.
    pub(crate) fn n_bytes(&self) -> usize {
        self.layers.iter().map(LayerKv::n_bytes).sum()
    }

    /// The most bytes that `n` tokens from `position` on may take from the system. An expert of attention may get all of
    /// them.
    pub(crate) fn bytes_to_take(&self, position: usize, n: usize) -> usize {
        let layers = self.layers.iter().enumerate();
        let bytes = layers.map(|(index, layer)| {
            let position = self.position_in(index, position);
            layer.n_pages_to_take(position, n) * layer.page_bytes()
        });
        bytes.sum()
    }

    /// Gives up what holds no token before `position`.
    pub(crate) fn release_from(&mut self, position: usize) {
        for index in 0..self.layers.len() {
            let position = self.position_in(index, position);
            self.layers[index].release_from(position);
        }
    }

    /// Where the token at `position` of the sequence is, or would be, in cache `index`.
    pub(crate) fn position_in(&self, index: usize, position: usize) -> usize {
        match self.held.get(index) {
            None => position,
            Some(held) => held.partition_point(|before| (*before as usize) < position),
        }
    }
}

#[cfg(test)]
mod tests {
    use cadre_kernels::KvFormat;

    use super::*;

    #[test]
    fn a_cache_is_as_large_as_its_formats() {
        let shape = KvShape {
            n_layers: 3,
            n_experts: 0,
            n_kv_heads: 2,
            key_dim: 48,
            value_dim: 32,
        };
        let bytes = |keys, values| {
            let formats = KvFormats { keys, values };
            KvCache::new(Kernels::detect(), &shape, formats, 128).n_bytes()
        };
        let n = 3 * 2 * 128;
        assert_eq!(bytes(KvFormat::F32, KvFormat::F32), n * 80 * 4);
        assert_eq!(bytes(KvFormat::F16, KvFormat::Q8_0), n * (96 + 34));
        assert_eq!(bytes(KvFormat::Q8_0, KvFormat::F16), n * (52 + 64));
    }
}
