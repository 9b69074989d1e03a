//! `[losses]` of a recipe: how much each router loss counts.

use crate::methods::balance_scope::Scope;
use serde::{Deserialize, Serialize};

/// Coefficients of the router losses (means over layers).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossWeights {
    /// Load-balance loss, whose value is 1 at perfect balance.
    pub balance: f32,
    /// Router z-loss.
    pub z: f32,
    /// Router entropy, in nats; 0 does without. Keeps the experts of `top_p` few.
    pub entropy: f32,
    /// Over which tokens the balance loss counts loads.
    pub scope: Scope,
    /// Agreement of two passes; 0 runs one.
    pub consistency: f32,
}

impl Default for LossWeights {
    fn default() -> Self {
        Self {
            balance: 0.01,
            z: 0.001,
            entropy: 0.0,
            scope: Scope::Micro,
            consistency: 0.0,
        }
    }
}

impl LossWeights {
    /// Refuses what is no coefficient.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self) -> Result<(), String> {
        let any = [
            ("balance", self.balance),
            ("z", self.z),
            ("entropy", self.entropy),
        ];
        if let Some((key, weight)) = any.iter().find(|(_, weight)| !weight.is_finite()) {
            return Err(format!(
                "`losses.{key}` = {weight}, expected a finite number"
            ));
        }
        if !(0.0..f32::INFINITY).contains(&self.consistency) {
            return Err(format!(
                "`losses.consistency` = {}, expected at least 0",
                self.consistency
            ));
        }
        Ok(())
    }
}
