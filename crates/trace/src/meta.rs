//! What a trace says about the model it was recorded from, and the file metadata keys that carry it.
//!
//! | key | value |
//! |---|---|
//! | `cadre.trace_version` | version of the file format, [`FORMAT_VERSION`] |
//! | `cadre.version` | version of Cadre that wrote the file; informative |
//! | `cadre.digest` | digest of the checkpoint |
//! | `cadre.architecture` | `model_type` of the checkpoint |
//! | `cadre.n_layers` | decoder layers, dense ones included |
//! | `cadre.n_experts` | routed experts per layer, null ones counted; the most of any layer |
//! | `cadre.layer_experts` | the same for every decoder layer, comma-separated, 0 for dense ones; absent when all are alike |
//! | `cadre.n_null` | null experts per layer, its last ids, which compute nothing; absent when there are none |
//! | `cadre.top_k` | experts per token the checkpoint asks for; rows may hold fewer or more |
//! | `cadre.attention_experts` | experts that the attention of every layer is cut into; absent when it is not |
//! | `cadre.attention_top_k` | how many of these a token takes |
//! | `cadre.lossy` | rules that changed the routing; absent when none did |

use crate::error::TraceError;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The newest version of the file format, that of traces with rows of attention experts. Others are written as version 1,
/// which is the same without these rows.
pub const FORMAT_VERSION: u32 = 2;

/// Key of the format version.
pub const KEY_TRACE_VERSION: &str = "cadre.trace_version";
/// Key of the version of Cadre that wrote the file.
pub const KEY_VERSION: &str = "cadre.version";
/// Key of the checkpoint digest.
pub const KEY_DIGEST: &str = "cadre.digest";
/// Key of the architecture.
pub const KEY_ARCHITECTURE: &str = "cadre.architecture";
/// Key of the number of layers.
pub const KEY_N_LAYERS: &str = "cadre.n_layers";
/// Key of the number of experts per layer.
pub const KEY_N_EXPERTS: &str = "cadre.n_experts";
/// Key of the experts per token.
pub const KEY_TOP_K: &str = "cadre.top_k";
/// Key of the number of experts of every layer.
pub const KEY_LAYER_EXPERTS: &str = "cadre.layer_experts";
/// Key of the number of null experts.
pub const KEY_N_NULL: &str = "cadre.n_null";
/// Key of the number of attention experts.
pub const KEY_ATTENTION_EXPERTS: &str = "cadre.attention_experts";
/// Key of the attention experts per token.
pub const KEY_ATTENTION_TOP_K: &str = "cadre.attention_top_k";
/// Key of the rules that changed the routing.
pub const KEY_LOSSY: &str = "cadre.lossy";

/// The model a trace was recorded from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceMeta {
    /// Digest of the checkpoint; a plan made from this trace is refused for any other.
    pub digest: String,
    /// `model_type` of the checkpoint, for example `qwen3_moe`.
    pub architecture: String,
    /// Decoder layers, dense ones included, so `layer` of every row is below it.
    pub n_layers: usize,
    /// Routed experts per layer, null ones counted; every expert id is below it.
    pub n_experts: usize,
    /// The same for every decoder layer, 0 for dense ones; empty when all layers with experts are alike.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_experts: Vec<usize>,
    /// Null experts per layer: the last ids of each, which compute nothing and have weight 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub n_null: usize,
    /// Experts per token the checkpoint asks for.
    pub top_k: usize,
    /// Experts of the attention, if it is cut into some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<AttentionExperts>,
    /// Rules that changed the routing while it was recorded, if any did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lossy: Option<String>,
}

/// The experts that the attention of every layer is cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttentionExperts {
    /// How many there are per layer.
    pub n_experts: usize,
    /// How many of them a token takes.
    pub top_k: usize,
}

/// Whose experts a row is about; what is made of a trace is about one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Part {
    /// The experts of the feed-forward: what plans, caches and profiles are about.
    #[default]
    FeedForward,
    /// The experts of the attention.
    Attention,
}

