//! A session: everything that changes while one sequence is read and written.

use cadre_kernels::{Kernels, KvFormats, MatmulScratch};

use cadre_checkpoint::MlaConfig;

use crate::blocks::{KvCache, KvShape, MoeScratch, MoeShape, RopeAngles};
use crate::decoder::AnyAttentionScratch;
use crate::error::{EngineError, Result};
use crate::model::ModelInfo;

/// The context that a session gets unless told otherwise, when the model allows more.
const DEFAULT_CONTEXT: usize = 4096;

/// How large a session is.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Tokens that the session can hold; the smaller of 4096 and the model's limit when absent.
    pub n_ctx: Option<usize>,
    /// Tokens that are processed together. More are faster and need more scratch memory.
    pub chunk: usize,
    /// How keys and values are stored. Anything but f32, the default, changes results a little.
    pub kv: KvFormats,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            n_ctx: None,
            chunk: 256,
            kv: KvFormats::default(),
        }
    }
}

impl SessionOptions {
    /// Tokens that a session of a model whose limit is `max_context` holds.
    #[must_use]
    pub fn context(&self, max_context: usize) -> usize {
        self.n_ctx.unwrap_or(DEFAULT_CONTEXT.min(max_context))
    }
}

/// The sizes that a session is made for. A session fits every model of the same sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SessionShape {
    pub(crate) d_model: usize,
    pub(crate) kv: KvShape,
    /// Sizes of latent attention, where the model has it.
    pub(crate) mla: Option<MlaConfig>,
    pub(crate) n_heads: usize,
    /// Different rotations.
    pub(crate) n_ropes: usize,
    pub(crate) moe: MoeShape,
    /// Width of the widest dense feed-forward; 0 when there is none.
    pub(crate) d_dense: usize,
}

/// The state of one sequence: keys and values, scratch memory, the position.
#[derive(Debug)]
pub struct Session {
    pub(crate) shape: SessionShape,
    pub(crate) kv: KvCache,
    pub(crate) position: usize,
    pub(crate) n_ctx: usize,
    pub(crate) chunk: usize,
    pub(crate) scratch: Scratch,
}

/// Memory that a forward pass writes and forgets, allocated once.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// Residual stream, `[chunk, d_model]`.
    pub(crate) hidden: Vec<f32>,
    /// Input of a block, `[chunk, d_model]`.
    pub(crate) normed: Vec<f32>,
    /// Output of a block, `[chunk, d_model]`.
    pub(crate) block_out: Vec<f32>,
    /// Rotary angles of the chunk, one per rotation of the model.
    pub(crate) angles: Vec<RopeAngles>,
    pub(crate) attention: AnyAttentionScratch,
    pub(crate) moe: MoeScratch,
    pub(crate) matmul: MatmulScratch,
    /// Grows to the rows that are asked for.
    pub(crate) logits: Vec<f32>,
}

impl SessionShape {
    /// Widest product input inside of attention, per token.
    fn attention_width(&self) -> usize {
        match &self.mla {
            Some(mla) => {
                let per_head = mla
                    .kv_lora_rank
                    .max(mla.v_head_dim)
                    .max(mla.qk_nope_head_dim);
                self.n_heads * per_head
            }
            None => self.n_heads * self.kv.key_dim,
        }
    }
}

impl Session {
    pub(crate) fn new(
        kernels: Kernels,
        info: &ModelInfo,
        shape: SessionShape,
        options: &SessionOptions,
    ) -> Result<Self> {
        let n_ctx = options.context(info.max_context);
        let bad = |name, value: usize, expected: String| {
            Err(EngineError::BadOption {
                name,
                value: value.to_string(),
                expected,
            })
        };
        if n_ctx == 0 || n_ctx > info.max_context {
            let expected = format!(
                "1 to {}, the longest context of the model",
                info.max_context
            );
            return bad("context size", n_ctx, expected);
        }
        if options.chunk == 0 {
            return bad("chunk", 0, "at least 1".to_owned());
        }
        let chunk = options.chunk.min(n_ctx);
        let rows = |width: usize| vec![0.0; chunk * width];
        let widest = shape
            .d_model
            .max(shape.attention_width())
            .max(shape.d_dense);
        let moe = MoeScratch::new(&shape.moe, shape.d_dense, chunk);
        let scratch = Scratch {
            hidden: rows(shape.d_model),
            normed: rows(shape.d_model),
            block_out: rows(shape.d_model),
            angles: (0..shape.n_ropes).map(|_| RopeAngles::default()).collect(),
            attention: AnyAttentionScratch::new(&shape, chunk),
            matmul: MatmulScratch::with_capacity((chunk * widest).max(moe.largest_input())),
            moe,
            logits: Vec::new(),
        };
        Ok(Self {
            kv: KvCache::new(kernels, &shape.kv, options.kv, n_ctx),
            shape,
            position: 0,
            n_ctx,
            chunk,
            scratch,
        })
    }

    /// Tokens that the session holds; the next one gets this position.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Tokens that it can hold.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Tokens that still fit.
    pub fn free(&self) -> usize {
        self.n_ctx - self.position
    }

    /// Tokens that are processed together.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Forgets the tokens from `position` on; does nothing when there are none.
    pub fn rewind(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    /// Bytes of the key and value cache.
    pub fn kv_bytes(&self) -> usize {
        self.kv.n_bytes()
    }

    /// The error of `n_tokens` more, if they do not fit.
    pub(crate) fn check_room(&self, n_tokens: usize) -> Result<()> {
        if n_tokens <= self.free() {
            return Ok(());
        }
        Err(EngineError::ContextFull {
            position: self.position,
            n_tokens,
            n_ctx: self.n_ctx,
        })
    }
}
