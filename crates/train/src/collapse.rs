//! Notices when the routing of a layer collapses onto few experts, and names the layer.
//!
//! One bad step is noise, so a condition has to hold for [`PATIENCE`] steps in a row, and the fullest experts of those
//! steps have to be few: where experts take turns (random routing gives a whole batch to one), nothing has collapsed.

use crate::log::{LayerRecord, StepRecord, WarningRecord};
use std::collections::{BTreeMap, BTreeSet};

/// Steps in a row that a condition has to hold.
pub const PATIENCE: u64 = 20;
/// Fewer picks per expert than this say nothing about a router.
const PICKS_PER_EXPERT: f64 = 16.0;
/// Share of the worst possible MaxVio (all tokens to the same experts) that counts as collapsed.
const MAX_VIO: f64 = 0.8;
/// Share of the experts that may be without a token.
const DEAD: f64 = 0.5;
/// Share of the largest possible entropy under which a router no longer weighs one expert against another.
const ENTROPY: f64 = 0.01;

/// The state of the watch over all layers of a run, and over their attention where it has experts.
#[derive(Debug, Default)]
pub struct CollapseWatch {
    /// By layer, and whether its attention is meant.
    streaks: BTreeMap<(usize, bool), Streak>,
}

#[derive(Debug, Default)]
struct Streak {
    steps: u64,
    fullest: BTreeSet<usize>,
}

impl CollapseWatch {
    /// Looks at a step of `n_tokens`; returns a warning per layer whose routing has been collapsed for exactly
    /// [`PATIENCE`] steps, so a collapse that goes on is told once.
    pub fn observe(&mut self, n_tokens: usize, record: &StepRecord) -> Vec<WarningRecord> {
        let mut warnings = Vec::new();
        let attention = record.attention.iter().map(|layer| (layer, true));
        let layers = record.layers.iter().map(|layer| (layer, false));
        for (layer, of_attention) in layers.chain(attention) {
            let key = (layer.layer, of_attention);
            let Some(reason) = reason(layer, n_tokens) else {
                self.streaks.remove(&key);
                continue;
            };
            let (what, remedy) = match of_attention {
                true => ("the attention of layer", "lower train.lr"),
                false => (
                    "layer",
                    "raise losses.balance or losses.z, or lower train.lr",
                ),
            };
            let streak = self.streaks.entry(key).or_default();
            streak.steps += 1;
            streak.fullest.insert(layer.fullest);
            if streak.fullest.len() > (layer.experts / 4).max(1) {
                self.streaks.remove(&key);
            } else if streak.steps == PATIENCE {
                warnings.push(WarningRecord {
                    step: record.step,
                    layer: layer.layer,
                    warning: format!(
                        "routing of {what} {} has collapsed for {PATIENCE} steps: {reason}; {remedy}",
                        layer.layer
                    ),
                });
            }
        }
        warnings
    }
}

/// What is wrong with a layer's routing in one step.
fn reason(layer: &LayerRecord, n_tokens: usize) -> Option<String> {
    let experts = layer.experts as f64;
    if layer.experts < 2 || layer.slots * (n_tokens as f64) < PICKS_PER_EXPERT * experts {
        return None;
    }
    let worst = experts / layer.slots - 1.0;
    if worst >= 0.5 && layer.max_vio >= MAX_VIO * worst {
        let share = (layer.max_vio + 1.0) * layer.slots / experts;
        return Some(format!(
            "expert {} gets {:.0} % of the tokens (MaxVio {:.2} of at most {worst:.2})",
            layer.fullest,
            100.0 * share,
            layer.max_vio
        ));
    }
    if layer.experts >= 4 && layer.dead as f64 >= DEAD * experts {
        return Some(format!(
            "{} of {} experts get no token",
            layer.dead, layer.experts
        ));
    }
    (layer.entropy < ENTROPY * experts.ln()).then(|| {
        format!(
            "routing entropy {:.4} of at most {:.2} nats, the router is certain of every token and learns no more",
            layer.entropy,
            experts.ln()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(id: usize) -> LayerRecord {
        LayerRecord {
            layer: id,
            cv: 0.1,
            max_vio: 0.2,
            dead: 0,
            entropy: 1.5,
            experts: 8,
            picks: 1.0,
            dropped: 0.0,
            slots: 1.0,
            fullest: 3,
        }
    }

    fn record(step: u64, layers: Vec<LayerRecord>) -> StepRecord {
        StepRecord {
            step,
            layers,
            ..StepRecord::default()
        }
    }

    fn warned(
        steps: u64,
        n_tokens: usize,
        change: impl Fn(u64, &mut LayerRecord),
    ) -> Vec<WarningRecord> {
        let mut watch = CollapseWatch::default();
        (1..=steps)
            .flat_map(|step| {
                let mut bad = layer(2);
                change(step, &mut bad);
                watch.observe(n_tokens, &record(step, vec![layer(0), bad]))
            })
            .collect()
    }

    #[test]
    fn each_kind_of_collapse_names_its_layer_once() {
        type Change = fn(u64, &mut LayerRecord);
        let kinds: [(Change, &str); 3] = [
            (|_, l| l.max_vio = 5.9, "expert 3 gets 86 % of the tokens"),
            (|_, l| l.dead = 4, "4 of 8 experts get no token"),
            (|_, l| l.entropy = 0.01, "routing entropy 0.0100"),
        ];
        for (change, text) in kinds {
            let warnings = warned(PATIENCE + 30, 4096, change);
            assert_eq!(warnings.len(), 1, "{text}");
            assert_eq!((warnings[0].step, warnings[0].layer), (PATIENCE, 2));
            assert!(
                warnings[0].warning.contains("layer 2") && warnings[0].warning.contains(text),
                "{}",
                warnings[0].warning
            );
        }
    }

    #[test]
    fn attention_is_watched_by_itself() {
        let mut watch = CollapseWatch::default();
        let warnings: Vec<WarningRecord> = (1..=PATIENCE)
            .flat_map(|step| {
                let mut record = record(step, vec![layer(2)]);
                record.attention = vec![layer(2)];
                record.attention[0].max_vio = 7.0;
                watch.observe(4096, &record)
            })
            .collect();
        assert_eq!(warnings.len(), 1);
        let text = &warnings[0].warning;
        assert!(
            text.contains("the attention of layer 2") && !text.contains("losses"),
            "{text}"
        );
    }

    #[test]
    fn short_spells_small_batches_and_experts_that_take_turns_are_no_collapse() {
        assert!(warned(60, 4096, |_, _| ()).is_empty());
        assert!(
            warned(60, 4096, |step, l| l.max_vio =
                if step % 15 == 0 { 0.0 } else { 7.0 })
            .is_empty()
        );
        assert!(
            warned(60, 1, |_, l| l.max_vio = 7.0).is_empty(),
            "one token has to go somewhere"
        );
        let turns = |step: u64, l: &mut LayerRecord| {
            (l.max_vio, l.dead, l.fullest) = (7.0, 7, (step % 8) as usize);
        };
        assert!(warned(100, 4096, turns).is_empty(), "random routing");
        let again = warned(100, 4096, |step, l| {
            l.max_vio = if step == 50 { 0.0 } else { 7.0 }
        });
        assert_eq!(again.iter().map(|w| w.step).collect::<Vec<_>>(), [20, 70]);
    }
}
