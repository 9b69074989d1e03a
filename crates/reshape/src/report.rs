//! The quality report of an applied plan: numbers, Markdown, and one HTML page that loads nothing.

use std::collections::BTreeMap;
use std::fmt::Write;

use cadre_checkpoint::{Checkpoint, model_sizes};
use cadre_routing::plan::Plan;
use serde::Serialize;

use crate::quality::{Overlap, Quality, Tally};

const STYLE: &str = include_str!("report.css");

/// A model before or after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Side {
    /// Its digest.
    pub digest: String,
    /// Experts, all layers together.
    pub experts: usize,
    /// Bytes of weights.
    pub bytes: u64,
    /// Bytes of weights that one token reads.
    pub active_bytes: u64,
    /// Mean nats per token.
    pub nll: f64,
    /// The exponential of it.
    pub perplexity: f64,
    /// Tokens a second when reading text in chunks, as it was on this machine while measuring.
    pub tokens_per_second: f64,
}

/// The same text before and after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Perplexity before.
    pub perplexity_before: f64,
    /// Perplexity after.
    pub perplexity_after: f64,
    /// The part of the perplexity before that was added.
    pub increase: f64,
    /// Mean `KL(before || after)` of the predictions, nats per token.
    pub kl: f64,
    /// The part of the tokens with the same best guess.
    pub agreement: f64,
}

/// How a layer's routing changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Decoder layer.
    pub layer: usize,
    /// Experts before and after.
    pub experts: [usize; 2],
    /// The part of the picks before whose experts are still there.
    pub kept: f64,
    /// The part of the picks before that are made after, for the same token.
    pub same: f64,
}

/// All of it; `-o json` and the JSON file are this.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// What made the plan.
    pub method: String,
    /// With which options.
    pub options: BTreeMap<String, String>,
    /// The model before.
    pub before: Side,
    /// The model after.
    pub after: Side,
    /// Over all text.
    pub total: Comparison,
    /// By domain.
    pub domains: BTreeMap<String, Comparison>,
    /// By layer with experts.
    pub layers: Vec<LayerReport>,
    /// What was to be kept to and was not, in words.
    pub missed: Vec<String>,
}

/// What must hold for the output to be kept.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Limits {
    /// Most nats per token of mean divergence.
    pub kl: Option<f64>,
    /// Most part of the perplexity before that may be added, over all text and in every domain.
    pub increase: Option<f64>,
}

impl Report {
    /// Puts together what was measured of `before` and `after`.
    #[must_use]
    pub fn new(
        plan: &Plan,
        [before, after]: [&Checkpoint; 2],
        quality: &Quality,
        limits: Limits,
    ) -> Self {
        let total = comparison(&quality.total);
        let sides = [(before, 0), (after, 1)].map(|(checkpoint, at)| Side {
            digest: checkpoint.digest().to_owned(),
            experts: checkpoint.config().moe.n_experts_in_all(),
            bytes: checkpoint.data_bytes(),
            active_bytes: model_sizes(checkpoint).bytes.read_per_token,
            nll: quality.total.perplexity()[at].ln(),
            perplexity: quality.total.perplexity()[at],
            tokens_per_second: quality.tokens_read as f64 / quality.seconds[at].max(1e-9),
        });
        let [before, after] = sides;
        let domains = quality.domains.iter();
        let domains = domains.map(|(name, tally)| (name.clone(), comparison(tally)));
        let mut report = Self {
            method: plan.method.clone(),
            options: plan.options.clone(),
            before,
            after,
            total,
            domains: domains.collect(),
            layers: layers(plan, &quality.layers),
            missed: Vec::new(),
        };
        report.missed = report.check(limits);
        report
    }

