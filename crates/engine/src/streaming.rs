//! Experts that do not all fit into memory: how the store finds, reads and makes them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cadre_checkpoint::{Checkpoint, FileRange, ModelConfig, TensorOnDisk};
use cadre_kernels::{Bytes, Compute, Matrix, PlacedMemory};
use cadre_store::{AheadKind, ExpertId, Form, Piece, Store, StoreError, StoreOptions};

use crate::blocks::{Factored, FactoredExpert, FeedForward, Linear, factored_rows};
use crate::error::{EngineError, Result};
use crate::load::{LoadOptions, Quant};
use crate::weights::{self, weight_error};

/// The three matrices of an expert, in the order of [`FeedForward`].
const PARTS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Of experts in factors, the two of each of these.
const THIN: [&str; 2] = ["inner", "outer"];

/// How a model runs that is larger than the memory it may take.
#[derive(Clone, Copy, Debug)]
pub struct StreamOptions {
    /// Bytes that all weights may take: those that every token uses, and as many experts as fit beside them.
    pub budget: u64,
    /// Who says what is read before it is wanted; absent: the model's own router, which is asked a layer early, or has run
    /// before the layers.
    pub ahead: Option<AheadKind>,
    /// What is kept and how files are read; its own budget, `ahead` and `foreseen` are not looked at.
    pub store: StoreOptions,
}

impl StreamOptions {
    /// The usual way, within `budget` bytes.
    #[must_use]
    pub fn new(budget: u64) -> Self {
        Self {
            budget,
            ahead: None,
            store: StoreOptions::default(),
        }
    }
}

/// The experts of a model on disk.
pub(crate) type ExpertStore = Store<StoredExperts>;

/// Makes experts of what is read for them.
#[derive(Debug)]
pub(crate) struct StoredExperts {
    compute: Arc<Compute>,
    /// By layer, then expert; after the experts of a layer come their copies in fewer bits, where there are any.
    experts: Vec<Vec<StoredExpert>>,
    activation: cadre_checkpoint::Activation,
}

/// An expert that has been read.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "all experts of a model are of one kind, and a slot holds one"
)]
pub(crate) enum MadeExpert {
    Whole(FeedForward),
    Factored(FactoredExpert),
}

#[derive(Debug)]
struct StoredExpert {
    /// One for each of [`PARTS`], or in factors two.
    tensors: Vec<TensorOnDisk>,
    biases: Option<[Vec<f32>; 3]>,
    /// Of experts in factors, by part: where rows of their own are added.
    rows: Option<[Vec<u32>; 3]>,
    /// In the order of the files.
    pieces: Vec<Piece>,
    /// Which pieces each tensor is put together from.
    pieces_of: Vec<Vec<u8>>,
    n_bytes: usize,
    float_activations: bool,
    /// Whether its values have been found to be finite.
    is_checked: AtomicBool,
}

/// Read a row at a time where it is not the head as well.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Whether a tensor is a matrix of an expert, which is read when it is wanted.
fn is_streamed(name: &str) -> bool {
    name.contains(".mlp.experts.") && name.ends_with(".weight")
}

/// Bytes of the weights that every token uses, as they are stored.
#[must_use]
pub fn dense_bytes(checkpoint: &Checkpoint) -> u64 {
    let is_tied = checkpoint.config().tie_word_embeddings;
    let is_on_disk = |name: &str| is_streamed(name) || (name == EMBEDDING && !is_tied);
    let dense = checkpoint
        .tensor_infos()
        .filter(|(name, ..)| !is_on_disk(name));
    dense
        .map(|(_, dtype, shape)| dtype.n_bytes(shape.iter().product()).unwrap_or(0) as u64)
        .sum()
}

/// Bytes of an embedding that is not the head as well, which may stay on disk; 0 where there is none.
pub(crate) fn embedding_bytes(checkpoint: &Checkpoint) -> u64 {
    let is_tied = checkpoint.config().tie_word_embeddings;
    let info = checkpoint.tensor_info(EMBEDDING).filter(|_| !is_tied);
    info.and_then(|(dtype, shape)| dtype.n_bytes(shape.iter().product()))
        .unwrap_or(0) as u64
}

