//! The routing rules, one small file per published idea. Files here do not import each other; what they share is in
//! `select`, `scores` and `policy` one level up.

mod dense_to_sparse;
mod expert_choice;
mod group_limited;
mod null_experts;
mod sparse_mixer;
mod switch;
mod top_2;
mod top_k;
mod top_p;
mod uniform;
mod union;

pub use dense_to_sparse::{DenseToSparse, Stage};
pub use expert_choice::ExpertChoice;
pub use group_limited::{GroupLimited, GroupLimitedOptions, GroupScore, ScoreFn, update_bias};
pub use null_experts::NullExperts;
pub use sparse_mixer::SparseMixer;
pub use switch::Switch;
pub use top_2::{Top2, keep_seconds};
pub use top_k::TopK;
pub use top_p::TopP;
pub use uniform::Uniform;
pub use union::Union;
