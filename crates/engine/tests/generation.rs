//! Generation, evaluation and loading, from outside.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cadre_engine::eval::{Document, Windows, perplexity};
use cadre_engine::{
    EngineError, Finish, GenerateOptions, Generated, Hooks, KvFormats, LoadOptions, Logits, Model,
    NoObserver, Observer, Quant, RoutingEvent, SamplingOptions, SessionOptions, generate, load,
    load_watched,
};
use cadre_kernels::Isa;
use cadre_testkit::{Random, TinyMoe};

fn tiny(options: &LoadOptions) -> Arc<dyn Model> {
    let folder = TinyMoe::default().build().unwrap();
    load(&folder.open().unwrap(), options).unwrap()
}

fn options(max_new_tokens: usize, sampling: SamplingOptions) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens,
        stop_tokens: Vec::new(),
        sampling,
    }
}

fn hot(seed: u64) -> SamplingOptions {
    SamplingOptions {
        temperature: 1.0,
        top_k: 40,
        top_p: 0.95,
        seed,
        ..Default::default()
    }
}

fn run(model: &dyn Model, prompt: &[u32], chunk: usize, options: &GenerateOptions) -> Generated {
    let mut session = model
        .session(&SessionOptions {
            n_ctx: Some(64),
            chunk,
            ..SessionOptions::default()
        })
        .unwrap();
    generate(model, &mut session, prompt, options, &mut NoObserver).unwrap()
}

#[test]
fn tokens_depend_on_the_seed_and_on_nothing_else() {
    let prompt: Vec<u32> = (1..20).collect();
    let one = tiny(&LoadOptions {
        n_threads: Some(1),
        ..Default::default()
    });
    let expected = run(&*one, &prompt, 64, &options(30, hot(3)));
    assert_eq!(
        (expected.tokens.len(), expected.finish),
        (30, Finish::Length)
    );
    for n_threads in [1, 2, 4] {
        let model = tiny(&LoadOptions {
            n_threads: Some(n_threads),
            ..Default::default()
        });
        for chunk in [1, 5, 19, 64] {
            assert_eq!(run(&*model, &prompt, chunk, &options(30, hot(3))), expected);
        }
    }
    assert_ne!(run(&*one, &prompt, 64, &options(30, hot(4))), expected);
}

#[test]
fn greedy_is_the_argmax_of_the_logits() {
    let model = tiny(&LoadOptions::default());
    let mut tokens = vec![5, 6, 7];
    let generated = run(
        &*model,
        &tokens,
        8,
        &options(10, SamplingOptions::default()),
    );
    for token in generated.tokens {
        let mut session = model.session(&SessionOptions::default()).unwrap();
        let logits = model
            .forward(&mut session, &tokens, Logits::Last, &mut NoObserver)
            .unwrap();
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(logits[token as usize], best);
        tokens.push(token);
    }
}

#[test]
fn stop_tokens_and_a_full_context_end_the_text() {
    let model = tiny(&LoadOptions::default());
    let free = run(
        &*model,
        &[1, 2, 3],
        8,
        &options(10, SamplingOptions::default()),
    )
    .tokens;
    let stop = GenerateOptions {
        stop_tokens: vec![free[4]],
        ..options(10, SamplingOptions::default())
    };
    let stopped = run(&*model, &[1, 2, 3], 8, &stop);
    let first = free.iter().position(|token| *token == free[4]).unwrap();
    assert_eq!(stopped.tokens, free[..first]);
    assert_eq!(stopped.finish, Finish::StopToken(free[4]));

    // Sixty-four positions: 60 of the prompt, 4 generated ones, and one more that is not read.
    let full = run(&*model, &[9; 60], 16, &options(99, hot(0)));
    assert_eq!((full.tokens.len(), full.finish), (5, Finish::ContextFull));
    let exact = run(&*model, &[9; 64], 16, &options(1, hot(0)));
    assert_eq!((exact.tokens.len(), exact.finish), (1, Finish::Length));
    let none = run(&*model, &[9; 64], 16, &options(0, hot(0)));
    assert_eq!((none.tokens.len(), none.finish), (0, Finish::Length));
}

