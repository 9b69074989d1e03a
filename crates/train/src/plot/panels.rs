//! What the figure shows: from histories to panels of lines, with no drawing in it.

use super::canvas::number;
use super::read::History;
use crate::log::{EvalRecord, LayerRecord, StepRecord};
use plotters::style::RGBColor;
use std::collections::BTreeSet;

/// Most points of a line; longer ones are averaged over neighbouring steps.
const MAX_POINTS: usize = 150;
const TRAINING: RGBColor = RGBColor(51, 65, 85);
const PALETTE: [RGBColor; 8] = [
    RGBColor(37, 99, 235),
    RGBColor(234, 88, 12),
    RGBColor(22, 163, 74),
    RGBColor(147, 51, 234),
    RGBColor(219, 39, 119),
    RGBColor(13, 148, 136),
    RGBColor(202, 138, 4),
    RGBColor(220, 38, 38),
];
/// First to last layer.
const RAMP: [RGBColor; 4] = [
    RGBColor(245, 158, 11),
    RGBColor(225, 29, 72),
    RGBColor(124, 58, 237),
    RGBColor(23, 37, 84),
];

/// Everything to draw.
#[derive(Debug)]
pub(super) struct Figure {
    pub(super) title: String,
    pub(super) subtitle: String,
    /// Name and colour of each run, when there are several.
    pub(super) runs: Vec<(String, RGBColor)>,
    /// The large panel.
    pub(super) loss: Panel,
    pub(super) rows: Vec<Row>,
}

/// Small panels side by side under a heading.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) heading: &'static str,
    /// Index and colour of each layer, when lines stand for layers.
    pub(super) layers: Vec<(usize, RGBColor)>,
    pub(super) panels: Vec<Panel>,
}

/// Axes and what is on them; x is the step.
#[derive(Debug)]
pub(super) struct Panel {
    pub(super) title: &'static str,
    pub(super) lines: Vec<Line>,
    /// Whether the y axis starts at zero.
    pub(super) from_zero: bool,
    /// Whether the spread around the means is shown; the spreads of many lines would hide one another.
    pub(super) spread: bool,
}

/// One curve.
#[derive(Debug)]
pub(super) struct Line {
    /// Written at its right end; empty for none.
    pub(super) label: String,
    pub(super) colour: RGBColor,
    pub(super) points: Vec<Point>,
    /// Measured at few steps: these are marked.
    pub(super) marked: bool,
}

/// Mean of a value over some neighbouring steps, and its extremes there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) step: f64,
    pub(super) mean: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// The figure of `histories`, of which there is at least one.
pub(super) fn figure(histories: &[History]) -> Figure {
    let colours: Vec<RGBColor> = match histories {
        [_] => vec![TRAINING],
        _ => (0..histories.len())
            .map(|i| PALETTE[i % PALETTE.len()])
            .collect(),
    };
    let runs: Vec<(&History, RGBColor)> = histories.iter().zip(colours).collect();
    let mut rows = vec![optimisation(&runs)];
    if histories
        .iter()
        .any(|h| h.steps.iter().any(|s| !s.layers.is_empty()))
    {
        rows.push(routing(&runs));
    }
    Figure {
        title: match histories {
            [only] => only.name.clone(),
            all => format!("{} runs", all.len()),
        },
        subtitle: if let [only] = histories {
            summary(only)
        } else {
            String::new()
        },
        runs: match runs.as_slice() {
            [_] => Vec::new(),
            several => several
                .iter()
                .map(|(h, colour)| (h.name.clone(), *colour))
                .collect(),
        },
        loss: loss(&runs),
        rows,
    }
}

/// The end of a run in words.
fn summary(history: &History) -> String {
    let last = &history.steps[history.steps.len() - 1];
    let held_out = held_out_mean(history)
        .last()
        .map(|p| format!(", held-out loss {:.3}", p.mean));
    let plural = if last.step == 1 { "" } else { "s" };
    let tokens = number(last.tokens as f64);
    format!(
        "{} step{plural}, {tokens} tokens{}",
        last.step,
        held_out.unwrap_or_default()
    )
}

