//! `cadre chat`: a conversation on the terminal, or one question from a flag or a pipe.

use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use cadre_engine::{GenerateOptions, SessionOptions};

use crate::cache::CacheArgs;
use crate::chat::{Chat, ChatOptions, Ended};
use crate::cli::App;
use crate::contrast::ContrastArgs;
use crate::failure::Failure;
use crate::model::{ModelArgs, Seats};
use crate::output::note;
use crate::sampling::SamplingArgs;

const HELP: &str = "\
/clear       forget the conversation, but not the system message
/save FILE   write the messages as JSON
/help        this list
/exit        leave (so does Ctrl-D)
A line that ends with \\ goes on with the next. Ctrl-C stops an answer.";

/// Arguments of `cadre chat`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Ask only this, print the answer, and leave. Text piped in does the same, as one question.
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Message that tells the model how to behave.
    #[arg(long, visible_alias = "system-prompt", value_name = "TEXT")]
    system: Option<String>,
    /// Chat template (Jinja) to use in place of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template_file: Option<PathBuf>,
    /// Take a question from every line, even when standard input is no terminal.
    #[arg(short, long, conflicts_with = "prompt")]
    interactive: bool,
    /// Most tokens of an answer; 0 leaves it to the context.
    #[arg(
        short = 'n',
        long = "predict",
        visible_alias = "n-predict",
        value_name = "N"
    )]
    #[arg(default_value_t = 0)]
    n_predict: usize,
    /// Longest conversation, in tokens; 0 means what the model allows, up to 4096.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    contrast: ContrastArgs,
}

/// Talks.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let sampling = args.sampling.options()?;
    let question = question(app, args)?;
    let template = match &args.chat_template_file {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let shown = path.display().to_string();
            Some((text.with_context(|| format!("cannot read {shown}"))?, shown))
        }
        None => None,
    };
    let session = SessionOptions {
        n_ctx: (args.ctx_size > 0).then_some(args.ctx_size),
        kv: args.cache.formats(),
        ..SessionOptions::default()
    };
    let n_sessions = args.contrast.n_sessions();
    let loaded = args.model.load_for(app, Seats::new(session, n_sessions))?;
    let options = ChatOptions {
        system: args.system.clone(),
        n_ctx: session.n_ctx,
        kv: session.kv,
        contrast: args.contrast.clone(),
        template,
        generate: GenerateOptions {
            max_new_tokens: match args.n_predict {
                0 => usize::MAX,
                n => n,
            },
            stop_tokens: Vec::new(),
            sampling,
        },
    };
    let mut chat = Chat::new(&loaded, options)?;
    match question {
        Some(question) => ask_once(app, &mut chat, &question),
        None => converse(app, &mut chat),
    }
}

/// The one question of a call that is no conversation.
fn question(app: &App, args: &Args) -> Result<Option<String>> {
    let text = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None if args.interactive || app.env.stdin_is_terminal => return Ok(None),
        None => {
            let mut text = String::new();
            let read = io::stdin().read_to_string(&mut text);
            read.context("cannot read the question from standard input")?;
            text
        }
    };
    if text.trim().is_empty() {
        let hint = "pass -p TEXT, pipe text in, or talk on a terminal";
        return Err(Failure::usage("the question is empty").hint(hint).into());
    }
    Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
}

fn ask_once(app: &App, chat: &mut Chat<'_>, question: &str) -> Result<()> {
    let guard = app.interrupt.guard();
    let ended = chat.ask(app, question)?;
    drop(guard);
    if ended == Ended::ContextFull {
        note(&app.env, &context_is_full(chat));
    }
    app.interrupt.check()
}

fn context_is_full(chat: &Chat<'_>) -> String {
    let (_, n_ctx) = chat.room();
    format!("the context of {n_ctx} tokens is full; -c makes it larger")
}

