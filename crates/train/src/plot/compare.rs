//! Several runs side by side, as numbers: where each ended, and its curves. Whoever shows them decides how.

use super::PlotError;
use super::panels::averaged;
use super::read::{self, History};
use crate::log::{LayerRecord, Score, StepRecord, WarningRecord};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Share of a run's steps, the last ones, that its end is averaged over.
const END: f64 = 0.05;

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct RunSummary {
    /// Its name.
    pub name: String,
    /// Steps done.
    pub steps: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Time spent in steps, seconds.
    pub seconds: f64,
    /// Median speed.
    pub tokens_per_second: f64,
    /// Means over the last twentieth of the steps: `loss` and its parts, and, over all MoE layers, `cv`, `max_vio`, `dead`
    /// (experts per layer), `entropy`, `picks` (real experts per token) and `dropped` (share of the picks). Without MoE layers those are absent.
    pub end: BTreeMap<String, f64>,
    /// Largest MaxVio of a layer over the last twentieth of the steps.
    pub worst_layer: Option<WorstLayer>,
    /// The last evaluation, by domain.
    pub heldout: BTreeMap<String, Score>,
    /// Its mean over domains, nats per token.
    pub heldout_nll: Option<f64>,
    /// What the run warned of.
    pub warnings: Vec<WarningRecord>,
    /// Curves by name, in the words of `end`, and `heldout`: steps and values, at most 150 of them (means of neighbours).
    pub curves: BTreeMap<String, Vec<(f64, f64)>>,
}

/// The layer with the largest MaxVio.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct WorstLayer {
    /// Layer index.
    pub layer: usize,
    /// Mean over the end of the run.
    pub max_vio: f64,
}

/// Reads the logs of `runs`, each a name and the path of its JSONL.
///
/// # Errors
/// [`PlotError`]: no runs, a log that cannot be read, has a bad line, or holds no step.
pub fn compare(runs: &[(&str, &Path)]) -> Result<Vec<RunSummary>, PlotError> {
    if runs.is_empty() {
        return Err(PlotError::NoRuns);
    }
    let history = |(name, path): &(&str, &Path)| read::history(name, path);
    let histories: Vec<History> = runs.iter().map(history).collect::<Result<_, _>>()?;
    Ok(histories.into_iter().map(summary).collect())
}

