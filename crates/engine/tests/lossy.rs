//! Lossy routing: what is off changes nothing, what is on changes what it says, and observers see what was computed.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::sync::Arc;

use cadre_checkpoint::{Checkpoint, Dtype};
use cadre_engine::{
    EngineError, LoadOptions, Logits, Lossy, Model, Observer, PreferCached, RoutingEvent,
    SessionOptions, StreamOptions, load, load_with_low_bit,
};
use cadre_testkit::{TinyFolder, TinyMoe};

const K: usize = 3;
const N_PROMPT: usize = 9;

fn folder() -> TinyFolder {
    TinyMoe::default().n_layers(4).top_k(K).build().unwrap()
}

fn open(checkpoint: &Checkpoint, lossy: Lossy, budget: Option<u64>) -> Arc<dyn Model> {
    let options = LoadOptions {
        n_threads: Some(2),
        stream: budget.map(StreamOptions::new),
        lossy,
        ..LoadOptions::default()
    };
    load(checkpoint, &options).unwrap()
}

/// Enough for a few of the experts.
fn budget(checkpoint: &Checkpoint) -> u64 {
    let options = LoadOptions {
        stream: Some(StreamOptions::new(0)),
        ..LoadOptions::default()
    };
    match load(checkpoint, &options) {
        Err(EngineError::BudgetTooSmall { needed, .. }) => needed + checkpoint.data_bytes() / 8,
        other => panic!("{other:?}"),
    }
}

/// What one token got in one layer.
struct Picked {
    position: usize,
    best: u16,
    experts: Vec<u16>,
    weight: f32,
}

#[derive(Default)]
struct Watch(Vec<Picked>);

impl Observer for Watch {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        let n_experts = event.logits.len() / event.routing.n_tokens();
        let tokens = event.routing.iter().zip(event.logits.chunks(n_experts));
        for (at, ((experts, weights), logits)) in tokens.enumerate() {
            let best = (0..n_experts).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            self.0.push(Picked {
                position: event.first_position + at,
                best: best.unwrap() as u16,
                experts: experts.to_vec(),
                weight: weights.iter().sum(),
            });
        }
    }
}

/// Reads a prompt and decodes after it: bits of all logits, and the picks.
fn read(model: &dyn Model) -> (Vec<u32>, Vec<Picked>) {
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 31).collect();
    let (prompt, rest) = tokens.split_at(N_PROMPT);
    let (mut bits, mut watch) = (Vec::new(), Watch::default());
    for tokens in std::iter::once(prompt).chain(rest.chunks(1)) {
        let logits = model
            .forward(&mut session, tokens, Logits::All, &mut watch)
            .unwrap();
        bits.extend(logits.iter().map(|value| value.to_bits()));
    }
    (bits, watch.0)
}

#[test]
fn rules_that_leave_nothing_out_change_no_bit() {
    let folder = folder();
    let checkpoint = folder.open().unwrap();
    let (resident, _) = read(&*open(&checkpoint, Lossy::default(), None));
    let streamed = Lossy {
        prefer_cached: Some(PreferCached { keep: K, among: K }),
        drop_cold: Some(0.0),
        ..Lossy::default()
    };
    let model = open(&checkpoint, streamed, Some(budget(&checkpoint)));
    assert!(read(&*model).0 == resident);
}

#[test]
fn cold_experts_are_dropped_while_decoding_but_never_the_best() {
    let folder = folder();
    let checkpoint = folder.open().unwrap();
    let lossy = Lossy {
        drop_cold: Some(100.0),
        ..Lossy::default()
    };
    let budget = budget(&checkpoint);
    let model = open(&checkpoint, lossy, Some(budget));
    let (bits, picked) = read(&*model);
    let (prompt, decoded): (Vec<_>, Vec<_>) =
        picked.iter().partition(|one| one.position < N_PROMPT);
    assert!(prompt.iter().all(|one| one.experts.len() == K));
    assert!(decoded.iter().all(|one| one.experts[0] == one.best));
    assert!(decoded.iter().any(|one| one.experts.len() < K));
    let plain = open(&checkpoint, Lossy::default(), Some(budget));
    assert!(bits != read(&*plain).0);
    let (with, without) = (model.store_stats().unwrap(), plain.store_stats().unwrap());
    assert!(with.reads < without.reads, "{with:?} {without:?}");
}

