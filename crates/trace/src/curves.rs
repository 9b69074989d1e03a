//! A page of curves over steps, one colour and dash per run, with tables: one file that loads nothing.
//!
//! It knows no training: whoever compares runs says what the charts and tables hold. The curves are drawn here, as SVG, so
//! the page is whole without a script; the script reads values at the pointer, hides runs and changes the theme.

use crate::colour::{self, Ground, Rgb};
use crate::html::{SHELL, STYLE, fill, inside_script};
use crate::picture::escape;
use serde::Serialize;
use std::fmt::Write;

const PAGE: &str = include_str!("html/curves.html");
const SCRIPT: &str = include_str!("html/curves.js");
/// Room around the plot: labels of the y axis, the right end, the top, labels of the x axis.
const LEFT: f64 = 52.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 24.0;
/// A second sign beside the colour.
const DASHES: [&str; 4] = ["none", "7 3", "2 3", "9 3 2 3"];

/// Everything on the page.
#[derive(Clone, Debug, Default)]
pub struct CurvePage {
    /// Heading.
    pub title: String,
    /// A sentence below it.
    pub about: String,
    /// Warnings, shown first.
    pub notes: Vec<String>,
    /// Names of the runs.
    pub series: Vec<String>,
    /// Tables, shown before the charts.
    pub tables: Vec<Table>,
    /// Charts; the first is as wide as the page.
    pub charts: Vec<Chart>,
    /// What the words on the page mean.
    pub footer: String,
}

/// One row per run.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Heading.
    pub title: String,
    /// Heads of the columns; the first is that of the run.
    pub columns: Vec<String>,
    /// Rows of cells, the name of the run first.
    pub rows: Vec<Vec<Cell>>,
}

/// A cell of a table.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    /// What stands in it.
    pub text: String,
    /// Whether it is the best of its column.
    pub best: bool,
}

/// Axes and lines.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// Heading.
    pub title: String,
    /// Whether the y axis starts at zero.
    pub from_zero: bool,
    /// At most one per run.
    pub lines: Vec<Line>,
}

/// The curve of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Line {
    /// Index of the run in [`CurvePage::series`].
    pub series: usize,
    /// Step and value, by step; values that are not finite are left out.
    pub points: Vec<(f64, f64)>,
    /// Whether each point is marked: measured at few steps.
    pub marked: bool,
}

#[derive(Serialize)]
struct PageData<'a> {
    series: &'a [String],
    charts: Vec<ChartData>,
}

#[derive(Serialize)]
struct ChartData {
    left: f64,
    width: f64,
    x: (f64, f64),
    lines: Vec<Line>,
}

/// The page as HTML; the same input gives the same bytes.
#[must_use]
pub fn page(page: &CurvePage) -> String {
    let charts: Vec<Drawn> = (0..)
        .zip(&page.charts)
        .map(|(i, chart)| Drawn::new(chart, i, &page.series))
        .collect();
    let data = PageData {
        series: &page.series,
        charts: charts.iter().map(|c| c.data()).collect(),
    };
    let json = serde_json::to_string(&data).expect("numbers and names serialise");
    let svgs: String = charts.iter().map(|c| c.card.as_str()).collect();
    let note = |note: &String| format!("<p class=\"note\" role=\"note\">{}</p>\n", escape(note));
    fill(
        PAGE,
        &[
            ("title", &escape(&page.title)),
            ("about", &escape(&page.about)),
            ("notes", &page.notes.iter().map(note).collect::<String>()),
            ("legend", &legend(&page.series)),
            ("tables", &page.tables.iter().map(table).collect::<String>()),
            ("charts", &svgs),
            ("footer", &escape(&page.footer)),
            ("colours", &colours(page.series.len())),
            ("data", &inside_script(&json)),
            ("style", STYLE),
            ("shell", SHELL),
            ("script", SCRIPT),
        ],
    )
}

fn colours(n: usize) -> String {
    let mut css = String::new();
    for (ground, theme) in [(Ground::Light, ""), (Ground::Dark, "[data-theme=\"dark\"]")] {
        let colours = colour::domain_colours(n, ground);
        let _ = write!(css, ":root{theme} {{");
        for (i, hex) in colours.into_iter().map(Rgb::hex).enumerate() {
            let _ = write!(css, " --s{i}: {hex};");
        }
        css.push_str(" }\n");
    }
    for i in 0..n {
        let dash = DASHES[i % DASHES.len()];
        let _ = writeln!(
            css,
            "path.s{i} {{ stroke: var(--s{i}); stroke-dasharray: {dash} }} circle.s{i} {{ fill: var(--s{i}) }} .b{i} {{ background: var(--s{i}) }}"
        );
    }
    css
}

