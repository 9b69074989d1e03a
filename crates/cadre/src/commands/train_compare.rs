//! `cadre train compare`: several runs side by side, as a page, a table or numbers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cadre_trace::curves::{self, Cell, Chart, CurvePage, Line, Table};
use cadre_train::plot::{self, RunSummary};
use cadre_train::recipe::Recipe;
use serde_json::json;

use crate::output::{Format, Out, count};

/// Arguments of `cadre train compare`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a run (a recipe's `output.dir`), a recipe, or a log; a run may still be going on.
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// Writes a page with curves and tables; one file, which loads nothing.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Form of the numbers on standard output.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// Curves of the page: name, title, whether its axis starts at zero.
const CHARTS: [(&str, &str, bool); 12] = [
    (
        "heldout",
        "Held-out loss, mean over domains, nats per token",
        false,
    ),
    (
        "cross_entropy",
        "Training cross-entropy, nats per token",
        false,
    ),
    ("loss", "Training loss with all its parts", false),
    ("balance", "Balance loss (1 is even)", false),
    ("z", "Router z-loss", true),
    ("max_vio", "MaxVio: fullest expert over mean, minus 1", true),
    ("cv", "CV of the load (0 is even)", true),
    ("dead", "Dead experts per layer", true),
    ("entropy", "Routing entropy, nats", true),
    ("picks", "Experts per token", true),
    ("dropped", "Share of the picks that were dropped", true),
    ("grad_norm", "Gradient norm, before clipping", true),
];
/// Columns of the table: name, head, digits.
const COLUMNS: [(&str, &str, usize); 8] = [
    ("cross_entropy", "training loss", 4),
    ("balance", "balance", 3),
    ("cv", "CV", 3),
    ("max_vio", "MaxVio", 3),
    ("dead", "dead", 2),
    ("entropy", "entropy", 3),
    ("picks", "picks", 2),
    ("dropped", "dropped", 3),
];

/// Compares.
pub(crate) fn run(args: &Args) -> Result<()> {
    let logs = args
        .runs
        .iter()
        .map(|path| log_of(path))
        .collect::<Result<Vec<_>>>()?;
    let named: Vec<(&str, &Path)> = logs
        .iter()
        .map(|(name, path)| (name.as_str(), path.as_path()))
        .collect();
    let runs = plot::compare(&named)?;
    if let Some(path) = &args.html {
        fs::write(path, curves::page(&page(&runs)))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&json!({ "runs": runs }))?,
        Format::Text => {
            for table in tables(&runs) {
                out.write(&text(&table))?;
            }
            for (name, warning) in warnings(&runs) {
                out.write(&format!("warning: {name}: {warning}\n"))?;
            }
        }
    }
    out.finish()
}

/// Name and log of a run that was given as its folder, its recipe or its log.
fn log_of(path: &Path) -> Result<(String, PathBuf)> {
    let stem = |path: &Path| {
        let name = path.file_stem().unwrap_or(path.as_os_str());
        name.to_string_lossy().into_owned()
    };
    if path.extension().is_some_and(|e| e == "toml") {
        let recipe = Recipe::read(path)?;
        return Ok((recipe.name, recipe.output.dir.join("log.jsonl")));
    }
    if path.is_dir() {
        // `.` and `..` have names, too.
        let folder = fs::canonicalize(path)
            .with_context(|| format!("cannot read the folder {}", path.display()))?;
        let name = folder.file_name().unwrap_or(path.as_os_str());
        return Ok((name.to_string_lossy().into_owned(), path.join("log.jsonl")));
    }
    let name = match path.parent().and_then(Path::file_name) {
        Some(folder) if stem(path) == "log" => folder.to_string_lossy().into_owned(),
        _ => stem(path),
    };
    Ok((name, path.to_owned()))
}

fn warnings(runs: &[RunSummary]) -> impl Iterator<Item = (&str, String)> {
    runs.iter().flat_map(|run| {
        run.warnings
            .iter()
            .map(|w| (run.name.as_str(), format!("step {}: {}", w.step, w.warning)))
    })
}