#[test]
fn experts_in_memory_take_the_place_of_others() {
    let folder = folder();
    let checkpoint = folder.open().unwrap();
    let lossy = Lossy {
        prefer_cached: Some(PreferCached { keep: 1, among: 8 }),
        ..Lossy::default()
    };
    let budget = budget(&checkpoint);
    let model = open(&checkpoint, lossy, Some(budget));
    let (bits, picked) = read(&*model);
    assert!(
        picked
            .iter()
            .all(|one| one.experts.len() == K && one.experts[0] == one.best)
    );
    assert!(picked.iter().all(|one| (one.weight - 1.0).abs() < 1e-5));
    let plain = open(&checkpoint, Lossy::default(), Some(budget));
    assert!(bits != read(&*plain).0);
    let hit_rate = |model: &dyn Model| model.store_stats().unwrap().hit_rate();
    assert!(hit_rate(&*model) > hit_rate(&*plain));
}

#[test]
fn cold_experts_are_computed_by_copies_in_fewer_bits() {
    let folder = folder();
    let checkpoint = folder.open().unwrap();
    let open_with = |low_bit: &Checkpoint, share, budget| {
        let options = LoadOptions {
            n_threads: Some(2),
            stream: Some(StreamOptions::new(budget)),
            lossy: Lossy {
                low_bit: Some(share),
                ..Lossy::default()
            },
            ..LoadOptions::default()
        };
        load_with_low_bit(&checkpoint, low_bit, &options, &|_| {})
    };
    let budget = budget(&checkpoint) * 2;
    let (plain, picks) = read(&*open(&checkpoint, Lossy::default(), Some(budget)));
    // The model itself lends what it has, and nothing is seen of it, but that copies are read as well.
    let model = open_with(&checkpoint, 100.0, budget).unwrap();
    let (bits, picked) = read(&*model);
    assert!(bits == plain);
    let ids = |picks: &[Picked]| -> Vec<Vec<u16>> {
        picks.iter().map(|one| one.experts.clone()).collect()
    };
    assert_eq!(ids(&picked), ids(&picks));

    // In half the bytes: other results, after a prompt that is read as it is.
    let halved = TinyMoe::default().n_layers(4).top_k(K).dtype(Dtype::Bf16);
    let halved = halved.build().unwrap();
    let low_bit = halved.open().unwrap();
    let never = open_with(&low_bit, 0.0, budget).unwrap();
    assert!(read(&*never).0 == plain, "nothing is that light");
    let model = open_with(&low_bit, 100.0, budget).unwrap();
    let (bits, picked) = read(&*model);
    let n_logits = plain.len() / 40;
    assert!(bits[..N_PROMPT * n_logits] == plain[..N_PROMPT * n_logits]);
    assert!(bits != plain);
    assert!(
        picked
            .iter()
            .all(|one| one.experts.iter().all(|id| *id < 8))
    );
    let near = bits
        .iter()
        .zip(&plain)
        .map(|(a, b)| (f32::from_bits(*a) - f32::from_bits(*b)).abs());
    assert!(
        near.fold(0.0, f32::max) < 0.1,
        "the same model but for its rounding"
    );
    let (with, without) = (model.store_stats().unwrap(), never.store_stats().unwrap());
    assert!(with.bytes_read < without.bytes_read, "{with:?} {without:?}");

    let other = TinyMoe::default().n_layers(3).top_k(K).build().unwrap();
    let refused = open_with(&other.open().unwrap(), 1.0, budget).unwrap_err();
    assert!(
        matches!(refused, EngineError::OtherModel { .. }),
        "{refused}"
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = folder();
    let checkpoint = folder.open().unwrap();
    let refused = |lossy: Lossy, stream: Option<StreamOptions>| {
        let options = LoadOptions {
            stream,
            lossy,
            ..LoadOptions::default()
        };
        load(&checkpoint, &options).unwrap_err().to_string()
    };
    let streamed = Some(StreamOptions::new(1 << 30));
    let drop_cold = |share| Lossy {
        drop_cold: Some(share),
        ..Lossy::default()
    };
    assert!(refused(drop_cold(-1.0), streamed).contains("from 0"));
    assert!(refused(drop_cold(1.0), None).contains("drop-cold=1"));
    let low_bit = |share| Lossy {
        low_bit: Some(share),
        ..Lossy::default()
    };
    assert!(refused(low_bit(f32::NAN), streamed).contains("from 0"));
    assert!(refused(low_bit(1.0), None).contains("low-bit=1"));
    assert!(refused(low_bit(1.0), streamed).contains("a model to read them from"));
    let prefer = |keep, among| Lossy {
        prefer_cached: Some(PreferCached { keep, among }),
        ..Lossy::default()
    };
    assert!(refused(prefer(0, 5), streamed).contains("0,5"));
    assert!(refused(prefer(2, 9), streamed).contains("among 3 to 8"));
}
