//! `cadre eval answers`: whether what a model writes after a prompt is the right answer.
//!
//! As lm_eval's `generate_until` with `exact_match`: the most likely token is taken each time, up to a stop string, an end
//! token or `-n` tokens. White space around an answer does not count.

use anyhow::{Result, ensure};
use cadre_engine::{GenerateOptions, SamplingOptions, generate};
use serde::{Deserialize, Serialize};

use super::questions::{Asked, QuestionArgs, Tally, about};
use crate::cli::App;
use crate::data::unnamed;
use crate::live::Live;
use crate::output::bar;

/// Arguments of `cadre eval answers`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    questions: QuestionArgs,
    /// Most tokens of an answer (lm_eval's `max_gen_toks`).
    #[arg(
        short = 'n',
        long = "predict",
        visible_alias = "n-predict",
        value_name = "N",
        default_value_t = 256
    )]
    n_predict: usize,
    /// An answer ends before this text; may be given several times (lm_eval's `until`).
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

const HINT: &str =
    r#"each line is one question: {"domain": "code", "prompt": "...", "answer": "..."}"#;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    #[serde(default = "unnamed")]
    domain: String,
    prompt: String,
    answer: String,
}

/// What came of a question.
#[derive(Debug, Serialize)]
struct Sample {
    /// What the model wrote.
    text: String,
    is_right: bool,
}

/// Asks and prints.
pub(super) fn run(app: &App, args: &Args) -> Result<()> {
    let questions: Vec<Question> = args.questions.read(HINT)?;
    let mut asked = args.questions.load(app)?;
    let options = GenerateOptions {
        max_new_tokens: args.n_predict,
        stop_tokens: asked.loaded.stop_tokens(&asked.tokenizer)?,
        // The most likely token each time.
        sampling: SamplingOptions::default(),
    };
    let progress = bar(&app.env, "questions", questions.len() as u64);
    let mut tally = Tally::new(["exact_match"]);
    for question in &questions {
        app.interrupt.check()?;
        let sample = ask(app, &mut asked, question, &options, &args.stop);
        let sample = about(sample, &question.prompt)?;
        tally.add(&question.domain, [sample.is_right], &sample)?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    tally.print(&asked, &args.questions)
}

fn ask(
    app: &App,
    asked: &mut Asked,
    question: &Question,
    options: &GenerateOptions,
    stops: &[String],
) -> Result<Sample> {
    let tokens = asked.encode(&question.prompt)?;
    let (n, n_ctx) = (tokens.len(), asked.session.n_ctx());
    // An answer that the context cuts off would count as a wrong one.
    ensure!(
        n + options.max_new_tokens <= n_ctx,
        "it has {n} tokens, and with an answer of {} they are more than the context of {n_ctx}; ask for a shorter one with -n",
        options.max_new_tokens
    );
    let mut live = Live::new(&asked.tokenizer, stops, app, None, None);
    live.follow(&tokens);
    asked.session.rewind(0);
    let model = &*asked.loaded.model;
    generate(model, &mut asked.session, &tokens, options, &mut live)?;
    let text = live.finish()?.text;
    Ok(Sample {
        is_right: text.trim() == question.answer.trim(),
        text,
    })
}