fn legend(series: &[String]) -> String {
    let button = |(i, name): (usize, &String)| {
        format!(
            "<button type=\"button\" aria-pressed=\"true\"><svg viewBox=\"0 0 30 8\" aria-hidden=\"true\"><path class=\"s{i}\" d=\"M0 4H30\"/></svg>{}</button>",
            escape(name)
        )
    };
    series.iter().enumerate().map(button).collect()
}

fn table(table: &Table) -> String {
    let mut html = format!(
        "<section class=\"card\"><div class=\"bar\"><h2>{}</h2></div><div class=\"scroll\"><table><thead><tr>",
        escape(&table.title)
    );
    for column in &table.columns {
        let _ = write!(html, "<th scope=\"col\">{}</th>", escape(column));
    }
    html.push_str("</tr></thead><tbody>");
    for row in &table.rows {
        html.push_str("<tr>");
        for cell in row {
            let class = if cell.best { " class=\"best\"" } else { "" };
            let _ = write!(html, "<td{class}>{}</td>", escape(&cell.text));
        }
        html.push_str("</tr>");
    }
    html + "</tbody></table></div></section>\n"
}

/// A chart and the numbers that its script needs.
struct Drawn {
    card: String,
    width: f64,
    x: (f64, f64),
    lines: Vec<Line>,
}

impl Drawn {
    fn new(chart: &Chart, index: usize, series: &[String]) -> Self {
        let (width, height) = if index == 0 {
            (1140.0, 340.0)
        } else {
            (550.0, 230.0)
        };
        let finite = |line: &Line| Line {
            points: line
                .points
                .iter()
                .copied()
                .filter(|(x, y)| x.is_finite() && y.is_finite())
                .collect(),
            ..line.clone()
        };
        let lines: Vec<Line> = chart.lines.iter().map(finite).collect();
        let x = range(lines.iter().flat_map(|l| &l.points).map(|p| p.0), false);
        let y = range(
            lines.iter().flat_map(|l| &l.points).map(|p| p.1),
            chart.from_zero,
        );
        let plot = Plot {
            x,
            y,
            width: width - LEFT - RIGHT,
            height: height - TOP - BOTTOM,
        };
        let class = if index == 0 { "card wide" } else { "card" };
        let title = escape(&chart.title);
        let mut card = format!(
            "<section class=\"{class}\"><div class=\"bar\"><h2>{title}</h2></div><svg viewBox=\"0 0 {width} {height}\" role=\"img\" tabindex=\"0\" aria-label=\"{title}. {}\">",
            escape(&described(&lines, series))
        );
        plot.axes(&mut card);
        for line in &lines {
            plot.line(&mut card, line);
        }
        let _ = writeln!(
            card,
            "<line class=\"cross\" y1=\"{TOP}\" y2=\"{}\" x1=\"{LEFT}\" x2=\"{LEFT}\"/></svg></section>",
            TOP + plot.height
        );
        Self {
            card,
            width: plot.width,
            x,
            lines,
        }
    }

    fn data(&self) -> ChartData {
        ChartData {
            left: LEFT,
            width: self.width,
            x: self.x,
            lines: self.lines.clone(),
        }
    }
}

/// Where every line ends, for who cannot see it.
fn described(lines: &[Line], series: &[String]) -> String {
    let mut text = String::new();
    for line in lines {
        if let (Some((step, value)), Some(name)) = (line.points.last(), series.get(line.series)) {
            let _ = write!(text, "{name}: {} at step {step}. ", label(*value));
        }
    }
    text
}

/// Least and largest value, never equal.
fn range(values: impl Iterator<Item = f64>, from_zero: bool) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    let low = if from_zero { low.min(0.0) } else { low };
    if low > high {
        (0.0, 1.0)
    } else if low == high {
        (low, low + low.abs().max(1.0))
    } else {
        (low, high)
    }
}

struct Plot {
    x: (f64, f64),
    y: (f64, f64),
    width: f64,
    height: f64,
}

impl Plot {
    fn at_x(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * self.width
    }

    fn at_y(&self, y: f64) -> f64 {
        TOP + (self.y.1 - y) / (self.y.1 - self.y.0) * self.height
    }

    fn axes(&self, svg: &mut String) {
        let (right, bottom) = (LEFT + self.width, TOP + self.height);
        for y in ticks(self.y, (self.height / 45.0) as usize) {
            let at = self.at_y(y);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 7.0,
                at + 4.0,
                label(y)
            );
        }
        for x in ticks(self.x, (self.width / 90.0) as usize) {
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                self.at_x(x),
                bottom + 17.0,
                label(x)
            );
        }
        let _ = write!(
            svg,
            "<line class=\"frame\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>"
        );
    }

    fn line(&self, svg: &mut String, line: &Line) {
        let _ = write!(svg, "<path class=\"s{}\" d=\"", line.series);
        for (i, (x, y)) in line.points.iter().enumerate() {
            let command = if i == 0 { 'M' } else { 'L' };
            let _ = write!(svg, "{command}{:.1} {:.1}", self.at_x(*x), self.at_y(*y));
        }
        svg.push_str("\"/>");
        if line.marked || line.points.len() == 1 {
            for (x, y) in &line.points {
                let _ = write!(
                    svg,
                    "<circle class=\"s{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                    line.series,
                    self.at_x(*x),
                    self.at_y(*y)
                );
            }
        }
    }
}

