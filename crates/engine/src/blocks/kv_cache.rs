//! What attention remembers of the tokens that a session holds, in f32.

/// Sizes of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub(crate) n_layers: usize,
    /// Heads that are stored; 1 where all share (latent attention).
    pub(crate) n_kv_heads: usize,
    /// Width of a key; of latent attention, of its rotary part.
    pub(crate) key_dim: usize,
    /// Width of a value; of latent attention, of the latent that keys and values come from.
    pub(crate) value_dim: usize,
}

/// One [`LayerKv`] per layer.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub(crate) layers: Vec<LayerKv>,
}

/// Keys and values of one layer, `[n_kv_heads, n_ctx, dim]` each, so that the keys of a head are
/// contiguous. Which positions are valid is the session's business.
#[derive(Debug)]
pub(crate) struct LayerKv {
    keys: Vec<f32>,
    values: Vec<f32>,
    n_ctx: usize,
    key_dim: usize,
    value_dim: usize,
}

impl KvCache {
    pub(crate) fn new(shape: &KvShape, n_ctx: usize) -> Self {
        Self {
            layers: (0..shape.n_layers)
                .map(|_| LayerKv::new(shape, n_ctx))
                .collect(),
        }
    }

    pub(crate) fn n_bytes(&self) -> usize {
        let bytes = |layer: &LayerKv| size_of::<f32>() * (layer.keys.len() + layer.values.len());
        self.layers.iter().map(bytes).sum()
    }
}

impl LayerKv {
    pub(crate) fn new(shape: &KvShape, n_ctx: usize) -> Self {
        // Zeroed memory that the system hands out page by page as the context fills.
        let rows = shape.n_kv_heads * n_ctx;
        Self {
            keys: vec![0.0; rows * shape.key_dim],
            values: vec![0.0; rows * shape.value_dim],
            n_ctx,
            key_dim: shape.key_dim,
            value_dim: shape.value_dim,
        }
    }

    /// Stores the key and value of `head` at `position`.
    pub(crate) fn store(&mut self, head: usize, position: usize, key: &[f32], value: &[f32]) {
        let row = head * self.n_ctx + position;
        self.keys[row * self.key_dim..][..self.key_dim].copy_from_slice(key);
        self.values[row * self.value_dim..][..self.value_dim].copy_from_slice(value);
    }

    /// Keys and values of `head` at positions `from..to`, `[to - from, dim]` each.
    pub(crate) fn rows(&self, head: usize, from: usize, to: usize) -> (&[f32], &[f32]) {
        let (row, n) = (head * self.n_ctx + from, to - from);
        (
            &self.keys[row * self.key_dim..][..n * self.key_dim],
            &self.values[row * self.value_dim..][..n * self.value_dim],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_by_head_and_position() {
        let shape = KvShape {
            n_layers: 1,
            n_kv_heads: 2,
            key_dim: 2,
            value_dim: 1,
        };
        let mut kv = LayerKv::new(&shape, 3);
        kv.store(1, 1, &[1.0, 2.0], &[3.0]);
        kv.store(1, 2, &[5.0, 6.0], &[7.0]);
        assert_eq!(
            kv.rows(1, 1, 3),
            (&[1.0, 2.0, 5.0, 6.0][..], &[3.0, 7.0][..])
        );
        assert_eq!(kv.rows(0, 0, 3).0, [0.0; 6]);
        assert_eq!(kv.rows(1, 0, 0), (&[][..], &[][..]));
        assert_eq!(KvCache::new(&shape, 3).n_bytes(), 2 * 3 * 3 * 4);
    }
}
