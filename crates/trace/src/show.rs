//! The text report of `trace show`: aligned tables, with or without colours.

use crate::colour;
use crate::stats::{LayerStats, Stats};
use std::fmt::Write;

/// How the report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextOptions {
    /// Mark unusual numbers with colours and headings with bold.
    pub colour: bool,
    /// Width of the terminal, for the lists; tables do not wrap.
    pub max_width: usize,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self {
            colour: false,
            max_width: 100,
        }
    }
}

const RESET: &str = "\x1b[0m";
const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const RED: &str = "\x1b[31m";
const YELLOW: &str = "\x1b[33m";
/// Load entropy under which a layer is marked, and under which it is marked red.
const ENTROPY_WARN: (f64, f64) = (0.60, 0.40);
/// MaxVio above which a layer is marked, and above which it is marked red (three and five times the mean load).
const MAX_VIO_WARN: (f64, f64) = (2.0, 4.0);

/// The whole report; ends with a line break.
pub fn text(stats: &Stats, options: &TextOptions) -> String {
    let mut report = Report {
        out: String::new(),
        options: *options,
    };
    report.head(stats);
    report.layers(stats);
    report.lists(stats);
    report.domains(stats);
    report.cache(stats);
    for note in &stats.notes {
        let note = format!("note: {note}");
        report.line(YELLOW, &note);
    }
    report.out
}

struct Report {
    out: String,
    options: TextOptions,
}

impl Report {
    fn head(&mut self, stats: &Stats) {
        let meta = &stats.meta;
        self.line(
            BOLD,
            &format!(
                "{}: {} layers x {} experts, top-{}",
                harmless(&meta.architecture),
                meta.n_layers,
                meta.n_experts,
                meta.top_k
            ),
        );
        let names: Vec<String> = stats
            .domains
            .iter()
            .map(|d| format!("{} {}", harmless(&d.name), grouped(d.n_tokens)))
            .collect();
        let (tokens, sequences) = (grouped(stats.n_tokens), grouped(stats.n_sequences));
        self.line("", &format!("model  {}", harmless(&meta.digest)));
        if let Some(lossy) = &meta.lossy {
            self.line("", &format!("lossy  {}", harmless(lossy)));
        }
        self.line(
            "",
            &format!(
                "tokens {tokens} in {sequences} sequences: {}",
                names.join(", ")
            ),
        );
    }

    fn layers(&mut self, stats: &Stats) {
        self.heading("Layers");
        let header = [
            "layer", "load", "CV", "MaxVio", "entropy", "router", "dead", "cold", "hot", "reuse",
            "(chance)", "JSD", "MI bits",
        ];
        let mut table = Table::new(&header);
        for layer in &stats.layers {
            table.row(&layer_cells(layer));
        }
        table.left(1);
        let rows = table.lines();
        let (head, body) = rows.split_first().expect("a table has a header");
        self.line(DIM, head);
        for (row, layer) in body.iter().zip(&stats.layers) {
            self.line(severity(layer), row);
        }
        self.line(
            DIM,
            "entropy: of the load, 1 = even; router: mean per token, 1 = undecided; reuse: picks repeated from the \
             token before;\nJSD: how different the domains are routed, 0 to 1; MI: bits a pick tells about the domain",
        );
    }

    /// Hot, dead and cold experts per layer; layers without any are left out.
    fn lists(&mut self, stats: &Stats) {
        let share = |layer: &LayerStats, e: usize| {
            format!("{e} ({:.1}x)", stats.relative_share(layer, None, e))
        };
        let hot = |layer: &LayerStats| {
            layer
                .hot
                .iter()
                .map(|&e| share(layer, e))
                .collect::<Vec<String>>()
        };
        let ids = |list: &[usize]| list.iter().map(usize::to_string).collect::<Vec<String>>();
        self.list("Hot experts (times an even share)", stats, &hot);
        self.list("Dead experts (hardly ever picked)", stats, &|layer| {
            ids(&layer.dead)
        });
        self.list("Cold experts (rarely picked)", stats, &|layer| {
            ids(&layer.cold)
        });
    }

    fn list(&mut self, title: &str, stats: &Stats, entries: &dyn Fn(&LayerStats) -> Vec<String>) {
        let layers: Vec<(usize, Vec<String>)> = stats
            .layers
            .iter()
            .map(|layer| (layer.layer, entries(layer)))
            .collect();
        if layers.iter().all(|(_, list)| list.is_empty()) {
            return;
        }
        self.heading(title);
        for (layer, list) in layers.iter().filter(|(_, list)| !list.is_empty()) {
            let line = shortened(list, self.options.max_width.saturating_sub(7));
            self.line("", &format!("{layer:>5}  {line}"));
        }
    }

