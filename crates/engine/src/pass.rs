//! The forward pass: a batch of sequences through the layers of the decoder.
//!
//! The rows of all sequences lie one after the other, and every product over the weights takes all of them. What a row
//! becomes does not depend on the rows beside it.

use cadre_kernels::{Compute, Matrix};
use cadre_routing::{RoutingError, Steering};
use cadre_store::StoreStats;
use cadre_store::predictors::Score;

use crate::batch::{Sequence, Span, n_rows, span_of};
use crate::blocks::{Ahead, MoeError, Norm, Step};
use crate::decoder::{AnyFeedForward, Decoder, Layer};
use crate::error::{EngineError, Result};
use crate::model::{Logits, Model, ModelInfo, Observer, RowsEvent};
use crate::session::{Session, SessionOptions};
use crate::workspace::Workspace;

/// An error, and the sequence of the batch that it is about.
struct Failure {
    sequence: usize,
    error: EngineError,
}

impl From<Failure> for EngineError {
    fn from(failure: Failure) -> Self {
        Self::InBatch {
            sequence: failure.sequence,
            source: Box::new(failure.error),
        }
    }
}

impl Model for Decoder {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn compute(&self) -> &Compute {
        &self.compute
    }

    fn matrices(&self) -> Vec<&Matrix> {
        Decoder::matrices(self)
    }

    fn store_stats(&self) -> Option<StoreStats> {
        Some(self.store.as_ref()?.stats())
    }

    fn preload(&self, progress: &dyn Fn(usize)) -> Result<()> {
        match &self.store {
            None => Ok(()),
            Some(store) => store.preload(progress),
        }
    }

    fn predictor_scores(&self) -> Vec<Score> {
        self.store
            .as_ref()
            .map(|store| store.scores())
            .unwrap_or_default()
    }

    fn session(&self, options: &SessionOptions) -> Result<Session> {
        let kernels = self.compute.kernels();
        let mut session = Session::new(kernels, &self.info, self.shape.clone(), options)?;
        session.steering.clone_from(&self.steering);
        Ok(session)
    }

    fn steer(&self, session: &mut Session, steering: &Steering) -> Result<()> {
        if session.shape != self.shape {
            return Err(EngineError::ForeignSession);
        }
        session.steering = self.prepare(steering)?;
        Ok(())
    }

    fn workspace(&self, capacity: usize) -> Result<Workspace> {
        Workspace::new(self.shape.clone(), capacity)
    }

