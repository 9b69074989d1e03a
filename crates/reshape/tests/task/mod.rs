//! The domains of the sample as tasks of a model: what it does on one, and what a plan costs there.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use cadre_checkpoint::{Checkpoint, ConvertTo};
use cadre_engine::eval::{Document, Windows, perplexity};
use cadre_engine::{LoadOptions, Logits, Model, Observer, RoutingEvent, SessionOptions, load};
use cadre_reshape::{Applying, Usage, UsageOptions, apply};
use cadre_routing::plan::Plan;
use cadre_trace::{Columns, Step, TraceMeta, TraceWriter};

/// The domains of the sample.
pub(crate) const TASKS: [&str; 5] = ["code", "dialogue", "german", "math", "prose"];

/// Tokens that outputs are judged by.
pub(crate) const JUDGED: usize = 700;

/// Models that are used once need not be laid out for speed.
pub(crate) fn options() -> LoadOptions {
    LoadOptions {
        in_place: true,
        ..LoadOptions::default()
    }
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Writes what it sees of one sequence.
struct Recorder<'a> {
    writer: TraceWriter,
    seq: u32,
    tokens: &'a [u32],
}

impl Observer for Recorder<'_> {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let first = event.first_position;
        let tokens = &self.tokens[first..first + event.routing.n_tokens()];
        let step = Step {
            seq: self.seq,
            first_pos: first as u32,
            tokens,
            domain: "task",
            layer: event.layer,
            routing: event.routing,
            logits: Some(event.logits),
            norms: Some(event.norms),
        };
        self.writer.push(&step).unwrap();
    }

    fn wants_norms(&self) -> bool {
        true
    }
}

pub(crate) fn usage(
    checkpoint: &Checkpoint,
    model: &dyn Model,
    tokens: &[u32],
    path: &Path,
) -> Usage {
    let info = model.info();
    let meta = TraceMeta {
        digest: checkpoint.digest().to_owned(),
        architecture: info.model_type.clone(),
        n_layers: info.n_layers,
        n_experts: info.n_experts,
        layer_experts: Vec::new(),
        n_null: 0,
        top_k: info.top_k,
        attention: None,
        lossy: None,
    };
    let columns = Columns {
        logits: true,
        norms: true,
    };
    let mut recorder = Recorder {
        writer: TraceWriter::create(path, &meta, columns).unwrap(),
        seq: 0,
        tokens: &[],
    };
    let mut session = model.session(&SessionOptions::default()).unwrap();
    for (seq, tokens) in tokens.chunks(256).enumerate() {
        session.rewind(0);
        (recorder.seq, recorder.tokens) = (seq as u32, tokens);
        let read = model.forward(&mut session, tokens, Logits::None, &mut recorder);
        read.unwrap();
    }
    recorder.writer.finish().unwrap();
    let options = UsageOptions {
        similarity: true,
        ..UsageOptions::default()
    };
    Usage::read(path, &options).unwrap()
}

pub(crate) fn nll(checkpoint: &Checkpoint, tokens: &[u32]) -> f64 {
    let model = load(checkpoint, &options()).unwrap();
    let document = Document {
        domain: "task".to_owned(),
        tokens: tokens.to_vec(),
    };
    let windows = Windows {
        window: 256,
        stride: 256,
        fills_last: false,
    };
    let go_on = &mut |_: u64, _: u64| ControlFlow::Continue(());
    let kv = SessionOptions::default().kv;
    let result = perplexity(&*model, &[document], windows, kv, go_on).unwrap();
    result.total.nll()
}

/// Nats per token on `tokens` of what `plan` makes of `checkpoint`.
pub(crate) fn cost(checkpoint: &Checkpoint, plan: &Plan, tokens: &[u32]) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let options = Applying {
        target: ConvertTo::Folder {
            max_shard_bytes: 1 << 30,
        },
        pad: false,
    };
    let conversion = apply(checkpoint, plan, options).unwrap();
    let paths = conversion
        .write(&folder.path().join("cut"), &mut |_| true)
        .unwrap();
    nll(&Checkpoint::open(&paths[0]).unwrap(), tokens)
}

/// The tokens of a domain of the sample, cut in two: to record, and to judge by.
pub(crate) fn halves(checkpoint: &Checkpoint, domain: &str) -> [Vec<u32>; 2] {
    let text = std::fs::read_to_string(root().join("recipes/data/sample.jsonl")).unwrap();
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let texts: Vec<String> = lines
        .filter(|one| one["domain"] == domain)
        .map(|one| one["text"].as_str().unwrap().to_owned())
        .collect();
    let tokens = checkpoint
        .tokenizer()
        .unwrap()
        .encode(&texts.join("\n"))
        .unwrap();
    let half = tokens.len() / 2;
    [
        tokens[..half].to_vec(),
        tokens[half..].iter().take(JUDGED).copied().collect(),
    ]
}

/// Mean and standard deviation.
pub(crate) fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0)).sqrt())
}
