//! The command line: global flags, the list of commands, and what every command gets.

use std::io;

use anyhow::Result;
use clap::{ArgAction, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::cache::spelled_out;
use crate::commands::{
    apply, bench, chat, completions, convert, doctor, eval, fit, inspect, logits, plan, pull,
    quantize, run, serve, split, trace, upcycle,
};
#[cfg(feature = "train")]
use crate::commands::{train, tune};
use crate::env::{self, Env};
use crate::interrupt::Interrupt;
use crate::output::ColorChoice;

/// Runs Mixture-of-Experts models and shows what every expert does.
#[derive(Debug, Parser)]
#[command(
    name = "cadre",
    version,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Colour of the output.
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    color: ColorChoice,
    /// More log lines on standard error; repeat for more. RUST_LOG overrides.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate text.
    Run(run::Args),
    /// Talk with a model that was tuned for it.
    Chat(chat::Args),
    /// Serve a model over HTTP, as OpenAI's clients expect it.
    Serve(serve::Args),
    /// Record which experts every token uses, or show a recording.
    Trace(trace::Args),
    /// Decide from a recording which experts a model can do without, or show such a plan.
    Plan(plan::Args),
    /// Write a model as a plan says: with fewer experts, or merged ones.
    Apply(apply::Args),
    /// Part the neurons of a dense model among experts: the same model, as a mixture.
    Split(split::Args),
    /// Make experts of copies of a dense model's feed-forwards.
    Upcycle(upcycle::Args),
    /// Train a model from a recipe, draw its curves, or measure training speed.
    #[cfg(feature = "train")]
    Train(train::Args),
    /// Tune a model after surgery, on the text that it is for.
    #[cfg(feature = "train")]
    Tune(tune::Args),
    /// Print raw logits of token ids, for checking against other engines.
    Logits(logits::Args),
    /// Measure how fast a model reads prompts and generates.
    Bench(bench::Args),
    /// Measure a model on data.
    Eval(eval::Args),
    /// Show what is in a checkpoint.
    Inspect(inspect::Args),
    /// Say whether a model fits into memory and how fast it will be; exit code 3 when it does not fit.
    Fit(fit::Args),
    /// Write a checkpoint as GGUF or as a Hugging Face folder, in another number format if asked.
    Convert(convert::Args),
    /// Write a model as a quantised GGUF file, by the types of llama-quantize (Q4_K_M, Q8_0, MXFP4_MOE, ...).
    Quantize(quantize::Args),
    /// Download a model from the Hugging Face hub and print its path.
    Pull(pull::Args),
    /// Show what this machine can do and what Cadre will choose.
    Doctor(doctor::Args),
    /// Print a completion script for a shell.
    Completions(completions::Args),
}

/// What every command gets besides its own arguments.
pub(crate) struct App {
    /// The environment.
    pub(crate) env: Env,
    /// Ctrl-C.
    pub(crate) interrupt: Interrupt,
    /// Choice for standard output.
    pub(crate) color: ColorChoice,
}

/// Parses argv and runs the command. Wrong usage ends the process with code 2 in here.
pub(crate) fn run() -> Result<()> {
    let cli = Cli::parse_from(env::arguments().map(spelled_out));
    let env = Env::read();
    start_logging(&env, cli.verbose);
    let app = App {
        interrupt: Interrupt::install()?,
        color: cli.color,
        env,
    };
    match cli.command {
        Command::Run(args) => run::run(&app, &args),
        Command::Chat(args) => chat::run(&app, &args),
        Command::Serve(args) => serve::run(&app, &args),
        #[cfg(feature = "train")]
        Command::Train(args) => train::run(&app, &args),
        #[cfg(feature = "train")]
        Command::Tune(args) => tune::run(&app, &args),
        Command::Trace(args) => trace::run(&app, &args),
        Command::Plan(args) => plan::run(&app, &args),
        Command::Apply(args) => apply::run(&app, &args),
        Command::Split(args) => split::run(&app, &args),
        Command::Upcycle(args) => upcycle::run(&app, &args),
        Command::Logits(args) => logits::run(&app, &args),
        Command::Bench(args) => bench::run(&app, &args),
        Command::Eval(args) => eval::run(&app, &args),
        Command::Inspect(args) => inspect::run(&app, &args),
        Command::Fit(args) => fit::run(&app, &args),
        Command::Convert(args) => convert::run(&app, &args),
        Command::Quantize(args) => quantize::run(&app, &args),
        Command::Pull(args) => pull::run(&app, &args),
        Command::Doctor(args) => doctor::run(&app, &args),
        Command::Completions(args) => completions::run(&args),
    }
}

/// Log lines go to standard error: warnings, or more with `-v`.
fn start_logging(env: &Env, verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = env.rust_log.as_deref().unwrap_or(level);
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_ansi(env.allows_color && env.stderr_is_terminal)
        .with_writer(io::stderr)
        .without_time()
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// Without the feature `ansi` this panics, and with it every command on a terminal.
    #[test]
    fn log_lines_may_have_colour() {
        let _ = tracing_subscriber::fmt().with_ansi(true);
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