impl Part {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::FeedForward, Self::Attention];

    /// Its name in files and options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FeedForward => "feed_forward",
            Self::Attention => "attention",
        }
    }
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl TraceMeta {
    /// Ids that experts of decoder layer `layer` may have.
    #[must_use]
    pub fn n_experts_in(&self, layer: usize) -> usize {
        let own = self.layer_experts.get(layer).copied();
        own.unwrap_or(self.n_experts)
    }

    /// Experts of decoder layer `layer` that compute something.
    #[must_use]
    pub fn n_real_in(&self, layer: usize) -> usize {
        self.n_experts_in(layer).saturating_sub(self.n_null)
    }

    /// The model as the rows of one part see it; `None` where it has no experts there.
    #[must_use]
    pub fn of(&self, part: Part) -> Option<Self> {
        let (whole, attention) = (self.clone(), self.attention);
        match part {
            Part::FeedForward => Some(whole),
            Part::Attention => attention.map(|sizes| Self {
                n_experts: sizes.n_experts,
                layer_experts: Vec::new(),
                n_null: 0,
                top_k: sizes.top_k,
                attention: None,
                ..whole
            }),
        }
    }

    /// Version of the file format that a trace of this model needs.
    fn version(&self) -> u32 {
        match self.attention {
            None => 1,
            Some(_) => FORMAT_VERSION,
        }
    }

    /// Checks that counts are positive, `top_k <= n_experts`, and that ids fit the column types.
    ///
    /// # Errors
    /// [`TraceError::BadMeta`] naming the field.
    pub fn check(&self) -> Result<(), TraceError> {
        let limit = usize::from(u16::MAX) + 1;
        let fields = [
            ("n_layers", self.n_layers, limit),
            ("n_experts", self.n_experts, limit),
            ("top_k", self.top_k, self.n_experts),
        ];
        let of_attention = self.attention.map(|sizes| {
            [
                ("attention_experts", sizes.n_experts, limit),
                ("attention_top_k", sizes.top_k, sizes.n_experts),
            ]
        });
        let fields = fields.into_iter().chain(of_attention.into_iter().flatten());
        for (what, value, max) in fields {
            if value == 0 || value > max {
                return Err(TraceError::BadMeta {
                    what,
                    value,
                    expected: format!("1 to {max}"),
                });
            }
        }
        let most = self.layer_experts.iter().copied().max();
        let bad = |what, value, expected: String| {
            Err(TraceError::BadMeta {
                what,
                value,
                expected,
            })
        };
        if let Some(most) = most.filter(|most| *most != self.n_experts) {
            let expected = format!("{} in the largest layer", self.n_experts);
            return bad("layer_experts", most, expected);
        }
        if most.is_some() && self.layer_experts.len() != self.n_layers {
            let expected = format!("one number for each of {} layers", self.n_layers);
            return bad("layer_experts", self.layer_experts.len(), expected);
        }
        if self.n_null >= self.n_experts {
            return bad("n_null", self.n_null, format!("below {}", self.n_experts));
        }
        Ok(())
    }

    /// The key-value pairs of the file metadata.
    pub(crate) fn to_pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = vec![
            (KEY_TRACE_VERSION, self.version().to_string()),
            (KEY_VERSION, env!("CARGO_PKG_VERSION").to_string()),
            (KEY_DIGEST, self.digest.clone()),
            (KEY_ARCHITECTURE, self.architecture.clone()),
            (KEY_N_LAYERS, self.n_layers.to_string()),
            (KEY_N_EXPERTS, self.n_experts.to_string()),
            (KEY_TOP_K, self.top_k.to_string()),
        ];
        if !self.layer_experts.is_empty() {
            let counts: Vec<String> = self.layer_experts.iter().map(usize::to_string).collect();
            pairs.push((KEY_LAYER_EXPERTS, counts.join(",")));
        }
        if self.n_null > 0 {
            pairs.push((KEY_N_NULL, self.n_null.to_string()));
        }
        if let Some(sizes) = self.attention {
            pairs.push((KEY_ATTENTION_EXPERTS, sizes.n_experts.to_string()));
            pairs.push((KEY_ATTENTION_TOP_K, sizes.top_k.to_string()));
        }
        pairs.extend(self.lossy.clone().map(|lossy| (KEY_LOSSY, lossy)));
        pairs
    }

    /// Reads the pairs back; `get` looks a key up in the file metadata.
    pub(crate) fn from_pairs(
        path: &Path,
        get: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, TraceError> {
        let text = |key: &'static str| {
            get(key).ok_or(TraceError::MissingMetadata {
                path: path.to_path_buf(),
                key,
            })
        };
        let number = |key: &'static str| {
            let value = text(key)?;
            value.parse::<usize>().map_err(|_| TraceError::BadMetadata {
                path: path.to_path_buf(),
                key,
                value,
                expected: "a whole number".to_string(),
            })
        };
        let version = number(KEY_TRACE_VERSION)?;
        if !(1..=FORMAT_VERSION as usize).contains(&version) {
            return Err(TraceError::BadMetadata {
                path: path.to_path_buf(),
                key: KEY_TRACE_VERSION,
                value: version.to_string(),
                expected: format!(
                    "1 to {FORMAT_VERSION}; the file was written by another version of Cadre, record it again"
                ),
            });
        }
        let meta = Self {
            digest: text(KEY_DIGEST)?,
            architecture: text(KEY_ARCHITECTURE)?,
            n_layers: number(KEY_N_LAYERS)?,
            n_experts: number(KEY_N_EXPERTS)?,
            top_k: number(KEY_TOP_K)?,
            layer_experts: layer_experts(path, get(KEY_LAYER_EXPERTS))?,
            n_null: match get(KEY_N_NULL) {
                None => 0,
                Some(_) => number(KEY_N_NULL)?,
            },
            attention: match version {
                1 => None,
                _ => Some(AttentionExperts {
                    n_experts: number(KEY_ATTENTION_EXPERTS)?,
                    top_k: number(KEY_ATTENTION_TOP_K)?,
                }),
            },
            lossy: get(KEY_LOSSY),
        };
        meta.check_in_file(path)?;
        Ok(meta)
    }

    fn check_in_file(&self, path: &Path) -> Result<(), TraceError> {
        self.check().map_err(|error| match error {
            TraceError::BadMeta {
                what,
                value,
                expected,
            } => TraceError::BadMetadata {
                path: path.to_path_buf(),
                key: match what {
                    "n_layers" => KEY_N_LAYERS,
                    "n_experts" => KEY_N_EXPERTS,
                    "layer_experts" => KEY_LAYER_EXPERTS,
                    "n_null" => KEY_N_NULL,
                    "attention_experts" => KEY_ATTENTION_EXPERTS,
                    "attention_top_k" => KEY_ATTENTION_TOP_K,
                    _ => KEY_TOP_K,
                },
                value: value.to_string(),
                expected,
            },
            other => other,
        })
    }
}