/// The store of a checkpoint's experts, and of the copies of them that `low_bit` has; `None` for a model without.
pub(crate) fn open(
    (checkpoint, low_bit): (&Checkpoint, Option<&Checkpoint>),
    options: &LoadOptions,
    stream: &StreamOptions,
    compute: &Arc<Compute>,
) -> Result<Option<Arc<ExpertStore>>> {
    let config = checkpoint.config();
    let moe = &config.moe;
    let dense = dense_bytes(checkpoint);
    if moe.n_experts == 0 {
        return match dense <= stream.budget {
            true => Ok(None),
            false => Err(EngineError::BudgetTooSmall {
                budget: stream.budget,
                needed: dense,
                dense,
            }),
        };
    }
    if options.quant != Quant::AsStored {
        return Err(EngineError::BadOption {
            name: "quantisation while loading",
            value: "q8_0".to_owned(),
            expected: "none, since experts that stay on disk are used as they are stored; \
                       convert the checkpoint first"
                .to_owned(),
        });
    }
    let mut files = Vec::new();
    let mut form = StoredExperts::find(checkpoint, compute, &mut files)?;
    let mut n_experts = moe.n_experts;
    if let Some(low_bit) = low_bit {
        same_sizes(checkpoint, low_bit)?;
        let copies = StoredExperts::find(low_bit, compute, &mut files)?;
        for (experts, copies) in form.experts.iter_mut().zip(copies.experts) {
            experts.extend(copies);
        }
        n_experts *= 2;
    }
    let layers = config.moe_layers().len();
    let mut store_options = stream.store;
    store_options.budget = stream.budget.saturating_sub(dense);
    store_options.foreseen = moe.decoupled_router.is_some();
    store_options.ahead = ahead(stream.ahead, store_options.foreseen)?;
    let store = Store::new(form, [layers, n_experts], &files, &store_options)?;
    let needed = dense + store.n_bytes();
    if needed > stream.budget {
        return Err(EngineError::BudgetTooSmall {
            budget: stream.budget,
            needed,
            dense,
        });
    }
    if !store.is_direct() {
        tracing::warn!(
            "this file system does not let files be read past the system's cache; they are read through it, which is slower"
        );
    }
    tracing::debug!(
        n_cached = store.n_cached(),
        reader = store.reader(),
        "experts are read from disk when they are wanted"
    );
    Ok(Some(Arc::new(store)))
}

/// Who says what is read early in a model whose picks are `foreseen`, or are not.
fn ahead(wanted: Option<AheadKind>, foreseen: bool) -> Result<AheadKind> {
    let (own, other, reason) = match foreseen {
        true => (
            AheadKind::Exact,
            AheadKind::Gate,
            "another way, such as exact: the router of this model runs before the layers, which have none to ask",
        ),
        false => (
            AheadKind::Gate,
            AheadKind::Exact,
            "another way, such as gate: the routers of this model wait for its layers, so that nothing is certain before",
        ),
    };
    match wanted {
        None => Ok(own),
        Some(kind) if kind != other => Ok(kind),
        Some(kind) => Err(EngineError::BadOption {
            name: "reading ahead",
            value: kind.to_string(),
            expected: reason.to_owned(),
        }),
    }
}

/// Refuses experts that could not take the place of the model's own.
fn same_sizes(checkpoint: &Checkpoint, other: &Checkpoint) -> Result<()> {
    let sizes = |checkpoint: &Checkpoint| {
        let config = checkpoint.config();
        let layers = config.moe_layers();
        let counts: Vec<usize> = layers.iter().map(|l| config.n_experts_in(*l)).collect();
        let (d, width) = (config.hidden_size, config.moe.intermediate_size);
        let kind = (
            config.model_type.clone(),
            config.activation,
            config.moe.factors.clone(),
        );
        (kind, config.n_layers, layers, counts, d, width)
    };
    let (wanted, found) = (sizes(checkpoint), sizes(other));
    if wanted == found {
        return Ok(());
    }
    Err(EngineError::OtherModel {
        found: other.origin().to_string(),
        wanted: checkpoint.origin().to_string(),
    })
}

