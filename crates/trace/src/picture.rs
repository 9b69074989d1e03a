//! The picture of the README: one small layer x expert heat map per domain, as deterministic SVG.
//!
//! Rows are layers, columns are experts, and a cell's colour is the share of that layer's picks (within the domain)
//! relative to an even share. The file needs no script and no font of its own, and its colours follow the reader's
//! light or dark setting.

use crate::colour::{self, Ground};
use crate::stats::{LayerStats, Stats};
use std::fmt::Write;

/// How the picture is laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SvgOptions {
    /// Line above the panels; empty for none.
    pub title: String,
    /// Panels per row; 0 lets the number of domains decide.
    pub panels_per_row: usize,
    /// Order of the experts within each layer.
    pub order: ExpertOrder,
    /// Light, dark, or whatever the reader uses.
    pub theme: Theme,
}

impl Default for SvgOptions {
    fn default() -> Self {
        Self {
            title: String::new(),
            panels_per_row: 0,
            order: ExpertOrder::Id,
            theme: Theme::Auto,
        }
    }
}

/// Order of the experts in a row of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertOrder {
    /// By id, as in the checkpoint.
    Id,
    /// Within each layer by the domain that uses the expert most, so that specialisation shows as blocks.
    HomeDomain,
}

/// Colours of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    /// Follows `prefers-color-scheme`.
    Auto,
    /// For light pages.
    Light,
    /// For dark pages.
    Dark,
}

/// Steps of the heat ramp; cells of one step share a CSS class, which keeps the file small.
const STEPS: usize = 24;
const MARGIN: usize = 16;
const GAP: usize = 26;
/// Room above a panel for its name, and left of it for layer numbers.
const HEAD: usize = 24;
const LEFT: usize = 20;
const LEGEND_HEIGHT: usize = 40;
/// Width that the cells of one panel should have together.
const PANEL_WIDTH: usize = 256;

/// One panel per domain; an SVG document that ends with a line break. The same statistics give the same bytes.
pub fn domain_svg(stats: &Stats, options: &SvgOptions) -> String {
    let layout = Layout::new(stats, options);
    let mut svg = String::new();
    let (width, height) = (layout.width, layout.height);
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{}">"#,
        escape(&description(stats))
    );
    svg.push_str(&style(options.theme));
    let _ = writeln!(
        svg,
        r#"<rect class="card" x="0.5" y="0.5" width="{}" height="{}" rx="10"/>"#,
        width - 1,
        height - 1
    );
    if !options.title.is_empty() {
        let _ = writeln!(
            svg,
            r#"<text class="title" x="{MARGIN}" y="{}">{}</text>"#,
            MARGIN + 14,
            escape(&options.title)
        );
    }
    let orders: Vec<Vec<usize>> = stats
        .layers
        .iter()
        .map(|layer| expert_order(stats, layer, options.order))
        .collect();
    for (d, domain) in stats.domains.iter().enumerate() {
        let (x, y) = layout.panel(d);
        let name = escape(&domain.name);
        let _ = writeln!(
            svg,
            r#"<text class="name" x="{}" y="{}">{name}</text>"#,
            x + LEFT,
            y + 14
        );
        panel(&mut svg, stats, d, &orders, &layout, (x, y));
    }
    legend(&mut svg, options, &layout);
    svg.push_str("</svg>\n");
    svg
}

/// Sizes and places, all in whole pixels.
struct Layout {
    cell_width: usize,
    cell_height: usize,
    per_row: usize,
    top: usize,
    panel_width: usize,
    panel_height: usize,
    width: usize,
    height: usize,
}

impl Layout {
    fn new(stats: &Stats, options: &SvgOptions) -> Self {
        let n_domains = stats.domains.len().max(1);
        let per_row = match options.panels_per_row {
            0 if n_domains <= 3 => n_domains,
            0 => n_domains.div_ceil(2).min(4),
            given => given.min(n_domains),
        };
        let cell_width = (PANEL_WIDTH / stats.meta.n_experts).clamp(2, 22);
        let cell_height = (160 / stats.layers.len().max(1))
            .clamp(3, 18)
            .min(cell_width.max(4) + 4);
        let panel_width = LEFT + cell_width * stats.meta.n_experts;
        let panel_height = HEAD + cell_height * stats.layers.len();
        let top = MARGIN + if options.title.is_empty() { 0 } else { 26 };
        let n_rows = n_domains.div_ceil(per_row);
        Self {
            cell_width,
            cell_height,
            per_row,
            top,
            panel_width,
            panel_height,
            // The legend needs this much even below a single small panel.
            width: (2 * MARGIN + per_row * panel_width + (per_row - 1) * GAP).max(340),
            height: top + n_rows * (panel_height + GAP) - GAP + LEGEND_HEIGHT + MARGIN,
        }
    }

