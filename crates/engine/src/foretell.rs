//! What is known of a pass before its first layer: the picks of all layers, where the model has a router of its own for
//! them.

use crate::batch::{Sequence, n_rows};
use crate::blocks::{self, Step};
use crate::decoder::{AnyFeedForward, Decoder};
use crate::error::{EngineError, Result};
use crate::model::Observer;
use crate::workspace::Workspace;

impl Decoder {
    /// Runs the router that does not wait for the layers, if there is one: its logits are there when they have their turn.
    /// A store is told at once what they will want. `watched`: whether the last layer computes all rows.
    pub(crate) fn foretell(
        &self,
        batch: &mut [Sequence<'_>],
        workspace: &mut Workspace,
        watched: bool,
    ) -> Result<()> {
        if !self.run_router(batch, workspace)? {
            return Ok(());
        }
        let Some(store) = &self.store else {
            return Ok(());
        };
        let last = self.layers.len() - 1;
        let layers = self.layers.iter().enumerate();
        let layers = layers.filter_map(|(index, layer)| match &layer.ffn {
            AnyFeedForward::Moe(moe) => Some((index, moe, index == last && !watched)),
            AnyFeedForward::Dense(_) => None,
        });
        let Workspace {
            spans,
            steering,
            decodes,
            moe,
            ..
        } = workspace;
        let step = Step {
            compute: &self.compute,
            layer: 0,
            spans,
            steering,
            decodes: *decodes,
        };
        blocks::foresee(step, layers, batch, store, moe);
        Ok(())
    }

    /// Tells `observer` the picks of all layers for the tokens of `batch`, whose rows `workspace` has laid out; false
    /// without such a router.
    pub(crate) fn tell_foretold(
        &self,
        batch: &mut [Sequence<'_>],
        workspace: &mut Workspace,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        if !self.run_router(batch, workspace)? {
            return Ok(false);
        }
        let Workspace {
            spans,
            steering,
            decodes,
            moe,
            ..
        } = workspace;
        for (layer, one) in self.layers.iter().enumerate() {
            let AnyFeedForward::Moe(block) = &one.ffn else {
                continue;
            };
            let step = Step {
                compute: &self.compute,
                layer,
                spans,
                steering,
                decodes: *decodes,
            };
            let told = blocks::tell(step, block, moe, observer);
            told.map_err(|source| EngineError::Routing {
                layer,
                position: spans.first().map_or(0, |span| span.position),
                source,
            })?;
        }
        Ok(true)
    }

    /// Makes the logits of the router that does not wait for the layers; false where there is none.
    fn run_router(&self, batch: &mut [Sequence<'_>], workspace: &mut Workspace) -> Result<bool> {
        let Workspace {
            spans,
            steering,
            decodes,
            tokens,
            decoupled,
            moe,
            matmul,
            ..
        } = workspace;
        let (Some(router), Some(scratch)) = (&self.decoupled, decoupled) else {
            return Ok(false);
        };
        let step = Step {
            compute: &self.compute,
            layer: 0,
            spans,
            steering,
            decodes: *decodes,
        };
        let logits = moe.router.foretold(n_rows(spans));
        router.forward(step, tokens, batch, logits, (&mut **scratch, matmul))?;
        Ok(true)
    }
}
