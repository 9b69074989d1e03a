//! The HTML page of `trace show --html`: one file that holds its data, style and script, and loads nothing.
//!
//! The page is `html/page.html` with `html/page.js` put in, and what all pages share (`html/style.css`, `html/shell.js`);
//! this file only fills in the numbers. Names from the trace
//! reach the page as JSON text, which the script shows through `textContent`; a content security policy forbids any
//! request.

use crate::colour::{self, Ground};
use crate::meta::TraceMeta;
use crate::picture::escape;
use crate::profile::DomainTop;
use crate::stats::{CacheHits, Domain, LayerStats, Specialisation, Stats};
use serde::Serialize;

const PAGE: &str = include_str!("html/page.html");
const SCRIPT: &str = include_str!("html/page.js");
/// Style of all pages.
pub(crate) const STYLE: &str = include_str!("html/style.css");
/// Script that all pages begin with.
pub(crate) const SHELL: &str = include_str!("html/shell.js");
/// Steps of the heat ramps that the page gets.
const STEPS: usize = 64;

/// The numbers of the page; what [`Stats`] has, without what the page does not show.
#[derive(Serialize)]
struct PageData<'a> {
    meta: &'a TraceMeta,
    n_tokens: u64,
    n_sequences: u64,
    domains: &'a [Domain],
    layers: Vec<PageLayer<'a>>,
    top_experts: &'a [DomainTop],
    cache: &'a [CacheHits],
    notes: &'a [String],
    heat_light: Vec<String>,
    heat_dark: Vec<String>,
    /// Ramp steps of the legend's gradient, even in share from none to four times an even share.
    ramp_stops: Vec<usize>,
    domains_light: Vec<String>,
    domains_dark: Vec<String>,
}

#[derive(Serialize)]
struct PageLayer<'a> {
    layer: usize,
    n_tokens: u64,
    load: &'a [u64],
    by_domain: &'a [Vec<u64>],
    cv: f64,
    max_vio: f64,
    load_entropy: f64,
    token_entropy: Option<f64>,
    dead: &'a [usize],
    cold: &'a [usize],
    hot: &'a [usize],
    reuse: Option<f64>,
    reuse_by_chance: f64,
    specialisation: Option<Specialisation>,
}

/// The whole page, with `title` as its heading. The same statistics give the same bytes.
pub fn page(stats: &Stats, title: &str) -> String {
    let heat = |ground| {
        (0..=STEPS)
            .map(|step| colour::heat(step as f64 / STEPS as f64, ground).hex())
            .collect()
    };
    let domains = |ground| {
        colour::domain_colours(stats.domains.len(), ground)
            .into_iter()
            .map(colour::Rgb::hex)
            .collect()
    };
    let data = PageData {
        meta: &stats.meta,
        n_tokens: stats.n_tokens,
        n_sequences: stats.n_sequences,
        domains: &stats.domains,
        layers: stats.layers.iter().map(page_layer).collect(),
        top_experts: &stats.top_experts,
        cache: &stats.cache,
        notes: &stats.notes,
        heat_light: heat(Ground::Light),
        heat_dark: heat(Ground::Dark),
        ramp_stops: (0..=16)
            .map(|i| (colour::intensity(f64::from(i) / 4.0) * STEPS as f64).round() as usize)
            .collect(),
        domains_light: domains(Ground::Light),
        domains_dark: domains(Ground::Dark),
    };
    let json = serde_json::to_string(&data).expect("numbers and names serialise");
    fill(
        PAGE,
        &[
            ("title", &escape(title)),
            ("data", &inside_script(&json)),
            ("style", STYLE),
            ("shell", SHELL),
            ("script", SCRIPT),
        ],
    )
}

fn page_layer(layer: &LayerStats) -> PageLayer<'_> {
    PageLayer {
        layer: layer.layer,
        n_tokens: layer.n_tokens,
        load: &layer.load,
        by_domain: &layer.by_domain,
        cv: layer.cv,
        max_vio: layer.max_vio,
        load_entropy: layer.load_entropy,
        token_entropy: layer.token_entropy,
        dead: &layer.dead,
        cold: &layer.cold,
        hot: &layer.hot,
        reuse: layer.reuse,
        reuse_by_chance: layer.reuse_by_chance,
        specialisation: layer.specialisation,
    }
}

/// JSON that cannot end the script element it stands in, nor open a comment: every `<`, `>` and `&` as an escape.
pub(crate) fn inside_script(json: &str) -> String {
    json.replace('&', "\\u0026")
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
}

/// Replaces `{{name}}` by its value. Values are not searched again, so they may hold anything.
pub(crate) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, after) = after
            .split_once("}}")
            .expect("the template closes its placeholders");
        let value = values.iter().find(|(known, _)| *known == name);
        out.push_str(before);
        out.push_str(value.expect("the template names known values").1);
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
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

    /// The JSON of a page.
    fn data_of(page: &str) -> serde_json::Value {
        let after = page.split_once(r#"id="data">"#).unwrap().1;
        serde_json::from_str(after.split_once("</script>").unwrap().0).unwrap()
    }

    #[test]
    fn the_page_holds_everything_and_loads_nothing() {
        let stats = stats(&["prose", "code"]);
        let page = page(&stats, "Experts of nano");
        assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
        assert!(
            page.contains("<title>Experts of nano</title>")
                && page.contains("<h1>Experts of nano</h1>")
        );
        assert!(page.contains("default-src 'none'"));
        for outside in [
            "http:",
            "https:",
            " src=",
            "@import",
            "url(",
            "fetch(",
            "innerHTML",
        ] {
            assert!(!page.contains(outside), "{outside}");
        }
        let data = data_of(&page);
        assert_eq!(
            data["layers"][1]["by_domain"][0][2],
            stats.layers[1].by_domain[0][2]
        );
        assert_eq!(data["domains"][1]["name"], "code");
        assert_eq!(data["heat_dark"].as_array().unwrap().len(), STEPS + 1);
    }

    #[test]
    fn hostile_names_stay_text() {
        const HOSTILE: &str = "</script><script>alert(1)</script><!--{{title}}";
        let stats = stats(&[HOSTILE]);
        let page = page(&stats, "<img onerror=x> {{data}}");
        assert!(
            !page.contains("<script>alert") && !page.contains("<!--") && !page.contains("<img")
        );
        assert!(page.contains("<h1>&lt;img onerror=x&gt; {{data}}</h1>"));
        assert_eq!(data_of(&page)["domains"][0]["name"], HOSTILE);
        assert_eq!(page.matches("</script>").count(), 2);
    }

    #[test]
    fn placeholders_are_filled_once() {
        assert_eq!(
            fill("a{{x}}b{{y}}{{x}}", &[("x", "{{y}}"), ("y", "2")]),
            "a{{y}}b2{{y}}"
        );
    }
}