/// Every number of a step by its name.
fn values(step: &StepRecord) -> BTreeMap<String, f64> {
    let mut values: BTreeMap<String, f64> = step.parts.clone();
    values.extend(
        [
            ("loss", step.loss),
            ("cross_entropy", step.cross_entropy),
            ("grad_norm", step.grad_norm),
            ("lr", step.lr),
            ("tokens_per_second", step.tokens_per_second),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    let layers = &step.layers;
    if layers.is_empty() {
        return values;
    }
    let mean = |value: fn(&LayerRecord) -> f64| {
        layers.iter().map(value).sum::<f64>() / layers.len() as f64
    };
    values.extend(
        [
            ("balance", step.balance),
            ("z", step.z),
            ("cv", mean(|l| l.cv)),
            ("max_vio", mean(|l| l.max_vio)),
            ("dead", mean(|l| l.dead as f64)),
            ("entropy", mean(|l| l.entropy)),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    // Logs of earlier versions have no picks, and most runs drop none.
    let some = [
        ("picks", mean(|l| l.picks)),
        ("dropped", mean(|l| l.dropped)),
    ];
    for (name, value) in some {
        if value > 0.0 {
            values.insert(name.to_owned(), value);
        }
    }
    values
}

fn summary(history: History) -> RunSummary {
    let steps = &history.steps;
    let last = &steps[steps.len() - 1];
    let all: Vec<(f64, BTreeMap<String, f64>)> =
        steps.iter().map(|s| (s.step as f64, values(s))).collect();
    let names: BTreeSet<&String> = all.iter().flat_map(|(_, values)| values.keys()).collect();
    let points = |name: &String| {
        let of = |(step, values): &(f64, BTreeMap<String, f64>)| Some((*step, *values.get(name)?));
        let points = averaged(&all.iter().filter_map(of).collect::<Vec<_>>());
        points.into_iter().map(|p| (p.step, p.mean)).collect()
    };
    let mut curves: BTreeMap<String, Vec<(f64, f64)>> = names
        .iter()
        .map(|name| ((*name).clone(), points(name)))
        .collect();
    let evals = history.evals.iter().filter(|e| !e.eval.is_empty());
    let nll = |scores: &BTreeMap<String, Score>| {
        scores.values().map(|s| s.nll).sum::<f64>() / scores.len() as f64
    };
    let heldout: Vec<(f64, f64)> = evals.map(|e| (e.step as f64, nll(&e.eval))).collect();
    let heldout_nll = heldout.last().map(|(_, nll)| *nll);
    if !heldout.is_empty() {
        curves.insert("heldout".to_owned(), heldout);
    }
    let n_end = ((all.len() as f64 * END).ceil() as usize).max(1);
    let tail = &all[all.len() - n_end..];
    let end = names.iter().filter_map(|name| {
        let values: Vec<f64> = tail
            .iter()
            .filter_map(|(_, v)| v.get(*name).copied())
            .collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        (!values.is_empty()).then(|| ((*name).clone(), mean))
    });
    let mut speeds: Vec<f64> = steps.iter().map(|s| s.tokens_per_second).collect();
    speeds.sort_by(f64::total_cmp);
    RunSummary {
        steps: last.step,
        tokens: last.tokens,
        seconds: steps.iter().map(|s| s.seconds).sum(),
        tokens_per_second: speeds[speeds.len() / 2],
        end: end.collect(),
        worst_layer: worst(&steps[steps.len() - n_end..]),
        heldout: history
            .evals
            .last()
            .map(|e| e.eval.clone())
            .unwrap_or_default(),
        heldout_nll,
        curves,
        name: history.name,
        warnings: history.warnings,
    }
}

fn worst(steps: &[StepRecord]) -> Option<WorstLayer> {
    let mut sums: BTreeMap<usize, f64> = BTreeMap::new();
    for layer in steps.iter().flat_map(|s| &s.layers) {
        *sums.entry(layer.layer).or_default() += layer.max_vio / steps.len() as f64;
    }
    let (layer, max_vio) = sums.into_iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(WorstLayer { layer, max_vio })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::EvalRecord;

    fn history(n_layers: usize) -> History {
        let layer = |layer: usize, step: u64| LayerRecord {
            layer,
            cv: 0.5,
            max_vio: layer as f64 + if step > 38 { 1.0 } else { 9.0 },
            dead: 2 * layer,
            entropy: 1.0,
            experts: 8,
            picks: 1.5,
            dropped: 0.0,
            slots: 2.0,
            fullest: 0,
        };
        let step = |step: u64| StepRecord {
            step,
            tokens: step * 100,
            loss: 40.0 - step as f64,
            seconds: 2.0,
            tokens_per_second: step as f64,
            layers: (0..n_layers).map(|l| layer(l, step)).collect(),
            parts: [("entropy_loss".to_owned(), 0.25)].into(),
            ..StepRecord::default()
        };
        let score = |nll: f64| Score {
            tokens: 5,
            nll,
            perplexity: nll.exp(),
        };
        let eval = |step: u64, a: f64, b: f64| EvalRecord {
            step,
            eval: [("a".to_owned(), score(a)), ("b".to_owned(), score(b))].into(),
        };
        History {
            name: "run".to_owned(),
            steps: (1..=40).map(step).collect(),
            evals: vec![eval(20, 5.0, 6.0), eval(40, 2.0, 3.0)],
            warnings: Vec::new(),
        }
    }

    #[test]
    fn the_end_is_the_mean_of_the_last_steps_and_layers() {
        let run = summary(history(3));
        assert_eq!((run.steps, run.tokens, run.seconds), (40, 4000, 80.0));
        assert_eq!(run.tokens_per_second, 21.0, "median");
        // Steps 39 and 40, layers 0 to 2.
        assert_eq!(run.end["loss"], 0.5);
        assert_eq!(
            (run.end["max_vio"], run.end["dead"], run.end["picks"]),
            (2.0, 2.0, 1.5)
        );
        assert_eq!(run.end["entropy_loss"], 0.25);
        let worst = run.worst_layer.unwrap();
        assert_eq!((worst.layer, worst.max_vio), (2, 3.0));
        assert_eq!((run.heldout["b"].nll, run.heldout_nll), (3.0, Some(2.5)));
        assert_eq!(run.curves["heldout"], [(20.0, 5.5), (40.0, 2.5)]);
        assert_eq!(run.curves["loss"].len(), 40);
    }

    #[test]
    fn a_dense_run_has_no_routing() {
        let run = summary(history(0));
        assert!(run.worst_layer.is_none());
        for name in ["cv", "balance", "picks"] {
            assert!(
                !run.end.contains_key(name) && !run.curves.contains_key(name),
                "{name}"
            );
        }
    }
}
