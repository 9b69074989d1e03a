//! Terminal pictures for `cadre run --experts`: text coloured by expert, the layer x expert strip, and their legends.
//!
//! Everything is a function from data to a `String`; nothing is printed. Without colours ([`ColourMode::Plain`]) the
//! same facts are told by superscript numbers behind the tokens.
//!
//! ```
//! use cadre_trace::ansi::{ColourMode, Painter};
//!
//! let painter = Painter::new(16, ColourMode::Plain);
//! assert_eq!(painter.paint(" upon", 12), " upon\u{b9}\u{b2}");
//! ```

use crate::colour::{self, Rgb};
use crate::profile::{DomainTop, Profile};
use crate::stats::{LayerStats, Stats};
use std::fmt::Write;

/// What the terminal can show. Choosing it (terminal or not, `NO_COLOR`, `COLORTERM`) is the caller's job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColourMode {
    /// No escape sequences.
    Plain,
    /// The 256-colour palette.
    Ansi256,
    /// 24-bit colours.
    TrueColour,
}

/// Heights of a strip cell from little to four times an even share; nothing at all is a dot.
const HEIGHTS: [char; 8] = [
    '\u{2581}', '\u{2582}', '\u{2583}', '\u{2584}', '\u{2585}', '\u{2586}', '\u{2587}', '\u{2588}',
];
const NOTHING: char = '\u{b7}';
const SWATCH: char = '\u{25a0}';
const RESET: &str = "\x1b[0m";
const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
/// Cells that a bar of the mixture may take.
const BAR_CELLS: usize = 20;

/// Paints text and pictures with one colour per expert.
#[derive(Debug, Clone)]
pub struct Painter {
    mode: ColourMode,
    /// The escape sequence that starts each expert's colour.
    starts: Vec<String>,
}

impl Painter {
    /// A painter for ids `0..n_experts`.
    pub fn new(n_experts: usize, mode: ColourMode) -> Self {
        let starts = match mode {
            ColourMode::Plain => vec![String::new(); n_experts],
            ColourMode::Ansi256 => colour::expert_xterm(n_experts)
                .iter()
                .map(|index| format!("\x1b[38;5;{index}m"))
                .collect(),
            ColourMode::TrueColour => {
                let start = |&Rgb(r, g, b): &Rgb| format!("\x1b[38;2;{r};{g};{b}m");
                colour::expert_colours(n_experts)
                    .iter()
                    .map(start)
                    .collect()
            }
        };
        Self { mode, starts }
    }

    /// The text in the colour of an expert; in plain mode, with the expert's number behind each of its lines.
    ///
    /// Colours never span a line break, and control characters other than line breaks and tabs are replaced, so
    /// generated text cannot steer the terminal. An expert out of range leaves the text unpainted.
    pub fn paint(&self, text: &str, expert: usize) -> String {
        let mut out = String::with_capacity(text.len() + 24);
        for line in text.split_inclusive('\n') {
            let words = line.trim_end();
            let space = &line[words.len()..];
            if words.trim_start().is_empty() || expert >= self.starts.len() {
                out.push_str(&harmless(line));
                continue;
            }
            match self.mode {
                ColourMode::Plain => {
                    out.push_str(&harmless(words));
                    out.push_str(&superscript(expert));
                }
                _ => {
                    let _ = write!(out, "{}{}{RESET}", self.starts[expert], harmless(words));
                }
            }
            out.push_str(&harmless(space));
        }
        out
    }