    fn forward<'s>(
        &self,
        session: &'s mut Session,
        tokens: &[u32],
        want: Logits,
        observer: &mut dyn Observer,
    ) -> Result<&'s mut [f32]> {
        self.check(session, tokens)?;
        let n_logits = want.n_rows(tokens.len()) * self.info.vocab_size;
        let mut workspace = session.take_workspace()?;
        workspace.reserve_logits(n_logits);
        let result = self.chunks(session, tokens, want, &mut workspace, observer);
        let workspace = session.give_back(workspace);
        result.map_err(|failure| failure.error)?;
        Ok(&mut workspace.logits[..n_logits])
    }

    fn foretold(
        &self,
        batch: &mut [Sequence<'_>],
        workspace: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        self.check_batch(batch, workspace)?;
        workspace.begin(batch);
        self.tell_foretold(batch, workspace, observer)
    }

    fn forward_batch<'w>(
        &self,
        batch: &mut [Sequence<'_>],
        workspace: &'w mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<&'w mut [f32]> {
        self.check_batch(batch, workspace)?;
        let n_wanted: usize = batch.iter().map(Sequence::n_logits).sum();
        let n_logits = n_wanted * self.info.vocab_size;
        workspace.reserve_logits(n_logits);
        self.pass(batch, workspace, 0, observer)?;
        Ok(&mut workspace.logits[..n_logits])
    }
}

impl Decoder {
    /// Whether a batch can be computed in `workspace`.
    fn check_batch(&self, batch: &[Sequence<'_>], workspace: &Workspace) -> Result<()> {
        if workspace.shape != self.shape {
            return Err(EngineError::ForeignWorkspace);
        }
        for (sequence, one) in batch.iter().enumerate() {
            self.check(one.session, one.tokens)
                .map_err(|error| Failure { sequence, error })?;
        }
        let n_tokens = batch.iter().map(|one| one.tokens.len()).sum();
        let capacity = workspace.capacity();
        if n_tokens > capacity {
            return Err(EngineError::BatchTooLarge { n_tokens, capacity });
        }
        Ok(())
    }

    fn check(&self, session: &Session, tokens: &[u32]) -> Result<()> {
        if session.shape != self.shape {
            return Err(EngineError::ForeignSession);
        }
        let vocab_size = self.info.vocab_size;
        if let Some(token) = tokens
            .iter()
            .copied()
            .find(|token| *token as usize >= vocab_size)
        {
            return Err(EngineError::UnknownToken { token, vocab_size });
        }
        session.check_room(tokens.len())
    }

    /// One sequence, a chunk per pass.
    fn chunks(
        &self,
        session: &mut Session,
        tokens: &[u32],
        want: Logits,
        workspace: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<(), Failure> {
        let (mut n_done, mut logits_row) = (0, 0);
        for tokens_of_chunk in tokens.chunks(session.chunk()) {
            n_done += tokens_of_chunk.len();
            let is_last = n_done == tokens.len();
            let sequence = Sequence {
                session: &mut *session,
                tokens: tokens_of_chunk,
                want: match want {
                    Logits::Last if !is_last => Logits::None,
                    want => want,
                },
            };
            let n_logits = sequence.n_logits();
            self.pass(&mut [sequence], workspace, logits_row, observer)?;
            logits_row += n_logits;
        }
        Ok(())
    }

    /// Runs a batch that fits `workspace` through the model; the logits go to rows from `logits_row`.
    fn pass(
        &self,
        batch: &mut [Sequence<'_>],
        workspace: &mut Workspace,
        logits_row: usize,
        observer: &mut dyn Observer,
    ) -> Result<(), Failure> {
        workspace.begin(batch);
        self.embed(workspace)?;
        self.foretell(batch, workspace, observer.watches())
            .map_err(|error| Failure { sequence: 0, error })?;
        for (index, layer) in self.layers.iter().enumerate() {
            if observer.wants_stream() {
                let n = n_rows(&workspace.spans) * self.info.d_model;
                tell(
                    index,
                    &workspace.spans,
                    &workspace.hidden[..n],
                    &mut |event| {
                        observer.entered(event);
                    },
                );
            }
            self.remember(index, layer, batch, workspace)?;
            let is_last = index + 1 == self.layers.len();
            if is_last && !observer.watches() {
                // From here on a row serves only its own logits.
                workspace.trim(batch);
            }
            if n_rows(&workspace.spans) > 0 {
                self.attend(index, layer, batch, workspace, observer)?;
                self.feed_forward(index, layer, workspace, observer)?;
            }
        }
        workspace.trim(batch);
        self.head(workspace, logits_row)?;
        for sequence in batch {
            sequence.session.position += sequence.tokens.len();
        }
        Ok(())
    }

    /// Embeddings of the tokens, and the angles of their positions.
    fn embed(&self, workspace: &mut Workspace) -> Result<(), Failure> {
        let d = self.info.d_model;
        let Workspace {
            spans,
            tokens,
            hidden,
            angles,
            ..
        } = workspace;
        let hidden = &mut hidden[..tokens.len() * d];
        let embedded = self
            .embed_tokens
            .rows(&self.compute, tokens, self.embedding_scale, hidden);
        embedded.map_err(|error| Failure { sequence: 0, error })?;
        for (rope, angles) in self.ropes.iter().zip(angles) {
            rope.angles(&self.compute, spans, angles);
        }
        Ok(())
    }

    fn step<'a>(&'a self, layer: usize, spans: &'a [Span]) -> Step<'a> {
        Step {
            compute: &self.compute,
            layer,
            spans,
            steering: &[],
            decodes: false,
        }
    }

    /// Norms the stream and stores keys and values of every row.
    fn remember(
        &self,
        index: usize,
        layer: &Layer,
        batch: &mut [Sequence<'_>],
        workspace: &mut Workspace,
    ) -> Result<(), Failure> {
        let Workspace {
            spans,
            hidden,
            normed,
            angles,
            attention,
            matmul,
            ..
        } = workspace;
        let n = n_rows(spans) * self.info.d_model;
        let normed = &mut normed[..n];
        layer
            .attention_norm
            .forward(&self.compute, &hidden[..n], normed);
        let (step, angles) = (self.step(index, spans), &angles[layer.rope]);
        layer
            .attention
            .remember(step, angles, normed, batch, (attention, matmul))
            .map_err(|source| routing_failure(index, spans, source))
    }

    /// `hidden += attention(normed)`.
    fn attend(
        &self,
        index: usize,
        layer: &Layer,
        batch: &[Sequence<'_>],
        workspace: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<(), Failure> {
        let Workspace {
            spans,
            hidden,
            normed,
            block_out,
            angles,
            attention,
            matmul,
            ..
        } = workspace;
        let n = n_rows(spans) * self.info.d_model;
        let out = &mut block_out[..n];
        let (step, angles) = (self.step(index, spans), &angles[layer.rope]);
        let rows = (&normed[..n], &mut *out);
        layer
            .attention
            .forward(step, angles, rows, batch, (attention, matmul), observer)
            .map_err(|source| routing_failure(index, spans, source))?;
        self.join(layer.attention_post_norm.as_ref(), out, &mut hidden[..n]);
        Ok(())
    }

    /// `hidden += feed_forward(norm(hidden))`.
    fn feed_forward(
        &self,
        index: usize,
        layer: &Layer,
        workspace: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<(), Failure> {
        let Workspace {
            spans,
            steering,
            decodes,
            hidden,
            normed,
            block_out,
            moe,
            matmul,
            ..
        } = workspace;
        let n = n_rows(spans) * self.info.d_model;
        let (hidden, normed, out) = (&mut hidden[..n], &mut normed[..n], &mut block_out[..n]);
        layer.ffn_norm.forward(&self.compute, hidden, normed);
        match &layer.ffn {
            AnyFeedForward::Moe(block) => {
                let step = Step {
                    decodes: *decodes,
                    steering,
                    ..self.step(index, spans)
                };
                let ahead = self.ahead(index, hidden);
                block
                    .forward(step, (normed, out), (moe, matmul), ahead, observer)
                    .map_err(|error| match error {
                        MoeError::Routing(source) => routing_failure(index, spans, source),
                        MoeError::Experts(error) => Failure { sequence: 0, error },
                    })?;
            }
            AnyFeedForward::Dense(block) => {
                block.forward(&self.compute, normed, out, (&mut moe.ffn, matmul));
                if observer.wants_neurons() {
                    let inner = moe.ffn.inner(n_rows(spans) * block.width());
                    tell(index, spans, inner, &mut |event| observer.activated(event));
                }
            }
        }
        self.join(layer.ffn_post_norm.as_ref(), out, hidden);
        Ok(())
    }

    /// What the next layer that has experts may be asked before its turn.
    fn ahead<'a>(&'a self, index: usize, hidden: &'a [f32]) -> Option<Ahead<'a>> {
        self.store.as_ref()?;
        let mut later = self.layers.iter().enumerate().skip(index + 1);
        later.find_map(|(layer, one)| match &one.ffn {
            AnyFeedForward::Moe(moe) => Some(Ahead {
                layer,
                hidden,
                norm: &one.ffn_norm,
                moe,
            }),
            AnyFeedForward::Dense(_) => None,
        })
    }

    /// Adds a block's output to the stream.
    fn join(&self, post_norm: Option<&Norm>, out: &mut [f32], hidden: &mut [f32]) {
        if let Some(norm) = post_norm {
            norm.forward_in_place(&self.compute, out);
        }
        let (d, kernels) = (self.info.d_model, self.compute.kernels());
        self.compute.for_each_chunk(hidden, d, d, |row, hidden| {
            kernels.axpy(self.residual_scale, &out[row * d..][..d], hidden);
        });
    }

    /// Logits of the rows that are left, into rows from `logits_row`.
    fn head(&self, workspace: &mut Workspace, logits_row: usize) -> Result<(), Failure> {
        let (d, vocab) = (self.info.d_model, self.info.vocab_size);
        let Workspace {
            spans,
            hidden,
            normed,
            n_headed,
            matmul,
            logits,
            ..
        } = workspace;
        let n = n_rows(spans);
        *n_headed = n;
        let normed = &mut normed[..n * d];
        let logits = &mut logits[logits_row * vocab..][..n * vocab];
        self.norm.forward(&self.compute, &hidden[..n * d], normed);
        self.head.forward(
            &self.compute,
            &self.embed_tokens,
            (normed, &mut *logits),
            matmul,
        );
        let Some(at) = logits.iter().position(|value| !value.is_finite()) else {
            return Ok(());
        };
        let (sequence, span) = span_of(spans, at / vocab);
        Err(Failure {
            sequence,
            error: EngineError::NonFiniteLogits {
                position: span.position_of(at / vocab),
                token: at % vocab,
                value: logits[at],
                n_layers: self.info.n_layers,
            },
        })
    }
}

/// Tells the rows of each sequence.
fn tell(layer: usize, spans: &[Span], values: &[f32], say: &mut dyn FnMut(&RowsEvent<'_>)) {
    let width = values.len() / n_rows(spans).max(1);
    for (sequence, span) in spans.iter().enumerate() {
        let rows = span.first_row..span.first_row + span.n_rows;
        if !rows.is_empty() {
            say(&RowsEvent {
                sequence,
                layer,
                first_position: span.position,
                width,
                rows: &values[rows.start * width..rows.end * width],
            });
        }
    }
}

/// Says which sequence a router's error is about; its token index then counts within that sequence.
fn routing_failure(layer: usize, spans: &[Span], source: RoutingError) -> Failure {
    let (sequence, span, source) = match source {
        RoutingError::NonFinite {
            token,
            expert,
            value,
        } => {
            let (sequence, span) = span_of(spans, token);
            let token = token - span.first_row;
            let source = RoutingError::NonFinite {
                token,
                expert,
                value,
            };
            (sequence, span, source)
        }
        // Not about one token, so about no sequence more than another.
        source => (0, spans[0], source),
    };
    Failure {
        sequence,
        error: EngineError::Routing {
            layer,
            position: span.position,
            source,
        },
    }
}
