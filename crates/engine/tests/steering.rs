//! Steering: what is said of one session changes no other, empty steering changes nothing, and masks, numbers of picks
//! and groups are what another checkpoint would have been, and what transformers makes of edited routers.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::sync::Arc;

use cadre_checkpoint::{Checkpoint, TensorData};
use cadre_engine::{
    EngineError, LoadOptions, Logits, Lossy, Model, NoObserver, Observer, PreferCached,
    RoutingEvent, Sequence, Session, SessionOptions, Steering, StreamOptions, load,
};
use cadre_testkit::{TinyMoe, assert_close, golden_dir};
use serde_json::Value;

fn open(checkpoint: &Checkpoint) -> Arc<dyn Model> {
    let options = LoadOptions {
        n_threads: Some(2),
        ..LoadOptions::default()
    };
    load(checkpoint, &options).unwrap()
}

fn tiny() -> TinyMoe {
    TinyMoe::default().n_layers(3).mlp_only_layers(&[1])
}

fn build(builder: &TinyMoe) -> Arc<dyn Model> {
    open(&builder.build().unwrap().open().unwrap())
}

fn steering(json: &str) -> Steering {
    serde_json::from_str(json).unwrap()
}

fn session(model: &dyn Model, chunk: usize, json: &str) -> Session {
    let options = SessionOptions {
        chunk,
        ..SessionOptions::default()
    };
    let mut session = model.session(&options).unwrap();
    model.steer(&mut session, &steering(json)).unwrap();
    session
}

fn tokens() -> Vec<u32> {
    (0..23).map(|i| i * 7 % 31).collect()
}

/// All logits of a text, alone, in chunks.
fn read(model: &dyn Model, json: &str, chunk: usize) -> Vec<f32> {
    let mut session = session(model, chunk, json);
    let logits = model.forward(&mut session, &tokens(), Logits::All, &mut NoObserver);
    logits.unwrap().to_vec()
}

/// Something of every kind for layers 0 and 2.
const SOME: [&str; 5] = [
    "{}",
    r#"{"mask":{"0":[1,2],"2":[0]},"bias":{"*":{"5":2}}}"#,
    r#"{"force":{"*":[7]},"gain":{"2":{"7":0.5}}}"#,
    r#"{"top_k":4,"top_p":0.7}"#,
    r#"{"ranks":[2],"mute":{"0":[3]}}"#,
];

#[test]
fn nothing_said_is_nothing_changed() {
    let model = &*build(&tiny());
    let mut plain = model.session(&SessionOptions::default()).unwrap();
    let logits = model.forward(&mut plain, &tokens(), Logits::All, &mut NoObserver);
    let plain = logits.unwrap().to_vec();
    assert!(read(model, "{}", 64) == plain);
    let all: Vec<Vec<f32>> = SOME.iter().map(|json| read(model, json, 64)).collect();
    for (at, one) in all.iter().enumerate().skip(1) {
        assert!(all[..at].iter().all(|other| other != one), "{}", SOME[at]);
    }
    // What was said can be taken back, and holds for what is read from then on.
    let mut session = session(model, 64, SOME[1]);
    model.steer(&mut session, &Steering::default()).unwrap();
    let logits = model.forward(&mut session, &tokens(), Logits::All, &mut NoObserver);
    assert!(*logits.unwrap() == *plain);
}

#[test]
fn a_session_is_steered_alone_whatever_is_beside_it_and_however_it_is_cut() {
    let model = &*build(&tiny());
    let expected: Vec<Vec<f32>> = SOME.iter().map(|json| read(model, json, 64)).collect();
    for (json, expected) in SOME.iter().zip(&expected) {
        for chunk in [1, 5] {
            assert!(read(model, json, chunk) == *expected, "{json}");
        }
    }
    let vocab = model.info().vocab_size;
    let mut sessions: Vec<Session> = SOME.iter().map(|json| session(model, 64, json)).collect();
    let mut workspace = model.workspace(SOME.len() * 8).unwrap();
    let text = tokens();
    let mut at = 0;
    for n in [3, 1, 8, 1, 7] {
        let batch = sessions.iter_mut().map(|session| Sequence {
            session,
            tokens: &text[at..at + n],
            want: Logits::All,
        });
        let mut batch: Vec<Sequence<'_>> = batch.collect();
        let got = model.forward_batch(&mut batch, &mut workspace, &mut NoObserver);
        let got = got.unwrap().chunks(n * vocab);
        for ((got, expected), json) in got.zip(&expected).zip(SOME) {
            assert!(
                *got == expected[at * vocab..(at + n) * vocab],
                "{json} at {at}"
            );
        }
        at += n;
    }
}