/// Round values inside of the range, about `wanted` of them.
fn ticks((low, high): (f64, f64), wanted: usize) -> Vec<f64> {
    let rough = (high - low) / wanted.max(1) as f64;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * magnitude)
        .into_iter()
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    // Steps of a range that is tiny beside its values would not differ in f64.
    (first..=last.min(first.saturating_add(50)))
        .map(|i| i as f64 * step)
        .collect()
}

/// A number of about four digits.
fn label(x: f64) -> String {
    let trimmed = |text: String| {
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            text
        }
    };
    match x.abs() {
        a if a < 1e-12 => "0".to_owned(),
        a if a < 1e-3 => format!("{x:.1e}"),
        a if a < 1.0 => trimmed(format!("{x:.4}")),
        a if a < 100.0 => trimmed(format!("{x:.3}")),
        a if a < 1e4 => trimmed(format!("{x:.1}")),
        a if a < 1e6 => trimmed(format!("{:.1}", x / 1e3)) + "k",
        _ => trimmed(format!("{:.2}", x / 1e6)) + "M",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(name: &str) -> CurvePage {
        let line = |series, shift: f64| Line {
            series,
            points: (0..20)
                .map(|i| (f64::from(i) * 10.0, shift - f64::from(i)))
                .collect(),
            marked: series == 1,
        };
        CurvePage {
            title: "Runs".to_owned(),
            series: vec![name.to_owned(), "b".to_owned()],
            tables: vec![Table {
                title: "At the end".to_owned(),
                columns: vec!["run".to_owned(), "loss".to_owned()],
                rows: vec![vec![
                    Cell {
                        text: name.to_owned(),
                        best: false,
                    },
                    Cell {
                        text: "1.5".to_owned(),
                        best: true,
                    },
                ]],
            }],
            charts: vec![Chart {
                title: "Loss".to_owned(),
                from_zero: false,
                lines: vec![line(0, 30.0), line(1, 25.0)],
            }],
            ..CurvePage::default()
        }
    }

    #[test]
    fn the_page_is_whole_without_script_or_network() {
        let html = page(&example("a"));
        for outside in [
            "http:",
            "https:",
            " src=",
            "@import",
            "url(",
            "fetch(",
            "innerHTML",
        ] {
            assert!(!html.contains(outside), "{outside}");
        }
        assert!(html.contains("default-src 'none'") && html.contains("lang=\"en\""));
        // Both lines over the whole plot, their marks, a tick, the table, and words for who cannot see them.
        assert_eq!(html.matches("d=\"M52.0 ").count(), 2);
        assert_eq!(html.matches("<circle class=\"s1\"").count(), 20);
        assert!(html.contains(">100</text>") && html.contains("<td class=\"best\">1.5</td>"));
        assert!(html.contains("aria-label=\"Loss. a: 11 at step 190. b: 6 at step 190. \""));
        assert!(html.contains(":root[data-theme=\"dark\"] { --s0: #"));
    }

    #[test]
    fn hostile_names_stay_text() {
        let html = page(&example("</script><img onerror=x>{{data}}\"<!--"));
        assert!(!html.contains("<img") && !html.contains("<!--"));
        assert_eq!(html.matches("</script>").count(), 2);
    }

    #[test]
    fn empty_flat_and_broken_lines_draw() {
        let mut broken = example("a");
        broken.charts[0].lines[0].points = vec![(1.0, f64::NAN), (2.0, 3.0)];
        broken.charts[0].lines[1].points.clear();
        let html = page(&broken);
        assert!(!html.contains("NaN") && !html.contains("inf"));
        assert_eq!(html.matches("<circle class=\"s0\"").count(), 1);
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks((0.0, 100.0), 5), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(
            ticks((1.3, 2.1), 4),
            [1.4, 1.6, 1.8, 2.0].map(|x: f64| (x / 0.2).round() * 0.2)
        );
        assert!(ticks((1e9, 1e9 + 1e-7), 4).len() < 60);
        let labels = [0.0, 0.05, 3.0, 12.5, 2500.0, 40_000.0, 2.5e6, 3e-5].map(label);
        assert_eq!(
            labels,
            ["0", "0.05", "3", "12.5", "2500", "40k", "2.5M", "3.0e-5"]
        );
    }
}
