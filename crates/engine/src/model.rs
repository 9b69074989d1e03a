//! The interface of every model, and of what watches it.

use cadre_checkpoint::AttentionExperts;
use cadre_kernels::{Compute, Matrix};
use cadre_routing::{Routing, Steering};
use cadre_store::StoreStats;
use cadre_store::predictors::Score;

use crate::batch::Sequence;
use crate::error::Result;
use crate::lossy::Lossy;
use crate::session::{Session, SessionOptions};
use crate::workspace::Workspace;

/// A causal language model: immutable, shared among threads and sessions.
pub trait Model: Send + Sync + std::fmt::Debug {
    /// Sizes and identity.
    fn info(&self) -> &ModelInfo;

    /// Kernels and threads that the model computes with.
    fn compute(&self) -> &Compute;

    /// Every matrix of weights that stays in memory.
    fn matrices(&self) -> Vec<&Matrix>;

    /// What has been read from disk, for a model that does not fit into memory.
    fn store_stats(&self) -> Option<StoreStats>;

    /// Reads experts of a streamed model into memory, in the order of its files, as long as there is room; `progress` is
    /// told of each few that have been read. Does nothing for a model that is in memory.
    ///
    /// # Errors
    /// An expert cannot be read.
    fn preload(&self, progress: &dyn Fn(usize)) -> Result<()>;

    /// How well each way of guessing which experts will be wanted has done, for a model that is streamed and scored.
    fn predictor_scores(&self) -> Vec<Score>;

    /// A new, empty session.
    ///
    /// # Errors
    /// A context longer than the model's, or a size of zero.
    fn session(&self, options: &SessionOptions) -> Result<Session>;

    /// Changes the choice of experts for the tokens that `session` reads from now on, in place of how it was changed
    /// before; an empty steering is the model's own routing. What the session holds stays as it was read, and other
    /// sessions, also in one batch, do not notice.
    ///
    /// # Errors
    /// [`crate::EngineError::Steering`] for what does not fit the model, and [`crate::EngineError::BadOption`] for what
    /// cannot be had together with [`ModelInfo::lossy`]. The session stays as it was.
    fn steer(&self, session: &mut Session, steering: &Steering) -> Result<()>;

    /// Scratch memory for batches of up to `capacity` tokens in one pass, see [`Model::forward_batch`].
    ///
    /// # Errors
    /// A capacity of zero.
    fn workspace(&self, capacity: usize) -> Result<Workspace>;

    /// Reads `tokens` after those that `session` holds, and returns the logits of the positions that
    /// `want` names, `[n_wanted, vocab_size]`, all finite.
    ///
    /// Tokens are processed in chunks of the session's size; the cut changes no bit of the result. No
    /// tokens are fine. The returned buffer belongs to the session and may be changed by the caller.
    /// The first call makes the session's own [`Workspace`]; later ones allocate nothing, unless they want
    /// more rows of logits than any before.
    ///
    /// # Errors
    /// Too many tokens, an unknown token, or values that are not finite. The session then holds the
    /// chunks before the one that failed.
    fn forward<'s>(
        &self,
        session: &'s mut Session,
        tokens: &[u32],
        want: Logits,
        observer: &mut dyn Observer,
    ) -> Result<&'s mut [f32]>;

    /// Tells `observer` which experts reading the tokens of `batch` will pick, where that is known before the layers run: of
    /// models whose router runs before them. Others tell nothing, and this is false. No session advances.
    ///
    /// # Errors
    /// As [`Model::forward_batch`].
    fn foretold(
        &self,
        batch: &mut [Sequence<'_>],
        workspace: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let _ = (batch, workspace, observer);
        Ok(false)
    }

    /// Reads the tokens of several sequences in one pass over the weights, and returns the logits that they want,
    /// one sequence after the other, `[n_wanted, vocab_size]`, all finite.
    ///
    /// A sequence's logits are the same, bit for bit, whatever else is in the batch, and the same as those of
    /// [`Model::forward`]. The returned buffer belongs to the workspace and may be changed by the caller.
    ///
    /// # Errors
    /// More tokens than the workspace's capacity, or [`crate::EngineError::InBatch`], which names the sequence, for
    /// what [`Model::forward`] refuses. No session has advanced then.
    fn forward_batch<'w>(
        &self,
        batch: &mut [Sequence<'_>],
        workspace: &'w mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<&'w mut [f32]>;
}

/// Positions whose logits a call computes. Rows that are not wanted cost nothing, also in the last layer, except for
/// their keys and values, unless an observer watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: only the session advances.
    None,
    /// The last token's.
    Last,
    /// One row per token of the call.
    All,
}

