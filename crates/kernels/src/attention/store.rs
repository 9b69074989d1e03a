//! Keys and values of one layer: how they are laid out, stored and found.
//!
//! Blocks of 64 positions, head by head. In a block keys are `[position / 16, dim, 16]` and values
//! `[dim / 16, position, 16]`: both are panels as the kernels read them (`arch/attention`), each read front to back.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{KvFormat, KvFormats};
use crate::arch::attention::{KEY_BLOCK, PANEL, Panels, SCALE_GROUP};
use crate::blocks::ActQ8;
use crate::table::Kernels;

/// Sizes of what a layer stores per position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSizes {
    /// Heads that are stored; 1 where all share (latent attention).
    pub n_heads: usize,
    /// Width of a key; of latent attention, of its rotary part.
    pub key_dim: usize,
    /// Width of a value; of latent attention, of the latent that keys and values come from.
    pub value_dim: usize,
}

/// Keys and values of one layer. Which positions are valid is the owner's business.
#[derive(Debug)]
pub struct KvLayer {
    kernels: Kernels,
    sizes: KvSizes,
    n_positions: usize,
    /// Per head. Position `p` is in block `p / 64`, modulo this.
    n_blocks: usize,
    keys: Plane,
    values: Plane,
}

/// Keys, or values, of all heads and blocks.
#[derive(Debug)]
struct Plane {
    data: Data,
    /// Numbers of a head's block, and its scales where the format has any.
    block: usize,
    block_scales: usize,
}

/// Half-precision numbers as their bits, which the system can hand out as untouched zeros.
#[derive(Debug)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Q8 { quants: Vec<i8>, scales: Vec<u16> },
}

impl KvLayer {
    /// Room for `n_positions`. The memory is zeros that the system hands out page by page as the context fills.
    pub fn new(kernels: Kernels, sizes: KvSizes, formats: KvFormats, n_positions: usize) -> Self {
        let n_blocks = n_positions.div_ceil(KEY_BLOCK);
        let n_all = sizes.n_heads * n_blocks;
        let groups = |width: usize| width.div_ceil(SCALE_GROUP);
        Self {
            kernels,
            sizes,
            n_positions,
            n_blocks,
            keys: Plane::new(formats.keys, n_all, sizes.key_dim, groups(sizes.key_dim)),
            values: Plane::new(
                formats.values,
                n_all,
                sizes.value_dim.next_multiple_of(PANEL),
                groups(sizes.value_dim),
            ),
        }
    }

    /// What is stored per position.
    pub fn sizes(&self) -> KvSizes {
        self.sizes
    }

    /// Positions that fit.
    pub fn n_positions(&self) -> usize {
        self.n_positions
    }

    /// The formats of keys and values.
    pub fn formats(&self) -> KvFormats {
        KvFormats {
            keys: self.keys.format(),
            values: self.values.format(),
        }
    }

    /// Bytes of the memory.
    pub fn n_bytes(&self) -> usize {
        self.keys.n_bytes() + self.values.n_bytes()
    }

    /// Stores the key and value of `head` at `position`.
    ///
    /// # Panics
    /// When head or position is out of range, or the widths are not those of the cache.
    pub fn store(&mut self, head: usize, position: usize, key: &[f32], value: &[f32]) {
        let KvSizes {
            n_heads,
            key_dim,
            value_dim,
        } = self.sizes;
        assert!(
            head < n_heads && position < self.n_positions,
            "head {head} of {n_heads}, position {position} of {}",
            self.n_positions
        );
        assert_eq!(key.len(), key_dim, "a key of the cache's width");
        assert_eq!(value.len(), value_dim, "a value of the cache's width");
        let block = self.block(head, position);
        let (at, n_groups) = (position % KEY_BLOCK, key_dim.div_ceil(SCALE_GROUP));
        let (panel, lane) = (at / PANEL, at % PANEL);
        let kernels = self.kernels;
        self.keys.write(
            kernels,
            block,
            key,
            &Places {
                number: |dim| (panel * key_dim + dim) * PANEL + lane,
                scale: |group| (panel * n_groups + group) * PANEL + lane,
            },
        );
        self.values.write(
            kernels,
            block,
            value,
            &Places {
                number: |dim| (dim / PANEL * KEY_BLOCK + at) * PANEL + dim % PANEL,
                scale: |group| group * KEY_BLOCK + at,
            },
        );
    }

