//! Keys and values of the tokens that a session holds, in f32.

/// Sizes of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub(crate) n_layers: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
}

/// One [`LayerKv`] per layer.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub(crate) layers: Vec<LayerKv>,
}

/// Keys and values of one layer, `[n_kv_heads, n_ctx, head_dim]` each, so that the keys of a head are
/// contiguous. Which positions are valid is the session's business.
#[derive(Debug)]
pub(crate) struct LayerKv {
    keys: Vec<f32>,
    values: Vec<f32>,
    n_ctx: usize,
    head_dim: usize,
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
        self.layers
            .iter()
            .map(|layer| 2 * size_of_val(layer.keys.as_slice()))
            .sum()
    }
}

impl LayerKv {
    pub(crate) fn new(shape: &KvShape, n_ctx: usize) -> Self {
        // Zeroed memory that the system hands out page by page as the context fills.
        let n = shape.n_kv_heads * n_ctx * shape.head_dim;
        let (keys, values) = (vec![0.0; n], vec![0.0; n]);
        Self {
            keys,
            values,
            n_ctx,
            head_dim: shape.head_dim,
        }
    }

    /// Stores the key and value of `head` at `position`.
    pub(crate) fn store(&mut self, head: usize, position: usize, key: &[f32], value: &[f32]) {
        let from = (head * self.n_ctx + position) * self.head_dim;
        self.keys[from..][..self.head_dim].copy_from_slice(key);
        self.values[from..][..self.head_dim].copy_from_slice(value);
    }

    /// Keys and values of `head` at positions `from..to`, `[to - from, head_dim]` each.
    pub(crate) fn rows(&self, head: usize, from: usize, to: usize) -> (&[f32], &[f32]) {
        let start = (head * self.n_ctx + from) * self.head_dim;
        let n = (to - from) * self.head_dim;
        (&self.keys[start..][..n], &self.values[start..][..n])
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
            head_dim: 2,
        };
        let mut kv = LayerKv::new(&shape, 3);
        kv.store(1, 1, &[1.0, 2.0], &[3.0, 4.0]);
        kv.store(1, 2, &[5.0, 6.0], &[7.0, 8.0]);
        assert_eq!(
            kv.rows(1, 1, 3),
            (&[1.0, 2.0, 5.0, 6.0][..], &[3.0, 4.0, 7.0, 8.0][..])
        );
        assert_eq!(kv.rows(0, 0, 3).0, [0.0; 6]);
        assert_eq!(kv.rows(1, 0, 0), (&[][..], &[][..]));
        assert_eq!(KvCache::new(&shape, 3).n_bytes(), 2 * 2 * 3 * 2 * 4);
    }
}