    /// What exceeds `limits`.
    fn check(&self, limits: Limits) -> Vec<String> {
        let mut missed = Vec::new();
        if let Some(most) = limits.kl
            && exceeds(self.total.kl, most)
        {
            missed.push(format!(
                "the divergence is {:.4} nats per token, more than {most}",
                self.total.kl
            ));
        }
        let parts = self.domains.iter().map(|(name, one)| (name.as_str(), one));
        for (name, one) in [("all text", &self.total)].into_iter().chain(parts) {
            if let Some(most) = limits.increase
                && exceeds(one.increase, most)
            {
                missed.push(format!(
                    "the perplexity of {name} rises by {:.1} %, more than {:.1} %",
                    100.0 * one.increase,
                    100.0 * most
                ));
            }
        }
        missed
    }

    /// For people who read text.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = format!("# What {} cost\n\n", self.method);
        for line in &self.missed {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "**Missed:** {line}.\n");
        }
        let _ = writeln!(text, "| | before | after | |\n|---|---|---|---|");
        for [name, before, after, change] in self.rows() {
            let _ = writeln!(text, "| {name} | {before} | {after} | {change} |");
        }
        let _ = writeln!(
            text,
            "\n| text | tokens | perplexity before | after | change | KL, nats per token | same best guess |\n|---|---|---|---|---|---|---|"
        );
        for (name, one) in self.texts() {
            let _ = writeln!(
                text,
                "| {} | {} | {:.3} | {:.3} | {:+.1} % | {:.4} | {:.1} % |",
                name.replace('|', "\\|"),
                one.tokens,
                one.perplexity_before,
                one.perplexity_after,
                100.0 * one.increase,
                one.kl,
                100.0 * one.agreement
            );
        }
        let _ = writeln!(
            text,
            "\n| layer | experts before | after | picks of experts that are kept | picks made again |\n|---|---|---|---|---|"
        );
        for layer in &self.layers {
            let [before, after] = layer.experts;
            let _ = writeln!(
                text,
                "| {} | {before} | {after} | {:.1} % | {:.1} % |",
                layer.layer,
                100.0 * layer.kept,
                100.0 * layer.same
            );
        }
        if !self.options.is_empty() {
            let options = self.options.iter();
            let options: Vec<String> = options.map(|(k, v)| format!("{k} {v}")).collect();
            let _ = writeln!(text, "\nPlan: {}, {}.", self.method, options.join(", "));
        }
        let _ = writeln!(
            text,
            "Speed is that of reading text in chunks while measuring, both models in turns."
        );
        text
    }

    /// Size and speed: name, before, after, change.
    fn rows(&self) -> Vec<[String; 4]> {
        let (a, b) = (&self.before, &self.after);
        let change = |a: f64, b: f64| format!("{:+.1} %", 100.0 * (b / a.max(1e-300) - 1.0));
        let mib = |n: u64| format!("{:.2} MiB", n as f64 / f64::from(1 << 20));
        let row = |name: &str, show: [String; 2], [x, y]: [f64; 2]| {
            let [before, after] = show;
            [name.to_owned(), before, after, change(x, y)]
        };
        let bytes = |name, x: u64, y: u64| row(name, [mib(x), mib(y)], [x as f64, y as f64]);
        let number = |name, x: f64, y: f64, digits: usize| {
            row(name, [x, y].map(|v| format!("{v:.digits$}")), [x, y])
        };
        vec![
            number("experts", a.experts as f64, b.experts as f64, 0),
            bytes("weights", a.bytes, b.bytes),
            bytes("read per token", a.active_bytes, b.active_bytes),
            number("perplexity", a.perplexity, b.perplexity, 3),
            number("tokens/s", a.tokens_per_second, b.tokens_per_second, 1),
        ]
    }

    /// All text, then every domain.
    fn texts(&self) -> Vec<(&str, &Comparison)> {
        let domains = self.domains.iter().map(|(name, one)| (name.as_str(), one));
        [("all", &self.total)].into_iter().chain(domains).collect()
    }

    /// For people who look: one page with its style in it.
    #[must_use]
    pub fn html(&self) -> String {
        let title = escape(&format!("What {} cost", self.method));
        let mut body = format!("<h1>{title}</h1>\n");
        for line in &self.missed {
            let _ = writeln!(body, "<p class=\"missed\">Missed: {}.</p>", escape(line));
        }
        body += "<table><tr><th></th><th>before</th><th>after</th><th></th></tr>\n";
        for row in self.rows() {
            let cells: String = row
                .iter()
                .map(|cell| format!("<td>{}</td>", escape(cell)))
                .collect();
            let _ = writeln!(body, "<tr>{cells}</tr>");
        }
        body += "</table>\n<h2>Perplexity by text</h2>\n";
        let bars = self.texts().into_iter().map(|(name, one)| {
            let label = format!(
                "{:.2} to {:.2} ({:+.1} %), KL {:.4}, same best guess {:.1} %",
                one.perplexity_before,
                one.perplexity_after,
                100.0 * one.increase,
                one.kl,
                100.0 * one.agreement
            );
            (
                name.to_owned(),
                [one.perplexity_before, one.perplexity_after],
                label,
            )
        });
        body += &bar_chart(&bars.collect::<Vec<_>>(), ["before", "after"]);
        body += "<h2>Routing by layer</h2>\n";
        let bars = self.layers.iter().map(|layer| {
            let [before, after] = layer.experts;
            let label = format!(
                "{after} of {before} experts; {:.1} % of the picks are of kept ones, {:.1} % are made again",
                100.0 * layer.kept,
                100.0 * layer.same
            );
            (layer.layer.to_string(), [layer.kept, layer.same], label)
        });
        body += &bar_chart(&bars.collect::<Vec<_>>(), ["of kept experts", "made again"]);
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
             <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
             <style>{STYLE}</style></head><body>\n{body}</body></html>\n"
        )
    }
}

