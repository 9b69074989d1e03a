//! Which expert: scores to picks and weights.
