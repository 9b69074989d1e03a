//! What can go wrong while routing: one enum, whose messages name the token, the option or the size at fault.

use std::fmt;

/// An error of this crate. Layer and step are not known here; the caller adds them as context.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RoutingError {
    /// The logits are not a whole number of rows of `n_experts`.
    LogitsLength {
        /// Number of values that were given.
        len: usize,
        /// Row length that the policy expects.
        n_experts: usize,
    },
    /// A router logit is NaN or infinite.
    NonFinite {
        /// Row of the value, counted from 0 within the call.
        token: usize,
        /// Column of the value.
        expert: usize,
        /// The value itself.
        value: f32,
    },
    /// More picks per token were asked for than there are experts.
    TopKTooLarge {
        /// Picks per token.
        top_k: usize,
        /// Number of experts.
        n_experts: usize,
    },
    /// An option of a policy has a value that it cannot work with.
    BadOption {
        /// Name of the policy or stage.
        policy: &'static str,
        /// Name of the option.
        option: &'static str,
        /// The value that was given, printed.
        value: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// No policy has this name.
    UnknownPolicy {
        /// The name that was asked for.
        name: String,
        /// The names that exist.
        known: Vec<&'static str>,
    },
    /// A device did not compute what was to be read from it.
    Device {
        /// What it says.
        problem: String,
    },
    /// Offsets, experts and weights do not form a routing.
    BadRouting {
        /// What is inconsistent, with both values.
        reason: String,
    },
}

impl fmt::Display for RoutingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LogitsLength { len, n_experts } => write!(
                f,
                "router logits have {len} values, which is not a whole number of rows of n_experts = {n_experts}; \
                 pass [n_tokens, n_experts] row by row"
            ),
            Self::NonFinite {
                token,
                expert,
                value,
            } => write!(
                f,
                "router logit of token {token}, expert {expert} is {value}, expected a finite number; \
                 check the weights and the hidden states before the router"
            ),
            Self::TopKTooLarge { top_k, n_experts } => write!(
                f,
                "top_k = {top_k} is more than n_experts = {n_experts}; lower top_k or check the model's config"
            ),
            Self::BadOption {
                policy,
                option,
                value,
                expected,
            } => {
                write!(
                    f,
                    "policy '{policy}': {option} = {value}, expected {expected}"
                )
            }
            Self::UnknownPolicy { name, known } => {
                write!(
                    f,
                    "unknown routing policy '{name}'; known policies: {}",
                    known.join(", ")
                )
            }
            Self::Device { problem } => write!(f, "the device failed: {problem}"),
            Self::BadRouting { reason } => write!(f, "not a valid routing: {reason}"),
        }
    }
}

impl std::error::Error for RoutingError {}
