//! Self-contrast: token by token what the equations give in f64, the cases in which it must change nothing, and what it
//! reads.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod reference;

use std::sync::Arc;

use cadre_checkpoint::Checkpoint;
use cadre_engine::{
    Contrast, ContrastSessions, EngineError, GenerateOptions, Hooks, LoadOptions, Model,
    NoObserver, Observer, RoutingEvent, SamplingOptions, SessionOptions, Steering, StreamOptions,
    generate, generate_contrasted, load,
};
use cadre_testkit::{TinyFolder, TinyMoe};
use reference::Reference;

const N_NEW: usize = 12;
const PROMPT: [u32; 7] = [5, 6, 7, 200, 3, 9, 1];

fn folder(norm: bool) -> TinyFolder {
    let builder = TinyMoe::default().n_layers(3).norm_topk_prob(norm);
    builder.build().unwrap()
}

fn open(checkpoint: &Checkpoint, stream: Option<StreamOptions>) -> Arc<dyn Model> {
    let options = LoadOptions {
        n_threads: Some(2),
        stream,
        ..LoadOptions::default()
    };
    load(checkpoint, &options).unwrap()
}

fn options(sampling: SamplingOptions) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens: N_NEW,
        stop_tokens: Vec::new(),
        sampling,
    }
}

fn session(chunk: usize) -> SessionOptions {
    SessionOptions {
        n_ctx: Some(64),
        chunk,
        ..SessionOptions::default()
    }
}

fn ranks(ranks: &[usize], beta: f32, alpha: f32) -> Contrast {
    Contrast::with_ranks(Steering::default(), ranks.to_vec(), beta, alpha)
}

fn contrasted(model: &dyn Model, contrast: &Contrast, chunk: usize) -> Vec<u32> {
    let mut sessions = ContrastSessions::new(model, &session(chunk), contrast.clone()).unwrap();
    let options = options(SamplingOptions::default());
    let generated =
        generate_contrasted(model, &mut sessions, &PROMPT, &options, &mut NoObserver).unwrap();
    generated.tokens
}

fn greedy(model: &dyn Model) -> Vec<u32> {
    let mut session = model.session(&session(64)).unwrap();
    let options = options(SamplingOptions::default());
    let generated = generate(model, &mut session, &PROMPT, &options, &mut NoObserver);
    generated.unwrap().tokens
}

/// The equations, every token from the whole text.
fn by_equations(strong: &Reference, weak: &Reference, beta: f64, alpha: f64) -> Vec<u32> {
    let mut text = PROMPT.to_vec();
    for _ in 0..N_NEW {
        let last = |model: &Reference| {
            let logits = model.logits(&text);
            logits[logits.len() - 384..].to_vec()
        };
        let (z_s, z_w) = (last(strong), last(weak));
        let best = z_s.iter().copied().fold(f32::MIN, f32::max);
        let valid = |i: &usize| f64::from(z_s[*i]) >= alpha.ln() + f64::from(best);
        let z = |i: usize| (1.0 + beta) * f64::from(z_s[i]) - beta * f64::from(z_w[i]);
        let next = (0..384)
            .filter(valid)
            .max_by(|a, b| z(*a).total_cmp(&z(*b)));
        text.push(next.unwrap() as u32);
    }
    text.split_off(PROMPT.len())
}

#[test]
fn tokens_are_those_of_the_equations() {
    let mut differ = 0;
    for norm in [true, false] {
        let folder = folder(norm);
        let checkpoint = folder.open().unwrap();
        let model = open(&checkpoint, None);
        let strong = Reference::new(&checkpoint);
        let mut weak = Reference::new(&checkpoint);
        for (weak_ranks, beta, alpha) in
            [(&[2][..], 0.5, 0.1), (&[3], 0.9, 0.5), (&[2, 5], 0.7, 0.01)]
        {
            weak.ranks = weak_ranks.to_vec();
            let expected = by_equations(&strong, &weak, beta, alpha);
            let contrast = ranks(weak_ranks, beta as f32, alpha as f32);
            assert_eq!(contrasted(&*model, &contrast, 64), expected, "{contrast:?}");
            differ += usize::from(expected != greedy(&*model));
        }
    }
    assert!(differ > 2, "a contrast has effects");
}

