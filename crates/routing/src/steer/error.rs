//! Why a steering cannot be used: one enum, whose messages name the layer, the expert and the rule.

use std::fmt;

/// An error of a [`crate::Steering`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum SteerError {
    /// The model has no experts.
    NoExperts,
    /// A rule is about a layer that has no router, or that the model does not have.
    UnknownLayer {
        /// The rule.
        rule: &'static str,
        /// The layer.
        layer: usize,
        /// The layers that have experts.
        known: Vec<usize>,
    },
    /// A rule is about an expert that the layer does not have.
    UnknownExpert {
        /// The rule.
        rule: &'static str,
        /// The layer.
        layer: usize,
        /// The expert.
        expert: u16,
        /// Ids of the layer are below this.
        n_experts: usize,
    },
    /// Two rules about one expert contradict each other, or one gives it two numbers.
    Contradiction {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: u16,
        /// The rules.
        rules: [&'static str; 2],
    },
    /// Fewer experts are left than a token is to get.
    TooFewLeft {
        /// The layer.
        layer: usize,
        /// Experts that are not masked.
        left: usize,
        /// Experts that a token is to get.
        needed: usize,
    },
    /// More experts are forced than a token gets.
    TooManyForced {
        /// The layer.
        layer: usize,
        /// Experts that are forced.
        forced: usize,
        /// Experts that a token gets at most.
        most: usize,
    },
    /// An option has a value that makes no sense.
    BadValue {
        /// Name of the option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// The layer's router does not choose for each token by itself.
    Unsteerable {
        /// The layer.
        layer: usize,
        /// Name of the policy.
        policy: &'static str,
    },
    /// A text is not in the form of a rule.
    Unreadable {
        /// The text.
        text: String,
        /// What would be.
        expected: &'static str,
    },
}

impl fmt::Display for SteerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoExperts => f.write_str("the model has no experts: there is nothing to steer"),
            Self::UnknownLayer { rule, layer, known } => {
                let known = ranges(known);
                write!(
                    f,
                    "{rule}: layer {layer} has no experts; layers with experts: {known}"
                )
            }
            Self::UnknownExpert {
                rule,
                layer,
                expert,
                n_experts,
            } => write!(
                f,
                "{rule}: layer {layer} has no expert {expert}; its experts are 0 to {}",
                n_experts.saturating_sub(1)
            ),
            Self::Contradiction {
                layer,
                expert,
                rules: [one, other],
            } if one == other => write!(
                f,
                "{one}: expert {expert} of layer {layer} has two numbers; give it one"
            ),
            Self::Contradiction {
                layer,
                expert,
                rules: [one, other],
            } => write!(
                f,
                "expert {expert} of layer {layer} is under both {one} and {other}; take it out of one"
            ),
            Self::TooFewLeft {
                layer,
                left,
                needed,
            } => write!(
                f,
                "mask: layer {layer} keeps {left} experts, and a token is to get {needed}; \
                 mask fewer, or lower top_k"
            ),
            Self::TooManyForced {
                layer,
                forced,
                most,
            } => write!(
                f,
                "force: {forced} experts are forced in layer {layer}, and a token gets at most {most}; \
                 force fewer, or raise top_k"
            ),
            Self::BadValue {
                option,
                value,
                expected,
            } => write!(f, "{option} = {value}: expected {expected}"),
            Self::Unsteerable { layer, policy } => write!(
                f,
                "layer {layer} cannot be steered: its router `{policy}` chooses for all tokens together"
            ),
            Self::Unreadable { text, expected } => {
                write!(f, "`{text}` cannot be read; expected {expected}")
            }
        }
    }
}

impl std::error::Error for SteerError {}

/// Ascending numbers, runs of them as `first-last`.
fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let text = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    runs.iter().map(text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_listed_in_runs() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
        let error = SteerError::UnknownLayer {
            rule: "mask",
            layer: 9,
            known: vec![1, 2, 3],
        };
        let text = "mask: layer 9 has no experts; layers with experts: 1-3";
        assert_eq!(error.to_string(), text);
    }
}