#[test]
fn a_generation_can_be_continued() {
    let model = tiny(&LoadOptions::default());
    let whole = run(
        &*model,
        &[1, 2, 3],
        8,
        &options(12, SamplingOptions::default()),
    )
    .tokens;
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let mut prompt = vec![1, 2, 3];
    let mut parts = Vec::new();
    for _ in 0..3 {
        let four = options(4, SamplingOptions::default());
        let part = generate(&*model, &mut session, &prompt, &four, &mut NoObserver).unwrap();
        // The session has read all but the last token.
        prompt = part.tokens[3..].to_vec();
        parts.extend(part.tokens);
    }
    assert_eq!(parts, whole);
}

/// Counts what it hears and stops after `limit` tokens, or in the prompt after `prompt_limit`.
struct Stopper {
    limit: usize,
    prompt_limit: usize,
    tokens: Vec<(u32, usize)>,
    prompt: Vec<(usize, usize)>,
    routed_positions: Vec<usize>,
}

impl Observer for Stopper {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        if event.layer == 0 {
            let n_tokens = event.routing.n_tokens();
            self.routed_positions
                .extend(event.first_position..event.first_position + n_tokens);
        }
    }
}

impl Hooks for Stopper {
    fn prompt(&mut self, n_done: usize, n_total: usize) -> ControlFlow<()> {
        self.prompt.push((n_done, n_total));
        if n_done >= self.prompt_limit {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn token(&mut self, token: u32, position: usize) -> ControlFlow<()> {
        self.tokens.push((token, position));
        if self.tokens.len() >= self.limit {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

fn stopper(limit: usize, prompt_limit: usize) -> Stopper {
    let (tokens, prompt, routed_positions) = (Vec::new(), Vec::new(), Vec::new());
    Stopper {
        limit,
        prompt_limit,
        tokens,
        prompt,
        routed_positions,
    }
}

#[test]
fn hooks_hear_of_everything_and_can_stop() {
    let model = tiny(&LoadOptions::default());
    let mut session = model
        .session(&SessionOptions {
            n_ctx: None,
            chunk: 4,
            ..SessionOptions::default()
        })
        .unwrap();
    let mut hooks = stopper(3, usize::MAX);
    let prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    let ten = options(10, hot(1));
    let generated = generate(&*model, &mut session, &prompt, &ten, &mut hooks).unwrap();
    assert_eq!(
        (generated.tokens.len(), generated.finish),
        (3, Finish::Stopped)
    );
    assert_eq!(hooks.prompt, [(4, 9), (8, 9), (9, 9)]);
    let positions: Vec<usize> = hooks.tokens.iter().map(|(_, position)| *position).collect();
    assert_eq!(positions, [9, 10, 11]);
    assert_eq!(hooks.routed_positions, (0..11).collect::<Vec<usize>>());

    let mut session = model
        .session(&SessionOptions {
            n_ctx: None,
            chunk: 4,
            ..SessionOptions::default()
        })
        .unwrap();
    let mut hooks = stopper(3, 8);
    let generated = generate(&*model, &mut session, &prompt, &ten, &mut hooks).unwrap();
    assert_eq!(
        (generated.tokens.len(), generated.finish),
        (0, Finish::Stopped)
    );
    assert_eq!(session.position(), 8);
}

#[test]
fn prompts_that_cannot_be_read_are_refused() {
    let model = tiny(&LoadOptions::default());
    let mut session = model
        .session(&SessionOptions {
            n_ctx: Some(8),
            chunk: 4,
            ..SessionOptions::default()
        })
        .unwrap();
    let greedy = options(1, SamplingOptions::default());
    let mut error = |prompt: &[u32]| {
        generate(&*model, &mut session, prompt, &greedy, &mut NoObserver).unwrap_err()
    };
    assert!(matches!(error(&[]), EngineError::EmptyPrompt));
    let long = error(&[1; 9]);
    assert!(matches!(
        long,
        EngineError::PromptTooLong {
            n_tokens: 9,
            free: 8,
            n_ctx: 8,
            limit: 128
        }
    ));
    assert!(matches!(
        error(&[1, 999]),
        EngineError::UnknownToken { token: 999, .. }
    ));
    let bad = options(
        1,
        SamplingOptions {
            top_p: 2.0,
            ..hot(0)
        },
    );
    let result = generate(&*model, &mut session, &[1], &bad, &mut NoObserver);
    assert!(matches!(
        result,
        Err(EngineError::BadOption { name: "top-p", .. })
    ));
}

fn documents() -> Vec<Document> {
    let mut random = Random::new(4);
    let mut document = |domain: &str, n: usize| Document {
        domain: domain.to_owned(),
        tokens: (0..n).map(|_| random.below(384) as u32).collect(),
    };
    vec![
        document("prose", 50),
        document("code", 20),
        document("prose", 1),
        document("empty", 0),
    ]
}

/// Negative log likelihoods of a document read at once, by the definition.
fn nlls(model: &dyn Model, tokens: &[u32]) -> Vec<f64> {
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let logits = model
        .forward(&mut session, tokens, Logits::All, &mut NoObserver)
        .unwrap();
    let rows = logits.chunks_exact(384).zip(&tokens[1..]);
    rows.map(|(row, target)| {
        let total: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
        total.ln() - f64::from(row[*target as usize])
    })
    .collect()
}

#[test]
fn perplexity_is_the_mean_over_domains_and_windows() {
    let model = tiny(&LoadOptions::default());
    let documents = documents();
    let mut go_on = |_, _| ControlFlow::Continue(());
    let whole = Windows {
        window: 128,
        stride: 128,
        fills_last: false,
    };
    let result = perplexity(&*model, &documents, whole, KvFormats::default(), &mut go_on).unwrap();
    let prose: f64 = nlls(&*model, &documents[0].tokens).iter().sum();
    let code: f64 = nlls(&*model, &documents[1].tokens).iter().sum();
    assert_eq!(result.total.n_tokens, 49 + 19);
    assert!((result.domains["prose"].nll() - prose / 49.0).abs() < 1e-5);
    assert!((result.domains["code"].perplexity() - (code / 19.0).exp()).abs() < 1e-2);
    assert!((result.total.nll() - (prose + code) / 68.0).abs() < 1e-5);
    assert_eq!(result.domains["empty"].n_tokens, 0);

    // Windows of 16 with stride 4: prediction p is made in the window that first reaches it.
    let cut = Windows {
        window: 16,
        stride: 4,
        fills_last: false,
    };
    let result = perplexity(
        &*model,
        &documents[..1],
        cut,
        KvFormats::default(),
        &mut go_on,
    )
    .unwrap();
    let tokens = &documents[0].tokens;
    let expected: f64 = (0..49)
        .map(|p: usize| {
            let from = p.saturating_sub(15).next_multiple_of(4);
            nlls(&*model, &tokens[from..p + 2])[p - from]
        })
        .sum();
    assert_eq!(result.total.n_tokens, 49);
    assert!(
        (result.total.nll_sum - expected).abs() < 1e-3,
        "{} {expected}",
        result.total.nll_sum
    );
}

#[test]
fn perplexity_can_be_stopped_and_checks_its_input() {
    let model = tiny(&LoadOptions::default());
    let mut heard = Vec::new();
    let mut stop = |done, all| {
        heard.push((done, all));
        if done >= 20 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let windows = Windows {
        window: 10,
        stride: 10,
        fills_last: false,
    };
    let result = perplexity(
        &*model,
        &documents(),
        windows,
        KvFormats::default(),
        &mut stop,
    )
    .unwrap();
    assert_eq!(heard, [(10, 68), (20, 68)]);
    assert_eq!(result.total.n_tokens, 20);
    let mut go_on = |_, _| ControlFlow::Continue(());
    for (window, stride) in [(10, 0), (10, 11), (0, 0), (500, 500)] {
        let result = perplexity(
            &*model,
            &documents(),
            Windows {
                window,
                stride,
                fills_last: false,
            },
            KvFormats::default(),
            &mut go_on,
        );
        assert!(
            matches!(result, Err(EngineError::BadOption { .. })),
            "{window} {stride}"
        );
    }
    let alien = [Document {
        domain: "x".into(),
        tokens: vec![1, 2, 400],
    }];
    let result = perplexity(&*model, &alien, windows, KvFormats::default(), &mut go_on);
    assert!(matches!(
        result,
        Err(EngineError::UnknownToken { token: 400, .. })
    ));
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    type Edit = fn(&mut Vec<cadre_checkpoint::TensorData<'_>>);
    let edits: [(&str, Edit); 4] = [
        ("model.layers.1.mlp.experts.3.up_proj.weight", |tensors| {
            tensors.retain(|t| !t.name.ends_with("layers.1.mlp.experts.3.up_proj.weight"));
        }),
        ("model.layers.0.mlp.gate.bias", |tensors| {
            let mut extra = tensors[0].clone();
            extra.name = "model.layers.0.mlp.gate.bias".to_owned();
            tensors.push(extra);
        }),
        ("model.layers.0.self_attn.q_proj.weight", |tensors| {
            let q = tensors
                .iter_mut()
                .find(|t| t.name.ends_with("0.self_attn.q_proj.weight"));
            q.unwrap().shape.reverse();
            let k = tensors
                .iter_mut()
                .find(|t| t.name.ends_with("0.self_attn.q_proj.weight"));
            k.unwrap().shape = vec![16, 64];
        }),
        ("model.layers.1.mlp.experts.0.down_proj.weight", |tensors| {
            let down = tensors
                .iter_mut()
                .find(|t| t.name.ends_with("1.mlp.experts.0.down_proj.weight"));
            down.unwrap().values.to_mut()[7] = f32::NAN;
        }),
    ];
    for (name, edit) in edits {
        let folder = TinyMoe::default().build().unwrap();
        folder.edit_tensors(edit).unwrap();
        for quant in [Quant::AsStored, Quant::Q8_0] {
            let options = LoadOptions {
                quant,
                ..Default::default()
            };
            let error = load(&folder.open().unwrap(), &options)
                .unwrap_err()
                .to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}

#[test]
fn nan_in_bf16_is_found_too() {
    let folder = TinyMoe::default()
        .dtype(cadre_checkpoint::Dtype::Bf16)
        .build()
        .unwrap();
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let error = load(&folder.open().unwrap(), &LoadOptions::default()).unwrap_err();
    assert!(matches!(error, EngineError::Checkpoint(_)), "{error}");
    assert!(error.to_string().contains("NaN"), "{error}");
}

#[test]
fn loading_tells_how_far_it_is() {
    let folder = TinyMoe::default().build().unwrap();
    let checkpoint = folder.open().unwrap();
    let n_bytes = AtomicU64::new(0);
    let progress = |n: u64| {
        n_bytes.fetch_add(n, Ordering::Relaxed);
    };
    load_watched(&checkpoint, &LoadOptions::default(), &progress).unwrap();
    // All but vectors and routers.
    let all = checkpoint.data_bytes();
    let told = n_bytes.into_inner();
    assert!(told <= all && told > all * 9 / 10, "{told} of {all}");
}

#[test]
fn load_options_are_checked() {
    let folder = TinyMoe::default().build().unwrap();
    let checkpoint = folder.open().unwrap();
    let zero = LoadOptions {
        n_threads: Some(0),
        ..Default::default()
    };
    assert!(matches!(
        load(&checkpoint, &zero),
        Err(EngineError::BadOption {
            name: "threads",
            ..
        })
    ));
    for isa in Isa::ALL {
        let options = LoadOptions {
            isa: Some(isa),
            ..Default::default()
        };
        match load(&checkpoint, &options) {
            Ok(model) => assert_eq!(model.compute().kernels().isa(), isa),
            Err(error) => {
                assert!(!isa.is_available());
                assert!(error.to_string().contains("scalar"), "{error}");
            }
        }
    }
}