/// The numbers of a comma-separated list; none for an absent one.
fn layer_experts(path: &Path, list: Option<String>) -> Result<Vec<usize>, TraceError> {
    let Some(list) = list else {
        return Ok(Vec::new());
    };
    let numbers: Result<Vec<usize>, _> = list.split(',').map(str::parse).collect();
    numbers.map_err(|_| TraceError::BadMetadata {
        path: path.to_path_buf(),
        key: KEY_LAYER_EXPERTS,
        value: list,
        expected: "whole numbers with commas between them".to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> TraceMeta {
        TraceMeta {
            digest: "d1".into(),
            architecture: "qwen3_moe".into(),
            n_layers: 2,
            n_experts: 4,
            top_k: 2,
            layer_experts: Vec::new(),
            n_null: 0,
            attention: None,
            lossy: None,
        }
    }

    fn lookup(pairs: Vec<(&'static str, String)>) -> impl Fn(&str) -> Option<String> {
        move |key| {
            pairs
                .iter()
                .find(|(name, _)| *name == key)
                .map(|(_, value)| value.clone())
        }
    }

    #[test]
    fn pairs_round_trip() {
        let read = TraceMeta::from_pairs(Path::new("t.parquet"), lookup(meta().to_pairs()));
        assert_eq!(read.unwrap(), meta());
        let lossy = TraceMeta {
            lossy: Some("drop-cold=0.75".into()),
            ..meta()
        };
        let read = TraceMeta::from_pairs(Path::new("t.parquet"), lookup(lossy.to_pairs()));
        assert_eq!(read.unwrap(), lossy);
    }

    #[test]
    fn only_traces_of_attention_experts_need_the_new_version() {
        let version = |meta: &TraceMeta| meta.to_pairs()[0].1.clone();
        let cut = TraceMeta {
            attention: Some(AttentionExperts {
                n_experts: 3,
                top_k: 1,
            }),
            ..uneven()
        };
        assert_eq!((version(&meta()), version(&cut)), ("1".into(), "2".into()));
        let path = Path::new("t.parquet");
        let read = TraceMeta::from_pairs(path, lookup(cut.to_pairs())).unwrap();
        assert_eq!(read, cut);
        let seen = cut.of(Part::Attention).unwrap();
        assert_eq!((seen.n_real_in(0), seen.top_k), (3, 1));
        assert_eq!(meta().of(Part::Attention), None);
        for (key, value) in [(KEY_ATTENTION_EXPERTS, "0"), (KEY_ATTENTION_TOP_K, "4")] {
            let pairs = cut.to_pairs().into_iter();
            let pairs = pairs.map(|(k, v)| (k, if k == key { value.into() } else { v }));
            let error = TraceMeta::from_pairs(path, lookup(pairs.collect())).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    /// Layers with 2 and 4 ids, one of them null in each.
    fn uneven() -> TraceMeta {
        TraceMeta {
            layer_experts: vec![2, 4],
            n_null: 1,
            ..meta()
        }
    }

    #[test]
    fn layers_may_have_their_own_numbers() {
        let read = TraceMeta::from_pairs(Path::new("t.parquet"), lookup(uneven().to_pairs()));
        let read = read.unwrap();
        assert_eq!(read, uneven());
        assert_eq!((read.n_experts_in(0), read.n_real_in(1)), (2, 3));
        assert_eq!((meta().n_experts_in(1), meta().n_real_in(1)), (4, 4));
        for (key, value) in [
            (KEY_LAYER_EXPERTS, "2,x"),
            (KEY_LAYER_EXPERTS, "2,3"),
            (KEY_LAYER_EXPERTS, "4"),
            (KEY_N_NULL, "4"),
        ] {
            let pairs = uneven()
                .to_pairs()
                .into_iter()
                .map(|(k, v)| (k, if k == key { value.into() } else { v }))
                .collect();
            let error = TraceMeta::from_pairs(Path::new("t.parquet"), lookup(pairs)).unwrap_err();
            assert!(
                matches!(&error, TraceError::BadMetadata { key: k, .. } if *k == key),
                "{error}"
            );
        }
    }

    #[test]
    fn a_missing_key_is_named() {
        for (gone, _) in meta().to_pairs() {
            if gone == KEY_VERSION {
                continue;
            }
            let pairs = meta()
                .to_pairs()
                .into_iter()
                .filter(|(name, _)| *name != gone)
                .collect();
            let error = TraceMeta::from_pairs(Path::new("t.parquet"), lookup(pairs)).unwrap_err();
            assert!(error.to_string().contains(gone), "{error}");
        }
    }

    #[test]
    fn impossible_numbers_are_refused() {
        for (key, value) in [
            (KEY_N_EXPERTS, "many"),
            (KEY_TOP_K, "5"),
            (KEY_N_LAYERS, "0"),
            (KEY_TRACE_VERSION, "3"),
        ] {
            let pairs = meta()
                .to_pairs()
                .into_iter()
                .map(|(k, v)| (k, if k == key { value.into() } else { v }))
                .collect();
            let error = TraceMeta::from_pairs(Path::new("t.parquet"), lookup(pairs)).unwrap_err();
            assert!(
                matches!(&error, TraceError::BadMetadata { key: k, .. } if *k == key),
                "{error}"
            );
        }
    }
}