#[test]
fn what_must_change_nothing_changes_nothing() {
    let folder = folder(true);
    let model = &*open(&folder.open().unwrap(), None);
    let greedy = greedy(model);
    assert_eq!(
        contrasted(model, &ranks(&[2], 0.0, 0.1), 64),
        greedy,
        "beta is 0"
    );
    assert_eq!(
        contrasted(model, &ranks(&[2], 0.9, 1.0), 64),
        greedy,
        "alpha is 1"
    );
    assert_eq!(
        contrasted(model, &ranks(&[1, 2], 0.9, 0.1), 64),
        greedy,
        "nothing to contrast"
    );
}

#[test]
fn neither_chunks_nor_streaming_change_a_token() {
    let folder = folder(true);
    let checkpoint = folder.open().unwrap();
    let model = open(&checkpoint, None);
    let contrast = ranks(&[2], 0.7, 0.1);
    let expected = contrasted(&*model, &contrast, 64);
    for chunk in [1, 3] {
        assert_eq!(contrasted(&*model, &contrast, chunk), expected);
    }
    let too_small = LoadOptions {
        stream: Some(StreamOptions::new(0)),
        ..LoadOptions::default()
    };
    let Err(EngineError::BudgetTooSmall { needed, .. }) = load(&checkpoint, &too_small) else {
        panic!("a budget of nothing");
    };
    let streamed = open(&checkpoint, Some(StreamOptions::new(needed)));
    assert_eq!(contrasted(&*streamed, &contrast, 64), expected);
}

/// Counts tokens that are routed, and the picks of each.
#[derive(Default)]
struct Count {
    n_tokens: usize,
    picks: Vec<usize>,
}

impl Observer for Count {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        assert_eq!(event.sequence, 0);
        if event.layer == 0 {
            self.n_tokens += event.routing.n_tokens();
            self.picks
                .extend(event.routing.iter().map(|(ids, _)| ids.len()));
        }
    }
}

impl Hooks for Count {}

#[test]
fn hooks_hear_of_the_strong_choice_alone_and_a_second_text_may_follow() {
    let folder = folder(true);
    let model = &*open(&folder.open().unwrap(), None);
    let strong = Steering {
        top_k: Some(3),
        ..Steering::default()
    };
    let contrast = Contrast::with_ranks(strong, vec![2], 0.5, 0.1);
    let mut sessions = ContrastSessions::new(model, &session(4), contrast).unwrap();
    let hot = SamplingOptions {
        temperature: 1.0,
        seed: 3,
        ..SamplingOptions::default()
    };
    let mut run = || {
        sessions.rewind(0);
        let mut count = Count::default();
        let options = options(hot);
        let generated = generate_contrasted(model, &mut sessions, &PROMPT, &options, &mut count);
        assert_eq!(count.n_tokens, PROMPT.len() + N_NEW - 1);
        assert!(count.picks.iter().all(|n| *n == 3));
        assert_eq!(sessions.strong().position(), count.n_tokens);
        generated.unwrap().tokens
    };
    assert_eq!(run(), run());
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = folder(true);
    let model = &*open(&folder.open().unwrap(), None);
    let refused = |contrast: Contrast| {
        let made = ContrastSessions::new(model, &session(64), contrast);
        made.map(|_| ()).unwrap_err().to_string()
    };
    assert!(refused(ranks(&[9], 0.5, 0.1)).contains("a token is to get 9"));
    assert!(refused(ranks(&[0], 0.5, 0.1)).contains("different ranks from 1"));
    assert!(refused(ranks(&[2], -1.0, 0.1)).contains("beta"));
}
