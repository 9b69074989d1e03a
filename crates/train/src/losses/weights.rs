//! `[losses]` of a recipe: how much each router loss counts.

use crate::architecture::Architecture;
use crate::methods::balance_scope::Scope;
use crate::routers::Route;
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
    /// Balance inside every sequence, 1 when even; 0 does without.
    #[serde(skip_serializing_if = "is_zero")]
    pub sequence: f32,
    /// Balance of the devices' picks, 1 when even; 0 does without.
    #[serde(skip_serializing_if = "is_zero")]
    pub device: f32,
    /// Balance of the tokens that are sent to devices, 1 when even; 0 does without.
    #[serde(skip_serializing_if = "is_zero")]
    pub communication: f32,
    /// Devices that the experts of a layer lie on, as many on each, in the order of their ids; absent: one for each of
    /// the router's groups.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<usize>,
    /// Over which tokens the balance loss counts loads.
    pub scope: Scope,
    /// Agreement of two passes; 0 runs one.
    pub consistency: f32,
}

fn is_zero(weight: &f32) -> bool {
    *weight == 0.0
}

impl Default for LossWeights {
    fn default() -> Self {
        Self {
            balance: 0.01,
            z: 0.001,
            entropy: 0.0,
            sequence: 0.0,
            device: 0.0,
            communication: 0.0,
            devices: None,
            scope: Scope::Micro,
            consistency: 0.0,
        }
    }
}

impl LossWeights {
    /// Devices that the experts of `router` lie on, and how many of them a token may use.
    pub(crate) fn devices(&self, router: &dyn Route) -> (usize, usize) {
        let [n_groups, keep] = router.groups();
        let n_devices = self.devices.unwrap_or(n_groups);
        let limit = if n_devices == n_groups {
            keep
        } else {
            n_devices
        };
        (n_devices, limit)
    }

    /// Refuses what is no coefficient, and losses that the routers of `architecture` cannot have.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self, architecture: &Architecture) -> Result<(), String> {
        let any = [
            ("balance", self.balance),
            ("z", self.z),
            ("entropy", self.entropy),
            ("sequence", self.sequence),
            ("device", self.device),
            ("communication", self.communication),
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
        self.check_devices(architecture)
    }

    fn check_devices(&self, architecture: &Architecture) -> Result<(), String> {
        let by_device = [
            ("device", self.device),
            ("communication", self.communication),
        ];
        let Some((key, weight)) = by_device.into_iter().find(|(_, weight)| *weight != 0.0) else {
            return match self.devices {
                Some(n) => Err(format!(
                    "`losses.devices` = {n} without `losses.device` or `losses.communication`, which count by device"
                )),
                None => Ok(()),
            };
        };
        for layer in &architecture.moe {
            let router = &*layer.router;
            let (name, n_experts) = (router.name(), router.n_real_experts());
            let (n_devices, _) = self.devices(router);
            if n_experts < router.n_experts() {
                return Err(format!(
                    "`losses.{key}` = {weight} with router `{name}`, whose null experts lie on no device; leave it out"
                ));
            }
            if n_devices < 2 || !n_experts.is_multiple_of(n_devices) {
                return Err(format!(
                    "`losses.{key}` = {weight} needs devices, 2 or more that divide the {n_experts} experts of layer {}, \
                     not {n_devices}: set `losses.devices`, or `router.n_groups` of router `group_limited`",
                    layer.layer
                ));
            }
            if self.communication != 0.0 && router.groups()[0] != n_devices {
                return Err(format!(
                    "`losses.communication` = {} needs a router that limits the devices of a token: \
                     `group_limited` with `router.n_groups` = {n_devices} and `router.keep_groups`, not `{name}` with {} groups",
                    self.communication,
                    router.groups()[0]
                ));
            }
        }
        Ok(())
    }
}
