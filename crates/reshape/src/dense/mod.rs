//! Experts out of a dense model: its feed-forwards copied, or their neurons parted.
//!
//! What is written is a folder in the first stock layout that says the whole model ([`Conversion::with_feed_forwards`]).

mod activity;
mod balanced;
mod domains;
mod draws;
pub(crate) mod feed_forward;
mod mergekit;
mod partition;
mod routers;
mod split;
mod upcycle;

use cadre_checkpoint::{Checkpoint, Conversion, NewFeedForwards, TargetDtype};

pub use activity::{Activity, ActivityRecorder};
pub use domains::{Importance, domain_experts};
pub use mergekit::{MergekitExpert, MergekitInput, MergekitMoe};
pub use partition::{Partition, PartitionBy};
pub use split::{SplitOptions, split};
pub use upcycle::{UpcycleOptions, upcycle};

use crate::error::{ReshapeError, Result};

/// Experts for a dense model, and in words what they depend on beside it.
#[derive(Debug, Clone)]
pub struct FromDense {
    /// What takes the place of the feed-forwards.
    pub new: NewFeedForwards,
    /// Options and other models: an unfinished output goes on only when they are the same.
    pub settings: String,
}

impl FromDense {
    /// Plans to write `source` with these experts, in `dtype`, in files of at most so many bytes.
    ///
    /// # Errors
    /// No layout has the model's attention and experts.
    pub fn plan<'a>(
        &self,
        source: &'a Checkpoint,
        dtype: TargetDtype,
        max_shard_bytes: u64,
    ) -> Result<Conversion<'a>> {
        let settings = self.settings.clone();
        Ok(Conversion::with_feed_forwards(
            source,
            &self.new,
            (dtype, max_shard_bytes),
            settings,
        )?)
    }
}

/// Refuses models that have experts already, and counts that no router can work with.
fn check(source: &Checkpoint, n_experts: usize, top_k: usize) -> Result<()> {
    let bad = |name: &'static str, problem: String| Err(ReshapeError::Option { name, problem });
    if !source.config().moe.layers.is_empty() {
        return bad(
            "the model",
            format!(
                "{} has experts already; a dense one is needed",
                source.origin()
            ),
        );
    }
    if !(2..=usize::from(u16::MAX)).contains(&n_experts) {
        return bad(
            "experts",
            format!("is {n_experts}, expected 2 to {}", u16::MAX),
        );
    }
    if !(1..=n_experts).contains(&top_k) {
        return bad(
            "top-k",
            format!("is {top_k}, expected 1 to {n_experts}, the number of experts"),
        );
    }
    Ok(())
}
