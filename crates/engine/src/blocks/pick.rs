//! The picks of a pass: what the policy says, and what steering makes of it where a sequence is steered.

use cadre_routing::steer::{self, SteeredLayer};
use cadre_routing::{Routing, RoutingError};

use super::{Moe, Step};

/// Memory for steering the sequences of a pass; grows to what is asked for.
#[derive(Debug, Default)]
pub(super) struct SteerScratch {
    routing: Routing,
    row: steer::SteerScratch,
}

impl Moe {
    /// The picks of every row: what the policy says, and what steering makes of it where a sequence is steered. The other
    /// sequences get the same bits as without it.
    pub(super) fn pick(
        &self,
        step: Step<'_>,
        logits: &[f32],
        (routing, scratch): (&mut Routing, &mut SteerScratch),
    ) -> Result<(), RoutingError> {
        self.policy.route(logits, routing)?;
        let steered = |sequence: usize| -> Option<&SteeredLayer> {
            step.steering.get(sequence)?.as_ref()?.layer(step.layer)
        };
        let any = (0..step.spans.len()).any(|sequence| steered(sequence).is_some());
        let Some(stages) = self.policy.stages().filter(|_| any) else {
            return Ok(());
        };
        let n_logits = self.policy.n_experts();
        let SteerScratch {
            routing: steered_routing,
            row,
        } = scratch;
        steered_routing.clear();
        for (sequence, span) in step.spans.iter().enumerate() {
            let rows = span.first_row..span.end();
            match steered(sequence) {
                Some(layer) => {
                    let logits = &logits[rows.start * n_logits..rows.end * n_logits];
                    layer.route(stages, logits, steered_routing, row);
                }
                None => {
                    for (experts, weights) in rows.map(|row| routing.token(row)) {
                        steered_routing.push_token(experts, weights);
                    }
                }
            }
        }
        std::mem::swap(routing, steered_routing);
        Ok(())
    }
}
