//! What is known of a pass before its first layer: the picks of all layers, where the model has a router of its own for
//! them.

use crate::batch::{Sequence, n_rows};
use crate::blocks::{self, Step};
use crate::decoder::{AnyFeedForward, Decoder};
use crate::error::Result;
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
            return Ok(());
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
        let Some(store) = &self.store else {
            return Ok(());
        };
        let last = self.layers.len() - 1;
        let layers = self.layers.iter().enumerate();
        let layers = layers.filter_map(|(index, layer)| match &layer.ffn {
            AnyFeedForward::Moe(moe) => Some((index, moe, index == last && !watched)),
            AnyFeedForward::Dense(_) => None,
        });
        blocks::foresee(step, layers, batch, store, moe);
        Ok(())
    }
}