    /// The strip: one row per layer, one column per expert, height by share of the layer's picks.
    ///
    /// `max_width` is the width of the terminal; columns are joined (showing their mean) when they do not fit.
    /// `marked_layer` gets an arrow: the layer whose experts colour the text.
    pub fn strip(&self, stats: &Stats, max_width: usize, marked_layer: Option<usize>) -> String {
        let n_experts = stats.meta.n_experts;
        let room = max_width.saturating_sub(LABEL_WIDTH + 3).max(8);
        let joined = n_experts.div_ceil(room);
        let n_cells = n_experts.div_ceil(joined);
        let cell_width = if n_cells * 2 <= room { 2 } else { 1 };

        let mut out = self.dim(&format!("{:>LABEL_WIDTH$}", "layer"));
        let _ = writeln!(
            out,
            "{}",
            self.dim(&strip_header(n_cells, joined, cell_width))
        );
        for layer in &stats.layers {
            let _ = write!(out, "{:>LABEL_WIDTH$} ", layer.layer);
            for cell in 0..n_cells {
                let experts = cell * joined..((cell + 1) * joined).min(n_experts);
                let n = experts.len() as f64;
                let mean = experts
                    .clone()
                    .map(|e| stats.relative_share(layer, None, e))
                    .sum::<f64>()
                    / n;
                let glyph = glyph(mean);
                let text: String = std::iter::repeat_n(glyph, cell_width).collect();
                let cell = if glyph == NOTHING {
                    self.dim(&text)
                } else {
                    self.colour(&text, experts.start)
                };
                out.push_str(&cell);
            }
            let mark = if marked_layer == Some(layer.layer) {
                " \u{25c2}"
            } else {
                ""
            };
            let _ = writeln!(out, "{mark}");
        }
        let scale = "height: share of the layer's picks, full = 4x an even share or more";
        let note = if joined > 1 {
            format!("{scale}; {joined} experts per column")
        } else {
            scale.to_string()
        };
        let _ = writeln!(out, "{:LABEL_WIDTH$} {}", "", self.dim(&note));
        out
    }

    /// The experts of one layer with their colour and share, most used first, and the domain each belongs to when
    /// there is a profile; as many lines as it takes. Empty when the layer was not recorded.
    pub fn legend(
        &self,
        stats: &Stats,
        layer: usize,
        profile: Option<&Profile>,
        max_width: usize,
    ) -> String {
        let Some(recorded) = stats.layers.iter().find(|other| other.layer == layer) else {
            return String::new();
        };
        let entries = legend_entries(recorded, profile);
        let width = entries
            .iter()
            .map(|(_, text)| text.chars().count())
            .max()
            .unwrap_or(0)
            + 4;
        let per_line = (max_width / width).max(1);
        let mut out = String::new();
        for line in entries.chunks(per_line) {
            for (i, (expert, text)) in line.iter().enumerate() {
                let pad = if i + 1 == line.len() {
                    0
                } else {
                    width - 4 - text.chars().count() + 2
                };
                let _ = write!(
                    out,
                    "{} {text}{:pad$}",
                    self.colour(&SWATCH.to_string(), *expert),
                    ""
                );
            }
            out.push('\n');
        }
        out
    }

    /// One line per domain: the experts that tell it from the others, as `layer.expert` with how many times the
    /// usual share they get.
    pub fn top_experts(&self, tops: &[DomainTop], max_width: usize) -> String {
        let name_width = tops
            .iter()
            .map(|top| top.domain.chars().count())
            .max()
            .unwrap_or(0);
        let mut out = String::new();
        for top in tops {
            let _ = write!(
                out,
                "{}{:pad$}",
                self.bold(&harmless(&top.domain)),
                "",
                pad = name_width - top.domain.chars().count()
            );
            let mut used = name_width;
            for expert in &top.experts {
                let text = format!("{}.{} {:.1}x", expert.layer, expert.expert, expert.lift);
                used += text.chars().count() + 2;
                if used > max_width {
                    break;
                }
                let _ = write!(out, "  {}", self.colour(&text, expert.expert));
            }
            out.push('\n');
        }
        out
    }

    /// One bar per domain with its fraction ([`Profile::mixture`]), largest first.
    pub fn mixture(&self, domains: &[String], fractions: &[f64]) -> String {
        let name_width = domains
            .iter()
            .map(|name| name.chars().count())
            .max()
            .unwrap_or(0);
        let mut order: Vec<(&String, f64)> =
            domains.iter().zip(fractions.iter().copied()).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut out = String::new();
        for (name, fraction) in order {
            let n_cells = (fraction * BAR_CELLS as f64).round() as usize;
            let bar: String = std::iter::repeat_n(HEIGHTS[7], n_cells.min(BAR_CELLS)).collect();
            let pad = name_width - name.chars().count();
            let _ = writeln!(
                out,
                "{}{:pad$} {:>4.0} % {bar}",
                harmless(name),
                "",
                100.0 * fraction
            );
        }
        out
    }

