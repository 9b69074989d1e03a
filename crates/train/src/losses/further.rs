//! The router losses of one layer that only some recipes ask for.

use super::{LossWeights, communication_balance, device_balance, entropy, sequence_balance};
use crate::routers::{Route, Routed};
use burn::tensor::Tensor;
use cadre_routing::RoutingError;

/// Each of them: its name in logs, its coefficient, and its value for `routed` of `router` over sequences of `seq_len`
/// tokens. The coefficient is for the mean over layers.
///
/// # Errors
/// Logits that are not finite.
pub(crate) fn further(
    weights: &LossWeights,
    router: &dyn Route,
    routed: &Routed,
    seq_len: usize,
) -> Result<Vec<(&'static str, f32, Tensor<1>)>, RoutingError> {
    let n_sequences = routed.routing.n_tokens() / seq_len;
    let mut parts = Vec::new();
    if weights.entropy != 0.0 {
        let loss = entropy(routed.logits.clone());
        parts.push(("entropy", weights.entropy, loss));
    }
    if weights.sequence != 0.0 {
        let routing = router.unbiased(routed)?;
        let loss = sequence_balance(routed.probs.clone(), &routing, n_sequences);
        parts.push(("sequence", weights.sequence, loss));
    }
    let (probs, routing) = (|| routed.probs.clone(), &routed.routing);
    let (n_devices, limit) = weights.devices(router);
    if weights.device != 0.0 {
        let loss = device_balance(probs(), routing, n_sequences, n_devices);
        parts.push(("device", weights.device, loss));
    }
    if weights.communication != 0.0 {
        let loss = communication_balance(probs(), routing, n_sequences, [n_devices, limit]);
        parts.push(("communication", weights.communication, loss));
    }
    Ok(parts)
}