fn loss(runs: &[(&History, RGBColor)]) -> Panel {
    let training = |history, colour| line(history, colour, |s| Some(s.cross_entropy));
    if let [(history, colour)] = runs {
        let mut lines = vec![Line {
            label: "training".to_owned(),
            ..training(history, *colour)
        }];
        lines.extend(domains(history));
        return Panel {
            title: "Cross-entropy, nats per token: training, and held out by domain",
            lines,
            from_zero: false,
            spread: true,
        };
    }
    let held_out = |(history, colour): &(&History, RGBColor)| Line {
        label: String::new(),
        colour: *colour,
        points: held_out_mean(history),
        marked: true,
    };
    let mut lines: Vec<Line> = runs
        .iter()
        .map(|(h, colour)| training(h, faded(*colour)))
        .collect();
    lines.extend(runs.iter().map(held_out));
    Panel {
        title: "Cross-entropy, nats per token: training (pale), and held out, mean over domains (dots)",
        lines,
        from_zero: false,
        spread: false,
    }
}

/// Held-out loss by domain.
fn domains(history: &History) -> impl Iterator<Item = Line> {
    let names: BTreeSet<&String> = history.evals.iter().flat_map(|e| e.eval.keys()).collect();
    names.into_iter().enumerate().map(|(i, domain)| {
        let of = |e: &EvalRecord| Some((e.step as f64, e.eval.get(domain)?.nll));
        Line {
            label: domain.clone(),
            colour: PALETTE[i % PALETTE.len()],
            points: averaged(&history.evals.iter().filter_map(of).collect::<Vec<_>>()),
            marked: true,
        }
    })
}

/// Held-out loss, every domain counting the same.
fn held_out_mean(history: &History) -> Vec<Point> {
    let mean = |eval: &EvalRecord| {
        let sum: f64 = eval.eval.values().map(|score| score.nll).sum();
        (eval.step as f64, sum / eval.eval.len() as f64)
    };
    let evals = history.evals.iter().filter(|e| !e.eval.is_empty());
    averaged(&evals.map(mean).collect::<Vec<_>>())
}

fn optimisation(runs: &[(&History, RGBColor)]) -> Row {
    let panel = |title, from_zero, value: fn(&StepRecord) -> Option<f64>| Panel {
        title,
        lines: runs
            .iter()
            .map(|(history, colour)| line(history, *colour, value))
            .collect(),
        from_zero,
        spread: runs.len() == 1,
    };
    let panels = [
        panel("Learning rate", true, |s| Some(s.lr)),
        panel("Gradient norm, before clipping", true, |s| {
            Some(s.grad_norm)
        }),
        // A dense model has none, and its log says 0.
        panel("Balance loss (1 is even)", false, |s| {
            (!s.layers.is_empty()).then_some(s.balance)
        }),
        panel("Tokens per second", true, |s| Some(s.tokens_per_second)),
    ];
    let used = |panel: &Panel| panel.lines.iter().any(|l| !l.points.is_empty());
    Row {
        heading: "Optimisation",
        layers: Vec::new(),
        panels: panels.into_iter().filter(used).collect(),
    }
}

fn routing(runs: &[(&History, RGBColor)]) -> Row {
    let layers: Vec<(usize, RGBColor)> = match runs {
        [(history, _)] => layers(history),
        _ => Vec::new(),
    };
    let panel = |title, value: fn(&LayerRecord) -> f64| Panel {
        title,
        lines: match runs {
            [(history, _)] => {
                let of = |(layer, colour): &(usize, RGBColor)| {
                    layer_line(history, *colour, *layer, value)
                };
                layers.iter().map(of).collect()
            }
            _ => runs
                .iter()
                .map(|(history, colour)| layer_mean(history, *colour, value))
                .collect(),
        },
        from_zero: true,
        spread: false,
    };
    let panels = vec![
        panel("Load CV (0 is even)", |l| l.cv),
        panel("MaxVio: fullest expert over mean, minus 1", |l| l.max_vio),
        panel("Experts without a token", |l| l.dead as f64),
        panel("Routing entropy, nats", |l| l.entropy),
    ];
    Row {
        heading: if runs.len() == 1 {
            "Routing by layer"
        } else {
            "Routing, mean over layers"
        },
        layers,
        panels,
    }
}

