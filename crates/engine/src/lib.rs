//! Token in, token out: models, blocks, KV cache, sampling, sessions, evaluation.