    /// Top left corner of a domain's panel.
    fn panel(&self, domain: usize) -> (usize, usize) {
        let (row, column) = (domain / self.per_row, domain % self.per_row);
        (
            MARGIN + column * (self.panel_width + GAP),
            self.top + row * (self.panel_height + GAP),
        )
    }
}

fn panel(
    svg: &mut String,
    stats: &Stats,
    domain: usize,
    orders: &[Vec<usize>],
    layout: &Layout,
    (x, y): (usize, usize),
) {
    // Touching cells would show hairlines when scaled, so every cell leaves a pixel where there is room for it.
    let gap = usize::from(layout.cell_width >= 4);
    let (width, height) = (layout.cell_width - gap, layout.cell_height - gap);
    let every = stats.layers.len().div_ceil(8).max(1);
    for (row, (layer, order)) in stats.layers.iter().zip(orders).enumerate() {
        let top = y + HEAD + row * layout.cell_height;
        if row % every == 0 {
            let baseline = top + layout.cell_height.div_ceil(2) + 3;
            let _ = writeln!(
                svg,
                r#"<text class="axis" x="{}" y="{baseline}">{}</text>"#,
                x + LEFT - 6,
                layer.layer
            );
        }
        for (column, &expert) in order.iter().enumerate() {
            let step = step(stats.relative_share(layer, Some(domain), expert));
            let left = x + LEFT + column * layout.cell_width;
            let _ = writeln!(
                svg,
                r#"<rect class="h{step}" x="{left}" y="{top}" width="{width}" height="{height}"/>"#
            );
        }
    }
}

fn legend(svg: &mut String, options: &SvgOptions, layout: &Layout) {
    let y = layout.height - MARGIN - 14;
    let x = MARGIN + LEFT;
    for step in 0..=STEPS {
        let _ = writeln!(
            svg,
            r#"<rect class="h{step}" x="{}" y="{y}" width="5" height="8"/>"#,
            x + 5 * step
        );
    }
    for (relative, label) in [(0.0, "0"), (1.0, "1x"), (2.0, "2x"), (4.0, "4x")] {
        let at = x + 5 * step(relative) + 2;
        let _ = writeln!(
            svg,
            r#"<text class="tick" x="{at}" y="{}">{label}</text>"#,
            y + 19
        );
    }
    let order = match options.order {
        ExpertOrder::Id => "columns: experts by id",
        ExpertOrder::HomeDomain => "columns: experts, grouped by favourite domain",
    };
    let text = format!("times an even share. Rows: layers, {order}");
    let _ = writeln!(
        svg,
        r#"<text class="note" x="{}" y="{}">{text}</text>"#,
        x + 5 * STEPS + 16,
        y + 8
    );
}

fn step(relative_share: f64) -> usize {
    (colour::intensity(relative_share) * STEPS as f64).round() as usize
}

/// The experts of a layer in the order of the columns.
fn expert_order(stats: &Stats, layer: &LayerStats, order: ExpertOrder) -> Vec<usize> {
    let mut experts: Vec<usize> = (0..stats.meta.n_experts).collect();
    if order == ExpertOrder::Id {
        return experts;
    }
    let n_domains = stats.domains.len();
    let share = |d: usize, e: usize| stats.relative_share(layer, Some(d), e);
    let total = |e: usize| (0..n_domains).map(|d| share(d, e)).sum::<f64>();
    let key = |e: usize| {
        let home = (0..n_domains)
            .max_by(|&a, &b| share(a, e).total_cmp(&share(b, e)).then(b.cmp(&a)))
            .unwrap_or(0);
        // Experts that nobody picks go last.
        let (home, own) = if total(e) > 0.0 {
            (home, share(home, e) / total(e))
        } else {
            (n_domains, 0.0)
        };
        (home, own)
    };
    experts.sort_by(|&a, &b| {
        let (a_key, b_key) = (key(a), key(b));
        a_key
            .0
            .cmp(&b_key.0)
            .then(b_key.1.total_cmp(&a_key.1))
            .then(a.cmp(&b))
    });
    experts
}

fn description(stats: &Stats) -> String {
    let names: Vec<&str> = stats
        .domains
        .iter()
        .map(|domain| domain.name.as_str())
        .collect();
    format!(
        "Which of {} experts each of {} layers picks, one panel per domain: {}",
        stats.meta.n_experts,
        stats.layers.len(),
        names.join(", ")
    )
}

fn style(theme: Theme) -> String {
    let mut css = String::from(
        "text{font-family:ui-sans-serif,system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}\
         .title{font-size:15px;font-weight:600}.name{font-size:13px;font-weight:600}\
         .axis{font-size:9px;text-anchor:end}.tick{font-size:9px;text-anchor:middle}.note{font-size:10px}\n",
    );
    match theme {
        Theme::Light => css.push_str(&colours(Ground::Light)),
        Theme::Dark => css.push_str(&colours(Ground::Dark)),
        Theme::Auto => {
            css.push_str(&colours(Ground::Light));
            let _ = write!(
                css,
                "@media(prefers-color-scheme:dark){{\n{}}}\n",
                colours(Ground::Dark)
            );
        }
    }
    format!("<style>\n{css}</style>\n")
}