    fn colour(&self, text: &str, expert: usize) -> String {
        match self.starts.get(expert) {
            Some(start) if self.mode != ColourMode::Plain => format!("{start}{text}{RESET}"),
            _ => text.to_string(),
        }
    }

    fn dim(&self, text: &str) -> String {
        self.styled(DIM, text)
    }

    fn bold(&self, text: &str) -> String {
        self.styled(BOLD, text)
    }

    fn styled(&self, start: &str, text: &str) -> String {
        if self.mode == ColourMode::Plain {
            text.to_string()
        } else {
            format!("{start}{text}{RESET}")
        }
    }
}

/// Width of the layer numbers.
const LABEL_WIDTH: usize = 5;

/// Expert numbers above the columns, as many as fit without touching.
fn strip_header(n_cells: usize, joined: usize, cell_width: usize) -> String {
    let mut header = " ".to_string();
    let mut cell = 0;
    while cell < n_cells {
        let label = (cell * joined).to_string();
        let taken = (label.len() + 1)
            .div_ceil(cell_width)
            .max(4 / cell_width)
            .next_multiple_of(2);
        let _ = write!(header, "{label:<width$}", width = taken * cell_width);
        cell += taken;
    }
    header.truncate(header.trim_end().len());
    header
}

fn glyph(relative_share: f64) -> char {
    if relative_share <= 0.0 {
        return NOTHING;
    }
    let step = (colour::intensity(relative_share) * HEIGHTS.len() as f64).ceil() as usize;
    HEIGHTS[step.clamp(1, HEIGHTS.len()) - 1]
}

fn legend_entries(layer: &LayerStats, profile: Option<&Profile>) -> Vec<(usize, String)> {
    let mut used: Vec<usize> = (0..layer.share.len())
        .filter(|&e| layer.load[e] > 0)
        .collect();
    used.sort_by_key(|&e| (std::cmp::Reverse(layer.load[e]), e));
    let entry = |e: usize| {
        let home =
            profile.and_then(|profile| Some(&profile.domains()[profile.home(layer.layer, e)?]));
        let home = home.map_or(String::new(), |name| format!(" {}", harmless(name)));
        (e, format!("{e} {:.0}%{home}", 100.0 * layer.share[e]))
    };
    used.into_iter().map(entry).collect()
}

/// The text with control characters replaced, except line breaks and tabs.
fn harmless(text: &str) -> String {
    let replace = |c: char| {
        if c.is_control() && c != '\n' && c != '\t' {
            '\u{fffd}'
        } else {
            c
        }
    };
    text.chars().filter(|&c| c != '\r').map(replace).collect()
}