impl StoredExperts {
    fn find(
        checkpoint: &Checkpoint,
        compute: &Arc<Compute>,
        files: &mut Vec<PathBuf>,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let mut experts = Vec::new();
        for (at, layer) in config.moe_layers().into_iter().enumerate() {
            let mut of_layer = Vec::new();
            for expert in 0..config.n_stored_in(layer) {
                let prefix = format!("model.layers.{layer}.mlp.experts.{expert}");
                let factors = config.moe.factors.as_ref();
                let rows = factors.map(|factors| factors.rows_of(at, expert));
                let place = (prefix.as_str(), rows, &**compute);
                let found = StoredExpert::find(checkpoint, config, place, files)?;
                of_layer.push(found);
            }
            experts.push(of_layer);
        }
        Ok(Self {
            compute: Arc::clone(compute),
            experts,
            activation: config.activation,
        })
    }

    fn get(&self, id: ExpertId) -> &StoredExpert {
        &self.experts[usize::from(id.layer)][usize::from(id.expert)]
    }

    /// The `N` matrices of `stored`, in `memory`.
    fn placed<const N: usize>(
        &self,
        stored: &StoredExpert,
        pieces: &[Bytes],
        memory: &mut PlacedMemory,
    ) -> Result<[Matrix; N]> {
        let read = (0..N)
            .map(|at| stored.matrix(at, pieces))
            .collect::<Result<Vec<Matrix>>>()?;
        stored.is_checked.store(true, Ordering::Relaxed);
        let placed = self
            .compute
            .place(memory, std::array::from_fn::<_, N, _>(|at| &read[at]));
        let n_bytes = stored.n_bytes;
        placed.ok_or_else(|| StoreError::NoMemory { n_bytes }.into())
    }
}

impl StoredExpert {
    fn find(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        (prefix, rows, compute): (&str, Option<[usize; 3]>, &Compute),
        files: &mut Vec<PathBuf>,
    ) -> Result<Self> {
        let tensor = |part: String| checkpoint.tensor_on_disk(&format!("{prefix}.{part}.weight"));
        let tensors: Vec<TensorOnDisk> = PARTS
            .iter()
            .flat_map(|part| match rows {
                None => vec![(*part).to_owned()],
                Some(_) => THIN.map(|thin| format!("{part}.{thin}")).to_vec(),
            })
            .map(tensor)
            .collect::<cadre_checkpoint::Result<_>>()?;
        let mut pieces: Vec<Piece> = Vec::new();
        for source in tensors.iter().flat_map(TensorOnDisk::sources) {
            let piece = piece(source, files);
            if !pieces.contains(&piece) {
                pieces.push(piece);
            }
        }
        pieces.sort_by_key(|piece| (piece.file, piece.range.start));
        let places = |tensor: &TensorOnDisk| {
            let sources = tensor.sources().iter();
            let places = sources.map(|source| {
                let wanted = piece(source, files);
                pieces
                    .iter()
                    .position(|piece| *piece == wanted)
                    .unwrap_or(0) as u8
            });
            places.collect()
        };
        let pieces_of = tensors.iter().map(places).collect();
        let n_bytes = tensors.iter().map(|tensor| {
            let &[n_out, n_in] = tensor.shape() else {
                return 0;
            };
            compute.placed_bytes(tensor.dtype(), [n_out, n_in])
        });
        let (width, d) = (config.moe.intermediate_size, config.hidden_size);
        let biases = match config.moe.expert_bias {
            false => None,
            true => {
                let bias = |part, n| checkpoint.tensor_f32(&format!("{prefix}.{part}.bias"), &[n]);
                Some([
                    bias(PARTS[0], width)?,
                    bias(PARTS[1], width)?,
                    bias(PARTS[2], d)?,
                ])
            }
        };
        let places = |n_rows: [usize; 3]| {
            let of = |at: usize, n_out: usize| {
                let name = format!("{prefix}.{}.rows", PARTS[at]);
                let values = match n_rows[at] {
                    0 => Vec::new(),
                    n => checkpoint.tensor_f32(&name, &[n])?,
                };
                factored_rows(&config.model_type, &name, values, n_out)
            };
            Ok::<_, EngineError>([of(0, width)?, of(1, width)?, of(2, d)?])
        };
        Ok(Self {
            n_bytes: n_bytes.sum(),
            rows: rows.map(places).transpose()?,
            tensors,
            biases,
            pieces,
            pieces_of,
            float_activations: !checkpoint.is_gguf(),
            is_checked: AtomicBool::new(false),
        })
    }