/// What a line of the user means.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Nothing,
    Exit,
    Help,
    Clear,
    Save(&'a str),
    Unknown(&'a str),
    Question(&'a str),
}

/// Questions and answers until the input ends. A failed answer is said and does not end it.
fn converse(app: &App, chat: &mut Chat<'_>) -> Result<()> {
    note(&app.env, "/help shows what you can do besides talking");
    loop {
        let Some(text) = read_line(app)? else {
            return Ok(());
        };
        match understand(&text) {
            Line::Nothing => {}
            Line::Exit => return Ok(()),
            Line::Help => say(HELP),
            Line::Clear => {
                chat.clear();
                say("forgotten");
            }
            Line::Save(file) => match save(chat, file) {
                Ok(()) => say(&format!("{} messages are in {file}", chat.messages().len())),
                Err(error) => say(&format!("{error:#}")),
            },
            Line::Unknown(command) => say(&format!("no command is called {command}; see /help")),
            Line::Question(question) => answer(app, chat, question)?,
        }
    }
}

fn answer(app: &App, chat: &mut Chat<'_>, question: &str) -> Result<()> {
    let guard = app.interrupt.guard();
    let ended = chat.ask(app, question);
    app.interrupt.take();
    drop(guard);
    match ended {
        Ok(Ended::Done) => {}
        Ok(Ended::Interrupted) => note(&app.env, "(stopped)"),
        Ok(Ended::ContextFull) => say(&format!("{}, /clear empties it", context_is_full(chat))),
        // What the user can mend is said; a closed output or a broken model ends the program.
        Err(error) => match error.downcast_ref::<Failure>() {
            Some(failure) => say(&failure.advice()),
            None => return Err(error),
        },
    }
    Ok(())
}

/// A line on standard error, where everything but the answers goes.
fn say(text: &str) {
    // A message is not worth failing for.
    let _ = writeln!(io::stderr(), "{text}");
}

/// The next question, over all lines that end with a backslash; `None` at the end of the input.
fn read_line(app: &App) -> Result<Option<String>> {
    let mut text = String::new();
    loop {
        if app.env.stdin_is_terminal {
            let sign = if text.is_empty() { "> " } else { ". " };
            let _ = write!(io::stderr(), "{sign}");
        }
        let mut line = String::new();
        let n = io::stdin().lock().read_line(&mut line);
        if n.context("cannot read standard input")? == 0 {
            return Ok((!text.is_empty()).then_some(text));
        }
        let line = line.trim_end_matches(['\r', '\n']);
        match line.strip_suffix('\\') {
            Some(rest) => text += &format!("{rest}\n"),
            None => return Ok(Some(text + line)),
        }
    }
}

fn understand(text: &str) -> Line<'_> {
    let text = text.trim();
    let (first, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    match (first, rest.trim()) {
        ("", _) => Line::Nothing,
        ("/exit" | "/quit" | "/bye", "") => Line::Exit,
        ("/help" | "/?", "") => Line::Help,
        ("/clear", "") => Line::Clear,
        ("/save", file) if !file.is_empty() => Line::Save(file),
        _ => {
            let name = first.strip_prefix('/');
            let is_command = |name: &str| name.bytes().all(|byte| byte.is_ascii_lowercase());
            match name {
                Some(name) if is_command(name) => Line::Unknown(text),
                _ => Line::Question(text),
            }
        }
    }
}

fn save(chat: &Chat<'_>, file: &str) -> Result<()> {
    let text = serde_json::to_string_pretty(chat.messages())?;
    std::fs::write(file, text + "\n").with_context(|| format!("cannot write {file}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_questions() {
        assert_eq!(understand("  "), Line::Nothing);
        assert_eq!(understand("/bye"), Line::Exit);
        assert_eq!(understand("/save a b.json "), Line::Save("a b.json"));
        assert_eq!(understand("/save"), Line::Unknown("/save"));
        assert_eq!(understand("/exti"), Line::Unknown("/exti"));
        assert_eq!(
            understand("/usr/bin is what?"),
            Line::Question("/usr/bin is what?")
        );
        assert_eq!(understand("hi\nthere"), Line::Question("hi\nthere"));
    }
}