fn superscript(number: usize) -> String {
    const DIGITS: [char; 10] = [
        '\u{2070}', '\u{b9}', '\u{b2}', '\u{b3}', '\u{2074}', '\u{2075}', '\u{2076}', '\u{2077}',
        '\u{2078}', '\u{2079}',
    ];
    number
        .to_string()
        .bytes()
        .map(|digit| DIGITS[usize::from(digit - b'0')])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::TraceMeta;
    use crate::stats::StatsOptions;
    use crate::synthetic::{self, Recipe};

    fn stats(n_experts: usize) -> Stats {
        let meta = TraceMeta {
            n_experts,
            top_k: 2,
            ..synthetic::meta()
        };
        synthetic::stats(
            &Recipe {
                meta,
                ..Recipe::default()
            },
            &StatsOptions::default(),
        )
    }

    #[test]
    fn plain_text_carries_expert_numbers() {
        let painter = Painter::new(16, ColourMode::Plain);
        assert_eq!(painter.paint("Once", 0), "Once\u{2070}");
        assert_eq!(
            painter.paint("a\nb ", 15),
            "a\u{b9}\u{2075}\nb\u{b9}\u{2075} "
        );
        assert_eq!(painter.paint(" \n", 3), " \n");
        assert_eq!(painter.paint("x", 16), "x");
    }

    #[test]
    fn colours_end_before_the_line_does() {
        for mode in [ColourMode::Ansi256, ColourMode::TrueColour] {
            let painted = Painter::new(16, mode).paint("one\ntwo", 3);
            for line in painted.lines() {
                assert!(
                    line.starts_with("\x1b[38;") && line.ends_with(RESET),
                    "{line:?}"
                );
            }
        }
    }

    #[test]
    fn generated_text_cannot_steer_the_terminal() {
        let painted = Painter::new(4, ColourMode::Plain).paint("\x1b[2Jx\u{9b}\x07\r\ty", 1);
        assert_eq!(painted, "\u{fffd}[2Jx\u{fffd}\u{fffd}\ty\u{b9}");
    }

    #[test]
    fn the_strip_has_a_row_per_layer_and_fits() {
        for (n_experts, max_width) in [
            (4, 80),
            (16, 80),
            (64, 80),
            (128, 80),
            (128, 40),
            (128, 200),
            (4, 0),
        ] {
            let strip = Painter::new(n_experts, ColourMode::Plain).strip(
                &stats(n_experts),
                max_width,
                Some(1),
            );
            let rows: Vec<&str> = strip.lines().collect();
            assert_eq!(rows.len(), 2 + 2);
            assert!(rows[2].ends_with('\u{25c2}'), "{strip}");
            for row in &rows[..3] {
                assert!(
                    row.chars().count() <= max_width.max(16),
                    "{n_experts} in {max_width}:\n{strip}"
                );
            }
        }
    }

    #[test]
    fn the_strip_shows_shares_as_heights() {
        let strip = Painter::new(4, ColourMode::Plain).strip(&stats(4), 80, None);
        let row = strip.lines().nth(1).unwrap();
        // The last synthetic expert is never picked.
        assert!(row.ends_with("\u{b7}\u{b7}"), "{row}");
        assert_eq!(
            (glyph(0.0), glyph(0.01), glyph(4.0), glyph(50.0)),
            ('\u{b7}', '\u{2581}', '\u{2588}', '\u{2588}')
        );
    }

    #[test]
    fn legends_name_experts_shares_and_domains() {
        let stats = stats(4);
        let painter = Painter::new(4, ColourMode::Plain);
        let profile = Profile::from_stats(&stats);
        let legend = painter.legend(&stats, 1, Some(&profile), 30);
        assert_eq!(legend.matches('%').count(), 3, "{legend}");
        assert!(
            legend.contains("prose") && legend.contains("code"),
            "{legend}"
        );
        assert!(
            legend.lines().all(|line| line.chars().count() <= 30),
            "{legend}"
        );
        assert_eq!(painter.legend(&stats, 9, None, 80), "");

        let tops = painter.top_experts(&stats.top_experts, 60);
        assert_eq!(tops.lines().count(), 2);
        assert!(
            tops.starts_with("prose  ") && tops.contains("\ncode   "),
            "{tops}"
        );
        assert!(
            tops.lines().all(|line| line.chars().count() <= 60),
            "{tops}"
        );
        let mixture = painter.mixture(&["a".into(), "bc".into()], &[0.25, 0.75]);
        assert_eq!(
            mixture.lines().next().unwrap(),
            format!("bc   75 % {}", "\u{2588}".repeat(15))
        );
    }

    #[test]
    fn plain_mode_never_escapes() {
        let (stats, painter) = (stats(16), Painter::new(16, ColourMode::Plain));
        let all = painter.strip(&stats, 80, None)
            + &painter.legend(&stats, 0, None, 80)
            + &painter.top_experts(&stats.top_experts, 80);
        assert!(!all.contains('\x1b'));
        let coloured = Painter::new(16, ColourMode::TrueColour).strip(&stats, 80, None);
        assert!(coloured.contains("\x1b[38;2;"));
    }
}
