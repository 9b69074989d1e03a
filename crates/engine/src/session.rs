//! A session: everything that one sequence remembers from one pass to the next.

use std::sync::Arc;

use cadre_checkpoint::MlaConfig;
use cadre_kernels::{Kernels, KvFormats};
use cadre_routing::Steered;

use crate::blocks::{DecoupledShape, KvCache, KvShape, MoeShape};
use crate::error::{EngineError, Result};
use crate::model::ModelInfo;
use crate::workspace::Workspace;

/// The context that a session gets unless told otherwise, when the model allows more.
const DEFAULT_CONTEXT: usize = 4096;

/// How large a session is.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Tokens that the session can hold; the smaller of 4096 and the model's limit when absent.
    pub n_ctx: Option<usize>,
    /// Tokens that [`crate::Model::forward`] processes together. More are faster, since every expert then serves more
    /// of them, and need more scratch memory: see [`Workspace`].
    pub chunk: usize,
    /// How keys and values are stored. Anything but f32, the default, changes results a little.
    pub kv: KvFormats,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            n_ctx: None,
            chunk: 512,
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

/// The sizes that a session and a workspace are made for. They fit every model of the same sizes.
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
    /// Sizes of a router that runs before the model, where there is one.
    pub(crate) decoupled: Option<DecoupledShape>,
    /// Width of the widest dense feed-forward; 0 when there is none.
    pub(crate) d_dense: usize,
}

/// The state of one sequence: keys and values, and the position.
#[derive(Debug)]
pub struct Session {
    pub(crate) shape: SessionShape,
    pub(crate) kv: KvCache,
    pub(crate) position: usize,
    pub(crate) n_ctx: usize,
    /// How the choice of experts is changed, if it is; see [`crate::Model::steer`].
    pub(crate) steering: Option<Arc<Steered>>,
    chunk: usize,
    /// Made when the session is first computed alone; batches bring their own.
    workspace: Option<Box<Workspace>>,
}

impl SessionShape {
    /// Widest product input inside of attention, per token.
    pub(crate) fn attention_width(&self) -> usize {
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
        let kv = KvCache::new(kernels, &shape.kv, options.kv, n_ctx);
        let kv = match &shape.decoupled {
            None => kv,
            Some(router) => kv.with_router(kernels, router, n_ctx),
        };
        Ok(Self {
            kv,
            shape,
            position: 0,
            n_ctx,
            steering: None,
            chunk: options.chunk.min(n_ctx),
            workspace: None,
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

    /// Tokens that are processed together when the session is computed alone.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Forgets the tokens from `position` on; does nothing when there are none. Their memory is kept for the next ones,
    /// see [`Session::give_up_unused`].
    pub fn rewind(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    /// Bytes of the key and value cache when it is full; memory is taken as it fills.
    pub fn kv_bytes(&self) -> usize {
        self.kv.n_bytes()
    }

    /// The session's own workspace, for a chunk of its tokens. [`Session::give_back`] keeps it for the next call.
    pub(crate) fn take_workspace(&mut self) -> Result<Box<Workspace>> {
        match self.workspace.take() {
            Some(workspace) => Ok(workspace),
            None => Ok(Box::new(Workspace::new(self.shape.clone(), self.chunk)?)),
        }
    }

    pub(crate) fn give_back(&mut self, workspace: Box<Workspace>) -> &mut Workspace {
        self.workspace.insert(workspace)
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
