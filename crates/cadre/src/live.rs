//! Text as it is generated: streaming, stop strings, colours, Ctrl-C, and the clock.

use std::collections::VecDeque;
use std::fmt;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Result;
use cadre_checkpoint::{StopMatcher, TokenStream, Tokenizer};
use cadre_engine::{Hooks, Observer, RoutingEvent};

use crate::cli::App;
use crate::experts::{ExpertView, ExpertWatch};
use crate::interrupt::Interrupt;
use crate::output::{Out, harmless};

/// Follows one generation. Errors of printing break it and come out of [`Live::finish`].
pub(crate) struct Live<'a> {
    tokenizer: &'a Tokenizer,
    stream: TokenStream<'a>,
    stops: StopMatcher,
    interrupt: &'a Interrupt,
    /// Where the text is shown while it grows, if it is.
    out: Option<Out>,
    /// Whether that is a terminal.
    on_terminal: bool,
    experts: Option<(&'a ExpertView, ExpertWatch)>,
    /// Text whose expert is not known yet, with its position.
    waiting: VecDeque<(String, usize)>,
    text: String,
    stopped: bool,
    clock: Clock,
    error: Option<anyhow::Error>,
}

/// What was generated, beyond the tokens.
pub(crate) struct Transcript {
    /// The new text.
    pub(crate) text: String,
    /// A stop string ended it.
    pub(crate) stopped: bool,
    /// What the experts did, if they were watched.
    pub(crate) experts: Option<ExpertWatch>,
    /// How long it took.
    pub(crate) clock: Clock,
}

impl<'a> Live<'a> {
    /// Prepares for a generation; `out` is where text is shown.
    pub(crate) fn new(
        tokenizer: &'a Tokenizer,
        stops: &[String],
        app: &'a App,
        out: Option<Out>,
        experts: Option<(&'a ExpertView, ExpertWatch)>,
    ) -> Self {
        Self {
            tokenizer,
            stream: tokenizer.stream(),
            stops: StopMatcher::new(stops),
            interrupt: &app.interrupt,
            out,
            on_terminal: app.env.stdout_is_terminal,
            experts,
            waiting: VecDeque::new(),
            text: String::new(),
            stopped: false,
            clock: Clock::start(),
            error: None,
        }
    }

    /// Makes the text continue that of `prompt`: its first word keeps its space.
    pub(crate) fn follow(&mut self, prompt: &[u32]) {
        self.stream = self.tokenizer.stream_after(prompt);
    }

    /// Shows the prompt before the text.
    pub(crate) fn echo(&mut self, prompt: &[u32]) -> Result<()> {
        let mut stream = self.tokenizer.stream();
        for (position, token) in prompt.iter().enumerate() {
            self.show(stream.push(*token), position)?;
        }
        self.show(stream.finish(), prompt.len().saturating_sub(1))
    }

    /// Shows `text` of the token at `position`, at once or when its expert is known.
    fn show(&mut self, text: String, position: usize) -> Result<()> {
        let Some(out) = &mut self.out else {
            return Ok(());
        };
        if self.experts.is_some() {
            self.waiting.push_back((text, position));
            return Ok(());
        }
        if self.on_terminal {
            return out.write_now(&harmless(&text));
        }
        out.write_now(&text)
    }

    /// Shows waiting text as far as experts are known, or all of it.
    fn show_waiting(&mut self, all: bool) -> Result<()> {
        let (Some(out), Some((view, watch))) = (&mut self.out, &self.experts) else {
            return Ok(());
        };
        while let Some((text, position)) = self.waiting.front() {
            let expert = watch.leading(*position);
            if expert.is_none() && !all {
                break;
            }
            out.write(&view.paint(text, expert))?;
            self.waiting.pop_front();
        }
        out.finish()
    }

    fn take(&mut self, token: u32, position: usize) -> Result<()> {
        let piece = self.stream.push(token);
        self.release(&piece, position)?;
        self.show_waiting(false)?;
        if let Some((_, watch)) = &mut self.experts {
            watch.token(token);
        }
        Ok(())
    }

    fn release(&mut self, piece: &str, position: usize) -> Result<()> {
        let released = self.stops.push(piece);
        self.stopped |= released.stopped;
        self.text += &released.text;
        self.show(released.text, position)
    }

    /// Remembers an error; says whether to go on.
    fn flow(&mut self, result: Result<()>) -> ControlFlow<()> {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
        if self.error.is_some() || self.stopped || self.interrupt.requested() {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// Shows what was held back and ends the line.
    pub(crate) fn finish(mut self) -> Result<Transcript> {
        self.clock.stop();
        if let Some(error) = self.error {
            return Err(error);
        }
        if !self.stopped {
            let rest = self.stream.finish();
            self.release(&rest, usize::MAX)?;
            let held = self.stops.finish();
            self.text += &held;
            self.show(held, usize::MAX)?;
        }
        self.show_waiting(true)?;
        if let Some(out) = &mut self.out {
            out.write_now("\n")?;
        }
        let Self {
            text,
            stopped,
            clock,
            experts,
            ..
        } = self;
        Ok(Transcript {
            text,
            stopped,
            experts: experts.map(|(_, watch)| watch),
            clock,
        })
    }
}

impl Observer for Live<'_> {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        if let Some((_, watch)) = &mut self.experts
            && let Err(error) = watch.routed(event)
        {
            self.error.get_or_insert(error);
        }
    }

    fn attention_routed(&mut self, event: &RoutingEvent<'_>) {
        if let Some((_, watch)) = &mut self.experts
            && let Err(error) = watch.attention_routed(event)
        {
            self.error.get_or_insert(error);
        }
    }

    fn watches(&self) -> bool {
        self.experts.is_some()
    }
}

impl Hooks for Live<'_> {
    fn prompt(&mut self, n_done: usize, n_total: usize) -> ControlFlow<()> {
        if n_done == n_total {
            self.clock.prompt_is_read();
        }
        self.flow(Ok(()))
    }