/// What is not a number exceeds everything.
fn exceeds(value: f64, most: f64) -> bool {
    value.is_nan() || value > most
}

/// Two bars for every row, as inline SVG, with a label behind them.
fn bar_chart(rows: &[(String, [f64; 2], String)], names: [&str; 2]) -> String {
    const WIDTH: f64 = 300.0;
    let values = rows.iter().flat_map(|(_, values, _)| values);
    let most = values
        .copied()
        .filter(|v| v.is_finite())
        .fold(1e-9, f64::max);
    let mut text = format!(
        "<p><span class=\"a\">&#9632;</span> {} <span class=\"b\">&#9632;</span> {}</p>\n<table>\n",
        names[0], names[1]
    );
    for (name, [a, b], label) in rows {
        let width = |value: f64| WIDTH * (value / most).clamp(0.0, 1.0);
        let _ = writeln!(
            text,
            "<tr><td>{}</td><td><svg width=\"{WIDTH}\" height=\"20\" role=\"img\" aria-label=\"{label}\">\
             <rect class=\"a\" y=\"1\" height=\"8\" width=\"{:.1}\"/>\
             <rect class=\"b\" y=\"11\" height=\"8\" width=\"{:.1}\"/></svg></td><td>{label}</td></tr>",
            escape(name),
            width(*a),
            width(*b),
        );
    }
    text + "</table>\n"
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            c => escaped.push(c),
        }
    }
    escaped
}

fn comparison(tally: &Tally) -> Comparison {
    let [perplexity_before, perplexity_after] = tally.perplexity();
    Comparison {
        tokens: tally.tokens,
        perplexity_before,
        perplexity_after,
        increase: tally.increase(),
        kl: tally.mean_kl(),
        agreement: tally.agreement(),
    }
}

fn layers(plan: &Plan, overlaps: &BTreeMap<usize, Overlap>) -> Vec<LayerReport> {
    let of = |layer: &cadre_routing::plan::PlanLayer| {
        let overlap = overlaps.get(&layer.layer).copied().unwrap_or_default();
        let part = |n: u64| n as f64 / overlap.picks.max(1) as f64;
        LayerReport {
            layer: layer.layer,
            experts: [layer.of, layer.experts.len()],
            kept: part(overlap.kept),
            same: part(overlap.same),
        }
    };
    plan.layers.iter().map(of).collect()
}