    /// The matrix of tensor `at`, over what was read.
    fn matrix(&self, at: usize, pieces: &[Bytes]) -> Result<Matrix> {
        let tensor = &self.tensors[at];
        let fail = |source| weight_error(tensor.stored_name(), source);
        let read = self.pieces_of[at]
            .iter()
            .map(|piece| pieces[usize::from(*piece)].clone());
        let view = tensor.view(&read.collect::<Vec<Bytes>>());
        let &[n_out, n_in] = view.shape else {
            unreachable!("shapes were compared when the checkpoint was opened");
        };
        let matrix =
            weights::matrix_of(&view, [n_out, n_in], !self.float_activations).map_err(fail)?;
        if !self.is_checked.load(Ordering::Relaxed)
            && let Some((row, column)) = matrix.first_non_finite()
        {
            return Err(EngineError::NonFiniteWeight {
                tensor: tensor.stored_name().to_owned(),
                row,
                column,
            });
        }
        Ok(matrix)
    }
}

fn piece(source: &FileRange, files: &mut Vec<PathBuf>) -> Piece {
    let known = files.iter().position(|file| **file == *source.path);
    let file = known.unwrap_or_else(|| {
        files.push(source.path.to_path_buf());
        files.len() - 1
    });
    Piece {
        file,
        range: source.range.clone(),
    }
}

impl Form for StoredExperts {
    type Expert = MadeExpert;
    type Memory = PlacedMemory;
    type Error = EngineError;

    fn exists(&self, expert: ExpertId) -> bool {
        let of_layer = self.experts.get(usize::from(expert.layer));
        of_layer.is_some_and(|of_layer| usize::from(expert.expert) < of_layer.len())
    }

    fn pieces(&self, expert: ExpertId) -> &[Piece] {
        &self.get(expert).pieces
    }

    fn n_bytes(&self, expert: ExpertId) -> usize {
        self.get(expert).n_bytes
    }

    fn memory(&self, n_bytes: usize) -> Option<PlacedMemory> {
        self.compute.memory(n_bytes)
    }

    fn make(
        &self,
        expert: ExpertId,
        pieces: &[Bytes],
        memory: &mut PlacedMemory,
    ) -> Result<MadeExpert> {
        let stored = self.get(expert);
        if let Some(rows) = &stored.rows {
            let [gate, gate_outer, up, up_outer, down, down_outer] =
                self.placed(stored, pieces, memory)?;
            let part = |at: usize, inner, outer| Factored {
                inner,
                outer,
                rows: rows[at].clone(),
            };
            return Ok(MadeExpert::Factored(FactoredExpert {
                gate_proj: part(0, gate, gate_outer),
                up_proj: part(1, up, up_outer),
                down_proj: part(2, down, down_outer),
                activation: self.activation,
            }));
        }
        let [gate, up, down] = self.placed(stored, pieces, memory)?;
        let linear = |at: usize, weight| Linear {
            weight,
            bias: stored.biases.as_ref().map(|biases| biases[at].clone()),
        };
        Ok(MadeExpert::Whole(FeedForward {
            gate_proj: linear(0, gate),
            up_proj: linear(1, up),
            down_proj: linear(2, down),
            activation: self.activation,
        }))
    }
}
