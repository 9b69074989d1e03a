//! Tiny checkpoints, golden files and tolerances for tests (dev-dependency only).
