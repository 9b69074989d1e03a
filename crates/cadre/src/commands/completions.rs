//! `cadre completions`: a completion script for a shell, on standard output.

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::output::Out;

/// Arguments of `cadre completions`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell.
    shell: Shell,
}

/// Prints the script.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "cadre", &mut script);
    let mut out = Out::new();
    out.write(&String::from_utf8_lossy(&script))?;
    out.finish()
}
