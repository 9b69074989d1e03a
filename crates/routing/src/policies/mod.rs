//! The routing rules, one small file per published idea. Files here do not import each other; what they share is in
//! `select`, `scores` and `policy` one level up.

mod top_k;

pub use top_k::TopK;
