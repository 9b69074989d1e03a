//! From a checkpoint to a model: the explicit list of architectures, and how weights are held.

use std::sync::Arc;

use cadre_checkpoint::{Checkpoint, tensor_specs};
use cadre_kernels::{Compute, Isa, Kernels, doctor};
use cadre_routing::Steering;

use crate::builder::Builder;
use crate::decoder::Decoder;
use crate::error::{EngineError, Result};
use crate::lossy::Lossy;
use crate::model::Model;
use crate::models as m;
use crate::streaming::StreamOptions;
use crate::weights::Weights;

/// How weights are held in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quant {
    /// As they are stored, whatever the format.
    #[default]
    AsStored,
    /// Matrices as 8-bit blocks with an f16 scale, quantised while loading. Lossy. Norms and routers
    /// stay f32; matrices that are quantised already, or whose rows are not a multiple of 32, stay as stored.
    Q8_0,
}

/// How to load a model.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// How weights are held.
    pub quant: Quant,
    /// Instruction set; the best of this CPU when absent. Changes the last bits of results.
    pub isa: Option<Isa>,
    /// Threads; all of this machine's when absent. Changes no result.
    pub n_threads: Option<usize>,
    /// Whether weights stay where the file has them. They are otherwise copied into an order that memory is read
    /// fastest in. Changes no result.
    pub in_place: bool,
    /// Set for a model that is to take no more than so much memory: experts are then read from its file when they are
    /// wanted, and the most useful ones kept. Changes no result.
    pub stream: Option<StreamOptions>,
    /// What of the model's routing is not followed. Changes results; off by default.
    pub lossy: Lossy,
    /// How new sessions are steered, until [`Model::steer`] says otherwise. Changes results; empty by default.
    pub steering: Steering,
}

/// What is told how loading goes on.
pub type Progress<'a> = dyn Fn(u64) + Sync + 'a;

type Loader = fn(Builder<'_>) -> Result<Decoder>;

/// Every architecture by its `model_type`. One line per file of `models/`.
const LOADERS: &[(&str, Loader)] = &[
    ("cadre_moe", m::cadre_moe::load),
    ("deepseek_v2", m::deepseek_v2::load),
    ("deepseek_v3", m::deepseek_v3::load),
    ("gemma3_text", m::gemma3_text::load),
    ("glm4_moe", m::glm4_moe::load),
    ("gpt_oss", m::gpt_oss::load),
    ("granitemoe", m::granitemoe::load),
    ("llama", m::llama::load),
    ("mistral", m::mistral::load),
    ("mixtral", m::mixtral::load),
    ("olmoe", m::olmoe::load),
    ("phimoe", m::phimoe::load),
    ("qwen2", m::qwen2::load),
    ("qwen2_moe", m::qwen2_moe::load),
    ("qwen3", m::qwen3::load),
    ("qwen3_moe", m::qwen3_moe::load),
];

/// The architectures that [`load`] knows.
pub fn known_model_types() -> Vec<&'static str> {
    LOADERS.iter().map(|(name, _)| *name).collect()
}

/// Loads the model of `checkpoint`.
///
/// # Errors
/// An unknown architecture; a tensor that is missing, unexpected, of the wrong shape, or holds NaN or
/// infinities; an instruction set that this CPU lacks; a steering that does not fit the model.
pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Arc<dyn Model>> {
    load_watched(checkpoint, options, &|_| {})
}

/// [`load`], which tells `progress` how many bytes of weights it has just read, out of [`Checkpoint::data_bytes`]; from
/// several threads, and not every small tensor.
///
/// # Errors
/// As [`load`].
pub fn load_watched(
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    progress: &Progress<'_>,
) -> Result<Arc<dyn Model>> {
    load_from((checkpoint, None), options, progress)
}

/// [`load_watched`] a model that is streamed, with `low_bit` to read experts from that [`Lossy::low_bit`] is about: the same
/// model in fewer bits. Of that, nothing but experts is looked at.
///
/// # Errors
/// As [`load`], and [`EngineError::OtherModel`] when it is none of the same sizes.
pub fn load_with_low_bit(
    checkpoint: &Checkpoint,
    low_bit: &Checkpoint,
    options: &LoadOptions,
    progress: &Progress<'_>,
) -> Result<Arc<dyn Model>> {
    low_bit.expect_exactly(&tensor_specs(low_bit.config()))?;
    load_from((checkpoint, Some(low_bit)), options, progress)
}

fn load_from(
    (checkpoint, low_bit): (&Checkpoint, Option<&Checkpoint>),
    options: &LoadOptions,
    progress: &Progress<'_>,
) -> Result<Arc<dyn Model>> {
    let config = checkpoint.config();
    let Some((_, loader)) = LOADERS.iter().find(|(name, _)| *name == config.model_type) else {
        let found = config.model_type.clone();
        return Err(EngineError::UnknownModelType {
            found,
            known: known_model_types(),
        });
    };
    options.lossy.check(config, options.stream.is_some())?;
    if options.lossy.low_bit.is_some() != low_bit.is_some() {
        return Err(EngineError::BadOption {
            name: "cold experts in fewer bits",
            value: options.lossy.to_string(),
            expected: "a rule that says which, and a model to read them from".to_owned(),
        });
    }
    checkpoint.expect_exactly(&tensor_specs(config))?;
    let compute = Arc::new(compute(options)?);
    let weights = Weights::new((checkpoint, low_bit), options, compute, progress)?;
    let mut model = loader(Builder::new(weights))?;
    model.steer_new_sessions(&options.steering)?;
    Ok(Arc::new(model))
}

fn compute(options: &LoadOptions) -> Result<Compute> {
    let isa = options.isa.unwrap_or_else(Isa::detect);
    let Some(kernels) = Kernels::for_isa(isa) else {
        return Err(EngineError::IsaUnavailable {
            wanted: isa,
            available: Isa::available(),
        });
    };
    let n_threads = options.n_threads.unwrap_or_else(doctor::default_threads);
    if n_threads == 0 {
        return Err(EngineError::BadOption {
            name: "threads",
            value: "0".to_owned(),
            expected: "at least 1".to_owned(),
        });
    }
    Ok(Compute::new(kernels, n_threads))
}
