//! The report of `cadre inspect` for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::commands::inspect::{Layer, Report, TextReport};
use crate::output::{bytes, count, harmless};

/// One line per topic, then the table of the layers if there is one.
pub(crate) fn text(report: &Report) -> String {
    let mut text = String::new();
    for (label, value) in lines(report) {
        // Names come out of files. Writing to a String cannot fail.
        let _ = writeln!(text, "{label:<14} {}", harmless(&value));
    }
    if let Some(layers) = &report.layers {
        table(&mut text, layers);
    }
    text
}

fn lines(report: &Report) -> Vec<(&'static str, String)> {
    let (parameters, sizes) = (&report.parameters, &report.bytes);
    let mut lines = vec![
        ("model", format!("{} ({})", report.model, report.container)),
        ("architecture", report.architecture.clone()),
        (
            "layers",
            format!(
                "{}, {} of them with experts",
                report.n_layers, report.n_moe_layers
            ),
        ),
    ];
    if let Some(router) = &report.router {
        let shared = report.shared_expert_width;
        let shared = shared.map(|width| format!(", and a shared one of width {width}"));
        let residual = report.residual_width;
        let residual = residual.map(|width| format!(", beside a feed-forward of width {width}"));
        let n_experts = match (&report.experts_per_layer, report.n_null_experts) {
            (Some(counts), _) => format!("{counts:?}"),
            (None, 0) => report.n_experts.to_string(),
            (None, null) => format!("{} and {null} null ones", report.n_experts),
        };
        let most = if report.n_picks_differ { "up to " } else { "" };
        lines.push((
            "experts",
            format!(
                "{n_experts} per layer, {most}{} per token, width {} of {}{}{}",
                report.top_k,
                report.expert_width,
                report.hidden_size,
                shared.unwrap_or_default(),
                residual.unwrap_or_default()
            ),
        ));
        let recurrent = report.recurrent_router_width;
        let recurrent =
            recurrent.map(|width| format!(", with a state of {width} along the layers"));
        let recurrent = recurrent.unwrap_or_default();
        let decoupled = report.decoupled_router.as_ref().map(|router| {
            let picks = match router.per_layer {
                true => "picks for each layer",
                false => "the same picks for all layers",
            };
            format!(
                ", by a network of width {} before the layers; {picks}",
                router.width
            )
        });
        let decoupled = decoupled.unwrap_or_default();
        lines.push(("router", format!("{router}{recurrent}{decoupled}")));
    }
    lines.extend([
        ("attention", report.attention.to_string()),
        ("positions", report.rope.to_string()),
        ("context", format!("{} tokens", report.context)),
        ("vocabulary", vocabulary(report)),
        ("stop tokens", stop_tokens(&report.text)),
        ("chat template", templates(&report.text)),
        (
            "parameters",
            format!(
                "{} total, {} active per token ({:.1} %), {} in experts",
                count(parameters.total),
                count(parameters.active),
                100.0 * parameters.active as f64 / parameters.total.max(1) as f64,
                count(parameters.experts)
            ),
        ),
        (
            "bytes",
            format!(
                "{} total, {} read per token, {} per expert",
                bytes(sizes.total),
                bytes(sizes.read_per_token),
                bytes(sizes.one_expert)
            ),
        ),
        (
            "KV cache",
            format!("{} per token (f32)", bytes(report.kv_bytes_per_token)),
        ),
        ("memory", memory(report)),
        ("tensors", formats(report)),
    ]);
    if !report.ignored.is_empty() {
        lines.push(("ignored", ignored(report)));
    }
    if let Some(digest) = &report.digest {
        lines.push(("digest", digest.clone()));
    }
    lines
}

fn memory(report: &Report) -> String {
    let memory = &report.memory;
    format!(
        "{} with a context of {}: weights {}, cache {}, buffers {}, program {}",
        bytes(memory.needed_bytes),
        memory.n_ctx,
        bytes(memory.weights_bytes),
        bytes(memory.kv_bytes),
        bytes(memory.scratch_bytes),
        bytes(memory.program_bytes)
    )
}

fn formats(report: &Report) -> String {
    let one = |(name, size): (&&str, &crate::commands::inspect::FormatReport)| {
        format!("{} {name} ({})", size.tensors, bytes(size.bytes))
    };
    let formats: Vec<String> = report.formats.iter().map(one).collect();
    formats.join(", ")
}

/// How many for each reason, and one example.
fn ignored(report: &Report) -> String {
    let mut reasons: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for ignored in &report.ignored {
        let reason = reasons.entry(ignored.reason);
        reason.or_insert((0, &ignored.tensor)).0 += 1;
    }
    let one = |(reason, (n, example)): (&&str, &(usize, &str))| match n {
        1 => format!("{example} ({reason})"),
        _ => format!("{n} such as {example} ({reason})"),
    };
    let reasons: Vec<String> = reasons.iter().map(one).collect();
    reasons.join(", ")
}

fn vocabulary(report: &Report) -> String {
    let text = &report.text;
    let kind = text.tokenizer.as_deref().unwrap_or("tokenizer");
    let tokenizer = match (text.vocab_size, text.tokenizer_bytes) {
        (Some(size), _) => format!("{kind} {size} tokens"),
        (None, Some(n)) => format!("{kind} of {} (--tokenizer to count its tokens)", bytes(n)),
        (None, None) => "no tokenizer".to_owned(),
    };
    format!("{}, {tokenizer}", report.vocab_size)
}

fn stop_tokens(text: &TextReport) -> String {
    let one = |stop: &crate::commands::inspect::Stop| {
        let token = stop.token.as_deref().map(|token| format!(" {token}"));
        let token = token.unwrap_or_default();
        format!("{}{token} ({})", stop.id, stop.sources.join(", "))
    };
    let mut stops: Vec<String> = text.stop_tokens.iter().map(one).collect();
    if stops.is_empty() {
        stops.push("none".to_owned());
    }
    if !text.vocabulary_parsed && text.tokenizer.is_some() {
        stops.push("--tokenizer to look for more".to_owned());
    }
    stops.join(", ")
}

fn templates(text: &TextReport) -> String {
    let one = |template: &crate::commands::inspect::Template| {
        format!("{} ({})", template.name, template.source)
    };
    match text.chat_templates.as_slice() {
        [] => "none".to_owned(),
        some => some.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

fn table(text: &mut String, layers: &[Layer]) {
    let _ = writeln!(
        text,
        "\n{:>5} {:>8} {:>8} {:>11} {:>11} {:>11}  formats",
        "layer", "experts", "window", "parameters", "in experts", "bytes"
    );
    for layer in layers {
        let window = layer.window.map_or("-".to_owned(), |n| n.to_string());
        let formats: Vec<String> = layer
            .formats
            .iter()
            .map(|(f, n)| format!("{n} {f}"))
            .collect();
        let _ = writeln!(
            text,
            "{:>5} {:>8} {window:>8} {:>11} {:>11} {:>11}  {}",
            layer.layer,
            layer.n_experts,
            count(layer.parameters),
            count(layer.expert_parameters),
            bytes(layer.bytes),
            formats.join(", ")
        );
    }
}