    /// Index of the block of `head` that holds `position`.
    fn block(&self, head: usize, position: usize) -> usize {
        head * self.n_blocks + position / KEY_BLOCK % self.n_blocks
    }

    /// Panels of keys of the block of `head` that `position` is in: four of `key_dim` steps.
    pub(super) fn key_panels(&self, head: usize, position: usize) -> Panels {
        self.keys
            .panels(self.block(head, position), self.sizes.key_dim)
    }

    /// Panels of values of the same block: one of 64 steps per 16 dimensions.
    pub(super) fn value_panels(&self, head: usize, position: usize) -> Panels {
        self.values.panels(self.block(head, position), KEY_BLOCK)
    }
}

/// Where the numbers and scales of a row are in a block.
struct Places<N: Fn(usize) -> usize, S: Fn(usize) -> usize> {
    number: N,
    scale: S,
}

impl Plane {
    fn new(format: KvFormat, n_blocks: usize, width: usize, n_groups: usize) -> Self {
        let (block, block_scales) = (KEY_BLOCK * width, KEY_BLOCK * n_groups);
        let data = match format {
            KvFormat::F32 => Data::F32(vec![0.0; n_blocks * block]),
            KvFormat::F16 => Data::F16(vec![0; n_blocks * block]),
            KvFormat::Q8_0 => Data::Q8 {
                quants: vec![0; n_blocks * block],
                scales: vec![0; n_blocks * block_scales],
            },
        };
        Self {
            data,
            block,
            block_scales,
        }
    }

    fn format(&self) -> KvFormat {
        match &self.data {
            Data::F32(_) => KvFormat::F32,
            Data::F16(_) => KvFormat::F16,
            Data::Q8 { .. } => KvFormat::Q8_0,
        }
    }

    fn n_bytes(&self) -> usize {
        match &self.data {
            Data::F32(values) => size_of_val(values.as_slice()),
            Data::F16(bits) => size_of_val(bits.as_slice()),
            Data::Q8 { quants, scales } => quants.len() + size_of_val(scales.as_slice()),
        }
    }

    fn panels(&self, block: usize, n_steps: usize) -> Panels {
        let scales = block * self.block_scales;
        let block = block * self.block..(block + 1) * self.block;
        match &self.data {
            Data::F32(values) => Panels {
                data: values[block].as_ptr().cast(),
                scales: std::ptr::null(),
                n_steps,
            },
            Data::F16(bits) => Panels {
                data: bits[block].as_ptr().cast(),
                scales: std::ptr::null(),
                n_steps,
            },
            Data::Q8 {
                quants,
                scales: all,
            } => Panels {
                data: quants[block].as_ptr().cast(),
                scales: all[scales..][..self.block_scales].as_ptr(),
                n_steps,
            },
        }
    }

    fn write<N: Fn(usize) -> usize, S: Fn(usize) -> usize>(
        &mut self,
        kernels: Kernels,
        block: usize,
        row: &[f32],
        places: &Places<N, S>,
    ) {
        let from = block * self.block;
        match &mut self.data {
            Data::F32(values) => {
                let values = &mut values[from..][..self.block];
                for (dim, value) in row.iter().enumerate() {
                    values[(places.number)(dim)] = *value;
                }
            }
            Data::F16(bits) => {
                let bits = &mut bits[from..][..self.block];
                for (group, values) in row.chunks(SCALE_GROUP).enumerate() {
                    let mut halves = [f16::ZERO; SCALE_GROUP];
                    halves[..values.len()].convert_from_f32_slice(values);
                    for (at, half) in halves[..values.len()].iter().enumerate() {
                        bits[(places.number)(group * SCALE_GROUP + at)] = half.to_bits();
                    }
                }
            }
            Data::Q8 { quants, scales } => {
                let quants = &mut quants[from..][..self.block];
                let scales = &mut scales[block * self.block_scales..][..self.block_scales];
                for (group, values) in row.chunks(SCALE_GROUP).enumerate() {
                    let (mut padded, mut act) = ([0.0; SCALE_GROUP], [ActQ8::ZERO]);
                    padded[..values.len()].copy_from_slice(values);
                    kernels.quantize_act(&padded, &mut act);
                    // Already rounded through f16; NaN where a number was not finite, so that the output says so.
                    scales[(places.scale)(group)] = f16::from_f32(act[0].d).to_bits();
                    for (at, quant) in act[0].qs[..values.len()].iter().enumerate() {
                        quants[(places.number)(group * SCALE_GROUP + at)] = *quant;
                    }
                }
            }
        }
    }
}