    fn domains(&mut self, stats: &Stats) {
        if stats.top_experts.is_empty() {
            return;
        }
        self.heading(if stats.domains.len() > 1 {
            "Experts that tell the domains apart (layer.expert, times the mean over domains)"
        } else {
            "Most used experts (layer.expert, times an even share)"
        });
        let width = stats
            .top_experts
            .iter()
            .map(|top| harmless(&top.domain).chars().count())
            .max()
            .unwrap_or(0);
        for top in &stats.top_experts {
            let name = harmless(&top.domain);
            let list: Vec<String> = top
                .experts
                .iter()
                .map(|e| format!("{}.{} {:.1}x", e.layer, e.expert, e.lift))
                .collect();
            let pad = width - name.chars().count();
            let line = shortened(&list, self.options.max_width.saturating_sub(width + 2));
            self.line("", &format!("{name}{:pad$}  {line}", ""));
        }
    }

    fn cache(&mut self, stats: &Stats) {
        if stats.cache.is_empty() {
            return;
        }
        self.heading(
            "If that many experts per layer were cached, this part of the picks would hit",
        );
        let mut table = Table::new(&["experts", "of all", "LRU", "optimal", ""]);
        for point in &stats.cache {
            table.row(&[
                point.capacity.to_string(),
                format!(
                    "{:.0} %",
                    100.0 * point.capacity as f64 / stats.meta.n_experts as f64
                ),
                format!("{:.1} %", 100.0 * point.lru_rate),
                format!("{:.1} %", 100.0 * point.belady_rate),
                bar(point.lru_rate, point.belady_rate),
            ]);
        }
        table.left(4);
        for line in table.lines() {
            self.line("", &line);
        }
    }

    fn heading(&mut self, title: &str) {
        self.out.push('\n');
        self.line(BOLD, title);
    }

    fn line(&mut self, style: &str, line: &str) {
        let line = line.trim_end();
        let _ = if self.options.colour && !style.is_empty() {
            writeln!(self.out, "{style}{line}{RESET}")
        } else {
            writeln!(self.out, "{line}")
        };
    }
}

fn layer_cells(layer: &LayerStats) -> Vec<String> {
    let or_dash = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.3}"));
    let percent = |value: f64| format!("{:.0} %", 100.0 * value);
    vec![
        layer.layer.to_string(),
        sparkline(&layer.share),
        format!("{:.2}", layer.cv),
        format!("{:.2}", layer.max_vio),
        format!("{:.3}", layer.load_entropy),
        or_dash(layer.token_entropy),
        layer.dead.len().to_string(),
        layer.cold.len().to_string(),
        layer.hot.len().to_string(),
        layer.reuse.map_or("-".to_string(), percent),
        percent(layer.reuse_by_chance),
        or_dash(layer.specialisation.map(|s| s.js_divergence)),
        or_dash(layer.specialisation.map(|s| s.mutual_information)),
    ]
}

fn severity(layer: &LayerStats) -> &'static str {
    let beyond =
        |entropy: f64, max_vio: f64| layer.load_entropy < entropy || layer.max_vio > max_vio;
    if beyond(ENTROPY_WARN.1, MAX_VIO_WARN.1) {
        RED
    } else if beyond(ENTROPY_WARN.0, MAX_VIO_WARN.0) || !layer.dead.is_empty() {
        YELLOW
    } else {
        ""
    }
}

/// The load by expert id in at most 16 characters; more experts share a character, which shows their mean.
fn sparkline(share: &[f64]) -> String {
    const HEIGHTS: [char; 8] = [
        '\u{2581}', '\u{2582}', '\u{2583}', '\u{2584}', '\u{2585}', '\u{2586}', '\u{2587}',
        '\u{2588}',
    ];
    let glyph = |cell: &[f64]| {
        let relative = cell.iter().sum::<f64>() / cell.len() as f64 * share.len() as f64;
        if relative <= 0.0 {
            return '\u{b7}';
        }
        let step = (colour::intensity(relative) * HEIGHTS.len() as f64).ceil() as usize;
        HEIGHTS[step.clamp(1, HEIGHTS.len()) - 1]
    };
    share
        .chunks(share.len().div_ceil(16).max(1))
        .map(glyph)
        .collect()
}

/// A bar of 40 cells: full up to the first fraction, shaded up to the second.
fn bar(full: f64, shaded: f64) -> String {
    let cells = |fraction: f64| (40.0 * fraction).round() as usize;
    let (full, shaded) = (cells(full), cells(shaded));
    "\u{2588}".repeat(full) + &"\u{2591}".repeat(shaded.saturating_sub(full))
}

