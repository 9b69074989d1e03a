//! A page: keys and values of 64 positions of one layer, all heads. Caches of several sequences may hold the same page.
//!
//! Head by head, keys are `[position / 16, dim, 16]` and values `[dim / 16, position, 16]`: both are panels as the
//! kernels read them (`arch/attention`), each read front to back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::store::KvSizes;
use super::{KvFormat, KvFormats};
use crate::arch::attention::{KEY_BLOCK, PANEL, Panels, SCALE_GROUP};
use crate::blocks::ActQ8;
use crate::table::Kernels;

/// Positions of a page.
pub const KV_PAGE: usize = KEY_BLOCK;

/// Counts the bytes of pages: each once, however many caches hold it.
#[derive(Clone, Debug, Default)]
pub struct KvMemory(Arc<AtomicUsize>);

impl KvMemory {
    /// Bytes of all pages that are counted here and held by anybody.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// A page of a cache, which others may hold as well. What is shared is not written to: who wants to gets a copy.
#[derive(Clone, Debug)]
pub struct KvPage(Arc<Page>);

/// The numbers of a page.
#[derive(Debug)]
pub(super) struct Page {
    sizes: KvSizes,
    keys: Plane,
    values: Plane,
    memory: KvMemory,
}

/// Keys, or values, of all heads.
#[derive(Clone, Debug)]
struct Plane {
    data: Data,
    /// Numbers of a head, and its scales where the format has any.
    block: usize,
    block_scales: usize,
}

/// Half-precision numbers as their bits, which the system can hand out as untouched zeros.
#[derive(Clone, Debug)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Q8 { quants: Vec<i8>, scales: Vec<u16> },
}

/// Numbers and scales of a plane.
type Lengths = (usize, usize);

impl KvPage {
    /// A page of zeros.
    pub(super) fn new(sizes: KvSizes, formats: KvFormats, memory: &KvMemory) -> Self {
        let [(keys, key_scales), (values, value_scales)] = lengths(sizes);
        let page = Page {
            sizes,
            keys: Plane::new(formats.keys, sizes.n_heads, keys, key_scales),
            values: Plane::new(formats.values, sizes.n_heads, values, value_scales),
            memory: memory.clone(),
        };
        memory.0.fetch_add(page.n_bytes(), Ordering::Relaxed);
        Self(Arc::new(page))
    }

    /// Bytes of a page of these sizes.
    pub(super) fn bytes_of(sizes: KvSizes, formats: KvFormats) -> usize {
        let [keys, values] = lengths(sizes);
        let bytes = |format: KvFormat, (block, scales): Lengths| match format {
            KvFormat::F32 => 4 * block,
            KvFormat::F16 => 2 * block,
            KvFormat::Q8_0 => block + 2 * scales,
        };
        sizes.n_heads * (bytes(formats.keys, keys) + bytes(formats.values, values))
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.0.n_bytes()
    }

    /// Whether anybody else holds it.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    pub(super) fn sizes(&self) -> KvSizes {
        self.0.sizes
    }

    pub(super) fn formats(&self) -> KvFormats {
        KvFormats {
            keys: self.0.keys.format(),
            values: self.0.values.format(),
        }
    }

    /// Stores the key and value of `head` at place `at`; of a page that others hold, in a copy that this becomes.
    pub(super) fn store(
        &mut self,
        kernels: Kernels,
        (head, at): (usize, usize),
        key: &[f32],
        value: &[f32],
    ) {
        let page = Arc::make_mut(&mut self.0);
        let key_dim = page.sizes.key_dim;
        let n_groups = key_dim.div_ceil(SCALE_GROUP);
        let (panel, lane) = (at / PANEL, at % PANEL);
        page.keys.write(
            kernels,
            head,
            key,
            &Places {
                number: |dim| (panel * key_dim + dim) * PANEL + lane,
                scale: |group| (panel * n_groups + group) * PANEL + lane,
            },
        );
        page.values.write(
            kernels,
            head,
            value,
            &Places {
                number: |dim| (dim / PANEL * KEY_BLOCK + at) * PANEL + dim % PANEL,
                scale: |group| group * KEY_BLOCK + at,
            },
        );
    }

    /// Panels of keys of `head`: four of `key_dim` steps.
    pub(super) fn key_panels(&self, head: usize) -> Panels {
        self.0.keys.panels(head, self.0.sizes.key_dim)
    }

    /// Panels of values of `head`: one of 64 steps per 16 dimensions.
    pub(super) fn value_panels(&self, head: usize) -> Panels {
        self.0.values.panels(head, KEY_BLOCK)
    }
}

/// Numbers and scales of a head's keys, and of its values.
fn lengths(sizes: KvSizes) -> [Lengths; 2] {
    let of =
        |width: usize, dims: usize| (KEY_BLOCK * width, KEY_BLOCK * dims.div_ceil(SCALE_GROUP));
    [
        of(sizes.key_dim, sizes.key_dim),
        of(sizes.value_dim.next_multiple_of(PANEL), sizes.value_dim),
    ]
}

impl Page {
    fn n_bytes(&self) -> usize {
        self.keys.n_bytes() + self.values.n_bytes()
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        self.memory.0.fetch_add(self.n_bytes(), Ordering::Relaxed);
        Self {
            sizes: self.sizes,
            keys: self.keys.clone(),
            values: self.values.clone(),
            memory: self.memory.clone(),
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.memory.0.fetch_sub(self.n_bytes(), Ordering::Relaxed);
    }
}

/// Where the numbers and scales of a row are in a head's block.
struct Places<N: Fn(usize) -> usize, S: Fn(usize) -> usize> {
    number: N,
    scale: S,
}

impl Plane {
    fn new(format: KvFormat, n_heads: usize, block: usize, block_scales: usize) -> Self {
        let data = match format {
            KvFormat::F32 => Data::F32(vec![0.0; n_heads * block]),
            KvFormat::F16 => Data::F16(vec![0; n_heads * block]),
            KvFormat::Q8_0 => Data::Q8 {
                quants: vec![0; n_heads * block],
                scales: vec![0; n_heads * block_scales],
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

    /// The panels of a head's block; what is read after them is not known here.
    fn panels(&self, block: usize, n_steps: usize) -> Panels {
        let scales = block * self.block_scales;
        let range = block * self.block..(block + 1) * self.block;
        let (data, scales): (*const u8, _) = match &self.data {
            Data::F32(values) => (values[range].as_ptr().cast(), std::ptr::null()),
            Data::F16(bits) => (bits[range].as_ptr().cast(), std::ptr::null()),
            Data::Q8 {
                quants,
                scales: all,
            } => (
                quants[range].as_ptr().cast(),
                all[scales..][..self.block_scales].as_ptr(),
            ),
        };
        Panels {
            data,
            scales,
            n_steps,
            next: data,
            n_panels: self.block / (n_steps * PANEL).max(1),
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