/// The MoE layers of a run.
fn layers(history: &History) -> Vec<(usize, RGBColor)> {
    let ids = history
        .steps
        .iter()
        .flat_map(|s| s.layers.iter().map(|l| l.layer));
    let ids: BTreeSet<usize> = ids.collect();
    let n = ids.len();
    ids.into_iter()
        .enumerate()
        .map(|(i, layer)| (layer, ramp(i, n)))
        .collect()
}

fn line(history: &History, colour: RGBColor, value: impl Fn(&StepRecord) -> Option<f64>) -> Line {
    let at = |s: &StepRecord| Some((s.step as f64, value(s)?));
    let values: Vec<(f64, f64)> = history.steps.iter().filter_map(at).collect();
    Line {
        label: String::new(),
        colour,
        points: averaged(&values),
        marked: false,
    }
}

fn layer_line(
    history: &History,
    colour: RGBColor,
    layer: usize,
    value: fn(&LayerRecord) -> f64,
) -> Line {
    line(history, colour, |s| {
        s.layers.iter().find(|l| l.layer == layer).map(value)
    })
}

fn layer_mean(history: &History, colour: RGBColor, value: fn(&LayerRecord) -> f64) -> Line {
    line(history, colour, |s| {
        let sum: f64 = s.layers.iter().map(value).sum();
        (!s.layers.is_empty()).then_some(sum / s.layers.len() as f64)
    })
}

/// At most [`MAX_POINTS`] points.
pub(super) fn averaged(values: &[(f64, f64)]) -> Vec<Point> {
    let size = values.len().div_ceil(MAX_POINTS).max(1);
    let point = |values: &[(f64, f64)]| {
        let n = values.len() as f64;
        let y = || values.iter().map(|v| v.1);
        Point {
            step: values.iter().map(|v| v.0).sum::<f64>() / n,
            mean: y().sum::<f64>() / n,
            low: y().fold(f64::INFINITY, f64::min),
            high: y().fold(f64::NEG_INFINITY, f64::max),
        }
    };
    values.chunks(size).map(point).collect()
}

/// Half way to the paper.
fn faded(RGBColor(r, g, b): RGBColor) -> RGBColor {
    let [r, g, b] = [r, g, b].map(|c| c / 2 + 127);
    RGBColor(r, g, b)
}

/// Colour `i` of `n` along the ramp.
fn ramp(i: usize, n: usize) -> RGBColor {
    let at = i as f64 / (n.max(2) - 1) as f64 * (RAMP.len() - 1) as f64;
    let first = (at as usize).min(RAMP.len() - 2);
    let (a, b, t) = (RAMP[first], RAMP[first + 1], at - first as f64);
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * t).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_values_are_kept_and_many_averaged() {
        let point = |step, mean, low, high| Point {
            step,
            mean,
            low,
            high,
        };
        assert_eq!(
            averaged(&[(1.0, 5.0), (2.0, 7.0)]),
            [point(1.0, 5.0, 5.0, 5.0), point(2.0, 7.0, 7.0, 7.0)]
        );
        let many: Vec<(f64, f64)> = (0..=600)
            .map(|i| (f64::from(i), f64::from(i % 5)))
            .collect();
        let points = averaged(&many);
        assert_eq!(points.len(), 121);
        assert_eq!(points[0], point(2.0, 2.0, 0.0, 4.0));
        assert_eq!(points[120], point(600.0, 0.0, 0.0, 0.0));
        assert_eq!(averaged(&[]), []);
    }

    #[test]
    fn the_ramp_ends_at_its_ends() {
        assert_eq!(
            [ramp(0, 1), ramp(0, 6), ramp(5, 6)],
            [RAMP[0], RAMP[0], RAMP[3]]
        );
        assert_eq!(ramp(1, 4), RAMP[1]);
    }
}