impl Logits {
    /// Rows that are wanted of `n_tokens`: the last ones.
    #[must_use]
    pub fn n_rows(self, n_tokens: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => n_tokens.min(1),
            Self::All => n_tokens,
        }
    }
}

/// Sizes of a loaded model. What identifies its weights is [`cadre_checkpoint::Checkpoint::digest`].
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Architecture, as the configuration spells it.
    pub model_type: String,
    /// Rows of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Layers that have experts, ascending.
    pub moe_layers: Vec<usize>,
    /// Experts per MoE layer, null ones not counted; the most of any where layers differ.
    pub n_experts: usize,
    /// Experts of each of `moe_layers`, null ones not counted.
    pub experts_per_layer: Vec<usize>,
    /// Null experts per MoE layer: ids that follow those of the layer's experts, and compute nothing.
    pub n_null: usize,
    /// The most experts that one token is sent to, null ones counted, as the checkpoint asks for.
    pub top_k: usize,
    /// Experts that the attention of every layer is cut into, beside those above, if it is.
    pub attention_experts: Option<AttentionExperts>,
    /// Longest context of the model.
    pub max_context: usize,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Parameters, tied ones counted once.
    pub n_params: u64,
    /// Parameters that one token's forward pass multiplies by or looks up.
    pub n_active_params: u64,
    /// Bytes of all weights in memory; of experts on disk, the most that they take there.
    pub weight_bytes: u64,
    /// What of the routing is not followed.
    pub lossy: Lossy,
    /// How new sessions are steered.
    pub steering: Steering,
}

impl ModelInfo {
    /// Ids that picks of any layer may have: experts and null experts of the layer that has most.
    #[must_use]
    pub fn n_ids(&self) -> usize {
        self.n_experts + self.n_null
    }
}

/// The routing of one sequence's tokens of a pass in one layer.
#[derive(Clone, Copy, Debug)]
pub struct RoutingEvent<'a> {
    /// Index of the sequence in the batch; 0 outside of batches.
    pub sequence: usize,
    /// Layer of the model, dense ones counted.
    pub layer: usize,
    /// Position in the sequence of the first token.
    pub first_position: usize,
    /// Router logits before the policy and before any steering, `[n_tokens, n]` with the layer's experts and null experts; where picks are random,
    /// the numbers that were drawn.
    pub logits: &'a [f32],
    /// Experts and weights of every token.
    pub routing: &'a Routing,
    /// Norm of each picked expert's output before its weight, one per pair of `routing` in its order;
    /// empty unless [`Observer::wants_norms`]. Experts that are not computed have 0.
    pub norms: &'a [f32],
}

/// Values of one sequence's tokens of a pass at one place of one layer.
#[derive(Clone, Copy, Debug)]
pub struct RowsEvent<'a> {
    /// Index of the sequence in the batch; 0 outside of batches.
    pub sequence: usize,
    /// Layer of the model, dense ones counted.
    pub layer: usize,
    /// Position in the sequence of the first token.
    pub first_position: usize,
    /// Length of a row.
    pub width: usize,
    /// A row for every token, `[n_tokens, width]`.
    pub rows: &'a [f32],
}

/// Watches the routing of a forward pass: once per router of a layer, pass and sequence with tokens, layers ascending.
pub trait Observer {
    /// Called after the layer's experts have been combined.
    fn routed(&mut self, event: &RoutingEvent<'_>);

    /// Called after the experts that a layer's attention is cut into have been combined, before [`Observer::routed`] of
    /// the same layer. Their ids have nothing to do with those of the feed-forward's experts.
    fn attention_routed(&mut self, _event: &RoutingEvent<'_>) {}

    /// Whether events are wanted at all. Who does not watch gets none, and saves the last layer the tokens whose logits
    /// are not wanted. Asked anew in every layer; it must not change during a pass.
    fn watches(&self) -> bool {
        true
    }

    /// Whether events should carry the norms of the experts' outputs.
    fn wants_norms(&self) -> bool {
        false
    }

    /// Whether [`Observer::entered`] is wanted.
    fn wants_stream(&self) -> bool {
        false
    }

    /// Called before every layer with the residual stream as it enters it, rows of `d_model`.
    fn entered(&mut self, _event: &RowsEvent<'_>) {}

    /// Whether [`Observer::activated`] is wanted. Who does not watch misses tokens of the last layer.
    fn wants_neurons(&self) -> bool {
        false
    }

    /// Called after every dense feed-forward with what its last product multiplies, rows of its width.
    fn activated(&mut self, _event: &RowsEvent<'_>) {}
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn routed(&mut self, _event: &RoutingEvent<'_>) {}

    fn watches(&self) -> bool {
        false
    }
}