#[test]
fn more_or_fewer_picks_are_those_of_a_model_made_so() {
    for norm in [true, false] {
        let with = |k| build(&tiny().norm_topk_prob(norm).top_k(k));
        let model = with(2);
        for k in [1, 2, 3, 5, 8] {
            let expected = read(&*with(k), "{}", 64);
            let got = read(&*model, &format!(r#"{{"top_k":{k}}}"#), 64);
            assert!(got == expected, "{k} of 8, norm {norm}");
        }
    }
}

/// The checkpoint of `builder` without the experts that `goes` says.
fn without(builder: &TinyMoe, goes: &[u16]) -> Arc<dyn Model> {
    let whole = builder.build().unwrap();
    let left: Vec<u16> = (0..8).filter(|expert| !goes.contains(expert)).collect();
    let cut = builder.clone().n_experts(left.len()).build().unwrap();
    let from = whole.open().unwrap();
    cut.edit_tensors(|tensors: &mut Vec<TensorData<'_>>| {
        for tensor in tensors {
            let values = |name: &str| from.tensor(name).unwrap().to_f32();
            let expert = tensor
                .name
                .split_once(".experts.")
                .map(|(_, rest)| rest.to_owned());
            let new = match expert {
                Some(rest) => {
                    let (id, part) = rest.split_once('.').unwrap();
                    let was = left[id.parse::<usize>().unwrap()];
                    let prefix = tensor.name.strip_suffix(rest.as_str()).unwrap();
                    values(&format!("{prefix}{was}.{part}"))
                }
                None if tensor.name.ends_with("mlp.gate.weight") => {
                    let rows = values(&tensor.name);
                    let row = |id: &u16| rows[usize::from(*id) * 32..][..32].to_vec();
                    left.iter().flat_map(row).collect()
                }
                None => values(&tensor.name),
            };
            *tensor.values.to_mut() = new;
        }
    })
    .unwrap();
    open(&cut.open().unwrap())
}

#[test]
fn masked_experts_might_as_well_not_be_in_the_checkpoint() {
    for norm in [true, false] {
        let builder = tiny().norm_topk_prob(norm);
        let model = build(&builder);
        for goes in [&[0][..], &[1, 2, 6], &[0, 1, 2, 3, 4, 7]] {
            let json = format!(r#"{{"mask":{{"*":{goes:?}}}}}"#);
            let (got, expected) = (
                read(&*model, &json, 64),
                read(&*without(&builder, goes), "{}", 64),
            );
            assert_close(
                &format!("without {goes:?}, norm {norm}"),
                &got,
                &expected,
                1e-6,
            );
            assert!(got != read(&*model, "{}", 64));
        }
    }
}

/// The picks of every token in layer 2.
#[derive(Default)]
struct Picks(Vec<Vec<u16>>);

impl Observer for Picks {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        if event.layer == 2 {
            self.0
                .extend(event.routing.iter().map(|(ids, _)| ids.to_vec()));
        }
    }
}

#[test]
fn observers_see_what_was_computed() {
    let model = &*build(&tiny());
    let picks = |json| {
        let (mut session, mut picks) = (session(model, 64, json), Picks::default());
        model
            .forward(&mut session, &tokens(), Logits::None, &mut picks)
            .unwrap();
        picks.0
    };
    let only = picks(r#"{"mask":{"2":[0,1,2,3,4,5]}}"#);
    assert!(only.iter().all(|ids| matches!(ids[..], [6, 7] | [7, 6])));
    let forced = picks(r#"{"force":{"2":[3]}}"#);
    assert!(forced.iter().all(|ids| ids.len() == 2 && ids.contains(&3)));
    assert!(
        picks(r#"{"gain":{"2":{"3":0}}}"#)
            .iter()
            .all(|ids| !ids.contains(&3))
    );
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_the_session_alone() {
    let folder = tiny().build().unwrap();
    let model = &*open(&folder.open().unwrap());
    let mut session = session(model, 64, SOME[1]);
    for (json, said) in [
        (
            r#"{"mask":{"1":[0]}}"#,
            "layer 1 has no experts; layers with experts: 0, 2",
        ),
        (r#"{"force":{"*":[8]}}"#, "layer 0 has no expert 8"),
        (
            r#"{"mask":{"2":[0,1,2,3,4,5,6]}}"#,
            "layer 2 keeps 1 experts",
        ),
        (r#"{"top_k":9}"#, "1 to 8, the experts of layer 0"),
    ] {
        let error = model.steer(&mut session, &steering(json)).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
    let logits = model.forward(&mut session, &tokens(), Logits::All, &mut NoObserver);
    assert!(*logits.unwrap() == read(model, SOME[1], 64));

    let other = build(&TinyMoe::default().heads(2, 2, 8));
    let error = other.steer(&mut session, &Steering::default());
    assert!(matches!(error, Err(EngineError::ForeignSession)));

    let options = |lossy, json| LoadOptions {
        lossy,
        steering: steering(json),
        stream: Some(StreamOptions::new(1 << 30)),
        ..LoadOptions::default()
    };
    let prefer = Lossy {
        prefer_cached: Some(PreferCached { keep: 1, among: 4 }),
        ..Lossy::default()
    };
    let drop = Lossy {
        drop_cold: Some(1.0),
        ..Lossy::default()
    };
    for (lossy, json, said) in [
        (prefer, r#"{"mask":{"0":[1]}}"#, "with prefer-cached"),
        (prefer, r#"{"ranks":[2]}"#, "with prefer-cached"),
        (drop, r#"{"force":{"0":[1]}}"#, "with drop-cold"),
    ] {
        let error = load(&folder.open().unwrap(), &options(lossy, json)).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
    load(
        &folder.open().unwrap(),
        &options(drop, r#"{"mask":{"0":[1]}}"#),
    )
    .unwrap();
}

/// `golden/steering/`, made by `golden/make/steering.py`.
#[test]
fn transformers_says_the_same_of_masks_and_ranks() {
    let folder = golden_dir();
    let text = std::fs::read_to_string(folder.join("steering/expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let cases = expected["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let name = case["model"].as_str().unwrap();
        let model = open(&Checkpoint::open(&folder.join(name)).unwrap());
        let tokens: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        let mut session = session(&*model, 64, &case["steering"].to_string());
        let logits = model.forward(&mut session, &tokens, Logits::All, &mut NoObserver);
        let logits = logits.unwrap();
        let rows: Vec<Vec<f32>> = serde_json::from_value(case["logits"].clone()).unwrap();
        let rows = rows.concat();
        let got = &logits[logits.len() - rows.len()..];
        assert_close(&format!("{name}, {}", case["steering"]), got, &rows, 1e-4);
    }
}
