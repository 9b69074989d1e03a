//! The report of `cadre trace replay` for people: tables of policies by budgets.

use std::fmt::Write;

use super::report::{Report, Row, Side};
use crate::output::{bytes, harmless};

/// What was replayed, hit rates, bytes, and how good predictions are.
pub(super) fn text(report: &Report) -> String {
    let mut text = format!(
        "{}: {} layers x {} experts, top-{}; {} tokens in {} sequences\n",
        harmless(&report.architecture),
        report.n_layers,
        report.n_experts,
        report.top_k,
        report.n_tokens,
        report.n_sequences
    );
    let sizes = report.sizes.iter().map(|&(size, n)| match report.unit {
        "bytes" => format!("{n} of {}", bytes(size as u64)),
        _ => n.to_string(),
    });
    let sizes: Vec<String> = sizes.collect();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "experts: {}; without a cache a token reads {}\n",
        sizes.join(", "),
        amount(report, report.bytes_per_token)
    );
    let n_decoded = report.n_tokens as u64 - report.n_prompt_tokens;
    if n_decoded > 0 {
        side(&mut text, report, "decoding", |row| &row.decode);
    }
    if report.n_prompt_tokens > 0 {
        side(&mut text, report, "prompts", |row| &row.prompt);
    }
    predictors(&mut text, report);
    if !report.ahead.is_empty() && n_decoded > 0 {
        ahead(&mut text, report);
    }
    text
}

/// Hit rates and bytes of decoding or of prompts.
fn side(text: &mut String, report: &Report, name: &str, of: impl Fn(&Row) -> &Side) {
    let _ = writeln!(text, "hits, % of the experts wanted ({name})");
    table(text, report, |row| {
        format!("{:.1}", of(row).hit_rate * 100.0)
    });
    let what = match report.unit {
        "bytes" => "read per token",
        _ => "experts read per token",
    };
    let _ = writeln!(text, "{what} ({name})");
    table(text, report, |row| {
        amount(report, of(row).bytes_read_per_token)
    });
}

/// A line per policy, a column per budget.
fn table(text: &mut String, report: &Report, cell: impl Fn(&Row) -> String) {
    let rows = report.results.iter();
    let cells = rows.map(|row| (row.policy.as_str(), row.share, cell(row)));
    by_budget(text, "policy", cells);
}

/// A line per name, a column per share of all experts; all names come with each share, in the same order.
fn by_budget<'a>(
    text: &mut String,
    title: &str,
    cells: impl Iterator<Item = (&'a str, f64, String)>,
) {
    let mut lines: Vec<Vec<String>> = vec![vec![title.to_owned()]];
    for (name, share, cell) in cells {
        let at = lines.iter().skip(1).position(|line| line[0] == name);
        let at = at.map_or(lines.len(), |at| at + 1);
        if at == lines.len() {
            lines.push(vec![name.to_owned()]);
        }
        if at == 1 {
            let share = format!("{:.2}", share * 100.0);
            let share = share.trim_end_matches('0').trim_end_matches('.');
            lines[0].push(format!("{share} %"));
        }
        lines[at].push(cell);
    }
    aligned(text, &lines);
}

/// What reading ahead covers, and what it costs.
fn ahead(text: &mut String, report: &Report) {
    let _ = writeln!(
        text,
        "reading up to {} experts ahead per layer beside {}: % of the misses that were on their way (and % more bytes \
         read)",
        report.read_ahead, report.ahead_policy
    );
    let cells = report.ahead.iter().map(|row| {
        let (covered, more) = (row.misses_covered * 100.0, row.more_bytes * 100.0);
        (
            row.predictor,
            row.share,
            format!("{covered:.1} (+{more:.0})"),
        )
    });
    by_budget(text, "predictor", cells);
}

fn predictors(text: &mut String, report: &Report) {
    text.push_str("predictions, % of the picks (and of whole sets) before the router has spoken\n");
    let mut lines = vec![vec![
        "predictor".to_owned(),
        "picks".to_owned(),
        "sets".to_owned(),
    ]];
    let percent = |share: f64| format!("{:.1}", share * 100.0);
    lines[0].extend((0..report.n_layers).map(|layer| format!("layer {layer}")));
    for row in &report.predictors {
        let mut line = vec![
            row.predictor.to_owned(),
            percent(row.overlap),
            percent(row.whole_sets),
        ];
        line.extend(row.layers.iter().map(|&overlap| percent(overlap)));
        lines.push(line);
    }
    for line in &mut lines {
        // A wide table says less than its mean.
        if report.n_layers > MOST_LAYERS {
            line.truncate(3);
        }
    }
    aligned(text, &lines);
}

/// Layers that are shown one by one.
const MOST_LAYERS: usize = 12;

fn amount(report: &Report, value: f64) -> String {
    match report.unit {
        "bytes" => bytes(value.round() as u64),
        _ => format!("{value:.2}"),
    }
}

/// The first column to the left, the others to the right, and an empty line.
fn aligned(text: &mut String, lines: &[Vec<String>]) {
    let n_columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..n_columns).map(width).collect();
    for line in lines {
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            let _ = match column {
                0 => write!(text, "{cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut text = String::new();
        let line = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        aligned(
            &mut text,
            &[line(["policy", "9 %"]), line(["lru", "100.0"])],
        );
        assert_eq!(text, "policy    9 %\nlru     100.0\n\n");
    }
}
