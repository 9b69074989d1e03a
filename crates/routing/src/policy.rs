//! The interface of all inference-side routing rules, and the checks on their input that they share.

use crate::stages::Stages;
use crate::{Routing, RoutingError};

/// A rule from router logits to experts and weights. Stateless at run time: the same logits give the same routing.
pub trait Policy: Send + Sync + std::fmt::Debug {
    /// The name that the registry and recipes use.
    fn name(&self) -> &'static str;

    /// Length of one row of logits. Ids that [`Policy::route`] produces are below this number.
    fn n_experts(&self) -> usize;

    /// Number of experts that exist as weights. Ids from here up to [`Policy::n_experts`] are null experts: they are
    /// recorded with weight 0 and never computed.
    fn n_real_experts(&self) -> usize {
        self.n_experts()
    }

    /// The most picks that one token can get; a caller reserves its scratch with it.
    fn max_picks(&self) -> usize;

    /// Whether the routing of a token is independent of the tokens after it.
    fn causal(&self) -> bool;

    /// Whether the routing of a token is independent of the other tokens in the call.
    fn batch_invariant(&self) -> bool;

    /// Its stages, if it looks at one token at a time, so that tokens can be steered; `None` if it cannot be.
    fn stages(&self) -> Option<&dyn Stages> {
        None
    }

    /// Routes `logits` (`[T, n_experts]`, row by row) and overwrites `routing` with the `T` results.
    ///
    /// Equal scores go to the lower id.
    ///
    /// # Errors
    /// [`RoutingError::LogitsLength`] when the logits are not whole rows, and [`RoutingError::NonFinite`] for NaN or
    /// infinite logits. `routing` has no tokens after an error.
    fn route(&self, logits: &[f32], routing: &mut Routing) -> Result<(), RoutingError>;
}

/// Clears `routing`, checks that `logits` is whole finite rows, and reserves room for the result.
pub(crate) fn begin(
    logits: &[f32],
    n_experts: usize,
    max_picks: usize,
    routing: &mut Routing,
) -> Result<(), RoutingError> {
    routing.clear();
    check_logits(logits, n_experts)?;
    let n_tokens = logits.len() / n_experts;
    routing.reserve(n_tokens, n_tokens * max_picks);
    Ok(())
}

/// Checks that `logits` is a whole number of rows and finite everywhere.
pub(crate) fn check_logits(logits: &[f32], n_experts: usize) -> Result<(), RoutingError> {
    if n_experts == 0 || !logits.len().is_multiple_of(n_experts) {
        return Err(RoutingError::LogitsLength {
            len: logits.len(),
            n_experts,
        });
    }
    if let Some(at) = logits.iter().position(|l| !l.is_finite()) {
        return Err(RoutingError::NonFinite {
            token: at / n_experts,
            expert: at % n_experts,
            value: logits[at],
        });
    }
    Ok(())
}

/// Checks the two sizes that nearly every policy has: ids must fit `u16`, and `1 <= top_k <= n_experts`.
pub(crate) fn check_sizes(
    policy: &'static str,
    n_experts: usize,
    top_k: usize,
) -> Result<(), RoutingError> {
    let fits = (1..=usize::from(u16::MAX)).contains(&n_experts);
    check_option(policy, "n_experts", n_experts, fits, "1 to 65535")?;
    check_option(policy, "top_k", top_k, top_k > 0, "at least 1")?;
    if top_k > n_experts {
        return Err(RoutingError::TopKTooLarge { top_k, n_experts });
    }
    Ok(())
}

/// [`RoutingError::BadOption`] unless `valid`.
pub(crate) fn check_option(
    policy: &'static str,
    option: &'static str,
    value: impl std::fmt::Display,
    valid: bool,
    expected: &'static str,
) -> Result<(), RoutingError> {
    if valid {
        return Ok(());
    }
    Err(RoutingError::BadOption {
        policy,
        option,
        value: value.to_string(),
        expected,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_rows_and_zero_experts_are_refused() {
        assert_eq!(
            check_logits(&[0.0; 5], 2),
            Err(RoutingError::LogitsLength {
                len: 5,
                n_experts: 2
            })
        );
        assert_eq!(
            check_logits(&[], 0),
            Err(RoutingError::LogitsLength {
                len: 0,
                n_experts: 0
            })
        );
        assert_eq!(check_logits(&[], 4), Ok(()));
    }

    #[test]
    fn the_first_bad_logit_is_named() {
        let logits = [0.0, 1.0, 2.0, f32::NEG_INFINITY, f32::NAN, 0.0];
        let err = check_logits(&logits, 3).unwrap_err();
        assert_eq!(
            err,
            RoutingError::NonFinite {
                token: 1,
                expert: 0,
                value: f32::NEG_INFINITY
            }
        );
        assert!(err.to_string().contains("token 1, expert 0 is -inf"));
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(check_sizes("p", 4, 4), Ok(()));
        assert_eq!(
            check_sizes("p", 4, 5),
            Err(RoutingError::TopKTooLarge {
                top_k: 5,
                n_experts: 4
            })
        );
        assert!(
            check_sizes("p", 4, 0)
                .unwrap_err()
                .to_string()
                .contains("top_k = 0, expected at least 1")
        );
        assert!(check_sizes("p", 0, 1).is_err());
        assert!(check_sizes("p", 65_536, 1).is_err());
    }
}