    fn token(&mut self, token: u32, position: usize) -> ControlFlow<()> {
        let result = self.take(token, position);
        self.flow(result)
    }
}

/// Times of one generation.
pub(crate) struct Clock {
    start: Instant,
    prompt_read: Option<Instant>,
    end: Option<Instant>,
}

impl Clock {
    fn start() -> Self {
        Self {
            start: Instant::now(),
            prompt_read: None,
            end: None,
        }
    }

    fn prompt_is_read(&mut self) {
        self.prompt_read = Some(Instant::now());
    }

    fn stop(&mut self) {
        self.end = Some(Instant::now());
    }

    /// Tokens per second; the first new token belongs to the prompt's time.
    pub(crate) fn rates(&self, n_prompt: usize, n_new: usize) -> Rates {
        let end = self.end.unwrap_or(self.start);
        let read = self.prompt_read.unwrap_or(end);
        let rate = |n: usize, from: Instant, to: Instant| {
            let seconds = to.duration_since(from).as_secs_f64();
            if seconds > 0.0 {
                n as f64 / seconds
            } else {
                0.0
            }
        };
        Rates {
            n_prompt,
            n_new,
            prompt: rate(n_prompt, self.start, read),
            new: rate(n_new.saturating_sub(1), read, end),
        }
    }
}

/// Speed of one generation.
pub(crate) struct Rates {
    n_prompt: usize,
    n_new: usize,
    /// Prompt tokens per second.
    pub(crate) prompt: f64,
    /// New tokens per second.
    pub(crate) new: f64,
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            n_prompt,
            n_new,
            prompt,
            new,
        } = self;
        write!(
            f,
            "prompt {n_prompt} tokens, {prompt:.0}/s; new {n_new} tokens, {new:.0}/s"
        )
    }
}