fn page(runs: &[RunSummary]) -> CurvePage {
    let known: BTreeSet<&str> = CHARTS.iter().map(|(name, ..)| *name).collect();
    // Parts that only some recipes ask for.
    let further: BTreeSet<&String> = runs
        .iter()
        .flat_map(|run| run.curves.keys())
        .filter(|name| {
            !known.contains(name.as_str()) && *name != "lr" && *name != "tokens_per_second"
        })
        .collect();
    let charts = CHARTS
        .iter()
        .map(|(name, title, from_zero)| chart(runs, name, title, *from_zero))
        .chain(further.iter().map(|name| chart(runs, name, name, true)))
        .filter(|chart| !chart.lines.is_empty());
    CurvePage {
        title: match runs {
            [only] => only.name.clone(),
            several => format!("{} runs", several.len()),
        },
        about: "Training runs side by side; numbers are means over the last twentieth of each run.".to_owned(),
        notes: warnings(runs)
            .map(|(name, warning)| format!("{name}, {warning}"))
            .collect(),
        series: runs.iter().map(|run| run.name.clone()).collect(),
        tables: tables(runs),
        charts: charts.collect(),
        footer: "Routing is averaged over MoE layers. Dead: experts without a token in a step. Bold: best of its column.".to_owned(),
    }
}

fn chart(runs: &[RunSummary], name: &str, title: &str, from_zero: bool) -> Chart {
    let line = |(series, run): (usize, &RunSummary)| {
        let points = run.curves.get(name)?.clone();
        (!points.is_empty()).then_some(Line {
            series,
            points,
            marked: name == "heldout",
        })
    };
    Chart {
        title: title.to_owned(),
        from_zero,
        lines: runs.iter().enumerate().filter_map(line).collect(),
    }
}

fn cell(text: String) -> Cell {
    Cell { text, best: false }
}

/// A column of numbers, of which the lowest is marked when there are several runs and `lower_is_better`.
fn column(values: &[Option<f64>], digits: usize, lower_is_better: bool) -> Vec<Cell> {
    let least = values
        .iter()
        .flatten()
        .copied()
        .fold(f64::INFINITY, f64::min);
    let several = values.iter().flatten().count() > 1;
    let cell = |value: &Option<f64>| Cell {
        text: value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}")),
        best: lower_is_better && several && *value == Some(least),
    };
    values.iter().map(cell).collect()
}

/// The end of every run, and its held-out loss by domain.
fn tables(runs: &[RunSummary]) -> Vec<Table> {
    let names = || runs.iter().map(|run| cell(run.name.clone())).collect();
    let mut end: Vec<(&str, Vec<Cell>)> = vec![
        ("run", names()),
        (
            "tokens",
            runs.iter().map(|run| cell(count(run.tokens))).collect(),
        ),
    ];
    let of =
        |value: &dyn Fn(&RunSummary) -> Option<f64>| runs.iter().map(value).collect::<Vec<_>>();
    end.push(("held out", column(&of(&|run| run.heldout_nll), 4, true)));
    for (name, head, digits) in COLUMNS {
        let values = of(&|run| run.end.get(name).copied());
        if values.iter().any(Option::is_some) {
            let lower_is_better = matches!(name, "cross_entropy" | "max_vio" | "cv");
            end.push((head, column(&values, digits, lower_is_better)));
        }
    }
    let speed = of(&|run| Some(run.tokens_per_second));
    end.push(("tokens/s", column(&speed, 0, false)));
    let mut tables = vec![table("At the end", end)];
    let domains: BTreeSet<&String> = runs.iter().flat_map(|run| run.heldout.keys()).collect();
    if !domains.is_empty() {
        let mut columns: Vec<(&str, Vec<Cell>)> = vec![("run", names())];
        for domain in &domains {
            let values = of(&|run| run.heldout.get(*domain).map(|score| score.perplexity));
            columns.push((domain.as_str(), column(&values, 2, true)));
        }
        tables.push(table("Held-out perplexity by domain", columns));
    }
    tables
}

/// A table from its columns.
fn table(title: &str, columns: Vec<(&str, Vec<Cell>)>) -> Table {
    let n_rows = columns.first().map_or(0, |(_, cells)| cells.len());
    let row = |i: usize| columns.iter().map(|(_, cells)| cells[i].clone()).collect();
    Table {
        title: title.to_owned(),
        rows: (0..n_rows).map(row).collect(),
        columns: columns.iter().map(|(head, _)| (*head).to_owned()).collect(),
    }
}

/// A table for a terminal: names to the left, numbers to the right.
fn text(table: &Table) -> String {
    let cells = |row: &[Cell]| row.iter().map(|c| c.text.clone()).collect::<Vec<_>>();
    let mut rows = vec![table.columns.clone()];
    rows.extend(table.rows.iter().map(|row| cells(row)));
    let width = |i: usize| {
        rows.iter()
            .map(|row| row[i].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..table.columns.len()).map(width).collect();
    let mut text = format!("{}\n", table.title);
    for row in &rows {
        for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let padded = if i == 0 {
                format!("{cell:<width$}")
            } else {
                format!("  {cell:>width$}")
            };
            text.push_str(&padded);
        }
        text.push('\n');
    }
    text + "\n"
}