/// The entries in one line, cut with a count of what was left out.
fn shortened(entries: &[String], max_width: usize) -> String {
    let mut line = String::new();
    for (i, entry) in entries.iter().enumerate() {
        let rest = format!("  and {} more", entries.len() - i);
        let needed = line.chars().count() + 2 + entry.chars().count();
        let is_last = i + 1 == entries.len();
        if i > 0 && needed + if is_last { 0 } else { rest.len() } > max_width {
            return line + &rest;
        }
        if i > 0 {
            line.push_str("  ");
        }
        line.push_str(entry);
    }
    line
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Names come from files: control characters are replaced, so that they cannot steer the terminal.
fn harmless(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// Rows of cells with the columns aligned: numbers to the right, chosen columns to the left.
struct Table {
    rows: Vec<Vec<String>>,
    left: Vec<usize>,
}

impl Table {
    fn new(header: &[&str]) -> Self {
        Self {
            rows: vec![header.iter().map(ToString::to_string).collect()],
            left: Vec::new(),
        }
    }

    fn row(&mut self, cells: &[String]) {
        self.rows.push(cells.to_vec());
    }

    fn left(&mut self, column: usize) {
        self.left.push(column);
    }

    fn lines(&self) -> Vec<String> {
        let n_columns = self.rows[0].len();
        let width_of = |column: usize| {
            self.rows
                .iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..n_columns).map(width_of).collect();
        let line = |row: &Vec<String>| {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                let _ = if self.left.contains(&column) {
                    write!(line, "{cell:<width$}  ")
                } else {
                    write!(line, "{cell:>width$}  ")
                };
            }
            line.trim_end().to_string()
        };
        self.rows.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Columns;
    use crate::stats::StatsOptions;
    use crate::synthetic::{self, Recipe};

    fn stats(domains: &'static [&'static str]) -> Stats {
        let columns = Columns {
            logits: true,
            norms: false,
        };
        synthetic::stats(
            &Recipe {
                domains,
                columns,
                ..Recipe::default()
            },
            &StatsOptions::default(),
        )
    }

    #[test]
    fn the_report_has_every_section() {
        let report = text(&stats(&["prose", "code"]), &TextOptions::default());
        for part in [
            "qwen3_moe: 2 layers x 4 experts, top-2",
            "sha256:feed",
            "tokens 80 in 2 sequences: prose 40, code 40",
        ] {
            assert!(report.contains(part), "{part} is not in\n{report}");
        }
        for part in [
            "Layers",
            "Dead experts",
            "tell the domains apart",
            "cached",
            "note: only 40.0 picks",
        ] {
            assert!(report.contains(part), "{part} is not in\n{report}");
        }
        assert!(!report.contains('\x1b') && report.ends_with('\n'));
        assert!(report.lines().all(|line| line == line.trim_end()));
    }

    #[test]
    fn colours_are_optional_and_closed() {
        let report = text(
            &stats(&["prose"]),
            &TextOptions {
                colour: true,
                ..TextOptions::default()
            },
        );
        assert!(report.contains("Most used experts"));
        assert_eq!(
            report.matches(BOLD).count() + report.matches(DIM).count(),
            {
                let others = report.matches(RED).count() + report.matches(YELLOW).count();
                report.matches(RESET).count() - others
            }
        );
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        let report = text(&stats(&["a\x1b[31m", "b\n"]), &TextOptions::default());
        assert!(!report.contains('\x1b') && report.contains("b\u{fffd}"));
    }

    #[test]
    fn tables_align_by_characters() {
        let mut table = Table::new(&["n", "name"]);
        table.row(&["10".into(), "\u{2581}\u{2582}".into()]);
        table.left(1);
        assert_eq!(table.lines(), [" n  name", "10  \u{2581}\u{2582}"]);
    }

    #[test]
    fn long_lists_are_cut_and_say_so() {
        let list: Vec<String> = (10..20).map(|n: usize| n.to_string()).collect();
        assert_eq!(
            shortened(&list, 100),
            "10  11  12  13  14  15  16  17  18  19"
        );
        let cut = shortened(&list, 25);
        assert_eq!(cut, "10  11  12  and 7 more");
        assert_eq!(shortened(&[], 10), "");
    }

    #[test]
    fn numbers_bars_and_sparklines() {
        assert_eq!(
            [grouped(0), grouped(999), grouped(1_234_567)],
            ["0", "999", "1,234,567"]
        );
        assert_eq!(bar(0.05, 0.1), "\u{2588}\u{2588}\u{2591}\u{2591}");
        assert_eq!(sparkline(&[0.0, 1.0]), "\u{b7}\u{2585}");
        assert_eq!(sparkline(&[0.01; 100]).chars().count(), 15);
    }

    #[test]
    fn the_json_form_has_the_documented_keys() {
        let json = serde_json::to_value(stats(&["prose", "code"])).unwrap();
        for key in [
            "meta",
            "n_tokens",
            "n_sequences",
            "domains",
            "layers",
            "top_experts",
            "cache",
            "notes",
        ] {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert_eq!(json["layers"][1]["load"].as_array().unwrap().len(), 4);
        assert_eq!(json["meta"]["n_experts"], 4);
    }
}
