//! Training methods: what a run does beyond minimising the losses of one batch; one small file per paper.
//!
//! Each has a table or key in the recipe, keeps what it has to remember in snapshots, and is a function of seed and step
//! otherwise, so that an interrupted run goes on as if it had not been.

pub mod balance_bias;
pub mod balance_scope;
pub mod consistency;
pub mod cut;
pub mod distill;
pub mod evolve;
pub mod prune_rows;
pub mod router_distill;
pub mod start;

use crate::architecture::Architecture;
use crate::recipe::Recipe;

/// Refuses methods that cannot work, in one sentence that names the key.
pub(crate) fn check(recipe: &Recipe, architecture: &Architecture) -> Result<(), String> {
    recipe.losses.check(architecture)?;
    if let Some(rule) = &recipe.balance_bias {
        rule.check(architecture)?;
    }
    if let Some(evolve) = &recipe.evolve {
        evolve.check(recipe.train.steps, architecture)?;
    }
    recipe
        .distill
        .as_ref()
        .map_or(Ok(()), distill::Distill::check)?;
    recipe
        .cut
        .as_ref()
        .map_or(Ok(()), |cut| cut.check(recipe))?;
    let guide = recipe.router_distill.as_ref();
    guide.map_or(Ok(()), |guide| guide.check(recipe))?;
    recipe.start.as_ref().map_or(Ok(()), start::Start::check)?;
    recipe.prune_rows.map_or(Ok(()), |rule| rule.check(recipe))
}
