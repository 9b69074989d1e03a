//! The `[router]` table of recipes: a name, and options of which each router has its own.

use super::{Route, build, options_of};
use cadre_routing::RoutingError;
use serde::{Deserialize, Serialize};

/// Keys that every router has.
const COMMON: &[&str] = &["name", "allow_non_causal"];

/// `[router]` of a recipe. A key that no router has, and a key that the named router does not have, are errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterOptions {
    /// Which rule.
    pub name: String,
    /// Whether a rule by which a token's experts depend on later tokens, or on other sequences, may train a language
    /// model. Such a model has seen during training what it does not see when it generates.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_non_causal: bool,
}

impl Default for RouterOptions {
    fn default() -> Self {
        Self {
            name: "top_k".to_owned(),
            allow_non_causal: false,
        }
    }
}

/// What a router is told by `[model]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterSizes {
    /// Experts of the layer that exist as weights.
    pub n_experts: usize,
    /// Picks per token.
    pub top_k: usize,
    /// Whether the weights of a token's picks are divided by their sum.
    pub norm_topk_prob: bool,
}

impl RouterOptions {
    /// The router of one layer.
    ///
    /// # Errors
    /// An unknown name, or options that the router cannot work with.
    pub fn build(&self, sizes: RouterSizes) -> Result<Box<dyn Route>, RoutingError> {
        build(&self.name, sizes, self)
    }

    /// Refuses options that the named router does not have.
    ///
    /// # Errors
    /// One sentence that names the key and lists the router's options.
    pub fn check(&self) -> Result<(), String> {
        let options = options_of(&self.name).map_err(|e| format!("`router.name`: {e}"))?;
        let value = serde_json::to_value(self).expect("options are plain data");
        let known = |key: &str| COMMON.contains(&key) || options.contains(&key);
        let mut given = value.as_object().into_iter().flatten();
        let Some((foreign, _)) = given.find(|(key, _)| !known(key)) else {
            return Ok(());
        };
        let own = match options {
            [] => "none of its own".to_owned(),
            some => some.join(", "),
        };
        Err(format!(
            "`router.{foreign}` is not an option of router `{}`, which has {own}",
            self.name
        ))
    }
}
