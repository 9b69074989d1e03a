//! The experts of an output in the words of its source: kept, mixed of several, or padding; and the pieces of which their
//! tensors are put together.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;

use crate::checkpoint::Checkpoint;
use crate::config::Factors;
use crate::error::Result;

/// Bytes that are copied at a time.
pub(super) const COPIED: usize = 4 << 20;

/// The experts that a model is to have.
#[derive(Debug, Clone)]
pub struct NewExperts {
    /// For every layer with experts, ascending: its experts in their new order.
    pub layers: Vec<Vec<NewExpert>>,
    /// For every layer with experts, where routers keep all of their rows: for each row the place in its list of the expert
    /// that it stands for. Empty: every new expert has a row of its own.
    pub rows: Vec<Vec<u16>>,
    /// How the matrices of experts are written, where not whole; all of them are then [`NewExpert::Mixed`], and the mixer
    /// is asked for `gate_proj.inner`, `gate_proj.outer` and `gate_proj.rows`.
    pub factors: Option<Factors>,
    /// Who makes [`NewExpert::Mixed`]; needed only where there are some.
    pub mixer: Option<Arc<dyn Mixer>>,
    /// Experts that a token gets, where not as many as before.
    pub top_k: Option<usize>,
    /// What corrects the choice of an expert (`e_score_correction_bias`), where it is not what it was: by decoder layer and expert
    /// of the source. Routers that are not corrected so have no place for it.
    pub corrections: BTreeMap<(usize, usize), f32>,
}

/// One expert of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewExpert {
    /// This expert of the source, byte for byte, with its row of the router.
    Kept(usize),
    /// What the [`Mixer`] makes, with the row of the router of this expert of the source.
    Mixed(usize),
    /// Zeros that are never picked, to fill a layer up: only for routers with a bias.
    Never,
}

/// Makes experts of several.
pub trait Mixer: Debug + Send + Sync {
    /// The values, row-major, of `part` (`gate_proj.weight`) of the expert that has place `at` in the output's list of
    /// decoder layer `layer`.
    ///
    /// # Errors
    /// A tensor of the source cannot be read.
    fn mix(&self, source: &Checkpoint, layer: usize, at: usize, part: &str) -> Result<Vec<f32>>;

    /// Bytes of memory that [`Mixer::mix`] takes at most beside its result, for a part of `n` values.
    fn memory(&self, source: &Checkpoint, n: usize) -> usize {
        let _ = source;
        // A matrix as it is stored, decoded, and once more as f32.
        12 * n
    }

    /// Whether that part is, byte for byte, the one of the expert whose row of the router it has. `part` may be about scales as well
    /// (`gate_proj.weight_scale_inv`), or begin only with the name of the matrix.
    fn keeps(&self, layer: usize, at: usize, part: &str) -> bool {
        let _ = (layer, at, part);
        false
    }
}

/// A part of a tensor to be written.
#[derive(Debug, Clone)]
pub(super) enum Piece {
    /// As the source has it.
    Stored(Bytes),
    /// So many bytes of 0, which is 0 in every format.
    Zeros(usize),
    /// These values, in the format of the tensor.
    Values(Vec<f32>),
    /// Made when it is written, in the format of the tensor.
    Mixed(MixedPart),
}

/// One matrix or bias of an expert that is mixed.
#[derive(Debug, Clone)]
pub(super) struct MixedPart {
    pub(super) mixer: Arc<dyn Mixer>,
    pub(super) layer: usize,
    pub(super) at: usize,
    pub(super) part: String,
}

impl MixedPart {
    pub(super) fn values(&self, source: &Checkpoint) -> Result<Vec<f32>> {
        self.mixer.mix(source, self.layer, self.at, &self.part)
    }
}

impl Piece {
    /// The piece with the stored bytes that are copied at a time; nothing beside a piece that is not stored.
    pub(super) fn chunks(&self) -> Vec<(&Self, &[u8])> {
        match self {
            Self::Stored(bytes) => bytes.chunks(COPIED).map(|chunk| (self, chunk)).collect(),
            _ => vec![(self, &[][..])],
        }
    }
}