fn colours(ground: Ground) -> String {
    let (card, edge, strong, weak) = match ground {
        Ground::Light => ("#ffffff", "#e2e0ea", "#1d1b26", "#6c6878"),
        Ground::Dark => ("#15131d", "#2b2837", "#f0eef6", "#9a95a8"),
    };
    let mut css = format!(
        ".card{{fill:{card};stroke:{edge}}}.title,.name{{fill:{strong}}}.axis,.tick,.note{{fill:{weak}}}\n"
    );
    for step in 0..=STEPS {
        let _ = write!(
            css,
            ".h{step}{{fill:{}}}",
            colour::heat(step as f64 / STEPS as f64, ground).hex()
        );
    }
    css.push('\n');
    css
}

/// Text for element content and quoted attributes of XML and HTML; control characters, which XML forbids, are
/// replaced.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() || c == '\u{fffe}' || c == '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::TraceMeta;
    use crate::stats::StatsOptions;
    use crate::synthetic::{self, Recipe};

    fn stats(domains: &'static [&'static str]) -> Stats {
        synthetic::stats(
            &Recipe {
                domains,
                ..Recipe::default()
            },
            &StatsOptions::default(),
        )
    }

    #[test]
    fn there_is_one_cell_per_domain_layer_and_expert() {
        let stats = stats(&["prose", "code", "math"]);
        let svg = domain_svg(&stats, &SvgOptions::default());
        let n_cells = 3 * 2 * 4;
        assert_eq!(
            svg.matches(r#"<rect class="h"#).count(),
            n_cells + STEPS + 1
        );
        for name in ["prose", "code", "math"] {
            assert!(svg.contains(&format!(">{name}</text>")));
        }
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert_eq!(svg, domain_svg(&stats, &SvgOptions::default()));
    }

    #[test]
    fn hostile_names_stay_text() {
        let stats = stats(&["<script>alert('x')</script>", "a\"b&c\u{1}"]);
        let svg = domain_svg(
            &stats,
            &SvgOptions {
                title: "<b>".into(),
                ..SvgOptions::default()
            },
        );
        assert!(!svg.contains("<script") && !svg.contains("<b>") && !svg.contains('\u{1}'));
        assert!(svg.contains("a&quot;b&amp;c\u{fffd}"));
    }

    #[test]
    fn themes_choose_their_colours() {
        let stats = stats(&["prose"]);
        let svg = |theme| {
            domain_svg(
                &stats,
                &SvgOptions {
                    theme,
                    ..SvgOptions::default()
                },
            )
        };
        assert!(svg(Theme::Auto).contains("prefers-color-scheme"));
        assert!(!svg(Theme::Dark).contains("prefers-color-scheme"));
        assert!(svg(Theme::Dark).contains("#15131d") && !svg(Theme::Light).contains("#15131d"));
    }

    #[test]
    fn grouping_puts_experts_beside_those_of_their_domain() {
        let stats = stats(&["prose", "code"]);
        let layer = &stats.layers[1];
        let order = expert_order(&stats, layer, ExpertOrder::HomeDomain);
        let home = |e: &usize| layer.by_domain[1][*e] > layer.by_domain[0][*e];
        let homes: Vec<bool> = order[..3].iter().map(home).collect();
        assert!(homes.is_sorted(), "{order:?}");
        assert_eq!(order[3], 3, "the dead expert is last");
        assert_eq!(expert_order(&stats, layer, ExpertOrder::Id), [0, 1, 2, 3]);
    }

    #[test]
    fn any_shape_of_model_fits_its_own_picture() {
        for (n_experts, n_layers) in [(1, 1), (2, 94), (128, 48), (512, 3)] {
            let meta = TraceMeta {
                n_experts,
                n_layers,
                top_k: 1,
                ..synthetic::meta()
            };
            let recipe = Recipe {
                meta,
                tokens_per_domain: 3,
                ..Recipe::default()
            };
            let stats = synthetic::stats(&recipe, &StatsOptions::default());
            for panels_per_row in [0, 1, 9] {
                let options = SvgOptions {
                    panels_per_row,
                    ..SvgOptions::default()
                };
                let layout = Layout::new(&stats, &options);
                let (x, y) = layout.panel(1);
                assert!(x + layout.panel_width + MARGIN <= layout.width);
                assert!(y + layout.panel_height + LEGEND_HEIGHT <= layout.height);
                domain_svg(&stats, &options);
            }
        }
    }
}
