//! `cadre eval`: measures a model on data, per domain.

mod answers;
mod choices;
mod perplexity;
mod questions;

use anyhow::Result;
use clap::Subcommand;

use crate::cli::App;

/// Arguments of `cadre eval`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// How well the model predicts the text: exp of the mean nats per token.
    Perplexity(perplexity::Args),
    /// How often the model finds the right one of several answers the most likely, as lm_eval scores `multiple_choice` tasks.
    Choices(choices::Args),
    /// How often the model's own answer is the right one, as lm_eval scores `generate_until` tasks with `exact_match`.
    Answers(answers::Args),
}

/// Measures and prints.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    match &args.what {
        What::Perplexity(args) => perplexity::run(app, args),
        What::Choices(args) => choices::run(app, args),
        What::Answers(args) => answers::run(app, args),
    }
}
